"""The fake score: a denoiser that tracks the generator's own noised law, and the turn that trains it.

Methods that compare scores need grad log p_sigma of the generator. It is learned by denoising the generator's samples,
D_fake = argmin E |D(x + sigma eps; sigma) - x|^2 over x = G(z), with EDM's weight.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from limbeck.critic import Critic, Game, critic_loss
from limbeck.denoiser import Denoiser
from limbeck.generator import Generator
from limbeck.losses import denoising
from limbeck.noise import Levels
from limbeck.objective import Batch, Turn, perturb


def fake_turn(levels: Levels) -> Turn:
    """One descent step of "fake" on samples of the frozen generator; `levels` in units of sigma_data / 0.5."""

    def loss(nets: nn.ModuleDict, teacher: Denoiser, batch: Batch) -> Tensor:
        with torch.no_grad():
            x = nets["generator"](batch.z, batch.cond)
        fake = cast(Denoiser, nets["fake"])
        sigma = levels.scaled(teacher.unit).quantile(batch.u)
        estimate = fake(perturb(x, sigma, batch.eps), sigma, batch.cond)
        return denoising(estimate, x, sigma, fake.sigma_data)

    return Turn(("fake",), loss)


def adversarial_fake_turn(levels: Levels, weight: float, game: Game) -> Turn:
    """`fake_turn` of a `Critic`, plus `weight` times its critic's loss on real and generated samples.

    Both are noised to the same levels with the same noise.
    """

    def loss(nets: nn.ModuleDict, teacher: Denoiser, batch: Batch) -> Tensor:
        assert batch.real is not None
        with torch.no_grad():
            x = nets["generator"](batch.z, batch.cond)
        fake = cast(Critic, nets["fake"])
        sigma = levels.scaled(teacher.unit).quantile(batch.u)
        estimate, on_fake = fake.both(perturb(x, sigma, batch.eps), sigma, batch.cond)
        _, on_real = fake.both(perturb(batch.real, sigma, batch.eps), sigma, batch.cond)
        return denoising(estimate, x, sigma, fake.sigma_data) + weight * critic_loss(on_real, on_fake, game)

    return Turn(("fake",), loss)


def one_step_and_fake(
    template: Denoiser,
    generator: Generator | None,
    build: Callable[[Denoiser], Generator],
    wrap: Callable[[Denoiser], Denoiser] = lambda denoiser: denoiser,
) -> dict[str, nn.Module]:
    """The players of the score family: a generator (built by `build` from a copy of the template, or given) and a fake
    score, which starts as another copy of the template, wrapped by `wrap`.

    Raises:
        ValueError: if a given generator makes samples of another shape.
    """

    if generator is not None and generator.shape != template.shape:
        raise ValueError(f"generator: makes samples of shape {generator.shape}, the teacher's are {template.shape}")
    made = build(copy.deepcopy(template)) if generator is None else generator
    return {"generator": made, "fake": wrap(copy.deepcopy(template))}
