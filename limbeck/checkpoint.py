"""Checkpoints of a run: folders `ckpt-STEP` with safetensors, JSON, and a manifest of SHA-256 hashes.

A checkpoint appears by a rename and is complete from then on. On resume every file is checked against the manifest
before it is parsed; a damaged checkpoint is named and skipped for the newest good one. Nothing in them can run code.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from limbeck.files import sha256

SEPARATOR = "/"


def save(folder: Path, step: int, state: Mapping[str, Any], keep: int) -> Path:
    """Write `state` (nested dictionaries of tensors, numbers and strings) as `folder/ckpt-STEP`.

    Only the newest `keep` checkpoints stay. Those of later steps go too, because `load_newest` has found them damaged.
    The folder has one writer at a time.

    Raises:
        OSError: e.g. on a full disk; earlier checkpoints are then intact and nothing is left behind.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"ckpt-{step:09d}"
    temporary = folder / f".tmp-{os.getpid()}-{final.name}"
    tensors: dict[str, Tensor] = {}
    rest = _split(state, "", tensors)
    try:
        for stale in folder.glob(".tmp-*"):  # of a process that was killed while it wrote
            shutil.rmtree(stale, ignore_errors=True)
        temporary.mkdir()
        _write(temporary / "state.safetensors", safetensors.torch.save(tensors))
        _write(temporary / "state.json", json.dumps(rest).encode())
        hashes = {name: sha256(temporary / name) for name in ("state.safetensors", "state.json")}
        _write(temporary / "manifest.json", json.dumps({"step": step, "sha256": hashes}).encode())
        _sync(temporary)
        if final.exists():  # left by a run that was resumed from an older checkpoint, because this one was damaged
            shutil.rmtree(final)
        os.rename(temporary, final)
        _sync(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    checkpoints = _all(folder)
    newest = checkpoints.index(final)
    for other in checkpoints[:newest] + checkpoints[newest + keep :]:
        shutil.rmtree(other, ignore_errors=True)
    return final


def load_newest(folder: Path, tell: Callable[[str], None]) -> dict[str, Any] | None:
    """The state of the newest good checkpoint in `folder`, None if there never was one.

    Args:
        tell: receives one line for each damaged checkpoint that is skipped.

    Raises:
        ValueError: if there are checkpoints, but none is good.
    """
    checkpoints = _all(folder)
    for path in checkpoints:
        try:
            return _load(path)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            tell(f"{path}: damaged, skipped ({error})")
    if checkpoints:
        raise ValueError(f"{folder}: every checkpoint is damaged; move the folder away to start anew")
    return None


def _all(folder: Path) -> list[Path]:
    """Checkpoints in `folder`, newest first."""
    return sorted((p for p in folder.glob("ckpt-*") if p.name[5:].isdecimal()), key=_step, reverse=True)


def _step(path: Path) -> int:
    return int(path.name[5:])


def _load(path: Path) -> dict[str, Any]:
    manifest = json.loads((path / "manifest.json").read_text())
    for name in ("state.safetensors", "state.json"):
        if sha256(path / name) != manifest["sha256"][name]:
            raise ValueError(f"{name} does not match its hash")
    if manifest["step"] != _step(path):
        raise ValueError(f"manifest.json is that of step {manifest['step']}")
    tensors = safetensors.torch.load_file(str(path / "state.safetensors"))
    state: dict[str, Any] = json.loads((path / "state.json").read_text())
    for name, tensor in tensors.items():
        *parents, leaf = name.split(SEPARATOR)
        place = state
        for parent in parents:
            place = place.setdefault(parent, {})
        place[leaf] = tensor
    return state


def _split(state: Mapping[str, Any], prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Move the tensors of a nested mapping to `tensors` under their path; what is left is JSON."""
    rest: dict[str, Any] = {}
    for key, value in state.items():
        assert SEPARATOR not in key, key
        if isinstance(value, Tensor):
            tensors[prefix + key] = value.detach().contiguous().clone()
        elif isinstance(value, Mapping):
            rest[key] = _split(value, prefix + key + SEPARATOR, tensors)
        else:
            rest[key] = value
    return rest


def _write(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
