r"""f-distill (Xu et al. 2025, arXiv:2502.15681): DMD2 with an f-divergence in place of the reverse KL.

The gradient of D_f(q_sigma || p_sigma) is the Diff-Instruct gradient, weighted per sample by h(r) = r^2 f''(r):

    E_p[h(r) (s_p - s_q) dx],   r = q_sigma / p_sigma = exp(logit of a critic), a constant here.

The critic is a head on the fake score's features, trained on real and generated samples noised alike; the generator
also gets its adversarial loss. Several turns of the fake score go before one of the generator (two time scales).

=====================  ==========================================  ==================================================
switch                 default                                     what else
=====================  ==========================================  ==================================================
``divergence``         ``jensen_shannon``, the paper's best        any of the table; ``reverse_kl`` is DMD2
ratio                  per sample, at most E_fake[r] = 1 in        the code clamps r to [0.1, 20] and also divides h by
                       bins of u; never divided by a batch mean    its batch mean
``ratio_raised``       off: a mean ratio below 1 is left           on: brought up to 1, as the true ratio's is; where
                                                                   all samples have strayed, weights say little
``weight``             ``dmd``: 1 / mean |x - D_real|              ``uniform``: 1
``game.adversarial``   softplus on features of the fake score; a   ``features = "teacher"``, as one public port has it
                       hinge loss gives no ratio and is refused
gate                   none: the critic counts from the start      ``game.adversarial.after``; before, the weight is
                                                                   h(1)
fake steps             2                                           the paper builds on DMD2, which has 5
``levels``             log-normal, as the fake score's (see        SiD's law: ``levels = {stop = 0.8}``
                       ``sid``)
=====================  ==========================================  ==================================================
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from limbeck.critic import Adversarial, RatioScale
from limbeck.denoiser import Denoiser
from limbeck.divergence import DIVERGENCES
from limbeck.game import Game, check_ratio
from limbeck.generator import Generator
from limbeck.losses import l1_scale, matching
from limbeck.noise import Law, LogNormal
from limbeck.objective import Batch, Turn
from limbeck.optimizer import Optimizer

f_distill_loss = matching


@dataclass(frozen=True)
class FDistill:
    """Hyper-parameters of f-distill. Noise levels are in units of sigma_data / 0.5.

    Attributes:
        divergence: a key of `divergence.DIVERGENCES`; reverse_kl is DMD2.
        levels: law of the noise in the generator's turn.
        weight: uniform, or dmd.
        ratio_bins: bins of u in which the ratio is brought down to mean 1.
        ratio_raised: a mean below 1 is brought up to 1 too.
        game: what methods with a fake score share; its critic gives the ratio.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}
    product: ClassVar[str] = "generator"
    needs_real: ClassVar[bool] = True
    warm_start: ClassVar[bool] = True
    steps: ClassVar[int] = 2200  # of three turns each

    divergence: str = "jensen_shannon"
    levels: Law = field(default_factory=LogNormal)
    weight: Literal["uniform", "dmd"] = "dmd"
    ratio_bins: int = 10
    ratio_raised: bool = False
    game: Game = field(default_factory=lambda: Game(fake_steps=2, adversarial=Adversarial(weight=3e-3)))

    def __post_init__(self) -> None:
        if self.divergence not in DIVERGENCES:
            raise ValueError(f"divergence: unknown {self.divergence!r}, expected one of {', '.join(DIVERGENCES)}")
        if not 1 <= self.ratio_bins <= 1000:
            raise ValueError(f"ratio_bins: must be 1 to 1,000, got {self.ratio_bins}")
        if self.game.adversarial is None:
            raise ValueError("game.adversarial: f-distill takes its density ratio from a critic")
        check_ratio(self.game, self.divergence)

    def players(self, template: Denoiser, generator: Generator | None = None) -> dict[str, nn.Module]:
        ratio = RatioScale(self.ratio_bins, raised=self.ratio_raised)
        return {**self.game.players(template, generator), "ratio": ratio}

    def optimizers(self) -> dict[str, Optimizer]:
        return self.game.optimizers()

    def turns(self, step: int, images: int) -> Iterable[Turn]:
        return self.game.turns(self.loss, step, images)

    def loss(
        self, nets: nn.ModuleDict, teacher: Denoiser, batch: Batch, call: int | None = None, judged: bool = True
    ) -> Tensor:
        """Weighted Diff-Instruct surrogate plus the adversarial loss, per sample (B,)."""
        view = self.game.view(nets, teacher, batch, self.levels, call, judged, graph=False)
        with torch.no_grad():
            ratio = torch.ones_like(view.sigma)  # until the critic counts
            if view.logits is not None:
                ratio = cast(RatioScale, nets["ratio"]).ratio(view.logits, batch.u)
            weight = DIVERGENCES[self.divergence].h(ratio)
            if self.weight == "dmd":
                weight = weight * l1_scale(view.x / teacher.unit, view.real / teacher.unit)
        surrogate = f_distill_loss(view.x, view.fake, view.real, weight) / teacher.unit**2
        return surrogate + self.game.adversarial_loss(view)

    def health(self, nets: nn.ModuleDict, teacher: Denoiser, batch: Batch) -> dict[str, Tensor]:
        return self.game.health(nets, teacher, batch, self.levels)
