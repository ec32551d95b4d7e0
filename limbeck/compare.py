"""Comparisons: a grid of recipes, each a run folder of its own, and their scores side by side.

A grid file is TOML:

    title = "Student score over N"
    metric = "fd_feature"              # what the curves show
    also = ["fd_pixel"]                # more metrics for the table (optional)
    x = "method.N"                     # the key along their horizontal axis (optional)
    target = 1.2                       # tell the images and seconds until a run is within this factor of its teacher
    last = 10                          # scores are means of the last ten on the way, instead of the final model's
    euler = true                       # score the teacher's Euler solver on each cell's grid beside the student (PID)
    [anchors]                          # a perfect sampler's score and its standard deviation, where they are known;
    log_density = [-6.859, 0.01]       # scores better by more than three standard errors are flagged
    [base]                             # recipe keys, as in a recipe file
    teacher = "digits"
    [[variant]]                        # named settings over the base (optional); each is combined with the whole grid
    name = "features"
    method.metric = "features"
    method.features = "digits"
    [grid]                             # every combination of these values is one run
    "method.N" = [18, 35, 70]
    seed = [0, 1, 2]

A variant may have a `grid` of its own, which replaces keys of the common one. One that says `like = "features"` starts
from all settings of that earlier variant.

Interrupted comparisons continue: finished cells are read, unfinished ones go on from their checkpoints. Large ones can
be made in parts, on several machines or days: `only` chooses cells, and `known` takes rows of an earlier
comparison.json instead of playing their cells again.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import itertools
import json
import math
import multiprocessing
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from limbeck import config, device, folder, loop, methods, report, run, teachers
from limbeck.config import Recipe
from limbeck.denoiser import Denoiser
from limbeck.evaluate import Judge, measure
from limbeck.files import check_folder, write_atomically
from limbeck.glossary import METRICS
from limbeck.machine import commit, machine, versions
from limbeck.methods.pid import PID
from limbeck.sample import euler

KEPT = (
    "steps", "images", "seconds", "student", "teacher_scores", "floor", "halves", "hashes", "history", "commit",
    "machine", "versions",
)  # fmt: skip
KEYS = ("title", "intro", "metric", "also", "x", "target", "last", "euler", "anchors", "base", "variant", "grid")


def compare(
    path: Path,
    out: Path,
    tell: Callable[[str], None],
    features: str | None = None,
    workers: int = 1,
    known: Path | None = None,
    only: str = "*",
) -> dict[str, Any]:
    """Run the grid of the TOML file `path` in the folder `out`; write comparison.json and comparison.html there.

    Args:
        features: replaces evaluate.features of all cells: a program may not be named in a file.
        workers: processes that play cells at the same time; set `threads` in the grid's base.
        known: a comparison.json of this grid; its rows are taken over, where the recipe of their cell is the same.
        only: pattern of the names of cells to play, with * for any text; the others are missing from the tables.

    Returns:
        The content of comparison.json. Each row says where it was played; `missing` names the cells without one.

    Raises:
        ValueError: for a bad grid or recipe, before anything is run.
    """
    grid = config.read_toml(path)
    for key in grid:
        if key not in KEYS:
            raise ValueError(f"{path}: {key}: unknown key, expected one of {', '.join(KEYS)}")
    check_folder(out)
    cells = cells_of(grid, path, features)
    judges = _checked(grid, path, out, cells)
    metrics = [grid.get("metric", "fd_feature"), *grid.get("also", [])]
    earlier = {} if known is None else _earlier(known, grid, cells, path, tell)
    fitting = [cell for cell in cells if fnmatch.fnmatchcase(cell[0], only)]
    if not fitting:
        raise ValueError(f"{path}: only: no cell is called like {only!r}; the first is {cells[0][0]}")
    chosen = [cell for cell in fitting if cell[0] not in earlier]
    if workers > 1:
        _play_all([(recipe, out / name, name) for name, _, recipe in chosen], workers, tell)
    made: dict[str, dict[str, Any]] = {}
    solved: dict[str, dict[str, float]] = {}
    recipes = {name: recipe for name, _, recipe in cells}
    scored = {
        # whatever time a sample took there, it was on another day or machine than the student's here
        _teacher_key(recipes[name], row["hashes"]): {**row["teacher_scores"], "ms_per_image": None}
        for name, row in earlier.items()
    }
    for number, (name, settings, recipe) in enumerate(chosen, 1):
        tell(f"[{number}/{len(chosen)}] {name}")
        job = run.distillation(recipe, out / name, tell, judge=judges[name])
        teacher = _teacher_key(recipe, {"teacher": job.identity, **judges[name].hashes()})
        told = loop.run(dataclasses.replace(job, teacher_scores=scored.get(teacher)), tell)
        scored[teacher] = told["teacher_scores"]
        row: dict[str, Any] = {"name": name, "settings": settings, "recipe": config.to_table(recipe)}
        row |= {key: told[key] for key in KEPT if key in told}
        if grid.get("euler"):
            key = json.dumps({k: v for k, v in settings.items() if k != "seed"})
            solved[key] = solved.get(key) or _euler_scores(recipe, judges[name])
            row["euler"] = {"metrics": solved[key]}
        if row.get("history") and recipe.evaluate.watched != recipe.evaluate.samples:
            row["history"] = levelled(row["history"], row["student"]["metrics"])
        made[name] = row
    found = earlier | made
    rows = [found[name] for name, _, _ in cells if name in found]
    for row in rows:
        row.pop("reached", None)  # a known row may have had another target
        if "target" in grid:
            score = row["teacher_scores"]["metrics"].get(metrics[0], math.nan)  # too few samples may have none
            row["reached"] = reached(row.get("history", []), metrics[0], grid["target"] * score)
    result = {
        "title": grid.get("title", path.stem),
        "metric": metrics[0],
        "grid": grid,
        "rows": rows,
        "missing": [name for name, _, _ in cells if name not in found],
        "summary": _over_seeds(rows, metrics, grid.get("last"), grid.get("anchors", {})),
        "versions": versions(),
        "machine": machine(),
        "commit": commit(),
    }
    out.mkdir(parents=True, exist_ok=True)  # no cell was played where all are known
    write_atomically(out / "comparison.json", json.dumps(result, indent=1) + "\n")
    write_atomically(out / "comparison.html", page(result))
    tell(f"comparison: {out / 'comparison.html'}")
    return result


def _teacher_key(recipe: Recipe, hashes: Mapping[str, str]) -> str:
    """What a teacher's scores depend on, from what its run was made of."""
    made = {key: value for key, value in hashes.items() if key not in ("generator", "given")}
    return json.dumps([config.plain(recipe.evaluate), made], sort_keys=True)


def _earlier(
    known: Path,
    grid: Mapping[str, Any],
    cells: Sequence[tuple[str, dict[str, Any], Recipe]],
    path: Path,
    tell: Callable[[str], None],
) -> dict[str, dict[str, Any]]:
    """Rows of an earlier comparison.json by the name of their cell, where that has the same recipe.

    Raises:
        ValueError: if the file is not one of this grid.
    """
    try:
        before = json.loads(known.read_text())
        old, rows = before["grid"], {row["name"]: dict(row) for row in before["rows"]}
        dict(old)
    except OSError as error:
        raise ValueError(f"known: cannot read {known} ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"known: {known} is no comparison.json of `limbeck compare`") from None
    for key in ("metric", "also", "euler"):
        if old.get(key) != grid.get(key):
            raise ValueError(f"known: {known} has {key} = {old.get(key)!r}, and {path} has {grid.get(key)!r}")
    changed: dict[str, list[str]] = {}
    for name, _, recipe in cells:
        if name not in rows:
            continue
        then, now = rows[name].get("recipe"), config.to_table(recipe)
        changed[name] = config.differences(config.completed(then), now) if isinstance(then, dict) else ["recipe"]
        if not changed[name]:
            _check_row(rows[name], grid, f"known: {known}: row {name}")
    others = [name for name, keys in changed.items() if keys]
    if others:
        first = f"{others[0]} for one ({', '.join(changed[others[0]])})"
        tell(f"known: {len(others)} cells have another recipe now, {first}; their rows are left out")
    return {name: rows[name] for name, keys in changed.items() if not keys}


def _check_row(row: Mapping[str, Any], grid: Mapping[str, Any], where: str) -> None:
    """Refuse a row that lacks what the tables need.

    Raises:
        ValueError: naming it.
    """
    metric, last = grid.get("metric", "fd_feature"), grid.get("last")
    try:
        for key in ("settings", "hashes"):
            if not isinstance(row.get(key), dict):
                raise ValueError(f"{where} lacks {key}")
        for key in ("steps", "images", "seconds"):
            if not isinstance(row.get(key), int | float):
                raise ValueError(f"{where} lacks {key}")
        for key in ("student", "teacher_scores"):
            if metric not in row.get(key, {}).get("metrics", {}):
                raise ValueError(f"{where} lacks {key} with {metric}")
        watched = [entry for entry in row.get("history", []) if {"images", "seconds", "metrics"} <= entry.keys()]
        if len(watched) < len(row.get("history", [])) or sum(metric in e["metrics"] for e in watched) < (last or 0):
            raise ValueError(f"{where} lacks scores on the way")
    except (TypeError, AttributeError):
        raise ValueError(f"{where} is damaged") from None


def _play_all(cells: Sequence[tuple[Recipe, Path, str]], workers: int, tell: Callable[[str], None]) -> None:
    """Bring all cells to their end, several at a time. A stopped one keeps its place, as the others do."""
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
    with folder.signals() as stop:
        stop.step = None
        try:
            left, number = iter(cells), 0
            begun: dict[Future[None], str] = {}
            while True:
                # no more cells than workers: one that waits in the pool's queue would be played after a stop
                for recipe, out, name in itertools.islice(left, workers - len(begun)):
                    begun[pool.submit(_play, recipe, out)] = name
                if not begun:
                    break
                for future in wait(begun, return_when=FIRST_COMPLETED).done:
                    future.result()
                    number += 1
                    tell(f"[{number}/{len(cells)}] {begun.pop(future)} is finished")
        except BrokenProcessPool:
            raise ChildProcessError("a worker was lost (out of memory?); the same command continues") from None
        except BaseException:
            for process in multiprocessing.active_children():
                process.terminate()  # each saves its cell
            raise
        finally:
            pool.shutdown()


def _play(recipe: Recipe, out: Path) -> None:
    run.run_distillation(recipe, out, lambda line: None)


def _checked(
    grid: Mapping[str, Any], path: Path, out: Path, cells: Sequence[tuple[str, dict[str, Any], Recipe]]
) -> dict[str, Judge]:
    """The judge of every cell by name.

    Raises:
        ValueError: for whatever would end a cell, or the table at the end.
    """
    last = grid.get("last")
    if last is not None and (not isinstance(last, int) or isinstance(last, bool) or last < 1):
        raise ValueError(f"{path}: last: must be a number of scores on the way, got {last!r}")
    kinds = {"title": str, "intro": str, "metric": str, "euler": bool}
    for key, kind in kinds.items():
        if key in grid and not isinstance(grid[key], kind):
            wanted = "text" if kind is str else "true or false"
            raise ValueError(f"{path}: {key}: must be {wanted}, got {grid[key]!r}")
    also, axis, target = grid.get("also", []), grid.get("x"), grid.get("target", 1.0)
    if not isinstance(target, int | float) or isinstance(target, bool) or not 0 < target < math.inf:
        raise ValueError(f"{path}: target: must be a positive factor on the teacher's score, got {target!r}")
    metric = grid.get("metric", "fd_feature")
    if "target" in grid and (not aims_low(metric) or metric.startswith("log_")):
        raise ValueError(f"{path}: target: is a factor on a distance, which {metric} is not")
    if not (isinstance(also, list) and all(isinstance(name, str) for name in also)):
        raise ValueError(f"{path}: also: must be a list of metrics, got {also!r}")
    anchors = grid.get("anchors", {})
    if not isinstance(anchors, dict):
        raise ValueError(f"{path}: anchors: must be a table")
    for name, pair in anchors.items():
        if name not in (metric, *also):
            raise ValueError(f"{path}: anchors.{name}: must be the metric or one of `also`")
        two = isinstance(pair, list) and len(pair) == 2 and all(type(v) in (int, float) for v in pair)
        numbers = two and all(math.isfinite(v) for v in pair)
        if not numbers or not pair[1] > 0:
            raise ValueError(f"{path}: anchors.{name}: must be [score, standard deviation above 0], got {pair!r}")
    shared: dict[str, Judge] = {}
    judges: dict[str, Judge] = {}
    for name, settings, recipe in cells:
        if name in judges:
            raise ValueError(f"{path}: grid: two cells are called {name}; every value may stand there once")
        if axis is not None and (axis == "seed" or not isinstance(settings.get(axis), int | float)):
            raise ValueError(f"{path}: x: {axis!r} must be a key of the grid, not the seed, whose values are numbers")
        if grid.get("euler") and not isinstance(recipe.method, PID):
            raise ValueError(f"{path}: euler: only PID has a grid of N levels, {name} has another method")
        key = json.dumps([recipe.teacher, config.plain(recipe.evaluate), recipe.size])
        try:
            judge = run.distillation(recipe, out / name, lambda line: None, judge=shared.get(key)).judge
        except ValueError as error:
            raise ValueError(f"{path}: {name}: {error}") from None
        if judge is None:
            raise ValueError(f"{path}: {name}: nothing to score against (set evaluate.data and evaluate.features)")
        judges[name] = shared[key] = judge
        if last is not None and (not recipe.every.evaluate or -(-recipe.steps // recipe.every.evaluate) < last):
            raise ValueError(f"{path}: last: {name} has fewer than {last} scores on the way (every.evaluate)")
        for key, asked, names in (
            ("metric", (metric, *also), judge.names),
            ("last", (metric, *also) if last is not None else (), judge.watching().names),
            ("target", (metric,) if "target" in grid else (), judge.watching().names),
        ):
            for one in asked:
                if one not in names:
                    when = "" if key == "metric" else " on the way"
                    raise ValueError(
                        f"{path}: {key}: {name} will not have {one!r}{when}; it has {', '.join(sorted(names))}"
                    )
    return judges


def cells_of(grid: Mapping[str, Any], path: Path, features: str | None) -> list[tuple[str, dict[str, Any], Recipe]]:
    """(name, varied settings, recipe) of every cell, all validated."""
    base, axes, variants = grid.get("base", {}), grid.get("grid", {}), grid.get("variant", [{}])
    for name, table in (("base", base), ("grid", axes)):
        if not isinstance(table, dict):
            raise ValueError(f"{path}: {name}: must be a table")
    if not isinstance(variants, list) or not all(isinstance(variant, dict) for variant in variants):
        raise ValueError(f"{path}: variant: must be a list of tables, [[variant]]")
    if not variants:
        raise ValueError(f"{path}: variant: must not be empty")
    names = [variant.get("name") for variant in variants]
    if variants != [{}] and (not all(isinstance(n, str) and n for n in names) or len({*names}) < len(names)):
        raise ValueError(f"{path}: variant.name: every variant needs a name of its own, got {names}")
    cells = []
    before: dict[str, dict[str, Any]] = {}
    for told in variants:
        if (like := told.get("like")) not in (None, *before):
            raise ValueError(f"{path}: variant.like: must name an earlier variant, got {like!r}")
        variant = config.merged(before[like], told) if like else told
        before[variant.get("name", "")] = variant
        own = variant.get("grid", {})
        overrides = {key: value for key, value in variant.items() if key not in ("name", "like", "grid")}
        if not isinstance(own, dict):
            raise ValueError(f"{path}: variant.grid: must be a table")
        varied = {**axes, **own}
        for key, values in varied.items():
            if key == "teacher":
                raise ValueError(f"{path}: grid.teacher: give every teacher a [[variant]] of its own")
            if not isinstance(values, list) or not values:
                raise ValueError(f"{path}: grid.{key}: must be a list of values")
        for values in itertools.product(*varied.values()):
            settings = dict(zip(varied, values, strict=True))
            table = config.merged(base, overrides)
            for key, value in settings.items():
                config.set_dotted(table, key, value)
            config.refuse_program(table, path)
            if features is not None:
                config.set_dotted(table, "evaluate.features", features)
            parts = [f"{key.split('.')[-1]}_{value}" for key, value in settings.items()]
            if variant:
                parts.insert(0, variant["name"])
                settings = {"variant": variant["name"], **settings}
            name = "-".join(parts) or "run"
            name = name.replace("/", "_").replace(":", "_").replace(" ", "_")
            cells.append((name, settings, config.resolve(table, methods.METHODS)))
    return cells


def _euler_scores(recipe: Recipe, judge: Judge) -> dict[str, float]:
    """Scores of the teacher's Euler solver on the N levels of a PID recipe: the fixed point of its student."""
    assert isinstance(recipe.method, PID)
    teacher = teachers.load(recipe.teacher or "").to(device.chosen(recipe.device))
    levels = recipe.method.levels.scaled(teacher.unit).grid(recipe.method.N)[:-1]
    settings = recipe.evaluate
    return measure(
        device.from_cpu(_EulerSampler(teacher, levels), teacher),
        len(levels) - 1,
        judge,
        teacher.shape,
        teacher.classes,
        teacher.contexts,
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


def levelled(history: Sequence[Mapping[str, Any]], final: Mapping[str, float]) -> list[dict[str, Any]]:
    """What was watched, with the distances moved so that they end at the final scores, which are of the same weights.

    Fewer samples and another part of the reference add to all distances of a run by about the same amount, but not to
    those of other models by as much. MMD is moved by its square, to which few samples add.
    """
    last = history[-1]["metrics"]
    more = {name: final[name] - last[name] for name in last if name in final and aims_low(name)}
    rows = []
    for row in history:
        metrics = {name: value + more.get(name, 0.0) for name, value in row["metrics"].items()}
        if "mmd2" in metrics:
            gap = max(metrics["mmd2"], 0.0)
            metrics |= {"mmd": math.sqrt(gap), "log_mmd2": math.log(max(gap, 1e-300))}
        rows.append({**row, "metrics": metrics})
    return rows


def reached(history: Sequence[Mapping[str, Any]], metric: str, level: float) -> dict[str, float] | None:
    """Images and seconds at the first watched step at or below `level`; None if there is none, or no level above 0."""
    for row in history:
        if level > 0 and row["metrics"].get(metric, math.inf) <= level:
            return {"images": row["images"], "seconds": row["seconds"]}
    return None


def _over_seeds(
    rows: list[dict[str, Any]], metrics: Sequence[str], last: int | None, anchors: Mapping[str, Sequence[float]]
) -> list[dict[str, Any]]:
    """Mean and standard deviation of the metrics over the seeds of equal settings, beside those of teacher and truth.

    Args:
        last: scores are means of as many watched ones; None = the final model's.
        anchors: score of a perfect sampler and its standard deviation.
    """
    told = []
    for key, group in _groups(rows).items():
        first, metric = group[0], metrics[0]
        scores = [_scores(row, last) for row in group]
        found = {name: [score[name] for score in scores if name in score] for name in metrics}
        values = found[metric]
        one: dict[str, Any] = {
            **json.loads(key),
            "seeds": len(values),
            "student": statistics.fmean(values) if values else None,
            "spread": _spread(values),
            "euler": first.get("euler", {}).get("metrics", {}).get(metric),
            "teacher": first.get("teacher_scores", {}).get("metrics", {}).get(metric),
            "floor": first.get("floor", {}).get("metrics", {}).get(metric),
        }
        for name in metrics[1:]:
            one[name] = statistics.fmean(found[name]) if found[name] else None
            one[f"{name} spread"] = _spread(found[name])
            one[f"{name} floor"] = first.get("floor", {}).get("metrics", {}).get(name)
        flagged = [
            name
            for name, (level, deviation) in anchors.items()
            if beyond(found[name], level, deviation, aims_low(name))
        ]
        one["better than perfect"] = ", ".join(flagged) or None
        if any("reached" in row for row in group):
            found_at = [row["reached"] for row in group if row.get("reached")]
            one["reached"] = f"{len(found_at)} of {len(group)}"
            for unit in ("images", "seconds"):
                one[f"{unit} until"] = statistics.fmean(at[unit] for at in found_at) if found_at else None
                one[f"{unit} until, spread"] = _spread([at[unit] for at in found_at])
        fitted = fit(next(iter(history(group, metric).values()), []))
        one["power of images"] = fitted and fitted.power
        one["R² of a power"], one["R² of an exponential"] = fitted and fitted.as_power, fitted and fitted.as_exponential
        seconds = statistics.fmean(row["seconds"] for row in group)
        told.append(
            {**one, "images": first["images"], "seconds": seconds, "ms per step": 1000 * seconds / first["steps"]}
        )
    return told


def _groups(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows of equal settings but for the seed."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(json.dumps({k: v for k, v in row["settings"].items() if k != "seed"}), []).append(row)
    return groups


def _scores(row: Mapping[str, Any], last: int | None) -> Mapping[str, float]:
    """A run's scores: those of its final model, or means of the `last` ones on the way."""
    if last is None:
        scores: Mapping[str, float] = row.get("student", {}).get("metrics", {})
        return scores
    watched = [entry["metrics"] for entry in row.get("history", [])[-last:]]
    common = set.intersection(*map(set, watched)) if watched else set()
    return {name: statistics.fmean(metrics[name] for metrics in watched) for name in common}


def aims_low(metric: str) -> bool:
    """Whether a metric is a distance, of which less is better."""
    return metric in METRICS and METRICS[metric].aim == "lower"


def beyond(values: Sequence[float], anchor: float, deviation: float, lower: bool = False) -> bool:
    """Whether the mean of scores is better than a perfect sampler's by more than three of its standard errors.

    Args:
        values: one score per seed.
        anchor: what a perfect sampler scores in the mean.
        deviation: standard deviation of a perfect sampler's score, the least that a seed's score is taken to have.
        lower: less is better.
    """
    if not values:
        return False
    error = max(deviation, _spread(values) or 0.0) / math.sqrt(len(values))
    above = statistics.fmean(values) - anchor
    return (-above if lower else above) > 3 * error


def _spread(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def history(rows: list[dict[str, Any]], metric: str, over: str = "images") -> dict[str, list[tuple[float, float]]]:
    """What was measured on the way, by settings: (x, y), both means over seeds, of every watched step.

    Args:
        over: what x is, "step", "images" or "seconds".
    """
    series = {}
    for key, group in _groups(rows).items():
        found: dict[float, list[tuple[float, float]]] = {}
        for watched in (entry for row in group for entry in row.get("history", [])):
            if metric in watched["metrics"]:
                found.setdefault(watched["images"], []).append((watched[over], watched["metrics"][metric]))
        if found:
            label = ", ".join(str(value) for value in json.loads(key).values()) or "student"
            series[label] = [
                (statistics.fmean(x for x, _ in points), statistics.fmean(y for _, y in points))
                for _, points in sorted(found.items())
            ]
    return series


class Fit(NamedTuple):
    """A power law y ~ factor x^power by least squares of ln y on ln x.

    Attributes:
        as_power: share of the variance of ln y that ln x explains, R².
        as_exponential: what x itself would explain of it, for y ~ exp(a x).
    """

    power: float
    factor: float
    as_power: float
    as_exponential: float


def fit(points: Sequence[tuple[float, float]]) -> Fit | None:
    """How scores fall over images; None for less than three positive points."""
    positive = [(x, y) for x, y in points if x > 0 and y > 0]
    if len(positive) < 3:
        return None
    x, log_x, log_y = zip(*((x, math.log(x), math.log(y)) for x, y in positive), strict=True)
    if len(set(log_y)) == 1:  # nothing is left to explain
        return Fit(0.0, positive[0][1], 1.0, 1.0)
    line = statistics.linear_regression(log_x, log_y)
    as_power, as_exponential = (statistics.correlation(each, log_y) ** 2 for each in (log_x, x))
    return Fit(line.slope, math.exp(line.intercept), as_power, as_exponential)


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
    teachers_scores = result["rows"][0].get("teacher_scores", {}).get("metrics", {})
    for name, over in itertools.product((metric, *grid.get("also", [])), ("images", "seconds")):
        series = history(result["rows"], name, over)
        if series:
            text = "Means over seeds. Where fewer samples are scored on the way, less what as few add to the teacher's."
            lines = {"teacher": teachers_scores[name]} if name in teachers_scores else {}
            values = [y for points in series.values() for _, y in points]
            decades = min(values) > 0 and max(values) > 5 * min(values)
            panels.append(
                report.Curve(f"{name} over {over}", text, over, name, series, log_x=True, log_y=decades, lines=lines)
            )
    table = [{key: value for key, value in row.items() if value is not None} for row in told]
    hashes = {row["name"]: row["hashes"] for row in result["rows"] if "hashes" in row}
    intro, missing = grid.get("intro", ""), len(result.get("missing", []))
    if missing:
        intro = f"{intro} {missing} of {missing + len(result['rows'])} runs are missing.".strip()
    return report.render_comparison(result["title"], intro, table, panels, {**result, "hashes": hashes})
