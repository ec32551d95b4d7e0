"""Generators: modules that turn z ~ N(0, I) into a sample with one network call, or a few."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from limbeck.denoiser import Denoiser, Preconditioned, expand
from limbeck.noise import Karras


class Generator(nn.Module):
    """Interface: `forward(z, cond)` maps z ~ N(0, I), (B, *latent_shape), to samples (B, *shape).

    Attributes:
        shape: of one sample.
        latent_shape: of one latent.
        classes: width of a condition row; 0 = unconditional.
        contexts: condition rows are points of [0, 1]^classes instead of one-hot labels.
        nfe: network calls of `forward`.
    """

    shape: tuple[int, ...]
    latent_shape: tuple[int, ...]
    classes: int
    contexts: bool = False
    nfe: int = 1

    def forward(self, z: Tensor, cond: Tensor | None = None) -> Tensor:
        """Samples (B, *shape) for z (B, *latent_shape) and cond None or (B, classes)."""
        raise NotImplementedError


def calls_of(generator: Generator) -> str:
    """What a sample takes, in words: one network call, 4 network calls."""
    return "one network call" if generator.nfe == 1 else f"{generator.nfe} network calls"


class OneStep(Generator):
    """x = D(sigma z; sigma): a denoiser called once at a fixed level (Diff-Instruct, SiD, DMD).

    Args:
        denoiser: the network's home; its weights are the generator's.
        sigma: the level, absolute.
    """

    def __init__(self, denoiser: Denoiser, sigma: float) -> None:
        super().__init__()
        if not 0 < sigma < math.inf:
            raise ValueError(f"sigma_init: must be positive and finite, got {sigma}")
        self.denoiser, self.sigma = denoiser, float(sigma)
        self.shape = self.latent_shape = denoiser.shape
        self.classes, self.contexts = denoiser.classes, denoiser.contexts

    def forward(self, z: Tensor, cond: Tensor | None = None) -> Tensor:
        return self.denoiser(self.sigma * z, z.new_full((), self.sigma), cond)

    def card(self) -> dict[str, Any]:
        """Everything but the weights, as JSON-able values."""
        return {"generator": "one_step", "sigma": self.sigma, "denoiser": cast(Any, self.denoiser).card()}


class FewStep(Generator):
    """K calls of one denoiser at falling levels, with fresh noise between them (few-step SiD, arXiv:2505.12674).

    x_1 = D(sigma_0 z_0; sigma_0), x_{i+1} = D(x_i + sigma_i z_i; sigma_i). Latents are (K, *shape), one noise a call,
    so that a sample depends on its own latent alone. With K = 1 it is `OneStep`.

    Args:
        denoiser: the network's home; its weights are the generator's.
        sigmas: the K levels, absolute, falling.
    """

    def __init__(self, denoiser: Denoiser, sigmas: Sequence[float]) -> None:
        super().__init__()
        if not sigmas or any(not 0 < s < math.inf for s in sigmas) or list(sigmas) != sorted(sigmas, reverse=True):
            raise ValueError(f"sigmas: must be positive, finite and falling, got {list(sigmas)}")
        self.denoiser, self.sigmas = denoiser, [float(s) for s in sigmas]
        self.shape, self.nfe = denoiser.shape, len(sigmas)
        self.classes, self.contexts = denoiser.classes, denoiser.contexts
        self.latent_shape = (self.nfe, *denoiser.shape)

    def forward(self, z: Tensor, cond: Tensor | None = None) -> Tensor:
        return self.roll(z, cond)

    def roll(self, z: Tensor, cond: Tensor | None = None, calls: int | None = None) -> Tensor:
        """Samples (B, *shape) after the first `calls` calls (None = all), with the graph of the last call only."""
        calls = self.nfe if calls is None else calls
        x = torch.zeros_like(z[:, 0])
        for index, sigma in enumerate(self.sigmas[:calls]):
            last = index == calls - 1
            with torch.set_grad_enabled(last and torch.is_grad_enabled()):
                x = self.denoiser(x + sigma * z[:, index], z.new_full((), sigma), cond)
        return x

    def card(self) -> dict[str, Any]:
        """Everything but the weights, as JSON-able values."""
        return {"generator": "few_step", "sigmas": self.sigmas, "denoiser": cast(Any, self.denoiser).card()}


class Dirac(Generator):
    """One point per class, whatever z is: what score distillation sampling optimises (DreamFusion, arXiv:2209.14988).

    Args:
        shape: of the point.
        classes: width of a condition row; 0 = one point.
        scale: of the samples; the points are stored in its units, and start as unit normal.
    """

    def __init__(self, shape: Sequence[int], classes: int = 0, scale: float = 0.5) -> None:
        super().__init__()
        self.shape, self.latent_shape, self.classes = tuple(shape), (1,), classes
        self.scale = float(scale)
        self.points = nn.Parameter(torch.randn(max(1, classes), *shape))

    def forward(self, z: Tensor, cond: Tensor | None = None) -> Tensor:
        if cond is None or self.classes == 0:
            return self.scale * self.points[:1].expand(z.shape[0], *self.shape)
        return self.scale * torch.tensordot(cond.to(self.points.dtype), self.points, 1)

    def card(self) -> dict[str, Any]:
        """Everything but the weights, as JSON-able values."""
        return {"generator": "dirac", "shape": list(self.shape), "classes": self.classes, "scale": self.scale}


class Direct(Generator):
    """x = sigma_data F(z): a network of the latent alone, without a denoiser's skip connection.

    F reads z unscaled, and a constant where a denoiser's network reads its noise level.

    Args:
        denoiser: the network's home; only its network and sigma_data are used.
        noise: that constant.
    """

    def __init__(self, denoiser: Preconditioned, noise: float = 0.0) -> None:
        super().__init__()
        if not math.isfinite(noise):
            raise ValueError(f"generator.noise: must be finite, got {noise}")
        self.denoiser, self.noise = denoiser, float(noise)
        self.shape = self.latent_shape = denoiser.shape
        self.classes, self.contexts = denoiser.classes, denoiser.contexts

    def at(self, z: Tensor, noise: float, cond: Tensor | None = None) -> Tensor:
        """Samples (B, *shape) with another constant in the place of `noise`."""
        d = self.denoiser
        return d.sigma_data * d.network(z, z.new_full((z.shape[0],), noise), d.labels(cond, z))

    def forward(self, z: Tensor, cond: Tensor | None = None) -> Tensor:
        return self.at(z, self.noise, cond)

    def card(self) -> dict[str, Any]:
        """Everything but the weights, as JSON-able values."""
        return {"generator": "direct", "noise": self.noise, "denoiser": self.denoiser.card()}


class Trajectory(Generator):
    """The whole ODE path as a function of its start: x(z, t) = (t/T) T z + (1 - t/T) F(z, t)   (PID, arXiv:2411.08378).

    x(z, T) = T z holds for any F: the boundary condition is built in. F reads the pure noise at unit variance and the
    *output* time t. With a `Preconditioned` template F is its raw network, c_in and c_noise as in EDM, times `unit`;
    any other template enters as its clean estimate at level t of z scaled to that level.

    Args:
        denoiser: the template; its weights are the generator's.
        levels: T = levels.sigma_max is the start and levels.sigma_min the end, absolute.
    """

    def __init__(self, denoiser: Denoiser, levels: Karras) -> None:
        super().__init__()
        self.denoiser, self.levels = denoiser, levels
        self.shape = self.latent_shape = denoiser.shape
        self.classes, self.contexts = denoiser.classes, denoiser.contexts

    def raw(self, z: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """F(z, t) (B, *shape) for z (B, *shape) ~ N(0, I) and t a scalar or (B,)."""
        d = self.denoiser
        if isinstance(d, Preconditioned):
            c_in = self.levels.sigma_max / math.hypot(d.sigma_data, self.levels.sigma_max)
            return d.unit * d.network(c_in * z, d.c_noise(t, z), d.labels(cond, z))
        return d(expand(t, z) * z, t, cond)

    def at(self, z: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """x(z, t) (B, *shape), the point at level t (a scalar or (B,)) of the path that starts at T z."""
        return path_point(self.raw(z, t, cond), z, expand(t, z), self.levels.sigma_max)

    def forward(self, z: Tensor, cond: Tensor | None = None) -> Tensor:
        return self.at(z, z.new_full((), self.levels.sigma_min), cond)

    def trajectory(self, z: Tensor, sigmas: Tensor, cond: Tensor | None = None) -> Tensor:
        """The path at `sigmas` (S,), one network call each: (S, B, *shape)."""
        return torch.stack([self.at(z, sigma, cond) for sigma in sigmas])

    def card(self) -> dict[str, Any]:
        """Everything but the weights, as JSON-able values."""
        law = self.levels
        return {
            "generator": "trajectory",
            "levels": {"sigma_min": law.sigma_min, "sigma_max": law.sigma_max, "rho": law.rho},
            "denoiser": cast(Any, self.denoiser).card(),
        }


def path_point(f: Tensor, z: Tensor, t: Tensor, t_max: float) -> Tensor:
    """x(z, t) = t z + (1 - t/T) F for unit-variance z, with t broadcast over the sample."""
    return t * z + (1 - t / t_max) * f
