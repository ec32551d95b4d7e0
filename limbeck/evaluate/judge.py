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

from limbeck import artifact, features
from limbeck.data import Data, open_npz
from limbeck.evaluate.bootstrap import bootstrap
from limbeck.evaluate.classify import c2st, class_accuracy
from limbeck.evaluate.draws import quantize
from limbeck.evaluate.frechet import Moments, frechet_distance, frechet_infinity
from limbeck.evaluate.kernel import kid, mmd2
from limbeck.evaluate.modes import mode_statistics
from limbeck.evaluate.neighbours import precision_recall_density_coverage
from limbeck.evaluate.transport import sliced_wasserstein
from limbeck.exact import Empirical, Gaussian, Mixture
from limbeck.features import Classifier
from limbeck.files import sha256, write_atomically
from limbeck.randomness import stream

Metrics = dict[str, float]

KEPT = 10_000  # rows of features that a tally or a reference keeps for the metrics that need samples
WIDEST = 4096  # pixels up to which pixel-space moments are taken: their covariance has the square of that
BOOTSTRAP = 256  # features up to which confidence intervals are computed: beyond, one distance takes seconds


@dataclass(frozen=True)
class Judgement:
    """What a tally found.

    Attributes:
        metrics: one number each.
        intervals: 95% bootstrap intervals (low, high) over the samples, for some of the metrics.
        details: lists, e.g. the accuracy of each class.
    """

    metrics: Metrics
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    details: dict[str, list[float]] = field(default_factory=dict)


class Tally(Protocol):
    """Samples seen so far, as far as the scores need them."""

    def add(self, x: Tensor, labels: Tensor | None) -> None:
        """Take in samples x (n, *shape), asked for with class numbers `labels` (n,) or none."""
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

    def tally(self) -> Tally: ...

    def watching(self) -> Judge:
        """The judge of scores that steer a run (its best checkpoint): it must not see what the final scores see."""
        ...

    def floor(self, samples: int) -> Metrics:
        """Metrics of as many samples of the truth."""
        ...

    @property
    def note(self) -> str:
        """What the floor is, in words."""
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
    def measure(
        cls, data: Data, network: nn.Module, network_hash: str, samples: int = 10_000, seed: int = 0
    ) -> Reference:
        """Reference of `data`, with its floors.

        The floors, for each space: the distance of `samples` rows drawn with replacement to the whole set (what a
        perfect sampler of this very set would score); and `halves`, the distance between two random halves.

        Raises:
            ValueError: for fewer than 4 samples, of which no two halves have a covariance.
        """
        if len(data.x) < 4:
            raise ValueError(f"{data.name}: a reference needs at least 4 samples, got {len(data.x)}")
        spaces = {"feature": features.in_batches(network, data.x)}
        if data.x[0].numel() <= WIDEST:
            spaces["pixel"] = data.x.flatten(1)
        moments: dict[str, tuple[Tensor, Tensor]] = {}
        floors: Metrics = {}
        rng = stream(seed, "reference")
        drawn = torch.randint(len(data.x), (samples,), generator=rng)
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
    return torch.from_numpy(mean.astype(np.float64)), torch.from_numpy(cov.astype(np.float64))


@dataclass(frozen=True)
class ImageJudge:
    """Fréchet distances to a reference in pixels and features, neighbours in features, and what the classifier sees.

    Attributes:
        digest: SHA-256 of the reference.
        quantize: score images as the 8-bit values that a file would hold.
        watched: the cheap scores that steer a run, against one half of the reference where it has halves; the other is
            left for the final `fd_feature_rest`.
        is_fid: the features are Inception's, so that their Fréchet distance may be called FID.
    """

    reference: Reference
    network: nn.Module
    digest: str
    quantize: bool = True
    watched: bool = False
    is_fid: bool = False

    def tally(self) -> ImageTally:
        return ImageTally(self)

    def watching(self) -> ImageJudge:
        return dataclasses.replace(self, watched=True)

    def floor(self, samples: int) -> Metrics:
        return dict(self.reference.floors)

    @property
    def note(self) -> str:
        if not self.reference.floors:
            return "unknown, the reference file brings none"
        return (
            f"Fréchet distances: 10,000 bootstrap draws of the {self.reference.count:,} real images against all of "
            "them; halves, precision, recall, density, coverage: two random halves of the real images against each "
            "other; class accuracy: of the classifier on the real images"
        )

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
        self.chances = torch.zeros(classes, dtype=torch.float64)
        self.sharpness = torch.zeros((), dtype=torch.float64)
        self.labelled = False

    @torch.no_grad()
    def add(self, x: Tensor, labels: Tensor | None) -> None:
        x = quantize(x) if self.judge.quantize else x
        found = self.judge.network(x)
        if found.ndim != 2 or found.shape[1] != self.rows.shape[1]:
            raise ValueError(
                f"features: the network gives {tuple(found.shape[1:])}, the reference has {self.rows.shape[1]} features"
            )
        self.moments["feature"].update(found)
        if "pixel" in self.moments:
            self.moments["pixel"].update(x.flatten(1))
        self.rows = torch.cat([self.rows, found[: KEPT - len(self.rows)].float()])
        if isinstance(self.judge.network, Classifier):
            chance = torch.softmax(self.judge.network.head(found).double(), 1)
            self.chances += chance.sum(0)
            self.sharpness += torch.special.xlogy(chance, chance).sum()
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
        if self.confusion.numel():
            self._classes(told, details)
        if self.judge.is_fid:
            told["fid"] = told["fd_feature"]
        if self.judge.watched:
            return Judgement(told, details=details)
        if "feature_rest" in reference.moments:
            seen = self.moments["feature"]
            told["fd_feature_rest"] = frechet_distance(seen.mean, seen.cov, *reference.moments["feature_rest"])
        intervals: dict[str, tuple[float, float]] = {}
        if self.rows.shape[1] <= BOOTSTRAP:
            limit = bootstrap(lambda rows: frechet_distance(*_moments(rows), *target["feature"]), self.rows, 100)
            intervals["fd_feature"] = (limit.low, limit.high)
        if len(self.rows) >= 20 * self.rows.shape[1]:
            told["fd_feature_infinity"] = frechet_infinity(self.rows, *target["feature"]).estimate
        if min(len(self.rows), len(reference.rows)) > 5:
            told |= precision_recall_density_coverage(reference.rows, self.rows)._asdict()
            size = min(1000, len(self.rows), len(reference.rows))
            told["kid"] = kid(self.rows, reference.rows, subset_size=size).mean
        if min(len(self.rows), len(reference.rows)) >= 100:
            told["c2st"] = c2st(self.rows[:5000], reference.rows[:5000])
        return Judgement(told, intervals, details)

    def _classes(self, told: Metrics, details: dict[str, list[float]]) -> None:
        found = self.confusion.sum(0)
        count = found.sum()
        if self.labelled:
            told["class_accuracy"] = float(self.confusion.diagonal().sum() / count)
            details["accuracy_by_class"] = (self.confusion.diagonal() / self.confusion.sum(1)).nan_to_num().tolist()
        told["class_balance"] = float((found / count - 1 / len(found)).abs().sum() / 2)
        details["share_by_class"] = (found / count).tolist()
        mean = self.chances / count
        # exp(E KL(p(y|x) || p(y))), the Inception Score's formula on this classifier, in one part
        told["classifier_score"] = float(torch.exp(self.sharpness / count - torch.special.xlogy(mean, mean).sum()))


@dataclass(frozen=True)
class ExactJudge:
    """Log-density, MMD, sliced Wasserstein distance, C2ST and modes against an exact law.

    MMD is the biased V-statistic with the kernel mixture of VarDiU's experiments (arXiv:2508.20646) in units of
    `scale`, or else of the law's sigma_data, against as many fresh samples of the law.
    """

    target: Gaussian | Mixture | Empirical
    seed: int = 0
    name: str = "target"
    scale: float | None = None

    def tally(self) -> ExactTally:
        return ExactTally(self)

    def watching(self) -> ExactJudge:
        return dataclasses.replace(self, name="watched target")

    def floor(self, samples: int) -> Metrics:
        tally = self.tally()
        tally.add(self.target.sample(samples, stream(self.seed, "floor")), None)
        return tally.judgement().metrics

    @property
    def note(self) -> str:
        return "as many exact samples of the law, scored in the same way"

    def hashes(self) -> dict[str, str]:
        return {"target": artifact.fingerprint(self.target)}


class ExactTally:
    """The tally of an `ExactJudge`: it keeps the samples, which are points."""

    def __init__(self, judge: ExactJudge) -> None:
        self.judge = judge
        self.rows = torch.empty(0, *judge.target.shape, dtype=torch.float64)

    def add(self, x: Tensor, labels: Tensor | None) -> None:
        self.rows = torch.cat([self.rows, x.double()])

    def tensors(self) -> dict[str, Tensor]:
        return {"rows": self.rows}

    def merge(self, state: Mapping[str, Tensor]) -> None:
        self.rows = torch.cat([self.rows, state["rows"]])

    def judgement(self) -> Judgement:
        target, scale = self.judge.target, self.judge.target.sigma_data
        truth = target.sample(len(self.rows), stream(self.judge.seed, self.judge.name)).flatten(1).double()
        flat = self.rows.flatten(1)
        gap = mmd2(flat, truth, self.judge.scale or scale)
        told: Metrics = {"mmd": math.sqrt(max(gap, 0.0)), "mmd2": gap, "log_mmd2": math.log(max(gap, 1e-300))}
        told["sliced_wasserstein"] = sliced_wasserstein(flat, truth) / scale
        if min(len(flat), len(truth)) >= 100:
            told["c2st"] = c2st(flat[:5000], truth[:5000])
        if isinstance(target, Empirical):
            return Judgement(told)
        told["log_density"] = float(target.log_prob(self.rows).mean())
        details: dict[str, list[float]] = {}
        if isinstance(target, Mixture):
            modes = mode_statistics(flat, target.means.flatten(1), target.stds, weights=target.weights)
            told["mode_recall"] = modes.recall
            told |= {f"share_{k}": float(share) for k, share in enumerate(modes.shares)}
        return Judgement(told, details=details)


def _compact(rows: Tensor) -> Tensor:
    """Rows in half precision, unless some value would overflow there."""
    fits = rows.numel() == 0 or rows.abs().max() <= torch.finfo(torch.float16).max
    return rows.half() if fits else rows


def _moments(values: Tensor) -> tuple[Tensor, Tensor]:
    moments = Moments(values.shape[1])
    for part in values.split(KEPT):  # whole data sets are too large for copies in float64
        moments.update(part)
    return moments.mean, moments.cov


def bundled_judge(name: str, quantized: bool) -> ImageJudge | None:
    """The judge of a bundled data set, None if there is no reference of that name.

    Raises:
        ValueError: if the reference was made with another feature network than the bundled one.
    """
    path = artifact.bundled(f"{name}-reference.npz")
    if not path.is_file():
        return None
    return read_judge(path, name, quantized)


def read_judge(path: Path, network: str, quantized: bool) -> ImageJudge:
    """The judge of a reference file.

    Raises:
        ValueError: if the reference was made with another feature network, naming both.
    """
    reference = Reference.read(path)
    module, digest = features.load(network), features.digest(network)
    if reference.features and digest != reference.features:
        raise ValueError(
            f"{path}: made with the feature network {reference.features[:12]}, but {network} is {digest[:12]}"
        )
    reference = dataclasses.replace(reference, features=digest)  # EDM's statistics do not say
    return ImageJudge(reference, module, sha256(path), quantized, is_fid=is_inception(network, reference))


def is_inception(network: str, reference: Reference) -> bool:
    """The file that EDM's FID is defined by, inception-2015-12-05, with its 2,048 features."""
    return Path(network).name == "inception-2015-12-05.pt" and len(reference.moments["feature"][0]) == 2048
