r"""SiD, Score identity Distillation (Zhou et al. 2024, arXiv:2404.04057).

The Fisher divergence between the noised laws, in denoisers E_p |D_real - D_fake|^2, has a gradient that needs how
D_fake depends on the generator. Two identities, Tweedie's and the score projection

    E[u(x_sigma) . (D_fake(x_sigma) - x)] = 0   for any function u,

give losses that need only D_fake itself, all with gradient through both networks' inputs:

    L_alpha = w (D_real - D_fake) . ((D_real - x) - alpha (D_real - D_fake)),

    2 grad L_{1/2} is the gradient of the Fisher divergence, with the path term; alpha = 1 leaves the path term out
    (SIM, arXiv:2410.16794); alpha > 1 extrapolates.

=====================  ==========================================  ==================================================
switch                 default                                     what else
=====================  ==========================================  ==================================================
``alpha``              1.0, biased, an exception to "correct by    0.5 is the one unbiased value; 1.2 is the paper's
                       default": the value of SiDA, SiD-LSG and    headline, and has a point of no return: in one
                       few-step SiD, without a runaway             dimension at P = S alpha / (alpha - 1) the update
                                                                   turns outward
``normalizer``         ``l1``: w = 1 / mean |x - D_real|, with     ``none``: w = 1, for which the identities are exact
                       no gradient
``loss_scale``         1; Adam sees it in its eps only, ``clip``   the code: 100
                       and a critic's weight beside it in full
dropout                generator's on in its turn, off elsewhere   as the code
augmentation           none                                        the code augments the fake score's training samples
``nan``                ``stop``: the run stops, naming the sample  ``drop``: left out at an unchanged divisor, in the
                                                                   generator's turn, and the turn made again without
                                                                   them. The code leaves them out of the loss alone:
                                                                   behind a NaN gradients of 0 are NaN, which it
                                                                   replaces by 0
few steps              ``game.calls``: their number goes round     the code draws it at random
                       from 1 to K, a stratified draw
guidance               ``game.guidance``, off                      SiD-LSG: k1 = k2 = k3 = k4 = 1.5 (long: k4 only)
``levels``             log-normal, as the fake score's: on digits  the paper: EDM's sampling levels up to quantile 0.8,
                       0.067 against 0.072 (fd_feature, means of   ``levels = {stop = 0.8}``
                       three seeds), and 1.4 to 2.3 times fewer
                       images to the paper's quality
=====================  ==========================================  ==================================================
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from limbeck.denoiser import Denoiser
from limbeck.game import Game
from limbeck.generator import Generator
from limbeck.losses import l1_scale, score_identity
from limbeck.noise import Law, LogNormal
from limbeck.objective import Batch, Turn
from limbeck.optimizer import Optimizer

sid_loss = score_identity


@dataclass(frozen=True)
class SiD:
    """Hyper-parameters of SiD. Noise levels are in units of sigma_data / 0.5.

    Attributes:
        alpha: 1/2 is the one unbiased value; above 1 the update has a point of no return.
        levels: law of the noise in the generator's turn.
        normalizer: l1, or none.
        loss_scale: factor on the score loss.
        nan: stop, or drop.
        game: what methods with a fake score share.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}
    product: ClassVar[str] = "generator"
    warm_start: ClassVar[bool] = True

    alpha: float = 1.0
    levels: Law = field(default_factory=LogNormal)
    normalizer: Literal["l1", "none"] = "l1"
    loss_scale: float = 1.0
    nan: Literal["stop", "drop"] = "stop"
    game: Game = field(default_factory=Game)

    def __post_init__(self) -> None:
        if not -10 <= self.alpha <= 10:
            raise ValueError(f"alpha: must be a small finite number, got {self.alpha}")
        if not 0 < self.loss_scale < math.inf:
            raise ValueError(f"loss_scale: must be positive and finite, got {self.loss_scale}")
        for name, known in (("normalizer", ("l1", "none")), ("nan", ("stop", "drop"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: must be {' or '.join(known)}, got {getattr(self, name)!r}")

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
        """L_alpha, and the adversarial loss if there is a critic, per sample (B,); 0 for dropped ones."""
        loss = self._loss(nets, teacher, batch, call, judged)
        good = torch.isfinite(loss)
        if self.nan == "stop" or good.all() or not good.any():
            return loss
        # without them from the start: behind a NaN, gradients of 0 are NaN too
        kept = self._loss(nets, teacher, batch.mapped(lambda tensor: tensor[good]), call, judged)
        return torch.zeros_like(loss).index_put((good,), kept)

    def _loss(self, nets: nn.ModuleDict, teacher: Denoiser, batch: Batch, call: int | None, judged: bool) -> Tensor:
        view = self.game.view(nets, teacher, batch, self.levels, call, judged)
        x, fake, real = view.x, view.fake, view.real
        weight = (
            l1_scale(x / teacher.unit, real / teacher.unit) if self.normalizer == "l1" else torch.ones_like(batch.u)
        )
        score_loss = weight * sid_loss(x, fake, real, self.alpha)
        return self.loss_scale * score_loss / teacher.unit**2 + self.game.adversarial_loss(view)

    def health(self, nets: nn.ModuleDict, teacher: Denoiser, batch: Batch) -> dict[str, Tensor]:
        return self.game.health(nets, teacher, batch, self.levels)
