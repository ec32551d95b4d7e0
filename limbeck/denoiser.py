"""Denoisers in one coordinate: D(x; sigma) = E[x_0 | x_0 + sigma * eps = x].

By Tweedie's formula everything else is a function of D: the score (D - x) / sigma^2, the noise (x - D) / sigma.
A model trained with any other (alpha_t, sigma_t) enters here once (`Rescaled`) and is a denoiser from then on.
Preconditioning: Karras et al. (2022), arXiv:2206.00364, Table 1. Guidance: Ho & Salimans (2022), arXiv:2207.12598.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from limbeck.schedule import Schedule, described

Output = Literal["eps", "v", "x0", "flow"]


def expand(sigma: Tensor, x: Tensor) -> Tensor:
    """`sigma`, a scalar or (B,), shaped to broadcast over `x` (B, ...) and in its dtype."""
    return sigma.to(x.dtype).reshape(-1, *(1,) * (x.ndim - 1))


class Denoiser(nn.Module):
    """Interface: `forward(x, sigma, cond)` is the clean estimate E[x_0 | x], shape (B, *shape).

    Attributes:
        shape: shape of one sample, e.g. (1, 8, 8) or (2,).
        classes: width of a condition row; 0 = unconditional.
        sigma_data: root mean square of the data per coordinate; `unit` = sigma_data / 0.5 is the scale of all defaults.
        sigma_min, sigma_max: range of noise levels in which the denoiser can be trusted.
    """

    shape: tuple[int, ...]
    classes: int
    sigma_data: float
    sigma_min: float
    sigma_max: float

    def __init__(
        self,
        shape: tuple[int, ...],
        classes: int,
        sigma_data: float,
        sigma_min: float = 0.0,
        sigma_max: float = math.inf,
    ) -> None:
        super().__init__()
        if not 0 < sigma_data < math.inf:
            raise ValueError(f"sigma_data: must be positive and finite, got {sigma_data}")
        if not 0 <= sigma_min < sigma_max:
            raise ValueError(f"sigma_min: must be below sigma_max and not negative, got {sigma_min} and {sigma_max}")
        self.shape, self.classes, self.sigma_data = tuple(shape), classes, float(sigma_data)
        self.sigma_min, self.sigma_max = float(sigma_min), float(sigma_max)

    @property
    def unit(self) -> float:
        """sigma_data / 0.5: the factor on every default noise level, so that the defaults suit data of any scale."""
        return self.sigma_data / 0.5

    def forward(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
        """E[x_0 | x] (B, *shape) for x (B, *shape), sigma a scalar or (B,), cond None or (B, classes)."""
        raise NotImplementedError

    def labels(self, cond: Tensor | None, x: Tensor) -> Tensor | None:
        """`cond` checked against `classes`; None becomes zero rows (no label) where the denoiser takes labels."""
        if self.classes == 0:
            if cond is not None:
                raise ValueError("cond: this denoiser is unconditional and takes no labels")
            return None
        if cond is None:
            return x.new_zeros(x.shape[0], self.classes)
        if cond.shape != (x.shape[0], self.classes):
            raise ValueError(f"cond: expected shape {(x.shape[0], self.classes)}, got {tuple(cond.shape)}")
        return cond.to(x.dtype)


def score(denoiser: Denoiser, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
    """Score of the noised density, grad log p_sigma(x) = (D(x; sigma) - x) / sigma^2 (Tweedie), shape of x."""
    return (denoiser(x, sigma, cond) - x) / expand(sigma, x) ** 2


def eps(denoiser: Denoiser, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
    """Predicted noise E[eps | x] = (x - D(x; sigma)) / sigma, the velocity dx/dsigma of the probability-flow ODE."""
    return (x - denoiser(x, sigma, cond)) / expand(sigma, x)


class Preconditioned(Denoiser):
    """A network F in EDM's preconditioning: D = c_skip x + c_out F(c_in x, c_noise, cond).

    c_skip = sd^2 / (sigma^2 + sd^2), c_out = sigma sd / sqrt(sigma^2 + sd^2), c_in = 1 / sqrt(sigma^2 + sd^2),
    c_noise = ln(sigma / noise_unit) / 4, with sd = sigma_data.

    Args:
        network: called as network(x, c_noise, cond); output of the shape of x.
        noise_unit: level at which c_noise is 0. None = sigma_data / 0.5, which makes the denoiser of c * x equal to
            c times the denoiser of x; networks trained by EDM itself use 1.
    """

    def __init__(
        self,
        network: nn.Module,
        shape: tuple[int, ...],
        classes: int = 0,
        sigma_data: float = 0.5,
        sigma_min: float = 0.0,
        sigma_max: float = math.inf,
        noise_unit: float | None = None,
    ) -> None:
        super().__init__(shape, classes, sigma_data, sigma_min, sigma_max)
        self.network = network
        self.noise_unit = self.unit if noise_unit is None else float(noise_unit)

    def forward(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
        f = self.network(self._scaled(x, sigma), self.c_noise(sigma, x), self.labels(cond, x))
        return self._combined(x, sigma, f)

    def trace(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The clean estimate, and the features (B, network.feature_width) that the network formed on its way."""
        network: Any = self.network
        f, features = network.trace(self._scaled(x, sigma), self.c_noise(sigma, x), self.labels(cond, x))
        return self._combined(x, sigma, f), features

    def _scaled(self, x: Tensor, sigma: Tensor) -> Tensor:
        return x / (expand(sigma, x) ** 2 + self.sigma_data**2).sqrt()

    def _combined(self, x: Tensor, sigma: Tensor, f: Tensor) -> Tensor:
        s = expand(sigma, x)
        variance = s**2 + self.sigma_data**2
        return self.sigma_data**2 / variance * x + s * self.sigma_data / variance.sqrt() * f

    def c_noise(self, sigma: Tensor, x: Tensor) -> Tensor:
        """The network's noise input, ln(sigma / noise_unit) / 4 with shape (B,)."""
        return (torch.log(sigma.to(x.dtype) / self.noise_unit) / 4).expand(x.shape[0])

    def card(self) -> dict[str, Any]:
        """Everything but the weights, as JSON-able values."""
        network: Any = self.network
        return {
            "network": network.name,
            "arguments": network.arguments,
            "shape": list(self.shape),
            "classes": self.classes,
            "sigma_data": self.sigma_data,
            "sigma_min": self.sigma_min,
            "sigma_max": self.sigma_max if math.isfinite(self.sigma_max) else None,
            "noise_unit": self.noise_unit,
        }


class Rescaled(Denoiser):
    """A model trained on x_t = alpha_t x_0 + sigma_t eps, as a denoiser: D(x; sigma) = x0(alpha_t x, t).

    t is the time at which sigma_t / alpha_t = sigma. The model's output is one of
        eps   the noise,                  x_0 = (x_t - sigma_t eps) / alpha_t
        v     alpha_t eps - sigma_t x_0,  x_0 = (alpha_t x_t - sigma_t v) / (alpha_t^2 + sigma_t^2)
        x0    the clean sample
        flow  eps - x_0,                  x_0 = (x_t - sigma_t u) / (alpha_t + sigma_t)

    Args:
        model: called as model(x_t, t, cond) with t (B,) in the schedule's own time.
        schedule: alpha(t), sigma(t) and time(sigma_t / alpha_t).
        output: what the model predicts.
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule,
        output: Output,
        shape: tuple[int, ...],
        classes: int = 0,
        sigma_data: float = 0.5,
        sigma_min: float = 0.0,
        sigma_max: float = math.inf,
    ) -> None:
        super().__init__(shape, classes, sigma_data, sigma_min, sigma_max)
        if output not in ("eps", "v", "x0", "flow"):
            raise ValueError(f"output: must be eps, v, x0 or flow, got {output!r}")
        self.model, self.schedule, self.output = model, schedule, output

    def forward(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
        t = self.schedule.time(sigma.to(x.dtype)).expand(x.shape[0])
        a, s, ratio = expand(self.schedule.alpha(t), x), expand(self.schedule.sigma(t), x), expand(sigma, x)
        out = self.model(a * x, t, self.labels(cond, x))
        match self.output:
            case "eps":  # x is already x_t / alpha_t, so the division by a small alpha_t cancels by hand
                return x - ratio * out
            case "v":
                return (a**2 * x - s * out) / (a**2 + s**2)
            case "flow":
                return (a * x - s * out) / (a + s)
            case _:
                return out

    def card(self) -> dict[str, Any]:
        """Everything but the weights, as JSON-able values."""
        model: Any = self.model
        return {
            "preconditioning": "rescaled",
            "network": model.name,
            "arguments": model.arguments,
            "schedule": described(self.schedule),
            "output": self.output,
            "shape": list(self.shape),
            "classes": self.classes,
            "sigma_data": self.sigma_data,
            "sigma_min": self.sigma_min,
            "sigma_max": self.sigma_max if math.isfinite(self.sigma_max) else None,
        }


class Guided(Denoiser):
    """Classifier-free guidance: D = D_none + scale (D_cond - D_none); scale 1 is the conditional denoiser."""

    def __init__(self, denoiser: Denoiser, scale: float) -> None:
        super().__init__(denoiser.shape, denoiser.classes, denoiser.sigma_data, denoiser.sigma_min, denoiser.sigma_max)
        if denoiser.classes == 0:
            raise ValueError("guidance: needs a denoiser with labels, this one is unconditional")
        if not math.isfinite(scale):
            raise ValueError(f"guidance.scale: must be finite, got {scale}")
        self.denoiser, self.scale = denoiser, float(scale)

    def forward(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
        rows = self.labels(cond, x)
        if rows is None or self.scale == 1:
            return self.denoiser(x, sigma, rows)
        both = self.denoiser(
            torch.cat([x, x]), sigma.expand(x.shape[0]).repeat(2), torch.cat([rows, torch.zeros_like(rows)])
        )
        with_label, without = both.chunk(2)
        return without + self.scale * (with_label - without)
