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
``levels``             log-normal, as the fake score's             SiD's law: ``levels = {stop = 0.8}``
=====================  ==========================================  ==================================================
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor, nn

from limbeck.denoiser import Denoiser, expand
from limbeck.game import Game
from limbeck.generator import Generator
from limbeck.losses import per_sample
from limbeck.noise import Law, LogNormal
from limbeck.objective import Batch, Turn
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
        levels: law of the noise in the generator's turn.
        game: what methods with a fake score share.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}
    product: ClassVar[str] = "generator"
    warm_start: ClassVar[bool] = True

    distance: Literal["huber", "squared"] = "huber"
    c: float = 0.00054
    levels: Law = field(default_factory=LogNormal)
    game: Game = field(default_factory=Game)

    def __post_init__(self) -> None:
        if not 0 < self.c < math.inf:
            raise ValueError(f"c: must be positive and finite, got {self.c}")

    @property
    def needs_real(self) -> bool:
        return self.game.adversarial is not None

    def players(self, template: Denoiser, generator: Generator | None = None) -> dict[str, nn.Module]:
        return self.game.players(template, generator)

    def optimizers(self) -> dict[str, Optimizer]:
        return self.game.optimizers()

    def turns(self, step: int, images: int) -> Iterable[Turn]:
        return self.game.turns(self.loss, step, images)

    def loss(
        self, nets: nn.ModuleDict, teacher: Denoiser, batch: Batch, call: int | None = None, judged: bool = True
    ) -> Tensor:
        """The loss per sample (B,), in units of the data's scale."""
        view = self.game.view(nets, teacher, batch, self.levels, call, judged)
        c = self.c * math.sqrt(view.x[0].numel()) if self.distance == "huber" else None
        score_loss = sim_loss(view.x / teacher.unit, view.fake / teacher.unit, view.real / teacher.unit, c)
        return score_loss + self.game.adversarial_loss(view)

    def health(self, nets: nn.ModuleDict, teacher: Denoiser, batch: Batch) -> dict[str, Tensor]:
        return self.game.health(nets, teacher, batch, self.levels)
