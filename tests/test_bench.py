"""The bench: passes of every method's step against the counts of the methods' own algebra, and what it reports."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from limbeck import bench, cli, config, methods
from limbeck.denoiser import Denoiser, Preconditioned
from limbeck.game import Game, Guidance
from limbeck.networks import SongUNet

M = methods.METHODS


def unet(classes: int = 0) -> Denoiser:
    torch.manual_seed(0)
    network = SongUNet(
        img_resolution=16, in_channels=1, out_channels=1, label_dim=classes, model_channels=32, channel_mult=(1, 2),
        num_blocks=1, channel_mult_emb=1, attn_resolutions=(8,),
    )  # fmt: skip
    return Preconditioned(network, (1, 16, 16), classes, 0.5, 0.002, 80.0)


@pytest.fixture(scope="module")
def teacher() -> Denoiser:
    return unet()


@pytest.fixture(scope="module")
def encoder(teacher: Denoiser) -> float:
    """Share e of a pass that forms the features of critics."""
    assert isinstance(teacher, Preconditioned)
    with torch.no_grad(), bench.flop_counter() as counter:
        teacher.features(torch.zeros(1, 1, 16, 16), torch.ones(1))
    share = counter.get_total_flops() / flops_of(teacher)
    assert 0.1 < share < 0.5
    return share


def flops_of(denoiser: Denoiser) -> int:
    with torch.no_grad(), bench.flop_counter() as counter:
        denoiser(torch.zeros(1, 1, 16, 16), torch.ones(1))
    return int(counter.get_total_flops())


def passes(method: Any, teacher: Denoiser) -> float:
    recipe = config.resolve({"method": method, "teacher": "unet", "batch": 2}, M)
    trainer, source = bench.prepared(recipe, teacher)
    trainer.images = 10**9  # behind every gate
    with bench.Meter(trainer, count=True) as meter:
        trainer.advance(source)
    return sum(meter.flops.values()) / 2 / flops_of(teacher)


# A forward pass counts 1, a backward pass 2, one to the input alone 1; e is the encoder's share, which forms the
# features of critics. Fake score's turn: generator 1, fake score 1 + 2; a critic adds the encoder on real samples, 3 e.
# Generator's turn: generator 1 + 2, teacher 1, fake score 1, and 1 each for gradients through them to their input.
COSTS: dict[str, Callable[[float], float]] = {
    "pid": lambda e: 2 + 1 + 2 * 2,
    "diff_instruct": lambda e: 4 + 5,
    "sds": lambda e: 1,
    "sid": lambda e: 4 + 7,
    "sida": lambda e: 4 + 3 * e + 7,
    "sim": lambda e: 4 + 7,
    "dmd": lambda e: 4 + 5 + 3,  # the regression on pairs
    "dmd2": lambda e: 5 * (4 + 3 * e) + 5 + e,  # the adversarial loss alone has a gradient through the fake score
    "f_distill": lambda e: 2 * (4 + 3 * e) + 5 + e,
    "vardiu": lambda e: 3 + 2 * (1 + 3),  # both signs of the noise: teacher, and a posterior of the template's network
    "uni_instruct": lambda e: 4 + 3 * e + 7,
}


@pytest.mark.parametrize("name", [name for name in M if name != "vdd"])  # vdd: points only, one pass per expert
def test_passes_of_a_step(name: str, teacher: Denoiser, encoder: float) -> None:
    """Within 2% of the algebra. Above it by the fused attention's backward pass, which computes its forward again."""
    assert passes(M[name](), teacher) == pytest.approx(COSTS[name](encoder), rel=0.02)


def test_points_have_no_network_of_the_teacher(capsys: pytest.CaptureFixture[str]) -> None:
    for law in ("exact:mixture8", "exact:policy4"):
        assert cli.main(["bench", law, "--method", "vdd", "--batch", "8", "--repeats", "1", "--threads", "1"]) == 0
        assert "GFLOP per image = no network" in capsys.readouterr().out


def test_recipes_that_teach_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = Path(__file__).parent.parent / "recipes" / "digits-teacher.toml"
    assert cli.main(["bench", str(recipe)]) == 2
    assert "digits-teacher.toml teaches, and bench measures distillations" in capsys.readouterr().err


def test_guidance_doubles_the_guided_passes() -> None:
    labelled = unet(classes=3)
    method = M["sid"](game=Game(guidance=Guidance(1.5, 1.5, 1.5)))
    assert passes(method, labelled) == pytest.approx(18, rel=0.02)


def test_a_round_of_calls_is_counted_whole(teacher: Denoiser) -> None:
    """Three calls: one more pass in the mean of three steps, in either turn."""
    table = {"method": {"name": "sid", "game": {"calls": 3}}, "teacher": "unet", "batch": 2, "threads": 1}
    told = bench.bench({"few": config.resolve(table, M)}, teacher, repeats=1)["settings"]["few"]
    assert told["passes"] == pytest.approx(13, rel=0.02) and told["batch"] == 2


def test_a_joint_turn_saves_a_pass(teacher: Denoiser) -> None:
    for name, cost in (("diff_instruct", 8), ("sid", 10)):
        assert passes(M[name](game=Game(joint=True)), teacher) == pytest.approx(cost, rel=0.02)


def test_attention_counts() -> None:
    """On a CPU, where torch itself has no formula: 2 products of N x N x d a head forward, 5 backward."""
    query = torch.randn(2, 3, 16, 8, requires_grad=True)
    with bench.flop_counter() as counter:
        out = functional.scaled_dot_product_attention(query, query, query)
        forward = counter.get_total_flops()
        out.sum().backward()
    product = 2 * 2 * 3 * 16 * 16 * 8
    assert forward == 2 * product and counter.get_total_flops() - forward == 5 * product


def test_two_settings_in_turns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bench.json"
    command = "bench digits --method diff_instruct --batch 4 --repeats 3 --other.micro_batches 2 --threads 1 --out"
    assert cli.main([*command.split(), str(out)]) == 0
    told = json.loads(out.read_text())
    assert [line.split(":")[0].strip() for line in capsys.readouterr().out.splitlines()] == [
        "one", "between turns", "fake", "generator", "other", "between turns", "fake", "generator",
        "resident memory at its largest", "time of one / other",
    ]  # fmt: skip
    one, other = told["settings"]["one"], told["settings"]["other"]
    assert one["flops_per_image"] == pytest.approx(other["flops_per_image"], rel=1e-12)
    assert other["graph_mib"] < 0.6 * one["graph_mib"]  # half the batch at a time
    pairs = sorted(a / b for a, b in zip(one["all_seconds"], other["all_seconds"], strict=True))
    assert [told["ratio"][name] for name in ("low", "median", "high")] == pairs
    for side in (one, other):
        # the parts are the whole
        middle = sorted(side["all_seconds"])[1]
        assert sum(side["parts"].values()) == pytest.approx(middle, rel=1e-9)
        assert set(side["parts"]) == set(bench.PARTS)
        assert min(side["parts"].values()) > 0
    assert 0 < one["fraction_of_peak"] < 1


def test_a_meter_leaves_no_trace(teacher: Denoiser) -> None:
    recipe = config.resolve({"method": "sid", "teacher": "unet", "batch": 2}, M)
    trainer, source = bench.prepared(recipe, teacher)
    objects = [trainer, trainer.ema, *trainer.optimizers.values(), *trainer.nets.modules(), *teacher.modules()]
    before = [dict(vars(o)) for o in objects]
    with bench.Meter(trainer) as meter:
        trainer.advance(source)
    assert [list(vars(o)) for o in objects] == [list(b) for b in before]
    assert ("fake", "backward") in meter.seconds and ("generator", "teacher") in meter.seconds


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("digits --untrained mnist", "untrained: "),
        ("digits --repeats 0", "repeats: must be at least 1"),
        ("digits --other.stepz 3", "stepz: unknown key"),
        ("", "SOURCE: expected one"),
    ],
)
def test_mistakes(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", *arguments.split()]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_untrained_networks_are_those_of_edm() -> None:
    """EDM's CIFAR-10 network: its weights, and its 21.19 billion multiplications for an image."""
    denoiser = bench.untrained("cifar10")
    assert sum(p.numel() for p in denoiser.parameters()) == 55_733_891
    with torch.no_grad(), bench.flop_counter() as counter:
        denoiser(torch.zeros(1, 3, 32, 32), torch.ones(1))
    assert counter.get_total_flops() == pytest.approx(2 * 21.19e9, rel=1e-3)
