"""Several processes under `torchrun`: who am I, and bring everybody's tensors together.

The exchange is of plain tensors only: torch's object collectives pickle.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import Tensor, distributed


def rank_and_world() -> tuple[int, int]:
    """(rank, number of processes); (0, 1) outside `torchrun`. Joins the process group on first use."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return 0, 1
    if not distributed.is_initialized():
        distributed.init_process_group("gloo")
    return distributed.get_rank(), world


def gather(state: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """The `state` of every process, in order of rank, on every process.

    Tensors of one name have one shape on all ranks, except those whose name begins with "rows": they may differ in
    their first dimension.
    """
    _, world = rank_and_world()
    if world == 1:
        return [dict(state)]
    states: list[dict[str, Tensor]] = [{} for _ in range(world)]
    for name in sorted(state):
        mine = state[name].contiguous()
        lengths = [torch.zeros((), dtype=torch.long) for _ in range(world)]
        distributed.all_gather(lengths, torch.tensor(len(mine) if name.startswith("rows") else 0))
        if name.startswith("rows"):
            longest = max(int(length) for length in lengths)
            padding = mine.new_zeros(longest - len(mine), *mine.shape[1:])
            mine = torch.cat([mine, padding])
        parts = [torch.empty_like(mine) for _ in range(world)]
        distributed.all_gather(parts, mine)
        for rank, part in enumerate(parts):
            states[rank][name] = part[: int(lengths[rank])] if name.startswith("rows") else part
    return states
