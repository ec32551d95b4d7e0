"""Checkpoints: what is written comes back bit by bit, whatever happens in between leaves the earlier one."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from limbeck import checkpoint

FILES = ("state.safetensors", "state.json", "manifest.json")


def state_of(step: int) -> dict[str, Any]:
    """A state with every kind of value that a trainer keeps, different for each step."""
    rng = torch.Generator().manual_seed(step)
    plain = torch.randn(3, 4, generator=rng)
    return {
        "trainer": {
            "step": step,
            "nets": {"generator": {"a.weight": plain, "transposed": plain.T, "again": plain}, "parameterless": {}},
            "odd": {
                "scalar": torch.tensor(float(step)),
                "special": torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-45]),
                "double": torch.randn(2, generator=rng, dtype=torch.float64),
                "half": torch.randn(2, generator=rng).half(),
                "bfloat": torch.randn(2, generator=rng).bfloat16(),
                "long": torch.tensor([2**62, -1]),
                "bool": torch.tensor([True, False]),
                "empty": torch.zeros(0, 3),
            },
        },
        "seconds": 0.1 + 0.2,
        "text": 'a "quoted" ü/é\n',
        "flag": True,
        "nothing": None,
        "list": [1, 2.5, "x", None],
    }


def same(a: Any, b: Any) -> bool:
    """Equality of nested states, bit by bit."""
    if isinstance(a, torch.Tensor):
        return (
            isinstance(b, torch.Tensor)
            and a.dtype == b.dtype
            and a.shape == b.shape
            and a.contiguous().reshape(-1).view(torch.uint8).equal(b.contiguous().reshape(-1).view(torch.uint8))
        )
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return type(a) is type(b) and a == b


def never(line: str) -> None:
    raise AssertionError(f"told: {line}")


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Checkpoints of steps 1 and 2."""
    for step in (1, 2):
        checkpoint.save(tmp_path / "c", step, state_of(step), keep=5)
    return tmp_path / "c"


def test_round_trip(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path / "deep" / "c", 7, state_of(7), keep=1)
    assert names(path) == sorted(FILES)
    back = checkpoint.load_newest(tmp_path / "deep" / "c", never)
    assert same(back, state_of(7))
    assert not same(back, state_of(8))


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert checkpoint.load_newest(tmp_path / "missing", never) is None
    for name in (".tmp-1-ckpt-000000001", "ckpt-abc", "ckpt-", "ckpt-²"):
        (tmp_path / name).mkdir()
    assert checkpoint.load_newest(tmp_path, never) is None


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_keep(tmp_path: Path, keep: int) -> None:
    for step in range(1, 6):
        checkpoint.save(tmp_path, step, state_of(step), keep)
        assert names(tmp_path) == [f"ckpt-{k:09d}" for k in range(max(1, step - keep + 1), step + 1)]
    assert same(checkpoint.load_newest(tmp_path, never), state_of(5))


def test_order_is_by_number(tmp_path: Path) -> None:
    for step in (999_999_998, 999_999_999, 1_000_000_000):
        checkpoint.save(tmp_path, step, {"step": step}, keep=2)
    assert checkpoint.load_newest(tmp_path, never) == {"step": 1_000_000_000}
    assert names(tmp_path) == ["ckpt-1000000000", "ckpt-999999999"]


def test_a_damaged_later_checkpoint_does_not_push_out_good_ones(tmp_path: Path) -> None:
    """After a fall back from step 5 to 3, saving step 4 with keep=1 must keep step 4, not the damaged 5."""
    for step in (3, 5):
        checkpoint.save(tmp_path, step, state_of(step), keep=2)
    (tmp_path / "ckpt-000000005" / "state.json").write_bytes(b"{}")
    checkpoint.save(tmp_path, 4, state_of(4), keep=1)
    assert same(checkpoint.load_newest(tmp_path, never), state_of(4))
    assert names(tmp_path) == ["ckpt-000000004"]


def test_a_damaged_checkpoint_is_replaced_by_its_own_step(folder: Path) -> None:
    (folder / "ckpt-000000002" / "state.json").write_bytes(b"{}")
    checkpoint.save(folder, 2, state_of(2), keep=2)
    assert same(checkpoint.load_newest(folder, never), state_of(2))


def damaged(folder: Path) -> None:
    """Assert that step 2 is named and skipped for step 1."""
    told: list[str] = []
    assert same(checkpoint.load_newest(folder, told.append), state_of(1))
    assert len(told) == 1 and "ckpt-000000002: damaged, skipped" in told[0] and "\n" not in told[0]


@pytest.mark.parametrize("name", FILES)
def test_every_bit_counts(folder: Path, name: str) -> None:
    """One flipped bit anywhere is found (everywhere in the manifest, at every 7th byte of the others)."""
    path = folder / "ckpt-000000002" / name
    good = path.read_bytes()
    for place in range(0, len(good), 1 if name == "manifest.json" else 7):
        bad = bytearray(good)
        bad[place] ^= 1 << place % 8
        path.write_bytes(bad)
        damaged(folder)
    path.write_bytes(good)
    assert same(checkpoint.load_newest(folder, never), state_of(2))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["empty", "half", "one byte short", "one byte more", "deleted", "folder", "list"])
def test_damaged_files(folder: Path, name: str, damage: str) -> None:
    path = folder / "ckpt-000000002" / name
    good = path.read_bytes()
    path.unlink()
    match damage:
        case "empty":
            path.write_bytes(b"")
        case "half":
            path.write_bytes(good[: len(good) // 2])
        case "one byte short":
            path.write_bytes(good[:-1])
        case "one byte more":
            path.write_bytes(good + b"x")
        case "folder":
            path.mkdir()
        case "list":
            path.write_bytes(b"[1, 2]")
    damaged(folder)


def test_an_empty_checkpoint_folder(folder: Path) -> None:
    shutil.rmtree(folder / "ckpt-000000002")
    (folder / "ckpt-000000002").mkdir()
    damaged(folder)


def test_a_renamed_checkpoint_is_not_another_step(folder: Path) -> None:
    shutil.rmtree(folder / "ckpt-000000002")
    shutil.copytree(folder / "ckpt-000000001", folder / "ckpt-000000002")
    damaged(folder)


def test_all_damaged(folder: Path) -> None:
    for path in folder.iterdir():
        (path / "state.json").unlink()
    told: list[str] = []
    with pytest.raises(ValueError, match="every checkpoint is damaged") as caught:
        checkpoint.load_newest(folder, told.append)
    assert str(folder) in str(caught.value) and len(told) == 2


def test_a_state_is_never_executed(folder: Path) -> None:
    """Pickles in place of the files are only ever hashed."""
    for name in FILES:
        (folder / "ckpt-000000002" / name).write_bytes(b"cos\nsystem\n(S'touch /tmp/limbeck-was-here'\ntR.")
        damaged(folder)


class Countdown:
    """Counts calls of file-system functions and acts at the n-th."""

    def __init__(self, n: int, action: Callable[[], None]) -> None:
        self.left, self.action = n, action

    def wrap(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for place, name in (
            (checkpoint, "_write"), (checkpoint, "_sync"), (checkpoint, "sha256"), (checkpoint.os, "rename"),
            (checkpoint.shutil, "rmtree"),
        ):  # fmt: skip
            monkeypatch.setattr(place, name, self._counted(getattr(place, name)))

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.left -= 1
            if self.left == 0:
                self.action()
            return function(*args, **kwargs)

        return counted


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_an_exception_at_any_moment(folder: Path, error: BaseException) -> None:
    """Step 3 fails at its n-th access to the file system, for every n: a whole state is there, and nothing else."""

    def fail() -> None:
        raise error

    failures = 0
    for n in range(1, 30):
        with pytest.MonkeyPatch.context() as patched:
            Countdown(n, fail).wrap(patched)
            try:
                checkpoint.save(folder, 3, state_of(3), keep=2)
            except type(error):
                failures += 1
            else:
                break
        whole = checkpoint.load_newest(folder, never)
        assert same(whole, state_of(3) if (folder / "ckpt-000000003").exists() else state_of(2))
        assert all(name.startswith("ckpt-") for name in names(folder))
        shutil.rmtree(folder / "ckpt-000000003", ignore_errors=True)
        checkpoint.save(folder, 1, state_of(1), keep=5)
        checkpoint.save(folder, 2, state_of(2), keep=5)
    assert failures >= 7
    assert names(folder) == ["ckpt-000000002", "ckpt-000000003"]


def test_a_failed_write_leaves_earlier_checkpoints_untouched(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    real, calls = checkpoint._write, []

    def write(path: Path, content: bytes) -> None:
        calls.append(path)
        if len(calls) == 2:
            path.write_bytes(content[: len(content) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path, content)

    monkeypatch.setattr(checkpoint, "_write", write)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(folder, 3, state_of(3), keep=1)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_kill_at_any_moment(folder: Path, in_child: Any, die: Any) -> None:
    """`kill -9` at the n-th access to the file system: a whole state is there; the next save sweeps up what is left."""
    codes = []
    for n in range(1, 30):

        def action(n: int = n) -> None:
            Countdown(n, die).wrap(pytest.MonkeyPatch())
            checkpoint.save(folder, 3, state_of(3), keep=2)

        codes.append(in_child(action))
        done = (folder / "ckpt-000000003").exists()
        assert same(checkpoint.load_newest(folder, never), state_of(3 if done else 2))
        if codes[-1] == 0:
            break
        shutil.rmtree(folder / "ckpt-000000003", ignore_errors=True)
        checkpoint.save(folder, 1, state_of(1), keep=5)
        checkpoint.save(folder, 2, state_of(2), keep=5)
        assert all(name.startswith("ckpt-") for name in names(folder))
    assert set(codes) == {-9, 0} and len(codes) >= 7


def test_full_disk(folder: Path, in_child: Any) -> None:
    """The system itself refuses to write more than 100 kB to a file: earlier checkpoints stay, nothing else does."""
    big = {"tensor": torch.zeros(100_000)}

    def action() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        with pytest.raises(OSError) as caught:
            checkpoint.save(folder, 3, big, keep=1)
        assert caught.value.errno == errno.EFBIG

    assert in_child(action) == 0
    assert names(folder) == ["ckpt-000000001", "ckpt-000000002"]
    assert same(checkpoint.load_newest(folder, never), state_of(2))


def test_manifest_lists_every_file(folder: Path) -> None:
    manifest = json.loads((folder / "ckpt-000000002" / "manifest.json").read_text())
    assert manifest["step"] == 2 and sorted(manifest["sha256"]) == ["state.json", "state.safetensors"]
