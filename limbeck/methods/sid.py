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
                       few-step SiD. It trains better than 0.5     dimension at P = S alpha / (alpha - 1) the update
                       and has no runaway                          turns outward
``normalizer``         ``l1``: w = 1 / mean |x - D_real|, with     ``none``: w = 1, for which the identities are exact
                       no gradient
``loss_scale``         1; Adam's eps is the only thing that sees   the code: 100
                       it
dropout                generator's on in its turn, off elsewhere   as the code
augmentation           none                                        the code augments the fake score's training samples
NaN                    the run stops                               the code drops NaN samples at an unchanged divisor
=====================  ==========================================  ==================================================
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor, nn

from limbeck.denoiser import Denoiser
from limbeck.fake import fake_turn, one_step_and_fake
from limbeck.generator import Generator, OneStep
from limbeck.losses import l1_scale, per_sample
from limbeck.noise import Karras, LogNormal
from limbeck.objective import Batch, Turn, perturb
from limbeck.optimizer import Optimizer


def sid_loss(x: Tensor, fake: Tensor, real: Tensor, alpha: float) -> Tensor:
    """(real - fake) . ((real - x) - alpha (real - fake)), summed over coordinates, unweighted: (B,).

    Args:
        x: generator samples (B, ...).
        fake, real: clean estimates at the noised samples, with their graphs to x.
        alpha: 1/2 is the Fisher divergence's gradient, 1 leaves its path term out.
    """
    gap = real - fake
    return per_sample(gap * ((real - x) - alpha * gap))


@dataclass(frozen=True)
class SiD:
    """Hyper-parameters of SiD. Noise levels are in units of sigma_data / 0.5.

    Attributes:
        alpha: see the ledger.
        sigma_init: level at which the generator calls its network.
        levels: law of the noise in the generator's turn: EDM's sampling levels up to quantile 0.8.
        fake_levels: law of the noise in the fake score's turn.
        fake_steps: turns of the fake score before each of the generator.
        normalizer: l1, or none.
        loss_scale: factor on the generator's loss.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}
    product: ClassVar[str] = "generator"
    needs_real: ClassVar[bool] = False

    alpha: float = 1.0
    sigma_init: float = 2.5
    levels: Karras = field(default_factory=lambda: Karras(stop=0.8))
    fake_levels: LogNormal = field(default_factory=LogNormal)
    fake_steps: int = 1
    normalizer: Literal["l1", "none"] = "l1"
    loss_scale: float = 1.0

    def __post_init__(self) -> None:
        if not -10 <= self.alpha <= 10:
            raise ValueError(f"alpha: must be a small finite number, got {self.alpha}")
        if not 0 < self.loss_scale < math.inf:
            raise ValueError(f"loss_scale: must be positive and finite, got {self.loss_scale}")
        if self.normalizer not in ("l1", "none"):
            raise ValueError(f"normalizer: must be l1 or none, got {self.normalizer!r}")
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
        """L_alpha per sample (B,)."""
        x = nets["generator"](batch.z, batch.cond)
        sigma = self.levels.scaled(teacher.unit).quantile(batch.u)
        noisy = perturb(x, sigma, batch.eps)
        real, fake = teacher(noisy, sigma, batch.cond), nets["fake"](noisy, sigma, batch.cond)
        weight = l1_scale(x / teacher.unit, real / teacher.unit) if self.normalizer == "l1" else 1.0
        return self.loss_scale * weight * sid_loss(x, fake, real, self.alpha) / teacher.unit**2
