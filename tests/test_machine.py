"""What a result says of where it was measured, and the checks that write results."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from limbeck import artifact, machine, run, teachers
from limbeck.denoiser import Denoiser, Preconditioned

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(shutil.which("git") is None, reason="no git: commits were not looked at")
def test_the_commit_is_that_of_limbeck(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment inside somebody's repository names no commit; a checkout does, with "+" for changes."""

    def git(*arguments: str) -> None:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True)

    package = tmp_path / "lib" / "limbeck"
    package.mkdir(parents=True)
    (package / "machine.py").write_text("")
    (tmp_path / "theirs.py").write_text("")
    git("init")
    git("add", "theirs.py")
    git("commit", "-m", "theirs")
    monkeypatch.setattr(machine, "__file__", str(package / "machine.py"))
    assert machine.commit() is None
    git("add", "-A")
    git("commit", "-m", "ours")
    known = machine.commit()
    assert known is not None and len(known) == 40
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "ours.json").write_text("{}")
    assert machine.commit() == known
    (tmp_path / "theirs.py").write_text("changed")
    assert machine.commit() == f"{known}+"


def test_the_checks_of_trend_and_time_can_fail(tool: Callable[[str], ModuleType]) -> None:
    accept = tool("accept")

    def holds(*rows: tuple[float, float]) -> list[bool]:
        summary = [{"euler": solver, "student": student} for solver, student in rows]
        return [good for _, good in accept.trend({"summary": summary})]

    assert holds((2, 3), (9, 9), (1, 2)) == [True, True]
    assert holds((2, 3), (1, 4)) == [True, False] and holds((2, 3), (3, 1)) == [False, True]


def test_the_demo_is_measured_by_its_own_command(
    tool: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    accept, clock = tool("accept"), [0.0]
    makefile = (ROOT / "Makefile").read_text()
    assert "METHOD ?= sid" in makefile and "distill recipes/digits-$(METHOD).toml --out runs/demo-$(METHOD)" in makefile
    monkeypatch.setattr(accept, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    for seconds, score in ((200.0, 0.08), (400.0, 0.09)):

        def played(command: list[str], seconds: float = seconds, score: float = score, **keys: Any) -> None:
            assert command[1:4] == ["-m", "limbeck", "distill"] and command[4].endswith("recipes/digits-sid.toml")
            out = Path(command[6])
            assert keys["check"] and keys["env"]["OMP_NUM_THREADS"] == "2" and not out.exists()
            out.mkdir()
            scores = {"student": score, "teacher_scores": 0.07}
            report = {who: {"metrics": {"fd_feature": value}} for who, value in scores.items()}
            (out / "report.json").write_text(json.dumps(report))
            clock[0] += seconds

        monkeypatch.setattr(accept, "subprocess", SimpleNamespace(run=played))
        result = accept.first_minutes()
        assert result["seconds"] == seconds
        assert [good for _, good in result["checks"]] == [seconds < 300, score <= 1.2 * 0.07]


# --- the range of taught teachers ---------------------------------------------------------------------------------

DIGITS = "a3c9fd7ee7ac50798241a384ba5dc2160df52bc20887620f208e0fd3938ac7ca"  # fingerprint before the range was stored


def test_the_bundled_teacher_knows_its_range_and_kept_its_weights() -> None:
    digits = teachers.load("digits")
    assert artifact.fingerprint(digits) == DIGITS
    assert digits.sigma_min / digits.unit == pytest.approx(0.002, rel=1e-12)
    assert digits.sigma_max / digits.unit == pytest.approx(80, rel=1e-12)


def test_teaching_stores_the_range(tmp_path: Path, tiny: dict[str, Any]) -> None:
    tiny = {**tiny, "template": {"network": "mlp", "width": 8, "depth": 1}}
    run.teach("digits", out=tmp_path / "t", tell=lambda line: None, **tiny)
    taught = teachers.load(str(tmp_path / "t"))
    digits = teachers.load("digits")
    assert (taught.sigma_min, taught.sigma_max) == pytest.approx((digits.sigma_min, digits.sigma_max), rel=1e-6)


def test_runs_without_a_stored_range_can_be_continued(
    tmp_path: Path, tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Teaching and distilling begun when teachers claimed all levels go on with the range, bit for bit."""
    limitless = Denoiser.__init__

    def old(self: Any, *args: Any, **keys: Any) -> None:
        limitless(self, *args[:3], *[keys[k] for k in ("shape", "classes", "sigma_data") if k in keys])

    told: list[str] = []
    for verb in (run.teach, run.distill):
        weights = []
        for name, steps in (("cut", 3), ("whole", 6)):
            out = tmp_path / f"{verb.__name__}-{name}"
            if name == "cut":
                with monkeypatch.context() as patched:
                    patched.setattr(Denoiser, "__init__", old)
                    patched.setattr(artifact, "reading", lambda module: "")  # nor did runs store how they were read
                    verb("digits", out=out, tell=told.append, **{**tiny, "steps": steps, "optimizer": {}})
            verb("digits", out=out, tell=told.append, **tiny)
            kind = "denoiser" if verb is run.teach else "generator"
            model = artifact.load(out / f"{kind}.safetensors", kind)
            home = model if isinstance(model, Preconditioned) else model.denoiser
            assert home.sigma_max < 200
            weights.append(model.state_dict())
        assert any("continuing at step 3" in line for line in told)
        told.clear()
        assert weights[0].keys() == weights[1].keys()
        assert all(torch.isfinite(value).all() for value in weights[0].values())
