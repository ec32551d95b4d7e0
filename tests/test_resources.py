"""What a run needs: estimated before it starts, refused with what to change, explained when memory runs out."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import limbeck
from limbeck import cli, config, methods, resources, run
from limbeck.resources import GIB, Needs
from limbeck.train import Trainer

ROOT = Path(__file__).parent.parent
NEEDS = Needs(resident=GIB, fixed=GIB // 2, sample=GIB / 64, save=0, moments=GIB // 4, checkpoint=10**6)


def job_of(out: Path, method: str, **settings: Any) -> run.Job:
    table = {
        "teacher": "exact:ring8", "method": {"name": method, **settings}, "steps": 3, "batch": 16, "warm_start": 0,
        "template": {"network": "mlp", "width": 16, "depth": 1, "dropout": 0.3},
    }  # fmt: skip
    return run.distillation(config.resolve(table, methods.METHODS), out, lambda line: None)


@pytest.mark.parametrize("method", methods.METHODS)
def test_measuring_changes_nothing(tmp_path: Path, method: str) -> None:
    job = job_of(tmp_path / "r", method)
    torch.manual_seed(3)
    before, rng = copy.deepcopy(job.trainer.state_dict()), torch.get_rng_state()
    needs = resources.measure(job.trainer, job.source)
    after = job.trainer.state_dict()
    for name, net in before["nets"].items():
        assert all(torch.equal(net[key], after["nets"][name][key]) for key in net)
    assert torch.equal(rng, torch.get_rng_state()) and after["optimizers"] == before["optimizers"]
    assert all(p.grad is None and not p.requires_grad for p in job.trainer.nets.parameters())
    assert needs.sample > 0 and needs.checkpoint > 0 and needs.moments > 0


def test_turns_that_begin_later_count(tmp_path: Path) -> None:
    """SiDA's generator waits for 100,000 images, and has the largest graph of all turns."""
    gated = job_of(tmp_path / "a", "sida")
    open_ = job_of(tmp_path / "b", "sida", game={"fake_first": 0})
    assert gated.recipe.method.game.fake_first and not open_.recipe.method.game.fake_first
    one, other = (resources.measure(job.trainer, job.source) for job in (gated, open_))
    assert one.sample == other.sample
    turns = list(gated.trainer.objective.turns(0, 0))
    assert [turn.players for turn in turns] == [("fake", "critic")]


def test_the_estimate_holds(tmp_path: Path) -> None:
    """Within 20% of a process of its own, checkpoint included."""
    code = """
import sys, json, torch
from pathlib import Path
from limbeck import checkpoint, config, methods, networks, resources, run
from limbeck.denoiser import Preconditioned
from limbeck.machine import peak_memory_mib
torch.set_num_threads(1)
teacher = Preconditioned(networks.for_samples("dit", (3, 32, 32), 0, {}), (3, 32, 32), 0, 0.5)
table = {"teacher": "mine", "method": {"name": "sid"}, "batch": 96, "micro_batches": 2, "warm_start": 0}
job = run.distillation(config.resolve(table, methods.METHODS), Path(sys.argv[1]), print, teacher)
needs = resources.measure(job.trainer, job.source)
job.trainer.advance(job.source)
checkpoint.save(Path(sys.argv[1]), 1, {"trainer": job.trainer.state_dict()}, 1)
print(json.dumps([needs.memory(96, 2) / 2**20, peak_memory_mib()]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "c")], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    estimate, peak = json.loads(done.stdout)
    assert estimate == pytest.approx(peak, rel=0.2)


def test_memory_falls_with_parts() -> None:
    assert NEEDS.memory(64, 1) > NEEDS.memory(64, 4) > NEEDS.memory(64, 64) > GIB
    free = NEEDS.memory(64, 4) - GIB
    assert NEEDS.advice(64, free).startswith("micro_batches = 4 takes about")
    assert "smaller template" in NEEDS.advice(64, GIB // 8)


def test_a_run_that_cannot_fit_is_refused(
    tmp_path: Path, tiny_keys: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    arguments = ["distill", "exact:ring8", "--out", str(tmp_path / "r"), *tiny_keys]
    monkeypatch.setattr(resources, "measure", lambda trainer, source: NEEDS)
    monkeypatch.setattr(resources, "free_memory", lambda device: GIB // 4)
    assert cli.main(arguments) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "micro_batches: this run needs about" in told and "smaller template" in told
    monkeypatch.setattr(resources, "free_memory", lambda device: None)
    monkeypatch.setattr(resources.shutil, "disk_usage", lambda place: type("Usage", (), {"free": 10**6}))
    assert cli.main(arguments) == 2
    assert "keep: 3 checkpoints of 1.0 MB need 3.0 MB more" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 1 TB")])
def test_out_of_memory_says_what_to_change(
    tmp_path: Path, tiny_keys: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any, error: Exception
) -> None:
    def advance(self: Trainer, source: Any) -> Any:
        raise error

    monkeypatch.setattr(Trainer, "advance", advance)
    assert cli.main(["distill", "exact:ring8", "--out", str(tmp_path / "r"), *tiny_keys]) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("limbeck: out of memory; micro_batches = ") and "last checkpoint is intact" in told


def test_other_errors_pass(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="shape"), resources.explained(None, 4):
        raise RuntimeError("shape mismatch")


def test_a_large_run_says_what_it_needs(tmp_path: Path, tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    limbeck.distill("exact:ring8", out=tmp_path / "small", tell=told.append, **tiny)
    assert not any("GiB" in line for line in told)
    monkeypatch.setattr(resources, "measure", lambda trainer, source: NEEDS)
    limbeck.distill("exact:ring8", out=tmp_path / "large", tell=told.append, **tiny)
    assert "needs about 1.7 GiB of memory, and 2.0 MB of disk for checkpoints" in told


def test_files_that_were_read_take_no_memory_of_a_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in (("max", "8000"), ("current", "7000"), ("stat", "anon 500\ninactive_file 6000\nfile 6400\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    monkeypatch.setattr(resources, "GROUP", tmp_path)
    assert resources.free_memory() == 7000
    (tmp_path / "memory.max").write_text("max")  # no limit
    assert resources.free_memory() > 1e6


def test_free_memory_is_known_here() -> None:
    free = resources.free_memory()
    assert free is None or 0 < free < 2**50
    assert [resources.duration(s) for s in (5, 600, 7200, 400_000)] == [
        "5 seconds", "10.0 minutes", "2.0 hours", "4.6 days"
    ]  # fmt: skip
