r"""SiDA, adversarial score identity distillation (Zhou et al. 2024, arXiv:2410.14919).

SiD's loss plus the loss of a critic that shares the fake score's encoder, both with SiD's normaliser:

    w (L_alpha + weight d softplus(-logit)),   w = 1 / mean |x - D_real|, d coordinates.

At first the fake score and the critic play alone, then SiD joins, then the critic's judgement.

=====================  ==========================================  ==================================================
switch                 default                                     what else
=====================  ==========================================  ==================================================
logits                 a small perceptron on the encoder's mean    the code: mean over the channels of the bottleneck,
                       activations                                 one logit per position
critic's loss          per pair, times EDM's weight at its level   the code: mean over the GPU's batch, times EDM's
                       (``weighting = "edm"``)                     weight
adversarial loss       weight 1e-4, the code's ratio of 0.01 to    ``game.adversarial.weight``
                       100
critic's share         3e-4 beside the mean denoising loss of the  ``game.adversarial.critic``; the code: 1 / d. At
                       fake's turn: 1 / d on CIFAR-10              1e-2 the critic takes the fake score's features, and
                                                                   digits run away
gates                  ``game.fake_first`` 100,000 images, then    as the code; 0 switches them off
                       ``game.adversarial.after`` 200,000
``alpha``              1, the paper's                              see ``sid``
real samples           needed, with labels of the generator's      the code: of the data's
                       batch
``levels``             log-normal, as the fake score's (see        SiD's law: ``levels = {stop = 0.8}``
                       ``sid``)
=====================  ==========================================  ==================================================
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn

from limbeck.critic import Adversarial
from limbeck.denoiser import Denoiser
from limbeck.game import Game
from limbeck.generator import Generator
from limbeck.losses import l1_scale, score_identity
from limbeck.noise import Law, LogNormal
from limbeck.objective import Batch, Turn
from limbeck.optimizer import Optimizer


@dataclass(frozen=True)
class SiDA:
    """Hyper-parameters of SiDA. Noise levels are in units of sigma_data / 0.5.

    Attributes:
        alpha: as that of `sid`.
        levels: law of the noise in the generator's turn.
        game: what methods with a fake score share.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}
    product: ClassVar[str] = "generator"
    needs_real: ClassVar[bool] = True
    warm_start: ClassVar[bool] = True
    steps: ClassVar[int] = 3500  # two minutes on ring8, as the others

    alpha: float = 1.0
    levels: Law = field(default_factory=LogNormal)
    game: Game = field(
        default_factory=lambda: Game(
            fake_first=100_000,
            adversarial=Adversarial(weight=1e-4, critic=3e-4, loss="bce", weighting="edm", after=200_000),
        )
    )

    def __post_init__(self) -> None:
        if not -10 <= self.alpha <= 10:
            raise ValueError(f"alpha: must be a small finite number, got {self.alpha}")
        if self.game.adversarial is None:
            raise ValueError("game.adversarial: SiDA has a critic; sid does without")

    def players(self, template: Denoiser, generator: Generator | None = None) -> dict[str, nn.Module]:
        return self.game.players(template, generator)

    def optimizers(self) -> dict[str, Optimizer]:
        return self.game.optimizers()

    def turns(self, step: int, images: int) -> Iterable[Turn]:
        return self.game.turns(self.loss, step, images)

    def loss(
        self, nets: nn.ModuleDict, teacher: Denoiser, batch: Batch, call: int | None = None, judged: bool = True
    ) -> Tensor:
        """The normalised sum of both losses, per sample (B,)."""
        view = self.game.view(nets, teacher, batch, self.levels, call, judged)
        weight = l1_scale(view.x / teacher.unit, view.real / teacher.unit)
        score_loss = score_identity(view.x, view.fake, view.real, self.alpha) / teacher.unit**2
        return weight * (score_loss + self.game.adversarial_loss(view))

    def health(self, nets: nn.ModuleDict, teacher: Denoiser, batch: Batch) -> dict[str, Tensor]:
        return self.game.health(nets, teacher, batch, self.levels)
