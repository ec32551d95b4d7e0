"""Players whose weights are split over processes, for models that outgrow a device, and checkpoints of them.

Weights, gradients and optimiser states of a network are split by PyTorch's `fully_shard`, block by block: a block is
whole only while it computes. What is no network (heads, points, states) stays whole on every process.

A checkpoint has a safetensors file for each process, written by torch.distributed.checkpoint with the place of every
piece, and a manifest of hashes; any number of processes reads it, one alone too. Reading needs no other process and
unpickles nothing: torch's own format has pickled metadata, its safetensors storage has none. While writing, torch
lets the processes of the job agree on who writes what by pickled messages; none of that reaches a file.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from limbeck import checkpoint
from limbeck.distributed import rank_and_world, wait_for_all
from limbeck.files import write_atomically
from limbeck.passes import networks


def split(module: nn.Module) -> None:
    """Split the weights of a player's networks over all processes, in place.

    Gradients of the split weights are sums over the processes from then on.
    """
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

    mesh = distributed.init_device_mesh(_device_type(module), (rank_and_world()[1],))
    for network in [part for part in networks(module) if part is not module]:  # a module without any stays whole
        lists = [child for child in network.children() if isinstance(child, nn.ModuleList | nn.ModuleDict)]
        blocks = [block for each in lists for block in each.children() if any(True for _ in block.parameters())]
        for part in (*blocks, network):
            fully_shard(part, mesh=mesh, reshard_after_forward=True)
            cast(FSDPModule, part).set_gradient_divide_factor(1.0)
            # a sum is a sum in any backend; averages are not
            cast(FSDPModule, part).set_force_sum_reduction_for_comms(True)
        for name in ("trace", "features"):
            if callable(getattr(type(network), name, None)):
                register_fsdp_forward_method(network, name)
    # outputs that are views must not be changed in place, which nothing here does
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


def _device_type(module: nn.Module) -> str:
    return next(module.parameters(), torch.zeros(())).device.type


def save(folder: Path, step: int, state: Mapping[str, Any], keep: int) -> None:
    """`checkpoint.save` of a state with split tensors; all processes call it.

    Raises:
        OSError: e.g. on a full disk; earlier checkpoints are then intact.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import HuggingFaceStorageWriter

    rank, _ = rank_and_world()
    temporary = folder / f".tmp-{checkpoint.name_of(step)}"
    tensors: dict[str, Tensor] = {}
    rest = checkpoint.parted(state, tensors)
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob(".tmp-*"):  # of a job that was killed while it wrote
            shutil.rmtree(stale, ignore_errors=True)
        temporary.mkdir()
    wait_for_all()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(
            {name: tensor.reshape(1) if tensor.ndim == 0 else tensor for name, tensor in tensors.items()},
            storage_writer=HuggingFaceStorageWriter(str(temporary), save_distributed=True),
        )
    if rank == 0:
        rest["scalars"] = [name for name, tensor in tensors.items() if tensor.ndim == 0]
        write_atomically(temporary / "state.json", json.dumps(rest))
        checkpoint.complete(folder, temporary, step, keep)
    wait_for_all()


def is_split(path: Path) -> bool:
    """Is the checkpoint at `path` one of several processes?"""
    return not (path / "state.safetensors").exists() and any(path.glob("shard-*.safetensors"))


def load(path: Path, like: Mapping[str, Any]) -> dict[str, Any]:
    """The state of a checkpoint, of several processes or of one, in pieces as this process holds them.

    Args:
        like: the state of today's job, for the layout of every tensor; what it has not yet is laid out as the weights
            of the same name and shape.

    Raises:
        ValueError: if a file is not what the manifest says.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    layout: dict[str, Tensor] = {}
    checkpoint.parted(like, layout)
    if not is_split(path):
        state = checkpoint.read(path)
        tensors: dict[str, Tensor] = {}
        checkpoint.parted(state, tensors)
        for name, tensor in tensors.items():
            model = _model(name, layout)
            if isinstance(model, DTensor) and model.shape == tensor.shape:
                # every process has read all of it, and keeps its piece
                piece = distribute_tensor(tensor, model.device_mesh, model.placements, src_data_rank=None)
                checkpoint.put(state, name, piece)
        return state
    state = checkpoint.verified(path)
    scalars = set(state.pop("scalars"))
    reader = HuggingFaceStorageReader(str(path))
    wanted: dict[str, Any] = {}
    for name, found in reader.read_metadata().state_dict_metadata.items():
        size, dtype = cast(Any, found).size, cast(Any, found).properties.dtype
        model = _model(name, layout)
        split = isinstance(model, DTensor) and model.shape == size
        wanted[name] = torch.zeros_like(cast(Tensor, model), dtype=dtype) if split else torch.zeros(size, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(wanted, storage_reader=reader, no_dist=True)
    for name, tensor in wanted.items():
        checkpoint.put(state, name, tensor.reshape(()) if name in scalars else tensor)
    return state


def _model(name: str, layout: Mapping[str, Tensor]) -> Tensor | None:
    """The tensor of today's job that is laid out as the one of this name should be."""
    if name in layout:
        return layout[name]
    weight, _, _ = name.rpartition(checkpoint.SEPARATOR)  # .../optimizers/PLAYER/WEIGHT/MOMENT
    return layout.get(weight.replace("optimizers/", "nets/"))
