"""Exponential moving average of a player's weights, with the half-life in images (Karras et al. 2022, EDM)."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Average:
    """Settings of the moving average.

    Attributes:
        half_life: images after which a weight's share has halved.
        ramp: the half-life is at most this fraction of the images seen so far, so that early weights are forgotten.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    half_life: float = 500_000
    ramp: float = 0.05

    def __post_init__(self) -> None:
        if not 0 < self.half_life < math.inf:
            raise ValueError(f"half_life: must be positive and finite, got {self.half_life}")
        if not 0 < self.ramp < math.inf:
            raise ValueError(f"ramp: must be positive and finite, got {self.ramp}")

    def decay(self, images: int, batch: int) -> float:
        """Weight of the old average when `batch` images are added to `images` earlier ones."""
        return 0.5 ** (batch / max(min(self.half_life, self.ramp * images), 1e-8))


class EMA:
    """A copy of `module` whose parameters follow it; buffers are copied."""

    def __init__(self, module: nn.Module, settings: Average) -> None:
        self.settings = settings
        self.module = copy.deepcopy(module).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, module: nn.Module, images: int, batch: int) -> None:
        """One update after a step of `batch` images that followed `images` earlier ones."""
        weight = 1 - self.settings.decay(images, batch)
        torch._foreach_lerp_(list(self.module.parameters()), list(module.parameters()), weight)
        for mine, theirs in zip(self.module.buffers(), module.buffers(), strict=True):
            mine.copy_(theirs)

    def state_dict(self) -> dict[str, Tensor]:
        return self.module.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.module.load_state_dict(state)
