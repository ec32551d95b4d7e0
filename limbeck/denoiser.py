"""Denoisers in one coordinate: D(x; sigma) = E[x_0 | x_0 + sigma * eps = x].

By Tweedie's formula everything else is a function of D: the score (D - x) / sigma^2, the noise (x - D) / sigma.
A model trained with any other (alpha_t, sigma_t) enters here once (`Rescaled`) and is a denoiser from then on.
Preconditioning: Karras et al. (2022), arXiv:2206.00364, Table 1. Guidance: Ho & Salimans (2022), arXiv:2207.12598.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from limbeck.schedule import Schedule, described

Output = Literal["eps", "v", "x0", "flow"]
Form = Literal["vp", "ve", "iddpm"]


def expand(sigma: Tensor, x: Tensor) -> Tensor:
    """`sigma`, a scalar or (B,), shaped to broadcast over `x` (B, ...), in its dtype and on its device."""
    return sigma.to(x).reshape(-1, *(1,) * (x.ndim - 1))


class Denoiser(nn.Module):
    """Interface: `forward(x, sigma, cond)` is the clean estimate E[x_0 | x], shape (B, *shape).

    Attributes:
        shape: shape of one sample, e.g. (1, 8, 8) or (2,).
        classes: width of a condition row; 0 = unconditional.
        contexts: condition rows are points of [0, 1]^classes instead of one-hot labels.
        sigma_data: root mean square of the data per coordinate; `unit` = sigma_data / 0.5 is the scale of all defaults.
        sigma_min, sigma_max: range of noise levels in which the denoiser can be trusted.
    """

    shape: tuple[int, ...]
    classes: int
    contexts: bool = False
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

    def facts(self) -> dict[str, Any]:
        """What a card says of any denoiser, as JSON-able values."""
        return {
            "shape": list(self.shape),
            "classes": self.classes,
            **({"contexts": True} if self.contexts else {}),
            "sigma_data": self.sigma_data,
            "sigma_min": self.sigma_min,
            "sigma_max": self.sigma_max if math.isfinite(self.sigma_max) else None,
        }

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
        return cond.to(x)


def score(denoiser: Denoiser, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
    """Score of the noised density, grad log p_sigma(x) = (D(x; sigma) - x) / sigma^2 (Tweedie), shape of x."""
    return (denoiser(x, sigma, cond) - x) / expand(sigma, x) ** 2


def eps(denoiser: Denoiser, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
    """Predicted noise E[eps | x] = (x - D(x; sigma)) / sigma, the velocity dx/dsigma of the probability-flow ODE."""
    return (x - denoiser(x, sigma, cond)) / expand(sigma, x)


class Networked(Denoiser):
    """Interface: a denoiser that is a network between two scalings, D = combined(x, F(scaled x, c_noise, cond)).

    Attributes:
        network: F, called as network(x, c_noise, cond).
    """

    network: nn.Module

    def forward(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
        f = self.network(self._scaled(x, sigma), self.c_noise(sigma, x), self.labels(cond, x))
        return self._combined(x, sigma, f)

    def trace(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The clean estimate, and the features (B, network.feature_width) that the network formed on its way."""
        network: Any = self.network
        f, features = network.trace(self._scaled(x, sigma), self.c_noise(sigma, x), self.labels(cond, x))
        return self._combined(x, sigma, f), features

    def features(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
        """The features alone, for the cost of the encoder where the network has one."""
        network: Any = self.network
        inputs = self._scaled(x, sigma), self.c_noise(sigma, x), self.labels(cond, x)
        return network.features(*inputs) if hasattr(network, "features") else network.trace(*inputs)[1]

    def c_noise(self, sigma: Tensor, x: Tensor) -> Tensor:
        """The network's noise input with shape (B,)."""
        raise NotImplementedError

    def _scaled(self, x: Tensor, sigma: Tensor) -> Tensor:
        raise NotImplementedError

    def _combined(self, x: Tensor, sigma: Tensor, f: Tensor) -> Tensor:
        raise NotImplementedError


class Preconditioned(Networked):
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

    def _scaled(self, x: Tensor, sigma: Tensor) -> Tensor:
        return x / (expand(sigma, x) ** 2 + self.sigma_data**2).sqrt()

    def _combined(self, x: Tensor, sigma: Tensor, f: Tensor) -> Tensor:
        s = expand(sigma, x)
        variance = s**2 + self.sigma_data**2
        return self.sigma_data**2 / variance * x + s * self.sigma_data / variance.sqrt() * f

    def c_noise(self, sigma: Tensor, x: Tensor) -> Tensor:
        """The network's noise input, ln(sigma / noise_unit) / 4 with shape (B,)."""
        return (torch.log(sigma.to(x) / self.noise_unit) / 4).expand(x.shape[0])

    def card(self) -> dict[str, Any]:
        """Everything but the weights, as JSON-able values."""
        network: Any = self.network
        return {
            "preconditioning": "edm",
            "network": network.name,
            "arguments": network.arguments,
            **self.facts(),
            "noise_unit": self.noise_unit,
        }


class EpsPreconditioned(Networked):
    """A network F that predicts noise, in a preconditioning older than EDM's: D = x + c_out F(c_in x, c_noise, cond).

        form    c_out    c_in                   c_noise
        vp      -sigma   1 / sqrt(sigma^2 + 1)  (steps - 1) t, ln(1 + sigma^2) = beta_d t^2 / 2 + beta_min t
        ve      sigma    1                      ln(sigma / 2)
        iddpm   -sigma   1 / sqrt(sigma^2 + 1)  steps - 1 - j, where levels[j] is the level nearest to sigma

    Where F has more channels than x, the first ones count: networks of iDDPM also predict a variance.

    Args:
        network: called as network(x, c_noise, cond).
        sigma_data: these forms have none; 0.5 is EDM's number for images in [-1, 1].
        steps: discrete times of the training (vp, iddpm).
        beta_d, beta_min: slope and start of beta(t) (vp).
    """

    levels: Tensor

    def __init__(
        self,
        network: nn.Module,
        form: Form,
        shape: tuple[int, ...],
        classes: int = 0,
        sigma_data: float = 0.5,
        sigma_min: float = 0.0,
        sigma_max: float = math.inf,
        steps: int = 1000,
        beta_d: float = 19.9,
        beta_min: float = 0.1,
    ) -> None:
        super().__init__(shape, classes, sigma_data, sigma_min, sigma_max)
        if form not in ("vp", "ve", "iddpm"):
            raise ValueError(f"form: must be vp, ve or iddpm, got {form!r}")
        if not 2 <= steps <= 10_000:
            raise ValueError(f"steps: must lie between 2 and 10000, got {steps}")
        if not (0 < beta_d < math.inf and 0 < beta_min < math.inf):
            raise ValueError(f"beta_d: must be positive and finite like beta_min, got {beta_d} and {beta_min}")
        self.network, self.form, self.steps = network, form, steps
        self.beta_d, self.beta_min = float(beta_d), float(beta_min)
        if form == "iddpm":
            self.register_buffer("levels", torch.tensor(iddpm_levels(steps).tolist(), dtype=torch.float32))

    def _scaled(self, x: Tensor, sigma: Tensor) -> Tensor:
        return x if self.form == "ve" else x / (expand(sigma, x) ** 2 + 1).sqrt()

    def _combined(self, x: Tensor, sigma: Tensor, f: Tensor) -> Tensor:
        noise = expand(sigma, x) * f[:, : x.shape[1]]
        return x + noise if self.form == "ve" else x - noise

    def c_noise(self, sigma: Tensor, x: Tensor) -> Tensor:
        """The network's noise input with shape (B,)."""
        s = sigma.to(x).reshape(-1)
        match self.form:
            case "ve":
                noise = (s / 2).log()
            case "vp":
                # no log1p: in float32 its rounding at small sigma is part of what the network was trained on
                root = (self.beta_min**2 + 2 * self.beta_d * (1 + s**2).log()).sqrt()
                noise = (self.steps - 1) * (root - self.beta_min) / self.beta_d
            case _:
                nearest = (s[:, None] - self.levels.to(x.dtype)).abs().argmin(1)
                noise = (self.steps - 1 - nearest).to(x.dtype)
        return noise.expand(x.shape[0])

    def card(self) -> dict[str, Any]:
        """Everything but the weights, as JSON-able values."""
        network: Any = self.network
        return {
            "preconditioning": self.form,
            "network": network.name,
            "arguments": network.arguments,
            **self.facts(),
            "steps": self.steps,
            "beta_d": self.beta_d,
            "beta_min": self.beta_min,
        }


def iddpm_levels(steps: int = 1000, c_1: float = 0.001, c_2: float = 0.008) -> np.ndarray:
    """iDDPM's noise levels in EDM's coordinate, decreasing, the last one 0: float32 (steps + 1,).

    u_(j-1)^2 + 1 = (u_j^2 + 1) / max(a_(j-1) / a_j, c_1) with a_j = sin^2(pi j / (2 steps (1 + c_2))): the cosine
    schedule of Nichol & Dhariwal (2021), arXiv:2102.09672. The recurrence is ill-conditioned at its beginning and
    networks were trained on its float32 values, so it is float32 here, and the table of a checkpoint replaces it.
    """
    j = np.arange(steps + 1, dtype=np.float32)
    alpha_bar = np.sin(np.float32(math.pi / 2) * j / np.float32(steps) / np.float32(1 + c_2)) ** 2
    levels = np.zeros(steps + 1, dtype=np.float32)
    for i in range(steps, 0, -1):
        ratio = np.maximum(alpha_bar[i - 1] / alpha_bar[i], np.float32(c_1))
        levels[i - 1] = np.sqrt((levels[i] ** 2 + np.float32(1)) / ratio - np.float32(1))
    return levels


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
        t = self.schedule.time(sigma.to(x)).expand(x.shape[0])
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
            **self.facts(),
        }


class Guided(Denoiser):
    """Classifier-free guidance: D = D_none + scale (D_cond - D_none); scale 1 is the conditional denoiser."""

    def __init__(self, denoiser: Denoiser, scale: float) -> None:
        super().__init__(denoiser.shape, denoiser.classes, denoiser.sigma_data, denoiser.sigma_min, denoiser.sigma_max)
        if denoiser.classes == 0 or denoiser.contexts:
            known = "has contexts, of which none stands for no condition" if denoiser.contexts else "is unconditional"
            raise ValueError(f"guidance: needs a denoiser with labels, this one {known}")
        if not math.isfinite(scale):
            raise ValueError(f"guidance.scale: must be finite, got {scale}")
        self.denoiser, self.scale = denoiser, float(scale)

    def forward(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
        return guided(self.denoiser, self.scale, x, sigma, self.labels(cond, x))


def guided(denoiser: Denoiser, scale: float, x: Tensor, sigma: Tensor, cond: Tensor | None) -> Tensor:
    """D_none + scale (D_cond - D_none), both from one call of a doubled batch; without labels just D."""
    if cond is None or scale == 1:
        return denoiser(x, sigma, cond)
    both = denoiser(torch.cat([x, x]), sigma.expand(x.shape[0]).repeat(2), torch.cat([cond, torch.zeros_like(cond)]))
    with_label, without = both.chunk(2)
    return without + scale * (with_label - without)
