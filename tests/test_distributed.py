"""Several processes are one batch, with players whole and split; runs and checkpoints of them (gloo, two processes)."""

from __future__ import annotations

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import ranks
import safetensors.torch
import torch
from torch import Tensor

from limbeck import checkpoint, distributed, replay, shards

ROOT = Path(__file__).parent.parent
LAUNCH = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes have done what tests/ranks.py says, from a checkpoint of one."""
    folder = tmp_path_factory.mktemp("two")
    made, source = ranks.unet_trainer(sharded=False)
    ranks.advanced(made, source, 2)
    checkpoint.save(folder / "one", 2, made.state_dict(), keep=1)
    done = subprocess.run(
        [sys.executable, *LAUNCH, str(Path(ranks.__file__)), str(folder)],
        capture_output=True, text=True, timeout=280, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def played(two: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(two / "played.safetensors")


@pytest.mark.parametrize(
    ("name", "parts"), [*((name, 1) for name in ranks.CASES), *((name, 2) for name in ranks.IN_PARTS)]
)
def test_two_processes_are_one_batch(name: str, parts: int, played: dict[str, Tensor]) -> None:
    """Gradients, norms, losses, weights and averages; whole players and split ones."""
    one = ranks.played(name, sharded=False)
    for sharded in (False, True):
        prefix = f"{name}|{parts}|{sharded}|"
        both = {key.removeprefix(prefix): value for key, value in played.items() if key.startswith(prefix)}
        gradients = [value for key, value in both.items() if key.split("/")[0].isdigit()]
        assert both.keys() == one.keys() and any(value.abs().max() > 1e-3 for value in gradients)
        for key, value in one.items():
            assert torch.allclose(both[key], value, rtol=1e-10, atol=1e-10), (key, sharded)


@pytest.mark.parametrize("sharded", [False, True])
def test_all_processes_skip_an_update_together(sharded: bool, played: dict[str, Tensor]) -> None:
    """An infinite gradient on one of them, under the scaler of float16; and activations that are made twice."""
    one, prefix = ranks.skipped(sharded=False), f"skipped|{sharded}|"
    assert one["scaler fake"].tolist() == [2.0**15, 1, 3, 1] and one["scaler generator"].tolist() == [2.0**16, 3, 3, 0]
    both = {key.removeprefix(prefix): value for key, value in played.items() if key.startswith(prefix)}
    assert both.keys() == one.keys()
    for key, value in one.items():
        assert torch.allclose(both[key], value, rtol=1e-10, atol=1e-10), key


def test_checkpoints_move_between_numbers_of_processes(two: Path) -> None:
    """One process, then two with split players, then two again and one again: the run of one process alone."""
    told = safetensors.torch.load_file(two / "resumed.safetensors")
    alone, source = ranks.unet_trainer(sharded=False)
    after4 = ranks.advanced(alone, source, 4)
    after6 = ranks.advanced(alone, source, 2)
    path = two / "several" / "ckpt-000000004"
    assert shards.is_split(path) and not shards.is_split(two / "one" / "ckpt-000000002")
    assert len(list(path.glob("*.safetensors"))) == 2
    resumed, source = ranks.unet_trainer(sharded=False)
    with ranks.nothing_unpickled():
        state = checkpoint.load_newest(two / "several", print, lambda p: shards.load(p, resumed.state_dict()))
    assert state is not None
    resumed.load_state_dict(state)
    later = ranks.advanced(resumed, source, 2)
    for key, value in after4.items():
        assert torch.allclose(told[key], value, rtol=1e-9, atol=1e-10, equal_nan=True), key
    for key, value in after6.items():
        assert torch.allclose(told[f"later {key}"], value, rtol=1e-9, atol=1e-10), key
        assert torch.allclose(later[key], value, rtol=1e-9, atol=1e-10), key


def test_a_killed_process_ends_the_job_and_the_command_goes_on(tmp_path: Path) -> None:
    """One of two processes with split players is killed. The job ends; the same command goes on, one process too."""
    out = tmp_path / "run"
    keys = (
        "--method diff_instruct --batch 16 --sharded true --template.network mlp --template.width 16 "
        "--template.depth 1 --warm_start 20 --every.log 0 --every.sample 0 --every.save 20 --evaluate.samples 200 "
        "--evaluate.teacher_steps 4 --threads 1 --keep 1"
    )
    command = ["-m", "limbeck", "distill", "exact:ring8", *keys.split(), "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LIMBECK_TIMEOUT": "20"}
    job = subprocess.Popen(
        [sys.executable, *LAUNCH, *command, "--steps", "100000"],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    deadline = time.monotonic() + 100
    while not list((out / "checkpoints").glob("ckpt-*")) and job.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    assert len(children) == 2
    os.kill(int(children[1]), signal.SIGKILL)
    killed = time.monotonic()
    _, error = job.communicate(timeout=60)
    assert job.returncode != 0 and time.monotonic() - killed < 40, error[-2000:]
    (left,) = (out / "checkpoints").glob("ckpt-*")
    step = int(left.name[5:])
    assert shards.is_split(left)
    recipe = (out / "recipe.toml").read_text().replace("steps = 100000", f"steps = {step}")
    (out / "recipe.toml").write_text(recipe)  # a run can grow, not shrink
    again = [sys.executable, *LAUNCH, *command, "--json", "--steps", str(step + 20)]
    done = subprocess.run(again, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"continuing at step {step}" in done.stderr
    report = json.loads(done.stdout)
    assert report["steps"] == step + 20 and report["processes"] == 2 and "mmd" in report["student"]["metrics"]
    alone = subprocess.run(
        [sys.executable, *command, "--json", "--steps", str(step + 40)],
        capture_output=True, text=True, timeout=120, env=environment,
    )  # fmt: skip
    assert alone.returncode == 0, alone.stderr[-2000:]
    assert f"continuing at step {step + 20}" in alone.stderr and "processes: 2 before, 1 now" in alone.stderr
    assert json.loads(alone.stdout)["processes"] == 1


KEYS = (
    "--batch 15 --template.network mlp --template.width 16 --template.depth 1 --warm_start 0 --every.log 0 "
    "--every.sample 0 --evaluate.samples 40 --evaluate.teacher_steps 3 --threads 1"
)


@pytest.mark.parametrize("sharded", ["false", "true"])
def test_nan_on_several_processes_is_replayed_on_one(sharded: str, tmp_path: Path) -> None:
    """Shares of 8 and 7 samples: all processes stop, the turn is kept whole, and one process finds the same losses."""
    out = tmp_path / "run"
    huge = "--optimizer.generator.name adamw --optimizer.generator.lr 100 --optimizer.generator.weight_decay 1e30"
    keys = f"--method diff_instruct --sharded {sharded} --steps 9 {huge} {KEYS}"
    command = [sys.executable, *LAUNCH, "-m", "limbeck", "distill", "exact:ring8", *keys.split(), "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LIMBECK_TIMEOUT": "20"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment)
    assert done.returncode == 1 and f"`limbeck replay {out}` says where" in done.stderr, done.stderr[-2000:]
    assert shards.is_split(next((out / "nonfinite").glob("ckpt-*"))) == (sharded == "true")
    found = replay.replay(out, print)
    assert found.reproduced and found.count == 15 and (found.samples or "not finite" in found.operation)


def test_signals_end_several_processes_and_none_is_lost(tmp_path: Path) -> None:
    """SIGTERM for the job reaches its processes in different steps; all save the same one."""
    out = tmp_path / "run"
    command = [
        sys.executable, *LAUNCH, "-m", "limbeck", "distill", "exact:ring8", *KEYS.split(), "--steps", "1000000",
        "--every.save", "0", "--every.evaluate", "50", "--out", str(out),
    ]  # fmt: skip
    job = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 200
    while "metrics" not in _text(out / "log.jsonl") and job.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    job.send_signal(signal.SIGTERM)
    _, error = job.communicate(timeout=60)
    assert job.returncode not in (0, 2), error[-2000:]
    (left,) = (out / "checkpoints").glob("ckpt-*")
    step = int(left.name[5:])
    assert f"stopped at step {step}, saved" in error and step >= 50
    state = checkpoint.read(left)
    assert state["trainer"]["step"] == step


def test_sampling_is_shared_by_the_processes(tmp_path: Path) -> None:
    """Shares of 3 and 4 samples: those of one process, in its order, with their labels."""
    words = ["-m", "limbeck", "sample", "digits", "--steps", "3", "--count", "7", "--seed", "5", "--out"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name, launch in (("one.npz", []), ("two.npz", LAUNCH)):
        command = [sys.executable, *launch, *words, str(tmp_path / name)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment)
        assert done.returncode == 0 and done.stderr.count("7 samples in") + done.stdout.count("7 samples in") == 1
    one, two = (np.load(tmp_path / name) for name in ("one.npz", "two.npz"))
    assert np.array_equal(one["y"], two["y"]) and len({*one["y"]}) > 1
    assert np.abs(one["x"].astype(int) - two["x"].astype(int)).max() <= 1  # of 8 bits


def pair(code: str, **variables: str) -> list[subprocess.Popen[bytes]]:
    """Two processes of one job that run `code`, without a launcher."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, "-c", code], stderr=subprocess.PIPE,
            env={**os.environ, **place, **variables, "RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip


def test_processes_end_well_right_after_an_exchange(tmp_path: Path) -> None:
    """Four pairs: every second one aborted when the process group was left to the interpreter's end."""
    code = "import torch; from limbeck import distributed; distributed.gather({'x': torch.ones(1_000_000)})"
    for job in [job for _ in range(4) for job in pair(code)]:
        _, error = job.communicate(timeout=100)
        assert job.returncode == 0, error


def test_a_process_that_answers_no_more_is_given_up(tmp_path: Path) -> None:
    """It lives and is silent: the other one waits for LIMBECK_TIMEOUT seconds, not for ten minutes."""
    ready = [tmp_path / str(rank) for rank in range(2)]
    code = (
        "import os, pathlib, time\n"
        "from limbeck import distributed\n"
        f"ready = [pathlib.Path(name) for name in {[str(path) for path in ready]}]\n"
        "ready[int(os.environ['RANK'])].touch()\n"
        "while not all(path.exists() for path in ready): time.sleep(0.02)\n"
        "distributed.wait_for_all()\n"
        "time.sleep(60 * distributed.rank_and_world()[0])\n"
        "began = time.monotonic()\n"
        "try:\n"
        "    distributed.wait_for_all()\n"
        "except distributed.Lost as error:\n"
        "    assert 'the same command goes on' in str(error)\n"
        "    assert 3 < time.monotonic() - began < 30\n"
        "    os._exit(7)\n"
    )
    waiting, silent = pair(code, LIMBECK_TIMEOUT="4")
    try:
        _, error = waiting.communicate(timeout=50)
        assert waiting.returncode == 7, error
    finally:
        silent.kill()
        silent.communicate()


def test_a_pass_of_split_players_says_that_a_process_was_lost() -> None:
    """And only that: what is wrong with the networks themselves keeps its own words."""
    code = (
        "import os, ranks\n"
        "from limbeck import distributed\n"
        "made, source = ranks.unet_trainer(sharded=True)\n"
        "made.advance(source)\n"
        "distributed.wait_for_all()\n"
        "if distributed.rank_and_world()[0]: os._exit(9)\n"
        "try:\n"
        "    made.advance(source)\n"
        "except distributed.Lost as error:\n"
        "    assert 'the same command goes on' in str(error)\n"
        "    os._exit(7)\n"
    )
    left, dead = pair(code, LIMBECK_TIMEOUT="20", PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}")
    _, error = left.communicate(timeout=100)
    dead.communicate(timeout=100)
    assert (left.returncode, dead.returncode) == (7, 9), error
    with pytest.raises(RuntimeError, match="a shape"), distributed.alive(passes=True):
        raise RuntimeError("a shape that does not fit")
    with pytest.raises(distributed.Lost, match="closed by peer"), distributed.alive(passes=True):
        raise RuntimeError("[/gloo/transport/tcp/pair.cc:538] Connection closed by peer")


def _text(path: Path) -> str:
    return path.read_text() if path.is_file() else ""


def test_the_audit_sees_pickles() -> None:
    content = pickle.dumps(Path("x"))
    with pytest.raises(AssertionError, match="find_class"), ranks.nothing_unpickled():
        pickle.loads(content)


def test_a_damaged_piece_is_refused(two: Path) -> None:
    path = two / "several" / "ckpt-000000004"
    piece = sorted(path.glob("*.safetensors"))[1]
    content = piece.read_bytes()
    made, _ = ranks.unet_trainer(sharded=False)
    try:
        piece.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(ValueError, match="does not match its hash"):
            shards.load(path, made.state_dict())
        piece.write_bytes(content)
        (path / "shard-00003-model-00001-of-00001.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match="does not tell of every file"):
            shards.load(path, made.state_dict())
    finally:
        (path / "shard-00003-model-00001-of-00001.safetensors").unlink(missing_ok=True)
        piece.write_bytes(content)
