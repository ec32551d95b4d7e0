"""What a distillation method is, to the trainer: named players, and the turns of one step.

An objective is a frozen dataclass of hyper-parameters. It holds no network and no state, so that the same objective can
be printed, stored in a file and compared; the trainer owns the players.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor, nn

from limbeck.denoiser import Denoiser, expand
from limbeck.generator import Generator
from limbeck.optimizer import Optimizer


@dataclass(frozen=True)
class Batch:
    """Everything random that a loss needs; losses draw nothing.

    Attributes:
        z: latents (B, *latent_shape), unit normal.
        u: uniform (B,) in [0, 1), plain or stratified.
        eps: unit noise (B, *shape), plain or antithetic.
        cond: condition rows (B, classes) or None.
        real: data (B, *shape), None when data-free.
    """

    z: Tensor
    u: Tensor
    eps: Tensor
    cond: Tensor | None = None
    real: Tensor | None = None


Loss = Callable[[nn.ModuleDict, Denoiser, Batch], Tensor]


class Turn(NamedTuple):
    """One descent step of `players` on `loss(nets, teacher, batch) -> (B,)`, a pure function."""

    players: tuple[str, ...]
    loss: Loss


class State(nn.Module):
    """A player without parameters: buffers that losses read and add to, committed once per turn by the trainer.

    Losses read the values of the last commit, so that a batch in parts is a batch.
    """

    def commit(self) -> None:
        """Take what was added since the last commit into the values that losses read."""
        raise NotImplementedError


class Objective(Protocol):
    """A method. `product` names the player that is averaged (EMA) and exported; `needs_real` asks for `Batch.real`."""

    @property
    def product(self) -> str: ...

    @property
    def needs_real(self) -> bool: ...

    def players(self, template: Denoiser, generator: Generator | None = None) -> dict[str, nn.Module]:
        """Fresh networks by name, made from copies of `template`; a given generator replaces the built one."""
        ...

    def turns(self, step: int, images: int) -> Iterable[Turn]:
        """The algorithm box: what is played in this step, after `images` generator images."""
        ...

    def optimizers(self) -> Mapping[str, Optimizer]:
        """Default optimiser of every player that takes a turn."""
        ...


def perturb(x: Tensor, sigma: Tensor, eps: Tensor) -> Tensor:
    """x_sigma = x + sigma eps, with sigma (B,)."""
    return x + expand(sigma, x) * eps
