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
    temporary = folder / f".tmp-{os.getpid()}-{name_of(step)}"
    tensors: dict[str, Tensor] = {}
    rest = parted(state, tensors)
    try:
        for stale in folder.glob(".tmp-*"):  # of a process that was killed while it wrote
            shutil.rmtree(stale, ignore_errors=True)
        temporary.mkdir()
        copies = {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}
        _write(temporary / "state.safetensors", safetensors.torch.save(copies))
        _write(temporary / "state.json", json.dumps(rest).encode())
        return complete(folder, temporary, step, keep)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def name_of(step: int) -> str:
    """The name of a checkpoint's folder."""
    return f"ckpt-{step:09d}"


def complete(folder: Path, temporary: Path, step: int, keep: int) -> Path:
    """Make the files in `temporary` the checkpoint of `step`: a manifest, a rename, and the end of old checkpoints."""
    final = folder / name_of(step)
    hashes = {path.name: sha256(path) for path in sorted(temporary.iterdir())}
    _write(temporary / "manifest.json", json.dumps({"step": step, "sha256": hashes}).encode())
    _sync(temporary)
    if final.exists():  # left by a run that was resumed from an older checkpoint, because this one was damaged
        shutil.rmtree(final)
    os.rename(temporary, final)
    _sync(folder)
    checkpoints = _all(folder)
    newest = checkpoints.index(final)
    for other in checkpoints[:newest] + checkpoints[newest + keep :]:
        shutil.rmtree(other, ignore_errors=True)
    return final


def load_newest(
    folder: Path, tell: Callable[[str], None], load: Callable[[Path], dict[str, Any]] | None = None
) -> dict[str, Any] | None:
    """The state of the newest good checkpoint in `folder`, None if there never was one.

    Args:
        load: reads a checkpoint's folder, if not as `save` writes it.
        tell: receives one line for each damaged checkpoint that is skipped.

    Raises:
        ValueError: if there are checkpoints, but none is good.
    """
    checkpoints = _all(folder)
    for path in checkpoints:
        try:
            return (load or read)(path)
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


def verified(path: Path) -> dict[str, Any]:
    """What a checkpoint holds beside tensors, when every file was compared with the manifest.

    Raises:
        ValueError: if one is not what it was, or missing.
    """
    manifest = json.loads((path / "manifest.json").read_text())
    held = {file.name for file in path.iterdir()} - {"manifest.json"}
    if "state.json" not in held or not held <= manifest["sha256"].keys():
        raise ValueError("manifest.json does not tell of every file")
    for name, known in manifest["sha256"].items():
        if name != Path(name).name or sha256(path / name) != known:
            raise ValueError(f"{name} does not match its hash")
    if manifest["step"] != _step(path):
        raise ValueError(f"manifest.json is that of step {manifest['step']}")
    state: dict[str, Any] = json.loads((path / "state.json").read_text())
    return state


def read(path: Path) -> dict[str, Any]:
    """The state of one checkpoint.

    Raises:
        ValueError: if it is damaged.
    """
    state = verified(path)
    for name, tensor in safetensors.torch.load_file(str(path / "state.safetensors")).items():
        put(state, name, tensor)
    return state


def put(state: dict[str, Any], name: str, tensor: Tensor) -> None:
    """Bring a tensor to its place in a nested dictionary."""
    *parents, leaf = name.split(SEPARATOR)
    for parent in parents:
        state = state.setdefault(parent, {})
    state[leaf] = tensor


def parted(state: Mapping[str, Any], tensors: dict[str, Tensor], prefix: str = "") -> dict[str, Any]:
    """Move the tensors of a nested mapping to `tensors` under their path; what is left is JSON."""
    rest: dict[str, Any] = {}
    for key, value in state.items():
        assert SEPARATOR not in key, key
        if isinstance(value, Tensor):
            tensors[prefix + key] = value.detach().contiguous()
        elif isinstance(value, Mapping):
            rest[key] = parted(value, tensors, prefix + key + SEPARATOR)
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
