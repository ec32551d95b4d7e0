"""What a run makes of its teacher before the first step: samples and pairs, and a student network that imitates it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import limbeck
from limbeck import artifact, checkpoint, preparation, stock
from limbeck.denoiser import Guided, Preconditioned
from limbeck.exact import Mixture
from limbeck.networks import build
from limbeck.objective import Batch
from limbeck.sample import heun
from limbeck.teachers import load
from limbeck.teaching import Imitation

QUIET = {"tell": lambda line: None}


def law() -> Mixture:
    return Mixture([0.4, 0.6], torch.tensor([[-1.0, 0.4], [0.5, -0.3]], dtype=torch.float64), [0.2, 0.3])


def test_pairs_are_the_teachers_and_survive_interruptions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stock, "PART", 20)
    calls: list[int] = []
    solve = heun

    def counted(*args: Any, **keys: Any) -> torch.Tensor:
        calls.append(len(args[1]))
        return solve(*args, **keys)

    monkeypatch.setattr(stock, "heun", counted)

    def stop(done: int) -> None:
        if done == 40:
            raise InterruptedError

    whole = stock.teacher_pairs(law(), 50, 3, 5, tmp_path / "a", lambda done: None)
    assert whole.z.shape == whole.x.shape == (50, 2) and whole.cond is None and calls == [20] * 3
    torch.testing.assert_close(whole.x, solve(law(), whole.z, 5))
    with pytest.raises(InterruptedError):
        stock.teacher_pairs(law(), 50, 3, 5, tmp_path / "b", stop)
    assert calls == [20] * 5
    again = stock.teacher_pairs(law(), 50, 3, 5, tmp_path / "b", lambda done: None)
    assert torch.equal(again.x, whole.x) and calls == [20] * 6
    # a damaged part is drawn anew; another seed, teacher or number of steps is another stock
    next(iter(sorted((tmp_path / "b").iterdir()))).write_bytes(b"damaged")
    again = stock.teacher_pairs(law(), 50, 3, 5, tmp_path / "b", lambda done: None)
    assert torch.equal(again.x, whole.x) and calls == [20] * 7
    other = stock.teacher_pairs(law(), 50, 4, 5, tmp_path / "b", lambda done: None)
    assert not torch.equal(other.x, whole.x) and len(calls) == 10
    assert not torch.equal(stock.teacher_pairs(law(), 50, 3, 6, tmp_path / "b", lambda done: None).x, whole.x)
    # fewer are the first ones
    few = stock.teacher_pairs(law(), 30, 3, 5, tmp_path / "a", lambda done: None)
    assert torch.equal(few.x, whole.x[:30])


def test_pairs_of_a_conditional_teacher_have_labels(tmp_path: Path) -> None:
    pairs = stock.teacher_pairs(load("digits"), 40, 0, 3, tmp_path, lambda done: None)
    assert pairs.cond is not None and torch.equal(pairs.cond.sum(1), torch.ones(40))
    torch.testing.assert_close(pairs.x, heun(load("digits"), pairs.z, 3, cond=pairs.cond), rtol=1e-4, atol=1e-5)


def test_pairs_of_a_guided_teacher_are_guided(tmp_path: Path) -> None:
    digits = load("digits")
    plain = stock.teacher_pairs(digits, 10, 0, 3, tmp_path, lambda done: None)
    pairs = stock.teacher_pairs(digits, 10, 0, 3, tmp_path, lambda done: None, 2.0)
    wanted = heun(Guided(digits, 2.0), pairs.z, 3, cond=pairs.cond)
    torch.testing.assert_close(pairs.x, wanted, rtol=1e-4, atol=1e-5)
    assert (pairs.x - plain.x).abs().max() > 0.1
    # and a run asks for them
    seen: list[float] = []
    method = {"name": "dmd", "pairs": 20, "game": {"guidance": {"teacher": 2.0}}}
    keys = {"steps": 1, "batch": 4, "evaluate": {"samples": 20, "teacher_steps": 2}, "every": {"sample": 0}}
    with pytest.MonkeyPatch.context() as patched:
        honest = stock.teacher_pairs
        patched.setattr(preparation, "teacher_pairs", lambda *args: seen.append(args[6]) or honest(*args))
        limbeck.distill("digits", method, out=tmp_path / "run", **keys, **QUIET)
    assert seen == [2.0]


def test_real_data_must_have_every_class(tmp_path: Path) -> None:
    x = torch.zeros(9, 8, 8, 1, dtype=torch.uint8).numpy()
    np.savez(tmp_path / "nine.npz", x=x, y=np.arange(9))
    keys = {"steps": 1, "batch": 4, "real": {"data": str(tmp_path / "nine.npz")}}
    with pytest.raises(ValueError, match=r"^real\.data: holds no sample of class 9, and the teacher has 10$"):
        limbeck.distill("digits", "dmd2", out=tmp_path / "r", **keys, **QUIET)


def test_pairs_of_a_policy_have_contexts(tmp_path: Path) -> None:
    policy = load("exact:policy4")
    first = stock.teacher_pairs(policy, 600, 0, 3, tmp_path, lambda done: None)
    again = stock.teacher_pairs(policy, 600, 0, 3, tmp_path, lambda done: None)
    assert first.cond is not None and again.cond is not None and torch.equal(first.cond, again.cond)
    assert first.cond.unique().numel() == 600 and first.cond.min() < 0.02 and first.cond.max() > 0.98
    torch.testing.assert_close(first.x, heun(policy, first.z, 3, cond=first.cond))


@pytest.mark.parametrize("game", [{}, {"adversarial": {"weight": 0.1}}], ids=["no critic", "a critic"])
def test_training_without_data_opens_none(
    game: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a critic, or with one that reads the teacher's samples; a critic with data would open them."""

    class Closed:
        def load(self, *args: Any) -> None:
            raise AssertionError("data were opened")

    monkeypatch.setattr(preparation, "data", Closed())
    keys: dict[str, Any] = {"steps": 2, "batch": 4, "evaluate": {"samples": 200, "teacher_steps": 2}}
    method = {"name": "sid", "game": game}
    limbeck.distill("digits", method, out=tmp_path / "free", real={"source": "teacher:40"}, **QUIET, **keys)
    limbeck.distill("digits", "sid", out=tmp_path / "plain", **QUIET, **keys)
    if game:
        with pytest.raises(AssertionError, match="data were opened"):
            limbeck.distill("digits", method, out=tmp_path / "data", **QUIET, **keys)


def test_a_student_of_another_network_starts_as_the_teacher(tmp_path: Path, tiny: dict[str, Any]) -> None:
    """The players of the first step are copies of what the warm start has made, and it is near the teacher."""
    keys = {**tiny, "template": {"width": 32, "depth": 2}, "steps": 1, "warm_start": 300, "batch": 128}
    keys["optimizer"] = {"generator": {"lr": 1e-12}, "fake": {"lr": 1e-12}}
    teacher, x = load("exact:ring8"), torch.linspace(-3, 3, 40).reshape(20, 2)
    errors = []
    for warm in (300, 0):
        keys["warm_start"] = warm
        limbeck.distill("exact:ring8", "sid", out=tmp_path / str(warm), **QUIET, **keys)
        student = artifact.load_generator(tmp_path / str(warm))
        sigma = torch.tensor(1.0)
        errors.append((student.denoiser(x, sigma) - teacher(x, sigma)).square().mean().item())  # type: ignore[operator]
    assert errors[0] < 0.4 * errors[1]
    assert not list((tmp_path / "300").glob("warm-start*"))
    # PID does not start there
    assert not getattr(limbeck.methods.METHODS["pid"], "warm_start", False)


@pytest.mark.parametrize(("scale", "share"), [(1.0, 0.0), (1.5, 0.1)])
def test_where_estimates_without_a_label_are_read_the_warm_start_teaches_them(
    scale: float, share: float, tmp_path: Path
) -> None:
    seen: list[torch.Tensor] = []

    class Seen(Preconditioned):
        def forward(self, x: torch.Tensor, sigma: torch.Tensor, cond: torch.Tensor | None = None) -> torch.Tensor:
            if cond is not None:
                seen.append(cond)
            return super().forward(x, sigma, cond)

    asked: list[float] = []

    def counted(**fields: Any) -> Imitation:
        asked.append(fields["unlabelled"])
        return Imitation(**fields)

    method = {"name": "sid", "game": {"guidance": {"fake": scale}}}
    keys = {
        "steps": 1,
        "batch": 8,
        "warm_start": 2,
        "template": {"network": "dit", "width": 16, "depth": 1, "heads": 2},
    }
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(preparation, "Imitation", counted)
        patched.setattr(preparation, "WARM_SAMPLES", 60)
        small = {"evaluate": {"samples": 20, "teacher_steps": 2}, "every": {"sample": 0}}
        limbeck.distill("digits", method, out=tmp_path / "r", **keys, **small, **QUIET)
    assert asked == [share]
    home = Seen(build("mlp", {"shape": [2], "classes": 3, "width": 8, "depth": 1}), (2,), 3)
    n, rng = 400, torch.Generator().manual_seed(0)
    cond = torch.eye(3)[torch.arange(n) % 3]
    z = torch.randn(n, 2, generator=rng)
    feed = Batch(z, torch.rand(n, generator=rng), z, cond, z, coin=(torch.arange(n) + 0.5) / n)
    Imitation(unlabelled=share).loss(torch.nn.ModuleDict({"denoiser": home}), home, feed)
    assert len(seen) == 2 and torch.equal(*seen) and int((seen[0].sum(1) == 0).sum()) == share * n


@pytest.mark.parametrize("method", ["sid", "dmd", {"name": "sida", "game": {"adversarial": {"weight": 0.1}}}])
def test_an_interrupted_preparation_goes_on(
    method: Any, tmp_path: Path, tiny: dict[str, Any], weights: Any, equal: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {**tiny, "warm_start": 6, "method": method}
    if isinstance(method, dict):  # its critic's samples come from the teacher's sampler
        keys["real"] = {"source": "teacher:60"}
    if method == "dmd":
        keys["method"] = {"name": "dmd", "pairs": 60}
    monkeypatch.setattr(stock, "PART", 30)
    method = keys.pop("method")
    limbeck.distill("exact:ring8", method, out=tmp_path / "whole", **QUIET, **keys)
    saved = checkpoint.save
    for fatal in (0, 2, 5, 6, 9):  # six checkpoints of the warm start, then six of the run

        class Killed(BaseException):
            pass

        count = iter(range(100))

        def die(*args: Any, count: Any = count, fatal: int = fatal, killed: type = Killed, **keys: Any) -> Path:
            if next(count) == fatal:
                raise killed
            return saved(*args, **keys)

        out = tmp_path / "cut"
        monkeypatch.setattr(checkpoint, "save", die)
        with pytest.raises(Killed):
            limbeck.distill("exact:ring8", method, out=out, **QUIET, **keys)
        monkeypatch.setattr(checkpoint, "save", saved)
        told: list[str] = []
        limbeck.distill("exact:ring8", method, out=out, tell=told.append, **keys)
        assert equal(weights(tmp_path / "whole"), weights(out)), fatal
        # a finished warm start is not made again: 6 steps of it, and 6 of the run
        assert sum(int(line.split()[0]) for line in told if " steps in " in line) == 12 - fatal
        shutil.rmtree(out)


def test_health_is_in_the_log_and_on_the_page(tmp_path: Path, tiny: dict[str, Any]) -> None:
    limbeck.distill("exact:ring8", "sid", out=tmp_path / "a", **QUIET, **{**tiny, "warm_start": 2})
    rows = [line for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    assert len(rows) == 6 and all('"health/fake_loss"' in row and row.count('"health/gap/') >= 3 for row in rows)
    page = (tmp_path / "a" / "report.html").read_text()
    assert "Gap between the scores" in page and "loss on fresh samples" in page and "Generator: loss" not in page


def test_a_critic_on_the_teacher_s_features_needs_its_network(tmp_path: Path, tiny: dict[str, Any]) -> None:
    method = {"name": "dmd2", "game": {"adversarial": {"features": "teacher"}}}
    with pytest.raises(ValueError, match=r"^method.game.adversarial.features: teacher needs"):
        limbeck.distill("exact:ring8", method, out=tmp_path / "a", **QUIET, **tiny)
    assert not (tmp_path / "a").exists()
    keys = {**tiny, "template": {}, "steps": 1}
    with pytest.raises(ValueError, match=r"^real.source: teacher:5 holds no sample of class \d; ask for more"):
        limbeck.distill("digits", method, out=tmp_path / "b", **QUIET, **keys, real={"source": "teacher:5"})
    limbeck.distill("digits", method, out=tmp_path / "b", **QUIET, **keys, real={"source": "teacher:200"})
