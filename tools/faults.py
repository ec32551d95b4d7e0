"""Injects faults into runs, files and input, and says what became of them. Writes results/faults.json.

python tools/faults.py [short|usual|long] [NAME ...]

`make faults` is "usual", the tests play "short", `make accept` "long". Runs are forked children that have torch
already; twenty and more go through the real command line. What is compared with an uninterrupted run is every byte of
the last checkpoint's tensors (all players, all moments, the moving average) and the model's fingerprint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import json
import os
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import hypothesis
import torch
from hypothesis import strategies as st

import limbeck
from limbeck import artifact, checkpoint, cli, config, importer, loop, methods
from limbeck.files import write_atomically
from limbeck.folder import Stopped
from limbeck.machine import commit, machine, versions
from limbeck.train import Trainer

ROOT = Path(__file__).parent.parent
STEPS, SAVE = 12, 3
TINY: dict[str, Any] = {
    "steps": STEPS, "batch": 8, "template": {"network": "mlp", "width": 8, "depth": 1, "dropout": 0.3},
    "every": {"save": SAVE, "log": 1, "sample": 0, "evaluate": 5}, "evaluate": {"samples": 40, "teacher_steps": 3},
    "health": {"every": 4}, "warm_start": 4,
}  # fmt: skip
FLAGS = shlex.split(
    "--batch 8 --template.network mlp --template.width 8 --template.depth 1 --every.log 1 --every.sample 0 "
    "--evaluate.samples 40 --evaluate.teacher_steps 3"
)


@dataclass(frozen=True)
class Size:
    """How many of each fault; kills, saves and signals are of each method."""

    kills: int
    saves: int
    signals: int
    commands: int
    ranks: int
    disks: int
    runs: int
    files: int
    malformed: int
    mutated: int


SIZES = {
    "short": Size(
        kills=1, saves=0, signals=0, commands=0, ranks=0, disks=2, runs=20, files=60, malformed=300, mutated=10
    ),
    "usual": Size(
        kills=3, saves=2, signals=1, commands=20, ranks=2, disks=6, runs=80, files=200, malformed=1500, mutated=100
    ),
    "long": Size(
        kills=14, saves=6, signals=4, commands=24, ranks=10, disks=20, runs=240, files=600, malformed=6000, mutated=500
    ),
}


@dataclass
class Row:
    """What became of the faults of one kind.

    Attributes:
        injected: faults.
        continued: runs that went on after one and ended.
        lost: most steps that one fault has cost.
        wrong: results that differ from the uninterrupted run's, or damage and malformed input that passed as sound.
        tracebacks: shown to the user.
        executed: hostile code that ran.
    """

    fault: str
    injected: int = 0
    continued: int = 0
    lost: int = 0
    wrong: int = 0
    tracebacks: int = 0
    executed: int = 0
    seconds: float = 0.0
    notes: list[str] = dataclasses.field(default_factory=list)

    def blame(self, what: str) -> None:
        self.wrong += 1
        self.notes.append(what)

    @property
    def holds(self) -> bool:
        return not (self.wrong or self.tracebacks or self.executed or self.lost > SAVE)


# Runs in children -----------------------------------------------------------------------------------------------------


@dataclass
class Child:
    """A run in a forked process that tells every step through a pipe."""

    pid: int
    pipe: int
    output: Path
    steps: list[int] = dataclasses.field(default_factory=list)

    def follow(self, count: int) -> None:
        """Wait until `count` steps are done, or the child has ended."""
        while len(self.steps) < count and self._read():
            pass

    def end(self) -> int:
        """Wait for the end: exit code, negative for a signal."""
        while self._read():
            pass
        os.close(self.pipe)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def _read(self) -> bool:
        told = os.read(self.pipe, 4096)
        self.steps += list(told)
        return bool(told)


def start(out: Path, method: str, spoil: Callable[[], None] = lambda: None, said: Path | None = None) -> Child:
    """Fork a child that distils ring8 by `method` in `out` and speaks to `said`; `spoil` runs in it before."""
    output, (ours, theirs) = said or out.with_suffix(".txt"), os.pipe()
    output.write_text("")  # a child that is killed at once has said nothing
    pid = os.fork()
    if pid:
        os.close(theirs)
        return Child(pid, ours, output)
    code = 99
    try:
        with open(output, "w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            advance = Trainer.advance

            def told(self: Trainer, source: Any) -> Any:
                result = advance(self, source)
                if "denoiser" not in self.nets:  # a warm start has steps of its own
                    os.write(theirs, bytes([self.step]))
                return result

            Trainer.advance = told  # type: ignore[method-assign]
            spoil()
            code = limited(out, method)
    finally:
        os._exit(code)


def limited(out: Path, method: str) -> int:
    """A run as the command line does it: a line and an exit code for what is foreseen, a traceback for what is not."""
    try:
        limbeck.distill("exact:ring8", method, out=out, **TINY)
        return 0
    except Stopped as error:
        print(error)
        return error.code
    except (OSError, ArithmeticError, MemoryError) as error:
        print(error)
        return 1
    except ValueError as error:
        print(error)
        return 2
    except BaseException:
        import traceback

        traceback.print_exc()
        return 99


def ending(out: Path, history: bool = True) -> str:
    """What a finished run has come to; without its history, of which a damaged log has lost rows."""
    state = out / "checkpoints" / f"ckpt-{STEPS:09d}" / "state.safetensors"
    generator = limbeck.load(out)
    rows = json.loads((out / "report.json").read_text())["history"] if history else []
    scores = [{name: value for name, value in row.items() if name != "seconds"} for row in rows]
    return f"{hash(state.read_bytes())} {artifact.fingerprint(generator)} {scores}"


def die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def dying_in_a_write(count: int) -> None:
    """Die at the `count`-th sync or rename from now, 0 = never; a temporary file has half its length then."""
    left = [count]

    def spoiled(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                if isinstance(args[0], int) and ".tmp" in os.readlink(f"/proc/self/fd/{args[0]}"):
                    with contextlib.suppress(OSError):  # a folder
                        os.ftruncate(args[0], os.fstat(args[0]).st_size // 2)
                die()
            return real(*args)

        return call

    for name in ("fsync", "rename", "replace"):
        setattr(os, name, spoiled(getattr(os, name)))


def broken_off(row: Row, folder: Path, method: str, count: int, how: str, rng: random.Random) -> None:
    """Break runs of `method` off `count` times, each time going on, and compare where they end."""
    whole = folder / f"{method}-whole"
    if not whole.is_dir():
        assert start(whole, method).end() == 0, (whole.with_suffix(".txt")).read_text()
    wanted, left, number = ending(whole), count, 0
    while left:
        out, before = folder / f"{method}-{how}-{number}", 0
        number += 1
        for sitting in range(1000):
            moment = rng.randint(1, 30) if how == "save" and left else 0
            spoil = partial(dying_in_a_write, moment)
            child = start(out, method, spoil)
            if how != "save" and left:
                child.follow(rng.randint(0, 5))
                time.sleep(rng.uniform(0, 0.03))
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child.pid, signal.SIGKILL if how == "kill" else signal.SIGTERM)
            code = child.end()
            if sitting and child.steps:
                row.lost = max(row.lost, before - (child.steps[0] - 1))
            before = child.steps[-1] if child.steps else before
            row.tracebacks += "Traceback" in child.output.read_text()
            if code == 0:
                break
            if code not in (-signal.SIGKILL, 128 + signal.SIGTERM, -signal.SIGTERM):
                row.blame(f"{out.name}: exit code {code}: {child.output.read_text()[-300:]}")
                break
            row.injected += 1
            left -= left > 0
        if not (out / "report.json").is_file() or ending(out) != wanted:
            row.blame(f"{out.name} ends otherwise than {whole.name}")
        else:
            row.continued += 1
        shutil.rmtree(out, ignore_errors=True)


def kills(row: Row, folder: Path, size: Size, rng: random.Random) -> None:
    for method in methods.METHODS:
        broken_off(row, folder, method, size.kills, "kill", rng)


def kills_in_saves(row: Row, folder: Path, size: Size, rng: random.Random) -> None:
    for method in methods.METHODS:
        broken_off(row, folder, method, size.saves, "save", rng)


def signals(row: Row, folder: Path, size: Size, rng: random.Random) -> None:
    for method in methods.METHODS:
        broken_off(row, folder, method, size.signals, "term", rng)
    if row.lost:
        row.blame(f"{row.lost} steps lost, although there was time to save")


def commands(row: Row, folder: Path, size: Size, rng: random.Random) -> None:
    """kill -9 of `python -m limbeck distill`."""
    steps = 120

    def command(name: str) -> list[str]:
        flags = [*FLAGS, "--steps", str(steps), "--every.save", str(SAVE)]
        return [sys.executable, "-m", "limbeck", "distill", "exact:ring8", "--out", str(folder / name), *flags]

    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run(command("whole"), check=True, capture_output=True, env=environment)
    wanted, left, number = artifact.fingerprint(limbeck.load(folder / "whole")), size.commands, 0
    while left:
        out, before = folder / f"command-{number}", 0
        number += 1
        for _ in range(1000):
            process = subprocess.Popen(command(out.name), stderr=subprocess.PIPE, text=True, env=environment)
            target = _logged(out) + rng.randint(1, 40) if left else steps
            while process.poll() is None and (_logged(out) < target or not left):
                time.sleep(0.005)
            process.kill()
            told = process.communicate()[1]
            row.tracebacks += "Traceback" in told
            went_on = told.partition("continuing at step ")[2].split("\n")[0]
            row.lost = max(row.lost, before - int(went_on) if went_on else 0 if "finished at step" in told else before)
            before = _logged(out)
            if process.returncode == 0:
                break
            row.injected, left = row.injected + 1, left - (left > 0)
        if artifact.fingerprint(limbeck.load(out)) != wanted:
            row.blame(f"{out.name} ends otherwise")
        row.continued += 1


def ranks(row: Row, folder: Path, size: Size, rng: random.Random) -> None:
    """kill -9 of one of two processes under torchrun: the job ends, and the same command launches all of it again."""
    steps, environment = 120, {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "LIMBECK_TIMEOUT": "20"}

    def command(name: str) -> list[str]:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        flags = [*FLAGS, "--steps", str(steps), "--every.save", str(SAVE), "--out", str(folder / name)]
        return [*launch, "-m", "limbeck", "distill", "exact:ring8", *flags]

    if size.ranks:
        subprocess.run(command("ranks-whole"), check=True, capture_output=True, env=environment)
        wanted = artifact.fingerprint(limbeck.load(folder / "ranks-whole"))
    for number in range(size.ranks):
        out = folder / f"ranks-{number}"
        job = subprocess.Popen(command(out.name), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
        target = rng.randint(1, steps - 20)
        while job.poll() is None and _logged(out) < target:
            time.sleep(0.005)
        children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(rng.choice(children)), signal.SIGKILL)
        row.injected += 1
        if job.wait(60) == 0:
            row.blame(f"{out.name}: exit code 0 although a process was lost")
        before = _logged(out)
        again = subprocess.run(command(out.name), capture_output=True, text=True, env=environment)
        went_on = again.stderr.partition("continuing at step ")[2].split("\n")[0]
        row.lost = max(row.lost, before - int(went_on) if went_on else before)
        if again.returncode or artifact.fingerprint(limbeck.load(out)) != wanted:
            row.blame(f"{out.name}: exit code {again.returncode}, ends otherwise: {again.stderr[-200:]}")
        else:
            row.continued += 1


def _logged(out: Path) -> int:
    log = out / "log.jsonl"
    return log.read_bytes().count(b"\n") if log.is_file() else 0


# Full disks -----------------------------------------------------------------------------------------------------------


def disks(row: Row, folder: Path, size: Size, rng: random.Random) -> None:
    """Files that cannot grow beyond a limit, and, where mounting is allowed, a file system that is too small."""
    whole = folder / "pid-whole"
    if not whole.is_dir():
        assert start(whole, "pid").end() == 0
    wanted = ending(whole)
    largest = max(p.stat().st_size for p in (whole / "checkpoints").rglob("state.safetensors"))
    for number in range(size.disks):
        out = folder / f"disk-{number}"
        # a first sitting that leaves checkpoints, then one that runs against the limit
        child = start(out, "pid")
        child.follow(rng.randint(4, 8))
        os.kill(child.pid, signal.SIGTERM)
        child.end()
        good = {p.name: ending_of(p) for p in (out / "checkpoints").glob("ckpt-*")}
        limit = rng.randint(largest // 8, largest - 1)
        child = start(out, "pid", lambda limit=limit: limit_files(limit))  # type: ignore[misc]
        code, told = child.end(), child.output.read_text()
        row.injected, row.tracebacks = row.injected + 1, row.tracebacks + ("Traceback" in told)
        if code != 1 or "File too large" not in told.splitlines()[-1]:
            row.blame(f"{out.name}: exit code {code}, {told[-200:]}")
        kept = {p.name: ending_of(p) for p in (out / "checkpoints").glob("ckpt-*")}
        if kept != good or list((out / "checkpoints").glob(".tmp*")):
            row.blame(f"{out.name}: checkpoints {sorted(kept)} after {sorted(good)}")
        assert start(out, "pid").end() == 0
        row.continued += 1
        if ending(out) != wanted:
            row.blame(f"{out.name} ends otherwise")
    _small_disk(row, folder, wanted, 20 * largest)


def ending_of(path: Path) -> int:
    """What a checkpoint holds."""
    return hash((path / "state.safetensors").read_bytes())


def limit_files(size: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def fill_at(step: int, filler: Path) -> None:
    """Let something else take the rest of the disk in the middle of a run."""
    real = Trainer.advance

    def advance(self: Trainer, source: Any) -> Any:
        if self.step == step:
            with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
                while file.write(bytes(1024)):
                    pass
        return real(self, source)

    Trainer.advance = advance  # type: ignore[method-assign]


def _small_disk(row: Row, folder: Path, wanted: str, size: int) -> None:
    place = folder / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        row.notes.append("no small file system: mounting is not allowed here")
        return
    try:
        child = start(place / "r", "pid", partial(fill_at, 4, place / "filler"), folder / "small.txt")
        code, told = child.end(), child.output.read_text()
        row.injected, row.tracebacks = row.injected + 1, row.tracebacks + ("Traceback" in told)
        skipped: list[str] = []
        checkpoint.load_newest(place / "r" / "checkpoints", skipped.append)
        if code != 1 or skipped:
            row.blame(f"small disk: exit code {code}, {told[-200:]}")
        (place / "filler").unlink()
        assert start(place / "r", "pid", said=folder / "small.txt").end() == 0
        row.continued += 1
        if ending(place / "r") != wanted:
            row.blame("small disk: ends otherwise")
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


# Damaged files --------------------------------------------------------------------------------------------------------


def damage(path: Path, rng: random.Random) -> str:
    """Flip a bit, cut, blank or delete a file; what was done."""
    content = bytearray(path.read_bytes())
    how = rng.choice(("flip", "flip", "cut", "blank", "delete")) if content else "delete"
    place = rng.randrange(len(content)) if content else 0
    if how == "delete":
        path.unlink()
        return "deleted"
    if how == "cut":
        del content[place:]
    if how == "flip":
        content[place] ^= 1 << rng.randrange(8)
    if how == "blank":
        content[place : place + 64] = bytes(len(content[place : place + 64]))
    path.write_bytes(content)
    return f"{how} at {place}"


def corruptions(row: Row, folder: Path, size: Size, rng: random.Random) -> None:
    """Damage of any file in the folder of a stopped and of a finished run, then the same command again."""
    finished, stopped = folder / "sid-whole", folder / "sid-stopped"
    if not finished.is_dir():
        assert start(finished, "sid").end() == 0
    wanted, unlogged = ending(finished), ending(finished, history=False)
    child = start(stopped, "sid")
    child.follow(8)
    os.kill(child.pid, signal.SIGTERM)
    assert child.end() == 128 + signal.SIGTERM
    for _ in range(size.runs):
        base, out = rng.choice((finished, stopped)), folder / "damaged"
        shutil.copytree(base, out)
        path = rng.choice(sorted(p for p in out.rglob("*") if p.is_file() and p.name not in (".lock", "doctor.json")))
        sound, how = path.read_bytes(), damage(path, rng)
        if path.is_file() and path.read_bytes() == sound:  # zeros were blanked
            shutil.rmtree(out)
            continue
        row.injected += 1
        told: list[str] = []
        what = f"{base.name}/{path.relative_to(out)} {how}"
        if passes(row, what, partial(limbeck.distill, "exact:ring8", "sid", out=out, tell=told.append, **TINY)):
            row.continued += 1
            newest = max((base / "checkpoints").glob("ckpt-*")).name  # older ones are not opened
            read = path.parent == out or path.parent.name == newest
            named = any("damaged" in line for line in told) or path.name == "recipe.toml"  # which is written anew
            whole = path.name != "log.jsonl"
            if ending(out, whole) != (wanted if whole else unlogged) or (read and not named):
                row.blame(f"{what}: {'ends otherwise' if named else 'not named'}")
        shutil.rmtree(out)
    files(row, finished, folder, size, rng)


def files(row: Row, finished: Path, folder: Path, size: Size, rng: random.Random) -> None:
    """Damage of models and checkpoints, each opened by itself."""
    for number in range(size.files):
        out = folder / "one"
        if number % 2:
            out.mkdir()
            path = out / "generator.safetensors"
            shutil.copy(finished / "generator.safetensors", path)
            opened: Callable[[], Any] = partial(limbeck.load, out)
        else:
            name = f"ckpt-{STEPS:09d}"
            shutil.copytree(finished / "checkpoints" / name, out / name)
            path = out / name / rng.choice(("state.safetensors", "state.json", "manifest.json"))
            opened = partial(checkpoint.load_newest, out, lambda line: None)
        sound, how = path.read_bytes(), damage(path, rng)
        if not path.is_file() or path.read_bytes() != sound:
            row.injected += 1
            if passes(row, f"{path.name} {how}", opened):
                row.blame(f"{path.name} {how}: opened as if sound")
        shutil.rmtree(out)


def passes(row: Row, what: str, attempt: Callable[[], Any]) -> bool:
    """Is nothing wrong with it? A mistake that is told in one line is no traceback; anything else counts as one."""
    try:
        attempt()
    except ValueError as error:
        row.tracebacks += "\n" in str(error)
        return False
    except Exception as error:
        row.tracebacks += 1
        row.notes.append(f"{what}: {type(error).__name__}: {error}")
        return False
    return True


# Hostile and malformed input ------------------------------------------------------------------------------------------


def hostile(row: Row, folder: Path, size: Size, rng: random.Random) -> None:
    """Teacher files that would run code, take all memory or never end, and random mutations of a good one."""
    sys.path.insert(0, str(ROOT / "tests"))
    edm_files, test_import, watch = (importlib.import_module(name) for name in ("edm_files", "test_import", "watch"))

    before = Path.cwd()
    os.chdir(folder)
    try:
        good = edm_files.dumps(edm_files.snapshot(test_import.good()))
        Path("good.pkl").write_bytes(good)
        importer.load(Path("good.pkl"))
        Path("bad.pt").write_bytes(test_import.zip_of({"x": b""}))
        with contextlib.suppress(ValueError):  # imports that Python postpones are over then
            importer.load(Path("bad.pt"))
        cases: dict[str, Callable[[], bytes]] = dict(test_import.HOSTILE)
        for number in range(size.mutated):
            cases[f"mutation {number}"] = lambda: _mutated(good, rng)
        for name, make in cases.items():
            content = make()
            Path("evil.pkl").write_bytes(content if isinstance(content, bytes) else edm_files.dumps(content))
            row.injected += 1
            watch.WATCH.seen.clear()
            try:
                with test_import.bounded(len(good)), watch.WATCH:
                    importer.load(Path("evil.pkl"))
            except ValueError as error:
                row.tracebacks += "\n" in str(error)
            except Exception as error:
                row.tracebacks += 1
                row.notes.append(f"{name}: {type(error).__name__}")
            if watch.WATCH.seen or test_import.CANARY.exists():
                row.executed += 1
                row.notes.append(f"{name}: {watch.WATCH.seen}")
    finally:
        os.chdir(before)


def _mutated(content: bytes, rng: random.Random) -> bytes:
    damaged = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        damaged[rng.randrange(len(damaged))] = rng.randrange(256)
    return bytes(damaged[: rng.choice((len(damaged), rng.randrange(len(damaged))))])


class Begun(Exception):
    """A command line passed all checks."""


WORDS = st.text(
    st.characters(exclude_categories=("Nd", "Nl", "No", "Cs"), exclude_characters="-[{="), min_size=1, max_size=12
)
NOT_NUMBERS = st.one_of(WORDS.filter(lambda w: w.strip().lower() not in ("inf", "nan", "infinity")), st.just("[1]"))
NOT_COUNTS = st.one_of(
    NOT_NUMBERS,
    st.integers(max_value=-1).map(str),
    st.sampled_from(("1.5", "nan", "inf", "-inf", "1e400", "0x10", "{}")),
)
NOT_RATES = st.one_of(NOT_NUMBERS, st.floats(max_value=0).map(str), st.sampled_from(("nan", "inf", "-inf", "1e400")))
BAD: dict[str, st.SearchStrategy[str]] = {
    **{k: NOT_COUNTS for k in ("steps", "batch", "micro_batches", "seed", "keep", "warm_start", "threads")},
    **{f"every.{k}": NOT_COUNTS for k in ("log", "save", "sample", "evaluate")},
    **{f"evaluate.{k}": NOT_COUNTS for k in ("samples", "draws", "seed", "teacher_steps")},
    **{k: NOT_RATES for k in ("ema.half_life", "ema.ramp", "optimizer.generator.lr", "optimizer.generator.eps")},
    **{k: NOT_RATES for k in ("clip", "evaluate.mmd_scale", "method.levels.sigma_max", "method.levels.rho")},
    "optimizer.generator.name": WORDS, "optimizer.generator.schedule": WORDS, "method.metric": WORDS,
    "method.N": st.one_of(NOT_COUNTS, st.sampled_from(("0", "1", "99999999"))),
    "optimizer.generator.betas": st.sampled_from(("[1.0, 0.9]", "[0.5]", "0.9", "[nan, 0.9]", "[-1, 0.9]", "x")),
    "template.network": WORDS, "health.nonfinite": WORDS, "real.source": WORDS, "stratified": WORDS,
}  # fmt: skip
BYTES = st.binary(max_size=200)


@st.composite
def command_lines(draw: st.DrawFn) -> tuple[list[str], dict[str, bytes]]:
    """Arguments that are wrong in one place, and the files that they name."""
    base = ["distill", "exact:ring8", "--out", "out"]
    match draw(st.integers(0, 8)):
        case 0:
            return [draw(WORDS.filter(lambda w: w not in (*cli.VERBS, "help"))), *base[1:]], {}
        case 1:
            undecodable = draw(st.sampled_from(("", "\udce4")))  # as Python passes bytes that are no UTF-8
            return [*base, f"--{draw(WORDS)}{undecodable}zzz={draw(st.text(max_size=5))}"], {}
        case 2 | 3 | 4:
            key = draw(st.sampled_from(sorted(BAD)))
            return [*base, f"--{key}={draw(BAD[key])}"], {}
        case 5:  # a recipe file with one wrong value
            key = draw(st.sampled_from(sorted(BAD)))
            wrong: Any = draw(
                st.one_of(BAD[key], st.just([]), st.just([[]]), st.dictionaries(WORDS, st.integers(), min_size=1))
            )
            table: dict[str, Any] = {"teacher": "exact:ring8", "method": {"name": "pid"}, "steps": 3}
            config.set_dotted(table, key, wrong)
            if isinstance(wrong, dict) and key.startswith("template"):
                return [*base, "--steps", "-1"], {}
            return ["distill", "recipe.toml", "--out", "out"], {"recipe.toml": config.dump_toml(table).encode()}
        case 6:  # a recipe file that is none
            text = b'teacher = "exact:ring8"\nsteps = 3\n[method]\nname = "pid"\n'
            cut = draw(st.integers(12, len(text) - 3))
            noise = draw(BYTES.filter(lambda b: b.strip(b" \t\r\n") != b""))
            return ["distill", "recipe.toml", "--out", "out"], {"recipe.toml": text[:cut] + b'"' + noise + b"= = "}
        case 7:  # teachers and places that are not there
            kind = draw(st.sampled_from(("exact:", "edm:", "diffusers:", "file:", "")))
            return ["distill", kind + draw(WORDS), "--out", draw(st.sampled_from(("out", "", "blocked/x", "a\0b")))], {
                "blocked": b""
            }
        case _:  # files of noise, for all that reads files
            suffix = draw(st.sampled_from((".safetensors", ".npz", ".toml", ".pkl", ".pt", ".json", "")))
            name = f"noise{suffix}"
            verb = draw(
                st.sampled_from(("sample", "evaluate", "export", "import", "show", "doctor", "replay", "compare"))
            )
            more = {
                "sample": ["--out", "x.png"], "export": ["--to", "onnx", "--out", "x.onnx"], "import": ["--out", "out"],
                "compare": ["--out", "out"],
            }  # fmt: skip
            return [verb, name, *more.get(verb, [])], {name: draw(BYTES)}


def malformed(row: Row, folder: Path, size: Size, rng: random.Random) -> None:
    """Command lines and recipes that are wrong somewhere, in this process: exit code 2, one line, nothing written."""
    place, before = folder / "malformed", Path.cwd()
    real = loop.run

    def begun(*args: Any) -> NoReturn:
        raise Begun

    @hypothesis.seed(rng.randrange(2**32))
    @hypothesis.settings(
        max_examples=size.malformed, deadline=None, database=None, phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    @hypothesis.given(command_lines())
    def one(case: tuple[list[str], dict[str, bytes]]) -> None:
        arguments, given = case
        place.mkdir()
        os.chdir(place)
        for name, content in given.items():
            Path(name).write_bytes(content)
        row.injected += 1
        out, err = io.StringIO(), io.StringIO()
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = cli.main(arguments)
        except Begun:
            row.blame(f"taken: {arguments} {given}")
        except BaseException as error:
            row.tracebacks += 1
            row.notes.append(f"{type(error).__name__} {error}: {arguments} {given}"[:600])
        else:
            lines = err.getvalue().splitlines()
            written = sorted({p.name for p in place.iterdir()} - set(given))
            if code != 2 or len(lines) != 1 or out.getvalue() or written:
                row.blame(
                    f"code {code}, {len(lines)} lines, wrote {written}: {arguments} {given} {err.getvalue()}"[:600]
                )
        finally:
            os.chdir(before)
            shutil.rmtree(place)

    loop.run = begun  # type: ignore[assignment]
    try:
        one()
    finally:
        loop.run = real


FAULTS: dict[str, Callable[[Row, Path, Size, random.Random], None]] = {
    "kill -9 at a step": kills,
    "kill -9 in a save": kills_in_saves,
    "SIGTERM": signals,
    "kill -9 of the command": commands,
    "kill -9 of one of two processes": ranks,
    "full disk": disks,
    "damaged files": corruptions,
    "hostile teachers": hostile,
    "malformed input": malformed,
}


@contextlib.contextmanager
def workplace() -> Iterator[Path]:
    """A folder for all this, with the bits of one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as name:
            yield Path(name)
    finally:
        torch.set_num_threads(threads)


def play(size: Size, names: list[str], tell: Callable[[str], None], seed: int = 0) -> list[Row]:
    """Inject faults of the kinds `names`, and tell each row of the table."""
    tell(
        f"{'fault':32}{'injected':>9}{'continued':>11}{'lost':>6}{'wrong':>7}{'tracebacks':>12}{'executed':>10}{'s':>6}"
    )
    rows = []
    with workplace() as folder:
        for name in names:
            row, began = Row(name), time.perf_counter()
            FAULTS[name](row, folder, size, random.Random(f"{seed} {name}"))
            row.seconds = round(time.perf_counter() - began, 1)
            tell(
                f"{name:32}{row.injected:9,}{row.continued:11,}{row.lost:6}{row.wrong:7}{row.tracebacks:12}"
                f"{row.executed:10}{row.seconds:6.0f}"
            )
            for note in row.notes[:5]:
                tell(f"    {note}")
            rows.append(row)
    return rows


def summary(rows: list[Row]) -> dict[str, Any]:
    """The result as it is stored."""
    return {
        "rows": [dataclasses.asdict(row) for row in rows], "save_interval": SAVE, "methods": len(methods.METHODS),
        "versions": versions(), "machine": machine(), "commit": commit(),
    }  # fmt: skip


def main() -> int:
    words = sys.argv[1:]
    size = words.pop(0) if words and words[0] in SIZES else "usual"
    rows = play(SIZES[size], words or list(FAULTS), print)
    if not words:
        (ROOT / "results").mkdir(exist_ok=True)
        write_atomically(ROOT / "results" / "faults.json", json.dumps(summary(rows), indent=1) + "\n")
    return 0 if all(row.holds for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
