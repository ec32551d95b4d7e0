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
    """z (n, *latent_shape) of a range of indices, and class numbers (n,), contexts (n, classes) or None."""

    z: Tensor
    labels: Tensor | None

    def rows(self, classes: int, part: slice = slice(None)) -> Tensor | None:
        """Condition rows (n, classes), None without classes."""
        if self.labels is None:
            return None
        own = self.labels[part]
        return own if own.ndim == 2 else one_hot(own, classes)


def latents(
    seed: int, indices: range, shape: tuple[int, ...], classes: int, key: str = "sample", contexts: bool = False
) -> Latents:
    """Latents of `indices`, and class numbers or contexts, uniform; each index of a key has a stream of its own."""
    z = torch.empty(len(indices), *shape)
    labels = torch.empty(len(indices), classes) if contexts else torch.empty(len(indices), dtype=torch.long)
    for row, index in enumerate(indices):
        rng = stream(seed, key, index)
        torch.randn(shape, generator=rng, out=z[row])
        if contexts:
            torch.rand(classes, generator=rng, out=labels[row])
        elif classes:
            labels[row] = torch.randint(classes, (), generator=rng)
    return Latents(z, labels if classes else None)


def in_order(count: int, classes: int, contexts: bool = False) -> Tensor | None:
    """Labels of `count` samples for the eye: ten of each class, or of each of ten contexts from 0 to 1, in turn."""
    tens = torch.arange(count) // 10
    if contexts:
        return (tens % 10 / 9)[:, None].expand(count, classes)
    return tens % classes if classes else None


def for_the_eye(seed: int, count: int, shape: tuple[int, ...], classes: int, contexts: bool = False) -> Latents:
    """The first latents of a score, with labels in order."""
    return Latents(latents(seed, range(count), shape, 0).z, in_order(count, classes, contexts))


@torch.no_grad()
def generate(sampler: Sampler, drawn: Latents, classes: int, batch: int = 500) -> Tensor:
    """Samples (n, *shape) of `sampler(z, cond)`, computed `batch` at a time."""
    parts = []
    for start in range(0, len(drawn.z), batch):
        part = slice(start, start + batch)
        parts.append(sampler(drawn.z[part], drawn.rows(classes, part)))
    return torch.cat(parts)


def quantize(x: Tensor) -> Tensor:
    """Images in [-1, 1] at the 8-bit values that a file would hold: trunc(clip(127.5 x + 128, 0, 255)), as EDM does."""
    return (127.5 * x + 128).clamp(0, 255).floor() / 127.5 - 1
