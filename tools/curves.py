"""Draw docs/NAME.png from results/NAME.json: the score on the way, over images and over seconds, of every method.

python tools/curves.py methods-digits
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.ticker import NullFormatter, ScalarFormatter

from limbeck.compare import history

ROOT = Path(__file__).parent.parent


def draw(name: str) -> None:
    """Means over seeds, on two logarithmic panels, with the teacher's score as a line."""
    result = json.loads((ROOT / "results" / f"{name}.json").read_text())
    metric, rows = result["metric"], result["rows"]
    teacher = rows[0]["teacher_scores"]
    figure, panels = pyplot.subplots(1, 2, sharey=True, figsize=(10, 4.2), layout="constrained")
    for panel, over in zip(panels, ("images", "seconds"), strict=True):
        for number, (label, points) in enumerate(history(rows, metric, over).items()):
            style = ("-", "--")[number // 10 % 2]
            panel.plot(*zip(*points, strict=True), style, color=f"C{number % 10}", linewidth=1.4, label=label)
        panel.axhline(teacher["metrics"][metric], color="black", linewidth=1, linestyle=":")
        panel.set(xscale="log", yscale="log", xlabel=over if over == "images" else "seconds of one core")
        panel.yaxis.set_major_formatter(ScalarFormatter())
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_minor_formatter(NullFormatter())
        panel.grid(alpha=0.25, which="both")
    panels[0].set_ylabel(metric)
    panels[0].text(0.01, teacher["metrics"][metric], f"teacher, {teacher['nfe']} calls", va="bottom", fontsize=8,
                   transform=panels[0].get_yaxis_transform())  # fmt: skip
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.savefig(ROOT / "docs" / f"{name}.png", dpi=110)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        draw(name)
