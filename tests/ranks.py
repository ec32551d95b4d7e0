"""What one of several processes does in tests/test_distributed.py: `torchrun tests/ranks.py OUT`."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import test_methods
import torch
import torch.distributed.checkpoint  # before the audit, which also sees imports
from torch import Tensor, nn

from limbeck import methods, shards, train
from limbeck.denoiser import Denoiser, Preconditioned, Rescaled
from limbeck.distributed import Exchange, local, rank_and_world, whole
from limbeck.ema import Average
from limbeck.exact import Gaussian
from limbeck.game import Game
from limbeck.networks import DiT
from limbeck.objective import Turn
from limbeck.passes import networks
from limbeck.schedule import Flow
from limbeck.source import NoiseSource
from limbeck.train import Trainer

STEPS = 3
CASES = {**test_methods.CASES, "rescaled": methods.METHODS["sid"]()}  # of a discrete model
IN_PARTS = ("pid", "sid", "sida", "vardiu")  # in micro-batches on every process too


class Small(Exchange):
    """Gradients in a bucket for each weight."""

    early = 0  # buckets that left while the backward pass went on

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__(parameters, size=1)

    def finish(self) -> None:
        Small.early += len(self._works)
        super().finish()


def played(name: str, sharded: bool, parts: int = 1, dropout: float = 0.0) -> dict[str, Tensor]:
    """Gradients of every update, losses, and the weights after a few steps, put together, in float64."""
    method, law = CASES[name], test_methods.teacher()
    told: dict[str, Tensor] = {}
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        template: Denoiser = test_methods.template(law, dropout)
        if name == "rescaled":
            template = Rescaled(template.network, Flow(), "flow", template.shape, template.classes, template.sigma_data)
        made = Trainer(
            method,
            law,
            template,
            steps=6,
            ema=Average(half_life=50),
            seed=3,
            split=shards.split if sharded else None,
            clip=1e3,
        )
    finally:
        torch.set_default_dtype(before)
    for net in made.nets.values():  # the players' networks are in pieces, and nothing is without `sharded`
        inside = [p for part in networks(net) if part is not net for p in part.parameters()]
        assert all((local(p) is not p) == sharded for p in inside)
    source = test_methods.source(method, law, parts)
    for player, optimizer in made.optimizers.items():

        def step(player: str = player, update: object = optimizer.step) -> None:
            for key, p in made.nets[player].named_parameters():
                assert p.grad is not None
                told[f"{made.step}/{player}/{key}/{len(told)}"] = whole(p.grad).clone()
            update()  # type: ignore[operator]

        optimizer.step = step  # type: ignore[assignment, method-assign]
    for number in range(STEPS):
        told |= {f"{number} {key}": value.double() for key, value in made.advance(source).items()}
    told |= weights(made.nets, "nets") | weights(made.ema.whole(), "ema")
    return told


def weights(module: nn.Module, name: str) -> dict[str, Tensor]:
    return {f"{name}.{key}": whole(value).double().clone() for key, value in module.state_dict().items()}


def unet_trainer(sharded: bool, **fields: Any) -> tuple[Trainer, NoiseSource]:
    """A game whose network has weights that do not split evenly: (1, tokens, width), and 3 rows."""
    torch.manual_seed(0)
    network = DiT(shape=[3, 4, 4], classes=0, patch=2, width=10, depth=1, heads=2).double()
    template = Preconditioned(network, (3, 4, 4), 0, 0.5, 0.002, 80.0)
    teacher = Gaussian(torch.zeros(3, 4, 4, dtype=torch.float64), torch.tensor(0.25, dtype=torch.float64))
    game, split = Game(settle=fields.pop("settle", 2)), shards.split if sharded else None
    made = Trainer(methods.METHODS["sid"](game=game), teacher, template, steps=9, seed=1, split=split, **fields)
    return made, NoiseSource((3, 4, 4), (3, 4, 4), 6, 0, dtype=torch.float64)


def skipped(sharded: bool) -> dict[str, Tensor]:
    """Steps under scalers, with checkpointing, where the last process alone meets an infinite gradient."""
    roles = ("generator", "fake")
    made, source = unet_trainer(sharded, settle=0, precision=dict.fromkeys(roles, "fp16"), checkpointing=roles)
    rank, world = rank_and_world()
    inner = made._backward

    def backward(loss: Tensor, turn: Turn, last: bool) -> None:
        burst = made.step == 1 and rank == world - 1 and turn.players == ("fake",)
        inner(loss * math.inf if burst else loss, turn, last)

    made._backward = backward  # type: ignore[method-assign]
    told = advanced(made, source, 3)
    for key, scaler in made.scalers.items():
        told[f"scaler {key}"] = torch.tensor([scaler.scale, scaler.calm, scaler.updates, scaler.skipped])
    return told


def advanced(made: Trainer, source: NoiseSource, steps: int) -> dict[str, Tensor]:
    for _ in range(steps):
        made.advance(source)
    return weights(made.nets, "nets") | weights(made.ema.whole(), "ema")


def save_and_resume(folder: Path) -> dict[str, Tensor]:
    """Go on from the checkpoint of one process in `folder`/one, and leave one of several in `folder`/several."""
    made, source = unet_trainer(sharded=True)
    made.load_state_dict(shards.load(folder / "one" / "ckpt-000000002", made.state_dict()))
    told = advanced(made, source, 2)
    shards.save(folder / "several", made.step, made.state_dict(), keep=1)
    again, source = unet_trainer(sharded=True)
    with nothing_unpickled():
        state = shards.load(folder / "several" / "ckpt-000000004", again.state_dict())
    again.load_state_dict(state)
    return told | {f"later {key}": value for key, value in advanced(again, source, 2).items()}


@contextlib.contextmanager
def nothing_unpickled() -> Iterator[None]:
    """Fail if anything looks up a class for a pickle, reads compiled code or starts a program meanwhile."""
    seen: list[str] = []
    on = True

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if on and event in ("pickle.find_class", "marshal.loads", "os.system", "subprocess.Popen"):
            seen.append(event)

    sys.addaudithook(hook)
    yield
    on = False
    assert not seen, seen


def main() -> None:
    torch.set_num_threads(1)
    rank, _ = rank_and_world()
    folder = Path(sys.argv[1])
    resumed = save_and_resume(folder)
    told = {}
    for name, parts in [*((name, 1) for name in CASES), *((name, 2) for name in IN_PARTS)]:
        if parts == 2:
            train.Exchange = Small  # type: ignore[misc]
        for sharded in (False, True):
            for key, value in played(name, sharded, parts).items():
                told[f"{name}|{parts}|{sharded}|{key}"] = value
    assert Small.early > 100
    for sharded in (False, True):
        told |= {f"skipped|{sharded}|{key}": value for key, value in skipped(sharded).items()}
    if rank == 0:
        safetensors.torch.save_file(told, folder / "played.safetensors")
        safetensors.torch.save_file(resumed, folder / "resumed.safetensors")


if __name__ == "__main__":
    main()
