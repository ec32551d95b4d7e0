"""`make accept`: the checks that take longer than a test may. Writes results/*.json and says what holds.

Every check is a comparison (`limbeck compare`) whose cells are run folders: an interrupted acceptance continues.
"""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from limbeck.compare import compare
from limbeck.files import write_atomically

ROOT = Path(__file__).parent.parent


def ring8(result: dict[str, Any]) -> list[tuple[str, bool]]:
    """Every seed: mmd at most 0.05, each mode holds 8 to 17% of the samples, two minutes on one core."""
    told = []
    for row in result["rows"]:
        metrics = row["student"]["metrics"]
        shares = [value for name, value in metrics.items() if name.startswith("share_")]
        told += [
            (f"{row['name']}: mmd {metrics['mmd']:.4f} <= 0.05", metrics["mmd"] <= 0.05),
            (
                f"{row['name']}: shares {min(shares):.3f} to {max(shares):.3f}",
                min(shares) >= 0.08 and max(shares) <= 0.17,
            ),
            (f"{row['name']}: {row['seconds']:.0f} s < 120 s", row["seconds"] < 120),
        ]
    return told


def demo(result: dict[str, Any]) -> list[tuple[str, bool]]:
    """The demo's student: at most twice the teacher's distance, class accuracy within 3 points."""
    told = []
    for row in result["rows"]:
        student, teacher = row["student"]["metrics"], row["teacher_scores"]["metrics"]
        ratio, points = (
            student["fd_feature"] / teacher["fd_feature"],
            student["class_accuracy"] - teacher["class_accuracy"],
        )
        told += [
            (f"{row['name']}: fd_feature {ratio:.2f}x the teacher's, <= 2", ratio <= 2),
            (f"{row['name']}: class accuracy {100 * points:+.1f} points of the teacher's", abs(points) <= 0.03),
        ]
    return told


def trend(result: dict[str, Any]) -> list[tuple[str, bool]]:
    """Euler's own score, the student's ceiling, falls with N."""
    solver = [row["euler"] for row in result["summary"]]
    return [(f"Euler's score falls from {solver[0]:.4f} to {solver[-1]:.4f}", solver[-1] < solver[0])]


CHECKS: dict[str, Callable[[dict[str, Any]], list[tuple[str, bool]]]] = {
    "pid-ring8": ring8,
    "pid-digits": demo,
    "pid-trend-ring8": trend,
    "pid-trend-digits": trend,
}


def main() -> int:
    failed = 0
    names = sys.argv[1:] or list(CHECKS)
    for name in names:
        out = ROOT / "runs" / "accept" / name
        result = compare(ROOT / "studies" / f"{name}.toml", out, print)
        checks = CHECKS[name](result)
        for text, good in checks:
            print(f"{'ok  ' if good else 'FAIL'} {name}: {text}")
        failed += sum(not good for _, good in checks)
        result["checks"] = [{"check": text, "holds": good} for text, good in checks]
        (ROOT / "results").mkdir(exist_ok=True)
        write_atomically(ROOT / "results" / f"{name}.json", json.dumps(result, indent=1) + "\n")
    if shutil.which("git") is None:
        print("no git: the results name no commit")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
