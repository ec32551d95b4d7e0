"""Files that are either whole or absent."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write `content` to `path` so that a crash leaves either the old file or the new one.

    Raises:
        OSError: e.g. on a full disk; the old file is then intact and nothing is left behind.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.tmp")  # one name: what a killed process left is written over
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def check_folder(out: str | Path) -> None:
    """Raise ValueError if no folder can be at `out`: it is empty, or a file is in its way."""
    if not str(out):
        raise ValueError("out: is empty, name a folder")
    for place in (Path(out), *Path(out).parents):
        if place.exists() and not place.is_dir():
            raise ValueError(f"out: {place} is a file, a folder is needed")


def check_file(out: str | Path) -> None:
    """Raise ValueError if no file can be at `out`."""
    if Path(out).is_dir():
        raise ValueError(f"out: {out} is a folder, a file is needed")
    check_folder(Path(out).parent)


def sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
