"""Critics: log odds of data against generator samples at a noise level, from the features of a denoiser.

A perfect critic's logit is log q_sigma(x) / p_sigma(x), data over student: exp(logit) is the density ratio that methods
on f-divergences need, and softplus(-logit) the generator's adversarial loss (Goodfellow et al. 2014, arXiv:1406.2661).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from limbeck.denoiser import Denoiser, EpsPreconditioned, Preconditioned
from limbeck.objective import State

Game = Literal["softplus", "hinge"]


class Critic(Denoiser):
    """A denoiser with a head: `forward` is the clean estimate, `both` adds logits (B,) from the same pass.

    The fake score of adversarial methods is one, as in SiDA (arXiv:2410.14919) and DMD2 (arXiv:2405.14867): its
    features already know the noise level and the samples.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        if not isinstance(denoiser, Preconditioned | EpsPreconditioned) or not hasattr(denoiser.network, "trace"):
            raise ValueError("template: a critic reads the features of one of Limbeck's networks; set template.network")
        super().__init__(denoiser.shape, denoiser.classes, denoiser.sigma_data, denoiser.sigma_min, denoiser.sigma_max)
        self.denoiser = denoiser
        width: Any = denoiser.network.feature_width
        self.head = nn.Linear(width, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
        estimate: Tensor = self.denoiser(x, sigma, cond)
        return estimate

    def both(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The clean estimate (B, *shape) and the logits (B,)."""
        assert isinstance(self.denoiser, Preconditioned | EpsPreconditioned)
        estimate, features = self.denoiser.trace(x, sigma, cond)
        return estimate, self.head(features).squeeze(1)


def critic_loss(on_real: Tensor, on_fake: Tensor, game: Game) -> Tensor:
    """The critic's loss per pair (B,): mean of softplus(-real) and softplus(fake), or of their hinges.

    softplus is binary cross-entropy with logits.
    """
    if game == "hinge":
        return (functional.relu(1 - on_real) + functional.relu(1 + on_fake)) / 2
    return (functional.softplus(-on_real) + functional.softplus(on_fake)) / 2


def generator_loss(on_fake: Tensor, game: Game) -> Tensor:
    """The generator's adversarial loss per sample (B,): softplus(-logit), not saturating; -logit with hinge."""
    return -on_fake if game == "hinge" else functional.softplus(-on_fake)


class RatioScale(State):
    """Brings a critic's ratio to E_fake[r] = 1 at every noise level, as the true ratio has it.

    The mean of exp(logit) over fake samples is kept per bin of the time law's u, as a moving average over turns.

    Args:
        bins: equal intervals of u.
        decay: weight of the old mean.
        limit: bound on |logit| and on log r; how often it binds is counted.
    """

    mean: Tensor
    total: Tensor
    count: Tensor
    clipped: Tensor

    def __init__(self, bins: int = 10, decay: float = 0.9, limit: float = 10.0) -> None:
        super().__init__()
        self.decay, self.limit = decay, limit
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
        return (bounded - self.mean[bins].log().to(logits.dtype)).exp()

    def commit(self) -> None:
        seen = self.count > 0
        fresh = torch.where(seen, self.total / self.count.clamp(min=1), self.mean)
        self.mean.copy_(torch.where(seen, self.decay * self.mean + (1 - self.decay) * fresh, self.mean))
        self.total.zero_()
        self.count.zero_()
