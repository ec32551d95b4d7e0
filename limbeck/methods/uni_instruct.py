r"""Uni-Instruct (Wang et al. 2025, arXiv:2505.20755): minimise an f-divergence through its expansion over noise levels.

With h(r) = r^2 f''(r), r = q_sigma / p_sigma and delta = s_p - s_q, one level of the expansion is E_p[h(r) |delta|^2]
(`divergence`). Its gradient, with both scores and the critic's weights frozen, splits exactly into three terms, here in
denoisers (times sigma^4):

    2 h(r) (D_real - D_fake) . (D_fake - x)            gradient through x_sigma, also inside h(r(x_sigma))
    [h - r h'] |D_fake - D_real|^2                     bracket constant: the path term
    [r^2 h'' |D_fake - D_real|^2 (D_fake - D_real) / sigma^2] . x_sigma      bracket constant

The reverse KL needs no ratio: its three coefficients are 2, 1 and 0, which is twice SiD at alpha = 1/2. The released
code keeps the first term only, with h detached and a ratio that is 1 to three digits or more.

=====================  ==========================================  ==================================================
switch                 default                                     what else
=====================  ==========================================  ==================================================
``divergence``         ``jensen_shannon``                          any of the table; all but ``reverse_kl`` need the
                                                                   critic, which reads real samples
ratio                  exp(logit) with its graph to x_sigma,       the code's ratio is L / (L - 1) of a loss L in the
                       brought to E_fake[r] = 1 in bins of u       hundreds; ``as_released`` leaves that 1 and detaches
``normalizer``         ``l1``: 1 / mean |x - D_real|, constant     ``none``
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
from limbeck.fake import adversarial_fake_turn, fake_turn, one_step_and_fake
from limbeck.generator import Generator, OneStep
from limbeck.losses import l1_scale, per_sample
from limbeck.noise import Karras, LogNormal
from limbeck.objective import Batch, Turn, perturb
from limbeck.optimizer import Optimizer


def uni_instruct_loss(
    x: Tensor, noisy: Tensor, sigma: Tensor, fake: Tensor, real: Tensor, ratio: Tensor | None, divergence: str
) -> Tensor:
    """The three terms, summed over coordinates, unweighted: (B,). Its gradient is that of E_p[h(r) |fake - real|^2].

    Args:
        x: generator samples (B, ...).
        noisy: x + sigma eps, through which `fake`, `real` and `ratio` depend on x.
        sigma: (B,).
        fake, real: clean estimates at `noisy`, with their graphs to it.
        ratio: r at `noisy`, teacher over student, (B,), with its graph to it; None for the reverse KL only.
        divergence: a key of `divergence.DIVERGENCES`.

    Raises:
        ValueError: for an unknown divergence, or one that needs a ratio without it.
    """
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence: unknown {divergence!r}, expected one of {', '.join(DIVERGENCES)}")
    if ratio is None:
        if divergence != "reverse_kl":
            raise ValueError(f"divergence: {divergence} needs the density ratio (a critic); reverse_kl does without")
        ratio = torch.ones(len(x), dtype=x.dtype, device=x.device)
    d = DIVERGENCES[divergence]
    gap = fake - real
    squares = per_sample(gap**2)
    score_term = -2 * d.h(ratio) * per_sample(gap * (fake - x))
    path_term = (d.h(ratio) - d.h1(ratio)).detach() * squares
    pull = expand((d.h2(ratio) * squares / sigma**2).detach(), gap) * gap.detach()
    return score_term + path_term + per_sample(pull * noisy)


@dataclass(frozen=True)
class UniInstruct:
    """Hyper-parameters of Uni-Instruct. Noise levels are in units of sigma_data / 0.5.

    Attributes:
        divergence: a key of `divergence.DIVERGENCES`.
        as_released: the public code's form: the first term only, with h(1) constant.
        sigma_init: level at which the generator calls its network.
        levels: law of the noise in the generator's turn.
        fake_levels: law of the noise in the fake score's turn.
        fake_steps: turns of the fake score before each of the generator.
        normalizer: l1, or none.
        adversarial: factor on the generator's adversarial loss.
        critic: factor on the critic's loss in the fake score's turn; reverse_kl without `adversarial` has no critic.
        game: softplus (binary cross-entropy) or hinge.
        ratio_bins: bins of u in which the ratio is brought to mean 1.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}
    product: ClassVar[str] = "generator"

    divergence: str = "jensen_shannon"
    as_released: bool = False
    sigma_init: float = 2.5
    levels: Karras = field(default_factory=lambda: Karras(stop=0.8))
    fake_levels: LogNormal = field(default_factory=LogNormal)
    fake_steps: int = 1
    normalizer: Literal["l1", "none"] = "l1"
    adversarial: float = 0.0
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

    @property
    def needs_real(self) -> bool:
        """Whether there is a critic."""
        return self.divergence != "reverse_kl" or self.adversarial > 0

    def players(self, template: Denoiser, generator: Generator | None = None) -> dict[str, nn.Module]:
        """The generator and the fake score; with a critic, its head and the running mean of the ratio."""

        def build(denoiser: Denoiser) -> Generator:
            return OneStep(denoiser, self.sigma_init * template.unit)

        if not self.needs_real:
            return one_step_and_fake(template, generator, build)
        return {**one_step_and_fake(template, generator, build, Critic), "ratio": RatioScale(self.ratio_bins)}

    def optimizers(self) -> dict[str, Optimizer]:
        return {
            "fake": Optimizer("adam", lr=1e-3, betas=(0.0, 0.99)),
            "generator": Optimizer("adam", lr=5e-4, betas=(0.0, 0.99), schedule="cosine"),
        }

    def turns(self, step: int, images: int) -> Iterable[Turn]:
        for _ in range(self.fake_steps):
            if self.needs_real:
                yield adversarial_fake_turn(self.fake_levels, self.critic, self.game)
            else:
                yield fake_turn(self.fake_levels)
        yield Turn(("generator",), self.loss)

    def loss(self, nets: nn.ModuleDict, teacher: Denoiser, batch: Batch) -> Tensor:
        """The normalised three terms plus the adversarial loss, per sample (B,)."""
        x = nets["generator"](batch.z, batch.cond)
        sigma = self.levels.scaled(teacher.unit).quantile(batch.u)
        noisy = perturb(x, sigma, batch.eps)
        real = teacher(noisy, sigma, batch.cond)
        weight = l1_scale(x / teacher.unit, real / teacher.unit) if self.normalizer == "l1" else torch.ones_like(sigma)
        weight = weight / teacher.unit**2
        if not self.needs_real:
            fake, ratio = nets["fake"](noisy, sigma, batch.cond), None
            return weight * uni_instruct_loss(x, noisy, sigma, fake, real, ratio, self.divergence)
        fake, logits = cast(Critic, nets["fake"]).both(noisy, sigma, batch.cond)
        if self.as_released:
            h = DIVERGENCES[self.divergence].h(torch.ones_like(sigma))
            terms = -2 * h * per_sample((fake - real) * (fake - x))
        else:
            ratio = cast(RatioScale, nets["ratio"]).ratio(logits, batch.u)
            terms = uni_instruct_loss(x, noisy, sigma, fake, real, ratio, self.divergence)
        return weight * terms + self.adversarial * x[0].numel() * generator_loss(logits, self.game)
