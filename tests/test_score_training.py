"""The score family trained on ring8: a short form of what `make accept` checks at full length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import limbeck

SHORT: dict[str, Any] = {
    "steps": 600, "batch": 128, "warm_start": 800, "stratified": True, "template": {"width": 64},
    "every": {"sample": 0, "save": 600, "log": 200}, "evaluate": {"samples": 2000, "teacher_steps": 4},
}  # fmt: skip


@pytest.mark.parametrize(
    "method",
    ["diff_instruct", "sid", {"name": "dmd2", "game": {"fake_steps": 2}}],
    ids=["diff_instruct", "sid", "dmd2"],
)
def test_ring8_in_a_short_run(method: Any, tmp_path: Path) -> None:
    """Every mode is found and holds its share within a factor of five, from a start whose samples hold none of it."""
    told = limbeck.distill("exact:ring8", method, out=tmp_path / "run", tell=lambda line: None, **SHORT)
    metrics = told["student"]["metrics"]
    shares = [value for name, value in metrics.items() if name.startswith("share_")]
    assert metrics["mmd"] <= 0.2 and min(shares) >= 0.025 and max(shares) <= 0.25
