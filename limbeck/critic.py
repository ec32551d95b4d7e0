"""Critics: log odds of data against generator samples at a noise level, read from the features of a denoiser.

A perfect critic's logit is log q_sigma(x) / p_sigma(x), data over student: exp(logit) is the density ratio that methods
on f-divergences need, and softplus(-logit) the generator's adversarial loss (Goodfellow et al. 2014, arXiv:1406.2661).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from limbeck.denoiser import Denoiser, Networked, expand
from limbeck.objective import State

Kind = Literal["softplus", "bce", "hinge"]

R1_STEP = 0.01  # finite difference, in units of the network's input, whose coordinates have unit variance


@dataclass(frozen=True)
class Adversarial:
    """A critic beside the fake score, for any method: it needs real samples.

    Attributes:
        weight: factor on the generator's adversarial loss, per coordinate of a sample; 0 leaves only the density ratio.
        critic: factor on the critic's loss in the fake score's turn.
        loss: softplus, the sum over a real and a generated sample (DMD2); bce, their mean (SiDA), which is softplus
            halved; or hinge.
        features: whose features the critic reads. fake: those of the fake score, which it helps to train; teacher: the
            frozen teacher's.
        weighting: uniform; or edm, the critic's loss times the denoising loss's weight at its level (SiDA).
        r1: weight of the squared gradient of the logit at real samples, by finite differences.
        after: images before the generator feels the critic.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    weight: float = 0.0
    critic: float = 1e-2
    loss: Kind = "softplus"
    features: Literal["fake", "teacher"] = "fake"
    weighting: Literal["uniform", "edm"] = "uniform"
    r1: float = 0.0
    after: int = 0

    def __post_init__(self) -> None:
        for name in ("weight", "critic", "r1"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: must be finite and not negative, got {getattr(self, name)}")
        if self.after < 0:
            raise ValueError(f"after: must not be negative, got {self.after}")


class Critic(nn.Module):
    """Logits (B,) from features (B, width). It starts at 0: real and generated are equally likely."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(width, width), nn.Linear(width, 1)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.outer(functional.silu(self.inner(features)))
        return logits.squeeze(1)


def critic_on(denoiser: Denoiser) -> Critic:
    """A fresh critic on the features of `denoiser`.

    Raises:
        ValueError: if it has none.
    """
    if not isinstance(denoiser, Networked) or not hasattr(denoiser.network, "trace"):
        raise ValueError(
            "template: a critic reads the features of one of Limbeck's networks; set template.network, and "
            "adversarial.features = fake for a teacher that has none"
        )
    return Critic(cast(Any, denoiser.network).feature_width)


def traced(denoiser: Denoiser, x: Tensor, sigma: Tensor, cond: Tensor | None) -> tuple[Tensor, Tensor]:
    """The clean estimate and the features of a denoiser that a critic reads."""
    assert isinstance(denoiser, Networked)
    return denoiser.trace(x, sigma, cond)


def critic_loss(on_real: Tensor, on_fake: Tensor, kind: Kind) -> Tensor:
    """The critic's loss per pair of a real and a generated sample (B,)."""
    if kind == "hinge":
        return functional.relu(1 - on_real) + functional.relu(1 + on_fake)
    both = functional.softplus(-on_real) + functional.softplus(on_fake)
    return both / 2 if kind == "bce" else both


def generator_loss(on_fake: Tensor, kind: Kind) -> Tensor:
    """The generator's adversarial loss per sample (B,): softplus(-logit), not saturating; -logit with hinge."""
    return -on_fake if kind == "hinge" else functional.softplus(-on_fake)


def nudged(x: Tensor, sigma: Tensor, direction: Tensor, sigma_data: float) -> Tensor:
    """x moved by R1_STEP of its own scale along `direction` ~ N(0, I), the second point of `r1_penalty`."""
    return x + R1_STEP * (expand(sigma, x) ** 2 + sigma_data**2).sqrt() * direction


def r1_penalty(logits: Tensor, nudged_logits: Tensor) -> Tensor:
    """|gradient of the logit|^2 (B,) in the mean over the direction of the nudge, to first order in R1_STEP.

    The gradient is in the network's input, where every coordinate has unit variance. Finite differences, because the
    double backward of fused attention is not implemented everywhere (R1: Mescheder et al. 2018, arXiv:1801.04406).
    """
    return ((nudged_logits - logits) / R1_STEP) ** 2


class RatioScale(State):
    """Brings a critic's ratio down to E_fake[r] = 1 at every noise level, as the true ratio has it.

    The mean of exp(logit) over fake samples is kept per bin of the time law's u, as a moving average over turns. A mean
    below 1 is left, unless `raised`: samples that have strayed from the data have a small ratio in truth, and one
    brought up to 1 would tell them that they are where they should be.

    Args:
        bins: equal intervals of u.
        decay: weight of the old mean.
        limit: bound on |logit|; how often it binds is counted in `clipped`.
        raised: bring a mean below 1 up to 1.
    """

    mean: Tensor
    total: Tensor
    count: Tensor
    clipped: Tensor

    def __init__(self, bins: int = 10, decay: float = 0.9, limit: float = 10.0, raised: bool = False) -> None:
        super().__init__()
        self.decay, self.limit, self.raised = decay, limit, raised
        self.register_buffer("mean", torch.ones(bins, dtype=torch.float64))
        self.register_buffer("total", torch.zeros(bins, dtype=torch.float64))
        self.register_buffer("count", torch.zeros(bins, dtype=torch.float64))
        self.register_buffer("clipped", torch.zeros((), dtype=torch.float64))

    def ratio(self, logits: Tensor, u: Tensor) -> Tensor:
        """r (B,) with the graph of `logits` (B,), and the batch's share in the next mean."""
        bins = (u.double() * len(self.mean)).long()
        bounded = logits.clamp(-self.limit, self.limit)
        with torch.no_grad():
            self.clipped += (logits.abs() > self.limit).sum()
            self.total.index_add_(0, bins, bounded.double().exp())
            self.count.index_add_(0, bins, torch.ones_like(bins, dtype=torch.float64))
        mean = self.mean[bins] if self.raised else self.mean[bins].clamp(min=1)
        return (bounded - mean.log().to(logits.dtype)).exp()

    def commit(self) -> None:
        seen = self.count > 0
        fresh = torch.where(seen, self.total / self.count.clamp(min=1), self.mean)
        self.mean.copy_(torch.where(seen, self.decay * self.mean + (1 - self.decay) * fresh, self.mean))
        self.total.zero_()
        self.count.zero_()

    def told(self) -> dict[str, Tensor]:
        """How many logits were clipped so far."""
        return {"clipped_logits": self.clipped.clone()}
