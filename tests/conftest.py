"""What the tests of runs, files and the command line share."""

from __future__ import annotations

import importlib.util
import os
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import hypothesis
import pytest
import safetensors.torch
import torch
from torch import Tensor

torch.set_num_threads(1)
hypothesis.settings.register_profile("limbeck", deadline=None, database=None, derandomize=True)
hypothesis.settings.load_profile("limbeck")


@pytest.fixture(autouse=True)
def _same_threads() -> Iterator[None]:
    """Recipes may set torch's threads; other tests must not feel it."""
    yield
    torch.set_num_threads(1)


@pytest.fixture
def tool() -> Callable[[str], ModuleType]:
    """Loads a program of tools/ as a module."""

    def load(name: str) -> ModuleType:
        path = Path(__file__).parent.parent / "tools" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def tiny() -> dict[str, Any]:
    """Recipe keys of a run that takes a tenth of a second, with a checkpoint and a log row at every step."""
    return {
        "steps": 6, "batch": 8, "template": {"network": "mlp", "width": 8, "depth": 1, "dropout": 0.3},
        "every": {"save": 1, "log": 1, "sample": 0}, "evaluate": {"samples": 200, "teacher_steps": 4},
    }  # fmt: skip


@pytest.fixture
def tiny_keys() -> list[str]:
    """`tiny` on the command line."""
    text = (
        "--steps 6 --batch 8 --template.network mlp --template.width 8 --template.depth 1 --template.dropout 0.3 "
        "--every.save 1 --every.log 1 --every.sample 0 --evaluate.samples 200 --evaluate.teacher_steps 4"
    )
    return text.split()


@pytest.fixture
def weights() -> Callable[[Path], dict[str, Tensor]]:
    """The tensors of the model that a run folder holds."""

    def read(out: Path) -> dict[str, Tensor]:
        (file,) = (path for path in out.glob("*.safetensors") if not path.stem.endswith("-best"))
        return safetensors.torch.load_file(str(file))

    return read


@pytest.fixture
def equal() -> Callable[[dict[str, Tensor], dict[str, Tensor]], bool]:
    """Are two sets of tensors equal bit by bit?"""

    def compare(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
        def raw(t: Tensor) -> bytes:
            return t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

        return a.keys() == b.keys() and all(
            a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and raw(a[k]) == raw(b[k]) for k in a
        )

    return compare


@pytest.fixture
def in_child() -> Callable[[Callable[[], object]], int]:
    """Run a function in a forked child: its exit status, negative for a signal, 99 for an exception."""

    def run(action: Callable[[], object]) -> int:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: forking a process with threads
            child = os.fork()
        if child == 0:
            code = 99
            try:
                action()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    return run


@pytest.fixture
def die() -> Callable[[], None]:
    """Kill this process as `kill -9` does: no handler, no `finally`, no `atexit`."""

    def now() -> None:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("unreachable")

    return now
