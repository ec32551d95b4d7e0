"""The trainer: determinism, resume, micro-batches, moving average, turns and failures; optimiser settings; sources."""

import copy
import math
import pickle
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from limbeck.denoiser import Denoiser, Preconditioned, expand
from limbeck.ema import EMA, Average
from limbeck.exact import Gaussian, Mixture
from limbeck.folder import Stopped
from limbeck.generator import Generator, OneStep, Trajectory
from limbeck.methods.pid import PID
from limbeck.networks.mlp import MLP
from limbeck.noise import Karras
from limbeck.objective import Batch, Objective, Turn, perturb
from limbeck.optimizer import Optimizer
from limbeck.randomness import seed_of, stream
from limbeck.source import DataSource, NoiseSource, one_hot
from limbeck.train import NonFinite, Trainer

TEACHER = Mixture([0.4, 0.6], [[-1.0, 0.4], [0.5, -0.3]], [0.2, 0.3])
STEPS = 6
QUICK = {"generator": Optimizer("radam", lr=2e-3)}


def template(dropout: float = 0.0, classes: int = 0, seed: int = 0) -> Preconditioned:
    """A student in float64 with no layer left at its zero start."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = MLP((2,), classes, width=16, depth=2, dropout=dropout).double()
        with torch.no_grad():
            for parameter in network.parameters():
                parameter += 0.2 * torch.randn_like(parameter)
    return Preconditioned(network, (2,), classes, TEACHER.sigma_data)


def noise(batch: int = 24, **fields: Any) -> NoiseSource:
    return NoiseSource((2,), (2,), batch, seed=fields.pop("seed", 5), dtype=torch.float64, **fields)


def trainer_of(dropout: float = 0.0, objective: Objective | None = None, **fields: Any) -> Trainer:
    settings = {"steps": STEPS, "seed": 3} | fields
    objective = objective or (Plain() if dropout else PID(N=20))  # PID has no dropout
    return Trainer(objective, copy.deepcopy(TEACHER), template(dropout), **settings)


def flat(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested dictionaries by path."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from flat(value, f"{name}/{key}")
    else:
        yield name, tree


def same(a: Any, b: Any) -> bool:
    """Bit-identical state dictionaries."""
    one, other = dict(flat(a)), dict(flat(b))
    assert one.keys() == other.keys() and len(one) > 10
    return all(torch.equal(v, other[k]) if isinstance(v, Tensor) else v == other[k] for k, v in one.items())


def weights(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


# Determinism and resume -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_the_same_seed_gives_the_same_run(dropout: float) -> None:
    runs, told = [], []
    for _ in range(2):
        torch.manual_seed(torch.seed())  # whatever state the global generator is in
        run = trainer_of(dropout)
        told.append([run.advance(noise()) for _ in range(STEPS)])
        runs.append(copy.deepcopy(run.state_dict()))
    assert same(*runs)
    for one, other in zip(*told, strict=True):
        assert one.keys() == other.keys() == {"loss/generator", "grad_norm/generator", "lr/generator"}
        assert all(value.ndim == 0 and torch.equal(value, other[key]) for key, value in one.items())


def test_seeds_of_source_and_dropout_matter() -> None:
    plain, dropped = trainer_of(), trainer_of(0.4)
    plain.advance(noise())
    dropped.advance(noise())
    for start, fields, source in ((plain, {}, noise(seed=6)), (dropped, {"seed": 4, "dropout": 0.4}, noise())):
        other = trainer_of(**fields)
        other.advance(source)
        assert not torch.equal(weights(start.nets), weights(other.nets))
    # without dropout the trainer's own seed has nothing to do
    other = trainer_of(seed=4)
    other.advance(noise())
    assert same(plain.state_dict(), other.state_dict())


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("name", ["adam", "adamw", "radam"])
def test_resume_at_every_step(dropout: float, name: Any) -> None:
    optimizer = {"generator": Optimizer(name, lr=2e-3, weight_decay=0.01, schedule="cosine", warmup=2)}
    whole = trainer_of(dropout, optimizer=optimizer)
    states = [copy.deepcopy(whole.state_dict())]
    for _ in range(STEPS):
        whole.advance(noise())
        states.append(copy.deepcopy(whole.state_dict()))
    assert not same(states[0]["nets"] | {"ema": states[0]["ema"]}, states[1]["nets"] | {"ema": states[1]["ema"]})
    dirty = trainer_of(dropout, optimizer=optimizer)
    for _ in range(2):
        dirty.advance(noise(seed=99))
    for k, state in enumerate(states):
        # into a fresh trainer and into one with a past of its own
        for resumed in (trainer_of(dropout, optimizer=optimizer), dirty):
            resumed.load_state_dict(copy.deepcopy(state))
            assert resumed.step == k and resumed.images == 24 * k
            assert same(resumed.state_dict(), state)
            for _ in range(STEPS - k):
                resumed.advance(noise())
            assert same(resumed.state_dict(), states[-1])


def test_loading_leaves_the_loaded_state_alone() -> None:
    run = trainer_of()
    run.advance(noise())
    state = copy.deepcopy(run.state_dict())
    kept, other = copy.deepcopy(state), trainer_of()
    other.load_state_dict(state)
    other.advance(noise())
    assert same(state, kept)


DAMAGE: dict[str, Callable[[dict[str, Any], str], Any]] = {
    "a weight": lambda state, name: state["nets"]["generator"].pop(name),
    "a player": lambda state, name: state["nets"].pop("generator"),
    "an average": lambda state, name: state["ema"].pop(name),
    "an extra weight": lambda state, name: state["nets"]["generator"].update(odd=torch.zeros(1)),
    "a parameter's moments": lambda state, name: state["optimizers"]["generator"].pop(name),
    "an optimiser": lambda state, name: state["optimizers"].pop("generator"),
    "the step": lambda state, name: state.pop("step"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_loading_is_strict(damage: Callable[[dict[str, Any], str], Any]) -> None:
    run = trainer_of()
    run.advance(noise())
    state = copy.deepcopy(run.state_dict())
    damage(state, next(iter(state["nets"]["generator"])))
    with pytest.raises((RuntimeError, KeyError, ValueError)):
        trainer_of().load_state_dict(state)


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    run = trainer_of(0.4)
    for _ in range(2):
        run.advance(noise(micro_batches=2, stratified=True))
    assert torch.equal(torch.get_rng_state(), before)
    run.objective = Failing(at=2)
    with pytest.raises(NonFinite):
        run.advance(noise())
    assert torch.equal(torch.get_rng_state(), before)


def test_dropout_differs_between_steps_and_micro_batches() -> None:
    masks: list[Tensor] = []

    @dataclass(frozen=True)
    class Masks(Plain):
        def loss(self, nets: nn.ModuleDict, teacher: Denoiser, batch: Batch) -> Tensor:
            masks.append(nn.functional.dropout(torch.ones(64), 0.5))
            return super().loss(nets, teacher, batch)

    run = trainer_of(objective=Masks())
    for _ in range(2):
        run.advance(noise(micro_batches=2))
    assert len(masks) == 4
    assert all(not torch.equal(a, b) for i, a in enumerate(masks) for b in masks[:i])


# Micro-batches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [2, 3, 4, 7])
def test_micro_batches_are_one_batch(k: int) -> None:
    whole, cut = trainer_of(), trainer_of()
    for _ in range(3):
        one, other = whole.advance(noise()), cut.advance(noise(micro_batches=k))
        for key, value in one.items():
            assert other[key].item() == pytest.approx(value.item(), rel=1e-12)
    assert whole.images == cut.images == 72
    assert (weights(whole.nets) - weights(cut.nets)).abs().max() <= 1e-12
    assert (weights(whole.ema.module) - weights(cut.ema.module)).abs().max() <= 1e-12


def test_the_loss_is_the_mean_over_samples_of_unequal_parts() -> None:
    run, source = trainer_of(), noise(5)
    (batch,) = source(0, 0)
    expected = PID(N=20).loss(run.nets, TEACHER, batch)
    parts = list(noise(5, micro_batches=2)(0, 0))
    assert [len(part.z) for part in parts] == [3, 2]
    assert run.advance(lambda step, turn: parts)["loss/generator"].item() == pytest.approx(
        expected.mean().item(), rel=1e-13
    )


# Steps and rates ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plain:
    """D(2.5 z; 2.5) drawn to the origin: a loss whose gradient anyone can take."""

    product: ClassVar[str] = "generator"
    factor: float = 1.0

    def players(self, template: Denoiser, generator: Generator | None = None) -> dict[str, nn.Module]:
        return {"generator": generator or OneStep(copy.deepcopy(template), 2.5)}

    def turns(self, step: int, images: int) -> Iterable[Turn]:
        yield Turn(("generator",), self.loss)

    def optimizers(self) -> dict[str, Optimizer]:
        return dict(QUICK)

    def loss(self, nets: nn.ModuleDict, teacher: Denoiser, batch: Batch) -> Tensor:
        return self.factor * nets["generator"](batch.z, batch.cond).square().mean(1)


@dataclass(frozen=True)
class Failing(Plain):
    """Goes wrong at step `at`: its loss is `value`, or with `gradient` its gradient alone."""

    at: int = 0
    value: float = math.nan
    gradient: bool = False

    def turns(self, step: int, images: int) -> Iterable[Turn]:
        yield Turn(("generator",), self.bad if step == self.at else self.loss)

    def bad(self, nets: nn.ModuleDict, teacher: Denoiser, batch: Batch) -> Tensor:
        good = self.loss(nets, teacher, batch)
        if self.gradient:
            return good + (good - good.detach()).clamp(min=0).sqrt()  # 0, with slope 1 / 0
        row = torch.arange(len(good)) == len(good) - 1
        return torch.where(row, good * self.value, good)


def gradient_of(run: Trainer, source: NoiseSource) -> Tensor:
    """Gradient of the plain loss, by autograd, from a copy of the players."""
    nets = copy.deepcopy(run.nets).requires_grad_(True)
    (batch,) = source(run.step, 0)
    loss = run.objective.turns(run.step, 0)
    total = next(iter(loss)).loss(nets, run.teacher, batch).mean()
    return torch.cat([g.flatten() for g in torch.autograd.grad(total, list(nets.parameters()))])


@pytest.mark.parametrize("clip", [None, 1e-3, 0.2, 1e6])
def test_clipping_bounds_the_norm_and_keeps_the_direction(clip: float | None) -> None:
    # RAdam's first steps are lr times the running mean of the gradient: step 0 shows the gradient itself
    run, lr = trainer_of(objective=Plain(), optimizer={"generator": Optimizer("radam", lr=0.5)}, clip=clip), 0.5
    before, gradient = weights(run.nets), gradient_of(run, noise())
    norm = gradient.norm().item()
    assert norm > 0.3
    told = run.advance(noise())
    assert told["grad_norm/generator"].item() == pytest.approx(norm, rel=1e-12)
    expected = gradient * min(1.0, clip / norm if clip else 1.0)
    torch.testing.assert_close(before - weights(run.nets), lr * expected, rtol=1e-9, atol=1e-12)


def test_rates() -> None:
    steps = 10
    for schedule, decay in (
        ("constant", lambda left: 1.0),
        ("linear", lambda left: left),
        ("cosine", lambda left: (1 + math.cos(math.pi * (1 - left))) / 2),
    ):
        plain = Optimizer(lr=0.3, schedule=schedule)  # type: ignore[arg-type]
        warm = replace(plain, warmup=4)
        for step in range(steps):
            left = 1 - step / steps
            assert plain.rate(step, steps) == pytest.approx(0.3 * decay(left), rel=1e-12)
            assert warm.rate(step, steps) == pytest.approx(0.3 * decay(left) * min(1, (step + 1) / 4), rel=1e-12)
        rates = [plain.rate(step, steps) for step in range(steps)]
        assert rates[0] == pytest.approx(0.3) and sorted(rates, reverse=True) == rates and rates[-1] > 0
        if schedule != "constant":
            assert plain.rate(steps, steps) == plain.rate(steps + 5, steps) == pytest.approx(0, abs=1e-15)


def test_the_trainer_uses_the_rate_of_the_step() -> None:
    optimizer = Optimizer("radam", lr=0.1, betas=(0.0, 0.999), schedule="linear", warmup=3)
    run = trainer_of(objective=Plain(), optimizer={"generator": optimizer})
    for step in range(4):  # with beta_1 = 0 each of RAdam's first steps is rate times gradient
        before, gradient = weights(run.nets), gradient_of(run, noise())
        told = run.advance(noise())
        rate = 0.1 * min(1, (step + 1) / 3) * (1 - step / STEPS)
        assert told["lr/generator"].item() == pytest.approx(rate, rel=1e-6)
        torch.testing.assert_close(before - weights(run.nets), rate * gradient, rtol=1e-9, atol=1e-12)


def test_optimizers_are_torch_s() -> None:
    kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "radam": torch.optim.RAdam}
    for name, kind in kinds.items():
        settings = Optimizer(name, lr=0.01, betas=(0, 0.9), eps=1e-6, weight_decay=0.1)  # type: ignore[arg-type]
        mine, theirs = (nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64)) for _ in range(2))
        built = settings.build([mine])
        assert type(built) is kind
        reference = kind([theirs], lr=0.01, betas=(0.0, 0.9), eps=1e-6, weight_decay=0.1)
        for _ in range(8):
            for p, optimizer in ((mine, built), (theirs, reference)):
                p.grad = p.detach() ** 3
                optimizer.step()
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"lr": 0}, "lr"),
        ({"lr": -1.0}, "lr"),
        ({"lr": math.nan}, "lr"),
        ({"lr": math.inf}, "lr"),
        ({"betas": (1.0, 0.9)}, "betas"),
        ({"betas": (0.9, -0.1)}, "betas"),
        ({"betas": (0.9, math.nan)}, "betas"),
        ({"eps": 0}, "eps"),
        ({"eps": math.nan}, "eps"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"weight_decay": math.nan}, "weight_decay"),
        ({"warmup": -1}, "warmup"),
    ],
)
def test_bad_optimizer_settings(fields: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: "):
        Optimizer(**fields)


def test_optimizer_settings_of_an_unknown_player() -> None:
    with pytest.raises(ValueError, match=r"^optimizer\.fake: .*generator"):
        trainer_of(optimizer={"fake": Optimizer()})


# Turns ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Duel:
    """Two players in alternation, the generator in every second step only; what the losses see is written to `seen`."""

    product: ClassVar[str] = "generator"
    seen: list[tuple[str, dict[str, tuple[bool, bool]]]] = field(default_factory=list)

    def players(self, template: Denoiser, generator: Generator | None = None) -> dict[str, nn.Module]:
        return {
            "generator": generator or OneStep(copy.deepcopy(template), 2.5),
            "fake": copy.deepcopy(template),
            "running": nn.BatchNorm1d(2, affine=False).double(),  # state of a method: buffers, no optimiser
        }

    def optimizers(self) -> dict[str, Optimizer]:
        return {"generator": Optimizer("radam", lr=1e-2), "fake": Optimizer("adam", lr=1e-2)}

    def turns(self, step: int, images: int) -> Iterable[Turn]:
        yield Turn(("fake",), self.fake)
        if step % 2:
            yield Turn(("generator",), self.generator)

    def note(self, turn: str, nets: nn.ModuleDict, teacher: Denoiser) -> None:
        everyone = {**nets, "teacher": teacher}
        modes = {
            name: (
                net.training and all(m.training for m in net.modules()),
                any(p.requires_grad for p in net.parameters()),
            )
            for name, net in everyone.items()
        }
        assert not any(p.grad is not None for name, net in everyone.items() if name != turn for p in net.parameters())
        self.seen.append((turn, modes))

    def fake(self, nets: nn.ModuleDict, teacher: Denoiser, batch: Batch) -> Tensor:
        self.note("fake", nets, teacher)
        x = nets["generator"](batch.z)
        assert not x.requires_grad
        sigma = 0.1 + batch.u
        return (nets["fake"](perturb(x, sigma, batch.eps), sigma) - x).square().mean(1)

    def generator(self, nets: nn.ModuleDict, teacher: Denoiser, batch: Batch) -> Tensor:
        self.note("generator", nets, teacher)
        x = nets["generator"](batch.z)
        sigma = 0.1 + batch.u
        noisy = perturb(x, sigma, batch.eps)
        # through both denoisers to their input, as SiD does
        return (teacher(noisy, sigma) - nets["fake"](noisy, sigma)).square().mean(1)


def test_players_out_of_turn_rest() -> None:
    duel = Duel()
    run = trainer_of(0.4, objective=duel)
    for step in range(4):
        before = {name: weights(run.nets[name]) for name in ("generator", "fake")}
        told = run.advance(noise())
        moved = {name: not torch.equal(weights(run.nets[name]), old) for name, old in before.items()}
        assert moved == {"fake": True, "generator": bool(step % 2)}
        turns = ("fake", "generator") if step % 2 else ("fake",)
        assert set(told) == {f"{kind}/{turn}" for kind in ("loss", "grad_norm", "lr") for turn in turns}
        for net in (run.nets, run.teacher, run.ema.module):
            assert not any(m.training for m in net.modules())
            assert all(p.grad is None and not p.requires_grad for p in net.parameters())
    on, off = (True, True), (False, False)
    for turn, modes in duel.seen:
        assert modes.pop("running") == modes.pop("teacher") == off
        assert modes == {name: on if name == turn else off for name in ("generator", "fake")}
    assert [turn for turn, _ in duel.seen] == ["fake", "fake", "generator"] * 2
    assert (run.step, run.images) == (4, 96)  # one batch a step, whoever plays


def test_turns_draw_their_own_noise() -> None:
    calls: list[tuple[int, int]] = []

    def source(step: int, turn: int) -> Iterable[Batch]:
        calls.append((step, turn))
        return noise()(step, turn)

    run = trainer_of(objective=Duel())
    for _ in range(2):
        run.advance(source)
    assert calls == [(0, 0), (1, 0), (1, 1)]


def test_a_joint_turn_moves_both_players() -> None:
    @dataclass(frozen=True)
    class Joint(Duel):
        def turns(self, step: int, images: int) -> Iterable[Turn]:
            yield Turn(("generator", "fake"), self.both)

        def both(self, nets: nn.ModuleDict, teacher: Denoiser, batch: Batch) -> Tensor:
            x = nets["generator"](batch.z)
            return (nets["fake"](x, 0.1 + batch.u) - 1).square().mean(1)

    run = trainer_of(objective=Joint())
    before = {name: weights(run.nets[name]) for name in ("generator", "fake")}
    told = run.advance(noise())
    assert all(not torch.equal(weights(run.nets[name]), old) for name, old in before.items())
    assert set(told) == {
        "loss/generator+fake", "grad_norm/generator", "grad_norm/fake", "lr/generator", "lr/fake",
    }  # fmt: skip
    assert run.images == 24


def test_the_teacher_and_the_template_stay_as_they_are() -> None:
    teacher, start = template(seed=1), template()
    before = weights(teacher), weights(start)
    run = Trainer(PID(N=20), teacher.train(), start, steps=2)
    for _ in range(2):
        run.advance(noise())
    assert torch.equal(weights(teacher), before[0]) and torch.equal(weights(start), before[1])
    assert not run.teacher.training and all(p.grad is None for p in teacher.parameters())
    assert not torch.equal(weights(run.nets), before[1])


def test_a_given_generator_is_trained_in_place_of_a_built_one() -> None:
    given = Trajectory(template(seed=2), Karras())
    run = Trainer(PID(N=20), copy.deepcopy(TEACHER), template(), steps=2, generator=given)
    assert run.nets["generator"] is given


def test_fresh_players_depend_on_the_seed_alone() -> None:
    @dataclass(frozen=True)
    class Fresh(Plain):
        def players(self, template: Denoiser, generator: Generator | None = None) -> dict[str, nn.Module]:
            return super().players(template) | {"critic": nn.Linear(2, 3)}

    critics = []
    for seed in (1, 1, 2):
        torch.rand(3)
        critics.append(weights(trainer_of(objective=Fresh(), seed=seed).nets["critic"]))
    assert torch.equal(critics[0], critics[1]) and not torch.equal(critics[0], critics[2])


# Failures -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "failure",
    [{"value": math.nan}, {"value": math.inf}, {"value": -math.inf}, {"gradient": True}],
    ids=["nan", "inf", "-inf", "gradient"],
)
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_what_is_not_finite_is_never_applied(failure: dict[str, Any], micro_batches: int) -> None:
    run = trainer_of(objective=Failing(at=2, **failure), seed=71, clip=1.0)
    source = noise(micro_batches=micro_batches)
    for _ in range(2):
        run.advance(source)
    before = copy.deepcopy(run.state_dict())
    with pytest.raises(NonFinite) as error:
        run.advance(source)
    message = str(error.value)
    assert "generator" in message and "step 2" in message and "seed 71" in message and "\n" not in message
    assert same(run.state_dict(), before)
    assert torch.isfinite(weights(run.nets)).all()
    assert not any(m.training for m in run.nets.modules())
    assert all(p.grad is None and not p.requires_grad for p in run.nets.parameters())
    # the run can go on where it stands
    run.objective = Failing(at=-1)
    run.advance(source)
    assert run.step == 3


def test_non_finite_is_no_user_s_mistake() -> None:
    assert issubclass(NonFinite, ArithmeticError) and not issubclass(NonFinite, ValueError)


# The moving average ---------------------------------------------------------------------------------------------------


def test_decay() -> None:
    half = Average(half_life=1000, ramp=0.05)
    assert half.decay(10**9, 1000) == pytest.approx(0.5, rel=1e-15)
    assert half.decay(10**9, 250) == pytest.approx(0.5**0.25, rel=1e-15)
    assert half.decay(2000, 100) == pytest.approx(0.5 ** (100 / 100), rel=1e-15)  # ramp: half-life of 5 % of 2000
    assert half.decay(20_000, 10) == half.decay(20_001, 10)
    assert half.decay(0, 10) == 0
    # settings of published runs
    assert Average(0.5e6).decay(10**9, 256) == pytest.approx(0.999645, abs=5e-7)
    assert Average(2e6).decay(10**9, 8192) == pytest.approx(0.997165, abs=5e-7)


@pytest.mark.parametrize("name", ["half_life", "ramp"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_bad_average(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{name}: "):
        Average(**{name: value})


def test_moving_average_by_hand() -> None:
    module = nn.BatchNorm1d(3).double()  # parameters and buffers
    ema = EMA(module, Average(half_life=40, ramp=0.5))
    assert ema.module is not module and not ema.module.training
    assert not any(p.requires_grad for p in ema.module.parameters())
    expected, images = module.weight.detach().clone(), 0
    for step in range(6):
        with torch.no_grad():
            module.weight += torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64) * (step + 1)
            module.running_mean += 1
        batch = 8 + step
        ema.update(images, batch)
        decay = 0.5 ** (batch / max(min(40, 0.5 * images), 1e-8))
        expected = decay * expected + (1 - decay) * module.weight.detach()
        images += batch
        torch.testing.assert_close(ema.module.weight, nn.Parameter(expected, requires_grad=False), rtol=1e-13, atol=0)
        if step == 0:
            assert torch.equal(ema.module.weight, module.weight)
        assert torch.equal(ema.module.running_mean, module.running_mean)


def test_the_trainer_averages_the_product_over_its_images() -> None:
    run = trainer_of(ema=Average(half_life=60, ramp=0.8))
    expected = weights(run.nets["generator"])
    for step in range(5):
        run.advance(noise())
        decay = 0.5 ** (24 / max(min(60, 0.8 * 24 * step), 1e-8))
        expected = decay * expected + (1 - decay) * weights(run.nets["generator"])
        torch.testing.assert_close(weights(run.ema.module), expected, rtol=1e-12, atol=1e-13)
        if step == 0:
            assert torch.equal(weights(run.ema.module), weights(run.nets["generator"]))


def test_steps_without_the_product_leave_its_average_alone() -> None:
    run = trainer_of(objective=Duel())
    before = weights(run.ema.module)
    run.advance(noise())
    assert torch.equal(weights(run.ema.module), before) and run.images == 24
    run.advance(noise())  # the first images: the average is the generator
    now = weights(run.nets["generator"])
    share = 0.5 ** (24 / (0.05 * 24))  # half-life: a twentieth of the images so far
    torch.testing.assert_close(weights(run.ema.module), before + (1 - share) * (now - before), rtol=1e-12, atol=1e-12)
    assert run.images == 48


# Sources --------------------------------------------------------------------------------------------------------------


def tensors(batch: Batch) -> list[Tensor]:
    return [t for t in (batch.z, batch.u, batch.eps, batch.cond, batch.real) if t is not None]


def joined(batches: Iterable[Batch]) -> list[Tensor]:
    return [torch.cat(parts) for parts in zip(*(tensors(batch) for batch in batches), strict=True)]


@pytest.mark.parametrize("k", [1, 2, 3, 4, 12])
@pytest.mark.parametrize("kind", ["noise", "data"])
def test_any_number_of_micro_batches_sees_the_same_draws(k: int, kind: str) -> None:
    def source(parts: int) -> Callable[[int, int], Iterable[Batch]]:
        drawn = noise(12, classes=3, unlabelled=0.3, stratified=True, micro_batches=parts)
        x, y = torch.arange(40, dtype=torch.float64).reshape(20, 2), torch.arange(20) % 3
        return drawn if kind == "noise" else DataSource(drawn, x, y)

    whole, parts = list(source(1)(4, 1)), list(source(k)(4, 1))
    assert len(whole) == 1 and len(parts) == k and all(len(part.z) == 12 // k for part in parts)
    mine, theirs = joined(parts), joined(whole)
    assert len(mine) == (4 if kind == "noise" else 5)
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_draws_depend_on_seed_step_and_turn() -> None:
    keys = [(5, 0, 0), (5, 0, 1), (5, 1, 0), (6, 0, 0), (5, 1, 11), (5, 11, 1), (5, 111, 0), (51, 1, 0)]
    draws = [joined(noise(6, seed=seed)(step, turn)) for seed, step, turn in keys]
    for i, one in enumerate(draws):
        for other in draws[:i]:
            assert all(not torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(draws[0], joined(noise(6)(0, 0)), strict=True))


def test_shapes_and_types() -> None:
    for dtype in (torch.float32, torch.float64):
        source = NoiseSource((1, 2, 2), (3,), 10, seed=0, classes=4, dtype=dtype)
        (batch,) = source(0, 0)
        assert batch.z.shape == (10, 3) and batch.eps.shape == (10, 1, 2, 2) and batch.u.shape == (10,)
        assert batch.cond is not None and batch.cond.shape == (10, 4) and batch.real is None
        assert all(t.dtype == dtype for t in tensors(batch))
    assert next(iter(noise()(0, 0))).cond is None


def test_noise_is_normal_and_levels_uniform() -> None:
    n = 40_000
    (batch,) = noise(n)(0, 0)
    for values in (batch.z, batch.eps):
        assert (values.mean(0).abs() < 4.5 / math.sqrt(n)).all()
        assert ((values.var(0) - 1).abs() < 4.5 * math.sqrt(2 / n)).all()
    assert (batch.z * batch.eps).mean().abs() < 4.5 / math.sqrt(2 * n)
    counts = (batch.u * 10).long().bincount(minlength=10)
    assert len(counts) == 10 and ((counts / n - 0.1).abs() < 4.5 * math.sqrt(0.09 / n)).all()


@pytest.mark.parametrize("n", [1, 7, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_stratified_levels_have_one_in_every_interval(n: int, dtype: torch.dtype) -> None:
    source = NoiseSource((2,), (2,), n, seed=0, stratified=True, dtype=dtype)
    orders = []
    for step in range(3):
        (batch,) = source(step, 0)
        assert batch.u.dtype == dtype and batch.u.min() >= 0 and batch.u.max() < 1
        intervals = (batch.u.double() * n).long()
        assert torch.equal(intervals.sort().values, torch.arange(n))
        orders.append(intervals)
        within = batch.u.double() * n - intervals
        assert n < 100 or abs(within.mean().item() - 0.5) < 4.5 / math.sqrt(12 * n)
    assert n == 1 or not torch.equal(orders[0], orders[1])


@pytest.mark.parametrize("n", [8, 7])
def test_antithetic_batches_are_mirrored(n: int) -> None:
    source = NoiseSource((2,), (3,), n, seed=0, classes=4, stratified=True, antithetic=True, dtype=torch.float64)
    (batch,) = source(0, 0)
    half = n // 2
    mirror = slice(-(-n // 2), n)
    assert len(batch.z) == n and batch.cond is not None
    assert torch.equal(batch.z[mirror], -batch.z[:half]) and torch.equal(batch.eps[mirror], -batch.eps[:half])
    assert torch.equal(batch.u[mirror], batch.u[:half]) and torch.equal(batch.cond[mirror], batch.cond[:half])
    strata = (batch.u[: -(-n // 2)] * -(-n // 2)).long()
    assert sorted(strata.tolist()) == list(range(-(-n // 2)))


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_u_is_below_1_for_the_largest_draw(
    stratified: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.rand can give 1 - 2^-24 (2^-53); a u of 1 has no index in PID's grid and an infinite level elsewhere."""
    largest = 1 - torch.finfo(dtype).eps / 2
    monkeypatch.setattr(torch, "rand", lambda *size, **_: torch.full(size, largest, dtype=dtype))
    source = NoiseSource((2,), (2,), 512, seed=0, stratified=stratified, dtype=dtype)
    (batch,) = source(0, 0)
    assert batch.u.max() < 1
    assert PID().loss(trainer_of().nets, TEACHER, replace(batch, z=batch.z.double(), u=batch.u)).shape == (512,)


def test_labels_are_uniform_one_hot_rows() -> None:
    n = 30_000
    (batch,) = noise(n, classes=3)(0, 0)
    assert batch.cond is not None
    assert torch.equal(batch.cond.sum(1), torch.ones(n, dtype=torch.float64)) and (batch.cond.max(1).values == 1).all()
    assert ((batch.cond.mean(0) - 1 / 3).abs() < 4.5 * math.sqrt(2 / 9 / n)).all()
    (batch,) = noise(n, classes=3, unlabelled=0.2)(0, 0)
    assert batch.cond is not None
    assert abs((batch.cond.sum(1) == 0).double().mean().item() - 0.2) < 4.5 * math.sqrt(0.16 / n)
    assert torch.equal(one_hot(torch.tensor([2, 0]), 3), torch.tensor([[0.0, 0, 1], [1, 0, 0]]))


def test_data_come_with_their_own_labels() -> None:
    x = torch.randn(50, 2, generator=stream("x"), dtype=torch.float64)
    y = torch.arange(50) % 4
    source = DataSource(noise(2000, classes=4, unlabelled=0.25), x, y)
    (batch,) = source(3, 0)
    assert batch.real is not None and batch.cond is not None
    rows = (batch.real[:, None] == x).all(2)
    assert (rows.sum(1) == 1).all()
    index = rows.double().argmax(1)
    assert len(index.unique()) == 50  # with replacement, over all of them
    labelled = batch.cond.sum(1) > 0
    assert abs(labelled.double().mean().item() - 0.75) < 4.5 * math.sqrt(0.1875 / 2000)
    assert torch.equal(batch.cond[labelled].argmax(1), y[index][labelled])
    assert not batch.cond[~labelled].any()
    (plain,) = DataSource(noise(8), x, None)(3, 0)
    assert plain.cond is None and plain.real is not None


def test_streams() -> None:
    assert seed_of("a", 1) == seed_of("a", 1)
    values = [seed_of(*key) for key in (("a", 1), ("a", 2), ("b", 1), ("a1",), (1, "a"), ("1", 1), (1, 1), (11,))]
    assert len(set(values)) == len(values) and all(0 <= value < 2**63 for value in values)
    before = torch.get_rng_state()
    assert torch.equal(torch.rand(4, generator=stream("a", 1)), torch.rand(4, generator=stream("a", 1)))
    assert torch.equal(torch.get_rng_state(), before)


def test_perturb() -> None:
    x, e, sigma = torch.ones(2, 1, 2), torch.full((2, 1, 2), 3.0), torch.tensor([0.5, 2.0])
    assert torch.equal(perturb(x, sigma, e), torch.tensor([[[2.5, 2.5]], [[7.0, 7.0]]]))
    assert expand(sigma, x).shape == (2, 1, 1)


def test_exact_teachers_need_no_template_of_their_own() -> None:
    """A teacher may be exact while the student is a network."""
    run = Trainer(PID(N=20), Gaussian([0.0, 0.0], 0.5), template(), steps=1)
    assert torch.isfinite(run.advance(noise())["loss/generator"])


def test_errors_of_runs_come_whole_from_other_processes() -> None:
    lost = NonFinite("a loss of nan", 1, torch.tensor([1.0, math.nan]))
    again = pickle.loads(pickle.dumps(lost))
    assert str(again) == "a loss of nan" and again.turn == 1 and again.losses.isnan().tolist() == [False, True]
    stopped = pickle.loads(pickle.dumps(Stopped(15, None)))
    assert (str(stopped), stopped.code) == ("stopped, saved; the same command continues", 143)
