"""Runs: however often and wherever a run is broken off, the same call ends with the same weights, bit by bit."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import re
import shutil
import signal
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import limbeck
from limbeck import checkpoint, config, folder, loop, run, summary, teachers
from limbeck.denoiser import Preconditioned
from limbeck.exact import Gaussian, Mixture
from limbeck.folder import Stopped
from limbeck.generator import Trajectory
from limbeck.methods import METHODS
from limbeck.methods.pid import PID
from limbeck.networks import MLP
from limbeck.train import NonFinite, Trainer

STEPS = 6


class Told(list[str]):
    """What a run has told."""

    def __call__(self, line: str) -> None:
        self.append(line)

    def has(self, text: str) -> bool:
        return any(text in line for line in self)


@pytest.fixture
def distill(tiny: dict[str, Any]) -> Callable[..., dict[str, Any]]:
    """limbeck.distill of ring8 with tiny settings."""

    def start(out: Path, teacher: Any = "exact:ring8", tell: Any = None, **keys: Any) -> dict[str, Any]:
        return limbeck.distill(teacher, out=out, tell=Told() if tell is None else tell, **{**tiny, **keys})

    return start


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run, with the settings of `tiny`. Tests read it only."""
    out = tmp_path_factory.mktemp("whole") / "run"
    keys = {
        "steps": STEPS, "batch": 8, "template": {"network": "mlp", "width": 8, "depth": 1, "dropout": 0.3},
        "every": {"save": 1, "log": 1, "sample": 0}, "evaluate": {"samples": 200, "teacher_steps": 4},
    }  # fmt: skip
    limbeck.distill("exact:ring8", out=out, tell=Told(), **keys)
    return out


@pytest.fixture
def ends_equal(whole: Path, weights: Any, equal: Any) -> Callable[[Path], None]:
    """Assert that a run has ended where the uninterrupted one has: model, players, optimisers, moving average, log."""

    def check(out: Path, swept: bool = True) -> None:
        assert equal(weights(out), weights(whole))
        name = f"checkpoints/ckpt-{STEPS:09d}/state.safetensors"
        assert (out / name).read_bytes() == (whole / name).read_bytes()
        assert [row["step"] for row in rows(out)] == list(range(1, STEPS + 1))
        assert [loss(row) for row in rows(out)] == [loss(row) for row in rows(whole)]
        assert (
            json.loads((out / "report.json").read_text())["student"]["metrics"] == report(whole)["student"]["metrics"]
        )
        assert not swept or not [p for p in out.rglob("*") if "tmp" in p.name]

    return check


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def loss(row: dict[str, Any]) -> tuple[float, float, float]:
    return row["loss/generator"], row["grad_norm/generator"], row["lr/generator"]


def report(out: Path) -> dict[str, Any]:
    told: dict[str, Any] = json.loads((out / "report.json").read_text())
    return told


def snapshot(out: Path) -> dict[str, bytes]:
    """Content of every file but the lock."""
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name != ".lock"}


def at_step(patched: pytest.MonkeyPatch, step: int, action: Callable[[], object]) -> None:
    """Do `action` in the middle of step `step` (from 1), before its turn is played."""
    real = Trainer.play

    def play(self: Trainer, *args: Any) -> Any:
        if self.step == step - 1:
            action()
        return real(self, *args)

    patched.setattr(Trainer, "play", play)


def kill_self(signum: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), signum)


def no_training(patched: pytest.MonkeyPatch) -> None:
    def advance(self: Trainer, source: Any) -> None:
        raise AssertionError("trained")

    patched.setattr(Trainer, "advance", advance)


# What a run leaves


def test_files(whole: Path) -> None:
    assert sorted(p.name for p in whole.iterdir() if not p.name.startswith(".")) == [
        "checkpoints", "generator.safetensors", "log.jsonl", "manifest.json", "recipe.toml", "report.html",
        "report.json",
    ]  # fmt: skip
    assert sorted(p.name for p in (whole / "checkpoints").iterdir()) == ["ckpt-000000005", "ckpt-000000006"]


def test_report(whole: Path) -> None:
    told = report(whole)
    assert told["method"]["name"] == "pid" and told["method"]["N"] == 250
    assert (told["teacher"], told["steps"], told["images"], told["seed"]) == ("exact:ring8", STEPS, 8 * STEPS, 0)
    assert 0 <= told["seconds"] < 60
    assert (told["student"]["nfe"], told["teacher_scores"]["nfe"]) == (1, 7)
    for column in ("student", "teacher_scores", "floor"):
        metrics = told[column]["metrics"]
        assert {"mmd", "mmd2", "log_mmd2", "sliced_wasserstein", "log_density", "mode_recall"} <= metrics.keys()
        assert all(math.isfinite(value) for value in metrics.values())
    assert told["floor"]["metrics"]["mmd"] < told["student"]["metrics"]["mmd"]
    assert told["versions"] == {**told["versions"], "limbeck": limbeck.__version__, "torch": torch.__version__}
    assert {"processor", "cores", "threads"} <= told["machine"].keys() and told["machine"]["threads"] == 1
    assert told["recipe"] == tomllib.loads((whole / "recipe.toml").read_text())


def test_the_report_is_returned(tmp_path: Path, distill: Any) -> None:
    told = Told()
    assert distill(tmp_path / "r", tell=told) == report(tmp_path / "r")
    assert told.has("6 steps in") and told.has("network calls") and told[-1].startswith("report: ")


def test_html_stands_alone(whole: Path) -> None:
    page = (whole / "report.html").read_text()
    assert page.lower().startswith("<!doctype html") and "exact:ring8" in page
    assert "@import" not in page and not re.findall(r'(?:src|href)="(?!data:|#)', page)


def test_log(whole: Path) -> None:
    for number, row in enumerate(rows(whole), 1):
        assert (row["step"], row["images"]) == (number, 8 * number)
        assert all(math.isfinite(value) for value in loss(row))
    assert [row["lr/generator"] for row in rows(whole)] == sorted(
        (r["lr/generator"] for r in rows(whole)), reverse=True
    )


def test_the_model_is_the_moving_average(whole: Path) -> None:
    generator = limbeck.load(whole)
    assert isinstance(generator, Trajectory) and generator.shape == (2,)
    state = checkpoint.load_newest(whole / "checkpoints", Told())
    assert state is not None and state["trainer"]["step"] == STEPS
    for name, tensor in generator.state_dict().items():
        assert torch.equal(tensor, state["trainer"]["ema"][name])
        assert not torch.equal(tensor, state["trainer"]["nets"]["generator"][name]) or tensor.numel() <= 1


def test_the_model_file_carries_its_recipe(whole: Path) -> None:
    card = limbeck.run.artifact.read_card(whole / "generator.safetensors")
    assert card["recipe"] == report(whole)["recipe"]
    assert config.resolve(card["recipe"], limbeck.methods.METHODS).teacher == "exact:ring8"


def test_periods(tmp_path: Path, distill: Any) -> None:
    every = {"save": 4, "log": 2, "sample": 3, "evaluate": 3}
    told = distill(tmp_path / "r", every=every, keep=9)
    out = tmp_path / "r"
    assert [p.name for p in sorted((out / "checkpoints").iterdir())] == ["ckpt-000000004", "ckpt-000000006"]
    assert [row["step"] for row in rows(out) if "metrics" not in row] == [2, 4, 6]
    assert [row["step"] for row in rows(out) if "metrics" in row] == [3, 6]
    assert [row["step"] for row in told["history"]] == [3, 6]
    pictures = sorted((out / "samples").iterdir())
    assert [p.name for p in pictures] == ["step-000000003.png", "step-000000006.png"]
    for picture in pictures:
        with Image.open(picture) as image:
            image.load()
            assert image.width == image.height == 320


def test_saving_and_looking_do_not_disturb_training(
    tmp_path: Path, distill: Any, equal: Any, weights: Any, whole: Path
) -> None:
    torch.manual_seed(1234)
    distill(tmp_path / "r", every={"save": 0, "log": 3, "sample": 2, "evaluate": 2})
    assert equal(weights(tmp_path / "r"), weights(whole))


def test_the_global_generator_is_left_alone(tmp_path: Path, distill: Any) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    distill(tmp_path / "r", every={"sample": 2, "evaluate": 3})
    assert torch.equal(torch.rand(3), expected)


# Repetition


def test_same_seed_same_bits(tmp_path: Path, distill: Any, ends_equal: Any) -> None:
    distill(tmp_path / "r")
    ends_equal(tmp_path / "r")


def test_other_seed_other_bits(tmp_path: Path, distill: Any, whole: Path, weights: Any, equal: Any) -> None:
    distill(tmp_path / "r", seed=1)
    assert not equal(weights(tmp_path / "r"), weights(whole))


def test_a_finished_run_says_so(tmp_path: Path, distill: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first = distill(tmp_path / "r")
    before = snapshot(tmp_path / "r")
    no_training(monkeypatch)
    told = Told()
    assert distill(tmp_path / "r", tell=told) == first
    assert len(told) == 1 and "finished at step 6" in told[0]
    assert snapshot(tmp_path / "r") == before
    # one that is older than a key of recipes is finished too
    report = json.loads((tmp_path / "r" / "report.json").read_text())
    del report["recipe"]["evaluate"]["watched"]
    (tmp_path / "r" / "report.json").write_text(json.dumps(report))
    recipe = (tmp_path / "r" / "recipe.toml").read_text()
    (tmp_path / "r" / "recipe.toml").write_text(recipe.replace("watched = 0\n", ""))
    folder.seal(tmp_path / "r")
    distill(tmp_path / "r", tell=told)
    assert len(told) == 2 and "finished at step 6" in told[1]


# Interruption


@pytest.mark.parametrize("step", range(1, STEPS))
def test_sigterm_at_every_step(tmp_path: Path, distill: Any, ends_equal: Any, step: int) -> None:
    with pytest.MonkeyPatch.context() as patched:
        at_step(patched, step, kill_self(signal.SIGTERM))
        with pytest.raises(Stopped, match=f"stopped at step {step}, saved") as caught:
            distill(tmp_path / "r", every={"save": 0, "log": 1, "sample": 0})
    assert caught.value.code == 143
    assert not (tmp_path / "r" / "report.json").exists() and not (tmp_path / "r" / "generator.safetensors").exists()
    told = Told()
    distill(tmp_path / "r", tell=told)
    assert told.has(f"continuing at step {step}") and told.has(f"{STEPS - step} steps in")
    ends_equal(tmp_path / "r")


def test_interrupted_at_every_step_of_one_run(tmp_path: Path, distill: Any, ends_equal: Any) -> None:
    for step in range(1, STEPS):
        with pytest.MonkeyPatch.context() as patched:
            at_step(patched, step, kill_self(signal.SIGINT))
            with pytest.raises(Stopped) as caught:
                distill(tmp_path / "r")
        assert caught.value.code == 130
    distill(tmp_path / "r")
    ends_equal(tmp_path / "r")


def test_a_signal_in_the_last_step_stops_before_the_scores(tmp_path: Path, distill: Any, ends_equal: Any) -> None:
    with pytest.MonkeyPatch.context() as patched:
        at_step(patched, STEPS, kill_self(signal.SIGTERM))
        with pytest.raises(Stopped, match=f"stopped at step {STEPS}"):
            distill(tmp_path / "r")
    with pytest.MonkeyPatch.context() as patched:
        no_training(patched)
        distill(tmp_path / "r")
    ends_equal(tmp_path / "r")


@pytest.mark.parametrize("place", ["watched", "scored"])
def test_a_signal_in_an_evaluation_does_not_wait_for_its_end(
    tmp_path: Path, distill: Any, ends_equal: Any, whole: Path, place: str
) -> None:
    """An evaluation that was cut short is made on resuming: the same rows, the same best step."""
    every = {"evaluate": 2, "save": 4, "log": 1, "sample": 0}
    distill(tmp_path / "whole", every=every)
    name = {"watched": "watched", "scored": "_scores"}[place]

    def measure(*args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("waited")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(summary, name, measure)
        with pytest.raises(Stopped, match=f"stopped at step {2 if place == 'watched' else STEPS}") as caught:
            distill(tmp_path / "r", every=every)
    assert caught.value.code == 143
    distill(tmp_path / "r", every=every)
    for key in ("history", "best"):
        assert without_time(report(tmp_path / "r").get(key)) == without_time(report(tmp_path / "whole").get(key))
    assert (tmp_path / "r" / "checkpoints" / f"ckpt-{STEPS:09d}" / "state.safetensors").read_bytes() == (
        tmp_path / "whole" / "checkpoints" / f"ckpt-{STEPS:09d}" / "state.safetensors"
    ).read_bytes()


def without_time(value: Any) -> Any:
    if isinstance(value, list):
        return [without_time(v) for v in value]
    return {k: v for k, v in value.items() if k != "seconds"} if isinstance(value, dict) else value


@pytest.mark.parametrize(
    "name", ["recipe.toml", "log.jsonl", "report.json", "report.html", "generator.safetensors", "manifest.json"]
)
def test_a_damaged_file_of_a_finished_run_is_named_and_made_again(
    tmp_path: Path, whole: Path, distill: Any, name: str
) -> None:
    shutil.copytree(whole, tmp_path / "r")
    path = tmp_path / "r" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    told = Told()
    try:
        with pytest.MonkeyPatch.context() as patched:
            no_training(patched)
            distill(tmp_path / "r", tell=told)
    except ValueError as error:
        told.append(str(error))
        assert name == "recipe.toml"
    else:
        assert (tmp_path / "r" / "generator.safetensors").is_file()
        again = Told()
        distill(tmp_path / "r", tell=again)
        assert again.has("finished") and again.has("rows that can be read are kept") == (name == "log.jsonl")
    assert told.has("damaged") and (told.has(name) or name == "manifest.json")  # which then contradicts another file


def test_the_second_interrupt_does_not_wait(tmp_path: Path, distill: Any, ends_equal: Any) -> None:
    def twice() -> None:
        kill_self(signal.SIGINT)()
        kill_self(signal.SIGINT)()

    with pytest.MonkeyPatch.context() as patched:
        at_step(patched, 4, twice)
        with pytest.raises(KeyboardInterrupt):
            distill(tmp_path / "r")
    assert checkpoint.load_newest(tmp_path / "r" / "checkpoints", Told())["trainer"]["step"] == 3
    distill(tmp_path / "r")
    ends_equal(tmp_path / "r")


def test_signal_handlers_are_given_back(tmp_path: Path, distill: Any) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patched:
        at_step(patched, 2, kill_self(signal.SIGTERM))
        with pytest.raises(Stopped):
            distill(tmp_path / "r")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.parametrize(("step", "save"), [(1, 1), (6, 0), (2, 1), (5, 1), (6, 1), (2, 2), (3, 2), (6, 2)])
def test_kill_in_a_step(
    tmp_path: Path, distill: Any, ends_equal: Any, in_child: Any, die: Any, step: int, save: int
) -> None:
    every = {"save": save, "log": 1, "sample": 0}

    def action() -> None:
        at_step(pytest.MonkeyPatch(), step, die)
        distill(tmp_path / "r", every=every)

    assert in_child(action) == -signal.SIGKILL
    told = Told()
    distill(tmp_path / "r", tell=told, every=every)
    resumed = (step - 1) // save * save if save else 0
    assert told.has(f"continuing at step {resumed}") == (resumed > 0) and told.has(f"{STEPS - resumed} steps in")
    ends_equal(tmp_path / "r")


@pytest.mark.parametrize("moment", [1, 2, 3, 4, 5, 6, 13, 36])
def test_kill_in_a_save(tmp_path: Path, distill: Any, ends_equal: Any, in_child: Any, die: Any, moment: int) -> None:
    """At the n-th write, sync or rename of the checkpoints; half of a write has then been done."""
    calls = 0

    def action() -> None:
        def counted(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls == moment:
                    if function.__name__ == "_write":
                        args[0].write_bytes(args[1][: len(args[1]) // 2])
                    die()
                return function(*args)

            return call

        patched = pytest.MonkeyPatch()
        for place, name in ((checkpoint, "_write"), (checkpoint, "_sync"), (checkpoint.os, "rename")):
            patched.setattr(place, name, counted(getattr(place, name)))
        distill(tmp_path / "r")

    assert in_child(action) == -signal.SIGKILL
    told = Told()
    distill(tmp_path / "r", tell=told)
    assert not told.has("damaged")
    ends_equal(tmp_path / "r")


@pytest.mark.parametrize(
    "name",
    [
        "recipe.toml",
        "generator.safetensors",
        "report.json",
        "report.html",
    ],
)
def test_kill_while_a_file_gets_its_name(
    tmp_path: Path, distill: Any, ends_equal: Any, in_child: Any, die: Any, name: str
) -> None:

    def action() -> None:
        real = os.replace

        def replace(source: Any, target: Any) -> None:
            if Path(target).name == name:
                die()
            real(source, target)

        pytest.MonkeyPatch().setattr(os, "replace", replace)
        distill(tmp_path / "r")

    assert in_child(action) == -signal.SIGKILL
    distill(tmp_path / "r")
    ends_equal(tmp_path / "r", swept=False)


def test_full_disk(tmp_path: Path, distill: Any, ends_equal: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = checkpoint._write

    def write(path: Path, content: bytes) -> None:
        if "ckpt-000000004" in str(path) and path.name == "state.json":
            path.write_bytes(content[:10])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path, content)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(checkpoint, "_write", write)
        with pytest.raises(OSError, match="No space left"):
            distill(tmp_path / "r")
    assert sorted(p.name for p in (tmp_path / "r" / "checkpoints").iterdir()) == ["ckpt-000000002", "ckpt-000000003"]
    told = Told()
    distill(tmp_path / "r", tell=told)
    assert told.has("continuing at step 3") and not told.has("damaged")
    ends_equal(tmp_path / "r")


def test_full_disk_at_the_report(tmp_path: Path, distill: Any, ends_equal: Any) -> None:
    def write(path: Path, content: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(summary, "write_atomically", write)
        with pytest.raises(OSError, match="No space left"):
            distill(tmp_path / "r")
    with pytest.MonkeyPatch.context() as patched:
        no_training(patched)
        distill(tmp_path / "r")
    ends_equal(tmp_path / "r")


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_damaged_newest_checkpoint(tmp_path: Path, distill: Any, ends_equal: Any, damage: str) -> None:
    with pytest.MonkeyPatch.context() as patched:
        at_step(patched, 4, kill_self(signal.SIGTERM))
        with pytest.raises(Stopped):
            distill(tmp_path / "r")
    path = tmp_path / "r" / "checkpoints" / "ckpt-000000004" / "state.safetensors"
    content = bytearray(path.read_bytes())
    match damage:
        case "flip":
            content[len(content) // 2] ^= 4
            path.write_bytes(content)
        case "truncate":
            path.write_bytes(content[:-100])
        case "delete":
            path.unlink()
    told = Told()
    distill(tmp_path / "r", tell=told)
    assert told.has("ckpt-000000004: damaged, skipped") and told.has("continuing at step 3")
    ends_equal(tmp_path / "r")


def test_all_checkpoints_damaged(tmp_path: Path, distill: Any, whole: Path) -> None:
    with pytest.MonkeyPatch.context() as patched:
        at_step(patched, 3, kill_self(signal.SIGTERM))
        with pytest.raises(Stopped):
            distill(tmp_path / "r")
    for path in (tmp_path / "r" / "checkpoints").rglob("manifest.json"):
        path.write_text("")
    before = snapshot(tmp_path / "r")
    with pytest.raises(ValueError, match="every checkpoint is damaged"):
        distill(tmp_path / "r")
    assert snapshot(tmp_path / "r") == before


def test_a_log_cut_short(tmp_path: Path, distill: Any, ends_equal: Any) -> None:
    """Rows behind the checkpoint and a row without its end are dropped: their steps are played again."""
    with pytest.MonkeyPatch.context() as patched:
        at_step(patched, 3, kill_self(signal.SIGTERM))
        with pytest.raises(Stopped):
            distill(tmp_path / "r")
    log = tmp_path / "r" / "log.jsonl"
    with open(log, "a") as file:
        file.write(
            log.read_text().splitlines()[-1].replace('"step": 3', '"step": 4') + '\n[]\n{"step": "x"}\n{"step": 3, "im'
        )
    distill(tmp_path / "r")
    ends_equal(tmp_path / "r")


def test_a_loss_that_is_not_finite(tmp_path: Path, distill: Any, ends_equal: Any) -> None:
    """The update is not applied, the last checkpoint stays, and the same call goes on once the cause is gone."""
    with pytest.MonkeyPatch.context() as patched:
        real = PID.loss
        spoil = {"on": False}

        def loss_of(self: PID, *args: Any) -> torch.Tensor:
            return real(self, *args) * (math.nan if spoil["on"] else 1)

        patched.setattr(PID, "loss", loss_of)
        at_step(patched, 4, lambda: spoil.update(on=True))
        with pytest.raises(NonFinite, match="turn of generator at step 3"):
            distill(tmp_path / "r")
    told = Told()
    distill(tmp_path / "r", tell=told)
    assert told.has("continuing at step 3")
    ends_equal(tmp_path / "r")


def test_micro_batches_are_one_batch(tmp_path: Path, distill: Any, weights: Any) -> None:
    template = {"network": "mlp", "width": 8, "depth": 1}
    distill(tmp_path / "one", template=template)
    distill(tmp_path / "four", template=template, micro_batches=4)
    for name, tensor in weights(tmp_path / "one").items():
        torch.testing.assert_close(weights(tmp_path / "four")[name], tensor, rtol=1e-4, atol=1e-6)


# Refusals


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"method": {"name": "pid", "N": 10}}, "method.N"),
        ({"method": {"name": "pid", "levels": {"sigma_max": 40}}}, "method.levels.sigma_max"),
        ({"batch": 9}, "batch"),
        ({"seed": 1}, "seed"),
        ({"clip": 1.0}, "clip"),
        ({"warm_start": 3}, "warm_start"),
        ({"optimizer": {"generator": {"lr": 1e-5}}}, "optimizer.generator.lr"),
        ({"template": {"network": "mlp", "width": 9, "depth": 1, "dropout": 0.3}}, "template.width"),
        ({"ema": {"half_life": 3.0}, "batch": 7}, "batch, ema.half_life"),
        ({"teacher": "exact:gaussian"}, "teacher"),
    ],
)
def test_a_changed_recipe_is_refused(whole: Path, distill: Any, keys: dict[str, Any], named: str) -> None:
    before = snapshot(whole)
    with pytest.raises(ValueError, match="other settings") as caught:
        distill(whole, **keys)
    assert f"({named})" in str(caught.value)
    assert snapshot(whole) == before


def test_a_model_whose_checkpoints_are_gone_is_not_lost(whole: Path, tmp_path: Path, distill: Any) -> None:
    out = shutil.copytree(whole, tmp_path / "r")
    shutil.rmtree(out / "checkpoints")
    before, dropout = snapshot(out), {"template": {"network": "mlp", "width": 8, "depth": 1, "dropout": 0.3}}
    with pytest.raises(ValueError, match=r"other settings \(teacher\)"):
        distill(out, "exact:gaussian", **dropout)
    with pytest.raises(ValueError, match=r"^out: .* holds a model without the checkpoints to go on from"):
        distill(out, steps=STEPS + 1, **dropout)
    assert snapshot(out) == before
    told = Told()
    assert distill(out, tell=told, **dropout) == report(whole)
    assert told.has(f"finished at step {STEPS}")
    assert snapshot(out)["log.jsonl"] == before["log.jsonl"]


def test_a_teacher_read_in_another_way_is_another_teacher(tmp_path: Path, distill: Any) -> None:
    """The same weights in another convention, as after a card that was corrected."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = MLP((2,), width=8, depth=1)
    read = {unit: Preconditioned(network, (2,), noise_unit=unit) for unit in (1.0, 2.0)}
    keys = {"evaluate": {"samples": 50, "teacher_steps": 3, "data": "exact:ring8"}, "template": {}}
    distill(tmp_path / "r", read[1.0], **keys)
    with pytest.raises(ValueError, match=r"^out: .* was begun with another teacher"):
        distill(tmp_path / "r", read[2.0], **keys)
    # a run of an earlier version, which did not write down how, goes on
    (newest,) = (p for p in (tmp_path / "r" / "checkpoints").iterdir() if p.name.endswith(str(STEPS)))
    state = json.loads((newest / "state.json").read_text())
    assert len(state["identity"]) == 128
    job = run.distillation(
        config.resolve(config.read_toml(tmp_path / "r" / "recipe.toml") | {"teacher": "exact:ring8"}, METHODS),
        tmp_path / "other", Told(), read[2.0],
    )  # fmt: skip
    assert not job.began_with(state["identity"]) and job.began_with(state["identity"][:64])


def test_another_network_of_the_callers_is_refused(tmp_path: Path, distill: Any) -> None:
    """A recipe does not say of which class it is."""

    class Wide(nn.Module):
        def __init__(self, width: int = 3) -> None:
            super().__init__()
            self.inner = nn.Linear(2, width)
            self.outer = nn.Linear(width, 2)

        def forward(self, x: Tensor, c_noise: Tensor, cond: Tensor | None) -> Tensor:
            return self.outer(self.inner(x))

    class Wider(Wide):
        def __init__(self) -> None:
            super().__init__(5)

    keys = {"template": {}, "network": Wide}
    distill(tmp_path / "r", **keys)
    before = snapshot(tmp_path / "r")
    for other in (Wider, None):
        with pytest.raises(ValueError, match=r"^network: .* was begun with another network; give the same --network$"):
            distill(tmp_path / "r", **{**keys, "network": other})
    assert {name: now for name, now in snapshot(tmp_path / "r").items() if name in before} == before


def test_micro_batches_may_change_and_that_is_told(tmp_path: Path, distill: Any, weights: Any, whole: Path) -> None:
    keys = {"template": {"network": "mlp", "width": 8, "depth": 1}}
    distill(tmp_path / "whole", **keys)
    with pytest.MonkeyPatch.context() as patched:
        at_step(patched, 3, kill_self(signal.SIGTERM))
        with pytest.raises(Stopped):
            distill(tmp_path / "r", **keys)
    told = Told()
    distill(tmp_path / "r", micro_batches=4, keep=1, tell=told, **keys)  # how many checkpoints are kept may change too
    assert [line for line in told if line.startswith("micro_batches: ")] == [
        "micro_batches: 1 before, 4 now; results will not be bit-equal to an uninterrupted run"
    ]
    for name, tensor in weights(tmp_path / "whole").items():
        torch.testing.assert_close(weights(tmp_path / "r")[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["threads", "versions"])
def test_other_threads_or_versions_are_told(tmp_path: Path, distill: Any, name: str) -> None:
    with pytest.MonkeyPatch.context() as patched:
        at_step(patched, 3, kill_self(signal.SIGTERM))
        with pytest.raises(Stopped):
            distill(tmp_path / "r")
    told = Told()
    with pytest.MonkeyPatch.context() as patched:
        if name == "threads":
            patched.setattr(torch, "get_num_threads", lambda: 5)
        else:
            patched.setattr(loop, "versions", lambda: {"torch": "9"})
        distill(tmp_path / "r", tell=told)
    assert sum(line.startswith(f"{name}: ") and "not be bit-equal" in line for line in told) == 1


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_more_steps_are_another_schedule(tmp_path: Path, distill: Any, weights: Any, schedule: str) -> None:
    keys = {"optimizer": {"generator": {"lr": 1e-3, "schedule": schedule}}}
    distill(tmp_path / "whole", steps=6, **keys)
    distill(tmp_path / "r", steps=4, **keys)
    told = Told()
    distill(tmp_path / "r", steps=6, tell=told, **keys)
    line = "steps: 4 before, 6 now; results will not be bit-equal to an uninterrupted run"
    assert (line in told) == (schedule == "cosine")
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "r")
    assert all(torch.equal(one[name], other[name]) for name in one) == (schedule == "constant")


def test_fewer_steps_are_refused(whole: Path, distill: Any) -> None:
    before = snapshot(whole)
    with pytest.raises(ValueError, match=r"^steps: .*can grow but not shrink"):
        distill(whole, steps=5)
    assert snapshot(whole) == before


def test_more_steps_go_on(tmp_path: Path, distill: Any, weights: Any, equal: Any) -> None:
    flat = {"optimizer": {"generator": {"schedule": "constant"}}}
    distill(tmp_path / "long", steps=8, **flat)
    distill(tmp_path / "grown", **flat)
    told = Told()
    result = distill(tmp_path / "grown", steps=8, tell=told, **flat)
    assert told.has("continuing at step 6") and result["steps"] == 8 == report(tmp_path / "grown")["steps"]
    assert tomllib.loads((tmp_path / "grown" / "recipe.toml").read_text())["steps"] == 8
    assert [row["step"] for row in rows(tmp_path / "grown")] == list(range(1, 9))
    # with a constant rate the length of the run decides nothing else
    assert equal(weights(tmp_path / "grown"), weights(tmp_path / "long"))


def test_periods_and_evaluation_may_change(tmp_path: Path, distill: Any, ends_equal: Any) -> None:
    with pytest.MonkeyPatch.context() as patched:
        at_step(patched, 2, kill_self(signal.SIGTERM))
        with pytest.raises(Stopped):
            distill(tmp_path / "r", every={"save": 0, "log": 1, "sample": 1}, evaluate={"samples": 100})
    distill(tmp_path / "r")
    ends_equal(tmp_path / "r")


@pytest.mark.parametrize("name", ["notes.txt", "generator.safetensors", "log.jsonl", ".hidden"])
def test_a_folder_with_other_files(tmp_path: Path, distill: Any, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=r"^out: .*holds other files"):
        distill(tmp_path)
    assert snapshot(tmp_path) == {name: b"mine"}


def test_a_folder_that_is_a_file(tmp_path: Path, distill: Any) -> None:
    (tmp_path / "r").write_text("mine")
    with pytest.raises(ValueError, match=r"^out: .*is a file"):
        distill(tmp_path / "r")
    assert (tmp_path / "r").read_text() == "mine"


def test_an_empty_folder_is_fine(tmp_path: Path, distill: Any, ends_equal: Any) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / ".lock").touch()  # of a run that was killed before its first file
    distill(tmp_path / "r")
    ends_equal(tmp_path / "r")


@pytest.mark.parametrize("content", ["steps = = 3", ""])
def test_a_damaged_recipe_file(tmp_path: Path, distill: Any, content: str) -> None:
    (tmp_path / "recipe.toml").write_text(content)
    with pytest.raises(ValueError):
        distill(tmp_path)
    assert snapshot(tmp_path) == {"recipe.toml": content.encode()}


def test_another_teacher_of_the_same_name(tmp_path: Path, distill: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    law = tmp_path / "law.toml"
    law.write_text("weights = [1, 2]\nmeans = [[0, 0], [1, 1]]\nstds = 0.5\n")
    with pytest.MonkeyPatch.context() as patched:
        at_step(patched, 2, kill_self(signal.SIGTERM))
        with pytest.raises(Stopped):
            distill(tmp_path / "r", "exact:law.toml")
    before = snapshot(tmp_path / "r")
    law.write_text("weights = [1, 2]\nmeans = [[0, 0], [1, 1.001]]\nstds = 0.5\n")
    with pytest.raises(ValueError, match="another teacher, data set or generator of the same name"):
        distill(tmp_path / "r", "exact:law.toml")
    assert snapshot(tmp_path / "r") == before
    law.write_text("# a comment changes nothing\nweights = [1, 2]\nmeans = [[0, 0], [1, 1]]\nstds = 0.5\n")
    assert distill(tmp_path / "r", "exact:law.toml")["steps"] == STEPS


def test_lock(tmp_path: Path, distill: Any, ends_equal: Any) -> None:
    """A second run in the same folder is refused while the first one runs, and changes nothing."""
    refusals = []

    def second() -> None:
        before = snapshot(tmp_path / "r")
        with pytest.raises(ValueError, match="in use by another run") as caught:
            distill(tmp_path / "r")
        refusals.append(str(caught.value))
        assert snapshot(tmp_path / "r") == before

    with pytest.MonkeyPatch.context() as patched:
        at_step(patched, 3, second)
        distill(tmp_path / "r")
    # `play` of the second run is never reached, so the first one asks once
    assert len(refusals) == 1 and refusals[0].startswith("out: ")
    ends_equal(tmp_path / "r")


def test_the_lock_ends_with_its_process(tmp_path: Path, distill: Any, in_child: Any, die: Any, ends_equal: Any) -> None:
    def action() -> None:
        at_step(pytest.MonkeyPatch(), 3, die)
        distill(tmp_path / "r")

    assert in_child(action) == -signal.SIGKILL
    with open(tmp_path / "r" / ".lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    distill(tmp_path / "r")
    ends_equal(tmp_path / "r")


@pytest.mark.parametrize(
    "keys",
    [
        {"stpes": 3},
        {"steps": "many"},
        {"data": "digits"},
        {"teacher": "exact:nowhere"},
        {"method": "nowhere"},
        {"template": {"network": "nowhere"}},
        {"template": {"network": "dit"}},
        {"template": {"network": "mlp", "width": 0}},
        {"optimizer": {"fake": {"lr": 1e-3}}},
    ],
)
def test_bad_input_writes_nothing(tmp_path: Path, distill: Any, keys: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        distill(tmp_path / "r", **keys)
    assert not (tmp_path / "r").exists()


def test_levels_outside_the_teachers_range(tmp_path: Path, distill: Any) -> None:
    teacher = Gaussian([0.0, 0.0], 0.5)
    teacher.sigma_max, teacher.sigma_min = 10.0, 0.01
    wide = {"name": "pid", "levels": {"sigma_min": 0.002, "sigma_max": 79}}
    with pytest.raises(ValueError, match=r"^method\.levels\.sigma_min: .*outside the teacher's range of 0\.01 to 10"):
        distill(tmp_path / "r", teacher, method=wide)
    low = {"name": "pid", "levels": {"sigma_min": 0.01}}
    with pytest.raises(ValueError, match=r"^method\.levels\.sigma_max: 80 is level 80"):
        distill(tmp_path / "r", teacher, method=low)
    assert not (tmp_path / "r").exists()
    levels = {"sigma_min": 0.01, "sigma_max": 10}
    distill(tmp_path / "r", teacher, method={"name": "pid", "levels": levels})
    distill(tmp_path / "r", teacher)  # the default levels are cut to the same range


# Other teachers


def test_a_denoiser_as_teacher(tmp_path: Path, distill: Any) -> None:
    law = Mixture([1, 3], [[0.0, 0.0, 0.0], [2.0, 2.0, 2.0]], [0.1, 0.2])
    told = distill(tmp_path / "r", law, every={"sample": 3})
    assert told["teacher"] == "<limbeck.exact.Mixture>" and told["student"]["nfe"] == 1
    assert limbeck.load(tmp_path / "r").shape == (3,)
    with pytest.raises(ValueError, match=r"other settings \(teacher\)"):
        distill(tmp_path / "r")
    with pytest.raises(ValueError, match="another teacher"):
        distill(tmp_path / "r", Mixture([1, 3], [[0.0, 0.0, 0.0], [2.0, 2.0, 2.0]], [0.1, 0.3]))


def test_conditional_images(tmp_path: Path, distill: Any, weights: Any, equal: Any) -> None:
    """The bundled digits: labels, a student of the teacher's own network, image scores; interrupted and resumed."""
    keys = {
        "template": {},
        "batch": 4,
        "steps": 3,
        "evaluate": {"samples": 40, "teacher_steps": 2},
        "every": {"sample": 3},
    }
    told = distill(tmp_path / "a", "digits", **keys)
    for column in ("student", "teacher_scores"):
        assert {"fd_feature", "fd_pixel", "class_accuracy"} <= told[column]["metrics"].keys()
    # the floor is that of 40 images; in pixels it is known for 10,000 only, and says so
    assert {"fd_feature", "class_accuracy"} <= told["floor"]["metrics"].keys() and told["floor"]["samples"] == 40
    assert "fd_pixel" not in told["floor"]["metrics"] and "fd_pixel is known for 10,000 only" in told["floor"]["note"]
    assert limbeck.load(tmp_path / "a").classes == 10
    assert [p.name for p in (tmp_path / "a" / "samples").iterdir()] == ["step-000000003.png"]
    with pytest.MonkeyPatch.context() as patched:
        at_step(patched, 2, kill_self(signal.SIGTERM))
        with pytest.raises(Stopped):
            distill(tmp_path / "b", "digits", **keys)
    distill(tmp_path / "b", "digits", **keys)
    assert equal(weights(tmp_path / "a"), weights(tmp_path / "b"))


# Teaching


@pytest.fixture
def images(tmp_path: Path) -> str:
    """Sixty 8-bit images of 5 x 4 pixels: class k has its k-th row white."""
    rng = np.random.default_rng(0)
    y = np.arange(60) % 3
    x = rng.integers(0, 60, (60, 5, 4, 1)).astype(np.uint8)
    x[np.arange(60), y] = 255
    np.savez(tmp_path / "images.npz", x=x, y=y)
    return str(tmp_path / "images.npz")


@pytest.fixture
def points(tmp_path: Path) -> str:
    np.savez_compressed(tmp_path / "points.npz", x=np.random.default_rng(0).normal(size=(50, 2)) * 3)
    return str(tmp_path / "points.npz")


def test_teach_images(tmp_path: Path, tiny: dict[str, Any], images: str, weights: Any, equal: Any) -> None:
    keys = {**tiny, "every": {"save": 1, "log": 1, "sample": 3}}
    told = limbeck.teach(images, out=tmp_path / "a", tell=Told(), **keys)
    assert (told["kind"], told["data"], told["steps"], told["teacher"]) == ("denoiser", images, STEPS, None)
    assert told["method"]["name"] == "denoising" and "student" not in told
    assert sorted(p.name for p in (tmp_path / "a" / "samples").iterdir()) == [
        "step-000000003.png",
        "step-000000006.png",
    ]
    assert [row["step"] for row in rows(tmp_path / "a")] == list(range(1, STEPS + 1))
    denoiser = teachers.load(str(tmp_path / "a"))
    assert (denoiser.shape, denoiser.classes) == ((1, 5, 4), 3)
    x = np.load(images)["x"] / 127.5 - 1
    assert denoiser.sigma_data == pytest.approx(np.sqrt((x**2).mean()), rel=1e-6)
    with pytest.MonkeyPatch.context() as patched:
        at_step(patched, 3, kill_self(signal.SIGTERM))
        with pytest.raises(Stopped):
            limbeck.teach(images, out=tmp_path / "b", tell=Told(), **keys)
    limbeck.teach(images, out=tmp_path / "b", tell=Told(), **keys)
    assert equal(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_teach_points_and_distil_them(tmp_path: Path, tiny: dict[str, Any], distill: Any, points: str) -> None:
    limbeck.teach(points, out=tmp_path / "teacher", tell=Told(), **{**tiny, "every": {"sample": 6}})
    with Image.open(tmp_path / "teacher" / "samples" / "step-000000006.png") as image:
        assert image.size == (320, 320)
    told = Told()
    result = distill(tmp_path / "student", str(tmp_path / "teacher"), template={}, tell=told)
    assert "student" not in result and told.has("no scores: there is nothing to compare with")
    assert limbeck.load(tmp_path / "student").denoiser.network.arguments["width"] == 8  # the teacher's own network


def test_other_data_of_the_same_name(tmp_path: Path, tiny: dict[str, Any], points: str) -> None:
    with pytest.MonkeyPatch.context() as patched:
        at_step(patched, 2, kill_self(signal.SIGTERM))
        with pytest.raises(Stopped):
            limbeck.teach(points, out=tmp_path / "r", tell=Told(), **tiny)
    np.savez(points, x=np.random.default_rng(1).normal(size=(50, 2)))
    with pytest.raises(ValueError, match="another teacher, data set or generator of the same name"):
        limbeck.teach(points, out=tmp_path / "r", tell=Told(), **tiny)


def test_teach_a_classifier(tmp_path: Path, tiny: dict[str, Any], images: str) -> None:
    quick = {"classifier": {"lr": 1e-2, "warmup": 0, "schedule": "constant"}}
    keys = {**tiny, "template": {}, "steps": 60, "batch": 16, "every": {"sample": 10}, "optimizer": quick}
    told = limbeck.teach(
        images, {"name": "classification", "width": 4, "features": 5}, out=tmp_path / "r", tell=Told(), **keys
    )
    assert told["kind"] == "classifier" and 0.5 < told["student"]["metrics"]["held_out_accuracy"] <= 1
    assert (tmp_path / "r" / "classifier.safetensors").is_file() and not (tmp_path / "r" / "samples").exists()
    network = limbeck.features.load(str(tmp_path / "r"))
    assert network(torch.zeros(2, 1, 5, 4)).shape == (2, 5)


def test_scores_against_own_data(tmp_path: Path, tiny: dict[str, Any], images: str, distill: Any) -> None:
    """evaluate.data and evaluate.features give a teacher without bundled reference its scores."""
    small = {**tiny, "template": {}, "steps": 2}
    limbeck.teach(images, {"name": "classification", "width": 4}, out=tmp_path / "classifier", tell=Told(), **small)
    evaluate = {"samples": 50, "teacher_steps": 2, "data": images, "features": str(tmp_path / "classifier")}
    told = limbeck.teach(images, out=tmp_path / "teacher", tell=Told(), **{**tiny, "evaluate": evaluate})
    assert {"fd_feature", "fd_pixel"} <= told["student"]["metrics"].keys() and told["student"]["nfe"] == 3
    told = distill(tmp_path / "student", str(tmp_path / "teacher"), template={}, evaluate=evaluate)
    assert told["teacher_scores"]["nfe"] == 3 and told["student"]["nfe"] == 1


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (
            lambda out, images, points: limbeck.teach(points, "classification", out=out),
            "at least 2 classes|needs images",
        ),
        (lambda out, images, points: limbeck.teach(images, out=out, teacher="digits"), "^teacher: belongs to"),
        (lambda out, images, points: limbeck.teach(images, "pid", out=out), "^method.name: unknown method 'pid'"),
        (lambda out, images, points: limbeck.teach("nowhere.npz", out=out), "^data: no file or folder 'nowhere.npz'"),
        (
            lambda out, images, points: limbeck.teach(images, out=out, evaluate={"data": images}),
            "^evaluate.features: a reference needs",
        ),
    ],
)
def test_bad_teaching_writes_nothing(tmp_path: Path, images: str, points: str, call: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        call(tmp_path / "r", images, points)
    assert not (tmp_path / "r").exists()


def test_killed_at_the_end_of_a_grown_run(tmp_path: Path, distill: Any, in_child: Any, die: Any) -> None:
    distill(tmp_path / "r")

    def action() -> None:
        pytest.MonkeyPatch().setattr(run.artifact, "save", lambda *args: die())
        distill(tmp_path / "r", steps=8)

    assert in_child(action) == -signal.SIGKILL
    assert distill(tmp_path / "r", steps=8)["steps"] == 8


def test_a_finished_run_is_scored_as_its_recipe_says(tmp_path: Path, distill: Any) -> None:
    distill(tmp_path / "r")
    assert distill(tmp_path / "r", evaluate={"samples": 300, "teacher_steps": 5})["teacher_scores"]["nfe"] == 9


def test_a_finished_run_without_its_model(tmp_path: Path, distill: Any) -> None:
    distill(tmp_path / "r")
    (tmp_path / "r" / "generator.safetensors").unlink()
    distill(tmp_path / "r")
    assert (tmp_path / "r" / "generator.safetensors").is_file()


def test_dotted_keys_of_a_method_given_by_name(tmp_path: Path, distill: Any) -> None:
    assert distill(tmp_path / "r", **{"method.N": 10})["method"]["N"] == 10


def test_a_network_that_cannot_be_stored_is_refused_at_once(tmp_path: Path, distill: Any) -> None:
    class Mine(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(2, 2)

        def forward(self, x: torch.Tensor, noise: torch.Tensor, cond: torch.Tensor | None = None) -> torch.Tensor:
            return self.layer(x)

    teacher = limbeck.denoiser.Preconditioned(Mine(), (2,))
    with pytest.raises(ValueError, match="template"):
        distill(tmp_path / "r", teacher, template={})
    assert not (tmp_path / "r").exists()


def test_a_run_that_never_began_may_be_corrected(tmp_path: Path, distill: Any) -> None:
    with pytest.raises(ValueError, match="reads samples of shape"):
        distill(tmp_path / "r", method={"name": "pid", "metric": "features", "features": "digits"})
    distill(tmp_path / "r")
