"""Several processes under `torchrun`: who am I, and bring everybody's tensors together.

The exchange is of plain tensors only: torch's object collectives pickle.
"""

from __future__ import annotations

import atexit
import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import timedelta

import torch
from torch import Tensor, distributed, nn

from limbeck.device import own_gpu

TIMEOUT = 600.0  # seconds for which a process waits for the others; LIMBECK_TIMEOUT replaces it
BUCKET = 25 * 2**20  # bytes of gradients that are exchanged together


class Lost(Exception):
    """Another process of the job has died, or answers no more. `code` is the exit code."""

    code = 1


def rank_and_world() -> tuple[int, int]:
    """(rank, number of processes); (0, 1) outside `torchrun`. Joins the process group on first use.

    Raises:
        ValueError: for a LIMBECK_TIMEOUT that is no number of seconds.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return 0, 1
    if not distributed.is_initialized():
        with alive():
            if _nccl():
                torch.cuda.set_device(own_gpu())
            distributed.init_process_group("cpu:gloo,cuda:nccl" if _nccl() else "gloo", timeout=_timeout())
        # gloo's threads may still hold the last exchange's tensors, and abort a process that ends around them
        atexit.register(distributed.destroy_process_group)
    return distributed.get_rank(), world


def _nccl() -> bool:
    return torch.cuda.is_available() and distributed.is_nccl_available()


def _timeout() -> timedelta:
    text = os.environ.get("LIMBECK_TIMEOUT", str(TIMEOUT))
    try:
        return timedelta(seconds=float(text))
    except (ValueError, OverflowError):
        raise ValueError(f"LIMBECK_TIMEOUT: must be a number of seconds, got {text}") from None


@contextlib.contextmanager
def alive(passes: bool = False) -> Iterator[None]:
    """Say in one line that an exchange failed: its errors are torch's, and long.

    Args:
        passes: networks compute within, whose own errors pass; those of exchanges name their library.
    """
    try:
        yield
    except RuntimeError as error:
        named = isinstance(error, distributed.DistError) or "gloo" in str(error)
        if passes and not named:
            raise
        reason = str(error).strip().splitlines()[0][:200]
        raise Lost(
            f"another process of this job was lost ({reason}); the same command goes on from the last checkpoint"
        ) from None


def total(value: Tensor) -> Tensor:
    """The sum of a tensor over all processes, in place."""
    if rank_and_world()[1] > 1:
        with alive():
            distributed.all_reduce(value)
    return value


def largest(value: int) -> int:
    """The largest of all processes' values."""
    if rank_and_world()[1] == 1:
        return value
    held = torch.tensor(value)
    with alive():
        distributed.all_reduce(held, distributed.ReduceOp.MAX)
    return int(held)


def wait_for_all() -> None:
    """Return when every process has come here."""
    largest(0)


class Exchange:
    """Sums the gradients of parameters over all processes, in buckets that travel while the backward pass goes on.

    A bucket leaves when the last of its gradients is complete, and buckets leave in one order, that of the parameters
    from the last to the first, in which backward passes mostly come to them. Split parameters are left to `shards`.
    Does nothing in a single process.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], size: int = BUCKET) -> None:
        self.buckets: list[list[nn.Parameter]] = []
        self._waiting: list[int] = []
        self._works: list[tuple[distributed.Work, Tensor]] = []
        self._open = False
        if rank_and_world()[1] == 1:
            return
        room, kind = 0, None
        for parameter in reversed([p for p in parameters if local(p) is p]):
            if room < parameter.nbytes or parameter.dtype != kind:
                self.buckets.append([])
                room, kind = size, parameter.dtype
            self.buckets[-1].append(parameter)
            room -= parameter.nbytes
            number = len(self.buckets) - 1
            was = parameter.requires_grad
            # torch asks for a parameter in turn, and calls the hook in later turns too
            parameter.requires_grad_(True).register_post_accumulate_grad_hook(lambda _, n=number: self._complete(n))
            parameter.requires_grad_(was)

    def begin(self) -> None:
        """The next backward pass is the last one of this turn: let buckets leave during it."""
        self._waiting = [len(bucket) for bucket in self.buckets]
        self._works, self._open = [], True

    def _complete(self, number: int) -> None:
        if self._open:
            self._waiting[number] -= 1
            while len(self._works) < len(self.buckets) and self._waiting[len(self._works)] == 0:
                self._send()

    def _send(self) -> None:
        bucket = self.buckets[len(self._works)]
        flat = torch.cat([p.grad.flatten() if p.grad is not None else torch.zeros_like(p).flatten() for p in bucket])
        with alive():
            work = distributed.all_reduce(flat, async_op=True)
        assert work is not None
        self._works.append((work, flat))

    def finish(self) -> None:
        """Send what the pass did not reach, and put the sums in the gradients' place."""
        self._open = False
        while len(self._works) < len(self.buckets):
            self._send()
        for (work, flat), bucket in zip(self._works, self.buckets, strict=True):
            with alive():
                work.wait()
            parts = flat.split([p.numel() for p in bucket])
            for parameter, part in zip(bucket, parts, strict=True):
                parameter.grad = part.view_as(parameter)
        self._works = []


def total_of_all(values: Sequence[Tensor]) -> list[Tensor]:
    """The sums of several tensors over all processes, in one exchange, in float64."""
    if rank_and_world()[1] == 1:
        return list(values)
    sums = total(torch.cat([value.double().flatten() for value in values]))
    parts = sums.split([value.numel() for value in values])
    return [part.view_as(value).to(value.dtype) for part, value in zip(parts, values, strict=True)]


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
        with alive():
            distributed.all_gather(lengths, torch.tensor(len(mine) if name.startswith("rows") else 0))
        if name.startswith("rows"):
            longest = max(int(length) for length in lengths)
            padding = mine.new_zeros(longest - len(mine), *mine.shape[1:])
            mine = torch.cat([mine, padding])
        parts = [torch.empty_like(mine) for _ in range(world)]
        with alive():
            distributed.all_gather(parts, mine)
        for rank, part in enumerate(parts):
            states[rank][name] = part[: int(lengths[rank])] if name.startswith("rows") else part
    return states


def local(tensor: Tensor) -> Tensor:
    """This process's piece of a tensor that is split over processes (a DTensor); a whole one as it is."""
    # the class takes a second to import, and is there only where something was split
    piece: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return piece


def whole(tensor: Tensor) -> Tensor:
    """A split tensor put together. All processes must ask for it."""
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full
