"""Does an exported generator give PyTorch's samples?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from limbeck.generator import Generator

TOLERANCE = 1e-4  # of samples of size 1; larger samples are compared relative to their size
BATCHES = (1, 3, 28, 32)  # several sizes, so that a form which froze its batch is found


@dataclass(frozen=True)
class Probe:
    """Noise z (n, *latent_shape), labels (n,) and their one-hot rows (n, classes).

    Label -1 stands for no label, a row of zeros. z is what torch.Generator().manual_seed(seed) draws.
    """

    seed: int
    z: Tensor
    labels: Tensor | None
    cond: Tensor | None


def probes(generator: Generator, unlabelled: bool = True) -> Iterator[Probe]:
    """64 inputs in batches of several sizes; `unlabelled` includes samples without a label."""
    classes, start = generator.classes, 0
    for seed, n in enumerate(BATCHES):
        z = torch.randn(n, *generator.latent_shape, generator=torch.Generator().manual_seed(seed))
        labels = cond = None
        if classes:
            labels = torch.arange(start, start + n) % (classes + unlabelled)
            labels[labels == classes] = -1
            cond = rows(labels, classes)
        start += n
        yield Probe(seed, z, labels, cond)


def rows(labels: Tensor, classes: int) -> Tensor:
    """One-hot rows (n, classes) of labels (n,); zeros for label -1."""
    return torch.eye(classes + 1, classes)[labels]


@torch.no_grad()
def compare(
    form: str,
    generator: Generator,
    other: Callable[[Probe], Tensor],
    unlabelled: bool = True,
    seen: Callable[[Tensor], Tensor] = lambda x: x,
) -> tuple[float, int]:
    """Largest difference between seen(generator's samples) and other's, and the number of samples.

    Raises:
        ValueError: if it exceeds `TOLERANCE`, or the other fails.
    """
    largest, count = 0.0, 0
    for probe in probes(generator, unlabelled):
        expected = seen(generator(probe.z, probe.cond))
        try:
            got = other(probe)
        except Exception as error:  # whatever a foreign runtime raises, the form does not work
            reason = " ".join(str(error).split())
            raise ValueError(f"{form}: cannot run {len(probe.z)} samples ({reason}); nothing was written") from error
        if got.shape != expected.shape:
            raise ValueError(f"{form}: gives samples of shape {tuple(got.shape)}, PyTorch {tuple(expected.shape)}")
        difference = float((got - expected).abs().max())
        if not difference <= TOLERANCE * max(1.0, float(expected.abs().max())):  # also if it is not a number
            raise ValueError(f"{form}: its samples differ from PyTorch's by {difference:.3g}; nothing was written")
        largest, count = max(largest, difference), count + len(got)
    return largest, count
