r"""SIM, Score Implicit Matching (Luo et al. 2024, arXiv:2410.16794): minimise E d(s_p - s_q), d a distance of scores.

With the fake score frozen and the noised sample carrying the gradient, the paper's theorem gives the tractable loss

    - d'(y) . (D_fake - x),    y = D_fake - D_real,

here in denoisers (scores times sigma^2). d = |y|^2 is SiD's integrand at alpha = 1, twice; the pseudo-Huber distance
d = sqrt(|y|^2 + c^2) - c normalises every sample by its own error.

=====================  ==========================================  ==================================================
switch                 default                                     what else
=====================  ==========================================  ==================================================
``distance``           ``huber``, the paper's choice; the norm     ``squared``: 2 y, equal to 2 L_1 of SiD
                       is over a whole sample
``c``                  0.00054, times sqrt(d) and the data's       the paper's value could not be checked
                       scale, as consistency models have it
=====================  ==========================================  ==================================================
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor, nn

from limbeck.denoiser import Denoiser, expand
from limbeck.fake import fake_turn, one_step_and_fake
from limbeck.generator import Generator, OneStep
from limbeck.losses import per_sample
from limbeck.noise import Karras, LogNormal
from limbeck.objective import Batch, Turn, perturb
from limbeck.optimizer import Optimizer


def sim_loss(x: Tensor, fake: Tensor, real: Tensor, c: float | None) -> Tensor:
    """-d'(y) . (fake - x) with y = fake - real, summed over coordinates: (B,).

    Args:
        x: generator samples (B, ...).
        fake, real: clean estimates at the noised samples, with their graphs to x.
        c: pseudo-Huber's constant, for the norm of a whole sample; None is d = |y|^2.
    """
    y = fake - real
    slope = 2 * y if c is None else y / expand((per_sample(y**2) + c**2).sqrt(), y)
    return -per_sample(slope * (fake - x))


@dataclass(frozen=True)
class SIM:
    """Hyper-parameters of SIM. Noise levels are in units of sigma_data / 0.5.

    Attributes:
        distance: huber, or squared.
        c: pseudo-Huber's constant, times sqrt(d) and the data's scale.
        sigma_init: level at which the generator calls its network.
        levels: law of the noise in the generator's turn.
        fake_levels: law of the noise in the fake score's turn.
        fake_steps: turns of the fake score before each of the generator.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}
    product: ClassVar[str] = "generator"
    needs_real: ClassVar[bool] = False

    distance: Literal["huber", "squared"] = "huber"
    c: float = 0.00054
    sigma_init: float = 2.5
    levels: Karras = field(default_factory=lambda: Karras(stop=0.8))
    fake_levels: LogNormal = field(default_factory=LogNormal)
    fake_steps: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.c < math.inf:
            raise ValueError(f"c: must be positive and finite, got {self.c}")
        if self.fake_steps < 1:
            raise ValueError(f"fake_steps: must be at least 1, got {self.fake_steps}")

    def players(self, template: Denoiser, generator: Generator | None = None) -> dict[str, nn.Module]:
        """The generator, one call at sigma_init; and the fake score. Both start as copies of the template."""
        return one_step_and_fake(template, generator, lambda d: OneStep(d, self.sigma_init * template.unit))

    def optimizers(self) -> dict[str, Optimizer]:
        return {
            "fake": Optimizer("adam", lr=1e-3, betas=(0.0, 0.99)),
            "generator": Optimizer("adam", lr=5e-4, betas=(0.0, 0.99), schedule="cosine"),
        }

    def turns(self, step: int, images: int) -> Iterable[Turn]:
        for _ in range(self.fake_steps):
            yield fake_turn(self.fake_levels)
        yield Turn(("generator",), self.loss)

    def loss(self, nets: nn.ModuleDict, teacher: Denoiser, batch: Batch) -> Tensor:
        """The loss per sample (B,), in units of the data's scale."""
        x = nets["generator"](batch.z, batch.cond)
        sigma = self.levels.scaled(teacher.unit).quantile(batch.u)
        noisy = perturb(x, sigma, batch.eps)
        real, fake = teacher(noisy, sigma, batch.cond), nets["fake"](noisy, sigma, batch.cond)
        c = self.c * math.sqrt(x[0].numel()) if self.distance == "huber" else None
        return sim_loss(x / teacher.unit, fake / teacher.unit, real / teacher.unit, c)
