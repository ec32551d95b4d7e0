"""What README and docs say is what the package does."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from limbeck import config, methods
from limbeck.critic import Adversarial
from limbeck.game import Game, Guidance

ROOT = Path(__file__).parent.parent


def test_tables_are_those_of_the_results() -> None:
    done = subprocess.run([sys.executable, ROOT / "tools" / "tables.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_example_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert "steps=4000" in example
    monkeypatch.chdir(tmp_path)
    short = example.replace("steps=4000", "steps=2, **{'evaluate.samples': 200, 'evaluate.teacher_steps': 3}")
    names: dict[str, object] = {}
    exec(compile(short, "README.md", "exec"), names)
    images = names["images"]
    assert getattr(images, "shape", None) == (16, 1, 8, 8)


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


def test_links_of_readme_and_docs_lead_somewhere() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"
