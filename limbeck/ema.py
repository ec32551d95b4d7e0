"""Exponential moving average of a player's weights, with the half-life in images (Karras et al. 2022, EDM)."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from limbeck.distributed import local, whole


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
    """A copy of `module` whose parameters follow it, and whose buffers are its.

    Of a module whose weights are split over processes (`shards.split`) the average is kept in the same pieces.

    Attributes:
        module: the copy; `whole` brings it up to date if the average is in pieces.
    """

    def __init__(self, module: nn.Module, settings: Average) -> None:
        self.settings = settings
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self._pieces: dict[str, Tensor] | None = None
        self._follow(module)

    def _follow(self, module: nn.Module) -> None:
        # lists, because walking through modules at every step costs small networks more than the update
        mine = self.module.parameters() if self._pieces is None else self._pieces.values()
        self._weights = [local(p) for p in mine], [local(p) for p in module.parameters()]
        self._buffers = [*zip(self.module.buffers(), module.buffers(), strict=True)]

    def split(self, module: nn.Module) -> None:
        """Keep the average in pieces, as the weights of `module`, of which this is still a copy, now are."""
        self._pieces = {name: p.detach().clone() for name, p in module.named_parameters()}
        self._follow(module)

    @torch.no_grad()
    def update(self, images: int, batch: int) -> None:
        """One update after a step of `batch` images that followed `images` earlier ones."""
        torch._foreach_lerp_(*self._weights, 1 - self.settings.decay(images, batch))
        for old, new in self._buffers:
            old.copy_(new)

    @torch.no_grad()
    def whole(self) -> nn.Module:
        """The averaged module. If it is in pieces, all processes must ask for it together."""
        for name, piece in (self._pieces or {}).items():
            self.module.get_parameter(name).copy_(whole(piece))
        return self.module

    def state_dict(self) -> dict[str, Tensor]:
        return {**self.module.state_dict(), **(self._pieces or {})}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if self._pieces is None:
            self.module.load_state_dict(state)
            return
        for name, piece in self._pieces.items():
            local(piece).copy_(local(state[name]))
        for name, buffer in self.module.named_buffers():
            if name in state:
                buffer.copy_(state[name])
