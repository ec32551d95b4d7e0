"""What is wrong with a teacher, found without data: before its mistakes become a student's.

Let x_0 be the denoiser's own samples and y = x_0 + sigma eps. If D(y; sigma) = E[x_0 | y], then at every level

    mean |x_0 - D|^2 <= sigma^2 d                    the identity is a denoiser too,
    mean |x_0 - D|^2 <= that of the best linear filter, v sigma^2 / (v + sigma^2) d,
    E <x_0 - D, g(y)> = 0 for every g                (Tweedie: the error is orthogonal to what is known),
    D(y; s sigma) is worst for no s but best for s = 1,

so D -> x at small sigma and D -> mean at large. A wrong convention breaks these by factors, a network that is merely
small or briefly trained by some percent; the limits lie between. The law that the samples show is looked at as well:
its range, spread, scale and dependence on labels.

To name a mistake of convention, the raw network is read in other ways (preconditionings, outputs, schedules, times).
If the teacher fails and one other reading passes, that reading names the mistake. What cannot be seen without data: a
law that is consistent but not the user's, e.g. with permuted colour channels.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from limbeck import artifact
from limbeck.denoiser import Denoiser, Output, Preconditioned, Rescaled
from limbeck.exact import Exact, Gaussian
from limbeck.noise import Karras
from limbeck.randomness import stream
from limbeck.sample import default_levels, heun
from limbeck.schedule import VP, Alphas, Cosine, Flow, Schedule
from limbeck.source import one_hot

# Limits on effects, beside the noise of their measurement.
IDENTITY = 0.25  # how far mean |x_0 - D|^2 may exceed sigma^2 d ...
LINEAR = 0.1  # ... and that of the best linear filter
FAR = 0.5  # the same at levels that EDM's training law hardly visits, where good small networks are 1.25 times worse
TWEEDIE = 0.12  # largest cosine between the error and the input
OFFSET = 0.5  # largest share of the error that is one constant
CALIBRATION = 0.15  # what another level may gain over the right one
SCALES = (0.6, 1.7)  # the other levels

QUICK = 30.0  # seconds of the look before a distillation
LEAST = 130  # calls for one sample that the coarsest look makes, at most

OUTPUTS: tuple[Output, ...] = ("eps", "v", "x0", "flow")


@dataclass(frozen=True)
class Level:
    """What was measured at one noise level.

    Attributes:
        identity: mean |x_0 - D|^2 / (sigma^2 d).
        linear: the same over that of the best linear filter.
        tweedie: cosine between error and input.
        offset: mean of the error over its root mean square.
        calibration: the least mean |x_0 - D(y; s sigma)|^2 over s, relative to s = 1.
        scale: that s.
        excess: each bound's excess over its limit, in limits: above 1 it is broken.
    """

    sigma: float
    identity: float
    linear: float
    tweedie: float
    offset: float
    calibration: float
    scale: float
    excess: dict[str, float]

    @property
    def broken(self) -> list[str]:
        return [name for name, value in self.excess.items() if not value <= 1]


@dataclass(frozen=True)
class Finding:
    """One fault: the check's name, and a line that says the likely mistake."""

    check: str
    verdict: str


@dataclass(frozen=True)
class Diagnosis:
    """What the doctor found. `findings` is empty for a healthy teacher."""

    findings: tuple[Finding, ...]
    levels: tuple[Level, ...]
    facts: dict[str, float]
    samples: Tensor

    def lines(self) -> list[str]:
        """The verdicts, and what they rest on, for people."""
        told = [f"{finding.check}: {finding.verdict}" for finding in self.findings] or ["healthy"]
        if self.facts:
            told.append("own samples: " + ", ".join(f"{name} {value:.4g}" for name, value in self.facts.items()))
        told += [
            f"sigma {v.sigma:9.4g}  error / sigma^2 {v.identity:8.3g}  / linear filter {v.linear:8.3g}  "
            f"cosine {v.tweedie:6.2f}  calibration {v.calibration:6.3f}  {' '.join(v.broken)}".rstrip()
            for v in self.levels
        ]
        return told

    def table(self) -> dict[str, Any]:
        """Everything but the samples, as JSON-able values."""
        return {
            "healthy": not self.findings,
            "findings": [asdict(finding) for finding in self.findings],
            "facts": self.facts,
            "levels": [asdict(level) for level in self.levels],
        }


@dataclass(frozen=True)
class Effort:
    """How much is spent on one look: samples, Heun steps for each, noise levels, and other levels told at each."""

    samples: int
    steps: int = 18
    levels: int = 11
    scales: tuple[float, ...] = SCALES

    @property
    def calls(self) -> int:
        """Network calls for one sample, at most."""
        return 2 * self.steps - 1 + self.levels * (1 + len(self.scales))

    @classmethod
    def within(cls, denoiser: Denoiser, seconds: float) -> Effort:
        """64 samples, more and finer ones in few dimensions; fewer where time allows no more, then coarser ones."""
        wanted = min(1024, max(64, 8192 // math.prod(denoiser.shape)))
        steps = cls.steps if len(denoiser.shape) == 3 else 2 * cls.steps
        budget = seconds / _pace(denoiser)  # calls for one sample
        fine, coarse = cls(wanted, steps), cls(16, 8, 5, ())
        if budget >= 16 * fine.calls:
            return replace(fine, samples=min(wanted, int(budget / fine.calls)))
        return replace(coarse, samples=min(16, max(4, int(budget / coarse.calls))))

    def law(self, denoiser: Denoiser) -> Karras:
        """The denoiser's sampling levels; without their ends, if few steps would be lost there."""
        law = default_levels(denoiser)
        if self.steps >= Effort.steps:
            return law
        return Karras(max(law.sigma_min, 0.01 * denoiser.unit), min(law.sigma_max, 20 * denoiser.unit), law.rho)


def _pace(denoiser: Denoiser) -> float:
    """Seconds that one call takes for one sample of a small batch."""
    x, level, cond = torch.zeros(4, *denoiser.shape), torch.ones(4) * denoiser.unit, _labels(denoiser, 4)
    denoiser(x[:1], level[:1], None if cond is None else cond[:1])  # a first call is slow
    began = time.perf_counter()
    denoiser(x, level, cond)
    return max(1e-9, (time.perf_counter() - began) / 4)


def preflight(teacher: Denoiser, cache: Path, fingerprint: str, tell: Callable[[str], None]) -> str | None:
    """The quick form before a distillation: faults are told as warnings.

    A teacher that `cache` knows is not examined again, and an exact law, which is right by construction, never is. Of a
    network too slow for the coarsest look in half a minute it is only asked whether its outputs are finite.

    Returns:
        What `cache` should hold, or None if it stays as it is.

    Raises:
        ValueError: if outputs are not finite.
    """
    if isinstance(teacher, Exact):
        return None
    # the weights, and how they are read: a corrected card is another teacher
    key = hashlib.sha256(f"{fingerprint} {artifact.reading(teacher)}".encode()).hexdigest()
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        if json.loads(cache.read_text())["teacher"] == key:
            return None
    with torch.no_grad():
        pace = _pace(teacher.eval())
        if pace * LEAST > QUICK:
            law = default_levels(teacher)
            top = _largest_finite(teacher, law, seed=0)
            if top < law.sigma_max:
                raise ValueError(f"teacher: NaN or Inf above sigma {top:.3g}")
            tell(f"teacher: {pace:.2g} s a call, looked at for NaN and Inf only; for more: `limbeck doctor TEACHER`")
            return json.dumps({"teacher": key, "levels": []}, indent=1) + "\n"
    table = examine(teacher, QUICK).table()
    for finding in table["findings"]:
        if finding["check"] == "finite" or not table["levels"]:
            raise ValueError(f"teacher: {finding['verdict']}")
        tell(f"warning: teacher: {finding['check']}: {finding['verdict']}")
    return json.dumps({"teacher": key, **table}, indent=1) + "\n"


@torch.no_grad()
def examine(teacher: Denoiser, seconds: float = QUICK, seed: int = 0) -> Diagnosis:
    """Look for faults of a denoiser, on its own samples.

    Args:
        seconds: about the longest that it may take: a third for the samples, the rest, if there is a fault, to read the
            network in other ways.
    """
    teacher = teacher.eval()
    effort = Effort.within(teacher, seconds / 3)
    law, whole = effort.law(teacher), default_levels(teacher)
    top = _largest_finite(teacher, whole, seed)
    found: list[Finding] = []
    if top < whole.sigma_max:
        found.append(Finding("finite", f"NaN or Inf above sigma {top:.3g}"))
    usable = top > 1.5 * law.sigma_min
    samples, levels = (
        _measure(teacher, effort, Karras(law.sigma_min, min(law.sigma_max, top), law.rho), seed)
        if usable
        else (None, ())
    )
    patience = 2 * seconds / 3
    if samples is None or not torch.isfinite(samples).all():
        cure, _ = _cure(teacher, effort, patience, seed)
        finding = Finding("convention", cure) if cure else Finding("finite", "NaN or Inf at every noise level")
        return Diagnosis((finding,), (), {}, torch.zeros(0, *teacher.shape))
    facts = {"nfe": 2.0 * effort.steps - 1, **_facts(samples)}
    if _silent(teacher):
        found.append(Finding("untrained", "the network's output is 0 everywhere: untrained weights?"))
    elif any(level.broken for level in levels):
        cure, complete = _cure(teacher, effort, patience, seed)
        found.append(Finding("convention", cure) if cure else _symptom(teacher, levels, facts, samples, complete))
    else:
        found += _law(teacher, levels, facts, samples)
    found += _range(teacher, facts, min(16, len(samples))) if not found else []
    found += _label_effect(teacher, samples, facts, seed) if not found else []
    return Diagnosis(tuple(found), tuple(levels), facts, samples)


def _labels(denoiser: Denoiser, n: int, shift: int = 0) -> Tensor | None:
    return one_hot((torch.arange(n) + shift) % denoiser.classes, denoiser.classes) if denoiser.classes else None


def _largest_finite(teacher: Denoiser, law: Karras, seed: int) -> float:
    """The largest level up to which outputs on pure noise are finite; 0 if there is none."""
    z = torch.randn(1, *teacher.shape, generator=stream(seed, "doctor", "finite"))

    def finite(sigma: float) -> bool:
        out = teacher(sigma * z, torch.full((1,), sigma), _labels(teacher, 1))
        return bool(torch.isfinite(out).all())

    grid = torch.logspace(math.log10(law.sigma_min), math.log10(law.sigma_max), 12).tolist()
    bad = next((k for k, sigma in enumerate(grid) if not finite(sigma)), None)
    if bad is None:
        return law.sigma_max
    if bad == 0:
        return 0.0
    low, high = grid[bad - 1], grid[bad]
    for _ in range(6):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if finite(middle) else (low, middle)
    return low


def _measure(denoiser: Denoiser, effort: Effort, law: Karras, seed: int) -> tuple[Tensor, tuple[Level, ...]]:
    """Own samples (n, *shape), and what they say at every level."""
    n, rng = effort.samples, stream(seed, "doctor", "samples")
    cond = _labels(denoiser, n)
    x0 = heun(denoiser, torch.randn(n, *denoiser.shape, generator=rng), effort.steps, law, cond)
    scale = float(x0.double().pow(2).mean().sqrt())
    mean = x0.mean(0)
    variance = float((x0 - mean).double().pow(2).mean()) * n / (n - 1) + 1e-30
    grid = torch.logspace(math.log10(law.sigma_min), math.log10(law.sigma_max), effort.levels).tolist()
    return x0, tuple(
        _level(denoiser, x0, mean, variance, sigma, cond, rng, effort.scales, sigma < 3 * scale) for sigma in grid
    )


def _level(
    denoiser: Denoiser,
    x0: Tensor,
    mean: Tensor,
    variance: float,
    sigma: float,
    cond: Tensor | None,
    rng: torch.Generator,
    scales: Sequence[float],
    near: bool,
) -> Level:
    """One level. Differences are taken on equal noise, so that their errors are small where the truth is healthy.

    Unless `near`, sigma is so large that the error is the spread of the data and its direction that of few modes:
    neither direction nor calibration is judged, and the calls of `scales` go to more noise instead.
    """
    n = len(x0)

    def estimate(y: Tensor, level: float) -> Tensor:
        return denoiser(y, torch.full((n,), level), cond)

    def squares(error: Tensor) -> Tensor:
        return error.double().flatten(1).pow(2).mean(1)

    noises = [sigma * torch.randn(x0.shape, generator=rng) for _ in range(1 if near else 1 + len(scales))]
    scales = scales if near else ()
    outs = [estimate(x0 + noise, sigma) for noise in noises]
    mse = torch.cat([squares(x0 - out) for out in outs])
    plain = torch.cat([squares(noise) for noise in noises])
    gain = variance / (variance + sigma**2)
    # the samples' own mean is nearer to them than the true one, by 1 / n of the variance
    fair = 1 + (1 - gain) ** 2 * variance / (n - 1) / (gain * sigma**2)
    linear = torch.cat([squares(x0 - mean - gain * (x0 + noise - mean)) for noise in noises]) * fair
    error, gap = (x0 - outs[0]).double().flatten(1), (x0 + noises[0] - mean).double().flatten(1)
    products, offsets = (error * gap).mean(1), error.mean(1)
    total = max(float(mse.mean()), 1e-30)
    norm = math.sqrt(float(error.pow(2).mean() * gap.pow(2).mean())) + 1e-30
    size = float(error.pow(2).mean().sqrt()) + 1e-30
    others = {s: squares(x0 - estimate(x0 + noises[0], s * sigma)) for s in scales}
    best = min(others, key=lambda s: float(others[s].mean())) if others else 1.0
    gained = mse - others[best] if others else torch.zeros(n, dtype=torch.float64)

    def excess(values: Tensor, unit: float, limit: float, errors: float) -> float:
        """The mean over its limit, to which so many standard errors of the mean are added, more if there are few."""
        unit = max(unit, 1e-30)
        noise = (1 + 8 / n) * float(values.std()) / unit / math.sqrt(len(values))
        return float(values.mean()) / unit / (limit + errors * noise)

    found = {
        "identity": excess(mse - plain, float(plain.mean()), IDENTITY, 3),
        "linear": excess(mse - linear, float(linear.mean()), (LINEAR if near else FAR) + 1 / n, 1),
        "offset": abs(excess(offsets, size, OFFSET, 3)),
    }
    if near:
        found["tweedie"] = abs(excess(products, norm, TWEEDIE, 2))
    if scales:
        found["calibration"] = excess(gained, total, CALIBRATION, 3)
    return Level(
        sigma=sigma,
        identity=total / float(plain.mean()),
        linear=total / max(float(linear.mean()), 1e-30),
        tweedie=float(products.mean()) / norm,
        offset=float(offsets.mean()) / size,
        calibration=float(others[best].mean()) / total if others else 1.0,
        scale=best,
        excess=found,
    )


def _facts(samples: Tensor) -> dict[str, float]:
    x = samples.double()
    return {
        "samples": float(len(x)),
        "mean": float(x.mean()),
        "rms": float(x.pow(2).mean().sqrt()) + 1e-30,
        "std": float((x - x.mean(0)).pow(2).mean().sqrt()),
        "min": float(x.min()),
        "max": float(x.max()),
    }


def _law(teacher: Denoiser, levels: Sequence[Level], facts: dict[str, float], samples: Tensor) -> list[Finding]:
    """Faults of a teacher that is a consistent denoiser, of a law that can hardly be meant."""
    image = len(teacher.shape) == 3
    known = isinstance(teacher, Exact)
    spread = facts["std"] / facts["rms"]
    linear = all(abs(level.linear - 1) < 0.08 for level in levels)
    limit = 0.6 if linear and image else 0.25 if image else 0.1
    if spread < limit and not isinstance(teacher, Gaussian) and (image or not known):
        return [
            Finding(
                "diversity",
                f"the samples are all alike (they vary by {facts['std']:.2g} around their mean, at a scale of "
                f"{facts['rms']:.2g}): one mode, or collapsed weights?",
            )
        ]
    outside = float(((samples < -0.1) | (samples > 1.1)).double().mean())
    if image and outside < 0.03 and facts["mean"] > 0.25:
        return [Finding("range", f"the samples lie in [0, 1] (mean {facts['mean']:.2g}): images are in [-1, 1] here")]
    if image and teacher.shape[0] in (1, 3) and float((samples.abs() > 1.2).double().mean()) > 0.1:
        wide = f"the samples reach from {facts['min']:.2g} to {facts['max']:.2g}"
        return [Finding("range", f"{wide}: images are in [-1, 1] here; bytes, or a sigma_data that is too large?")]
    ratio = facts["rms"] / teacher.sigma_data
    if not 0.4 < ratio < 2.5:
        text = f"sigma_data is given as {teacher.sigma_data:.3g}, the samples have a root mean square of"
        return [Finding("sigma_data", f"{text} {facts['rms']:.3g}")]
    return []


def _range(teacher: Denoiser, facts: dict[str, float], count: int) -> list[Finding]:
    deaf = _deaf_above(teacher, facts, count)
    if deaf is not None:
        line = f"above sigma {deaf:.3g} the output does not depend on sigma: trained only on lower levels?"
        return [Finding("sigma range", line)]
    if teacher.sigma_max < 8 * facts["rms"]:
        line = f"sigma_max {teacher.sigma_max:.3g} is too low for data of scale {facts['rms']:.2g}: noise is not pure"
        return [Finding("sigma range", line)]
    if teacher.sigma_min > 0.2 * facts["std"]:
        line = f"sigma_min {teacher.sigma_min:.3g} is too high for data that vary by {facts['std']:.2g}: noise is left"
        return [Finding("sigma range", line)]
    return []


def _deaf_above(teacher: Denoiser, facts: dict[str, float], count: int) -> float | None:
    """The level from which on D(y; sigma) is the same function of `count` y, and no constant; None if there is none.

    Of pure noise a true denoiser says less, the higher the level that it is told.
    """
    high = default_levels(teacher).sigma_max
    y = high * torch.randn(count, *teacher.shape, generator=stream(0, "doctor", "deaf"))

    def said(level: float) -> Tensor:
        return teacher(y, torch.full((len(y),), level), _labels(teacher, len(y)))

    last = said(high)
    varied = float((last - last.mean(0)).pow(2).mean().sqrt())
    if not varied > 0.01 * facts["std"]:
        return None
    deaf = None
    while high > facts["rms"] and float((said(high / 1.1) - last).pow(2).mean().sqrt()) < 1e-4 * varied:
        deaf = high = high / 1.1
    return deaf


def _label_effect(teacher: Denoiser, samples: Tensor, facts: dict[str, float], seed: int) -> list[Finding]:
    """Does D change with the class? Asked where noise begins to hide the class, and where it does."""
    if teacher.classes < 2:
        return []
    effect = 0.0
    for factor in (1.0, 3.0, 10.0):
        sigma = factor * facts["rms"]
        y = samples + sigma * torch.randn(samples.shape, generator=stream(seed, "doctor", "labels", int(factor)))
        level = torch.full((len(y),), sigma)
        a, b = (teacher(y, level, _labels(teacher, len(y), shift)) for shift in (0, 1))
        effect = max(effect, float((a - b).pow(2).mean().sqrt()) / facts["std"])
    if effect < 0.01:
        return [Finding("labels", f"the class changes the output by {effect:.1e} of the data's spread: labels unused?")]
    return []


def _silent(teacher: Denoiser) -> bool:
    """Is the raw network's output 0, as that of a fresh network with a zero last layer?"""
    network = _raw(teacher)
    if network is None:
        return False
    x = torch.randn(4, *teacher.shape, generator=stream(0, "doctor", "silent"))
    try:
        out = network(x, torch.full((4,), 0.1), _labels(teacher, 4))
        return not bool(out.abs().max() > 1e-6)
    except Exception:  # a network of another denoiser's, called in another way
        return False


def _symptom(
    teacher: Denoiser, levels: Sequence[Level], facts: dict[str, float], samples: Tensor, complete: bool
) -> Finding:
    """The likely mistake of a teacher that no other reading cures, by which bounds break where.

    `complete`: its network was read in all ways.
    """
    rms, lowest = facts["rms"], levels[0].sigma
    if "identity" in levels[0].broken and lowest < 0.1 * rms:
        cond = _labels(teacher, len(samples))

        def moved(level: float) -> Tensor:
            return (teacher(samples, torch.full((len(samples),), level), cond) - samples).double()

        y, shift = samples.double(), moved(lowest)
        power = float(shift.pow(2).mean())
        offset, gain = float(shift.mean()), float((shift * y).mean() / y.pow(2).mean())
        if offset**2 > 0.8 * power:
            return Finding("bias", f"D(x) is x {offset:+.3g} at small sigma: a constant is added to the output")
        if (gain * rms) ** 2 > 0.8 * power and abs(gain) < 0.5:
            return Finding("gain", f"D(x) is {1 + gain:.4g} x at small sigma: the output is scaled by a factor")
        if float((moved(1.5 * lowest) - shift).pow(2).mean()) < 1e-4 * power:
            same = [v.sigma for v in levels if float((moved(v.sigma) - shift).pow(2).mean()) < 1e-4 * power]
            line = f"up to sigma {max(same):.2g} the output does not depend on sigma: trained only on higher levels?"
            return Finding("sigma range", line)
    bad = [level.sigma for level in levels if level.broken]
    good = [level.sigma for level in levels if not level.broken]
    if good and min(bad) > max(good) and min(bad) > rms:
        line = f"above sigma {max(good):.3g} it is worse than a constant guess: trained only on lower levels?"
        return Finding("sigma range", line)
    if good and max(bad) < min(good) and max(bad) < rms:
        line = f"below sigma {min(good):.3g} it is worse than no denoising: trained only on higher levels?"
        return Finding("sigma range", line)
    if complete and min(level.linear for level in levels) > 0.9:
        line = "no reading of the network denoises: untrained or random weights, or a convention not known here?"
        return Finding("untrained", line)
    worst = max(level.identity for level in levels)
    if worst > 3 or not 0.33 < rms / teacher.sigma_data < 3:
        line = (
            f"no denoiser in these conventions (samples of scale {rms:.2g}, error up to {worst:.2g} sigma^2): VP, VE "
            "or EDM, eps, v or x0, or the direction of time mixed up?"
        )
        return Finding("convention", line)
    if min(level.linear for level in levels) > 0.9:
        return Finding("untrained", "it denoises no better than a linear filter: untrained or random weights?")
    scales = [level.scale for level in levels if "calibration" in level.broken]
    if scales:
        line = (
            f"it denoises better when told {scales[len(scales) // 2]:g} sigma: sigma_data or the noise input is wrong"
        )
        return Finding("calibration", line)
    return Finding(
        "consistency", "its estimates do not fit its own samples: poorly trained, or parts of it not loaded?"
    )


# Other readings of the raw network


class _Called(nn.Module):
    """A network called at another time, or with the sign of its output turned."""

    def __init__(self, network: nn.Module, at: Callable[[Tensor], Tensor] | None = None, sign: float = 1.0) -> None:
        super().__init__()
        self.network, self.at, self.sign = network, at, sign

    def forward(self, x: Tensor, noise: Tensor, cond: Tensor | None = None) -> Tensor:
        out: Tensor = self.sign * self.network(x, noise if self.at is None else self.at(noise), cond)
        return out


class _VE(Schedule):
    """x_t = x_0 + t eps."""

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def time(self, ratio: Tensor) -> Tensor:
        return ratio


def _raw(teacher: Denoiser) -> nn.Module | None:
    network = getattr(teacher, "network", getattr(teacher, "model", None))
    return network if isinstance(network, nn.Module) else None


Reading = tuple[str, Denoiser]  # the mistake that a reading would mean, and the denoiser that it makes of the network


def _readings(teacher: Denoiser) -> Iterator[Reading]:
    """Other ways to read the teacher's raw network, likely mistakes first."""
    network = _raw(teacher)
    if network is None:
        return
    if isinstance(teacher, Preconditioned):
        yield from _edm_mistakes(teacher, network)
    if isinstance(teacher, Rescaled):
        yield from _discrete_mistakes(teacher, network)
    yield from _other_families(teacher, network)


def _edm(teacher: Denoiser, network: nn.Module, sigma_data: float, unit: float) -> Denoiser:
    return Preconditioned(network, teacher.shape, teacher.classes, sigma_data, noise_unit=unit)


def _rescaled(teacher: Denoiser, network: nn.Module, schedule: Schedule, output: Output) -> Denoiser:
    low, high = schedule.ratios if isinstance(schedule, Alphas) else (0.0, math.inf)
    return Rescaled(network, schedule, output, teacher.shape, teacher.classes, teacher.sigma_data, low, high)


def _times(network: nn.Module, factor: float) -> nn.Module:
    return network if factor == 1 else _Called(network, lambda t: factor * t)


def _around(centre: float) -> list[float]:
    """Values from a third to three times `centre`, near ones first; of factors 2^(1/5) one is near enough to pass."""
    return sorted((centre * 2 ** (k / 5) for k in range(-8, 9)), key=lambda value: abs(math.log(value / centre)))


def _edm_mistakes(teacher: Preconditioned, network: nn.Module) -> Iterator[Reading]:
    given, unit = teacher.sigma_data, teacher.noise_unit
    # Samples tell sigma_data / noise_unit alone: both times c is a denoiser of c times the data.
    likely = [given * unit / other for other in (1.0, 2.0, 0.5, given / 0.5)]
    for value in (0.5, 1.0, *likely, *_around(given)):
        if abs(math.log(value / given)) > 1e-6:
            line = (
                f"sigma_data and the noise input (c_noise) do not fit: for noise_unit {unit:.3g} sigma_data is about "
                f"{value:.2g}, for sigma_data {given:.3g} noise_unit is about {unit * given / value:.2g}"
            )
            yield line, _edm(teacher, network, value, unit)
    for factor, noise, form in (
        (4.0, 1.0, "ln(sigma)"), (4.0, 2.0, "ln(sigma / 2)"), (1000.0, 1.0, "1000 ln(sigma) / 4"),
        (0.25, unit, "a quarter of what it gets"),
    ):  # fmt: skip
        yield f"the network's noise input (c_noise) is {form}", _edm(teacher, _times(network, factor), given, noise)
    yield "the sign of the output is turned", _edm(teacher, _Called(network, sign=-1.0), given, unit)


def _discrete_mistakes(teacher: Rescaled, network: nn.Module) -> Iterator[Reading]:
    schedule, given = teacher.schedule, teacher.output
    for output in OUTPUTS:
        if output != given:
            yield f"the network predicts {output}, not {given}", _rescaled(teacher, network, schedule, output)
    turned = _Called(network, sign=-1.0)
    yield "the sign of the output is turned", _rescaled(teacher, turned, schedule, given)
    last = float(schedule.time(torch.tensor(1e6)))
    back = _Called(network, lambda t: last - t)
    yield "time runs the other way (t is swapped)", _rescaled(teacher, back, schedule, given)
    for factor in (999.0, 1000.0, 1 / 999, 1 / 1000):
        line = f"the network wants {factor:.3g} times the time"
        yield line, _rescaled(teacher, _times(network, factor), schedule, given)


def _other_families(teacher: Denoiser, network: nn.Module) -> Iterator[Reading]:
    if not isinstance(teacher, Preconditioned):
        for value in _around(0.5):
            line = f"the network is in EDM's preconditioning, with sigma_data about {value:.2g}"
            yield line, _edm(teacher, network, value, 1.0)
    steps = Alphas(tuple(torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0).tolist()))
    for name, schedule, factor in (
        ("VP", VP(), 1.0), ("VP", VP(), 999.0), ("DDPM", steps, 1.0), ("cosine", Cosine(), 1.0),
        ("cosine", Cosine(), 1000.0), ("flow", Flow(), 1.0), ("flow", Flow(), 1000.0),
    ):  # fmt: skip
        if isinstance(teacher, Rescaled) and factor == 1 and schedule == teacher.schedule:
            continue
        for output in OUTPUTS:
            line = f"the network is a {name} model with {output} output"
            yield line, _rescaled(teacher, _times(network, factor), schedule, output)
    for form, at in (("ln(sigma / 2)", lambda t: torch.log(t / 2)), ("sigma", None), ("ln(sigma)", torch.log)):
        for sign in (-1.0, 1.0):
            line = f"the network is a VE model with noise input {form}"
            yield line, _rescaled(teacher, _Called(network, at, sign), _VE(), "eps")


def _cure(teacher: Denoiser, effort: Effort, seconds: float, seed: int) -> tuple[str | None, bool]:
    """The verdict of the reading that passes where the teacher fails, if there is one, and whether all were tried."""
    began, count = time.perf_counter(), 0
    quick = Effort(min(16, effort.samples), steps=8, levels=5, scales=())
    ranked: list[tuple[float, int, str, Denoiser]] = []
    for count, (line, reading) in enumerate(_readings(teacher), 1):
        if time.perf_counter() - began > 0.7 * seconds:
            return None, False
        score = _score(reading, quick, seed)
        if score < math.inf:
            ranked.append((score, count, line, reading))
    passed: list[tuple[float, int, str]] = []
    for _, number, line, reading in sorted(ranked, key=lambda entry: entry[:2])[:6]:
        if time.perf_counter() - began > seconds:
            break
        passed.append((_score(reading, effort, seed + 1), number, line))
    best = min(passed, default=(math.inf, 0, ""))[0]
    # several may pass, e.g. one for data of half the scale: of equally good ones the likelier
    fits = [(number, line) for score, number, line in passed if score < min(1, 2 * best + 0.1)]
    return (min(fits)[1] if fits else None), count > 0


def _score(reading: Denoiser, effort: Effort, seed: int) -> float:
    """How badly the bounds are broken at the worst level: below 1 if they hold; infinite for what learned nothing."""
    law = effort.law(reading)
    try:
        top = law.sigma_max * torch.randn(effort.samples, *reading.shape, generator=stream(seed, "doctor", "top"))
        far = reading(top, torch.full((effort.samples,), law.sigma_max), _labels(reading, effort.samples))
        if not float(far.pow(2).mean().sqrt()) < 10 * max(reading.sigma_data, 1.0):  # noise, not data
            return math.inf
        samples, levels = _measure(reading, effort, law, seed)
    except Exception:  # a network may refuse another time, each in its own way
        return math.inf
    if not torch.isfinite(samples).all():
        return math.inf
    facts = _facts(samples)
    if not min(level.linear for level in levels) < 0.9 or facts["std"] < 0.1 * facts["rms"]:
        return math.inf
    worst = max(value for level in levels for value in level.excess.values())
    return worst if math.isfinite(worst) else math.inf
