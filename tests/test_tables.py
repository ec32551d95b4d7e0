"""The tables of README and docs, from results that are made up."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

WHERE = {
    "machine": {"processor": "a machine", "threads": 1}, "versions": {"torch": "2"}, "commit": "0123456789ab+",
}  # fmt: skip


@pytest.fixture
def tables(tool: Callable[[str], ModuleType]) -> ModuleType:
    return tool("tables")


def run(variant: str, seed: int, scores: dict[int, float]) -> dict[str, Any]:
    """A run whose scores on the way are given by images."""
    history = [{"images": n, "seconds": n / 10, "metrics": {"fd": score}} for n, score in scores.items()]
    last = max(scores)
    settings = {"variant": variant, "seed": seed}
    return {"settings": settings, "images": last, "history": history, "student": {"metrics": {"fd": scores[last]}}}


def test_switches_are_compared_at_the_base_s_own_quality(tables: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quality: 1.05 times the mean of the base's final scores, 1.0 here, which takes it 300 and 400 images."""
    rows = [
        run("a", 1, {100: 3.0, 200: 2.0, 300: 1.2, 400: 1.0}),
        run("a", 0, {100: 3.0, 200: 2.0, 300: 1.0, 400: 1.0}),
        run("a + on", 0, {100: 2.0, 200: 1.04, 300: 1.2, 400: 0.9}),
        run("a + on", 1, {100: 1.05, 200: 1.0, 300: 1.2, 400: 0.9}),
        run("a + worse", 0, {400: 0.5}),
        run("a + worse", 1, {400: 1.1}),
        run("a + tuned", 0, {100: 0.2}),
        run("a + tuned", 1, {100: 0.2}),
        run("b", 0, {100: 3.0, 200: 1.0}),
        run("b", 1, {100: 3.0, 200: 1.0}),
        run("b + tuned", 0, {100: 1.0}),
        run("b + tuned", 1, {100: 1.0}),
    ]
    monkeypatch.setattr(tables, "stored", lambda name: {"metric": "fd", "rows": rows, "missing": ["one"], **WHERE})
    told = tables.switches("any").splitlines()
    cells = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ") for line in told if line.startswith("| ")}
    assert cells["a"][3:] == ["2 of 2", "350 ± 71", "1.00 (1.00 to 1.00)"]
    assert cells["a + on"][3:] == ["2 of 2", "150 ± 71", "2.33 (1.50 to 4.00)"]
    assert cells["a + worse"][3:] == ["1 of 2", "-", "-"]
    assert "`tuned`: 2.75 times fewer images, the median of 2 methods." in told  # 3.5 and 2
    assert "1 of 13 runs are missing." in told and told[-1].startswith("*commit 012345678+")


def test_a_perfect_sampler_has_a_row_and_the_table_says_what_scores_are(
    tables: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = [
        {"variant": name, "seeds": 2, "student": value, "spread": 0.1, "floor": -6.86, "better than perfect": flag}
        for name, value, flag in (("a", -7.0, None), ("b", -6.5, "log_density"))
    ]
    grid = {"last": 5, "target": 1.2, "anchors": {"log_density": [-6.859, 0.01]}}
    result = {"metric": "log_density", "rows": [], "summary": summary, "grid": grid, **WHERE}
    monkeypatch.setattr(tables, "stored", lambda name: result)
    told = tables.table("any")
    assert "means of the last 5 scores on the way" in told and "within 1.2 times the teacher's" in told
    assert "| a perfect sampler | -6.859 ± 0.01 |" in told
    assert "| b | -6.5 ± 0.1 | log_density |" in told and "| a | -7 ± 0.1 | - |" in told


def test_costs_say_where_each_part_was_measured(tables: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    time = {"median": 0.5, "low": 0.25, "high": 0.75}
    switch = {"batch": 2, "time": time, "graph_mib": 1.0, "step_mib": 0.5}
    elsewhere = {**WHERE, "commit": "9876543210"}
    told = {
        "switches": {"rows": {"cifar10": {"bf16": switch}, "digits": {"bf16": {"batch": 8, "time": time}}}, **WHERE},
        "compiled": {"rows": switch, **elsewhere},
        "inner": {"rows": {"one call, against two": {"time": time}}, **WHERE},
        "vardiu": {"rows": {"VarDiU": {"ms": 3.14159, "time": time}}, **WHERE},
        "optimizer": {"rows": {"ratio": 4.94}, **elsewhere},
    }
    monkeypatch.setattr(tables, "stored", lambda name: told)
    switches = tables.cost("switches").splitlines()
    assert switches[2:5] == [
        "| bf16 | cifar10, 2 | 0.50 (0.25 to 0.75) | 1.00 | 0.50 |",
        "| bf16 | digits, 8 | 0.50 (0.25 to 0.75) | - | - |",
        "| compiled | cifar10, 2 | 0.50 (0.25 to 0.75) | 1.00 | 0.50 |",
    ]
    assert switches[-2].startswith("*commit 012345678+") and switches[-1].startswith("*The last row: commit 987654321,")
    assert "| one call, against two | 0.50 (0.25 to 0.75) |" in tables.cost("inner")
    assert "| VarDiU | 3.1 | 0.50 (0.25 to 0.75) |" in tables.cost("vardiu")
    assert "4.9 times" in tables.cost("optimizer") and "commit 987654321" in tables.cost("optimizer")
    assert tables.cost("fashion") == "*Not measured yet.*\n"


def test_a_switch_without_its_base_has_no_ratio(tables: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [run("a + on", 0, {100: 1.0}), run("b", 0, {100: 1.0}), run("b + on", 1, {100: 1.0})]
    monkeypatch.setattr(tables, "stored", lambda name: {"metric": "fd", "rows": rows, **WHERE})
    told = tables.switches("any")
    assert "| a + on | 1 | 100 | - | - | - |" in told and "| b + on | 1 | 100 | 1 of 1 | - | - |" in told


def test_tables_show_a_dirty_tree(tables: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    for commit, says in (("ab" * 20, "commit ababababa,"), ("ab" * 20 + "+", "commit ababababa+,"), (None, "unknown")):
        summary = [{"seeds": 1, "student": 0.5, "images": 9}]
        result = {"metric": "mmd", "summary": summary, "rows": [], "grid": {}, **WHERE, "commit": commit}
        monkeypatch.setattr(tables, "stored", lambda name, result=result: result)
        assert says in tables.table("a")


def test_tables_name_every_machine(tables: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"machine": {"processor": name}} for name in ("old", "new", "old")]
    summary = [{"seeds": 3, "student": 0.5, "images": 9}]
    result = {"metric": "mmd", "summary": summary, "rows": rows, "grid": {}, **WHERE}
    monkeypatch.setattr(tables, "stored", lambda name: result)
    assert "torch 2, new and old, 1 thread.*" in tables.table("a")
