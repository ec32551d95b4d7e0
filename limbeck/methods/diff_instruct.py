r"""Diff-Instruct (Luo et al. 2023, arXiv:2305.18455): minimise the integral KL divergence of noised laws.

    IKL = int w(sigma) KL(p_sigma || q_sigma) dsigma,
    grad IKL = int w(sigma) E[(s_p(x_sigma) - s_q(x_sigma)) dx/dtheta] dsigma

with p the generator's noised law, q the teacher's, and no gradient through either score. In denoisers,
s_p - s_q = (D_fake - D_real) / sigma^2; the loss below with weight 1 is the case w(sigma) = sigma^2 density(sigma).

=====================  ==========================================  ==================================================
switch                 default                                     what else
=====================  ==========================================  ==================================================
``weight``             ``uniform``: 1, as the authors' code        ``dmd``: 1 / mean |x - D_real| per sample, DMD's
                                                                   normaliser (arXiv:2311.18828)
dropout                fake and teacher in eval mode               the code puts both in training mode with equal masks
``sigma_init``         2.5, as SiD and DMD's successors            the code's README: 1.0 for CIFAR-10
labels                 fresh in every turn                         the code reuses the fake score's labels for the
                                                                   generator's turn
``updated_at``         off: turn and sample call one generator     the noise input of a plain generator (`Direct`) in
                                                                   its own turn. VarDiU's authors update their
                                                                   baseline at 0 while they sample it, and train its
                                                                   fake score, at 1: another network's output
augmentation           none                                        the code augments the fake score's training samples
NaN gradients          the run stops                               the code replaces them by 0 or 1e5
=====================  ==========================================  ==================================================
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from limbeck.denoiser import Denoiser, expand
from limbeck.fake import fake_turn, one_step_and_fake
from limbeck.generator import Direct, Generator, OneStep
from limbeck.losses import l1_scale, per_sample
from limbeck.noise import LogNormal, Power
from limbeck.objective import Batch, Turn, perturb
from limbeck.optimizer import Optimizer


def diff_instruct_loss(x: Tensor, fake: Tensor, real: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    """weight * (fake - real) . x, whose gradient in x is weight * (fake - real): (B,). Its value means nothing.

    Args:
        x: generator samples (B, ...).
        fake, real: clean estimates at the noised samples under the fake score and the teacher; constants here.
        weight: (B,) or a number.
    """
    gap = (fake - real).detach()
    scale = expand(weight.detach(), gap) if isinstance(weight, Tensor) else weight
    return per_sample(scale * gap * x)


@dataclass(frozen=True)
class DiffInstruct:
    """Hyper-parameters of Diff-Instruct. Noise levels are in units of sigma_data / 0.5.

    Attributes:
        sigma_init: level at which the generator calls its network.
        levels: law of the noise in the generator's turn: LogNormal (mean, std) or Power (sigma_min, sigma_max, power).
        fake_levels: law of the noise in the fake score's turn.
        fake_steps: turns of the fake score before each of the generator.
        weight: uniform, or dmd.
        updated_at: see the ledger.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}
    product: ClassVar[str] = "generator"
    needs_real: ClassVar[bool] = False

    sigma_init: float = 2.5
    levels: LogNormal | Power = field(default_factory=LogNormal)
    fake_levels: LogNormal | Power = field(default_factory=LogNormal)
    fake_steps: int = 1
    weight: Literal["uniform", "dmd"] = "uniform"
    updated_at: float | None = None

    def __post_init__(self) -> None:
        if self.weight not in ("uniform", "dmd"):
            raise ValueError(f"weight: must be uniform or dmd, got {self.weight!r}")
        if self.fake_steps < 1:
            raise ValueError(f"fake_steps: must be at least 1, got {self.fake_steps}")

    def players(self, template: Denoiser, generator: Generator | None = None) -> dict[str, nn.Module]:
        """The generator, one call at sigma_init; and the fake score. Both start as copies of the template."""
        if self.updated_at is not None and not isinstance(generator, Direct):
            raise ValueError("updated_at: needs a plain generator; set generator.network")
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
        """Per-sample surrogate (B,) whose gradient is the integral KL's."""
        generator = nets["generator"]
        if self.updated_at is None:
            x = generator(batch.z, batch.cond)
        else:
            x = cast(Direct, generator).at(batch.z, self.updated_at, batch.cond)
        sigma = self.levels.scaled(teacher.unit).quantile(batch.u)
        with torch.no_grad():
            noisy = perturb(x, sigma, batch.eps)
            real = teacher(noisy, sigma, batch.cond)
            fake = nets["fake"](noisy, sigma, batch.cond)
        weight = 1.0 if self.weight == "uniform" else l1_scale(x / teacher.unit, real / teacher.unit)
        return diff_instruct_loss(x, fake, real, weight) / teacher.unit**2
