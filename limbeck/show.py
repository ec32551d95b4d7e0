"""`limbeck show`: what a run folder or a file holds, in a few lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from limbeck import artifact, config, summary


def describe(path: Path) -> dict[str, Any]:
    """The facts about a run folder, a model file, or a folder with nothing but one.

    Raises:
        ValueError: if the path is neither.
    """
    if path.is_file():
        return {"file": str(path), **artifact.read_card(path)}
    for kind in ("denoiser", "generator"):
        if not (path / "recipe.toml").exists() and (path / f"{kind}.safetensors").is_file():  # an imported model
            return describe(path / f"{kind}.safetensors")
    if not (path / "recipe.toml").is_file():
        raise ValueError(f"{path}: neither a run folder (it has no recipe.toml) nor a model file")
    recipe = config.read_toml(path / "recipe.toml")
    if not (isinstance(recipe.get("steps"), int) and isinstance(recipe.get("method"), dict)):
        raise ValueError(f"{path / 'recipe.toml'}: not the recipe of a run, steps or method is missing")
    report = summary.read_report(path / "report.json")
    last = _last_row(path / "log.jsonl")
    checkpoints = sorted(p.name for p in (path / "checkpoints").glob("ckpt-*"))
    return {
        "run": str(path),
        "finished": report is not None and report["steps"] >= recipe["steps"],
        "step": max([last.get("step", 0), *(int(name[5:]) for name in checkpoints if name[5:].isdecimal())]),
        "steps": recipe["steps"],
        "checkpoints": checkpoints,
        "last": last,
        "report": report,
        "recipe": recipe,
    }


def _last_row(path: Path) -> dict[str, Any]:
    """The last whole row of a log: a crash may have cut the last line short."""
    lines = path.read_text().splitlines() if path.is_file() else []
    for line in reversed(lines):
        try:
            row: dict[str, Any] = json.loads(line)
            int(row["step"])
        except (ValueError, KeyError, TypeError):
            continue
        return row
    return {}


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
        for key in ("images", "seconds", "scores", "source", "licence"):
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
