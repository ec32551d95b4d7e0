"""Noising schedules x_t = alpha_t x_0 + sigma_t eps of foreign models, with the inverse of sigma_t / alpha_t.

Nothing inside Limbeck uses them: they exist for `denoiser.Rescaled`, the door through which foreign models enter.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

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


@dataclass(frozen=True)
class Alphas(Schedule):
    """The discrete schedule of DDPM (Ho et al. 2020, arXiv:2006.11239), by its numbers; t counts steps from 0.

    alpha_t^2 = alphas_cumprod[t], sigma_t^2 = 1 - alpha_t^2. Between two steps ln(sigma_t / alpha_t) is linear in t, so
    that `time` is monotone, and exact at steps; beyond both ends it is the nearest step's. A last step without signal
    (zero terminal SNR) has no finite ratio and is left out.
    """

    alphas_cumprod: tuple[float, ...]

    def __post_init__(self) -> None:
        a = tuple(map(float, self.alphas_cumprod))
        a = a[:-1] if a[-1:] == (0.0,) else a
        if len(a) < 2 or not 0 < a[-1] < a[0] < 1 or not all(y < x for x, y in itertools.pairwise(a)):
            raise ValueError("alphas_cumprod: must be at least two numbers that fall strictly, within (0, 1)")
        object.__setattr__(self, "alphas_cumprod", a)

    @cached_property
    def _logs(self) -> Tensor:
        """ln(sigma_t / alpha_t) of the steps, rising."""
        a = torch.tensor(self.alphas_cumprod, dtype=torch.float64, device="cpu")
        return (torch.log1p(-a) - torch.log(a)) / 2

    @property
    def ratios(self) -> tuple[float, float]:
        """The least and the largest sigma_t / alpha_t."""
        return float(self._logs[0].exp()), float(self._logs[-1].exp())

    def _log_ratio(self, t: Tensor) -> Tensor:
        place = t.double().clamp(0, len(self._logs) - 1)
        below = place.floor().long().clamp(max=len(self._logs) - 2)
        logs = self._logs.to(t.device)
        return torch.lerp(logs[below], logs[below + 1], place - below)

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sigmoid(-2 * self._log_ratio(t)).sqrt().to(t.dtype)

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sigmoid(2 * self._log_ratio(t)).sqrt().to(t.dtype)

    def time(self, ratio: Tensor) -> Tensor:
        logs = self._logs.to(ratio.device)
        wanted = ratio.double().log().clamp(logs[0], logs[-1])
        below = (torch.searchsorted(logs, wanted, right=True) - 1).clamp(0, len(logs) - 2)
        return (below + (wanted - logs[below]) / (logs[below + 1] - logs[below])).to(ratio.dtype)


SCHEDULES: dict[str, type[Schedule]] = {"vp": VP, "cosine": Cosine, "flow": Flow, "alphas": Alphas}


def described(schedule: Schedule) -> dict[str, Any]:
    """Name and numbers of a schedule, JSON-able.

    Raises:
        AttributeError: for a schedule that is none of Limbeck's.
    """
    for name, cls in SCHEDULES.items():
        if type(schedule) is cls:
            numbers: Any = schedule
            return {"name": name, **asdict(numbers)}
    raise AttributeError(f"{type(schedule).__name__!r} is not one of {', '.join(SCHEDULES)}")


def named(card: str | Mapping[str, Any]) -> Schedule:
    """The schedule of a name, or of a table with a name and numbers.

    Raises:
        ValueError: for an unknown name or numbers that it does not take.
    """
    numbers = {"name": card} if isinstance(card, str) else dict(card)
    name = numbers.pop("name", None)
    if name not in SCHEDULES:
        raise ValueError(f"schedule: unknown name {name!r}, expected one of {', '.join(SCHEDULES)}")
    try:
        return SCHEDULES[name](**numbers)
    except TypeError as error:
        raise ValueError(f"schedule: {name} does not take these numbers: {error}") from None
