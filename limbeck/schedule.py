"""Noising schedules x_t = alpha_t x_0 + sigma_t eps of foreign models, with the inverse of sigma_t / alpha_t.

Nothing inside Limbeck uses them: they exist for `denoiser.Rescaled`, the door through which foreign models enter.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


class Schedule(ABC):
    """alpha(t), sigma(t), and time(ratio), the t at which sigma_t / alpha_t = ratio. All element-wise on tensors."""

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Signal coefficient at time t."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Noise coefficient at time t."""

    @abstractmethod
    def time(self, ratio: Tensor) -> Tensor:
        """Inverse of t -> sigma_t / alpha_t."""


@dataclass(frozen=True)
class VP(Schedule):
    """Variance preserving with linear beta(t) = beta_min + beta_d t (Song et al. 2021, arXiv:2011.13456), t in (0, 1].

    alpha_t = exp(-(beta_d t^2 / 2 + beta_min t) / 2), sigma_t^2 = 1 - alpha_t^2.
    """

    beta_d: float = 19.9
    beta_min: float = 0.1

    def _integral(self, t: Tensor) -> Tensor:
        return self.beta_d * t**2 / 2 + self.beta_min * t

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(-self._integral(t) / 2)

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(-torch.expm1(-self._integral(t)))

    def time(self, ratio: Tensor) -> Tensor:
        # beta_d t^2 / 2 + beta_min t = ln(1 + ratio^2) =: l; the root in the form that does not cancel for small l
        twice = 2 * torch.log1p(ratio**2)
        return twice / (torch.sqrt(self.beta_min**2 + self.beta_d * twice) + self.beta_min)


@dataclass(frozen=True)
class Cosine(Schedule):
    """alpha_t = cos(pi t / 2), sigma_t = sin(pi t / 2), t in [0, 1]: the continuous cosine schedule without offset."""

    def alpha(self, t: Tensor) -> Tensor:
        return torch.cos(math.pi / 2 * t)

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sin(math.pi / 2 * t)

    def time(self, ratio: Tensor) -> Tensor:
        return torch.atan(ratio) * 2 / math.pi


@dataclass(frozen=True)
class Flow(Schedule):
    """Rectified flow: alpha_t = 1 - t, sigma_t = t, t in [0, 1] (Liu et al. 2022, arXiv:2209.03003)."""

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def time(self, ratio: Tensor) -> Tensor:
        return ratio / (1 + ratio)
