"""How fast samples are drawn, as a report tells it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor

from limbeck import cli, speed, summary, teachers
from limbeck.denoiser import Denoiser
from limbeck.generator import FewStep, OneStep


class Slow(Denoiser):
    """A call takes 2 ms, or a millisecond for each sample of a larger batch, on a clock of its own."""

    now = 0.0

    def forward(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
        self.now += 0.001 * max(2, len(x))
        return x


@pytest.mark.parametrize(("limit", "batch", "most"), [(0.05, 16, 200), (0.004, 1, 12)])
def test_a_slow_teacher_is_extrapolated(limit: float, batch: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = Slow((2,), 0, 0.5, 0.002, 80.0)
    monkeypatch.setattr(speed, "LIMIT", limit)
    monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=lambda: teacher.now))
    calls: list[int] = []
    teacher.register_forward_hook(lambda module, args, out: calls.append(len(args[0])))
    told = speed.measure(OneStep(teacher, 1.0), teacher, steps=10, onnx=False)
    assert set(told) == {"student", "teacher, 19 NFE"} and len(calls) < most
    student, solved = told.values()
    assert student["batch"] == solved["batch"] == batch
    assert student["ms_at_batch_1"] == pytest.approx(2) and solved["ms_at_batch_1"] == pytest.approx(19 * 2)
    assert student["images_per_second"] == pytest.approx(1000 if batch > 1 else 500)
    assert solved["images_per_second"] == pytest.approx((1000 if batch > 1 else 500) / 19)


def test_makers_have_latents_of_their_own() -> None:
    teacher = Slow((2,), 0, 0.5, 0.002, 80.0)
    makers = speed.makers_of(FewStep(teacher, [1.0, 0.5]), teacher, 4, 4)
    told = speed.sampling(makers, 1, 1)
    assert set(told["student"]) == set(told["teacher, 7 NFE"]) == {
        "batch", "seconds_of_a_batch", "images_per_second", "seconds_of_one", "ms_at_batch_1",
    }  # fmt: skip


def test_onnx_runtime_is_timed_too() -> None:
    digits = teachers.load("digits")
    told = speed.measure(OneStep(digits, 1.0).eval(), digits, steps=4, onnx=True)
    assert set(told) == {"student", "teacher, 7 NFE", "student, ONNX"}
    assert all(row["images_per_second"] > 0 for row in told.values())
    (line, *_) = speed.lines(told)
    assert line.startswith("student: ") and "samples/s in batches of 64" in line


def test_a_report_tells_it(tmp_path: Path, tiny_keys: list[str], capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    measure = speed.measure
    monkeypatch.setattr(speed, "measure", lambda *a, onnx: asked.append(onnx) or measure(*a, onnx=False))
    assert cli.main(["distill", "exact:ring8", "--out", str(tmp_path / "r"), *tiny_keys]) == 0
    told = json.loads((tmp_path / "r" / "report.json").read_text())["speed"]
    assert set(told) == {"student", "teacher, 7 NFE"} and "teacher, 7 NFE: " in capsys.readouterr().err
    assert "Teacher, 7 NFE: samples per second, and one alone" in (tmp_path / "r" / "report.html").read_text()
    assert asked == [False] and summary.EXPORTED > 60  # an export takes seconds: only after long runs
    assert torch.is_grad_enabled()


def test_long_runs_are_timed_in_onnx_runtime(
    tmp_path: Path, tiny_keys: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a runtime that cannot run them costs a number, not the report."""
    monkeypatch.setattr(summary, "EXPORTED", -1.0)
    assert cli.main(["distill", "exact:ring8", "--out", str(tmp_path / "a"), *tiny_keys]) == 0
    assert "student, ONNX" in json.loads((tmp_path / "a" / "report.json").read_text())["speed"]

    class NotImplementedThere(Exception):
        pass

    def broken(*args: Any, **kwargs: Any) -> None:
        raise NotImplementedThere("no kernel")

    monkeypatch.setattr(onnxruntime, "InferenceSession", broken)
    assert cli.main(["distill", "exact:ring8", "--out", str(tmp_path / "b"), *tiny_keys]) == 0
    assert "student, ONNX" not in json.loads((tmp_path / "b" / "report.json").read_text())["speed"]
