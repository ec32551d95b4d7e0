"""Make the documentation site from README.md and docs/: static HTML whose equations are MathML.

python tools/site.py OUT
"""

from __future__ import annotations

import html
import re
import sys
from pathlib import Path

import markdown  # type: ignore[import-untyped]
from latex2mathml.converter import convert

ROOT = Path(__file__).parent.parent
PAGES = {
    "Start": ["README.md"],
    "Use": [
        "docs/recipes.md",
        "docs/import.md",
        "docs/teachers.md",
        "docs/evaluation.md",
        "docs/export.md",
        "docs/cost.md",
        "docs/reliability.md",
    ],
    "Methods": ["docs/score-family.md"],
    "One page each": ["docs/methods/*.md"],
    "Build": ["docs/add-a-method.md", "CONTRIBUTING.md", "CHANGELOG.md", "LOG.md"],
}
BLOCK, INLINE = re.compile(r"\$\$(.+?)\$\$", re.DOTALL), re.compile(r"(?<![\w$])\$([^$\n]+?)\$(?!\w)")
CODE = re.compile(r"(```.*?```|`[^`\n]*`)", re.DOTALL)
STYLE = """
:root { color-scheme: light dark; --ink: #1d2530; --paper: #fdfcf9; --line: #d9d6cc; --soft: #f2f0e9; --link: #1c5f8a }
@media (prefers-color-scheme: dark) {
  :root { --ink: #dfe4ea; --paper: #14181d; --line: #333b45; --soft: #1c2229; --link: #7db8dd }
}
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.6 system-ui, sans-serif }
.frame { display: grid; grid-template-columns: 15rem minmax(0, 46rem); gap: 3rem; max-width: 66rem; margin: 0 auto;
  padding: 2rem 1.5rem }
nav { font-size: .92rem } nav h2 { font-size: .78rem; letter-spacing: .06em; text-transform: uppercase; opacity: .65;
  margin: 1.4rem 0 .3rem } nav a { display: block; padding: .1rem 0 } nav .here { font-weight: 600 }
a { color: var(--link); text-decoration: none } a:hover { text-decoration: underline }
h1, h2, h3 { line-height: 1.25; text-wrap: balance }
pre, code { font: .875em/1.5 ui-monospace, monospace; background: var(--soft); border-radius: 4px }
code { padding: .1em .3em } pre { padding: .9rem 1rem; overflow-x: auto } pre code { padding: 0 }
table { border-collapse: collapse; display: block; overflow-x: auto; font-size: .92rem }
th, td { border-bottom: 1px solid var(--line); padding: .4rem .8rem .4rem 0; text-align: left; vertical-align: top }
img { max-width: 100%; image-rendering: pixelated } math[display=block] { margin: 1rem 0; overflow-x: auto }
@media (max-width: 50rem) { .frame { grid-template-columns: minmax(0, 1fr); gap: 0 } nav { columns: 2 } }
"""


def main() -> None:
    out = Path(sys.argv[1])
    groups = {name: [p for pattern in patterns for p in sorted(ROOT.glob(pattern))] for name, patterns in PAGES.items()}
    titles = {path: title_of(path) for paths in groups.values() for path in paths}
    for path in titles:
        target = out / address(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(page(path, groups, titles))
    for picture in (ROOT / "docs").glob("*.png"):
        (out / "docs" / picture.name).write_bytes(picture.read_bytes())
    print(f"{len(titles)} pages: {out / 'index.html'}")


def address(path: Path) -> Path:
    """Where the page of a Markdown file lies in the site."""
    inside = path.relative_to(ROOT)
    return Path("index.html") if inside == Path("README.md") else inside.with_suffix(".html")


def title_of(path: Path) -> str:
    """The first heading."""
    return next(line[2:] for line in path.read_text().splitlines() if line.startswith("# "))


def page(path: Path, groups: dict[str, list[Path]], titles: dict[Path, str]) -> str:
    """The HTML of one Markdown file, with the way to all others."""
    up = "../" * (len(address(path).parts) - 1)
    links = []
    for name, paths in groups.items():
        links.append(f"<h2>{html.escape(name)}</h2>" if paths else "")
        for other in paths:
            here = ' class="here"' if other == path else ""
            short = titles[other].split(":")[0]
            links.append(f'<a{here} href="{up}{address(other)}">{html.escape(short)}</a>')
    body = markdown.markdown(with_equations(path.read_text()), extensions=["tables", "fenced_code", "toc"])
    body = re.sub(r'(href="(?!https?:)[^"#]*?)README\.md(["#])', r"\1index.html\2", body)
    body = re.sub(r'(href="(?!https?:)[^"#]*?)\.md(["#])', r"\1.html\2", body)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(titles[path])}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style>'
        f'<div class="frame"><nav>{"".join(links)}</nav><main>{body}</main></div></html>\n'
    )


def with_equations(text: str) -> str:
    """LaTeX between dollar signs as MathML, outside of code."""
    parts = CODE.split(text)
    for k in range(0, len(parts), 2):
        parts[k] = BLOCK.sub(lambda m: f"\n{convert(m[1].strip(), display='block')}\n", parts[k])
        parts[k] = INLINE.sub(lambda m: convert(m[1]), parts[k])
    return "".join(parts)


if __name__ == "__main__":
    main()
