"""The doctor on teachers that are broken on purpose, each in one way that happens, and on good ones.

The law is a mixture of images, 3 x 8 x 8, known in closed form; a network is what its exact denoiser looks like in one
convention, and is then read in another.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import limbeck
from limbeck import artifact, cli, doctor, teachers
from limbeck.denoiser import Denoiser, Preconditioned, Rescaled, expand
from limbeck.exact import Empirical, Gaussian, Mixture
from limbeck.networks import MLP, DiT
from limbeck.schedule import VP

SHAPE = (3, 8, 8)
PATIENCE = 1000.0  # no search is cut short, however slow the machine


def images(modes: int = 8, std: float = 0.1, shape: tuple[int, ...] = SHAPE, seed: int = 0) -> Mixture:
    """A mixture of random images with a root mean square of 0.5."""
    means = torch.randn(modes, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Mixture([1.0] * modes, means * math.sqrt(0.25 - std**2) / means.pow(2).mean().sqrt(), std)


LAW = images()


class Net(nn.Module):
    """A network that knows a law: `call(x_in, noise)`."""

    def __init__(self, call: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.call = call

    def forward(self, x: Tensor, noise: Tensor, cond: Tensor | None = None) -> Tensor:
        return self.call(x, noise)


def edm_net(law: Denoiser = LAW, level: Callable[[Tensor], Tensor] = lambda noise: torch.exp(4 * noise)) -> Net:
    """EDM's F with sigma_data 0.5, whose noise input means the level `level(noise)`."""

    def call(scaled: Tensor, noise: Tensor) -> Tensor:
        sigma = level(noise)
        s = expand(sigma, scaled)
        x = scaled * (s**2 + 0.25).sqrt()
        return (law(x, sigma) - 0.25 / (s**2 + 0.25) * x) * (s**2 + 0.25).sqrt() / (0.5 * s)

    return Net(call)


def vp_net(law: Denoiser = LAW) -> Net:
    """The noise in x_t, in the time of VP()."""

    def call(scaled: Tensor, t: Tensor) -> Tensor:
        x, sigma = scaled / expand(VP().alpha(t), scaled), VP().sigma(t) / VP().alpha(t)
        return (x - law(x, sigma)) / expand(sigma, x)

    return Net(call)


def ve_net(law: Denoiser = LAW) -> Net:
    """EDM's form of VE networks: D = x + sigma F(x; ln(sigma / 2))."""
    return Net(lambda x, noise: (law(x, 2 * noise.exp()) - x) / expand(2 * noise.exp(), x))


def edm(network: nn.Module, sigma_data: float = 0.5) -> Denoiser:
    return Preconditioned(network, SHAPE, 0, sigma_data, noise_unit=1.0)


def vp(network: nn.Module) -> Denoiser:
    return Rescaled(network, VP(), "eps", SHAPE)


class VE(Denoiser):
    def __init__(self, network: nn.Module) -> None:
        super().__init__(SHAPE, 0, 0.5, 0.02, 100.0)
        self.network = network

    def forward(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
        return x + expand(sigma, x) * self.network(x, (sigma / 2).log().expand(len(x)), cond)


class Bent(Denoiser):
    """A denoiser with something done to its level or its output."""

    def __init__(
        self,
        output: Callable[[Tensor, Tensor], Tensor] = lambda clean, sigma: clean,
        level: Callable[[Tensor], Tensor] = lambda sigma: sigma,
        inner: Denoiser = LAW,
    ) -> None:
        super().__init__(inner.shape, inner.classes, inner.sigma_data)
        self.inner, self.output, self.level = inner, output, level

    def forward(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
        return self.output(self.inner(x, self.level(sigma), cond), sigma)


def nan_above_30(clean: Tensor, sigma: Tensor) -> Tensor:
    return torch.where(expand(sigma, clean) > 30, torch.nan, clean)


def small() -> DiT:
    torch.manual_seed(0)
    return DiT(SHAPE, width=16, depth=1)


def random_net() -> nn.Module:
    network = small()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    return network


def one_mode() -> Denoiser:
    return edm(edm_net(Mixture([1.0], LAW.means[:1], 0.1)))


def zero_to_one() -> Denoiser:
    return edm(edm_net(Mixture(LAW.weights, (LAW.means + 1) / 2, LAW.stds / 2)))


NO_FIT = "sigma_data and the noise input (c_noise) do not fit: for noise_unit 1 sigma_data is about 0.5"
TWICE = "for sigma_data 0.5 noise_unit is about 2"
BROKEN: dict[str, tuple[Callable[[], Denoiser], str, str]] = {
    "VP as EDM": (lambda: edm(vp_net()), "convention", "a VP model with eps output"),
    "EDM as VP": (lambda: vp(edm_net()), "convention", "in EDM's preconditioning, with sigma_data about 0.5"),
    "VE as VP": (lambda: vp(ve_net()), "convention", "a VE model with noise input ln(sigma / 2)"),
    "VP as VE": (lambda: VE(vp_net()), "convention", "a VP model with eps output"),
    "VE as EDM": (lambda: edm(ve_net()), "convention", "a VE model with noise input ln(sigma / 2)"),
    "VP sign": (lambda: vp(Net(lambda x, t: -vp_net()(x, t))), "convention", "sign of the output is turned"),
    "sigma_data 1": (lambda: edm(edm_net(), 1.0), "convention", NO_FIT),
    "sigma_data 0.66": (lambda: edm(edm_net(), 0.66), "convention", NO_FIT),
    "c_noise ln s": (lambda: edm(edm_net(level=torch.exp)), "convention", "noise input (c_noise) is ln(sigma)"),
    "c_noise ln(s/2)/4": (lambda: edm(edm_net(level=lambda n: 2 * (4 * n).exp())), "convention", TWICE),
    "up to sigma 20": (lambda: Bent(level=lambda s: s.clamp(max=20)), "sigma range", "trained only on lower levels"),
    "up to sigma 10": (lambda: Bent(level=lambda s: s.clamp(max=10)), "sigma range", "trained only on lower levels"),
    "from sigma 0.05": (lambda: Bent(level=lambda s: s.clamp(min=0.05)), "sigma range", "up to sigma 0.048"),
    "untrained": (lambda: edm(small()), "untrained", "0 everywhere"),
    "random": (lambda: edm(random_net()), "untrained", "random weights"),
    "data in [0, 1]": (zero_to_one, "range", "the samples lie in [0, 1]"),
    "bias 0.05": (lambda: Bent(lambda clean, s: clean + 0.05), "bias", "x +0.0"),
    "gain 2 %": (lambda: Bent(lambda clean, s: 1.02 * clean), "gain", "1.02 x"),
    "NaN above 30": (lambda: Bent(nan_above_30), "finite", "above sigma 29"),
    "one mode": (one_mode, "diversity", "the samples are all alike"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_teacher_is_named(name: str) -> None:
    build, check, words = BROKEN[name]
    (finding,) = doctor.examine(build(), PATIENCE).findings
    assert finding.check == check and words in finding.verdict, finding


def test_permuted_channels_cannot_be_seen() -> None:
    """A consistent denoiser of another law: this test is here so that nobody promises to see it."""
    flipped = Mixture(LAW.weights, LAW.means.flip(1), LAW.stds)
    assert doctor.examine(edm(edm_net(flipped)), PATIENCE).findings == ()


GOOD: dict[str, Callable[[], Denoiser]] = {
    "digits": lambda: teachers.load("digits"),
    "ring8": lambda: teachers.load("exact:ring8"),
    "mog40": lambda: teachers.load("exact:mog40"),
    "gaussian": lambda: teachers.load("exact:gaussian"),
    "tight, off centre": lambda: Gaussian([3.0, 3.0], 0.2),
    "white images": lambda: Gaussian(torch.zeros(1, 4, 4), 0.5),
    "law": lambda: LAW,
    "EDM": lambda: edm(edm_net()),
    "VP": lambda: vp(vp_net()),
    "VE": lambda: VE(ve_net()),
    "VP of a Gaussian": lambda: Rescaled(vp_net(Gaussian([0.0, 0.0], 0.5)), VP(), "eps", (2,)),
    "points": lambda: Empirical(LAW.sample(50, torch.Generator().manual_seed(0))),
    "points in the plane": lambda: Empirical(teachers.ring8().sample(100, torch.Generator().manual_seed(0))),
    "few modes": lambda: images(3, 0.05, seed=1),
    "broad modes": lambda: images(5, 0.3, seed=3),
    "one channel": lambda: images(10, 0.1, (1, 4, 4), seed=6),
}


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_good_teacher_is_left_in_peace(name: str, seed: int) -> None:
    diagnosis = doctor.examine(GOOD[name](), PATIENCE, seed)
    assert diagnosis.findings == (), (diagnosis.findings, diagnosis.lines())


def digits(**changes: Any) -> Preconditioned:
    teacher = teachers.load("digits")
    assert isinstance(teacher, Preconditioned)
    facts = {"sigma_data": teacher.sigma_data, "noise_unit": teacher.noise_unit, **changes}
    return Preconditioned(teacher.network, teacher.shape, teacher.classes, **facts)


@pytest.mark.parametrize(
    "teacher, check, words",
    [
        (lambda: Bent(lambda clean, s: clean + 0.05, inner=digits()), "bias", "x +0.0"),
        (lambda: Bent(lambda clean, s: 1.02 * clean, inner=digits()), "gain", "1.0"),
        (lambda: Bent(level=lambda s: s.clamp(min=0.05), inner=digits()), "sigma range", "higher levels"),
        (lambda: Bent(level=lambda s: s.clamp(max=20), inner=digits()), "sigma range", "lower levels"),
        (lambda: Bent(lambda clean, s: clean / 2 + 0.5, inner=digits()), "convention", "no denoiser"),
        (lambda: digits(sigma_max=5.0), "sigma range", "sigma_max 5 is too low"),
        (lambda: digits(sigma_min=0.3), "sigma range", "sigma_min 0.3 is too high"),
    ],
)
def test_a_trained_network_that_was_broken(teacher: Callable[[], Denoiser], check: str, words: str) -> None:
    (finding,) = doctor.examine(teacher(), PATIENCE).findings
    assert finding.check == check and words in finding.verdict, finding


def test_a_level_that_training_hardly_visits_is_no_fault() -> None:
    """A small network taught on EDM's law is 1.25 times worse than a constant guess at the largest level."""

    def loud(clean: Tensor, sigma: Tensor) -> Tensor:
        far = expand(sigma / (60 * teacher.unit), clean).clamp(max=1) ** 2
        return clean + 0.9 * far * teacher.sigma_data * torch.sin(37 * clean + torch.arange(2.0))

    teacher = teachers.load("exact:ring8")
    diagnosis = doctor.examine(Bent(loud, inner=teacher), PATIENCE)
    assert diagnosis.findings == () and 1.2 < diagnosis.levels[-1].linear < 1.3


def test_labels_without_effect() -> None:
    class Deaf(Bent):
        def forward(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
            return self.inner(x, sigma, None)

    (finding,) = doctor.examine(Deaf(inner=digits()), PATIENCE).findings
    assert finding.check == "labels"


def test_more_mistakes_of_convention() -> None:
    """eps against v, and time that runs the other way."""
    v = Net(lambda x, t: expand(VP().alpha(t), x) * vp_net()(x, t) - expand(VP().sigma(t), x) * LAW(
        x / expand(VP().alpha(t), x), VP().sigma(t) / VP().alpha(t)))  # fmt: skip
    (finding,) = doctor.examine(vp(v), PATIENCE).findings
    assert finding.verdict == "the network predicts v, not eps"
    last = float(VP().time(torch.tensor(1e6)))
    (finding,) = doctor.examine(vp(Net(lambda x, t: vp_net()(x, last - t))), PATIENCE).findings
    assert finding.verdict == "time runs the other way (t is swapped)"


def test_a_partial_load_of_a_real_network_is_refused_before_the_doctor(tmp_path: Path) -> None:
    """A few random tensors among trained ones pass every check on samples: keys are matched strictly instead."""
    import safetensors.torch

    path = tmp_path / "d.safetensors"
    artifact.save(path, "denoiser", digits(), {})
    tensors = safetensors.torch.load_file(str(path))
    with safetensors.safe_open(str(path), "pt") as file:
        metadata = file.metadata()
    tensors.pop(sorted(tensors)[0])
    safetensors.torch.save_file(tensors, str(path), metadata)
    with pytest.raises(ValueError, match="is missing"):
        teachers.load(str(path))


# The command, and the quick form before a distillation


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "digits", "--out", str(tmp_path / "d"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["healthy"] and told["findings"] == [] and told["facts"]["nfe"] in (11, 35)
    assert json.loads((tmp_path / "d" / "doctor.json").read_text()) == told
    assert (tmp_path / "d" / "samples.png").read_bytes().startswith(b"\x89PNG")
    broken = tmp_path / "broken.safetensors"
    artifact.save(broken, "denoiser", Preconditioned(MLP((2,)), (2,)), {})
    assert cli.main(["doctor", str(broken)]) == 1
    out = capsys.readouterr()
    assert out.out.startswith("untrained: the network's output is 0 everywhere")
    assert out.err == f"limbeck: {broken}: untrained\n"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nowhere"], "no file or bundled teacher"), ([], "TEACHER: expected one"),
        (["digits", "--seconds", "0"], "seconds: must be 1"), (["digits", "--secs", "3"], "secs: unknown key"),
    ],
)  # fmt: skip
def test_mistakes_on_the_command_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_distillation_begins_with_it(tmp_path: Path, tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    asked: list[Denoiser] = []
    honest = doctor.examine

    def counted(teacher: Denoiser, *arguments: Any) -> doctor.Diagnosis:
        asked.append(teacher)
        return honest(teacher, *arguments)

    monkeypatch.setattr(doctor, "examine", counted)
    broken = Bent(lambda clean, s: clean + 0.3, inner=Gaussian([0.0, 0.0], 0.5))
    keys = {**tiny, "out": tmp_path / "r", "tell": said.append}
    limbeck.distill(broken, **{**keys, "steps": 1})
    assert any(line.startswith("warning: teacher: bias: ") for line in said) and len(asked) == 1
    said.clear()
    limbeck.distill(broken, **keys)  # known by its fingerprint
    assert len(asked) == 1 and not any("warning" in line for line in said)
    told = json.loads((tmp_path / "r" / "doctor.json").read_text())
    assert not told["healthy"] and told["findings"][0]["check"] == "bias"
    assert doctor.preflight(broken, tmp_path / "r" / "doctor.json", "other", said.append) is not None
    asked.pop()
    limbeck.distill("exact:gaussian", **{**keys, "out": tmp_path / "e"})  # right by construction
    assert len(asked) == 1 and not (tmp_path / "e" / "doctor.json").exists()


def test_a_teacher_that_is_not_finite_stops_the_run(tmp_path: Path, tiny: dict[str, Any]) -> None:
    bad = Bent(nan_above_30, inner=Gaussian([0.0, 0.0], 0.5))
    with pytest.raises(ValueError, match="teacher: NaN or Inf above sigma 29"):
        limbeck.distill(bad, out=tmp_path / "r", **tiny)
    assert not (tmp_path / "r").exists()


def test_of_a_very_slow_network_only_finiteness_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_pace", lambda denoiser: 0.7)  # EDM's CIFAR-10 network on two cores
    monkeypatch.setattr(doctor, "examine", lambda *arguments: pytest.fail("has no time for this"))
    said: list[str] = []
    calls: list[int] = []

    def counted(clean: Tensor, sigma: Tensor) -> Tensor:
        calls.append(len(clean))
        return clean

    teacher = Bent(counted, inner=Gaussian([0.0, 0.0], 0.5))
    cache = tmp_path / "doctor.json"
    kept = doctor.preflight(teacher, cache, "one", said.append)
    assert kept is not None and len(said) == 1 and "for NaN and Inf only" in said[0]
    assert sum(calls) * 0.7 <= doctor.QUICK
    cache.write_text(kept)
    assert doctor.preflight(teacher, cache, "one", said.append) is None
    with pytest.raises(ValueError, match="teacher: NaN or Inf above sigma 29"):
        doctor.preflight(Bent(nan_above_30, inner=Gaussian([0.0, 0.0], 0.5)), tmp_path / "none", "two", said.append)


def test_a_slow_network_gets_few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter((0.0, 8.0))
    monkeypatch.setattr(doctor.time, "perf_counter", lambda: next(times))
    effort = doctor.Effort.within(LAW, 10.0)
    assert (effort.samples, effort.steps, effort.calls) == (4, 8, 20)


@pytest.mark.parametrize("name", ["VP as EDM", "sigma_data 1", "bias 0.05", "up to sigma 10", "NaN above 30"])
def test_a_coarse_look_names_mistakes_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.Effort, "within", lambda denoiser, seconds: doctor.Effort(6, 8, 5, ()))
    (finding,) = doctor.examine(BROKEN[name][0](), PATIENCE).findings
    assert finding.check == BROKEN[name][1]


@pytest.mark.parametrize("name", ["digits", "white images", "EDM", "VP", "VE", "points", "few modes", "one channel"])
@pytest.mark.parametrize("samples, seed", [(4, 0), (4, 1), (4, 2), (8, 3), (16, 4)])
def test_a_coarse_look_leaves_good_teachers_in_peace(
    name: str, samples: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    coarse = doctor.Effort(samples, 8, 5, ())
    monkeypatch.setattr(doctor.Effort, "within", lambda denoiser, seconds: coarse)
    diagnosis = doctor.examine(GOOD[name](), PATIENCE, seed)
    assert diagnosis.findings == (), (diagnosis.findings, diagnosis.lines())
