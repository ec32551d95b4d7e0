"""The architecture as a property of the source: imports point one way, and files never become code."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "limbeck"
# modules of the mathematics, and what they may know; a package stands for its modules
MAY_IMPORT = {
    "noise": (),
    "schedule": (),
    "randomness": (),
    "optimizer": (),
    "device": (),
    "distributed": ("device",),
    "ema": ("distributed",),
    "files": (),
    "denoiser": ("schedule",),
    "losses": ("denoiser",),
    "sample": ("denoiser", "noise"),
    "exact": ("denoiser",),
    "generator": ("denoiser", "noise"),
    "objective": ("denoiser", "generator", "optimizer"),
    "source": ("device", "distributed", "objective", "randomness"),
    "networks": ("networks",),
    "passes": ("denoiser",),
    "train": (
        "denoiser",
        "device",
        "distributed",
        "ema",
        "generator",
        "objective",
        "optimizer",
        "passes",
        "randomness",
    ),
}
# what the shells around the mathematics are: no method may know of them
SHELL = (
    "train",
    "passes",
    "config",
    "run",
    "loop",
    "preparation",
    "students",
    "cli",
    "summary",
    "report",
    "checkpoint",
    "shards",
    "folder",
    "health",
    "resources",
    "replay",
    "bench",
    "teachers",
    "evaluate",
    "teaching",
    "methods",
)


@cache
def modules() -> dict[str, ast.Module]:
    """Syntax trees by dotted name below the package: "noise", "methods.pid", "" for the package itself."""
    trees = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        trees[name] = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return trees


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def nodes(tree: ast.AST, functions: bool) -> Iterator[ast.AST]:
    """All nodes that can run: at import alone, or within functions too. Imports for type checkers never run."""
    for child in ast.iter_child_nodes(tree):
        if is_type_checking(child) or (
            not functions and isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        ):
            continue
        yield child
        yield from nodes(child, functions)


def imported(tree: ast.AST, functions: bool = True) -> set[str]:
    """Every absolute dotted name that is imported; for `from a import b` both a and a.b."""
    names = set()
    for node in nodes(tree, functions):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own_imports(name: str, functions: bool = True) -> set[str]:
    """Modules of this package that a module imports, the longest name that is one."""
    trees = modules()
    found = set()
    for target in imported(trees[name], functions):
        if target.split(".")[0] == "limbeck":
            rest = target.removeprefix("limbeck").removeprefix(".")
            while rest and rest not in trees:
                rest = rest.rpartition(".")[0]
            found.add(rest)
    # `from limbeck import x` names the package as well, which is empty
    return found - {""}


def below(module: str, names: tuple[str, ...]) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in names)


def test_the_walk_sees_what_it_should() -> None:
    assert {"", "noise", "methods.pid", "networks.mlp", "train"} <= modules().keys()
    assert {"denoiser", "generator", "losses", "noise", "objective"} <= own_imports("methods.pid")
    tree = ast.parse("import a.b\ndef f():\n    from c import d\nif TYPE_CHECKING:\n    import e\n")
    assert imported(tree) == {"a.b", "c", "c.d"} and imported(tree, functions=False) == {"a.b"}


@pytest.mark.parametrize("layer", MAY_IMPORT)
def test_imports_point_one_way(layer: str) -> None:
    members = [name for name in modules() if below(name, (layer,))]
    assert members
    for name in members:
        stray = {target for target in own_imports(name) if not below(target, MAY_IMPORT[layer])}
        assert not stray, f"{name} imports {', '.join(sorted(stray))}"


def test_methods_know_neither_each_other_nor_the_shell() -> None:
    members = [name for name in modules() if name.startswith("methods.")]
    assert members
    for name in members:
        stray = {target for target in own_imports(name) if below(target, SHELL)}
        assert not stray, f"{name} imports {', '.join(sorted(stray))}"


def test_the_table_of_methods_imports_none_of_them() -> None:
    assert not own_imports("methods")


def test_nothing_imports_the_command_line() -> None:
    for name in modules():
        if name not in ("cli", "__main__", "manual"):
            assert not below("cli", tuple(own_imports(name))), name


def test_imports_have_no_cycle() -> None:
    """Among the imports that run when a module is loaded."""
    graph = {name: own_imports(name, functions=False) for name in modules()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        if name not in done:
            for target in graph[name] - {name}:
                visit(target, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


# Files are never executed ---------------------------------------------------------------------------------------------

EXECUTING = ("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "torchvision")


@pytest.mark.parametrize("name", modules())
def test_no_module_can_execute_a_file(name: str) -> None:
    tree = modules()[name]
    for target in imported(tree):
        assert target.split(".")[0] not in EXECUTING, f"{name} imports {target}"
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
        if called == "torch.load":
            assert keywords.get("weights_only") == "True", f"{name}:{node.lineno}: torch.load without weights_only=True"
        assert keywords.get("allow_pickle", "False") == "False", f"{name}:{node.lineno}: allow_pickle"
        assert called not in ("eval", "exec", "torch.hub.load"), f"{name}:{node.lineno}: {called}"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_what_could_execute_a_file_is_not_even_named(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    for word in ("torchvision", "pickle.load", "Unpickler", "find_class", "weights_only=False", "allow_pickle=True"):
        assert word not in source, word


@pytest.mark.parametrize("module", ["limbeck", "limbeck.methods", "limbeck.cli"])
def test_importing_costs_nothing(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
