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


def test_values_of_the_papers() -> None:
    def of(name: str) -> config.Recipe:
        return config.resolve(config.read_toml(FOLDER / f"{name}.toml"), methods.METHODS)

    cifar, afhq, ffhq = of("cifar10-sid"), of("afhqv2-sid"), of("ffhq64-sid")
    assert (cifar.method.alpha, cifar.batch, cifar.method.loss_scale) == (1.2, 256, 100)
    assert cifar.optimizer["generator"].lr == 1e-5 and cifar.optimizer["generator"].betas == (0, 0.999)
    assert (afhq.method.alpha, afhq.optimizer["fake"].lr) == (1.0, 5e-6)
    assert ffhq.optimizer["generator"].betas[0] == 0.9 and ffhq.optimizer["fake"].betas[0] == 0
    assert of("imagenet64-sid").batch == 8192 and of("imagenet64-sid").ema.half_life == 2_000_000
    assert of("cifar10-diff_instruct").method.game.sigma_init == 1.0
    pid = of("cifar10-pid")
    assert (pid.method.N, pid.batch, pid.steps, pid.optimizer["generator"].name) == (250, 512, 800_000, "radam")
    assert pid.ema.decay(0, 512) < 1e-9 and pid.ema.decay(512, 512) == pytest.approx(0.9999, rel=1e-7)
    uni = of("cifar10-uni_instruct").method
    assert uni.divergence == "jeffreys" and uni.game.adversarial.after == 200_000
