"""Reduced precision, checkpointing and compilation of the roles' passes, and the loss scaler of float16."""

from __future__ import annotations

import copy
import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from limbeck import bench, checkpoint, cli, config, loop, methods, passes, resources, run
from limbeck.denoiser import Denoiser, Preconditioned, Rescaled
from limbeck.exact import Gaussian
from limbeck.game import Game
from limbeck.generator import OneStep, Trajectory
from limbeck.methods import pid
from limbeck.networks import ADM, MLP, DiT, SongUNet
from limbeck.objective import Batch, Turn
from limbeck.optimizer import Optimizer
from limbeck.passes import Passes, Precision, Scaler
from limbeck.resources import Needs
from limbeck.schedule import Flow
from limbeck.source import NoiseSource
from limbeck.train import NonFinite, Trainer

M = methods.METHODS
EDM: dict[str, Any] = {
    "img_resolution": 8, "in_channels": 1, "out_channels": 1, "model_channels": 16, "channel_mult": (1, 2),
    "num_blocks": 1, "attn_resolutions": (4,), "dropout": 0.3,
}  # fmt: skip
NETWORKS: dict[str, Any] = {
    "songunet": lambda: SongUNet(**EDM, channel_mult_emb=1),
    "adm": lambda: ADM(**EDM, channel_mult_emb=1),
    "dit": lambda: DiT((1, 8, 8), width=16, depth=2, heads=2, dropout=0.3),
    "mlp": lambda: MLP((1, 8, 8), width=16, depth=2, dropout=0.3),
}


def denoiser(name: str = "mlp", dtype: torch.dtype = torch.float32) -> Preconditioned:
    """No layer is left at a start of zeros."""
    torch.manual_seed(0)
    network = NETWORKS[name]().to(dtype)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return Preconditioned(network, (1, 8, 8), 0, 0.5, 0.002, 80.0)


def noise(batch: int = 4, dtype: torch.dtype = torch.float32, **fields: Any) -> NoiseSource:
    return NoiseSource((1, 8, 8), (1, 8, 8), batch, 7, dtype=dtype, **fields)


def trainer(method: str = "pid", network: str = "mlp", dtype: torch.dtype = torch.float32, **fields: Any) -> Trainer:
    home = denoiser(network, dtype)
    return Trainer(M[method](), copy.deepcopy(home), home, steps=9, **fields)


def arguments(out: Path, **keys: Any) -> list[str]:
    """A run of a fraction of a second on the command line."""
    every = {
        "steps": 6, "batch": 8, "template.network": "mlp", "template.width": 8, "template.depth": 1, "every.save": 1,
        "every.log": 1, "every.sample": 0, "evaluate.samples": 200, "evaluate.teacher_steps": 4, **keys,
    }  # fmt: skip
    return ["distill", "exact:ring8", "--out", str(out), *(w for k, v in every.items() for w in (f"--{k}", str(v)))]


def weights(made: Trainer) -> Tensor:
    return torch.cat([p.detach().flatten() for p in (*made.nets.parameters(), *made.ema.module.parameters())])


# Precision ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["teacher", "generator", "fake"])
def test_a_role_computes_in_its_precision_while_turns_are_played(role: str) -> None:
    plain, made = trainer("sid"), trainer("sid", precision={role: "bf16"})
    seen: dict[str, set[torch.dtype]] = {name: set() for name in made.passes.roles}
    for name, module in made.passes.roles.items():
        for layer in module.modules():
            if isinstance(layer, nn.Linear):
                layer.register_forward_hook(lambda m, i, out, name=name: seen[name].add(out.dtype))  # type: ignore[misc]
    told = made.advance(noise())
    assert seen == {name: {torch.bfloat16 if name == role else torch.float32} for name in seen}
    assert all(value.dtype == torch.float32 for key, value in told.items() if key.startswith("loss/"))
    state = made.state_dict()
    tensors: dict[str, Tensor] = {}
    checkpoint.parted(state, tensors)
    assert all(t.dtype == torch.float32 for t in tensors.values())
    expected = plain.advance(noise())
    for key in ("loss/fake", "loss/generator"):
        assert float(told[key]) == pytest.approx(float(expected[key]), rel=0.1)
    assert any(told[key] != expected[key] for key in ("loss/fake", "loss/generator"))
    # outside of turns: as ever
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(made.teacher(x, torch.ones(2)), plain.teacher(x, torch.ones(2)))
    assert all("forward" not in vars(m) for module in made.passes.roles.values() for m in module.modules())


@pytest.mark.parametrize("fields", [{"precision": {"generator": "bf16"}}, {"checkpointing": ["generator"]}])
def test_a_network_may_have_parts_of_any_name(fields: dict[str, Any]) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features, self.trace = nn.Linear(2, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor, noise: Tensor, cond: Tensor | None = None) -> Tensor:
            return self.trace(self.features(x))

    home = Preconditioned(Own(), (2,))
    run = Trainer(M["pid"](N=9), Gaussian([0.0, 0.0], 0.5), home, steps=2, **fields)
    run.advance(NoiseSource((2,), (2,), 4, 0))
    assert isinstance(run.nets["generator"].denoiser.network.features, nn.Linear)


def test_without_settings_nothing_stands_in() -> None:
    made = trainer("sid", precision={"teacher": "fp32"})
    with made.passes():
        assert all("forward" not in vars(m) for module in made.passes.roles.values() for m in module.modules())


def test_networks_in_float64_keep_theirs() -> None:
    made, plain = (trainer(dtype=torch.float64, precision=p) for p in ({"generator": "bf16"}, None))
    for one in (made, plain):
        one.advance(noise(dtype=torch.float64))
    assert torch.equal(weights(made), weights(plain))


def test_a_rescaled_model_is_a_network_too() -> None:
    model = NETWORKS["mlp"]()
    teacher = Rescaled(model, Flow(), "flow", (1, 8, 8))
    assert passes.networks(teacher) == [model]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"precision": {"fake": "bf16"}}, "precision.fake: no such role, this method has teacher, generator"),
        ({"checkpointing": ("fakee",)}, "checkpointing: fakee: no such role, this method has teacher, generator"),
    ],
)
def test_unknown_roles(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        trainer(**fields)


def test_exact_teachers_have_no_weights() -> None:
    with pytest.raises(ValueError, match=r"^precision\.teacher: this role has no weights"):
        Trainer(M["pid"](), Gaussian([0.0], 0.5), denoiser(), steps=1, precision={"teacher": "bf16"})


def test_the_residual_of_pid_is_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def spied(*args: Any) -> Tensor:
        p = prediction(*args)
        seen.extend([*args[:4], p])
        return p

    prediction = pid.pid_prediction
    monkeypatch.setattr(pid, "pid_prediction", spied)
    made = trainer(precision={"generator": "bf16", "teacher": "fp16"})
    inputs: list[torch.dtype] = []
    made.teacher.register_forward_hook(lambda m, args, out: inputs.extend([args[0].dtype, out.dtype]))
    made.advance(noise())
    assert len(seen) == 5 and {t.dtype for t in seen} == {torch.float32} == set(inputs)
    assert torch.equal(seen[0], seen[0].bfloat16().float())  # F came from a network in bfloat16


class Smooth(nn.Module):
    """A smooth F(z, t) of order 1, whose one product with the unit matrix rounds it, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(64, 64, bias=False)
        nn.init.eye_(self.last.weight)
        self.phase = torch.linspace(0, 6, 64)

    def forward(self, x: Tensor, noise: Tensor, cond: Tensor | None = None) -> Tensor:
        out: Tensor = self.last(torch.sin(self.phase + x.flatten(1) + 9 * noise[:, None]))
        return out.reshape(x.shape)


@pytest.mark.parametrize(("kind", "known"), [("fp16", 5e-3), ("bf16", 4e-2)])
def test_noise_gain_of_pid(kind: Precision, known: float) -> None:
    """Root mean square error of P where it is largest, N = 250, for F rounded at its output: known to one digit.

    By P = a F(s) - b F(t), the gain on independent roundings is sqrt(a^2 + b^2).
    """
    student = Trajectory(Preconditioned(Smooth(), (1, 8, 8), 0, 0.5), pid.Karras())
    grid = pid.Karras().grid(250)[:-1].float()
    t, s = grid[:-1], grid[1:]
    rng = torch.Generator().manual_seed(0)
    gaps, roundings = torch.zeros(249), torch.zeros(2, 249)
    t_, s_ = t[:, None, None, None], s[:, None, None, None]
    with torch.no_grad():
        for _ in range(12):
            z = torch.randn(1, 1, 8, 8, generator=rng).expand(249, -1, -1, -1)
            exact = [student.raw(z, level) for level in (t, s)]
            with Passes({"generator": student}, {"generator": kind}, ())():
                rounded = [student.raw(z, level) for level in (t, s)]
            assert all(f.dtype == torch.float32 for f in rounded)
            gap = pid.pid_prediction(*rounded, t_, s_, 80.0) - pid.pid_prediction(*exact, t_, s_, 80.0)
            gaps += gap.square().flatten(1).mean(1) / 12
            for number, (f, e) in enumerate(zip(rounded, exact, strict=True)):
                roundings[number] += (f - e).square().flatten(1).mean(1) / 12
    a, b = t * (1 - s / 80) / (t - s), s * (1 - t / 80) / (t - s)
    known_gain = (a**2 * roundings[1] + b**2 * roundings[0]).sqrt()
    assert torch.allclose(gaps.sqrt(), known_gain, rtol=0.15)
    assert 40 < float((a**2 + b**2).sqrt().max()) < 45  # a and b of 30 at most
    assert gaps.max().sqrt() == pytest.approx(known, rel=0.5)


# The scaler -----------------------------------------------------------------------------------------------------------


def test_float16_trains_with_a_scaler_and_resumes_bit_by_bit(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"precision": {"generator": "fp16", "fake": "fp16", "teacher": "fp16"}}
    whole = trainer("sid", **fields)
    for scaler in ("fake", "generator"):
        whole.scalers[scaler] = Scaler(scale=2.0**60)  # far too large: the search goes on over several steps
    state: dict[str, Any] = {}
    for step in range(6):
        told = whole.advance(noise())
        if step == 2:
            checkpoint.save(tmp_path, 3, whole.state_dict(), 1)
    state = checkpoint.read(tmp_path / "ckpt-000000003")
    assert state["scalers"]["fake"]["skipped"] == 3 and state["scalers"]["fake"]["scale"] == 2.0**57
    assert told["skipped/fake"] == 6 and told["scale/generator"] == 2.0**54 and "grad_norm/fake" not in told
    resumed = trainer("sid", **fields)
    resumed.load_state_dict(state)
    for _ in range(3):
        resumed.advance(noise())
    assert torch.equal(weights(resumed), weights(whole)) and resumed.scalers == whole.scalers


def test_scaling_changes_no_bit_where_nothing_underflows() -> None:
    """In float64, which float16 leaves alone: the factor itself is exact."""
    made = trainer("sid", dtype=torch.float64, precision={"fake": "fp16"}, clip=0.1)
    plain = trainer("sid", dtype=torch.float64, clip=0.1)
    for one in (made, plain):
        for _ in range(3):
            one.advance(noise(dtype=torch.float64, micro_batches=2))
    assert torch.equal(weights(made), weights(plain)) and made.scalers["fake"].skipped == 0


@dataclass(frozen=True)
class Burst:
    """Two players of one turn. At step `at` the gradient of one is infinite, or the loss is."""

    at: int = 1
    loss_too: bool = False
    product = "generator"
    needs_real = False

    def players(self, template: Denoiser, generator: Any = None) -> dict[str, nn.Module]:
        return {"generator": OneStep(copy.deepcopy(template), 1.0), "fake": copy.deepcopy(template)}

    def optimizers(self) -> dict[str, Optimizer]:
        return {name: Optimizer(lr=1e-3) for name in ("generator", "fake")}

    def turns(self, step: int, images: int) -> Any:
        def loss(nets: nn.ModuleDict, teacher: Denoiser, batch: Batch) -> Tensor:
            x = nets["generator"](batch.z)
            y = nets["fake"](x.detach(), 0.1 + batch.u)
            if step == self.at:
                y.register_hook(lambda g: g * math.inf)
                if self.loss_too:
                    x = x * math.inf
            return (x.square() + y.square()).flatten(1).mean(1)

        yield Turn(("generator", "fake"), loss)


def burst(**fields: Any) -> Trainer:
    home = denoiser()
    return Trainer(Burst(**fields), copy.deepcopy(home), home, steps=9, precision={"fake": "fp16"})


def test_players_of_one_turn_are_skipped_together() -> None:
    made = burst()
    made.advance(noise())
    nets = copy.deepcopy(made.nets.state_dict())
    moments = copy.deepcopy(made.state_dict()["optimizers"])
    told = made.advance(noise())
    assert all(torch.equal(value, nets[key]) for key, value in made.nets.state_dict().items())
    for player, by_name in made.state_dict()["optimizers"].items():
        for name, values in by_name.items():
            assert all(torch.equal(value, moments[player][name][key]) for key, value in values.items())
    assert made.scalers == {"generator+fake": Scaler(2.0**15, 0, 2, 1)}
    assert torch.isfinite(told["loss/generator+fake"]) and (made.step, made.images) == (2, 8)
    made.advance(noise())
    assert not all(torch.equal(value, nets[key]) for key, value in made.nets.state_dict().items())


def test_a_loss_that_is_not_finite_still_stops() -> None:
    made = burst(at=0, loss_too=True)
    with pytest.raises(NonFinite):
        made.advance(noise())
    assert made.scalers["generator+fake"].updates == 0


def test_without_float16_such_a_gradient_stops() -> None:
    home = denoiser()
    with pytest.raises(NonFinite):
        Trainer(Burst(at=0), copy.deepcopy(home), home, steps=9, precision={"fake": "bf16"}).advance(noise())


def test_the_factor_falls_and_rises() -> None:
    scaler = Scaler()
    for _ in range(passes.CALM):
        scaler.add(True)
    assert scaler.scale == 2.0**17 and scaler.calm == 0
    scaler.add(False)
    assert scaler.scale == 2.0**16
    for _ in range(passes.SEARCH - 1):
        scaler.add(False)
    assert not scaler.failing
    assert Scaler(updates=11, skipped=11).failing and not Scaler(updates=10_000, skipped=100).failing
    assert Scaler(updates=10_000, skipped=101).failing


def test_more_than_one_percent_stops_the_run_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(Scaler.__init__, "__defaults__", (2.0**60, 0, 0, 0))
    code = cli.main(arguments(tmp_path / "r", steps=40, **{"precision.generator": "fp16"}))
    told = capsys.readouterr().err.splitlines()[-1]
    assert code == 1 and told.startswith("limbeck: 11 of 11 updates of generator were skipped"), told


def test_skipped_updates_are_told_and_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(Scaler.__init__, "__defaults__", (2.0**60, 0, 0, 0))
    monkeypatch.setattr(passes, "SEARCH", 10**6)
    assert cli.main(arguments(tmp_path / "r", **{"precision.generator": "fp16"})) == 0
    report = json.loads((tmp_path / "r" / "report.json").read_text())
    skipped, updates = report["skipped"]["generator"]
    assert skipped == updates == report["steps"] and report["recipe"]["precision"] == {"generator": "fp16"}
    assert f"float16: {skipped} of {updates} updates of generator skipped" in capsys.readouterr().err
    rows = [json.loads(line) for line in (tmp_path / "r" / "log.jsonl").read_text().splitlines()]
    assert rows[0]["skipped/generator"] == 1 and rows[0]["scale/generator"] == 2.0**59


# Checkpointing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_checkpointing_gives_the_same_gradients(name: str) -> None:
    """With dropout, through the generator and through a fake score's input, in float64; of fewer bytes."""
    gradients, kept, tops = [], [], []
    for roles in ((), ("generator", "fake", "teacher")):
        made = trainer("sid", name, torch.float64, checkpointing=roles)
        made.advance(noise(dtype=torch.float64))
        turn = list(made.objective.turns(1, 4))[-1]
        (batch,) = noise(8, torch.float64)(1, 1)
        with bench.Kept(made) as graph, resources.Watch() as watch, made.rehearsal(turn.players):
            torch.manual_seed(5)
            turn.loss(made.nets, made.teacher, batch).sum().backward()
            gradients.append([p.grad.clone() for p in made.nets["generator"].parameters() if p.grad is not None])
        kept.append(graph.peak)
        tops.append(watch.top)
    assert len(gradients[0]) == len(gradients[1]) > 5
    assert max(float(g.abs().max()) for g in gradients[0]) > 1e-3
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)  # the same operations on the same numbers
    assert kept[1] < 0.5 * kept[0]
    # a whole pass that is made again is there again
    assert tops[1] <= tops[0] if name == "mlp" else tops[1] < 0.8 * tops[0]


def test_blocks_are_made_again_one_by_one() -> None:
    assert len(passes.blocks(NETWORKS["songunet"]())) == 10 and len(passes.blocks(NETWORKS["dit"]())) == 2
    assert passes.blocks(NETWORKS["mlp"]()) == []


def test_joint_turns_refuse_checkpointing_of_who_is_asked_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    game = {"method": "sid", "method.game.joint": "true"}
    assert cli.main(arguments(tmp_path / "a", checkpointing='["fake"]', **game)) == 2
    assert "checkpointing: fake is called with and without gradients of its weights" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
    assert cli.main(arguments(tmp_path / "b", checkpointing='["generator"]', **game)) == 0


def test_a_run_may_go_on_with_checkpointing(tmp_path: Path) -> None:
    out = tmp_path / "r"
    assert cli.main(arguments(out)) == 0
    assert cli.main(arguments(out, steps=9, checkpointing='["generator"]')) == 0
    assert config.read_toml(out / "recipe.toml")["checkpointing"] == ["generator"]


# Compilation ----------------------------------------------------------------------------------------------------------


def test_compiled_networks_keep_their_names_and_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch's own backend that generates no code: everything but the machine code, which takes minutes."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    made, plain = trainer("sid"), trainer("sid")
    lines: list[str] = []
    made.compile(noise(), lines.append)
    assert not lines and made.passes.compiled
    for one in (made, plain):
        for _ in range(2):
            one.advance(noise())
    assert made.passes.compiled
    assert made.state_dict()["nets"]["fake"].keys() == plain.state_dict()["nets"]["fake"].keys()
    assert torch.allclose(weights(made), weights(plain), rtol=1e-3, atol=1e-4)
    with bench.Meter(made) as meter:
        made.advance(noise())
    assert meter.seconds["generator", "teacher"] > 0 and meter.seconds["fake", "forward"] > 0


def test_a_compiler_that_fails_later_says_so_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """It does for calls that no rehearsal has seen; the pass is made without it."""
    rehearsed: list[bool] = []

    def compiled(call: Any) -> Any:
        def made(*args: Any) -> Any:
            if rehearsed:
                raise RuntimeError("a shape\nthat is new")
            return call(*args)

        return made

    monkeypatch.setattr(torch, "compile", compiled)
    made, plain = trainer("sid"), trainer("sid")
    lines: list[str] = []
    made.compile(noise(), lines.append)
    assert made.passes.compiled and not lines
    rehearsed.append(True)
    for one in (made, plain):
        for _ in range(2):
            one.advance(noise())
    assert lines == ["compile: failed (RuntimeError: a shape that is new); the networks run uncompiled"]
    assert torch.equal(weights(made), weights(plain))


class Spoiled(torch.autograd.Function):
    """The identity, whose backward pass fails once it is told to."""

    now = False

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        if Spoiled.now:
            raise RuntimeError("a kernel\nthat is not there")
        return gradient


def test_compiled_code_that_fails_in_a_later_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """The turn begins again without it, from the states that it found: the run of one that was never compiled."""

    def compiled(call: Any) -> Any:
        def made(*args: Any) -> Any:
            out = call(*args)
            return tuple(map(Spoiled.apply, out)) if isinstance(out, tuple) else Spoiled.apply(out)

        return made

    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(Spoiled, "now", False)
    waiting = M["diff_instruct"](game=Game(settle=3))  # a state that adds up losses over turns
    made, plain = (Trainer(waiting, denoiser(), denoiser(), steps=9) for _ in range(2))
    lines: list[str] = []
    made.compile(noise(), lines.append)
    for step in range(4):
        Spoiled.now = step == 1
        for one in (made, plain):
            one.advance(noise())
        assert made.passes.compiled == (step < 1)
    assert lines == ["compile: failed (RuntimeError: a kernel that is not there); the networks run uncompiled"]
    assert torch.equal(weights(made), weights(plain))
    for name, buffer in plain.nets.named_buffers():
        assert torch.equal(buffer, made.nets.get_buffer(name)), name


def test_gated_turns_are_rehearsed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A turn that begins later, and a compiler that fails in its backward pass: known before the first step."""
    monkeypatch.setattr(torch, "compile", lambda call: call)
    made = trainer("sid")
    turns = made.objective.turns

    def gated(step: int, images: int) -> Any:
        for turn in turns(step, images):
            yield turn if images < 1e6 else turn._replace(loss=broken)

    def broken(*args: Any) -> Any:
        raise RuntimeError("behind the gate")

    monkeypatch.setattr(type(made.objective), "turns", lambda self, step, images: gated(step, images))
    lines: list[str] = []
    made.compile(noise(), lines.append)
    assert lines == ["compile: failed (RuntimeError: behind the gate); the networks run uncompiled"]


def test_without_a_compiler_one_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    import torch._inductor.config

    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("/no/such/compiler",))
    assert cli.main(arguments(tmp_path / "r", compile="true")) == 0
    told = capsys.readouterr().err
    assert told.count("compile: ") == 1 and "run uncompiled" in told and "Traceback" not in told


# Micro-batches --------------------------------------------------------------------------------------------------------


def test_micro_batches_are_chosen_to_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Chosen from the estimate and the free memory, told, kept while they fit, and told again when they do not."""
    needs = Needs(resident=2**30, fixed=2**28, sample=2**30 / 16, save=0, moments=0, checkpoint=10**6)
    monkeypatch.setattr(resources, "measure", lambda trainer, source: needs)

    def go(free: float, steps: int) -> tuple[str, dict[str, Any]]:
        monkeypatch.setattr(resources, "free_memory", lambda device: round(free))
        constant = {"optimizer.generator.schedule": "constant"}  # more steps of a falling rate are another run
        assert cli.main(arguments(out, batch=16, micro_batches=0, steps=steps, **constant)) == 0
        return capsys.readouterr().err, json.loads((out / "report.json").read_text())

    def newest() -> int:
        return int(checkpoint.read(max((out / "checkpoints").glob("ckpt-*")))["micro_batches"])

    out = tmp_path / "r"
    just = needs.memory(16, 4) - needs.resident
    told, report = go(1.01 * just / resources.ROOM, 4)
    assert "micro_batches: 4, of up to 4 samples each: about" in told and report["micro_batches"] == 4 == newest()
    assert config.read_toml(out / "recipe.toml")["micro_batches"] == 0
    told, report = go(2.0**40, 8)  # more memory: the run keeps its number, and its bits
    assert report["micro_batches"] == 4 and "bit-equal" not in told
    told, report = go(0.9 * just / resources.ROOM, 12)
    assert report["micro_batches"] == 8 == newest() and "micro_batches: 4 before, 8 now" in told


def test_chosen_parts_are_those_that_are_played(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = {
        "teacher": "exact:ring8", "method": {"name": "diff_instruct"}, "batch": 16, "micro_batches": 0,
        "template": {"network": "mlp", "width": 16, "depth": 1},
    }  # fmt: skip
    job = run.distillation(config.resolve(table, M), tmp_path / "r", print)
    assert [len(batch.z) for batch in job.source(0, 0)] == [16]
    needs = resources.measure(job.trainer, job.source)
    monkeypatch.setattr(resources, "free_memory", lambda device: 0)
    parted = loop.fitted(job, needs, lambda line: None)
    assert parted.parts == 16 and [len(batch.z) for batch in parted.source(0, 0)] == [1] * 16
    assert job.parts == 1  # the caller's own job is as it was
