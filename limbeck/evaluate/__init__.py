"""Evaluation: the metrics, and the protocol that turns a sampler into numbers that can be quoted."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from limbeck.data import Data
from limbeck.distributed import gather, rank_and_world
from limbeck.evaluate.draws import VALIDATION, Sampler, generate, latents
from limbeck.evaluate.frechet import Moments, frechet_distance, frechet_infinity
from limbeck.evaluate.judge import ExactJudge, ImageJudge, Judge, Judgement, Metrics, Reference, Tally
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
    "measure_data",
    "mmd2",
    "mode_statistics",
    "sliced_wasserstein",
]


@dataclass(frozen=True)
class Scores:
    """Scores of a sampler.

    Attributes:
        nfe: network calls of one sample; 0 = not a sampler but given samples.
        metrics: mean over the draws.
        spread: standard deviation over the draws, with two draws and more.
        intervals: 95% bootstrap intervals of the first draw.
        details: lists of the first draw, e.g. the accuracy of each class.
        notes: what is missing, and why.
        ms_per_image: time of one sample within a batch.
    """

    nfe: int
    metrics: Metrics
    spread: Metrics = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    details: dict[str, list[float]] = field(default_factory=dict)
    ms_per_image: float | None = None
    notes: list[str] = field(default_factory=list)


def measure(
    sampler: Sampler,
    nfe: int,
    judge: Judge,
    latent_shape: tuple[int, ...],
    classes: int,
    contexts: bool = False,
    *,
    samples: int,
    draws: int = 1,
    seed: int = 0,
    first: int = 0,
    batch: int = 500,
) -> Scores:
    """Score `draws` sets of `samples` samples; draw k uses the `samples` indices from first + k * samples.

    Args:
        sampler: called as sampler(z, cond).
        nfe: network calls of one sample, for the record.
        classes: labels are uniform over the classes; 0 = none.
        contexts: conditions are uniform in [0, 1)^classes instead.
        batch: samples made and judged at once; memory grows with it, not with `samples`. Results do not depend on it,
            except through the rounding of the networks' own arithmetic.

    Under `torchrun` every process makes a share of the samples, and all return the same scores.
    """
    found: list[Judgement] = []
    seconds = 0.0
    for k in range(draws):
        tally = judge.tally()
        begin = first + k * samples
        starts = torch.arange(begin, begin + samples, batch)
        rank, world = rank_and_world()
        # contiguous shares keep the samples in the order of one process, whatever their number
        for start in starts.tensor_split(world)[rank].tolist():
            indices = range(start, min(start + batch, begin + samples))
            drawn = latents(seed, indices, latent_shape, classes, contexts=contexts)
            before = time.perf_counter()
            x = generate(sampler, drawn, classes, batch)
            seconds += time.perf_counter() - before
            tally.add(x, drawn.labels)
        found.append(judgement_of_all(judge, tally))
    # the time of a sample, not of its share of the processes
    seconds = sum(float(state["seconds"]) for state in gather({"seconds": torch.tensor(seconds)}))
    return combine(nfe, found, 1000 * seconds / (draws * samples))


def measure_data(data: Data, judge: Judge, batch: int = 500) -> Scores:
    """Score given samples (and their labels or contexts, if any), each once."""
    tally, labels = judge.tally(), data.y if data.contexts is None else data.contexts
    rank, world = rank_and_world()
    blocks = torch.arange(len(data.x)).split(batch)
    share = slice(len(blocks) * rank // world, len(blocks) * (rank + 1) // world)
    for rows in blocks[share]:
        tally.add(data.x[rows], None if labels is None else labels[rows])
    return combine(0, [judgement_of_all(judge, tally)])


def judgement_of_all(judge: Judge, tally: Tally) -> Judgement:
    """The judgement of the tallies of all processes together."""
    whole = judge.tally()
    for state in gather(tally.tensors()):
        whole.merge(state)
    return whole.judgement()


def combine(nfe: int, found: Sequence[Judgement], ms_per_image: float | None = None) -> Scores:
    """Mean and spread over draws."""
    names = found[0].metrics
    metrics = {name: statistics.fmean(f.metrics[name] for f in found) for name in names}
    spread = {name: statistics.stdev(f.metrics[name] for f in found) for name in names} if len(found) > 1 else {}
    return Scores(nfe, metrics, spread, found[0].intervals, found[0].details, ms_per_image, found[0].notes)
