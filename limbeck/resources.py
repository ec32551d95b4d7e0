"""What a run needs: memory and disk before it starts, and what to change when that is more than there is.

Every turn is played on a few samples and on twice as many, without an update, while torch's allocator is watched. Its
peak is a line in the number of samples, up to constants of the network; what the optimisers and a checkpoint take is
known from the weights. On a process's resident memory the estimate is within 20% (see docs/reliability.md).
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import resource
import shutil
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from limbeck.device import CPU, is_out_of_memory
from limbeck.distributed import local
from limbeck.objective import Batch, Loss, Pairs
from limbeck.train import ALL_OPEN, Source, Trainer

PROBE = 4  # samples; and twice as many
GIB = 2**30
GROUP = Path("/sys/fs/cgroup")  # of this process, as its container shows it
# measured on six networks: what torch's kernels allocate by themselves, and code that is loaded on first use; and the
# share of freed activations that the C library keeps
SLACK, KERNELS, KEPT = 1.12, 30 * 2**20, 0.75
ROOM = 0.8  # share of the free memory that a number of micro-batches is chosen for: the estimate is within 20%


@dataclass(frozen=True)
class Needs:
    """Bytes, of the device that computes.

    Attributes:
        resident: memory of this process now, with all weights.
        fixed: what training adds whatever the batch: gradients, moments, the optimiser's temporaries.
        sample: what every sample of a micro-batch adds.
        save: what writing a checkpoint adds for a moment.
        moments: the optimisers' running means, a part of `fixed` that is there while a checkpoint is written.
        checkpoint: size of one on the disk.
    """

    resident: int
    fixed: int
    sample: float
    save: int
    moments: int
    checkpoint: int
    device: torch.device = CPU

    def memory(self, batch: int, micro_batches: int) -> int:
        """Peak of resident memory with a batch in so many parts."""
        rows = -(-batch // micro_batches)
        train = self.fixed + self.sample * rows
        saving = self.moments + self.save + KEPT * (train - self.moments)
        return self.resident + round(max(KERNELS + SLACK * train, saving))

    def large(self, batch: int, micro_batches: int) -> bool:
        """More than anybody would call nothing: half a gigabyte of new memory or disk."""
        return max(self.memory(batch, micro_batches) - self.resident, self.checkpoint) > GIB / 2

    def line(self, batch: int, micro_batches: int, keep: int) -> str:
        """For people."""
        memory, disk = self.memory(batch, micro_batches) / GIB, keep * self.checkpoint / 1e6
        return f"needs about {memory:.2g} GiB of memory, and {disk:,.1f} MB of disk for checkpoints"

    def fewest(self, batch: int, free: int) -> int | None:
        """The fewest micro-batches (powers of two, or one a sample) that fit into `free` bytes of new memory."""
        every = (*(2**k for k in range(30)), batch)
        return next((n for n in every if n <= batch and self.memory(batch, n) - self.resident <= free), None)

    def advice(self, batch: int, free: int) -> str:
        """What to change so that a run fits into `free` bytes of new memory."""
        parts = self.fewest(batch, free)
        if parts is None:
            return "no number of micro-batches fits; take a smaller template"
        return f"micro_batches = {parts} takes about {self.memory(batch, parts) / GIB:.2g} GiB"


def measure(trainer: Trainer, source: Source) -> Needs:
    """What the run of this trainer needs. Nothing of the trainer changes."""
    place = trainer.device
    resident = resident_bytes(place)
    fixed = sample = 0.0
    for index, turn in enumerate(trainer.objective.turns(trainer.step, ALL_OPEN)):  # those too that begin later
        whole = _complete(next(iter(source(trainer.step, index))), hasattr(trainer.objective, "pairs"))
        few = max(1, min(PROBE, len(whole.z) // 2))
        small, large = (_peaks(trainer, turn.players, turn.loss, _rows(whole, n)) for n in (few, 2 * few))
        # of the forward pass alone, too: where weights are large, gradients hide what samples take
        slope = max(0.0, *((b - a) / few for a, b in zip(small, large, strict=True)))
        weights = sum(_bytes(trainer.nets[name].parameters()) for name in turn.players)
        fixed, sample = max(fixed, weights, small[1] - slope * few), max(sample, slope)
    moments = 2 * sum(_bytes(trainer.nets[name].parameters()) for name in trainer.settings)
    weights = sum(_bytes(net.state_dict().values()) for net in trainer.nets.values())
    average = _bytes(trainer.ema.state_dict().values())
    state = weights + average + moments
    largest = max((_bytes(trainer.nets[name].parameters()) for name in trainer.settings), default=0)
    # gradients are in `fixed`; the optimiser's temporaries come when activations are gone
    fixed = moments + max(round(fixed), 2 * largest)
    # tensors of a checkpoint are there three times while it is written: cloned, as bytes each, and as one file
    save = 3 * state if place == CPU else 0
    return Needs(resident, fixed, sample, save, moments, _disk(trainer), place)


def _peaks(trainer: Trainer, players: Sequence[str], loss: Loss, batch: Batch) -> tuple[int, int]:
    """Most bytes that a turn holds at a time in its forward pass, and in all, gradients included."""
    with trainer.rehearsal(players), Watch(standing(trainer)) as watch:
        total = loss(trainer.nets, trainer.teacher, batch).sum()
        forward = watch.top
        total.backward()
        return forward, watch.top


def standing(trainer: Trainer) -> Iterator[Tensor]:
    """What a trainer holds between two steps."""
    for module in (trainer.nets, trainer.teacher, trainer.ema.module):
        yield from module.parameters()
        yield from module.buffers()
    for optimizer in trainer.optimizers.values():
        for moments in optimizer.state.values():
            yield from (moment for moment in moments.values() if isinstance(moment, Tensor))


class Watch(TorchDispatchMode):
    """Counts the bytes of all storages that come out of torch's operations and are still there, but those of `before`:
    a view of a weight is none that was made.
    """

    def __init__(self, before: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.top = 0
        self.known: weakref.WeakKeyDictionary[torch.UntypedStorage, int] = weakref.WeakKeyDictionary()
        for tensor in before:
            self.known[local(tensor).untyped_storage()] = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                storage = local(value).untyped_storage()
                if storage not in self.known:
                    size = self.known[storage] = storage.nbytes()
                    weakref.finalize(storage, self._freed, size)
                    self.now += size
                    self.top = max(self.top, self.now)
        return result

    def _freed(self, size: int) -> None:
        self.now -= size


def _complete(batch: Batch, pairs: bool) -> Batch:
    """A batch with noise for what the run has not prepared yet: real samples, and pairs."""
    if batch.real is None:
        batch = dataclasses.replace(batch, real=batch.eps, direction=batch.eps)
    return dataclasses.replace(batch, pairs=Pairs(batch.eps, batch.eps, batch.cond)) if pairs else batch


def _rows(batch: Batch, n: int) -> Batch:
    """The first `n` samples of a batch, over again if it has fewer."""
    rows = torch.arange(n) % len(batch.z)
    return batch.mapped(itemgetter(rows))


def _bytes(tensors: Iterable[Tensor]) -> int:
    """What tensors take in this process: of split ones its pieces."""
    return sum(local(t).nbytes for t in tensors)


def _disk(trainer: Trainer) -> int:
    """Size of a checkpoint: all weights, the average, and two moments of every weight that is trained."""
    nets, average = trainer.nets.state_dict().values(), trainer.ema.state_dict().values()
    trained = [p for name in trainer.settings for p in trainer.nets[name].parameters()]
    return sum(t.numel() * t.element_size() for t in (*nets, *average, *trained, *trained))


def resident_bytes(device: torch.device = CPU) -> int:
    """Resident memory of this process, or what it holds of a GPU's; 0 where the system does not tell."""
    if device != CPU:
        return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    return 0


def free_memory(device: torch.device = CPU) -> int | None:
    """Bytes that this process may still take: of the machine, its control group and its own limit, or of a GPU; None =
    unknown.

    Processes that `torchrun` has started on one machine share what the machine and the group have.
    """
    if device != CPU:
        if device.type != "cuda":
            return None
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, for itself
        return torch.cuda.mem_get_info(device)[0] + cached
    found = []
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(1024 // here * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")))
    with contextlib.suppress(OSError, ValueError):
        limit, used = (int((GROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        # files that were read are kept as long as nobody needs the room
        stat = dict(line.split() for line in (GROUP / "memory.stat").read_text().splitlines())
        found.append((limit - used + int(stat.get("inactive_file", 0))) // here)
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        with contextlib.suppress(OSError):
            found.append(soft - int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize())
    return min(found, default=None)


def check(needs: Needs, batch: int, micro_batches: int, keep: int, out: Path) -> None:
    """Raise ValueError, with what to change, if a run cannot have what it needs."""
    free = free_memory(needs.device)
    new = needs.memory(batch, micro_batches) - needs.resident
    if free is not None and new > free:
        raise ValueError(
            f"micro_batches: this run needs about {needs.memory(batch, micro_batches) / GIB:.2g} GiB of memory, "
            f"{new / GIB:.2g} more than now, and {free / GIB:.2g} GiB are free; {needs.advice(batch, free)}"
        )
    # one more than are kept, because an old checkpoint goes only when the new one is whole
    there = sum(p.stat().st_size for p in (out / "checkpoints").rglob("*.safetensors"))
    disk = (keep + 1) * needs.checkpoint - there
    place = next(p for p in (out, *out.absolute().parents) if p.is_dir())
    if disk > shutil.disk_usage(place).free:
        raise ValueError(
            f"keep: {keep + 1} checkpoints of {needs.checkpoint / 1e6:,.1f} MB need {disk / 1e6:,.1f} MB more on the "
            f"disk of {place}, and {shutil.disk_usage(place).free / 1e6:,.1f} MB are free"
        )


@contextlib.contextmanager
def explained(needs: Needs | None, batch: int) -> Iterator[None]:
    """Turn an allocation that fails into a MemoryError that says what to change."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not is_out_of_memory(error):
            raise
        free = None if needs is None else free_memory(needs.device)
        advice = "raise micro_batches" if needs is None or free is None else needs.advice(batch, free)
        raise MemoryError(f"out of memory; {advice}; the last checkpoint is intact") from None


def duration(seconds: float) -> str:
    """Seconds for people."""
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"
