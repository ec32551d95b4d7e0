"""Where networks compute: the CPU, or one accelerator for each process.

Players, the teacher, their optimisers and the average live on the device of a run. Noise, data and files are the
CPU's, and batches travel: a run sees the same noise and data on any device. Masks of dropout are the device's own.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

CPU = torch.device("cpu")
M = TypeVar("M", bound=nn.Module)


def chosen(name: str) -> torch.device:
    """The device of a name: auto is this process's GPU where there is one, else the CPU; cuda, cuda:1, ...

    Of several processes on a machine that torchrun has started, the k-th takes the k-th GPU. Convolutions on GPUs are
    in float32, as all else is, and not in the shorter TF32 that torch prefers there: precision is the recipe's.

    Raises:
        ValueError: if it is not there.
    """
    wanted = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    try:
        device = torch.device(wanted)
        if device.type == "cpu":
            return CPU
        if device.type == "cuda":
            if not torch.cuda.is_available():
                raise ValueError("torch finds no GPU")
            if device.index is not None and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
                raise ValueError("each process takes a GPU of its own: say cuda, without a number")
            device = torch.device("cuda", own_gpu() if device.index is None else device.index)
            torch.cuda.set_device(device)
            torch.backends.cudnn.allow_tf32 = False
        torch.zeros(1, device=device, dtype=torch.float64).item()
    except (RuntimeError, AssertionError, ValueError, NotImplementedError, TypeError) as error:
        reason = str(error).strip().splitlines()[0][:120]
        raise ValueError(f"device: {name!r} cannot be used here ({reason}); cpu can") from None
    return device


def own_gpu() -> int:
    """The number of this process's GPU.

    Raises:
        ValueError: if there are fewer than processes on this machine.
    """
    rank, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if there > 1 and rank >= there:
        raise ValueError(f"{os.environ.get('LOCAL_WORLD_SIZE', 'several')} processes share {there} GPUs")
    return rank if there > 1 else 0  # some launchers show each process its own one only


def home(module: nn.Module) -> torch.device:
    """Where a module's weights are; the CPU if it has none."""
    for tensors in (module.parameters(), module.buffers()):
        for tensor in tensors:
            return tensor.device
    return CPU


def is_out_of_memory(error: Exception) -> bool:
    """Is this torch's form of a MemoryError?"""
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("allocate memory" in text or "out of memory" in text)


def on_cpu(module: M) -> M:
    """The module if it is on the CPU, else a copy there."""
    return module if home(module) == CPU else copy.deepcopy(module).to(CPU)


def from_cpu(call: Callable[..., Tensor], module: nn.Module) -> Callable[..., Tensor]:
    """A call of the networks of `module`, wherever they are, for tensors on the CPU, and with its result there."""
    device = home(module)
    if device == CPU:
        return call

    def travelling(*args: Any) -> Tensor:
        return call(*(a.to(device) if isinstance(a, Tensor) else a for a in args)).to(CPU)

    return travelling
