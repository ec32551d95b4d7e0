"""The benchmark recipes: every one is valid, holds the papers' values, and plays a step on a network of its kind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from limbeck import config, methods, students
from limbeck.denoiser import Preconditioned
from limbeck.networks import for_samples
from limbeck.source import NoiseSource, RealSource

FOLDER = Path(__file__).parent.parent / "recipes"
DATA = {"cifar10": (32, 0), "imagenet64": (64, 1000), "ffhq64": (64, 0), "afhqv2": (64, 0)}
METHODS = ("pid", "diff_instruct", "sid", "uni_instruct")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("data", DATA)
def test_a_benchmark_recipe_plays_a_step(data: str, method: str) -> None:
    size, classes = DATA[data]
    recipe = config.resolve(config.read_toml(FOLDER / f"{data}-{method}.toml"), methods.METHODS)
    assert config.method_name(recipe.method) == method
    assert recipe.teacher is not None and recipe.teacher.startswith("edm:") and recipe.steps * recipe.batch >= 10**8
    options = {"model_channels": 8, "num_blocks": 1, "channel_mult": [1, 1], "attn_resolutions": []}
    classes = min(classes, 3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = for_samples("adm" if classes else "songunet", (3, size, size), classes, options)
    teacher = Preconditioned(network, (3, size, size), classes, 0.5, 0.002, 80.0)
    trainer = students.trainer_of(recipe, teacher, teacher)
    noise = NoiseSource(teacher.shape, teacher.shape, 2, recipe.seed, classes)
    real = torch.rand(2, *teacher.shape) * 2 - 1
    before = [p.clone() for p in trainer.nets["fake" if "fake" in trainer.nets else "generator"].parameters()]
    told = trainer.advance(RealSource(noise, lambda n, rng, labels: real))
    after = trainer.nets["fake" if "fake" in trainer.nets else "generator"].parameters()
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(torch.isfinite(value).all() for value in told.values())
    if method == "uni_instruct":  # behind its gates the generator plays too
        trainer.images = 200_000
        assert "loss/generator" in trainer.advance(RealSource(noise, lambda n, rng, labels: real))


def of(name: str) -> config.Recipe:
    return config.resolve(config.read_toml(FOLDER / f"{name}.toml"), methods.METHODS)


# SiD's script: alpha, batch, both rates, half precision, half-life of the average in 10^6 images, first beta of the
# generator, length in 10^6 images; Uni-Instruct keeps batch, rate and precision
SID = {
    "cifar10": (1.2, 256, 1e-5, False, 0.5, 0.0, 500),
    "imagenet64": (1.2, 8192, 4e-6, True, 2.0, 0.0, 1000),
    "ffhq64": (1.2, 512, 1e-5, True, 0.5, 0.9, 500),
    "afhqv2": (1.0, 512, 5e-6, True, 0.5, 0.0, 500),
}


@pytest.mark.parametrize("data", SID)
def test_values_of_sid_and_uni_instruct(data: str) -> None:
    alpha, batch, rate, half, half_life, beta, images = SID[data]
    sid, uni = of(f"{data}-sid"), of(f"{data}-uni_instruct")
    assert (sid.method.alpha, sid.method.loss_scale) == (alpha, 100)
    for recipe, length, first in ((sid, images, beta), (uni, 300, 0.0)):
        assert recipe.batch == batch and recipe.steps * batch == pytest.approx(length * 1e6, rel=1e-4)
        assert recipe.ema.half_life == half_life * 1e6 and recipe.method.levels.stop == 0.8
        assert set(recipe.precision.values()) == ({"fp16"} if half else set())
        for player, settings in recipe.optimizer.items():
            assert settings.name == "adam" and settings.lr == rate and settings.schedule == "constant"
            assert settings.betas == (first if player == "generator" else 0.0, 0.999)
        assert recipe.optimizer["fake"].eps == (1e-6 if half else 1e-8)
    # Uni-Instruct: loss weights 0.01 and 100 of the code, whose score term is 2 h(1) times as large here
    adversarial, h = uni.method.game.adversarial, 2 if uni.method.divergence == "jeffreys" else 1
    assert uni.method.divergence == ("forward_kl" if data == "imagenet64" else "jeffreys")
    assert adversarial.weight == pytest.approx(1e-4 * 2 * h) and (adversarial.loss, adversarial.weighting) == (
        "bce",
        "edm",
    )
    side = 32 if data == "cifar10" else 64
    assert adversarial.critic == pytest.approx(1 / (3 * side**2), rel=2e-3)
    assert (uni.method.game.fake_first, adversarial.after) == (100_000, 200_000)
    assert uni.optimizer["generator"].eps == pytest.approx(uni.optimizer["fake"].eps * 2 * h / 100)


@pytest.mark.parametrize("data", SID)
def test_values_of_pid_and_diff_instruct(data: str) -> None:
    pid, plain = of(f"{data}-pid"), of(f"{data}-diff_instruct")
    large = data == "imagenet64"
    assert (pid.method.N, pid.method.metric) == (250, "l2")  # the papers' own is LPIPS, which Limbeck does not bring
    assert (pid.batch, pid.steps) == ((2048, 400_000) if large else (512, 800_000))
    settings = pid.optimizer["generator"]
    assert (settings.name, settings.lr, settings.betas) == ("radam", 1e-4 if large else 2e-4, (0.9, 0.999))
    assert pid.ema.decay(0, pid.batch) < 1e-9 and pid.ema.decay(pid.batch, pid.batch) == pytest.approx(0.9999, rel=1e-7)
    assert (plain.method.game.sigma_init, plain.method.dropout_replay, plain.batch) == (1.0, True, 128)
    for settings in plain.optimizer.values():
        assert (settings.name, settings.lr, settings.betas, settings.eps) == ("adam", 1e-5, (0.0, 0.999), 1e-8)
