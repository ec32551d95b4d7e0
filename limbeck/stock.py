"""Samples of a teacher that a run draws once and keeps: real samples for critics without data, pairs for regression.

They lie in the run folder in parts, each written whole, so that an interrupted run goes on where it was.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from limbeck import artifact
from limbeck.denoiser import Denoiser, Guided
from limbeck.device import from_cpu
from limbeck.distributed import rank_and_world, wait_for_all
from limbeck.evaluate.draws import latents
from limbeck.files import write_atomically
from limbeck.objective import Pairs
from limbeck.randomness import seed_of
from limbeck.sample import heun

PART = 500


def teacher_pairs(
    teacher: Denoiser,
    count: int,
    seed: int,
    steps: int,
    folder: Path,
    drawn: Callable[[int], None],
    guidance: float = 1.0,
) -> Pairs:
    """`count` latents with what Heun's method of `steps` steps makes of them, and uniform conditions if it has any.

    Args:
        folder: where parts are read from, or else written to.
        drawn: is told how many pairs there are after every part; what it raises stops the work between two parts.
        guidance: scale of the teacher's, if it knows labels.
    """
    strong = guidance != 1 and teacher.classes > 0
    key = seed_of(
        artifact.fingerprint(teacher),
        artifact.reading(teacher),
        seed,
        steps,
        *([f"guidance {guidance}"] if strong else []),
    )
    denoiser = Guided(teacher, guidance) if strong else teacher
    folder.mkdir(parents=True, exist_ok=True)

    def part(start: int) -> Pairs:
        path = folder / f"{key:016x}-{start:09d}.safetensors"
        asked = latents(seed, range(start, start + PART), teacher.shape, teacher.classes, "teacher", teacher.contexts)
        cond = asked.rows(teacher.classes)
        x = _read(path)
        if x is None or x.shape != asked.z.shape:
            with torch.no_grad():
                x = from_cpu(lambda z, cond: heun(denoiser, z, steps, cond=cond), teacher)(asked.z, cond)
            write_atomically(path, safetensors.torch.save({"x": x}, {"sha256": _hash(x)}))
        drawn(min(count, start + PART))
        return Pairs(asked.z, x, cond)

    starts, (rank, world) = range(0, count, PART), rank_and_world()
    if world > 1:  # each process draws a share, and then reads those of the others
        for start in starts[rank::world]:
            part(start)
        wait_for_all()
    parts = [part(start) for start in starts]
    z, x = torch.cat([p.z for p in parts]), torch.cat([p.x for p in parts])
    conds = [p.cond for p in parts if p.cond is not None]
    return Pairs(z, x, torch.cat(conds) if conds else None).rows(slice(0, count))


def _read(path: Path) -> torch.Tensor | None:
    """The samples of a part; None if it is missing or damaged."""
    try:
        with safetensors.safe_open(str(path), "pt") as file:
            x: torch.Tensor = file.get_tensor("x")
            return x if (file.metadata() or {}).get("sha256") == _hash(x) else None
    except (OSError, safetensors.SafetensorError):
        return None


def _hash(x: torch.Tensor) -> str:
    return hashlib.sha256(x.contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()
