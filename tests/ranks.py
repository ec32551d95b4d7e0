"""What one of several processes does in tests/test_distributed.py: `torchrun tests/ranks.py OUT`."""

from __future__ import annotations

import sys
from pathlib import Path

import safetensors.torch
import test_methods
import torch
from torch import Tensor, nn

from limbeck.distributed import local, rank_and_world, whole
from limbeck.ema import Average
from limbeck.train import Trainer

STEPS = 3


def played(name: str, sharded: bool, parts: int = 1, dropout: float = 0.0) -> dict[str, Tensor]:
    """Gradients of every update, losses, and the weights after a few steps, put together, in float64."""
    method, law = test_methods.CASES[name], test_methods.teacher()
    told: dict[str, Tensor] = {}
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        template = test_methods.template(law, dropout)
        made = Trainer(
            method, law, template, steps=6, ema=Average(half_life=50), seed=3, sharded=sharded, clip=1e3
        )
    finally:
        torch.set_default_dtype(before)
    assert all(local(p) is not p for n in ("fake",) if sharded and n in made.nets for p in made.nets[n].parameters())
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


def main() -> None:
    torch.set_num_threads(1)
    rank, _ = rank_and_world()
    told = {}
    for name in test_methods.CASES:
        for sharded in (False, True):
            for key, value in played(name, sharded).items():
                told[f"{name}|{sharded}|{key}"] = value
    if rank == 0:
        safetensors.torch.save_file(told, Path(sys.argv[1]) / "played.safetensors")


if __name__ == "__main__":
    main()
