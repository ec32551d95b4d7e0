"""Samples for evaluation: sample j depends on (seed, j) alone, whatever the batch size.

Index ranges are kept apart: draw k of a score uses k N ... (k + 1) N - 1, the scores that are watched during a run use
indices from `VALIDATION`, and training draws from streams of another name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from limbeck.randomness import stream
from limbeck.source import one_hot

VALIDATION = 2**31

Sampler = Callable[[Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Latents:
    """z (n, *latent_shape) and class numbers (n,) or None, of a range of indices."""

    z: Tensor
    labels: Tensor | None


def latents(seed: int, indices: range, shape: tuple[int, ...], classes: int, key: str = "sample") -> Latents:
    """Latents and uniform class numbers of `indices`; each index of a key has a stream of its own."""
    z = torch.empty(len(indices), *shape)
    labels = torch.empty(len(indices), dtype=torch.long)
    for row, index in enumerate(indices):
        rng = stream(seed, key, index)
        torch.randn(shape, generator=rng, out=z[row])
        if classes:
            labels[row] = torch.randint(classes, (), generator=rng)
    return Latents(z, labels if classes else None)


@torch.no_grad()
def generate(sampler: Sampler, drawn: Latents, classes: int, batch: int = 500) -> Tensor:
    """Samples (n, *shape) of `sampler(z, cond)`, computed `batch` at a time."""
    parts = []
    for start in range(0, len(drawn.z), batch):
        rows = slice(start, start + batch)
        cond = None if drawn.labels is None else one_hot(drawn.labels[rows], classes)
        parts.append(sampler(drawn.z[rows], cond))
    return torch.cat(parts)


def quantize(x: Tensor) -> Tensor:
    """Images in [-1, 1] at the 8-bit values that a file would hold: trunc(clip(127.5 x + 128, 0, 255)), as EDM does."""
    return (127.5 * x + 128).clamp(0, 255).floor() / 127.5 - 1
