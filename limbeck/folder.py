"""A run's folder: one run at a time writes in it, signals end that run, and what it holds can be checked.

A finished run leaves manifest.json with the SHA-256 of its recipe, log, models and report. Checkpoints and teacher
samples carry hashes of their own; pictures and the doctor's opinion, which no run reads, have none.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import IO, Any

from limbeck.files import sha256, write_atomically

Tell = Callable[[str], None]

MANIFEST = "manifest.json"
SEALED = ("recipe.toml", "log.jsonl", "report.json", "report.html", "*.safetensors")


class Stopped(Exception):
    """The run, or several of them (step None), was asked to stop, and has saved.

    Attributes:
        code: the exit code: 130 for Ctrl-C, 143 for SIGTERM.
    """

    def __init__(self, signum: int, step: int | None) -> None:
        super().__init__(signum, step)  # as it is, so that it can come from another process
        self.step, self.code = step, 128 + signum

    def __str__(self) -> str:
        where = "" if self.step is None else f" at step {self.step}"
        return f"stopped{where}, saved; the same command continues"


class Stop:
    """Which signal has asked the run to stop, 0 for none. It is obeyed at once, but not in the middle of a step."""

    def __init__(self) -> None:
        self.signum = 0
        self.step: int | None = 0
        self.patient = False

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        if self.signum == signum == signal.SIGINT:
            raise KeyboardInterrupt  # the second Ctrl-C does not wait for the end of the step
        self.signum = signum
        if not self.patient:
            raise Stopped(signum, self.step)

    @contextlib.contextmanager
    def waiting(self, patient: bool) -> Iterator[None]:
        """Let a signal wait until the block is left, or with False until it is entered: then `Stopped` is raised."""
        before, self.patient = self.patient, patient
        try:
            self.obey()
            yield
        finally:
            self.patient = before
        self.obey()

    def obey(self) -> None:
        """Raise `Stopped` if a signal has come and nothing has to wait."""
        if self.signum and not self.patient:
            raise Stopped(self.signum, self.step)


@contextlib.contextmanager
def signals() -> Iterator[Stop]:
    """Ctrl-C and SIGTERM end the run. Other threads than the main one cannot set handlers."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


@contextlib.contextmanager
def lock(out: Path) -> Iterator[None]:
    """Keep a second process out of the folder. The lock ends with the process, however it ends."""
    with open(out / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"out: {out} is in use by another run") from None
        yield


def mark(log: IO[str]) -> dict[str, Any]:
    """Length and hash of a log that is being written, for the checkpoint that it belongs to."""
    log.flush()
    os.fsync(log.fileno())
    content = Path(log.name).read_bytes()
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def cut_log(path: Path, step: int, marked: Mapping[str, Any] | None, tell: Tell) -> None:
    """Bring a log back to its checkpoint of `step`: rows behind it belong to steps that are played again.

    A damaged log is named, and keeps the rows that can be read.
    """
    content = path.read_bytes() if path.is_file() else b""
    if marked is not None and hashlib.sha256(content[: marked["bytes"]]).hexdigest() == marked["sha256"]:
        write_atomically(path, content[: marked["bytes"]])
        return
    if marked is not None:
        tell(f"{path}: damaged before step {step}; rows that can be read are kept")
    rows = [line for line in content.decode(errors="replace").splitlines() if step_of(line) <= step]
    write_atomically(path, "".join(row + "\n" for row in rows))


def step_of(line: str) -> float:
    """The step of a log's row, infinity for a row that is none."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return float("inf")


def seal(out: Path) -> None:
    """Write the hashes of a finished run's files."""
    names = sorted(path.name for pattern in SEALED for path in out.glob(pattern))
    write_atomically(out / MANIFEST, json.dumps({name: sha256(out / name) for name in names}, indent=1) + "\n")


def damaged(out: Path) -> list[str]:
    """Names of a finished run's files that are missing or not what they were; none for an unfinished run."""
    if not (out / MANIFEST).is_file():
        return []
    try:
        hashes = dict(json.loads((out / MANIFEST).read_text()))
    except (OSError, ValueError, TypeError, RecursionError):
        return [MANIFEST]
    found = []
    for name, known in sorted(hashes.items()):
        path = out / Path(name).name
        if not path.is_file() or sha256(path) != known:
            found.append(Path(name).name)
    return found
