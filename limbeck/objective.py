"""What a distillation method is, to the trainer: named players, and the turns of one step.

An objective is a frozen dataclass of hyper-parameters. It holds no network and no state, so that the same objective can
be printed, stored in a file and compared; the trainer owns the players.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from operator import itemgetter
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from limbeck.denoiser import Denoiser, expand
from limbeck.generator import Generator
from limbeck.optimizer import Optimizer


class Pairs(NamedTuple):
    """Latents z (n, *latent_shape), samples x (n, *shape) and condition rows (n, classes) or None."""

    z: Tensor
    x: Tensor
    cond: Tensor | None

    def rows(self, index: Tensor | slice) -> Pairs:
        """Some of the pairs."""
        return self.mapped(itemgetter(index))

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Pairs:
        """The pairs with every tensor changed."""
        return Pairs(change(self.z), change(self.x), None if self.cond is None else change(self.cond))


@dataclass(frozen=True)
class Batch:
    """Everything random that a loss needs; losses draw nothing.

    Attributes:
        z: latents (B, *latent_shape), unit normal.
        u: uniform (B,) in [0, 1), plain or stratified.
        eps: unit noise (B, *shape), plain or antithetic.
        cond: condition rows (B, classes) or None.
        real: data (B, *shape), None when data-free.
        coin: a second uniform (B,), for choices such as dropped labels.
        direction: a second unit noise (B, *shape), with `real`.
        pairs: latents and what the teacher's ODE makes of them, for methods that regress on them.
        x: samples (B, *shape) to take for the generator's of `z`, with or without their graph; None = to be made.
        total: samples of the whole turn, over all micro-batches of all processes; None = of this process's batches.
    """

    z: Tensor
    u: Tensor
    eps: Tensor
    cond: Tensor | None = None
    real: Tensor | None = None
    coin: Tensor | None = None
    direction: Tensor | None = None
    pairs: Pairs | None = None
    x: Tensor | None = None
    total: int | None = None

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with every tensor changed, those of its pairs too."""
        tensors: dict[str, Any] = {
            f.name: change(v) for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)
        }
        return replace(self, **tensors, pairs=None if self.pairs is None else self.pairs.mapped(change))

    def to(self, device: torch.device) -> Batch:
        """The batch on a device. A GPU is not waited for: it copies from pinned memory while the program goes on."""
        if device.type == "cuda":
            return self.mapped(lambda tensor: tensor.pin_memory().to(device, non_blocking=True))
        return self.mapped(lambda tensor: tensor.to(device))


Loss = Callable[[nn.ModuleDict, Denoiser, Batch], Tensor]


class Turn(NamedTuple):
    """One descent step of `players` on `loss(nets, teacher, batch) -> (B,)`, a pure function.

    `when`, if given, is asked before: the turn is left out while it says no. It may read `State`s only.
    """

    players: tuple[str, ...]
    loss: Loss
    when: Callable[[nn.ModuleDict], bool] | None = None


class State(nn.Module):
    """A player without parameters: buffers that losses read and add to, committed once per turn by the trainer.

    Losses read the values of the last commit, so that a batch in parts is a batch.
    """

    def commit(self) -> None:
        """Take what was added since the last commit into the values that losses read."""
        raise NotImplementedError

    def told(self) -> dict[str, Tensor]:
        """0-d tensors for the log, by name."""
        return {}


class Count(State):
    """A number of events since the start of the run, told as `name`."""

    total: Tensor

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.register_buffer("total", torch.zeros((), dtype=torch.float64))

    def add(self, events: Tensor) -> None:
        """Count those of a batch (B,) that are true."""
        self.total += events.sum()

    def commit(self) -> None: ...

    def told(self) -> dict[str, Tensor]:
        return {self.name: self.total.clone()}


class Objective(Protocol):
    """A method. `product` names the player that is averaged (EMA) and exported; `needs_real` asks for `Batch.real`.

    Three things are optional. `warm_start = True` asks for a template that is fitted to the teacher if it is not the
    teacher's own network; `steps` is the length of a run that names none; `health(nets, teacher, batch)` gives 0-d
    tensors for the log.
    """

    @property
    def product(self) -> str: ...

    @property
    def needs_real(self) -> bool: ...

    def players(self, template: Denoiser, generator: Generator | None = None) -> dict[str, nn.Module]:
        """Fresh networks by name, made from copies of `template`; a given generator replaces the built one."""
        ...

    def turns(self, step: int, images: int) -> Iterable[Turn]:
        """The algorithm box: what is played in this step, after `images` images (see `Trainer.images`)."""
        ...

    def optimizers(self) -> Mapping[str, Optimizer]:
        """Default optimiser of every player that takes a turn."""
        ...


def perturb(x: Tensor, sigma: Tensor, eps: Tensor) -> Tensor:
    """x_sigma = x + sigma eps, with sigma (B,)."""
    return x + expand(sigma, x) * eps
