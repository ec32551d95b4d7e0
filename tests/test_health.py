"""Faults of training: NaN and Inf are stopped, kept and replayed; what is finite and wrong is told, once."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from test_run import Told
from torch import Tensor, nn

import limbeck
from limbeck import checkpoint, cli, config, features, health, loop, replay
from limbeck.exact import Mixture
from limbeck.folder import Stopped
from limbeck.game import lag
from limbeck.health import Monitor, Series
from limbeck.methods import METHODS
from limbeck.methods.pid import PID
from limbeck.train import NonFinite, Trainer


@pytest.fixture
def distill(tiny: dict[str, Any]) -> Callable[..., Any]:
    def start(out: Path, method: Any = "pid", tell: Any = None, **keys: Any) -> Any:
        keys = {"warm_start": 5, **tiny, **keys}
        return limbeck.distill("exact:ring8", method, out=out, tell=Told() if tell is None else tell, **keys)

    return start


def poison(patched: pytest.MonkeyPatch, step: int, player: str, place: str, times: int = 1) -> None:
    """From step `step` on, `times` times: NaN in a weight, an output, one sample's loss, or a gradient of `player`."""
    real, left = Trainer.play, [times]

    def play(self: Trainer, index: int, turn: Any, batches: Any, told: Any) -> Any:
        warm = "generator" not in self.nets
        if warm or self.step < step or not left[0] or player not in (*turn.players, "teacher"):
            return real(self, index, turn, batches, told)
        left[0] -= 1
        loss = turn.loss

        def spoiled(nets: nn.ModuleDict, teacher: Any, batch: Any) -> Tensor:
            each = loss(nets, teacher, batch)
            if place == "loss":
                each = torch.where(torch.arange(len(each)) == 3, math.nan, each)
            if place == "gradient":  # sqrt at 0: a finite value whose slope is not
                each = each + torch.sqrt(0 * next(nets[player].parameters()).sum())
            return each

        if place == "weight":
            net = self.teacher if player == "teacher" else self.nets[player]
            values = list(net.parameters()) or list(net.buffers())
            values[-1].data.view(-1)[0] = math.nan
        return real(self, index, turn._replace(loss=spoiled), batches, told)

    patched.setattr(Trainer, "play", play)


def state_of(out: Path) -> dict[str, Any]:
    state = checkpoint.load_newest(out / "checkpoints", Told())
    assert state is not None
    return state["trainer"]


@pytest.mark.parametrize("place", ["weight", "loss", "gradient"])
@pytest.mark.parametrize(("method", "player"), [("pid", "generator"), ("sid", "fake"), ("sid", "generator")])
def test_a_step_that_is_not_finite_is_stopped_and_replayed(
    tmp_path: Path, distill: Any, capsys: Any, method: str, player: str, place: str
) -> None:
    with pytest.MonkeyPatch.context() as patched:
        poison(patched, 3, player, place)
        with pytest.raises(NonFinite, match=rf"turn of {player} at step 3.*`limbeck replay {tmp_path / 'r'}`"):
            distill(tmp_path / "r", method)
    assert state_of(tmp_path / "r")["step"] == 3
    before = {p: p.read_bytes() for p in (tmp_path / "r").rglob("*") if p.is_file()}
    found = replay.replay(tmp_path / "r", Told())
    assert (found.step, found.players) == (3, (player,))
    if place == "weight":
        assert found.reproduced and found.weights and found.weights[0].startswith(f"{player}.")
        assert len(found.samples) > 0 and "its weights" in found.origin and found.gradients
        assert cli.main(["replay", str(tmp_path / "r")]) == 0
        shown = capsys.readouterr().out
        assert "bit for bit" in shown and "where it begins: " in shown and found.weights[0] in shown
        assert cli.main(["replay", str(tmp_path / "r"), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["weights"] == found.weights
    else:  # what was wrong was in our hands, not in weights or batches: it does not come back, and that is said
        assert not found.reproduced and not found.samples and "OTHER losses" in found.lines()[0]
    assert before == {p: p.read_bytes() for p in (tmp_path / "r").rglob("*") if p.is_file()}


def test_a_gradient_alone_is_replayed_to_its_operation(tmp_path: Path, distill: Any) -> None:
    with pytest.MonkeyPatch.context() as patched:
        poison(patched, 2, "generator", "gradient", times=9)
        with pytest.raises(NonFinite, match="gradient norms of nan"):
            distill(tmp_path / "r")
        found = replay.replay(tmp_path / "r", Told())
    assert found.reproduced and not found.samples and found.gradients
    assert "Backward0' returned nan" in found.operation


def test_one_bad_sample_is_named(tmp_path: Path, distill: Any) -> None:
    with pytest.MonkeyPatch.context() as patched:
        poison(patched, 2, "generator", "loss", times=9)
        with pytest.raises(NonFinite, match="first bad sample: 3 of 8"):
            distill(tmp_path / "r")
        found = replay.replay(tmp_path / "r", Told())
    assert found.reproduced and found.samples == [3] and found.count == 8 and not found.origin


def test_a_teacher_of_nan(tmp_path: Path, distill: Any) -> None:
    with pytest.MonkeyPatch.context() as patched:
        poison(patched, 2, "teacher", "weight")
        with pytest.raises(NonFinite):
            distill(tmp_path / "r", "sid")
    # the spoiled teacher was in memory only: the turn is sound with the one that the name says
    assert not replay.replay(tmp_path / "r", Told()).reproduced


def test_replay_needs_a_turn(tmp_path: Path, distill: Any, capsys: Any) -> None:
    distill(tmp_path / "r")
    for out, named in ((tmp_path / "r", "no turn to replay"), (tmp_path, "no recipe.toml")):
        assert cli.main(["replay", str(out)]) == 2
        assert named in capsys.readouterr().err


def test_a_replay_runs_no_program_that_the_folder_names(tmp_path: Path) -> None:
    """Of a stranger's folder only the turn is played: nothing is scored, so no feature network of his is opened."""
    with pytest.MonkeyPatch.context() as patched:
        poison(patched, 3, "generator", "weight")
        with pytest.raises(NonFinite):
            limbeck.distill("digits", "pid", out=tmp_path / "r", tell=Told(), steps=6, batch=4, **{"every.sample": 0})
    table = config.read_toml(tmp_path / "r" / "recipe.toml")
    table["evaluate"] |= {"data": "digits", "features": str(tmp_path / "r" / "evil.pt")}
    (tmp_path / "r" / "recipe.toml").write_text(config.dump_toml(table))
    with pytest.MonkeyPatch.context() as patched:
        honest = features.load
        patched.setattr(features, "load", lambda name: honest(name) if name == "digits" else pytest.fail(name))
        assert replay.replay(tmp_path / "r", Told()).reproduced


@dataclass(frozen=True)
class Mine(PID):
    """A method of the caller's own."""


def test_a_method_of_the_callers_is_replayed_where_he_names_it(tmp_path: Path, distill: Any, capsys: Any) -> None:
    with pytest.MonkeyPatch.context() as patched:
        poison(patched, 3, "generator", "weight")
        with pytest.raises(NonFinite):
            distill(tmp_path / "r", Mine(N=9))
    assert cli.main(["replay", str(tmp_path / "r")]) == 2
    assert "'test_health:Mine' names code; give it on the command line with --method" in capsys.readouterr().err
    assert cli.main(["replay", str(tmp_path / "r"), "--method", "pid"]) == 2
    assert "method: the run" in capsys.readouterr().err
    assert cli.main(["replay", str(tmp_path / "r"), "--method", "test_health:Mine"]) == 0
    assert "bit for bit" in capsys.readouterr().out


def test_rolling_back(tmp_path: Path, distill: Any) -> None:
    keys = {"health": {"nonfinite": "rollback"}, "every": {"save": 2, "log": 1, "sample": 0}}
    told = Told()
    with pytest.MonkeyPatch.context() as patched:
        poison(patched, 3, "generator", "weight")
        result = distill(tmp_path / "r", tell=told, **keys)
    assert told.has("back at step 2, with learning rates times 0.5") and result["steps"] == 6
    state = state_of(tmp_path / "r")
    assert state["rate_factor"] == 0.5 and all(t.isfinite().all() for t in state["nets"]["generator"].values())
    rows = [json.loads(line) for line in (tmp_path / "r" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 7))
    rates = [row["lr/generator"] for row in rows]
    assert rates[2] / rates[1] < 0.6


def test_rolling_back_to_the_start_and_giving_up(tmp_path: Path, distill: Any) -> None:
    keys = {"health": {"nonfinite": "rollback", "rollbacks": 2}, "every": {"save": 0, "log": 1, "sample": 0}}
    told = Told()
    with pytest.MonkeyPatch.context() as patched:
        poison(patched, 1, "generator", "weight", times=3)
        with pytest.raises(NonFinite):
            distill(tmp_path / "r", tell=told, **keys)
    assert [line for line in told if line.startswith("back")] == [
        "back at step 0, with learning rates times 0.5", "back at step 0, with learning rates times 0.25"
    ]  # fmt: skip


def test_an_interrupted_run_that_rolled_back_ends_the_same(tmp_path: Path, distill: Any) -> None:
    keys = {"health": {"nonfinite": "rollback"}, "every": {"save": 3, "log": 1, "sample": 0}, "steps": 8}

    def spoil(patched: pytest.MonkeyPatch) -> None:  # a fault that follows from the weights and step, as real ones do
        real = Trainer.play

        def play(self: Trainer, *args: Any) -> Any:
            if self.step == 4 and self.rate_factor == 1:
                raise NonFinite("injected", 0, torch.zeros(1))
            return real(self, *args)

        patched.setattr(Trainer, "play", play)

    with pytest.MonkeyPatch.context() as patched:
        spoil(patched)
        distill(tmp_path / "whole", **keys)
        distill(tmp_path / "r", **{**keys, "steps": 8, "every": {**keys["every"], "save": 3}})
        for step in (3, 5, 6):
            out = tmp_path / f"r{step}"
            real = Trainer.advance

            def advance(self: Trainer, source: Any, stop_at: int = step, real: Any = real) -> Any:
                if self.step == stop_at and self.rate_factor < 1:
                    raise MemoryError("as if killed")
                return real(self, source)

            with pytest.MonkeyPatch.context() as killed:
                killed.setattr(Trainer, "advance", advance)
                with pytest.raises(MemoryError):
                    distill(out, **keys)
            distill(out, **keys)
            name = f"checkpoints/ckpt-{8:09d}/state.safetensors"
            assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


# Monitors -------------------------------------------------------------------------------------------------------------


def test_lag_is_zero_for_exact_denoisers_and_sees_shifts_and_scales() -> None:
    rng = torch.Generator().manual_seed(0)
    law = Mixture([1.0, 2.0], torch.tensor([[-1.0, 0.5], [1.0, -0.25]], dtype=torch.float64), 0.3)
    x = law.sample(4000, rng)
    sigma = torch.exp(torch.randn(4000, generator=rng, dtype=torch.float64) * 1.2 - 1.2)
    eps = torch.randn(4000, 2, generator=rng, dtype=torch.float64)

    def of(x: Tensor) -> float:
        noisy = x + sigma[:, None] * eps
        return float(lag(x, noisy, sigma, law(noisy, sigma), law.sigma_data))

    assert of(x) < 0.06
    assert of(1.1 * x) > 0.1 and of(1.5 * x) > 0.4 and of(x + 0.5) > 0.3
    assert of(1.1 * x) < of(1.3 * x) < of(1.6 * x)


def test_a_series_is_beyond_its_own_best_only() -> None:
    rule = health.RULES["lag"]

    def flagged(values: list[float]) -> list[int]:
        series, at = Series(), []
        for k, value in enumerate(values):
            series.add(value)
            if series.beyond(rule):
                at.append(k)
        return at

    assert flagged([0.9] * 30) == []  # never was better
    assert flagged([0.9 - 0.03 * k for k in range(28)]) == []  # gets better
    assert flagged([0.1] * 10 + [0.6] + [0.1] * 10) == []  # one look is no trend
    assert flagged([0.1] * 10 + [0.6] * 3) == [11, 12]
    noisy = [0.1 + 0.3 * (k % 2) for k in range(30)]
    assert flagged(noisy) == []  # scatter is learned
    assert flagged([0.1] * 3 + [0.9] * 3) == []  # too early to know


def test_a_monitor_tells_once_and_survives_as_json() -> None:
    monitor, told = Monitor(), []
    for k in range(30):
        monitor = Monitor.of(json.loads(json.dumps(monitor.state())))
        told += monitor.add({"size": 0.0 if k < 10 else 2.0, "lag": 0.1})
    assert told == ["size"]


def looked(distill: Any, out: Path, method: Any, spoil: Callable[[Trainer], None], start: int, **keys: Any) -> set[str]:
    """Warnings of a run whose trainer is spoiled after every step from `start` on."""
    real = Trainer.advance

    def advance(self: Trainer, source: Any) -> Any:
        told = real(self, source)
        if self.step >= start and "generator" in self.nets:
            with torch.no_grad():
                spoil(self)
        return told

    every = {"save": 0, "log": 1, "sample": 0}
    told = Told()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Trainer, "advance", advance)
        keys = {"steps": 60, "batch": 64, "every": every, "health": {"every": 2}, **keys}
        result = distill(out, method, tell=told, template=NETWORK, **keys)
    names = [row["warning"] for row in result["warnings"]]
    assert len(names) == len(set(names)) == sum("warning: step" in line for line in told)
    return set(names)


NETWORK = {"network": "mlp", "width": 16, "depth": 1}


def nothing(trainer: Trainer) -> None:
    pass


class Bent(nn.Module):
    """A generator whose samples are changed by `bend`."""

    def __init__(self, inner: Any, bend: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.bend = inner, bend

    def forward(self, z: Tensor, cond: Tensor | None = None) -> Tensor:
        return self.bend(self.inner(z, cond))


def bent(monkeypatch: pytest.MonkeyPatch, bend: Callable[[Tensor], Tensor], after: int) -> Callable[[Trainer], None]:
    """Lets the monitors see samples through `bend`, from look `after` on."""
    real, looks = health.Looks.look, [0]

    def look(self: Any, method: Any, nets: Any, teacher: Any) -> Any:
        looks[0] += 1
        if looks[0] > after:
            nets = nn.ModuleDict({**nets, "generator": Bent(nets["generator"], bend)})
        return real(self, method, nets, teacher)

    monkeypatch.setattr(health.Looks, "look", look)
    return nothing


TAUGHT = {"warm_start": 300, "optimizer": {"generator": {"lr": 1e-4}, "fake": {"lr": 1e-3}}}


def test_an_explosion_is_told(tmp_path: Path, distill: Any) -> None:
    def grow(trainer: Trainer) -> None:
        for p in trainer.nets["generator"].parameters():
            p.mul_(1.08)

    assert "size" in looked(distill, tmp_path / "r", "sid", grow, 30, **TAUGHT)


def test_a_collapse_is_told(tmp_path: Path, distill: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil = bent(monkeypatch, lambda x: x.mean(0) + 0.2 * (x - x.mean(0)), 12)
    assert "spread" in looked(distill, tmp_path / "r", "sid", spoil, 0, **TAUGHT)


def test_dropped_modes_are_told(tmp_path: Path, distill: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The truth itself, of which the left half is folded to the right."""
    law = limbeck.teachers.load("exact:ring8")
    sound = law.sample(256, torch.Generator().manual_seed(1)).float()  # type: ignore[attr-defined]
    monkeypatch.setattr(Bent, "forward", lambda self, z, cond=None: self.bend(sound[: len(z)]))
    folded = torch.cat([sound[:, :1].abs(), sound[:, 1:]], 1)
    state = {"looks": 0}

    def bend(x: Tensor) -> Tensor:
        state["looks"] += 1
        return x if state["looks"] <= 15 else folded[: len(x)]

    told = looked(distill, tmp_path / "r", "pid", bent(monkeypatch, bend, 0), 0)
    assert {"missing", "balance"} <= told and not told & {"size", "spread"}


def test_a_fake_score_that_lags_is_told(tmp_path: Path, distill: Any) -> None:
    """The fake score has learned the generator; then it stands still, and the generator walks."""
    stands: list[Tensor] = []

    def move(trainer: Trainer) -> None:
        if not stands:
            stands.extend(p.clone() for p in trainer.nets["fake"].parameters())
        for p, old in zip(trainer.nets["fake"].parameters(), stands, strict=True):
            p.copy_(old)
        *_, last = trainer.nets["generator"].parameters()
        last.add_(0.05)

    keys = {**TAUGHT, "steps": 140, "optimizer": {"generator": {"lr": 1e-5}, "fake": {"lr": 3e-3}}}
    assert "lag" in looked(distill, tmp_path / "r", "sid", move, 100, **keys)


def test_a_runaway_is_told(tmp_path: Path, distill: Any) -> None:
    """Half way to alpha / (alpha - 1) = 6 times the teacher's variance; not with an alpha that knows no runaway."""

    def grow(trainer: Trainer) -> None:
        for p in trainer.nets["generator"].parameters():
            p.mul_(1.08)

    told = looked(distill, tmp_path / "a", {"name": "sid", "alpha": 1.2}, grow, 30, **TAUGHT)
    assert "runaway" in told
    assert "runaway" not in looked(distill, tmp_path / "b", {"name": "sid", "alpha": 1.0}, grow, 30, **TAUGHT)


@pytest.mark.parametrize("method", METHODS)
def test_healthy_runs_are_not_told(tmp_path: Path, distill: Any, method: str) -> None:
    assert looked(distill, tmp_path / "r", method, nothing, 0) == set()


def test_the_monitors_state_is_resumed(tmp_path: Path, distill: Any) -> None:
    keys = {"steps": 20, "batch": 64, "health": {"every": 2}}
    distill(tmp_path / "whole", "sid", **keys)
    real = Trainer.advance

    def advance(self: Trainer, source: Any) -> Any:
        if self.step == 11 and "fake" in self.nets:
            raise Stopped(15, 11)
        return real(self, source)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Trainer, "advance", advance)
        with pytest.raises(Stopped):
            distill(tmp_path / "r", "sid", **keys)
    distill(tmp_path / "r", "sid", **keys)
    ends = [checkpoint.load_newest(tmp_path / n / "checkpoints", Told()) for n in ("whole", "r")]
    assert ends[0] is not None and ends[1] is not None and ends[0]["monitor"] == ends[1]["monitor"]
    assert loop.NONFINITE not in {p.name for p in (tmp_path / "r").iterdir()}
