"""Evaluation: the metrics, and the protocol that turns a sampler into numbers that can be quoted."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field

from torch import Tensor

from limbeck.evaluate.draws import VALIDATION, Sampler, generate, latents
from limbeck.evaluate.frechet import Moments, frechet_distance, frechet_infinity
from limbeck.evaluate.judge import ExactJudge, ImageJudge, Judge, Metrics, Reference
from limbeck.evaluate.kernel import kid, mmd2
from limbeck.evaluate.modes import mode_statistics
from limbeck.evaluate.transport import sliced_wasserstein

__all__ = [
    "VALIDATION",
    "ExactJudge",
    "ImageJudge",
    "Judge",
    "Moments",
    "Reference",
    "Scores",
    "frechet_distance",
    "frechet_infinity",
    "kid",
    "measure",
    "mmd2",
    "mode_statistics",
    "sliced_wasserstein",
]


@dataclass(frozen=True)
class Scores:
    """Metrics of a sampler: mean over draws, their standard deviation (two draws and more), and the time per sample."""

    nfe: int
    metrics: Metrics
    spread: Metrics = field(default_factory=dict)
    ms_per_image: float | None = None


def measure(
    sampler: Sampler,
    nfe: int,
    judge: Judge,
    latent_shape: tuple[int, ...],
    classes: int,
    *,
    samples: int,
    draws: int = 1,
    seed: int = 0,
    first: int = 0,
) -> Scores:
    """Score `draws` sets of `samples` samples; draw k uses the `samples` indices from first + k * samples.

    Args:
        sampler: called as sampler(z, cond).
        nfe: network calls of one sample, for the record.
        classes: labels are uniform over the classes; 0 = none.
    """
    found: list[Metrics] = []
    seconds = 0.0
    for k in range(draws):
        indices = range(first + k * samples, first + (k + 1) * samples)
        drawn = latents(seed, indices, latent_shape, classes)
        start = time.perf_counter()
        x: Tensor = generate(sampler, drawn, classes)
        seconds += time.perf_counter() - start
        found.append(judge.scores(x, drawn.labels))
    metrics = {name: statistics.fmean(f[name] for f in found) for name in found[0]}
    spread = {name: statistics.stdev(f[name] for f in found) for name in found[0]} if draws > 1 else {}
    return Scores(nfe, metrics, spread, 1000 * seconds / (draws * samples))
