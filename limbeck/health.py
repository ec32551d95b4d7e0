r"""Monitors of a distillation: what goes wrong while every loss is finite.

Every `health.every` steps the run looks at the samples of fixed latents, and, where there is a fake score, at how
well it knows them. Six numbers, lower is better, most of them in the teacher's units:

    size      ln of the samples' root mean square over the teacher's; 0 below it
    spread    ln of the teacher's mean distance between two samples over the generator's; 0 above it
    missing   share of teacher samples with no generator sample within the distance of their third neighbour
    balance   half the l1 distance between the classes (or modes) of the generator's samples and of the teacher's; not
              before most of the teacher's samples have neighbours, because the classes of noise mean nothing
    lag       how far the fake score's residual r = x - D_fake(x_sigma) is from what every exact denoiser has:
              E r = 0, and Tweedie's E r . x_sigma = 0. Both as correlations, so that the law does not matter
    runaway   for methods with alpha > 1: ln of the samples' variance over the teacher's, in units of
              ln(alpha / (alpha - 1)), where (in one dimension) SiD's update turns outward

A threshold is learned from the run itself: the best median of five looks so far, plus a margin or six times the scatter
of successive looks, whichever is larger. Two looks in a row above it are told, once, with what they mean and what to
try. A number that was never better is not told, but for `runaway`, whose limit is fixed: at the start a generator makes
noise, and that is healthy.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.denoiser import Denoiser
from limbeck.device import home
from limbeck.distributed import gather
from limbeck.exact import Exact, Mixture
from limbeck.objective import Batch
from limbeck.sample import heun

LOOKED_AT = 2**20 + 1  # the turn under which the batches are drawn that the run looks at
FEW, MANY = 64, 256  # samples that it looks at
RECOGNISABLE = 0.5  # share of teacher samples that may be missing before a class says nothing
RECENT = 21  # looks from which the scatter is learned

Source = Callable[[int, int], Iterable[Batch]]
Census = Callable[[Tensor], Tensor]  # samples (B, *shape) to classes (B,)


@dataclass(frozen=True)
class Rule:
    """When a number is told: `margin` over its best, or `limit` whatever its best."""

    meaning: str
    advice: str
    margin: float = math.inf
    limit: float = math.inf


RULES = {
    "size": Rule(
        "the samples are more than twice as large as the teacher's, and were not: the generator explodes",
        "go back to an earlier checkpoint with a smaller optimizer.generator.lr, set clip, or give the fake score more "
        "turns (method.game.fake_steps)",
        margin=math.log(2),
    ),
    "spread": Rule(
        "the samples lie half as far apart as they did: the generator collapses",
        "lower optimizer.generator.lr, give the fake score more turns (method.game.fake_steps), or add a critic",
        margin=math.log(2),
    ),
    "missing": Rule(
        "a fifth of the teacher's samples are no longer near any of the generator's: it drops part of the law",
        "lower optimizer.generator.lr, or take a method whose divergence covers modes (f_distill, uni_instruct)",
        margin=0.2,
    ),
    "balance": Rule(
        "a fifth of the samples have changed to classes that now are too frequent: some classes are dropped",
        "lower optimizer.generator.lr; check the labels, and the guidance scales of fake score and teacher",
        margin=0.2,
    ),
    "lag": Rule(
        "the fake score no longer knows the generator's samples: the generator moves faster than it learns",
        "raise method.game.fake_steps or optimizer.fake.lr, or lower optimizer.generator.lr",
        margin=0.25,
    ),
    "runaway": Rule(
        "with alpha > 1 the update turns outward beyond a variance of alpha / (alpha - 1) times the teacher's, and the "
        "samples are half way there",
        "set method.alpha to 1 or less and begin again: there is no way back from beyond",
        limit=0.5,
    ),
}


@dataclass
class Series:
    """One number over time, as far as its rule needs it."""

    recent: list[float] = field(default_factory=list)
    best: float = math.inf

    def add(self, value: float) -> None:
        self.recent = [*self.recent, value][-RECENT:]
        if len(self.recent) >= 7:  # the two looks that are judged do not count
            self.best = min(self.best, median(self.recent[-7:-2]))

    def beyond(self, rule: Rule) -> bool:
        """Are the last two values beyond what the run itself has shown to be usual?"""
        values = self.recent
        if len(values) < 7:
            return False
        moves = [abs(b - a) for a, b in itertools.pairwise(values[:-2])]
        scatter = 1.4826 * median(moves) / math.sqrt(2)
        low = min(values[-2:])
        over_best = low > self.best + max(rule.margin, 6 * scatter)
        return over_best or low > max(rule.limit, 6 * scatter)


@dataclass
class Monitor:
    """All numbers of a run, and which of them have been told."""

    series: dict[str, Series] = field(default_factory=dict)
    told: list[str] = field(default_factory=list)

    def add(self, values: Mapping[str, float]) -> list[str]:
        """Take in one look; names of the rules that are broken for the first time."""
        broken = []
        for name, value in values.items():
            series = self.series.setdefault(name, Series())
            series.add(value)
            if name not in self.told and series.beyond(RULES[name]):
                broken.append(name)
        self.told += broken
        return broken

    def state(self) -> dict[str, Any]:
        """As JSON; an infinite best is left out."""
        series = {name: dataclasses.asdict(s) for name, s in self.series.items()}
        for s in series.values():
            s["best"] = None if math.isinf(s["best"]) else s["best"]
        return {"series": series, "told": self.told}

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Monitor:
        """The monitor whose `state` this is."""
        series = {
            name: Series(list(s["recent"]), math.inf if s["best"] is None else s["best"])
            for name, s in state["series"].items()
        }
        return cls(series, list(state["told"]))


@dataclass(frozen=True)
class Looks:
    """Fixed latents, and what the teacher makes of as many.

    Attributes:
        batch: the latents, and the noise for the fake score.
        truth: teacher samples (n, *shape).
        census: says classes or modes; None if nobody can.
    """

    batch: Batch
    truth: Tensor
    census: Census | None

    @classmethod
    @torch.no_grad()
    def of(cls, source: Source, teacher: Denoiser, steps: int, classifier: nn.Module | None) -> Looks:
        """Draw them: the same ones in every sitting of a run.

        Args:
            source: of the run's batches, of which some are drawn that nobody is trained on.
            steps: of Heun's method, for teachers without exact samples.
            classifier: has `logits` for samples; None if there is none.
        """
        batch = _gather(source)
        n = len(batch.z)
        census: Census | None = None
        if isinstance(teacher, Exact):
            truth = teacher.sample(n, torch.Generator().manual_seed(0), batch.cond).to(batch.z.dtype)
        else:
            truth = heun(teacher, batch.eps, steps, cond=batch.cond)
        if isinstance(teacher, Mixture):
            means = teacher.means.flatten(1).to(batch.z.dtype)
            census = lambda x: torch.cdist(x.flatten(1), means).argmin(1)  # noqa: E731
        elif classifier is not None:
            logits: Any = classifier
            census = lambda x: logits.logits(x.to(home(logits))).argmax(1)  # noqa: E731
        return cls(batch, truth, census)

    @torch.no_grad()
    def look(self, method: Any, nets: nn.ModuleDict, teacher: Denoiser) -> dict[str, float]:
        """The numbers of now; those that this method and teacher have."""
        x, truth, batch = nets[method.product](self.batch.z, self.batch.cond), self.truth, self.batch
        if not x.isfinite().all():
            return {}  # the next loss says so
        told = {"size": math.log(max(1.0, float(_size(x) / _size(truth))))}
        apart, known = (float(torch.pdist(points.flatten(1)).mean()) for points in (x, truth))
        if known > 1e-6 * float(_size(truth)):
            told["spread"] = math.log(max(1.0, known / max(apart, 1e-6 * known)))
            told["missing"] = _missing(truth.flatten(1), x.flatten(1))
        if self.census is not None and told.get("missing", 0.0) < RECOGNISABLE:
            told["balance"] = _imbalance(self.census(x), self.census(truth))
        if "fake" in nets and hasattr(method, "health"):
            told["lag"] = float(method.health(nets, teacher, batch)["lag"])
        if getattr(method, "alpha", 0.0) > 1:
            mean = truth.mean(0)
            ratio = (x - mean).square().mean() / (truth - mean).square().mean()
            told["runaway"] = math.log(max(1e-12, float(ratio))) / math.log(method.alpha / (method.alpha - 1))
        return told


def _gather(source: Source) -> Batch:
    """At least `FEW` samples of what the source draws, at most `MANY`; of several processes all have the same."""
    parts: list[Batch] = []
    turn = LOOKED_AT
    while sum(len(part.z) for part in parts) < FEW:
        parts += list(source(0, turn))
        turn += 1
    columns = {f.name: [getattr(part, f.name) for part in parts] for f in dataclasses.fields(Batch)}
    own = {f"rows {name}": torch.cat(c) for name, c in columns.items() if all(isinstance(v, Tensor) for v in c)}
    every = gather(own)
    whole = {name.removeprefix("rows "): torch.cat([one[name] for one in every])[:MANY] for name in own}
    return Batch(whole.pop("z"), whole.pop("u"), whole.pop("eps"), whole.pop("cond", None), whole.pop("real", None))


def _size(x: Tensor) -> Tensor:
    return x.double().square().mean().sqrt()


def _missing(truth: Tensor, x: Tensor) -> float:
    """Share of rows of `truth` with no row of `x` within the distance of their third neighbour."""
    radius = torch.cdist(truth, truth).kthvalue(min(4, len(truth)), 1).values
    return float((torch.cdist(truth, x).min(1).values > radius).double().mean())


def _imbalance(found: Tensor, expected: Tensor) -> float:
    count = int(max(found.max(), expected.max())) + 1
    a, b = (classes.bincount(minlength=count).double() / len(classes) for classes in (found, expected))
    return float((a - b).abs().sum() / 2)
