"""`limbeck show`: what a run folder or a file holds, in a few lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from limbeck import artifact, config, summary


def describe(path: Path) -> dict[str, Any]:
    """The facts about a run folder or a model file.

    Raises:
        ValueError: if the path is neither.
    """
    if path.is_file():
        return {"file": str(path), **artifact.read_card(path)}
    if not (path / "recipe.toml").is_file():
        raise ValueError(f"{path}: neither a run folder (it has no recipe.toml) nor a model file")
    recipe = config.read_toml(path / "recipe.toml")
    log = path / "log.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    report = path / "report.json"
    checkpoints = sorted(p.name for p in (path / "checkpoints").glob("ckpt-*"))
    return {
        "run": str(path),
        "finished": report.is_file() and json.loads(report.read_text())["steps"] >= recipe["steps"],
        "step": rows[-1]["step"] if rows else 0,
        "steps": recipe["steps"],
        "checkpoints": checkpoints,
        "last": rows[-1] if rows else {},
        "report": json.loads(report.read_text()) if report.is_file() else None,
        "recipe": recipe,
    }


def show(path: Path, as_json: bool) -> None:
    """Print `describe(path)`."""
    facts = describe(path)
    if as_json:
        print(json.dumps(facts, indent=1))
        return
    if "file" in facts:
        recipe = facts.get("recipe", {})
        print(f"{facts['file']}: a {facts['kind']}, made by Limbeck {facts.get('made_by', '?')}")
        for key in ("teacher", "data"):
            if key in recipe:
                print(f"{key}: {recipe[key]}")
        if "method" in recipe:
            print(f"method: {_inline(recipe['method'])}")
        for key in ("images", "seconds", "scores"):
            if key in facts:
                print(f"{key}: {_inline(facts[key])}")
        return
    recipe = facts["recipe"]
    state = "finished" if facts["finished"] else "unfinished"
    print(f"{facts['run']}: {state}, step {facts['step']:,} of {facts['steps']:,}")
    print(f"{'teacher' if 'teacher' in recipe else 'data'}: {recipe.get('teacher', recipe.get('data'))}")
    print(f"method: {_inline(recipe['method'])}")
    print(f"checkpoints: {', '.join(facts['checkpoints']) or 'none'}")
    if facts["last"]:
        print(f"last log row: {_inline(facts['last'])}")
    if facts["report"]:
        print("\n".join(summary.table_lines(facts["report"])))
        print(f"report: {path / 'report.html'}")


def _inline(value: Any) -> str:
    if not isinstance(value, dict):
        return f"{value:,}" if isinstance(value, int | float) else str(value)
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in value.items())
