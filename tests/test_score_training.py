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


UNI = ("reverse_kl", "forward_kl", "jeffreys")
GATES = {"fake_first": 12_800, "adversarial": {"after": 25_600}}  # in 76,800 images
CASES: dict[str, tuple[Any, float]] = {
    "diff_instruct": ("diff_instruct", 0.025),
    "sid": ("sid", 0.025),
    "sim": ("sim", 0.025),
    "dmd": ({"name": "dmd", "pairs": 2000, "regression": 0.1}, 0.01),
    "dmd2": ({"name": "dmd2", "game": {"fake_steps": 2}}, 0.025),
    "f_distill": ("f_distill", 0.025),
    "sida": ({"name": "sida", "game": GATES}, 0.025),
    "uni_instruct": ({"name": "uni_instruct", "game": {"adversarial": {"after": 25_600}}}, 0.025),
}
CASES |= {f"uni_instruct, {f}": ({**CASES["uni_instruct"][0], "divergence": f}, 0.025) for f in UNI}


@pytest.mark.parametrize("name", CASES)
def test_ring8_in_a_short_run(name: str, tmp_path: Path) -> None:
    """Every mode is found and holds a fifth of its share, from a start whose samples hold none of it; DMD a twelfth."""
    method, least = CASES[name]
    told = limbeck.distill("exact:ring8", method, out=tmp_path / "run", tell=lambda line: None, **SHORT)
    metrics = told["student"]["metrics"]
    shares = [value for name, value in metrics.items() if name.startswith("share_")]
    assert metrics["mmd"] <= 0.2 and min(shares) >= least and max(shares) <= 0.25
