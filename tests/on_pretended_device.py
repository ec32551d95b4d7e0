"""Runs on another device than the CPU: nothing is forgotten there, and the numbers are the same."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from pretend import DEVICE, Pretend

import limbeck
from limbeck import bench, cli, config, device, methods, replay, run, teachers
from limbeck.exact import Empirical
from limbeck.methods.pid import PID
from limbeck.sample import heun
from limbeck.source import RealSource
from limbeck.train import NonFinite, Trainer

QUIET = {"tell": lambda line: None}


@pytest.fixture(autouse=True)
def _there() -> Iterator[None]:
    with Pretend():
        yield


def test_the_device_is_strict() -> None:
    here = torch.ones(3)
    there = here.to(DEVICE)
    assert there.device == (there * torch.tensor(2.0)).device == DEVICE and torch.equal((there + 1).cpu(), here + 1)
    with pytest.raises(RuntimeError, match="same device"):
        there + here


def weights(out: Path, name: str = "generator") -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(out / f"{name}.safetensors")


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Up to rounding: what are one operation on the CPU may be two elsewhere."""
    return first.keys() == second.keys() and all(
        torch.allclose(first[name], second[name], rtol=1e-3, atol=1e-4) for name in first
    )


def numbers(out: Path) -> dict[str, Any]:
    """What a run's report says of its model and teacher."""
    report = json.loads((out / "report.json").read_text())
    return {
        f"{who} {name}": value
        for who in ("student", "teacher_scores", "best")
        for name, value in report.get(who, {}).get("metrics", {}).items()
    }


def both(source: str, method: Any, out: Path, **keys: Any) -> None:
    """The same run on the CPU and on the device, where it loses its last step and goes on."""
    limbeck.distill(source, method, out=out / "cpu", device="cpu", **QUIET, **keys)
    for _ in range(2):
        shutil.rmtree(out / "there" / "checkpoints" / f"ckpt-{keys['steps']:09d}", ignore_errors=True)
        limbeck.distill(source, method, out=out / "there", device="pretend", **QUIET, **keys)
        assert equal(weights(out / "cpu"), weights(out / "there"))
        assert numbers(out / "cpu") == pytest.approx(numbers(out / "there"), rel=1e-3)
    assert json.loads((out / "there" / "report.json").read_text())["device"] == "pretend"


def test_a_run_gives_the_same(tmp_path: Path, tiny: dict[str, Any]) -> None:
    """With a student that is fitted to its teacher first, pictures, scores on the way, and monitors."""
    keys = {**tiny, "warm_start": 3, "every": {"save": 1, "log": 1, "sample": 2, "evaluate": 2}, "health": {"every": 2}}
    both("exact:ring8", "sid", tmp_path, **keys)
    told: list[str] = []
    keys["steps"] += 1
    limbeck.distill("exact:ring8", "sid", out=tmp_path / "cpu", device="pretend", tell=told.append, **keys)
    assert any(line.startswith("device: cpu before, pretend now") for line in told)


def test_images_and_kept_samples(tmp_path: Path) -> None:
    """With pairs and real samples of the teacher, features and class accuracies."""
    keys: dict[str, Any] = {"steps": 2, "batch": 4, "evaluate": {"samples": 100, "teacher_steps": 2}}
    keys |= {"every": {"save": 1, "log": 1, "sample": 2, "evaluate": 1}, "real": {"source": "teacher:40"}}
    both("digits", {"name": "dmd", "pairs": 20, "game": {"adversarial": {}}}, tmp_path, **keys)


def test_a_teacher_that_is_there_already(tmp_path: Path, tiny: dict[str, Any]) -> None:
    for place in ("cpu", "pretend"):
        teacher = teachers.load("exact:ring8").to(DEVICE)
        limbeck.distill(teacher, "pid", out=tmp_path / place, device=place, **QUIET, **tiny)
        assert {value.device for value in teacher.buffers()} == {DEVICE}
    assert equal(weights(tmp_path / "cpu"), weights(tmp_path / "pretend"))


METHODS = [
    *("pid", "diff_instruct", "sim", "dmd2", "f_distill", "sida", "uni_instruct", "sds", "vardiu", "vdd"),
    {"name": "vardiu", "posterior": "full"},
    {"name": "vardiu", "posterior": "flow"},
    {"name": "sid", "game": {"calls": 2, "settle": 2}},
    {"name": "diff_instruct", "dropout_replay": True},
]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_steps_of_every_method_are_the_same(method: Any, tmp_path: Path, tiny: dict[str, Any]) -> None:
    keys = {**tiny, "method": method, "teacher": "exact:ring8"}
    if method in ("sds", "vdd"):
        del keys["template"]
    found = []
    for place in ("cpu", "pretend"):
        recipe = config.resolve({**keys, "device": place}, methods.METHODS)
        job = run.distillation(recipe, tmp_path, lambda line: None)
        assert job.prepare is not None
        source = RealSource(job.prepare.noise, job.prepare.provider)
        for _ in range(3):
            told = job.trainer.advance(source)
        assert {w.device for w in job.trainer.nets.parameters()} == {torch.device(place, *([0] if found else []))}
        found.append(({name: float(value) for name, value in told.items()}, job.trainer.ema.whole().state_dict()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    assert equal(found[0][1], {name: tensor.cpu() for name, tensor in found[1][1].items()})


@pytest.mark.parametrize("method", ["denoising", "classification", "gan"])
def test_teaching(method: str, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"steps": 2, "batch": 8, "every": {"sample": 2}}
    keys["evaluate"] = {"samples": 200, "teacher_steps": 2}
    product = {"denoising": "denoiser", "classification": "classifier", "gan": "generator"}[method]
    for place in ("cpu", "pretend"):
        limbeck.teach("digits", out=tmp_path / place, method=method, device=place, **QUIET, **keys)
    assert equal(weights(tmp_path / "cpu", product), weights(tmp_path / "pretend", product))
    assert numbers(tmp_path / "cpu") == pytest.approx(numbers(tmp_path / "pretend"), rel=1e-3)


def test_samples_and_scores_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawn, scored = [], []
    for place in ("cpu", "pretend"):
        out = tmp_path / f"{place}.npz"
        assert cli.main(["sample", "digits", "--steps", "2", "--count", "9", "--device", place, "--out", str(out)]) == 0
        with np.load(out) as file:
            drawn.append({name: file[name] for name in file.files})
        asked = f"--samples 200 --teacher_steps 2 --out {tmp_path / place} --device {place} --json".split()
        capsys.readouterr()
        assert cli.main(["evaluate", "digits", *asked]) == 0
        scored.append(json.loads(capsys.readouterr().out)["rows"][0]["metrics"])
    assert all(np.array_equal(drawn[0][name], drawn[1][name]) for name in ("x", "y"))
    assert scored[0] == pytest.approx(scored[1], rel=1e-6)


def test_a_turn_is_replayed(tmp_path: Path, tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    real = Trainer.play

    def spoiled(self: Trainer, *arguments: Any) -> int:
        if self.step == 2:
            next(self.nets["generator"].parameters()).data.fill_(math.nan)
        return real(self, *arguments)

    monkeypatch.setattr(Trainer, "play", spoiled)
    with pytest.raises(NonFinite):
        limbeck.distill("exact:ring8", "pid", out=tmp_path / "run", device="pretend", **QUIET, **tiny)
    monkeypatch.undo()
    found = replay.replay(tmp_path / "run", lambda line: None)
    assert found.reproduced and found.step == 2 and found.weights and found.gradients


def test_exact_laws_draw_the_same() -> None:
    for name in ("exact:ring8", "exact:gaussian", "exact:policy4"):
        law: Any = teachers.load(name)
        here = law.sample(50, torch.Generator().manual_seed(0))
        there = law.to(DEVICE).sample(50, torch.Generator().manual_seed(0))
        assert there.device == DEVICE and torch.equal(there.cpu(), here)


def test_points_and_features(tmp_path: Path, tiny: dict[str, Any]) -> None:
    """Point sets, and a perceptual loss whose network is the caller's: two runs of one objective."""
    points = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    law = Empirical(points)
    there = copy.deepcopy(law).to(DEVICE)
    z = points[:9]
    torch.testing.assert_close(heun(there, z.to(DEVICE), 4).cpu(), heun(law, z, 4))
    method = PID(N=20, metric="features", features=torch.nn.Linear(2, 5))
    for place in ("cpu", "pretend", "again"):
        keys = {**tiny, "steps": 2, "device": place.replace("again", "pretend")}
        limbeck.distill("exact:ring8", method, out=tmp_path / place, **QUIET, **keys)
    assert equal(weights(tmp_path / "cpu"), weights(tmp_path / "again"))
    assert device.home(method.features) == device.CPU  # type: ignore[arg-type]


def test_each_process_takes_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    for count, own in ((8, 3), (4, 3), (1, 0)):  # one: a launcher that shows each process its own
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        assert device.own_gpu() == own
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, reason in (("cuda", "4 processes share 2 GPUs"), ("cuda:1", "each process takes a GPU of its own")):
        with pytest.raises(ValueError, match=rf"^device: '{name}' cannot be used here \({reason}"):
            device.chosen(name)


def test_a_bench_compares_on_one_device() -> None:
    recipes = {
        place: config.resolve({"teacher": "digits", "method": "pid", "batch": 4, "device": place}, methods.METHODS)
        for place in ("cpu", "pretend")
    }
    with pytest.raises(ValueError, match=r"^device: both settings must compute on one"):
        bench.bench(recipes, repeats=1)
