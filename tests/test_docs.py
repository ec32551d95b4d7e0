"""What README and docs say is what the package does."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import limbeck
from limbeck import compare, config, methods
from limbeck.critic import Adversarial
from limbeck.game import Game, Guidance
from limbeck.glossary import METHODS

ROOT = Path(__file__).parent.parent


def test_tables_are_those_of_the_results() -> None:
    done = subprocess.run([sys.executable, ROOT / "tools" / "tables.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_example_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert "steps=2000" in example
    monkeypatch.chdir(tmp_path)
    short = example.replace("steps=2000", "steps=2, **{'evaluate.samples': 200, 'evaluate.teacher_steps': 3}")
    names: dict[str, object] = {}
    exec(compile(short, "README.md", "exec"), names)
    images = names["images"]
    assert getattr(images, "shape", None) == (16, 1, 8, 8)


def test_the_example_of_a_feature_network_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "evaluation.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(example.replace("steps=100", "steps=2"), "evaluation.md", "exec"), names)
    assert names["report"]["recipe"]["evaluate"]["features"].endswith("Corners>")


def test_the_method_of_the_page_on_adding_one_learns(tmp_path: Path, tiny: dict[str, Any]) -> None:
    text = (ROOT / "docs" / "add-a-method.md").read_text()
    names: dict[str, Any] = {}
    exec("\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL)), names)
    told = limbeck.distill("exact:ring8", names["Mine"](), out=tmp_path / "run", tell=lambda line: None, **tiny)
    assert "mmd" in told["student"]["metrics"]
    assert "health/gap" in (tmp_path / "run" / "log.jsonl").read_text()


def test_the_examples_of_the_recipes_page_are_valid() -> None:
    recipe, grid = re.findall(r"```toml\n(.*?)```", (ROOT / "docs" / "recipes.md").read_text(), re.DOTALL)
    resolved = config.resolve(tomllib.loads(recipe), methods.METHODS)
    assert (resolved.steps, resolved.optimizer["generator"].lr) == (3000, 1e-3)
    assert len(compare.cells_of(tomllib.loads(grid), Path("grid.toml"), None)) == 18


@pytest.mark.parametrize("name", methods.TABLE)
def test_the_page_describes_every_method(name: str) -> None:
    title, idea = METHODS[name]
    assert title and idea


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda path: path.stem)
def test_recipes_are_valid(path: Path) -> None:
    table = config.read_toml(path)
    recipe = config.resolve(table, config.TEACHING if "data" in table else methods.METHODS)
    assert config.resolve(config.to_table(recipe), config.TEACHING if "data" in table else methods.METHODS) == recipe


@pytest.mark.parametrize("name", methods.TABLE)
def test_every_method_says_where_it_comes_from(name: str) -> None:
    entry = methods.TABLE[name]
    text = sys.modules[methods.METHODS[name].__module__].__doc__ or ""
    assert entry.paper in text
    # the faithfulness ledger names real switches
    switches = re.findall(r"^``([\w.]+)``", text, re.MULTILINE)
    shared = {"game": Game(adversarial=Adversarial()), "adversarial": Adversarial(), "guidance": Guidance()}
    for switch in switches:
        *parents, leaf = switch.split(".")
        owner = shared[parents[-1]] if parents else methods.METHODS[name]()
        assert leaf in owner.__dataclass_fields__, switch
    assert switches


def test_the_site_has_every_page_and_its_equations(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, ROOT / "tools" / "site.py", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = {path.relative_to(tmp_path).as_posix(): path.read_text() for path in tmp_path.rglob("*.html")}
    assert {"index.html", "docs/score-family.html", "docs/add-a-method.html", "CONTRIBUTING.html"} <= pages.keys()
    for name in methods.TABLE:
        page = pages[f"docs/methods/{name}.html"]
        assert "<math" in page and "<th>default</th>" in page and "$$" not in page
    for page, text in pages.items():
        for target in re.findall(r'href="([^"#]+)', text):
            if not target.startswith("http"):
                assert (tmp_path / page).parent.joinpath(target).exists(), (page, target)


def test_links_of_readme_and_docs_lead_somewhere() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"
