"""Where networks compute: the CPU, or one accelerator for each process.

Players, the teacher, their optimisers and the average live on the device of a run. Noise, data and files are the
CPU's, and batches travel: a run sees the same numbers on any device, up to what the device's arithmetic rounds.
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

    Of several processes on a machine that torchrun has started, the k-th takes the k-th GPU.

    Raises:
        ValueError: if it is not there.
    """
    wanted = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    try:
        device = torch.device(wanted)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.zeros(1, device=device, dtype=torch.float64).item()
    except (RuntimeError, AssertionError, ValueError, NotImplementedError, TypeError) as error:
        reason = str(error).strip().splitlines()[0][:120]
        raise ValueError(f"device: {name!r} cannot be used here ({reason}); auto and cpu always can") from None
    return device


def home(module: nn.Module) -> torch.device:
    """Where a module's weights are; the CPU if it has none."""
    for tensors in (module.parameters(), module.buffers()):
        for tensor in tensors:
            return tensor.device
    return CPU


def on_cpu(module: M) -> M:
    """The module if it is on the CPU, else a copy there."""
    return module if home(module) == CPU else copy.deepcopy(module).to(CPU)


def from_cpu(call: Callable[..., Tensor], device: torch.device) -> Callable[..., Tensor]:
    """A call of networks on a device, for tensors on the CPU, and with its result there."""
    if device == CPU:
        return call

    def travelling(*args: Any) -> Tensor:
        return call(*(a.to(device) if isinstance(a, Tensor) else a for a in args)).to(CPU)

    return travelling
