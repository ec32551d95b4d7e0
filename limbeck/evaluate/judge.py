"""Judges: what a set of samples is scored against. Real images have references, exact laws are their own.

A judge hands out tallies. A tally takes samples in batches and keeps moments, counts and at most `KEPT` rows of
features, so that its memory does not grow with the number of samples; tallies of several processes merge.
"""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from limbeck import artifact, data, features
from limbeck.data import Data, open_npz
from limbeck.device import CPU, home
from limbeck.evaluate.bootstrap import bootstrap
from limbeck.evaluate.classify import c2st, class_accuracy
from limbeck.evaluate.draws import quantize
from limbeck.evaluate.frechet import Moments, frechet_distance, frechet_infinity
from limbeck.evaluate.kernel import kid, mmd2
from limbeck.evaluate.modes import mode_statistics
from limbeck.evaluate.neighbours import PRDC, memorisation, precision_recall_density_coverage
from limbeck.evaluate.transport import sliced_wasserstein
from limbeck.exact import Empirical, Exact, Gaussian, Mixture, Policy
from limbeck.features import Classifier, Scripted
from limbeck.files import sha256, write_atomically
from limbeck.randomness import stream

Metrics = dict[str, float]

DRAWS = 10_000  # rows of the data themselves whose distance to all of them is a reference's own floor
KEPT = 10_000  # rows of features that a tally or a reference keeps for the metrics that need samples
COPIES = 400  # rows of a reference from which on samples are checked for copies: a half has two below its 1%
WIDEST = 4096  # pixels up to which pixel-space moments are taken: their covariance has the square of that
BOOTSTRAP = 256  # features up to which confidence intervals are computed: of 2,048, one distance takes half a minute


@dataclass(frozen=True)
class Judgement:
    """What a tally found.

    Attributes:
        metrics: one number each.
        intervals: 95% bootstrap intervals (low, high) over the samples, for some of the metrics.
        details: lists, e.g. the accuracy of each class.
        notes: sentences on what is missing, and why.
    """

    metrics: Metrics
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    details: dict[str, list[float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Truth:
    """What the truth itself scores.

    Attributes:
        samples: how many samples of the truth, 0 if unknown.
        note: which, in words.
    """

    metrics: Metrics
    samples: int
    note: str


class Tally(Protocol):
    """Samples seen so far, as far as the scores need them."""

    def add(self, x: Tensor, labels: Tensor | None) -> None:
        """Take in samples x (n, *shape), asked for with class numbers `labels` (n,), contexts (n, classes) or none."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """The state, for another process; those whose name begins with "rows" have one row per sample."""
        ...

    def merge(self, state: Mapping[str, Tensor]) -> None:
        """Add another process's `tensors()`."""
        ...

    def judgement(self) -> Judgement:
        """The scores of everything that was added."""
        ...


class Judge(Protocol):
    """Scores samples, and says how good the truth itself would score."""

    def check(self, who: str, shape: tuple[int, ...]) -> None:
        """Raise ValueError, naming both sides, if samples of `shape` cannot be scored."""
        ...

    def tally(self) -> Tally: ...

    def watching(self) -> Judge:
        """The judge of scores that steer a run (its best checkpoint): it must not see what the final scores see."""
        ...

    def floor(self, samples: int) -> Truth:
        """The truth's own scores, of as many samples if possible."""
        ...

    def halves(self) -> Truth | None:
        """Scores of one random half of the truth against the other; None if unknown."""
        ...

    @property
    def names(self) -> set[str]:
        """The metrics that samples can have, if there are enough."""
        ...

    def hashes(self) -> dict[str, str]:
        """SHA-256 of what the scores depend on."""
        ...


@dataclass(frozen=True)
class Reference:
    """Moments of a data set in pixels and in features, and the distances that the data themselves reach.

    Attributes:
        moments: mean and covariance by space: "pixel", "feature", and two random halves: "feature_half", by which a
            run's best checkpoint is chosen, and "feature_rest", which that choice has not seen.
        rows: features of at most `KEPT` samples (n, d), empty if unknown.
        floors: distances of the data to themselves by name; see `measure`.
        features: SHA-256 of the feature network, "" if unknown.
        count: samples behind the moments, 0 if unknown.
    """

    moments: dict[str, tuple[Tensor, Tensor]]
    rows: Tensor
    floors: Metrics
    features: str
    count: int

    @classmethod
    def measure(cls, data: Data, network: nn.Module, network_hash: str, seed: int = 0) -> Reference:
        """Reference of `data`, with its floors.

        The floors, for each space: the distance of `DRAWS` rows drawn with replacement to the whole set (what a
        perfect sampler of this very set would score); and `halves`, the distance between two random halves.

        Raises:
            ValueError: for fewer than 4 samples, of which no two halves have a covariance.
        """
        if len(data.x) < 4:
            raise ValueError(f"{data.name}: a reference needs at least 4 samples, got {len(data.x)}")
        if isinstance(network, Classifier) and data.classes > network.classes:
            raise ValueError(
                f"{data.name}: has labels up to {data.classes - 1}, the feature network knows {network.classes} classes"
                f" (0 to {network.classes - 1})"
            )
        spaces = {"feature": features.in_batches(network, data.x)}
        if data.x[0].numel() <= WIDEST:
            spaces["pixel"] = data.x.flatten(1)
        moments: dict[str, tuple[Tensor, Tensor]] = {}
        floors: Metrics = {}
        rng = stream(seed, "reference")
        drawn = torch.randint(len(data.x), (DRAWS,), generator=rng)
        order = torch.randperm(len(data.x), generator=rng)
        first, second = order[: len(order) // 2], order[len(order) // 2 :]
        for name, values in spaces.items():
            moments[name] = _moments(values)
            floors[f"fd_{name}"] = frechet_distance(*_moments(values[drawn]), *moments[name])
            floors[f"fd_{name}_halves"] = frechet_distance(*_moments(values[first]), *_moments(values[second]))
        rows = spaces["feature"][order[:KEPT]]
        moments["feature_half"] = _moments(spaces["feature"][first])
        moments["feature_rest"] = _moments(spaces["feature"][second])
        if min(len(first), len(second)) > 5:
            halves = spaces["feature"][first][:KEPT], spaces["feature"][second][:KEPT]
            floors |= precision_recall_density_coverage(*halves)._asdict()
        if data.y is not None and isinstance(network, Classifier):
            predicted = features.in_batches(network.logits, data.x).argmax(1)
            floors["class_accuracy"] = class_accuracy(predicted, data.y)
        return cls(moments, _compact(rows).float(), floors, network_hash, len(data.x))

    def save(self, path: Path) -> None:
        """Write as .npz, atomically; the rows of features in half precision if they fit."""
        arrays: dict[str, Any] = {"features_sha256": np.array(self.features), "count": np.array(self.count)}
        arrays["rows"] = _compact(self.rows).numpy()
        for space, (mean, cov) in self.moments.items():
            arrays[f"mean_{space}"], arrays[f"cov_{space}"] = mean.numpy(), cov.numpy()
        for name, value in self.floors.items():
            arrays[f"floor_{name}"] = np.array(value)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, buffer.getvalue())

    @classmethod
    def read(cls, path: Path) -> Reference:
        """Read what `save` wrote, or EDM's statistics (`mu` and `sigma` of Inception's features).

        Raises:
            ValueError: if the file is not a reference.
        """
        arrays = open_npz(path)
        try:
            if {"mu", "sigma"} <= arrays.keys():
                moments = {"feature": _checked("", arrays["mu"], arrays["sigma"])}
                return cls(moments, torch.empty(0, len(moments["feature"][0])), {}, "", 0)
            spaces = [key.removeprefix("mean_") for key in ("mean_feature", *arrays) if key.startswith("mean_")]
            moments = {s: _checked(f" of {s}", arrays[f"mean_{s}"], arrays[f"cov_{s}"]) for s in spaces}
            floors = {k.removeprefix("floor_"): float(v) for k, v in arrays.items() if k.startswith("floor_")}
            rows = torch.from_numpy(arrays["rows"]).float()
            if rows.shape[1:] != moments["feature"][0].shape or not torch.isfinite(rows).all():
                raise ValueError(f"rows of shape {tuple(rows.shape)} are not features")
            digest, count = str(arrays["features_sha256"]), int(arrays["count"])
        except KeyError as error:
            raise ValueError(f"{path}: not a reference file ({error} is missing)") from None
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: not a reference file ({error})") from None
        return cls(moments, rows, floors, digest, count)


def _checked(space: str, mean: np.ndarray, cov: np.ndarray) -> tuple[Tensor, Tensor]:
    if mean.ndim != 1 or mean.size == 0 or cov.shape != (len(mean), len(mean)):
        raise ValueError(f"a mean{space} of shape {mean.shape} and a covariance of shape {cov.shape} do not fit")
    if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
        raise ValueError(f"the moments{space} contain NaN or Inf")
    covariance = torch.from_numpy(cov.astype(np.float64))
    size = float(covariance.abs().max())
    if not torch.allclose(covariance, covariance.T, rtol=0, atol=1e-6 * size):
        raise ValueError(f"the covariance{space} is not symmetric")
    # Cholesky takes a fraction of the time of eigenvalues, and accepts nearly all
    lifted = covariance + 1e-6 * size * torch.eye(len(covariance), dtype=torch.float64)
    if int(torch.linalg.cholesky_ex(lifted).info):
        values = torch.linalg.eigvalsh(covariance)
        if float(values[0]) < -1e-6 * float(values.abs().max()):
            raise ValueError(
                f"the covariance{space} is not positive semi-definite, its lowest eigenvalue is {float(values[0]):.3g}"
            )
    return torch.from_numpy(mean.astype(np.float64)), covariance


@dataclass(frozen=True)
class ImageJudge:
    """Fréchet distances to a reference in pixels and features, neighbours in features, and what the classifier sees.

    Attributes:
        digest: SHA-256 of the reference.
        quantize: score images as the 8-bit values that a file would hold.
        watched: the cheap scores that steer a run, against one half of the reference where it has halves; the other is
            left for the final `fd_feature_rest`.
        is_fid: the features are Inception's, so that their Fréchet distance may be called FID.
        source: the reference's file or data, and
        features: the network's name, as users know them.
    """

    reference: Reference
    network: nn.Module
    digest: str
    quantize: bool = True
    watched: bool = False
    is_fid: bool = False
    source: str = "the reference"
    features: str = "the feature network"

    def check(self, who: str, shape: tuple[int, ...]) -> None:
        """Can samples of `shape` be scored?

        Raises:
            ValueError: naming `who`, the reference and the feature network.
        """
        found = features.width(self.network, self.features, who, shape)
        wanted = len(self.reference.moments["feature"][0])
        if found != wanted:
            raise ValueError(f"{self.source}: has {wanted} features, the feature network {self.features} gives {found}")
        pixels = self.reference.moments.get("pixel")
        if pixels is not None and len(pixels[0]) != math.prod(shape):
            raise ValueError(
                f"{who}: its samples have shape {shape}, {math.prod(shape)} values; those of the reference "
                f"{self.source} have {len(pixels[0])}"
            )

    def tally(self) -> ImageTally:
        return ImageTally(self)

    def watching(self) -> ImageJudge:
        return dataclasses.replace(self, watched=True)

    def floor(self, samples: int) -> Truth:
        """Fréchet distance of `samples` real images to all of them, as far as the reference has kept their features.

        They are drawn with replacement if all were kept. Of a random part of many, as many are taken, each once; if
        that part is too small, the floor is the reference's own, of `DRAWS` draws.
        """
        reference, kept = self.reference, len(self.reference.rows)
        if not reference.floors or not kept:
            return Truth({}, 0, "unknown, the reference file brings none")
        told = {name: reference.floors[name] for name in ("class_accuracy",) if name in reference.floors}
        by_definition = {"c2st": 0.5, "memorisation_share": 0.01, "memorisation_ratio": 1.0}
        told |= {name: value for name, value in by_definition.items() if name in self.names}
        rng, how = stream(0, "floor", samples), "drawn with replacement from"
        if kept == reference.count:
            rows = torch.randint(kept, (samples,), generator=rng)
        elif samples <= kept:
            rows, how = torch.randperm(kept, generator=rng)[:samples], "of"
        else:
            rows, samples = torch.empty(0), DRAWS
            told["fd_feature"] = reference.floors["fd_feature"]
        if len(rows):
            told["fd_feature"] = frechet_distance(*_moments(reference.rows[rows]), *reference.moments["feature"])
        if self.is_fid:
            told["fid"] = told["fd_feature"]
        note = f"{samples:,} real images, {how} the {reference.count:,} of the reference, against all of them"
        if samples == DRAWS and "fd_pixel" in reference.floors:
            told["fd_pixel"] = reference.floors["fd_pixel"]
        elif "fd_pixel" in reference.floors:
            note += f"; fd_pixel is known for {DRAWS:,} only, {reference.floors['fd_pixel']:.4g}"
        return Truth(told, samples, note)

    def halves(self) -> Truth | None:
        known = {name.removesuffix("_halves"): value for name, value in self.reference.floors.items()
                 if name.endswith("_halves") or name in PRDC._fields}  # fmt: skip
        size = self.reference.count // 2
        note = f"{size:,} real images, a random half of the reference, against the other half"
        return Truth(known, size, note) if known else None

    @property
    def names(self) -> set[str]:
        told = {"fd_feature"}
        if self.is_fid:
            told.add("fid")
        if isinstance(self.network, Classifier):
            told |= {"class_accuracy", "class_balance"}
        if self.answers:
            told.add("inception_score" if self.is_fid else "classifier_score")
        if self.watched:
            return told
        told |= {"fd_feature_infinity", *(f"fd_{name}" for name in self.reference.moments)} - {"fd_feature_half"}
        if len(self.reference.rows):
            told |= {*PRDC._fields, "kid", "c2st", "sliced_wasserstein"}
        if len(self.reference.rows) >= COPIES:
            told |= {"memorisation_ratio", "memorisation_share"}
        return told

    @property
    def answers(self) -> int:
        """Number of classes of which the network tells the chances, 0 if it does not.

        A script gives them in a second call, too dear for scores that are watched.
        """
        kinds = Classifier if self.watched else Classifier | Scripted
        return self.network.classes if isinstance(self.network, kinds) else 0

    def hashes(self) -> dict[str, str]:
        return {"reference": self.digest, "features": self.reference.features}


class ImageTally:
    """The tally of an `ImageJudge`."""

    def __init__(self, judge: ImageJudge) -> None:
        self.judge = judge
        reference = judge.reference.moments
        self.moments = {"feature": Moments(len(reference["feature"][0]))}
        if "pixel" in reference and not judge.watched:
            self.moments["pixel"] = Moments(len(reference["pixel"][0]))
        self.rows = torch.empty(0, len(reference["feature"][0]))
        classes = judge.network.classes if isinstance(judge.network, Classifier) else 0
        self.confusion = torch.zeros(classes, classes, dtype=torch.float64)  # wanted, found
        self.chances = torch.zeros(judge.answers, dtype=torch.float64)
        self.sharpness = torch.zeros((), dtype=torch.float64)
        self.labelled = False

    @torch.no_grad()
    def add(self, x: Tensor, labels: Tensor | None) -> None:
        x = quantize(x) if self.judge.quantize else x
        labels = None if labels is None or labels.ndim == 2 else labels  # contexts are no classes
        network: Any = self.judge.network
        there = x.to(home(network))
        seen = network(there)
        found = seen.cpu()
        if found.ndim != 2 or found.shape[1] != self.rows.shape[1]:
            raise ValueError(
                f"features: the network gives {tuple(found.shape[1:])}, the reference has {self.rows.shape[1]} features"
            )
        self.moments["feature"].update(found)
        if "pixel" in self.moments:
            self.moments["pixel"].update(x.flatten(1))
        self.rows = torch.cat([self.rows, found[: KEPT - len(self.rows)].float()])
        if len(self.chances):
            chance = network.chances(there, seen).double().cpu()
            self.chances += chance.sum(0)
            self.sharpness += torch.special.xlogy(chance, chance).sum()
        if len(self.confusion):
            # without labels the rows say nothing; the column sums still are the classes found
            wanted = torch.zeros(len(x), dtype=torch.long) if labels is None else labels
            if len(wanted) and int(wanted.max()) >= len(self.chances):
                raise ValueError(
                    f"labels: the samples have class {int(wanted.max())}, the feature network knows "
                    f"{len(self.chances)} classes (0 to {len(self.chances) - 1})"
                )
            cells = wanted * len(self.chances) + chance.argmax(1)
            self.confusion += cells.bincount(minlength=self.confusion.numel()).view_as(self.confusion)
            self.labelled = labels is not None

    def tensors(self) -> dict[str, Tensor]:
        state = {"rows": self.rows, "confusion": self.confusion, "chances": self.chances, "sharpness": self.sharpness}
        state["labelled"] = torch.tensor(self.labelled)
        for name, moments in self.moments.items():
            state |= {f"count_{name}": torch.tensor(moments.count), f"mean_{name}": moments.mean}
            state[f"scatter_{name}"] = moments.scatter
        return state

    def merge(self, state: Mapping[str, Tensor]) -> None:
        self.rows = torch.cat([self.rows, state["rows"]])[:KEPT]
        self.confusion = self.confusion + state["confusion"]
        self.chances = self.chances + state["chances"]
        self.sharpness = self.sharpness + state["sharpness"]
        self.labelled = self.labelled or bool(state["labelled"])
        for name, moments in self.moments.items():
            other = Moments(len(moments.mean))
            other.count, other.mean = int(state[f"count_{name}"]), state[f"mean_{name}"]
            other.scatter = state[f"scatter_{name}"]
            moments.merge(other)

    def judgement(self) -> Judgement:
        reference = self.judge.reference
        target = {name: reference.moments[name] for name in self.moments}
        if self.judge.watched and "feature_half" in reference.moments:
            target["feature"] = reference.moments["feature_half"]
        told: Metrics = {
            f"fd_{name}": frechet_distance(m.mean, m.cov, *target[name]) for name, m in self.moments.items()
        }
        details: dict[str, list[float]] = {}
        if len(self.confusion):
            self._classes(told, details)
        if len(self.chances):
            count = self.moments["feature"].count
            mean = self.chances / count
            # exp(E KL(p(y|x) || p(y))), the Inception Score's formula, in one part
            score = float(torch.exp(self.sharpness / count - torch.special.xlogy(mean, mean).sum()))
            told["inception_score" if self.judge.is_fid else "classifier_score"] = score
        if self.judge.is_fid:
            told["fid"] = told["fd_feature"]
        if self.judge.watched:
            return Judgement(told, details=details)
        notes: list[str] = []
        if "feature_rest" in reference.moments:
            seen = self.moments["feature"]
            told["fd_feature_rest"] = frechet_distance(seen.mean, seen.cov, *reference.moments["feature_rest"])
        intervals: dict[str, tuple[float, float]] = {}
        if len(self.rows) < self.moments["feature"].count:
            notes.append(
                f"No bootstrap interval beyond {KEPT:,} samples, as many as are kept: it would be that of fewer, whose "
                "distance is larger; several draws (--draws) show the spread."
            )
        elif self.rows.shape[1] <= BOOTSTRAP:
            limit = bootstrap(lambda rows: frechet_distance(*_moments(rows), *target["feature"]), self.rows, 100)
            intervals["fd_feature"] = (limit.low, limit.high)
            if self.judge.is_fid:
                intervals["fid"] = intervals["fd_feature"]
        else:
            notes.append(
                f"No bootstrap interval beyond {BOOTSTRAP} features ({self.rows.shape[1]:,} here): it would take an "
                "hour; several draws (--draws) show the spread."
            )
        if len(self.rows) >= 20 * self.rows.shape[1]:
            told["fd_feature_infinity"] = frechet_infinity(self.rows, *target["feature"]).estimate
        else:
            notes.append(
                f"No fd_feature_infinity: it needs 20 samples per feature, {20 * self.rows.shape[1]:,} here; "
                f"{len(self.rows):,} were kept (at most {KEPT:,})."
            )
        self._rows(told, notes)
        return Judgement(told, intervals, details, notes)

    def _rows(self, told: Metrics, notes: list[str]) -> None:
        """Scores of the kept rows of features against those of the reference."""
        reference = self.judge.reference
        if min(len(self.rows), len(reference.rows)) > 5:
            told |= precision_recall_density_coverage(reference.rows, self.rows)._asdict()
            size = min(1000, len(self.rows), len(reference.rows))
            told["kid"] = kid(self.rows, reference.rows, subset_size=size).mean
            spread = float(reference.moments["feature"][1].diagonal().mean().sqrt())
            if spread > 0:
                told["sliced_wasserstein"] = sliced_wasserstein(self.rows, reference.rows) / spread
        if min(len(self.rows), len(reference.rows)) >= 100:
            told["c2st"] = c2st(self.rows[:5000], reference.rows[:5000])
        if len(reference.rows) >= COPIES:
            # the real images of one half play the training set, those of the other the held-out part: a model that
            # copies any of them has half its copies among the first
            one, other = reference.rows.tensor_split(2)
            try:
                found = memorisation(self.rows, one, other)
            except ValueError as error:
                notes.append(f"No check for memorisation: {error}.")
            else:
                told |= {f"memorisation_{name}": value for name, value in found._asdict().items()}

    def _classes(self, told: Metrics, details: dict[str, list[float]]) -> None:
        found = self.confusion.sum(0)
        count = found.sum()
        if self.labelled:
            told["class_accuracy"] = float(self.confusion.diagonal().sum() / count)
            details["accuracy_by_class"] = (self.confusion.diagonal() / self.confusion.sum(1)).nan_to_num().tolist()
        told["class_balance"] = float((found / count - 1 / len(found)).abs().sum() / 2)
        details["share_by_class"] = (found / count).tolist()


@dataclass(frozen=True)
class ExactJudge:
    """Log-density, MMD, sliced Wasserstein distance, C2ST and modes against an exact law.

    MMD is the biased V-statistic with the kernel mixture of VarDiU's experiments (arXiv:2508.20646) in units of
    `scale`, or else of the law's sigma_data, against as many fresh samples of the law.

    Samples of a policy are turned back by their contexts, and should be those of its mixture in every context:
    distances are of points with their contexts, in the same units, as further coordinates. Contexts are uniform.
    """

    target: Exact
    seed: int = 0
    name: str = "target"
    scale: float | None = None
    source: str = "that is the reference"

    def tally(self) -> ExactTally:
        return ExactTally(self)

    def watching(self) -> ExactJudge:
        return dataclasses.replace(self, name="watched target")

    def floor(self, samples: int) -> Truth:
        tally, rng = self.tally(), stream(self.seed, "floor")
        contexts = torch.rand(samples, self.target.classes, generator=rng) if self.target.contexts else None
        tally.add(self.target.sample(samples, rng, contexts), contexts)
        return Truth(tally.judgement().metrics, samples, "as many exact samples of the law, scored in the same way")

    def halves(self) -> None:
        return None

    @property
    def names(self) -> set[str]:
        told = {"mmd", "mmd2", "log_mmd2", "sliced_wasserstein", "c2st"}
        law = unturned(self.target)
        if not isinstance(law, Empirical):
            told.add("log_density")
        if isinstance(law, Mixture):
            told |= {"mode_recall", "mode_outside", "mode_spread"}
            told |= {f"share_{k}" for k in range(len(law.weights))}
        return told

    def check(self, who: str, shape: tuple[int, ...]) -> None:
        """As that of an `ImageJudge`."""
        if shape != self.target.shape:
            raise ValueError(
                f"{who}: its samples have shape {shape}, those of the law {self.source} {self.target.shape}"
            )

    def hashes(self) -> dict[str, str]:
        return {"target": artifact.fingerprint(self.target)}


class ExactTally:
    """The tally of an `ExactJudge`: it keeps the samples, which are points."""

    def __init__(self, judge: ExactJudge) -> None:
        self.judge = judge
        self.rows = torch.empty(0, *judge.target.shape, dtype=torch.float64)
        self.contexts = torch.empty(0, judge.target.classes, dtype=torch.float64)

    def add(self, x: Tensor, labels: Tensor | None) -> None:
        x, target = x.double(), self.judge.target
        if isinstance(target, Policy):
            if labels is None or labels.shape != (len(x), target.classes):
                raise ValueError(f"contexts: samples of {self.judge.source} are scored with those they were drawn in")
            x = target.turned(x, labels, -1)
            self.contexts = torch.cat([self.contexts, labels.double()])
        self.rows = torch.cat([self.rows, x])

    def tensors(self) -> dict[str, Tensor]:
        return {"rows": self.rows} | ({"rows of contexts": self.contexts} if self.judge.target.contexts else {})

    def merge(self, state: Mapping[str, Tensor]) -> None:
        self.rows = torch.cat([self.rows, state["rows"]])
        if self.judge.target.contexts:
            self.contexts = torch.cat([self.contexts, state["rows of contexts"]])

    def judgement(self) -> Judgement:
        target, scale = unturned(self.judge.target), self.judge.target.sigma_data
        truth = target.sample(len(self.rows), stream(self.judge.seed, self.judge.name)).flatten(1).double()
        points, flat, unit = self.rows.flatten(1), self.rows.flatten(1), self.judge.scale or scale
        if self.judge.target.contexts:
            others = torch.rand(self.contexts.shape, generator=stream(self.judge.seed, self.judge.name, "contexts"))
            flat, truth = torch.cat([flat, unit * self.contexts], 1), torch.cat([truth, unit * others.double()], 1)
        gap = mmd2(flat, truth, unit)
        told: Metrics = {"mmd": math.sqrt(max(gap, 0.0)), "mmd2": gap, "log_mmd2": math.log(max(gap, 1e-300))}
        told["sliced_wasserstein"] = sliced_wasserstein(flat, truth) / scale
        if min(len(flat), len(truth)) >= 100:
            told["c2st"] = c2st(flat[:5000], truth[:5000])
        if isinstance(target, Empirical):
            return Judgement(told)
        told["log_density"] = float(target.log_prob(self.rows).mean())
        details: dict[str, list[float]] = {}
        if isinstance(target, Mixture):
            modes = mode_statistics(points, target.means.flatten(1), target.stds, weights=target.weights)
            told |= {"mode_recall": modes.recall, "mode_outside": modes.outside}
            if not math.isnan(modes.spread):
                told["mode_spread"] = modes.spread
            told |= {f"share_{k}": float(share) for k, share in enumerate(modes.shares)}
        return Judgement(told, details=details)


def unturned(law: Exact) -> Gaussian | Mixture | Empirical:
    """A policy's law in context 0; any other as it is."""
    return law.mixture if isinstance(law, Policy) else law


def _compact(rows: Tensor) -> Tensor:
    """Rows in half precision, unless some value would overflow there."""
    fits = rows.numel() == 0 or rows.abs().max() <= torch.finfo(torch.float16).max
    return rows.half() if fits else rows


def _moments(values: Tensor) -> tuple[Tensor, Tensor]:
    moments = Moments(values.shape[1])
    for part in values.split(1000):  # whole data sets are too large for copies in float64
        moments.update(part)
    return moments.mean, moments.cov


def bundled_judge(name: str, quantized: bool, device: torch.device = CPU) -> ImageJudge | None:
    """The judge of a bundled data set, None if there is no reference of that name.

    Args:
        device: here as below, where the feature network computes.

    Raises:
        ValueError: if the reference was made with another feature network than the bundled one.
    """
    path = artifact.bundled(f"{name}-reference.npz")
    if not path.is_file():
        return None
    return dataclasses.replace(read_judge(path, name, quantized, device), source=name)


def measured_reference(
    samples: Data, network: str | nn.Module, quantized: bool = True, device: torch.device = CPU
) -> tuple[Reference, nn.Module]:
    """The reference of a data set in a feature network, measured now, and the network.

    Raises:
        ValueError: naming both, if they do not fit; before anything is measured.
    """
    module = features.load(network).to(device)
    if quantized:
        data.check_range(samples)
    features.width(module, features.name(network), samples.name, samples.shape)
    return Reference.measure(samples, module, features.digest(network)), module


def measured_judge(samples: Data, network: str | nn.Module, quantized: bool, device: torch.device = CPU) -> ImageJudge:
    """The judge of a data set in a feature network, measured now."""
    reference, module = measured_reference(samples, network, quantized, device)
    is_fid = is_inception(network, reference)
    return ImageJudge(
        reference, module, samples.fingerprint(), quantized,
        is_fid=is_fid, source=samples.name, features=features.name(network),
    )  # fmt: skip


def read_judge(path: Path, network: str | nn.Module, quantized: bool, device: torch.device = CPU) -> ImageJudge:
    """The judge of a reference file.

    Raises:
        ValueError: if the reference was made with another feature network, naming both.
    """
    reference = Reference.read(path)
    module, digest = features.load(network).to(device), features.digest(network)
    if reference.features and digest != reference.features:
        raise ValueError(
            f"{path}: made with the feature network {reference.features[:12]}, but {features.name(network)} is "
            f"{digest[:12]}"
        )
    reference = dataclasses.replace(reference, features=digest)  # EDM's statistics do not say
    return ImageJudge(
        reference, module, sha256(path), quantized,
        is_fid=is_inception(network, reference), source=str(path), features=features.name(network),
    )  # fmt: skip


def is_inception(network: str | nn.Module, reference: Reference) -> bool:
    """The file that EDM's FID is defined by, inception-2015-12-05, with its 2,048 features."""
    return (
        isinstance(network, str)
        and Path(network).name == "inception-2015-12-05.pt"
        and len(reference.moments["feature"][0]) == 2048
    )
