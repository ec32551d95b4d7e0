"""Noise laws, each defined by its quantile function.

A law maps u in [0, 1] to a noise level sigma and is increasing in u. Training draws u ~ U(0, 1), so that
sigma = quantile(u) follows the law (stratified u gives stratified sigma for free); samplers walk u on a grid.
Everything is in the coordinate x_sigma = x + sigma * eps of Karras et al. (2022), arXiv:2206.00364.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


class Levels(ABC):
    """A noise law. A subclass is a frozen dataclass that defines `quantile` and `scaled`."""

    @abstractmethod
    def quantile(self, u: Tensor) -> Tensor:
        """Noise level at probability `u` (any shape, values in [0, 1]); same shape and dtype, increasing in u."""

    @abstractmethod
    def scaled(self, factor: float) -> Levels:
        """The law of `factor * sigma`."""

    def grid(self, steps: int) -> Tensor:
        """`steps` decreasing levels at equally spaced u from 1 to 0, then 0: float64, shape (steps + 1,).

        For `Karras` this is Eq. 5 of arXiv:2206.00364; `grid(N)[:-1]` is the grid of PID (arXiv:2411.08378).
        """
        if steps < 2:
            raise ValueError(f"steps: a grid of noise levels needs at least 2, got {steps}")
        u = torch.linspace(1, 0, steps, dtype=torch.float64)
        return torch.cat([self.quantile(u), torch.zeros(1, dtype=torch.float64)])


def _check_range(sigma_min: float, sigma_max: float) -> None:
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(f"sigma_min: must satisfy 0 < sigma_min < sigma_max, got {sigma_min:g} and {sigma_max:g}")


@dataclass(frozen=True)
class Karras(Levels):
    """sigma^(1/rho) uniform between sigma_min and sigma_max: the sampler grids of EDM.

    `stop` < 1 draws only the lowest part, u' = stop * u; 0.8 is the training law of SiD.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    stop: float = 1.0

    def __post_init__(self) -> None:
        _check_range(self.sigma_min, self.sigma_max)
        if not 0 < self.rho < math.inf:
            raise ValueError(f"rho: must be positive, got {self.rho:g}")
        if not 0 < self.stop <= 1:
            raise ValueError(f"stop: must lie in (0, 1], got {self.stop:g}")

    def quantile(self, u: Tensor) -> Tensor:
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return (low + self.stop * u * (high - low)) ** self.rho

    def scaled(self, factor: float) -> Karras:
        return Karras(factor * self.sigma_min, factor * self.sigma_max, self.rho, self.stop)


@dataclass(frozen=True)
class LogNormal(Levels):
    """ln sigma ~ N(mean, std^2): the training law of EDM (mean -1.2, std 1.2)."""

    mean: float = -1.2
    std: float = 1.2

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean) and 0 < self.std < math.inf):
            raise ValueError(f"std: must be positive and the mean finite, got mean {self.mean:g} and std {self.std:g}")

    def quantile(self, u: Tensor) -> Tensor:
        # u = 0 and u = 1 are the infinite ends of the law; the clamp keeps a uniform draw of exactly 0 finite
        tiny = torch.finfo(u.dtype).eps
        return torch.exp(self.mean + self.std * torch.special.ndtri(u.clamp(tiny, 1 - tiny)))

    def scaled(self, factor: float) -> LogNormal:
        return LogNormal(self.mean + math.log(factor), self.std)


@dataclass(frozen=True)
class LogUniform(Levels):
    """ln sigma uniform between ln sigma_min and ln sigma_max: VE training of Song et al. (2021), arXiv:2011.13456."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        _check_range(self.sigma_min, self.sigma_max)

    def quantile(self, u: Tensor) -> Tensor:
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** u

    def scaled(self, factor: float) -> LogUniform:
        return LogUniform(factor * self.sigma_min, factor * self.sigma_max)


@dataclass(frozen=True)
class Power(Levels):
    """sigma = sigma_min + u^power (sigma_max - sigma_min): VarDiU, arXiv:2508.20646; power 1 is the uniform law."""

    sigma_min: float = 0.1
    sigma_max: float = 20.0
    power: float = 1.0

    def __post_init__(self) -> None:
        _check_range(self.sigma_min, self.sigma_max)
        if not 0 < self.power < math.inf:
            raise ValueError(f"power: must be positive, got {self.power:g}")

    def quantile(self, u: Tensor) -> Tensor:
        return self.sigma_min + u**self.power * (self.sigma_max - self.sigma_min)

    def scaled(self, factor: float) -> Power:
        return Power(factor * self.sigma_min, factor * self.sigma_max, self.power)


Law = Karras | LogNormal | Power  # a field of a recipe that may be any of these; the keys that are given say which
