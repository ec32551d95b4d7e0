r"""f-distill (Xu et al. 2025, arXiv:2502.15681), and DMD2 (Yin et al. 2024, arXiv:2405.14867) as its reverse KL.

The gradient of D_f(q_sigma || p_sigma) is the Diff-Instruct gradient, weighted per sample by h(r) = r^2 f''(r):

    E_p[h(r) (s_p - s_q) dx],   r = q_sigma / p_sigma = exp(logit of a critic), a constant here.

The critic is a head on the fake score's features, trained on real and generated samples noised alike; the generator
also gets its adversarial loss. Several turns of the fake score go before one of the generator (two time scales).

=====================  ==========================================  ==================================================
switch                 default                                     what else
=====================  ==========================================  ==================================================
``divergence``         ``jensen_shannon``, the paper's best        any of the table; ``reverse_kl`` with ``ratio_bins``
                                                                   unused is DMD2 without its regression
ratio                  per sample, brought to E_fake[r] = 1 in     the code clamps r to [0.1, 20] and also divides h by
                       bins of u; never divided by a batch mean    its batch mean
``weight``             ``dmd``: 1 / mean |x - D_real|              ``uniform``: 1
features               of the fake score                           one public port takes the teacher's
=====================  ==========================================  ==================================================
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from limbeck.critic import Critic, Game, RatioScale, generator_loss
from limbeck.denoiser import Denoiser, expand
from limbeck.divergence import DIVERGENCES
from limbeck.fake import adversarial_fake_turn, one_step_and_fake
from limbeck.generator import Generator, OneStep
from limbeck.losses import l1_scale, per_sample
from limbeck.noise import Karras, LogNormal
from limbeck.objective import Batch, Turn, perturb
from limbeck.optimizer import Optimizer


def f_distill_loss(x: Tensor, fake: Tensor, real: Tensor, weight: Tensor) -> Tensor:
    """weight (fake - real) . x with everything but x constant: (B,). Its value means nothing.

    Args:
        x: generator samples (B, ...).
        fake, real: clean estimates at the noised samples.
        weight: (B,), h(r) times any normaliser.
    """
    gap = (fake - real).detach()
    return per_sample(expand(weight.detach(), gap) * gap * x)


@dataclass(frozen=True)
class FDistill:
    """Hyper-parameters of f-distill. Noise levels are in units of sigma_data / 0.5.

    Attributes:
        divergence: a key of `divergence.DIVERGENCES`; reverse_kl is DMD2.
        sigma_init: level at which the generator calls its network.
        levels: law of the noise in the generator's turn.
        fake_levels: law of the noise in the fake score's turn.
        fake_steps: turns of the fake score before each of the generator.
        weight: uniform, or dmd.
        adversarial: factor on the generator's adversarial loss.
        critic: factor on the critic's loss in the fake score's turn.
        game: softplus (binary cross-entropy) or hinge.
        ratio_bins: bins of u in which the ratio is brought to mean 1.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}
    product: ClassVar[str] = "generator"
    needs_real: ClassVar[bool] = True

    divergence: str = "jensen_shannon"
    sigma_init: float = 2.5
    levels: Karras = field(default_factory=lambda: Karras(stop=0.8))
    fake_levels: LogNormal = field(default_factory=LogNormal)
    fake_steps: int = 2
    weight: Literal["uniform", "dmd"] = "dmd"
    adversarial: float = 3e-3
    critic: float = 1e-2
    game: Game = "softplus"
    ratio_bins: int = 10

    def __post_init__(self) -> None:
        if self.divergence not in DIVERGENCES:
            raise ValueError(f"divergence: unknown {self.divergence!r}, expected one of {', '.join(DIVERGENCES)}")
        if self.fake_steps < 1:
            raise ValueError(f"fake_steps: must be at least 1, got {self.fake_steps}")
        for name in ("adversarial", "critic"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: must be finite and not negative, got {getattr(self, name)}")
        if not 1 <= self.ratio_bins <= 1000:
            raise ValueError(f"ratio_bins: must be 1 to 1,000, got {self.ratio_bins}")

    def players(self, template: Denoiser, generator: Generator | None = None) -> dict[str, nn.Module]:
        """The generator, the fake score with a critic's head, and the running mean of the ratio."""
        made = one_step_and_fake(template, generator, lambda d: OneStep(d, self.sigma_init * template.unit), Critic)
        return {**made, "ratio": RatioScale(self.ratio_bins)}

    def optimizers(self) -> dict[str, Optimizer]:
        return {
            "fake": Optimizer("adam", lr=1e-3, betas=(0.0, 0.99)),
            "generator": Optimizer("adam", lr=5e-4, betas=(0.0, 0.99), schedule="cosine"),
        }

    def turns(self, step: int, images: int) -> Iterable[Turn]:
        for _ in range(self.fake_steps):
            yield adversarial_fake_turn(self.fake_levels, self.critic, self.game)
        yield Turn(("generator",), self.loss)

    def loss(self, nets: nn.ModuleDict, teacher: Denoiser, batch: Batch) -> Tensor:
        """Weighted Diff-Instruct surrogate plus the adversarial loss, per sample (B,)."""
        x = nets["generator"](batch.z, batch.cond)
        sigma = self.levels.scaled(teacher.unit).quantile(batch.u)
        noisy = perturb(x, sigma, batch.eps)
        fake, logits = cast(Critic, nets["fake"]).both(noisy, sigma, batch.cond)
        with torch.no_grad():
            real = teacher(noisy, sigma, batch.cond)
            h = DIVERGENCES[self.divergence].h(cast(RatioScale, nets["ratio"]).ratio(logits, batch.u))
            weight = h * (l1_scale(x / teacher.unit, real / teacher.unit) if self.weight == "dmd" else 1.0)
        surrogate = f_distill_loss(x, fake, real, weight) / teacher.unit**2
        return surrogate + self.adversarial * x[0].numel() * generator_loss(logits, self.game)
