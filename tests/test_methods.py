"""What every method promises, whatever it does: repetition, resuming, micro-batches, clean turns, free scale."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from limbeck import methods
from limbeck.critic import Adversarial
from limbeck.denoiser import Denoiser, Preconditioned
from limbeck.divergence import DIVERGENCES
from limbeck.ema import Average
from limbeck.exact import Mixture
from limbeck.game import Game
from limbeck.generator import Generator
from limbeck.networks.mlp import MLP
from limbeck.objective import Batch, Pairs, State
from limbeck.sample import heun
from limbeck.source import NoiseSource, RealSource, provider_of
from limbeck.train import ALL_OPEN, Source, Trainer

M = methods.METHODS
JUDGED = Game(adversarial=Adversarial(weight=0.01))
CASES: dict[str, Any] = {name: cls() for name, cls in M.items()}
CASES["dmd weight"] = M["diff_instruct"](weight="dmd", game=Game(fake_steps=2))
CASES["diff_instruct, dropout replayed"] = M["diff_instruct"](dropout_replay=True)
CASES["as released"] = M["uni_instruct"](as_released=True, divergence="forward_kl")
CASES |= {f"uni {f}": M["uni_instruct"](divergence=f, game=JUDGED) for f in DIVERGENCES}
CASES["uni without a critic"] = M["uni_instruct"](divergence="reverse_kl")
CASES["f_distill reverse_kl"] = M["f_distill"](divergence="reverse_kl")
CASES |= {f"vardiu {q}": M["vardiu"](posterior=q, antithetic=False, as_released=True) for q in ("full", "flow")}
CASES["gates"] = M["sida"](game=Game(fake_first=12, adversarial=Adversarial(weight=0.1, after=24)))  # of batches of 12
CASES["sida, judged"] = M["sida"](game=Game(adversarial=Adversarial(weight=0.1, loss="bce", weighting="edm")))
CASES["few steps"] = M["sid"](game=Game(calls=3))
CASES["critics"] = M["sim"](game=Game(adversarial=Adversarial(weight=0.1, loss="hinge", weighting="edm", r1=0.1)))
CASES["settling"] = M["diff_instruct"](game=Game(settle=2))
CASES["joint"] = M["sid"](game=Game(joint=True, calls=2))
CASES["joint, judged"] = M["dmd2"](game=Game(joint=True, fake_steps=2, adversarial=Adversarial(weight=0.01, r1=0.1)))
CASES["sid, NaN dropped"] = M["sid"](nan="drop", normalizer="none")

SEEDED = Path(__file__).parent / "data" / "seeded.json"

every_method = pytest.mark.parametrize("method", CASES.values(), ids=CASES)


def teacher(scale: float = 1.0) -> Mixture:
    means = torch.tensor([[-1.0, 0.5], [1.0, -0.25]], dtype=torch.float64)
    return Mixture([1.0, 2.0], scale * means, scale * torch.tensor([0.3, 0.4], dtype=torch.float64))


def template(law: Mixture, dropout: float = 0.1) -> Denoiser:
    torch.manual_seed(0)
    return Preconditioned(MLP((2,), 0, 16, 2, dropout).double(), (2,), 0, law.sigma_data)


def trainer(method: Any, law: Mixture, dropout: float = 0.1) -> Trainer:
    made = Trainer(method, law, template(law, dropout), steps=6, ema=Average(half_life=50), seed=3)
    # heads and states that the method builds itself are float32
    made.nets.double()
    made.ema.module.double()
    return made


def source(method: Any, law: Mixture, parts: int = 1) -> Source:
    generator = method.players(template(law))["generator"]
    assert isinstance(generator, Generator)
    noise = NoiseSource((2,), generator.latent_shape, 12, 5, micro_batches=parts, dtype=torch.float64)
    pairs = None
    if hasattr(method, "pairs"):
        z = torch.randn(50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        pairs = Pairs(z, heun(law, z, 4), None)
    return RealSource(noise, (lambda n, rng, labels: law.sample(n, rng)) if method.needs_real else None, pairs)


def weights(made: Trainer) -> dict[str, torch.Tensor]:
    return {**made.nets.state_dict(), **{f"ema.{k}": v for k, v in made.ema.state_dict().items()}}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@every_method
def test_repetition_and_resuming_are_bit_exact(method: Any) -> None:
    law = teacher()
    runs = []
    for _ in range(2):
        made = trainer(method, law)
        states = []
        for _ in range(4):
            states.append(copy.deepcopy(made.state_dict()))
            made.advance(source(method, law))
        runs.append(weights(made))
    assert same(*runs)
    assert not same(runs[0], weights(trainer(method, law)))
    for step in (1, 3):
        resumed = trainer(method, law)
        resumed.load_state_dict(states[step])
        for _ in range(4 - step):
            resumed.advance(source(method, law))
        assert same(runs[0], weights(resumed))


@every_method
@pytest.mark.parametrize("parts", [2, 5])
def test_micro_batches_are_one_batch(method: Any, parts: int) -> None:
    law = teacher()
    whole, split = trainer(method, law, dropout=0.0), trainer(method, law, dropout=0.0)
    for _ in range(3):
        whole.advance(source(method, law))
        split.advance(source(method, law, parts))
    for (name, a), b in zip(weights(whole).items(), weights(split).values(), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-11), name
    # one step before any optimiser has divided by a small number
    fresh, cut = trainer(method, law, dropout=0.0), trainer(method, law, dropout=0.0)
    one, two = fresh.advance(source(method, law)), cut.advance(source(method, law, parts))
    for name in one:
        if name.startswith("loss/") or name.startswith("grad_norm/"):
            # the generator's turn comes after an update that has divided by small numbers
            close = 1e-8 if "generator" in name else 1e-12
            assert torch.allclose(one[name], two[name], rtol=close, atol=close), name


@every_method
def test_turns_leave_nothing_behind(method: Any) -> None:
    law = teacher()
    made = trainer(method, law)
    feed = source(method, law)
    before = torch.random.get_rng_state()
    played = [player for turn in method.turns(0, ALL_OPEN) for player in turn.players]
    made.images = ALL_OPEN
    made.advance(feed)
    assert "generator" in played and set(played) <= set(made.nets)
    assert torch.equal(before, torch.random.get_rng_state())
    for net in (*made.nets.values(), law):
        assert not net.training
        assert all(p.grad is None and not p.requires_grad for p in net.parameters())
        if isinstance(net, State):
            assert not list(net.parameters())


@every_method
def test_the_teacher_s_scale_is_the_student_s(method: Any) -> None:
    students = []
    for scale in (1.0, 4.0):
        law = teacher(scale)
        made = trainer(method, law, dropout=0.0)
        for _ in range(3):
            made.advance(source(method, law))
        shape = made.ema.module.latent_shape
        z = torch.randn(50, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            students.append(made.ema.module(z))
    assert torch.allclose(4 * students[0], students[1], rtol=1e-6, atol=1e-6)


def seeded(method: Any) -> dict[str, list[float]]:
    """Losses and gradient norms of three steps."""
    law = teacher()
    made = trainer(method, law)
    told = [made.advance(source(method, law)) for _ in range(3)]
    keys = sorted(key for key in told[0] if key.startswith(("loss/", "grad_norm/")))
    return {key: [float(row[key]) for row in told] for key in keys}


@every_method
def test_numbers_stay_what_they_are(method: Any, request: pytest.FixtureRequest) -> None:
    """What is made faster changes no seeded run. After a change of the mathematics: `python tests/test_methods.py`."""
    name = request.node.callspec.id
    known, found = json.loads(SEEDED.read_text())[name], seeded(method)
    assert known.keys() == found.keys()
    for key, values in known.items():
        assert found[key] == pytest.approx(values, rel=1e-7, abs=1e-10), key


def test_a_critic_without_one_of_our_networks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^template: a critic reads the features"):
        methods.METHODS["f_distill"]().players(Denoiser((2,), 0, 1.0))


def test_real_samples_have_the_wanted_labels() -> None:
    y = torch.arange(30) % 3
    x = y[:, None].double().expand(30, 2)
    noise = NoiseSource((2,), (2,), 40, 0, classes=3, dtype=torch.float64)
    (batch,) = RealSource(noise, provider_of(x, y))(0, 0)
    assert isinstance(batch, Batch) and batch.real is not None and batch.cond is not None
    assert torch.equal(batch.real[:, 0], batch.cond.argmax(1).double())


if __name__ == "__main__":
    told = {name: seeded(method) for name, method in CASES.items()}
    SEEDED.write_text(json.dumps(told, indent=1) + "\n")
