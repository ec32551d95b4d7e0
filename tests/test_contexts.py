"""Conditions that are points of [0, 1]^n instead of classes: samples, scores, files and methods of policies."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import limbeck
from limbeck import artifact, cli, compare, config, methods, stock, teachers
from limbeck.denoiser import Denoiser, Guided, Preconditioned
from limbeck.evaluate import ExactJudge, measure
from limbeck.evaluate.draws import generate, in_order, latents
from limbeck.exact import Policy
from limbeck.experts import Experts
from limbeck.export import export
from limbeck.generator import Direct, FewStep, Generator, OneStep, Trajectory
from limbeck.networks import MLP
from limbeck.noise import Karras
from limbeck.source import NoiseSource, RealSource, Recorded
from limbeck.students import student_template
from limbeck.summary import sampler_of

QUIET = {"tell": lambda line: None}
# -log 4 - log(2 pi 0.09) - 1, the modes being apart
LOG_DENSITY = -math.log(4) - math.log(2 * math.pi * 0.09) - 1


def policy() -> Policy:
    made = teachers.load("exact:policy4")
    assert isinstance(made, Policy)
    return made


def learned(contexts: bool = True) -> Preconditioned:
    torch.manual_seed(0)
    made = Preconditioned(MLP((2,), 1, width=8, depth=1), (2,), 1)
    made.contexts = contexts
    return made


class Opaque(Denoiser):
    """A policy of which only the denoiser is known."""

    contexts = True

    def __init__(self) -> None:
        super().__init__((2,), 1, policy().sigma_data)
        self.law = policy()

    def forward(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
        return self.law(x, sigma, cond)


# --- samples ----------------------------------------------------------------------------------------------------------


def test_a_context_depends_on_seed_and_index_alone() -> None:
    whole = latents(3, range(500), (2,), 2, contexts=True)
    assert whole.labels is not None and whole.labels.shape == (500, 2)
    for some in (range(7, 19), range(0, 500, 3)):
        part = latents(3, some, (2,), 2, contexts=True)
        assert part.labels is not None and torch.equal(part.labels, whole.labels[list(some)])
    assert torch.equal(whole.z, latents(3, range(500), (2,), 0).z)  # contexts do not move the noise
    assert whole.labels.min() < 0.02 and 0.98 < whole.labels.max() < 1
    assert whole.labels.unique().numel() == 1000
    assert torch.equal(generate(lambda z, cond: cond, whole, 2, batch=70), whole.labels)  # type: ignore[arg-type, return-value]


def test_contexts_for_the_eye_go_from_0_to_1() -> None:
    rows = in_order(200, 2, contexts=True)
    assert rows.shape == (200, 2) and torch.equal(rows[:10], torch.zeros(10, 2)) and torch.equal(rows[:100], rows[100:])
    assert torch.equal(rows[90:100], torch.ones(10, 2)) and torch.allclose(rows[35], torch.tensor(1 / 3))
    assert torch.equal(in_order(30, 2), torch.tensor([0, 1, 0]).repeat_interleave(10))


# --- scores -----------------------------------------------------------------------------------------------------------


def scores(student: Any, samples: int = 2000) -> dict[str, float]:
    """What the judge of the policy says of `student(mode's number, noise, context)`."""

    def sampler(z: Tensor, cond: Tensor | None) -> Tensor:
        assert cond is not None
        k = (torch.special.ndtr(z[:, 2]) * 4).long().clamp(0, 3)
        k = student(k, cond[:, 0])
        still = policy().mixture.means.float()[k] + 0.3 * z[:, :2]
        return policy().turned(still, cond, 1)

    return measure(sampler, 1, ExactJudge(policy()), (3,), 1, True, samples=samples).metrics


def test_a_policy_is_judged_in_its_contexts() -> None:
    judge = ExactJudge(policy())
    exact, floor = scores(lambda k, c: k), judge.floor(2000).metrics
    for found in (exact, floor):
        assert found.keys() == judge.names
        assert found["log_density"] == pytest.approx(LOG_DENSITY, abs=0.1) and found["mode_recall"] == 1
    # one mode is missing in low contexts, another one in high ones: in the mean over contexts there is no gap
    lost = scores(lambda k, c: torch.where((c < 0.5) & (k == 0) | (c >= 0.5) & (k == 1), 1 - k, k))
    halves = scores(lambda k, c: torch.where((k < 2), (c < 0.5).long(), k))
    assert abs(halves["share_0"] - 0.25) < 0.03 and abs(halves["share_1"] - 0.25) < 0.03
    for wrong in (lost, halves):
        assert wrong["mmd"] > 2 * max(exact["mmd"], floor["mmd"]) and wrong["c2st"] > 0.55


def test_who_ignores_the_context_is_found() -> None:
    found = measure(
        lambda z, cond: policy().turned(policy().mixture.means.float()[(z[:, 2] > 0).long()] + 0.3 * z[:, :2], None, 1),
        1, ExactJudge(policy()), (3,), 1, True, samples=1000,
    ).metrics  # fmt: skip
    assert found["log_density"] < LOG_DENSITY - 2 and found["mmd"] > 0.3


def test_tallies_of_two_processes_are_one() -> None:
    judge, rng = ExactJudge(policy()), torch.Generator().manual_seed(0)
    contexts = torch.rand(400, 1, generator=rng)
    x = policy().sample(400, rng, contexts)
    whole, first, second = judge.tally(), judge.tally(), judge.tally()
    whole.add(x, contexts)
    first.add(x[:100], contexts[:100])
    second.add(x[100:], contexts[100:])
    first.merge(second.tensors())
    assert first.judgement().metrics == whole.judgement().metrics


def test_exact_laws_without_contexts_take_none() -> None:
    for name in ("exact:ring8", "exact:gaussian"):
        law: Any = teachers.load(name)
        assert law.sample(3, None, None).shape == (3, 2)
        with pytest.raises(ValueError, match=r"^cond: this denoiser is unconditional"):
            law.sample(3, None, torch.zeros(3, 1))


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("contexts", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        lambda d: OneStep(d, 2.5),
        lambda d: FewStep(d, [2.5, 0.8]),
        Direct,
        lambda d: Trajectory(d, Karras()),
        lambda d: Experts((2,), 1, 3, 8, 0.5, d.contexts),
    ],
    ids=["one_step", "few_step", "direct", "trajectory", "experts"],
)
def test_files_keep_contexts(make: Any, contexts: bool, tmp_path: Path) -> None:
    generator: Generator = make(learned(contexts)).eval()
    artifact.save(tmp_path / "generator.safetensors", "generator", generator, {})
    again = artifact.load_generator(tmp_path / "generator.safetensors")
    assert generator.contexts == again.contexts == contexts == sampler_of(again, 2)[4]


def test_denoisers_and_their_students_keep_contexts(tmp_path: Path) -> None:
    for contexts in (True, False):
        artifact.save(tmp_path / "denoiser.safetensors", "denoiser", learned(contexts), {})
        again = teachers.load(str(tmp_path / "denoiser.safetensors"))
        assert again.contexts == contexts
    recipe = config.resolve({"teacher": "exact:policy4", "method": "sid"}, methods.METHODS)
    assert student_template(recipe, policy()).contexts


def test_the_card_of_a_callers_own_policy(tmp_path: Path) -> None:
    network = MLP((2,), 1, width=8, depth=1)
    safetensors.torch.save_file(network.state_dict(), str(tmp_path / "mine.safetensors"))
    card = {"shape": [2], "classes": 1, "contexts": True, "network": "mlp", "arguments": network.arguments}
    (tmp_path / "mine.json").write_text(json.dumps(card))
    assert teachers.load(str(tmp_path / "mine.safetensors")).contexts


# --- runs -------------------------------------------------------------------------------------------------------------

METHODS = ["pid", "diff_instruct", "sid", "sim", "dmd", "dmd2", "f_distill", "sida", "uni_instruct", "vardiu", "vdd"]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_plays_on_a_policy(method: str, tmp_path: Path, tiny: dict[str, Any]) -> None:
    keys = {**tiny, "steps": 2, "warm_start": 2}
    if method == "dmd":
        keys["method"] = {"name": "dmd", "pairs": 30}
    told = limbeck.distill("exact:policy4", keys.pop("method", method), out=tmp_path / "run", **QUIET, **keys)
    assert told["student"]["metrics"].keys() >= {"mmd", "log_density", "mode_recall"}
    made = limbeck.load(tmp_path / "run")
    assert made.contexts and made.classes == 1


def test_who_has_no_contexts_says_so(tmp_path: Path, tiny: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^teacher: sds has a point for each class, and none for contexts"):
        limbeck.distill("exact:policy4", "sds", out=tmp_path / "sds", **QUIET)
    assert not list(tmp_path.iterdir())
    limbeck.distill("exact:policy4", "sid", out=tmp_path / "run", **QUIET, **{**tiny, "warm_start": 0})
    for form in ("web", "diffusers"):
        with pytest.raises(ValueError, match=f"^to: {form} asks for classes, and this generator has contexts"):
            export(tmp_path / "run", form, tmp_path / "deep" / form)  # type: ignore[arg-type]
    assert not (tmp_path / "deep").exists()


def test_a_policy_of_which_only_the_denoiser_is_known(tmp_path: Path, tiny: dict[str, Any]) -> None:
    """VDD reads contexts with their samples, of the teacher's own sampler or of a file; warm starts take the former."""
    keys: dict[str, Any] = {"steps": 250, "batch": 128, "every": {"sample": 0}, "evaluate": {"data": "exact:policy4"}}
    rng = torch.Generator().manual_seed(0)
    contexts = torch.rand(3000, 1, generator=rng)
    np.savez(tmp_path / "acts.npz", x=policy().sample(3000, rng, contexts).numpy(), y=contexts.numpy())
    for name, real in (
        ("own", {"source": "teacher:3000"}),
        ("file", {"source": "data", "data": str(tmp_path / "acts.npz")}),
    ):
        told = limbeck.distill(Opaque(), "vdd", out=tmp_path / name, real=real, **QUIET, **keys)
        assert told["student"]["metrics"]["log_density"] == pytest.approx(LOG_DENSITY, abs=0.25)
        assert told["student"]["metrics"]["mmd"] < 0.1
    limbeck.distill(Opaque(), "sid", out=tmp_path / "sid", **QUIET, **{**tiny, "steps": 2, "warm_start": 2})
    np.savez(tmp_path / "bare.npz", x=np.zeros((9, 2)))
    with pytest.raises(ValueError, match=r"^real.data: has 0 numbers a context \(y\), the teacher 1"):
        limbeck.distill(
            Opaque(), "vdd", out=tmp_path / "bare", real={"source": "data", "data": str(tmp_path / "bare.npz")}
        )
    assert not (tmp_path / "bare").exists()


@pytest.mark.parametrize("antithetic", [False, True])
def test_recorded_samples_bring_their_contexts(antithetic: bool) -> None:
    contexts = torch.linspace(0, 1, 50)[:, None]
    noise = NoiseSource((2,), (2,), 11, 0, 1, contexts=True, antithetic=antithetic, micro_batches=3)
    one = replace(noise, batch=1, micro_batches=1, antithetic=True)
    assert len(next(iter(RealSource(one, Recorded(contexts.expand(50, 2), contexts))(0, 0))).z) == 1
    parts = list(RealSource(noise, Recorded(contexts.expand(50, 2), contexts))(0, 0))
    real, cond = (torch.cat([getattr(part, name) for part in parts]) for name in ("real", "cond"))
    assert torch.equal(real, cond.expand(11, 2)) and cond.unique().numel() >= (4 if antithetic else 8)
    z = torch.cat([part.z for part in parts])
    if antithetic:
        assert torch.equal(cond[6:], cond[:5]) and torch.equal(z[6:], -z[:5])


def test_pairs_that_are_kept_have_the_contexts_of_their_samples(tmp_path: Path) -> None:
    pairs = stock.teacher_pairs(policy(), 600, 0, 3, tmp_path, lambda done: None)
    drawn = latents(0, range(600), (2,), 1, "teacher", contexts=True)
    assert pairs.cond is not None and drawn.labels is not None
    assert torch.equal(pairs.cond, drawn.labels) and torch.equal(pairs.z, drawn.z)


def drawn_by(out: Path, *arguments: str) -> dict[str, np.ndarray]:
    assert cli.main(["sample", *arguments, "--steps", "3", "--count", "40", "--out", str(out)]) == 0
    with np.load(out, allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def test_samples_in_a_context(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spread = drawn_by(tmp_path / "a.npz", "exact:policy4")
    assert spread["y"].shape == (40, 1) and len(np.unique(spread["y"])) == 40 and spread["x"].shape == (40, 2)
    for form in ("0.3", "[0.3]"):
        fixed = drawn_by(tmp_path / "b.npz", "exact:policy4", "--context", form)
        assert np.all(fixed["y"] == np.float32(0.3))
    expected = sampler_of(policy(), 3)[0](latents(0, range(40), (2,), 0).z, torch.full((40, 1), 0.3))
    np.testing.assert_allclose(fixed["x"], expected.numpy(), rtol=1e-5, atol=1e-6)
    for arguments, line in (
        (["exact:policy4", "--context", "[0.3,0.4]"], "context: exact:policy4 has contexts of 1 number in [0, 1], got"),
        (["exact:policy4", "--context", "1.5"], "context: must lie in [0, 1], got 1.5"),
        (["exact:policy4", "--context", "nan"], "context: must lie in [0, 1], got nan"),
        (["exact:policy4", "--class", "0"], "class: exact:policy4 has contexts of 1 number in [0, 1], got 0"),
        (["digits", "--context", "0.3"], "context: digits has classes 0 to 9, got 0.3"),
        (["exact:ring8", "--context", "0"], "context: exact:ring8 is unconditional, got 0"),
    ):
        capsys.readouterr()
        assert cli.main(["sample", *arguments, "--out", str(tmp_path / "c.npz")]) == 2
        assert capsys.readouterr().err.startswith(f"limbeck: {line}")
    assert not (tmp_path / "c.npz").exists()


def test_a_denoiser_s_card_without_contexts_is_as_before() -> None:
    """Files and fingerprints of what has no contexts do not change."""
    assert "contexts" not in Denoiser((2,), 0, 0.5).facts() and learned().facts()["contexts"] is True


def test_scores_of_samples_need_their_contexts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What `sample` writes, `evaluate` reads."""
    out = tmp_path / "drawn.npz"
    assert cli.main(["sample", "exact:policy4", "--count", "1000", "--out", str(out)]) == 0
    asked = ["--against", "exact:policy4", "--samples", "1000", "--json"]
    capsys.readouterr()
    assert cli.main(["evaluate", str(out), *asked]) == 0
    found = json.loads(capsys.readouterr().out)["rows"][0]["metrics"]
    assert found["log_density"] == pytest.approx(LOG_DENSITY, abs=0.2) and 0.4 < found["c2st"] < 0.56
    with np.load(out) as file:
        x, y = file["x"], file["y"]
    for name, arrays, line in (
        ("bare", {"x": x}, "contexts: samples of exact:policy4 are scored with those they were drawn in"),
        ("classes", {"x": x, "y": np.zeros(len(x), int)}, "contexts: samples of exact:policy4 are scored"),
        ("outside", {"x": x, "y": y + 1}, f"{tmp_path / 'outside.npz'}: contexts y must be 1000 rows of numbers in [0"),
    ):
        np.savez(tmp_path / f"{name}.npz", **arrays)
        assert cli.main(["evaluate", str(tmp_path / f"{name}.npz"), *asked]) == 2
        assert capsys.readouterr().err.startswith(f"limbeck: {line}")
    assert cli.main(["teach", str(out), "--out", str(tmp_path / "taught")]) == 2
    assert "y holds contexts" in capsys.readouterr().err and not (tmp_path / "taught").exists()


class Net(nn.Module):
    """A caller's generator network."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(4, 2)

    def forward(self, z: Tensor, cond: Tensor) -> Tensor:
        return self.map(torch.cat([z, cond], 1))


def test_a_given_generator_says_whether_it_takes_contexts(tmp_path: Path, tiny: dict[str, Any]) -> None:
    keys = {**tiny, "steps": 2, "warm_start": 0}
    with pytest.raises(ValueError, match=r"^generator: has none, the teacher contexts"):
        limbeck.distill(
            "exact:policy4", "sid", generator=limbeck.Given(Net(), (3,), (2,), 1), out=tmp_path / "a", **keys
        )
    assert not list(tmp_path.iterdir())
    given = limbeck.Given(Net(), (3,), (2,), 1, contexts=True)
    limbeck.distill("exact:policy4", "sid", generator=given, out=tmp_path / "a", **QUIET, **keys)
    assert artifact.load_generator(tmp_path / "a", Net).contexts


def test_guidance_is_not_for_contexts(tmp_path: Path) -> None:
    method = {"name": "sid", "game": {"guidance": {"teacher": 2.0}}}
    with pytest.raises(ValueError, match=r"guidance: a teacher of contexts has none that stands for no condition"):
        limbeck.distill("exact:policy4", method, out=tmp_path / "run", **QUIET)
    with pytest.raises(ValueError, match=r"^guidance: .* has contexts, of which none stands for no condition"):
        Guided(policy(), 2.0)
    assert not list(tmp_path.iterdir())


def test_another_reading_is_another_model() -> None:
    assert artifact.fingerprint(learned(True)) != artifact.fingerprint(learned(False))


def test_the_euler_solver_of_a_policy_is_scored_in_contexts() -> None:
    recipe = config.resolve(
        {"teacher": "exact:policy4", "method": {"name": "pid", "N": 60}, "evaluate": {"samples": 500}}, methods.METHODS
    )
    assert compare._euler_scores(recipe, ExactJudge(policy()))["log_density"] == pytest.approx(LOG_DENSITY, abs=0.3)
