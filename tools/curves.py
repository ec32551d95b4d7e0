"""Draw docs/NAME.png from results/NAME.json: scores on the way over images (or steps) and over seconds, by method.

python tools/curves.py methods-digits               # its metric
python tools/curves.py vardiu-mog40 log_mmd2 log_density
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.ticker import NullFormatter, ScalarFormatter

from limbeck.compare import fit, history

ROOT = Path(__file__).parent.parent


def draw(name: str, *metrics: str) -> None:
    """Means over seeds, two panels to a metric, with a line for the teacher or, where it is known, perfection.

    Thin lines are fitted powers of images.
    """
    result = json.loads((ROOT / "results" / f"{name}.json").read_text())
    metrics, rows = metrics or (result["metric"],), result["rows"]
    per_step = {row["images"] / row["steps"] for row in rows}
    overs = ("images" if len(per_step) == 1 else "step", "seconds")
    size = (10, 0.4 + 3.8 * len(metrics))
    figure, grid = pyplot.subplots(len(metrics), 2, sharex="col", sharey="row", squeeze=False, figsize=size,
                                   layout="constrained")  # fmt: skip
    for panels, metric in zip(grid, metrics, strict=True):
        told, level = anchor(result, metric)
        for panel, over in zip(panels, overs, strict=True):
            for number, (label, points) in enumerate(history(rows, metric, over).items()):
                style = ("-", "--")[number // 10 % 2]
                panel.plot(*zip(*points, strict=True), style, color=f"C{number % 10}", linewidth=1.4, label=label)
                fitted = fit(points) if level > 0 and panel is panels[0] else None
                if fitted is not None:
                    ends = [x for x, _ in (next(p for p in points if p[0] > 0), points[-1])]
                    falling = [fitted.factor * x**fitted.power for x in ends]
                    panel.plot(ends, falling, color=f"C{number % 10}", linewidth=0.6, alpha=0.6)
            panel.axhline(level, color="black", linewidth=1, linestyle=":")
            panel.set_xscale("log")
            if level > 0:
                panel.set_yscale("log")
                panel.yaxis.set_major_formatter(ScalarFormatter())
            for axis in (panel.xaxis, panel.yaxis):
                axis.set_minor_formatter(NullFormatter())
            panel.grid(alpha=0.25, which="both")
        panels[0].set_ylabel(metric)
        panels[0].text(0.01, level, told, va="bottom", fontsize=8, transform=panels[0].get_yaxis_transform())
    for panel, over in zip(grid[-1], overs, strict=True):
        panel.set_xlabel("seconds of one core" if over == "seconds" else over)
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.savefig(ROOT / "docs" / f"{name}.png", dpi=110)


def anchor(result: dict[str, Any], metric: str) -> tuple[str, float]:
    """What the dotted line is, and where it lies."""
    known = result["grid"].get("anchors", {})
    if metric in known:
        return "a perfect sampler", known[metric][0]
    teacher = result["rows"][0]["teacher_scores"]
    return f"teacher, {teacher['nfe']} calls", teacher["metrics"][metric]


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    draw(*sys.argv[1:])
