"""Write the tables of README and docs. `--check` only says whether they are up to date.

A table stands between `<!-- KIND:NAME -->` and `<!-- end -->`:
    results   a file of results/
    ledger    where a method's paper, code and file differ, from its module's docstring
    fields    settings of a method, or of a table of recipes, from their class
    cost      a part of results/cost.json
    faults    what `make faults` or `make accept` injected, and what became of it
    safety    what a run's safety takes of its time
    tuned     a comparison over one key, of all variants
    switches  a comparison of variants "NAME" and "NAME + SWITCH": images until what NAME scores at its end
    measured  a method's rows in the comparisons of all methods
    refined   a GAN before and after its refinement
    recovered divergences of VDD's students from laws that are known
"""

import dataclasses
import inspect
import json
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from limbeck import compare, config, methods
from limbeck.critic import Adversarial
from limbeck.ema import Average
from limbeck.game import Game, Guidance
from limbeck.optimizer import Optimizer

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"(<!-- (\w+):([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
SPREADS = {"student": "spread", "images until": "images until, spread", "seconds until": "seconds until, spread"}
COMMON = ("seeds", "images", "teacher", "floor", "euler")  # and floors of further metrics
BAR = "\\|"  # within a cell
WHOLE = ("images until", "seconds until", "seconds")


def main() -> int:
    stale = []
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        text = path.read_text()
        fresh = BLOCK.sub(lambda block: block[1] + content(block[2], block[3]) + block[4], text)
        if fresh != text:
            stale.append(str(path.relative_to(ROOT)))
            if "--check" not in sys.argv:
                path.write_text(fresh)
    if stale:
        print(f"{'stale' if '--check' in sys.argv else 'written'}: {', '.join(stale)}")
    return 1 if stale and "--check" in sys.argv else 0


def content(kind: str, name: str) -> str:
    """What stands in a block, or that its result is missing."""
    try:
        return KINDS[kind](name)
    except FileNotFoundError:
        return "*Not measured yet.*\n"


def stored(name: str) -> dict[str, Any]:
    """results/NAME.json."""
    result: dict[str, Any] = json.loads((ROOT / "results" / f"{name}.json").read_text())
    return result


def table(name: str) -> str:
    """The Markdown table of results/NAME.json, with where it was measured. What is equal in all rows is said once."""
    result = stored(name)
    rows = [spelled(row) for row in result["summary"]]
    keys = list(dict.fromkeys(key for row in rows for key in row))
    shared = [
        key
        for key in keys
        if (key in COMMON or key.endswith(" floor")) and len(rows) > 1 and len({row.get(key) for row in rows}) == 1
    ]
    shared += [key for key in ("seeds", "images") if len(rows) == 1]
    seeds = f"{rows[0]['seeds']} seed{'s' * (rows[0]['seeds'] != '1')}"
    facts = [seeds if key == "seeds" else f"{key} {rows[0][key]}" for key in shared if key in rows[0]]
    keys = [key for key in keys if key not in shared]
    if last := result["grid"].get("last"):
        facts.append(f"means of the last {last} scores on the way")
    if target := result["grid"].get("target"):
        facts.append(f"`reached`: within {target:g} times the teacher's")
    return "\n".join(
        [
            f"{', '.join([result['metric'], *facts])}:",
            "",
            line(keys),
            line(["---"] * len(keys)),
            *(line([row.get(key, "-") for key in keys]) for row in rows),
            *perfect(result, keys),
            "",
            *lacking(result),
            f"*{origin(result)}.*",
            "",
        ]
    )


def tuned(name: str) -> str:
    """The table of a comparison whose grid is one key: a row by variant, a column by value, the best in bold."""
    result = stored(name)
    (axis,) = result["grid"]["grid"]
    found: dict[str, dict[float, float]] = {}
    for row in result["summary"]:
        found.setdefault(row["variant"], {})[row[axis]] = row["student"]
    values = sorted({value for scores in found.values() for value in scores})
    rows = [
        line([name, *(f"**{cell(v)}**" if v == min(s.values()) else cell(v) for v in map(s.get, values))])
        for name, s in found.items()
    ]
    head = f"{result['metric']}, by {axis}:"
    heads = [line(["", *map(str, values)]), line(["---"] * (len(values) + 1))]
    return "\n".join([head, "", *heads, *rows, "", f"*{origin(result)}.*", ""])


def switches(name: str) -> str:
    """The table of a comparison of switches, each alone: what it scores, and the images until the base's own quality.

    That quality is 1.05 times the mean of the base's final scores; what the base itself needs for it is counted alike.
    A ratio stands where all seeds of both come there; it is that of the means, its range that of the seeds. Of switches
    called "tuned" the median over the bases is told.
    """
    result = stored(name)
    metric = result["metric"]
    found: dict[str, list[dict[str, Any]]] = {}
    for row in result["rows"]:
        found.setdefault(row["settings"]["variant"], []).append(row)
    rows, fewer = [], {}
    for variant, group in found.items():
        scores = [row["student"]["metrics"][metric] for row in group]
        cells = [variant, around(scores, cell), f"{group[0]['images']:,}", "-", "-", "-"]
        if base := found.get(variant.split(" + ")[0]):
            level = 1.05 * statistics.fmean(row["student"]["metrics"][metric] for row in base)
            needs, until = (images_until(runs, metric, level) for runs in (base, group))
            cells[3] = f"{len(until)} of {len(group)}"
            if needs.keys() == until.keys() and len(needs) == len(base) and len(until) == len(group):
                times = [needs[seed] / until[seed] for seed in needs]
                fewer[variant] = statistics.fmean(needs.values()) / statistics.fmean(until.values())
                spread = f" ({min(times):.2f} to {max(times):.2f})" if len(times) > 1 else ""
                cells[4:] = around([*until.values()], "{:,.0f}".format), f"{fewer[variant]:.2f}{spread}"
        rows.append(line(cells))
    heads = ["variant", metric, "images in all", "reached the base's", "images until", "times fewer"]
    told = [line(heads), line(["---"] * len(heads)), *rows, ""]
    for last in dict.fromkeys(variant.split(" + ")[1] for variant in found if " + " in variant):
        best = [fewer[f"{base} + {last}"] for base in found if f"{base} + {last}" in fewer]
        if last.startswith("tuned") and len(best) == sum(f"{base} + {last}" in found for base in found):
            told += [
                f"`{last}`: {statistics.median(best):.2f} times fewer images, the median of {len(best)} methods.",
                "",
            ]
    return "\n".join([*told, *lacking(result), f"*{origin(result)}.*", ""])


def images_until(group: list[dict[str, Any]], metric: str, level: float) -> dict[int, float]:
    """Images at the first watched step at or below a score, by seed; without those that never came there."""
    found = {row["settings"]["seed"]: compare.reached(row.get("history", []), metric, level) for row in group}
    return {seed: at["images"] for seed, at in found.items() if at is not None}


def around(values: list[float], text: Callable[[float], str]) -> str:
    """Mean and, of several values, their standard deviation."""
    spread = f" ± {text(statistics.stdev(values))}" if len(values) > 1 else ""
    return f"{text(statistics.fmean(values))}{spread}"


def measured(method: str) -> str:
    """The Markdown table of a method's rows in the comparisons of all methods."""
    rows = []
    for path in sorted((ROOT / "results").glob("methods-*.json")):
        result = json.loads(path.read_text())
        for row in result["summary"]:
            if row["variant"].split()[0] == method:
                told = spelled(row)
                study = path.stem.removeprefix("methods-")
                place = f"[{study}](../score-family.md#{study})"
                cells = (told[key] for key in ("student", "teacher", "images", "seconds"))
                rows.append(line([place, row["variant"], result["metric"], *cells]))
    if not rows:
        return "*Not measured yet.*\n"
    heads = ["teacher", "variant", "score", "student, 1 call", "teacher, 35 calls", "images", "seconds"]
    return "\n".join([line(heads), line(["---"] * len(heads)), *rows, ""])


def spelled(row: dict[str, Any]) -> dict[str, str]:
    """The cells of a summary's row: means with their spread, counts with thousands."""
    told: dict[str, str] = {}
    for key, value in row.items():
        spread = SPREADS.get(key, f"{key} spread")
        if value is None or key.endswith("spread"):
            continue
        told[key] = f"{value:,}" if isinstance(value, int) else cell(value)
        if isinstance(row.get(spread), float):
            told[key] = f"{cell(value)} ± {row[spread]:.2g}"
        if key in WHOLE:
            told[key] = f"{value:,.0f}"
    return told


def perfect(result: dict[str, Any], keys: list[str]) -> list[str]:
    """The row of a perfect sampler, where its scores are known."""
    known = {
        "student" if metric == result["metric"] else metric: f"{cell(score)} ± {cell(deviation)}"
        for metric, (score, deviation) in result["grid"].get("anchors", {}).items()
    }
    if not known or keys[0] in known:  # without a column of names there is no room for its own
        return []
    return [line(["a perfect sampler", *(known.get(key, "") for key in keys[1:])])]


def lacking(result: dict[str, Any]) -> list[str]:
    """A paragraph on runs that are still to be made."""
    missing = result.get("missing", [])
    return [f"{len(missing)} of {len(missing) + len(result['rows'])} runs are missing.", ""] if missing else []


def origin(result: dict[str, Any]) -> str:
    """Where a result was measured: commits and processors of its rows, or of its writing if it has none."""
    where = result["machine"]
    threads = f"{where['threads']} thread{'s' if where['threads'] > 1 else ''}"
    rows = result.get("rows", [])  # of a comparison a list, each with its machine; of cost.json a table without
    rows = rows if isinstance(rows, list) else []
    made = [row["commit"] for row in rows if row.get("commit")] or [result["commit"] or "unknown"]
    commits = list(dict.fromkeys(f"{known[:9]}{'+' if known.endswith('+') else ''}" for known in made))
    commit = f"commit{'s' if len(commits) > 1 else ''} {', '.join(commits)}"
    machines = [row["machine"] for row in rows if "machine" in row]
    processors = " and ".join(sorted({each["processor"] for each in machines or [where]}))
    versions = [row["versions"] for row in rows if "versions" in row] or [result["versions"]]
    torch = " and ".join(sorted({each["torch"] for each in versions}))
    return ", ".join((commit, f"torch {torch}", processors, threads))


def ledger(method: str) -> str:
    """The Markdown table of a method's ledger, which its module has as a simple table between lines of `=`."""
    text = inspect.getdoc(sys.modules[methods.METHODS[method].__module__]) or ""
    rows: list[list[str]] = []
    lines = text.splitlines()
    rulers = [index for index, row in enumerate(lines) if row.startswith("=====")]
    edges = [match.span() for match in re.finditer("=+", lines[rulers[0]])]
    for row in lines[rulers[0] + 1 : rulers[2]]:
        if row.startswith("="):
            continue
        cells = [row[start:end].strip() for start, end in edges[:-1]] + [row[edges[-1][0] :].strip()]
        if (cells[0] and any(cells[1:])) or not rows:
            rows.append(cells)
        else:  # a row goes on until the next one that names something and says something
            rows[-1] = [" ".join(filter(None, pair)) for pair in zip(rows[-1], cells, strict=True)]
    rows = [[cell.replace("``", "`") for cell in row] for row in rows]
    return "\n".join([line(rows[0]), line(["---"] * len(rows[0])), *map(line, rows[1:]), ""])


SHARED: dict[str, type] = {
    "recipe": config.Recipe, "every": config.Every, "optimizer": Optimizer, "ema": Average, "real": config.Real,
    "evaluate": config.Evaluation, "health": config.Health, "game": Game, "adversarial": Adversarial,
    "guidance": Guidance,
}  # fmt: skip


def fields(name: str) -> str:
    """The Markdown table of the settings of a method or of a table of recipes: name, default, meaning."""
    cls = SHARED.get(name) or methods.METHODS[name]
    about = re.search(r"Attributes:\n(.*)", inspect.getdoc(cls) or "", re.DOTALL)
    assert about is not None, name
    meanings = dict(re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", about[1], re.MULTILINE))
    rows = []
    for f in dataclasses.fields(cls):
        meaning = re.sub(r"\s+", " ", meanings[f.name]).replace("<", "&lt;")
        default = default_of(cls, f.name)
        rows.append(
            line([f"`{f.name}`", "" if default in (None, dataclasses.MISSING) else f"`{shown(default)}`", meaning])
        )
    return "\n".join([line(["key", "default", "what"]), line(["---"] * 3), *rows, ""])


def cost(part: str) -> str:
    """The Markdown table of a part of what `tools/cost.py` measured."""
    told = stored("cost")
    if part not in told:
        return "*Not measured yet.*\n"
    found = told[part]["rows"]
    rows = {
        "optimizer": optimizers, "sampling": samplers, "switches": on_and_off, "inner": inner, "vardiu": iterations,
    }.get(part, steps)(found)  # fmt: skip
    where = [f"*{origin(told[part])}.*"]
    if part == "switches" and "compiled" in told:
        rows += [ratio_row("compiled", "cifar10", told["compiled"]["rows"])]
        where += [f"*The last row: {origin(told['compiled'])}.*"]
    return "\n".join([*rows, "", *where, ""])


def steps(found: dict[str, Any]) -> list[str]:
    """Rows of a bench, by method."""
    keys = ("teacher", "forward", "backward", "optimizer", "ema", "rest")
    head = [
        "method", "batch", "images/s", "GFLOP per image", "passes", "share of peak", "s per step, all", "graphs, MiB",
        "step, MiB", "process, MiB",
    ]  # fmt: skip
    rows = [line([*head, *(f"{key}, %" for key in keys)]), line(["---"] * (len(head) + len(keys)))]
    for name, side in found.items():
        spread = " to ".join(f"{end(side['all_seconds']):.3g}" for end in (min, max))
        numbers = (
            side["batch"], side["images_per_second"], side["flops_per_image"] / 1e9, side["passes"],
            side["fraction_of_peak"], spread, side["graph_mib"], side.get("step_mib"), side.get("peak_memory_mib"),
        )  # fmt: skip
        shares = (f"{100 * side['parts'].get(key, 0) / side['seconds_per_step']:.1f}" for key in keys)
        rows.append(line([name, *(cell(n) for n in numbers), *shares]))
    return rows


def optimizers(found: dict[str, Any]) -> list[str]:
    return [f"Adam with `foreach` takes {found['ratio']:.1f} times as long as fused."]


def samplers(found: dict[str, Any]) -> list[str]:
    rows = [line(["sampler", "batch", "images/s", "ms for one image"]), line(["---"] * 4)]
    for network, makers in found.items():
        for name, row in makers.items():
            cells = [f"{network}: {name}", row["batch"], row["images_per_second"], row["ms_at_batch_1"]]
            rows.append(line([cell(c) for c in cells]))
    return rows


def on_and_off(found: dict[str, Any]) -> list[str]:
    rows = [line(["switch", "network, batch", "time, on / off", "graphs", "step in all"]), line(["---"] * 5)]
    pairs = [(network, name) for network in ("cifar10", "digits") for name in found[network]]
    return rows + [ratio_row(name, network, found[network][name]) for network, name in pairs]


def ratio_row(name: str, network: str, row: dict[str, Any]) -> str:
    memory = (f"{row[key]:.2f}" if key in row else "-" for key in ("graph_mib", "step_mib"))
    return line([name, f"{network}, {row['batch']}", ratio(row["time"]), *memory])


def inner(found: dict[str, Any]) -> list[str]:
    rows = [line(["built in", "time, ratio"]), line(["---"] * 2)]
    return rows + [line([name, ratio(row["time"])]) for name, row in found.items()]


def iterations(found: dict[str, Any]) -> list[str]:
    rows = [line(["variant", "ms per iteration", "times the first one's"]), line(["---"] * 3)]
    return rows + [line([name, f"{row['ms']:.1f}", ratio(row["time"])]) for name, row in found.items()]


def ratio(time: dict[str, float]) -> str:
    return "{median:.2f} ({low:.2f} to {high:.2f})".format(**time)


def shown(value: Any) -> str:
    """A default as one writes it in a recipe: of a table only what is not its own default."""
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return json.dumps(value)
    inner = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    told = ", ".join(f"{name} = {shown(v)}" for name, v in inner.items() if v != default_of(type(value), name))
    return f"{type(value).__name__} {{{told}}}" if told else type(value).__name__


def default_of(cls: type, name: str) -> Any:
    """A dataclass field's default, whether a value or made by a factory; MISSING if it has none."""
    (f,) = (f for f in dataclasses.fields(cls) if f.name == name)
    return f.default if f.default_factory is dataclasses.MISSING else f.default_factory()


def line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(text.replace('|', BAR) for text in cells)} |"


def cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def injected(name: str) -> str:
    """The Markdown table of results/NAME.json as tools/faults.py writes it."""
    result = stored(name)
    heads = {
        "fault": "fault", "injected": "injected", "continued": "runs that went on", "lost": "steps lost at most",
        "wrong": "wrong results", "tracebacks": "tracebacks", "executed": "code executed",
    }  # fmt: skip
    rows = [line([cell(row[key]) for key in heads]) for row in result["rows"]]
    where = f"{result['methods']} methods, a checkpoint every {result['save_interval']} steps, {origin(result)}"
    return "\n".join([line(list(heads.values())), line(["---"] * len(heads)), *rows, "", f"*{where}.*", ""])


def safety(name: str) -> str:
    """A sentence on results/NAME.json as tools/accept.py writes it."""
    result = stored(name)
    parts = ", ".join(f"{what} {100 * s / result['seconds']:.2f}%" for what, s in result["spent"].items())
    return f"Of the demo's processor time: {100 * result['share']:.2f}% ({parts}).\n\n*{origin(result)}.*\n"


def refined(name: str) -> str:
    """The Markdown table of results/NAME.json: a GAN, and what was made of it."""
    result = stored(name)
    metrics = ("fd_feature", "precision", "recall", "class_accuracy")
    rows = [line(["", *metrics, "spread of fd_feature", "images", "seconds"]), line(["---"] * (len(metrics) + 4))]
    for row in result["rows"]:
        numbers = (
            *(row["metrics"][key] for key in metrics),
            row["spread"]["fd_feature"],
            row["images"],
            row["seconds"],
        )
        rows.append(line([row["name"], *map(cell, numbers)]))
    where = f"{result['draws']} draws of {result['samples']:,} samples, {origin(result)}"
    return "\n".join([*rows, "", f"*{where}.*", ""])


def recovered(name: str) -> str:
    """The Markdown table of results/NAME.json: the divergence of a student from its law, by seed."""
    result = stored(name)
    rows = []
    for row in result["rows"]:
        ends = dict.fromkeys(f"{end(row['kl']):.4f}" for end in (min, max))
        rows.append(line([row["teacher"], *map(cell, (row["seed"], row["steps"], " to ".join(ends), row["seconds"]))]))
    heads = ["teacher", "seed", "steps", "KL", "seconds"]
    return "\n".join([line(heads), line(["---"] * 5), *rows, "", f"*{origin(result)}.*", ""])


KINDS = {
    "results": table, "ledger": ledger, "fields": fields, "cost": cost, "faults": injected,
    "safety": safety, "refined": refined, "tuned": tuned, "switches": switches, "measured": measured,
    "recovered": recovered,
}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
