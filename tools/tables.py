"""Write the tables of README and docs from results/*.json. `--check` only says whether they are up to date.

A table stands between `<!-- results:NAME -->` and `<!-- end -->`; NAME is a file of results/.
"""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"(<!-- results:([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
HIDDEN = ("images", "seeds")  # said once above the table, if equal in all rows


def main() -> int:
    stale = []
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = path.read_text()
        fresh = BLOCK.sub(lambda block: block[1] + table(block[2]) + block[3], text)
        if fresh != text:
            stale.append(str(path.relative_to(ROOT)))
            if "--check" not in sys.argv:
                path.write_text(fresh)
    if stale:
        print(f"{'stale' if '--check' in sys.argv else 'written'}: {', '.join(stale)}")
    return 1 if stale and "--check" in sys.argv else 0


def table(name: str) -> str:
    """The Markdown table of results/NAME.json, with where it was measured."""
    path = ROOT / "results" / f"{name}.json"
    if not path.is_file():
        return "*Not measured yet.*\n"
    result = json.loads(path.read_text())
    rows = [{key: value for key, value in row.items() if value is not None} for row in result["summary"]]
    hidden = [key for key in HIDDEN if len({row[key] for row in rows}) == 1]
    keys = [key for key in dict.fromkeys(key for row in rows for key in row) if key not in hidden]
    seeds, images = rows[0]["seeds"], rows[0]["images"]
    facts = {"seeds": f"{seeds} seed{'s' if seeds > 1 else ''}", "images": f"{images:,} images"}
    where = result["machine"]
    commit, torch = f"commit {(result['commit'] or 'unknown')[:9]}", f"torch {result['versions']['torch']}"
    threads = f"{where['threads']} thread{'s' if where['threads'] > 1 else ''}"
    return "\n".join(
        [
            f"{', '.join([result['metric'], *(facts[key] for key in ('seeds', 'images') if key in hidden)])}:",
            "",
            line(keys),
            line(["---"] * len(keys)),
            *(line([cell(row.get(key)) for key in keys]) for row in rows),
            "",
            f"*{', '.join((commit, torch, where['processor'], threads))}.*",
            "",
        ]
    )


def line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
