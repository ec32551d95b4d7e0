"""Exact denoisers: data laws whose noised densities are known in closed form.

If x_0 follows sum_k w_k N(m_k, s_k^2 I), then x_0 + sigma eps follows sum_k w_k N(m_k, (s_k^2 + sigma^2) I), and

    E[x_0 | x] = sum_k r_k(x) (m_k + s_k^2 / (s_k^2 + sigma^2) (x - m_k)),   r_k(x) the posterior weights.

`Gaussian` and `Empirical` are the cases of one component and of s_k = 0. They are teachers for toys, and the truth that
everything else in Limbeck is tested against. Parameters are kept in float64; results have the dtype of x, samples the
dtype of the tensors given to the constructor (torch's default for Python numbers).
"""

from __future__ import annotations

import math
from functools import reduce

import torch
from torch import Tensor

from limbeck.denoiser import Denoiser, expand, score


def _dtype(*values: object) -> torch.dtype:
    """Promoted dtype of the floating tensors among `values`, torch's default if there are none."""
    kinds = [v.dtype for v in values if isinstance(v, Tensor) and v.is_floating_point()]
    return reduce(torch.promote_types, kinds) if kinds else torch.get_default_dtype()


def _finite(values: object, name: str) -> Tensor:
    try:
        tensor = torch.as_tensor(values, dtype=torch.float64).clone()
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{name}: not an array of numbers ({error})") from None
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{name}: contains NaN or Inf")
    return tensor


def _rows(values: object, name: str) -> Tensor:
    tensor = _finite(values, name)
    if tensor.ndim < 2 or tensor.shape[0] == 0:
        raise ValueError(f"{name}: expected shape (n, *shape) with n >= 1, got {tuple(tensor.shape)}")
    return tensor


class Gaussian(Denoiser):
    """N(mean, std^2), independent coordinates.

    Args:
        mean: scalar or tensor of the sample's shape; two scalars make a law of one coordinate.
        std: scalar or tensor of the sample's shape, positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: object, std: object) -> None:
        m, s = _finite(mean, "mean"), _finite(std, "std")
        m = torch.atleast_1d(m)
        if s.ndim and s.shape != m.shape:
            raise ValueError(f"std: shape {tuple(s.shape)} does not fit a mean of shape {tuple(m.shape)}")
        s = s.expand(m.shape).clone()
        if not (s > 0).all():
            raise ValueError("std: must be positive")
        super().__init__(tuple(m.shape), 0, float((m**2 + s**2).mean().sqrt()))
        self.dtype = _dtype(mean, std)
        self.register_buffer("mean", m)
        self.register_buffer("std", s)

    def forward(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
        self.labels(cond, x)
        mean, variance = self.mean.to(x.dtype), self.std.to(x.dtype) ** 2
        return mean + variance / (variance + expand(sigma, x) ** 2) * (x - mean)

    def score(self, x: Tensor, sigma: Tensor) -> Tensor:
        """grad log p_sigma(x), shape of x (B, *shape)."""
        return score(self, x, sigma)

    def log_prob(self, x: Tensor, sigma: float | Tensor = 0.0) -> Tensor:
        """Log density at x (B, *shape) of the law noised to `sigma` (scalar or (B,)): (B,)."""
        variance = self.std.to(x.dtype) ** 2 + expand(torch.as_tensor(sigma, dtype=torch.float64), x) ** 2
        terms = (x - self.mean.to(x.dtype)) ** 2 / variance + torch.log(2 * math.pi * variance)
        return -terms.flatten(1).sum(1) / 2

    def sample(self, n: int, generator: torch.Generator | None = None, cond: Tensor | None = None) -> Tensor:
        """`n` exact samples (n, *shape), drawn by a CPU's generator; there are no conditions."""
        noise = torch.randn(n, *self.shape, generator=generator, dtype=self.dtype).to(self.mean.device)
        self.labels(cond, noise)
        return self.mean.to(self.dtype) + self.std.to(self.dtype) * noise


class Mixture(Denoiser):
    """sum_k w_k N(m_k, s_k^2 I).

    Args:
        weights: (K,), positive; normalised here.
        means: (K, *shape).
        stds: scalar or (K,), positive.
    """

    weights: Tensor
    means: Tensor
    stds: Tensor

    def __init__(self, weights: object, means: object, stds: object) -> None:
        m, w, s = _rows(means, "means"), _finite(weights, "weights"), _finite(stds, "stds")
        k = m.shape[0]
        s = s.expand(k).clone() if s.ndim == 0 else s
        if w.shape != (k,) or s.shape != (k,):
            raise ValueError(
                f"weights: {k} means need {k} weights and {k} stds, got shapes {tuple(w.shape)} and {tuple(s.shape)}"
            )
        if not (w > 0).all():
            raise ValueError("weights: must be positive")
        if not (s > 0).all():
            raise ValueError("stds: must be positive")
        w = w / w.sum()
        second_moment = (w * (m.flatten(1).pow(2).mean(1) + s**2)).sum()
        super().__init__(tuple(m.shape[1:]), 0, float(second_moment.sqrt()))
        self.dtype = _dtype(means, stds)
        self.register_buffer("weights", w)
        self.register_buffer("means", m)
        self.register_buffer("stds", s)

    def _log_joint(self, x: Tensor, sigma: Tensor) -> Tensor:
        """log w_k + log N(x; m_k, s_k^2 + sigma^2): (B, K)."""
        variance = self.stds.to(x.dtype) ** 2 + sigma.to(x).reshape(-1, 1) ** 2
        gap = x.flatten(1)[:, None] - self.means.to(x.dtype).flatten(1)
        d = gap.shape[-1]
        return (
            torch.log(self.weights.to(x.dtype))
            - gap.pow(2).sum(-1) / (2 * variance)
            - d / 2 * torch.log(2 * math.pi * variance)
        )

    def forward(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
        self.labels(cond, x)
        posterior = torch.softmax(self._log_joint(x, sigma), 1)
        variance = self.stds.to(x.dtype) ** 2
        shrink = variance / (variance + sigma.to(x).reshape(-1, 1) ** 2)
        flat, means = x.flatten(1), self.means.to(x.dtype).flatten(1)
        mean = (posterior * shrink).sum(1, keepdim=True) * flat + (posterior * (1 - shrink)) @ means
        return mean.reshape(x.shape)

    def score(self, x: Tensor, sigma: Tensor) -> Tensor:
        """grad log p_sigma(x), shape of x (B, *shape)."""
        return score(self, x, sigma)

    def log_prob(self, x: Tensor, sigma: float | Tensor = 0.0) -> Tensor:
        """Log density at x (B, *shape) of the law noised to `sigma` (scalar or (B,)): (B,)."""
        return torch.logsumexp(self._log_joint(x, torch.as_tensor(sigma, dtype=torch.float64)), 1)

    def sample(self, n: int, generator: torch.Generator | None = None, cond: Tensor | None = None) -> Tensor:
        """`n` exact samples (n, *shape), drawn by a CPU's generator; there are no conditions."""
        place = self.means.device
        k = torch.multinomial(self.weights.cpu(), n, replacement=True, generator=generator).to(place)
        noise = torch.randn(n, *self.shape, generator=generator, dtype=self.dtype).to(place)
        self.labels(cond, noise)
        return self.means[k].to(self.dtype) + expand(self.stds[k], noise) * noise


class Empirical(Denoiser):
    """The uniform law on given points (n, *shape): the ideal denoiser of a finite data set.

    Points are visited in chunks with a running softmax, so that a batch against 60,000 images needs little memory.
    The squared distances are formed in float64: |x|^2 - 2 x.p + |p|^2 loses in float32 what small sigma asks for.
    """

    points: Tensor
    chunk = 8192

    def __init__(self, points: object) -> None:
        p = _rows(points, "points")
        super().__init__(tuple(p.shape[1:]), 0, float(p.pow(2).mean().sqrt()))
        self.dtype = _dtype(points)
        self.register_buffer("points", p)

    def _visit(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """log sum_i exp(-|x - p_i|^2 / (2 sigma^2)) (B,) and the posterior mean (B, d), both float64."""
        flat = x.flatten(1).double()
        scale = -0.5 / sigma.double().reshape(-1, 1) ** 2
        peak = flat.new_full((len(flat), 1), -math.inf)
        total, mean = torch.zeros_like(peak), torch.zeros_like(flat)
        for p in self.points.flatten(1).split(self.chunk):
            squares = flat.pow(2).sum(1, keepdim=True) - 2 * flat @ p.T + p.pow(2).sum(1)
            logits = scale * squares
            # the running maximum cancels in the result, so it needs no gradient
            top = torch.maximum(peak, logits.detach().amax(1, keepdim=True))
            weights, decay = torch.exp(logits - top), torch.exp(peak - top)
            total = total * decay + weights.sum(1, keepdim=True)
            mean = mean * decay + weights @ p
            peak = top
        return (peak + torch.log(total)).squeeze(1), mean / total

    def forward(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
        self.labels(cond, x)
        return self._visit(x, sigma)[1].to(x.dtype).reshape(x.shape)

    def score(self, x: Tensor, sigma: Tensor) -> Tensor:
        """grad log p_sigma(x), shape of x (B, *shape); sigma > 0."""
        return score(self, x, sigma)

    def log_prob(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        """Log density at x (B, *shape) of the points noised to `sigma` > 0 (scalar or (B,)): (B,).

        Raises:
            ValueError: at sigma = 0, where a set of points has no density.
        """
        level = torch.as_tensor(sigma, dtype=torch.float64)
        if not (level > 0).all():
            raise ValueError("sigma: a set of points has a density only at sigma > 0")
        d = math.prod(self.shape)
        value = self._visit(x, level)[0] - math.log(len(self.points)) - d / 2 * torch.log(2 * math.pi * level**2)
        return value.to(x.dtype)

    def sample(self, n: int, generator: torch.Generator | None = None, cond: Tensor | None = None) -> Tensor:
        """`n` points drawn with replacement (n, *shape) by a CPU's generator; there are no conditions."""
        self.labels(cond, self.points)
        rows = torch.randint(len(self.points), (n,), generator=generator)
        return self.points[rows.to(self.points.device)].to(self.dtype)


class Policy(Denoiser):
    """A mixture in the plane, rotated by a context: p(x | c) with c = cond (B, 1) the angle in radians.

    A policy's law of actions given a state, small enough for exact divergences. No condition is c = 0.
    """

    contexts = True

    def __init__(self, mixture: Mixture) -> None:
        if mixture.shape != (2,):
            raise ValueError(f"policy: rotates a mixture in the plane, this one has shape {mixture.shape}")
        super().__init__((2,), 1, mixture.sigma_data)
        self.mixture = mixture

    def turned(self, x: Tensor, cond: Tensor | None, sign: float) -> Tensor:
        """Points x (B, 2) turned by sign times their contexts cond (B, 1)."""
        rows = self.labels(cond, x)
        assert rows is not None
        cos, sin = torch.cos(rows[:, 0]), sign * torch.sin(rows[:, 0])
        return torch.stack([cos * x[:, 0] - sin * x[:, 1], sin * x[:, 0] + cos * x[:, 1]], 1)

    def forward(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
        return self.turned(self.mixture(self.turned(x, cond, -1), sigma), cond, 1)

    def log_prob(self, x: Tensor, sigma: float | Tensor = 0.0, cond: Tensor | None = None) -> Tensor:
        """Log density at x (B, 2), in contexts cond (B, 1), of the law noised to `sigma` (scalar or (B,)): (B,)."""
        return self.mixture.log_prob(self.turned(x, cond, -1), sigma)

    def sample(self, n: int, generator: torch.Generator | None = None, cond: Tensor | None = None) -> Tensor:
        """`n` exact samples (n, 2) in contexts cond (n, 1)."""
        return self.turned(self.mixture.sample(n, generator), cond, 1)


Exact = Gaussian | Mixture | Empirical | Policy
