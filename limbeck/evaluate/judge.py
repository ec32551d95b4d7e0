"""Judges: what a set of samples is scored against. Real images have references, exact laws are their own."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from limbeck import artifact, features
from limbeck.data import Data, open_npz
from limbeck.evaluate.classify import class_accuracy, class_balance
from limbeck.evaluate.draws import quantize
from limbeck.evaluate.frechet import Moments, frechet_distance
from limbeck.evaluate.kernel import mmd2
from limbeck.evaluate.modes import mode_statistics
from limbeck.evaluate.transport import sliced_wasserstein
from limbeck.exact import Empirical, Gaussian, Mixture
from limbeck.files import sha256
from limbeck.randomness import stream

Metrics = dict[str, float]


class Judge(Protocol):
    """Scores samples, and says how good the truth itself would score."""

    def scores(self, x: Tensor, labels: Tensor | None) -> Metrics:
        """Metrics of samples x (n, *shape), asked for with class numbers `labels` (n,)."""
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
        moments: mean and covariance by space ("pixel", "feature").
        floors: distances of the data to themselves by name; see `measure`.
        features: SHA-256 of the feature network.
        count: samples behind the moments.
    """

    moments: dict[str, tuple[Tensor, Tensor]]
    floors: Metrics
    features: str
    count: int

    @classmethod
    def measure(
        cls, data: Data, network: nn.Module, network_hash: str, samples: int = 10_000, seed: int = 0
    ) -> Reference:
        """Reference of `data`, with its floors.

        The floors, for each space: `bootstrap`, the distance of `samples` rows drawn with replacement to the whole set
        (what a perfect sampler of this very set would score); and `halves`, the distance between two random halves.
        """
        spaces = {"pixel": data.x.flatten(1), "feature": features.in_batches(network, data.x)}
        moments, floors = {}, {}
        rng = stream(seed, "reference")
        rows = torch.randint(len(data.x), (samples,), generator=rng)
        order = torch.randperm(len(data.x), generator=rng)
        first, second = order[: len(order) // 2], order[len(order) // 2 :]
        for name, values in spaces.items():
            moments[name] = _moments(values)
            floors[f"fd_{name}"] = frechet_distance(*_moments(values[rows]), *moments[name])
            floors[f"fd_{name}_halves"] = frechet_distance(*_moments(values[first]), *_moments(values[second]))
        if data.y is not None:
            floors["class_accuracy"] = class_accuracy(_classes(network, data.x), data.y)
        return cls(moments, floors, network_hash, len(data.x))

    def save(self, path: Path) -> None:
        """Write as .npz."""
        arrays: dict[str, Any] = {"features_sha256": np.array(self.features), "count": np.array(self.count)}
        for space, (mean, cov) in self.moments.items():
            arrays[f"mean_{space}"], arrays[f"cov_{space}"] = mean.numpy(), cov.numpy()
        for name, value in self.floors.items():
            arrays[f"floor_{name}"] = np.array(value)
        np.savez_compressed(path, **arrays)

    @classmethod
    def read(cls, path: Path) -> Reference:
        """Read what `save` wrote.

        Raises:
            ValueError: if the file is not a reference.
        """
        arrays = open_npz(path)
        try:
            spaces = [key.removeprefix("mean_") for key in arrays if key.startswith("mean_")]
            moments = {s: (torch.from_numpy(arrays[f"mean_{s}"]), torch.from_numpy(arrays[f"cov_{s}"])) for s in spaces}
            floors = {k.removeprefix("floor_"): float(v) for k, v in arrays.items() if k.startswith("floor_")}
            return cls(moments, floors, str(arrays["features_sha256"]), int(arrays["count"]))
        except (KeyError, ValueError, TypeError) as error:
            raise ValueError(f"{path}: not a reference file ({error})") from None


@dataclass(frozen=True)
class ImageJudge:
    """Fréchet distances to a reference in pixels and features, and what the classifier sees."""

    reference: Reference
    network: nn.Module
    reference_hash: str
    quantize: bool = True

    def scores(self, x: Tensor, labels: Tensor | None) -> Metrics:
        x = quantize(x) if self.quantize else x
        spaces = {"pixel": x.flatten(1), "feature": features.in_batches(self.network, x)}
        told = {
            f"fd_{name}": frechet_distance(*_moments(values), *self.reference.moments[name])
            for name, values in spaces.items()
        }
        if labels is not None and isinstance(self.network, features.Classifier):
            predicted = _classes(self.network, x)
            told["class_accuracy"] = class_accuracy(predicted, labels)
            told["class_balance"] = class_balance(predicted, self.network.classes).distance
        return told

    def floor(self, samples: int) -> Metrics:
        return dict(self.reference.floors)

    @property
    def note(self) -> str:
        return (
            f"fd: 10,000 bootstrap draws of the {self.reference.count:,} real images against all of them; fd halves: "
            "two halves of the real set against each other; class accuracy: of the classifier on the real images"
        )

    def hashes(self) -> dict[str, str]:
        return {"reference": self.reference_hash, "features": self.reference.features}


@dataclass(frozen=True)
class ExactJudge:
    """Log-density, MMD, sliced Wasserstein distance and modes against an exact law.

    MMD is the biased V-statistic with the kernel mixture of VarDiU's experiments (arXiv:2508.20646) in units of the
    law's sigma_data, against as many fresh samples of the law.
    """

    target: Gaussian | Mixture | Empirical
    seed: int = 0

    def scores(self, x: Tensor, labels: Tensor | None) -> Metrics:
        return self._against(x, stream(self.seed, "target"))

    def floor(self, samples: int) -> Metrics:
        return self._against(self.target.sample(samples, stream(self.seed, "floor")), stream(self.seed, "target"))

    def _against(self, x: Tensor, rng: torch.Generator) -> Metrics:
        truth = self.target.sample(len(x), rng).flatten(1).double()
        flat, scale = x.flatten(1).double(), self.target.sigma_data
        gap = mmd2(flat, truth, scale)
        told: Metrics = {"mmd": math.sqrt(max(gap, 0.0)), "mmd2": gap, "log_mmd2": math.log(max(gap, 1e-300))}
        told["sliced_wasserstein"] = sliced_wasserstein(flat, truth) / scale
        if isinstance(self.target, Empirical):
            return told
        told["log_density"] = float(self.target.log_prob(x.double()).mean())
        if isinstance(self.target, Mixture):
            modes = mode_statistics(flat, self.target.means.flatten(1), self.target.stds)
            told["mode_recall"] = modes.recall
            told |= {f"share_{k}": float(share) for k, share in enumerate(modes.shares)}
        return told

    @property
    def note(self) -> str:
        return "as many exact samples of the law, scored in the same way"

    def hashes(self) -> dict[str, str]:
        return {}


def _moments(values: Tensor) -> tuple[Tensor, Tensor]:
    moments = Moments(values.shape[1])
    moments.update(values)
    return moments.mean, moments.cov


def _classes(network: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(network, features.Classifier)
    return features.in_batches(network.logits, x).argmax(1)


def bundled_judge(name: str, quantized: bool) -> ImageJudge | None:
    """The judge of a bundled data set, None if there is no reference of that name."""
    path = artifact.bundled(f"{name}-reference.npz")
    if not path.is_file():
        return None
    reference = Reference.read(path)
    weights = artifact.locate(name, "classifier")
    if sha256(weights) != reference.features:
        raise ValueError(f"{path}: made with another feature network than {weights}")
    return ImageJudge(reference, features.load(name), sha256(path), quantized)
