"""Comparisons: a grid of recipes, each a run folder of its own, and their scores side by side.

A grid file is TOML:

    title = "Student score over N"
    metric = "fd_feature"              # what the curves show
    x = "method.N"                     # the key along their horizontal axis (optional)
    euler = true                       # score the teacher's Euler solver on each cell's grid beside the student (PID)
    [base]                             # recipe keys, as in a recipe file
    teacher = "digits"
    [grid]                             # every combination of these values is one run
    "method.N" = [18, 35, 70]
    seed = [0, 1, 2]

Interrupted comparisons continue: finished cells are read, unfinished ones go on from their checkpoints.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from limbeck import config, methods, report, run, teachers
from limbeck.config import Recipe
from limbeck.denoiser import Denoiser
from limbeck.evaluate import Judge, measure
from limbeck.files import check_folder, write_atomically
from limbeck.machine import commit, machine, versions
from limbeck.methods.pid import PID
from limbeck.sample import euler

KEYS = ("title", "intro", "metric", "x", "euler", "base", "grid")


def compare(path: Path, out: Path, tell: Callable[[str], None], features: str | None = None) -> dict[str, Any]:
    """Run the grid of the TOML file `path` in the folder `out`; write comparison.json and comparison.html there.

    `features` replaces evaluate.features of all cells: a program may not be named in a file.

    Returns:
        The content of comparison.json.

    Raises:
        ValueError: for a bad grid or recipe, before anything is run.
    """
    grid = config.read_toml(path)
    for key in grid:
        if key not in KEYS:
            raise ValueError(f"{path}: {key}: unknown key, expected one of {', '.join(KEYS)}")
    check_folder(out)
    cells = _cells(grid, path, features)
    judges = _checked(grid, path, out, cells)
    rows: list[dict[str, Any]] = []
    solved: dict[str, dict[str, float]] = {}
    for number, (name, settings, recipe) in enumerate(cells, 1):
        tell(f"[{number}/{len(cells)}] {name}")
        told = run.run_distillation(recipe, out / name, tell, judge=judges[name])
        row: dict[str, Any] = {"name": name, "settings": settings}
        keys = ("images", "seconds", "student", "teacher_scores", "floor", "halves", "hashes")
        row |= {key: told[key] for key in keys if key in told}
        if grid.get("euler"):
            key = json.dumps({k: v for k, v in settings.items() if k != "seed"})
            solved[key] = solved.get(key) or _euler_scores(recipe, judges[name])
            row["euler"] = {"metrics": solved[key]}
        rows.append(row)
    result = {
        "title": grid.get("title", path.stem),
        "metric": grid.get("metric", "fd_feature"),
        "grid": grid,
        "rows": rows,
        "summary": _over_seeds(rows, grid.get("metric", "fd_feature")),
        "versions": versions(),
        "machine": machine(),
        "commit": commit(),
    }
    write_atomically(out / "comparison.json", json.dumps(result, indent=1) + "\n")
    write_atomically(out / "comparison.html", page(result))
    tell(f"comparison: {out / 'comparison.html'}")
    return result


def _checked(
    grid: Mapping[str, Any], path: Path, out: Path, cells: Sequence[tuple[str, dict[str, Any], Recipe]]
) -> dict[str, Judge | None]:
    """The judge of every cell by name.

    Raises:
        ValueError: for whatever would end a cell, or the table at the end.
    """
    for key, kind, known in (
        ("title", "text", str),
        ("intro", "text", str),
        ("metric", "text", str),
        ("euler", "true or false", bool),
    ):
        if key in grid and not isinstance(grid[key], known):
            raise ValueError(f"{path}: {key}: must be {kind}, got {grid[key]!r}")
    axis = grid.get("x")
    if axis is not None:
        values = grid.get("grid", {}).get(axis) if isinstance(axis, str) else None
        if values is None:
            raise ValueError(f"{path}: x: {axis!r} is not a key of grid ({', '.join(grid.get('grid', {}))})")
        if not all(isinstance(value, int | float) for value in values):
            raise ValueError(f"{path}: x: the values of {axis} are not all numbers")
    known_judges: dict[str, Judge | None] = {}
    judges: dict[str, Judge | None] = {}
    for name, _, recipe in cells:
        if name in judges:
            raise ValueError(f"{path}: grid: two cells are called {name}; every value may stand there once")
        key = json.dumps([recipe.teacher, config.plain(recipe.evaluate), recipe.size])
        try:
            judge = run.distillation(recipe, out / name, judge=known_judges.get(key)).judge
        except ValueError as error:
            raise ValueError(f"{path}: {name}: {error}") from None
        judges[name] = known_judges[key] = judge
        if grid.get("euler") and not isinstance(recipe.method, PID):
            raise ValueError(f"{path}: euler: only PID has a grid of N levels, {name} has another method")
        if judge is None:
            raise ValueError(f"{path}: {name}: nothing to score against (set evaluate.data and evaluate.features)")
    metric = grid.get("metric", "fd_feature")
    measured = set().union(*(judge.names for judge in judges.values() if judge is not None))
    if metric not in measured:
        raise ValueError(f"{path}: metric: no run has {metric!r}, they have {', '.join(sorted(measured))}")
    return judges


def _cells(grid: Mapping[str, Any], path: Path, features: str | None) -> list[tuple[str, dict[str, Any], Recipe]]:
    """(name, varied settings, recipe) of every cell, all validated."""
    base, axes = grid.get("base", {}), grid.get("grid", {})
    for name, table in (("base", base), ("grid", axes)):
        if not isinstance(table, dict):
            raise ValueError(f"{path}: {name}: must be a table")
    for key, values in axes.items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"{path}: grid.{key}: must be a list of values")
    cells = []
    for values in itertools.product(*axes.values()):
        settings = dict(zip(axes, values, strict=True))
        table = copy.deepcopy(base)
        for key, value in settings.items():
            config.set_dotted(table, key, value)
        config.refuse_program(table, path)
        if features is not None:
            config.set_dotted(table, "evaluate.features", features)
        name = "-".join(f"{key.split('.')[-1]}_{value}" for key, value in settings.items()) or "run"
        cells.append((name.replace("/", "_").replace(":", "_"), settings, config.resolve(table, methods.METHODS)))
    return cells


def _euler_scores(recipe: Recipe, judge: Judge | None) -> dict[str, float]:
    """Scores of the teacher's Euler solver on the N levels of a PID recipe: the fixed point of its student."""
    assert isinstance(recipe.method, PID) and judge is not None
    teacher = teachers.load(recipe.teacher or "")
    levels = recipe.method.levels.scaled(teacher.unit).grid(recipe.method.N)[:-1]
    settings = recipe.evaluate
    return measure(
        _EulerSampler(teacher, levels),
        len(levels) - 1,
        judge,
        teacher.shape,
        teacher.classes,
        samples=settings.samples,
        draws=settings.draws,
        seed=settings.seed,
    ).metrics


@dataclasses.dataclass(frozen=True)
class _EulerSampler:
    teacher: Denoiser
    levels: Tensor

    def __call__(self, z: Tensor, cond: Tensor | None) -> Tensor:
        return euler(self.teacher, z, sigmas=self.levels, cond=cond)


def _over_seeds(rows: list[dict[str, Any]], metric: str) -> list[dict[str, Any]]:
    """Mean and standard deviation of the metric over the seeds of equal settings."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(json.dumps({k: v for k, v in row["settings"].items() if k != "seed"}), []).append(row)
    told = []
    for key, group in groups.items():
        values = [row["student"]["metrics"][metric] for row in group if metric in row.get("student", {})["metrics"]]
        first = group[0]
        told.append(
            {
                **json.loads(key),
                "seeds": len(values),
                "student": statistics.fmean(values),
                "spread": statistics.stdev(values) if len(values) > 1 else None,
                "euler": first.get("euler", {}).get("metrics", {}).get(metric),
                "teacher": first.get("teacher_scores", {}).get("metrics", {}).get(metric),
                "floor": first.get("floor", {}).get("metrics", {}).get(metric),
                "images": first["images"],
                "seconds": statistics.fmean(row["seconds"] for row in group),
            }
        )
    return told


def page(result: Mapping[str, Any]) -> str:
    """The comparison as one HTML page."""
    metric, grid, told = result["metric"], result["grid"], result["summary"]
    panels = []
    axis = grid.get("x")
    if axis is not None and len(told) > 1:
        series = {
            name: [(float(row[axis]), row[key]) for row in told if row[key] is not None]
            for name, key in (("student", "student"), ("teacher's Euler solver", "euler"))
        }
        lines = {name: told[0][name] for name in ("teacher", "floor") if told[0][name] is not None}
        panels.append(
            report.Curve(
                f"{metric} over {axis}",
                "Lower is better for distances. Lines: the teacher at its usual steps, and real data.",
                axis,
                metric,
                {name: points for name, points in series.items() if points},
                log_x=True,
                log_y=True,
                lines=lines,
            )
        )
    table = [{key: value for key, value in row.items() if value is not None} for row in told]
    hashes = {row["name"]: row.get("hashes", {}) for row in result["rows"]}
    return report.render_comparison(result["title"], grid.get("intro", ""), table, panels, {**result, "hashes": hashes})
