"""Faults injected in short, of most kinds that `make faults` knows; and every method resumed at every step."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import faults
import pytest

import limbeck
from limbeck.methods import METHODS

SHORT = faults.SIZES["short"]


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # Python 3.12: forking a process with threads
# hostile teachers are in test_import.py already
@pytest.mark.parametrize("fault", ["kill -9 at a step", "full disk", "damaged files", "malformed input"])
def test_faults_do_no_harm(fault: str) -> None:
    with faults.workplace() as folder:
        row = faults.Row(fault)
        faults.FAULTS[fault](row, folder, SHORT, random.Random(fault))
    assert row.injected >= {"full disk": 2, "kill -9 at a step": len(METHODS)}.get(fault, 50)
    assert row.holds, row.notes


def test_the_harness_sees_what_goes_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without hashes damage passes as sound, and the row says so."""
    monkeypatch.setattr(limbeck.artifact, "check", lambda path, card, tensors: None)
    with faults.workplace() as folder:
        row = faults.Row("damaged files")
        assert faults.start(folder / "sid-whole", "sid").end() == 0
        faults.files(row, folder / "sid-whole", folder, SHORT, random.Random(0))
    assert row.wrong > 5 and not row.holds and "opened as if sound" in row.notes[0]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_resumes_at_every_step(tmp_path: Path, tiny: dict[str, Any], method: str) -> None:
    steps, told = 5, list[str]()
    keys = {**tiny, "steps": steps, "keep": 9, "warm_start": 3, "evaluate": {"samples": 20, "teacher_steps": 2}}
    limbeck.distill("exact:ring8", method, out=tmp_path / "whole", tell=told.append, **keys)
    last = f"checkpoints/ckpt-{steps:09d}/state.safetensors"
    for step in range(1, steps):
        out = tmp_path / f"from-{step}"
        shutil.copytree(tmp_path / "whole", out)
        for name in ("report.json", "report.html", "generator.safetensors", "manifest.json"):
            (out / name).unlink()
        for later in range(step + 1, steps + 1):
            shutil.rmtree(out / f"checkpoints/ckpt-{later:09d}")
        told.clear()
        limbeck.distill("exact:ring8", method, out=out, tell=told.append, **keys)
        assert any(f"continuing at step {step}" in line for line in told)
        assert (out / last).read_bytes() == (tmp_path / "whole" / last).read_bytes()
        assert not any("bit-equal" in line for line in told)
