r"""DMD, distribution matching distillation (Yin et al. 2023, arXiv:2311.18828).

Two losses for the generator: the reverse KL divergence at noised levels, as Diff-Instruct, with its own normaliser,

    E_p[w (D_fake - D_real) dx],   w = 1 / mean |x - D_real|,

and a regression on pairs (z, x) of a latent and what the teacher's ODE makes of it, which keeps every mode in reach.
The pairs are made once from the teacher: no data are read.

=====================  ==========================================  ==================================================
switch                 default                                     what else
=====================  ==========================================  ==================================================
``distance``           ``squared``                                 ``huber``; the paper's LPIPS needs weights that are
                                                                   not bundled
``regression``         0.25, the paper's weight, times the number  0: Diff-Instruct with DMD's weight
                       of coordinates
``pairs``              10,000 by Heun's method, of the guided      the paper: 100,000 (CIFAR-10) to 500,000
                       teacher where the score is
``game.sigma_init``    2.5, as SiD                                 the code: 80 times the latent
``levels``             log-normal, as the fake score's             the paper: t uniform over 2% to 98% of the steps,
                                                                   about ``levels = {stop = 0.98}``
=====================  ==========================================  ==================================================
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor, nn

from limbeck.denoiser import Denoiser
from limbeck.game import Game
from limbeck.generator import Generator
from limbeck.losses import l1_scale, matching, pseudo_huber, squared
from limbeck.noise import Law, LogNormal
from limbeck.objective import Batch, Turn
from limbeck.optimizer import Optimizer


@dataclass(frozen=True)
class DMD:
    """Hyper-parameters of DMD. Noise levels are in units of sigma_data / 0.5.

    Attributes:
        levels: law of the noise in the generator's turn.
        regression: weight of the regression.
        distance: of the regression, squared or huber, of coordinates in the mean.
        pairs: number of pairs.
        game: what methods with a fake score share.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}
    product: ClassVar[str] = "generator"
    warm_start: ClassVar[bool] = True
    steps: ClassVar[int] = 3400  # of three calls of the generator each

    levels: Law = field(default_factory=LogNormal)
    regression: float = 0.25
    distance: Literal["squared", "huber"] = "squared"
    pairs: int = 10_000
    game: Game = field(default_factory=Game)

    def __post_init__(self) -> None:
        if not 0 <= self.regression < math.inf:
            raise ValueError(f"regression: must be finite and not negative, got {self.regression}")
        if self.pairs < 1:
            raise ValueError(f"pairs: must be at least 1, got {self.pairs}")
        if self.game.calls > 1:
            raise ValueError("game.calls: DMD regresses on one call; take dmd2 for a generator of several")

    @property
    def needs_real(self) -> bool:
        return self.game.adversarial is not None

    def players(self, template: Denoiser, generator: Generator | None = None) -> dict[str, nn.Module]:
        if generator is not None and generator.latent_shape != template.shape:
            raise ValueError(
                "generator: DMD regresses on the teacher's own noise, so latents need the shape of samples; take dmd2"
            )
        return self.game.players(template, generator)

    def optimizers(self) -> dict[str, Optimizer]:
        return self.game.optimizers()

    def turns(self, step: int, images: int) -> Iterable[Turn]:
        return self.game.turns(self.loss, step, images)

    def loss(
        self, nets: nn.ModuleDict, teacher: Denoiser, batch: Batch, call: int | None = None, judged: bool = True
    ) -> Tensor:
        """Distribution matching surrogate, regression, and the adversarial loss if there is a critic: (B,)."""
        view = self.game.view(nets, teacher, batch, self.levels, call, judged, graph=False)
        weight = l1_scale(view.x / teacher.unit, view.real / teacher.unit)
        surrogate = matching(view.x, view.fake, view.real, weight) / teacher.unit**2
        return surrogate + self.regression * self.regress(nets, teacher, batch) + self.game.adversarial_loss(view)

    def regress(self, nets: nn.ModuleDict, teacher: Denoiser, batch: Batch) -> Tensor:
        """Distance of G(z) from x over the batch's pairs (B,), a mean over coordinates times their number."""
        assert batch.pairs is not None
        z, x, cond = batch.pairs
        made, wanted, d = nets["generator"](z, cond) / teacher.unit, x / teacher.unit, x[0].numel()
        # the norm of a whole sample is sqrt(d) times the root mean square of its coordinates
        return d * squared(made, wanted) if self.distance == "squared" else math.sqrt(d) * pseudo_huber(made, wanted)

    def health(self, nets: nn.ModuleDict, teacher: Denoiser, batch: Batch) -> dict[str, Tensor]:
        return self.game.health(nets, teacher, batch, self.levels)
