r"""VarDiU (Wang, Zhang, Ou & Barber 2025, arXiv:2508.20646): one upper bound in the place of a fake score.

For any posterior q(z | x_sigma) of the generator's latent, because E KL(p_G(z | x_sigma) || q) >= 0,

    int w(sigma) KL(p_sigma || q_sigma) dsigma <= U + const,
    U = E[w(sigma) (-log q(z | x_sigma) - log p_d(x_sigma))],      x_sigma = G(z) + sigma eps,

with p_d the teacher's noised law and const free of generator and posterior. Both descend U together. log p_d enters by
its gradient, the teacher's score (D - x_sigma) / sigma^2, a constant; log q by its graph to x_sigma. The posterior that
is exact makes the bound tight: grad log p_sigma(x_sigma) = -eps / sigma - grad log p_G(z | x_sigma) for every z.

=====================  ==========================================  ==================================================
switch                 default                                     what else
=====================  ==========================================  ==================================================
``weight``             1: w = sigma / sigma_max. On `ring8`, in    2, which the code names, 0, 4
                       10,000 steps, it finds all modes; 2 finds
                       none, 0 half of them
``as_released``        off: w multiplies each sample's term        the code multiplies (B, 1) by (B), so that the mean
                                                                   of w multiplies the mean of the terms: w becomes
                                                                   its own mean over the law, which is what `on` does
``control_variate``    on: (D - x) / sigma^2, the score plus       off: the score. The code: on with a learned
                       eps / sigma, of mean zero                   teacher, off with an exact one
``antithetic``         on: each z with eps and -eps, which cancel  off. The code repeats half a batch of latents; here a
                       that control variate; one generator call    batch counts latents
``posterior``          ``diagonal``                                ``full``, and ``flow``, a conditional spline flow
                                                                   of z. The code's flow is no density in z: z goes
                                                                   through a plain network first
``anneal``             power rises linearly over 1.25 M images     the code: steps of 0.01 every 1,000 iterations, from
                                                                   0.1 to 2.0
posterior's std        softplus(r) sigma / sigma_data: softplus    the code: softplus(r) sigma
                       is of order 1 at small noise
baseline's fake score  preconditioned as EDM's, and its weight     the code: predicts x from raw inputs, with the weight
                                                                   of EDM for a sigma_data of 10
learned teacher        EDM's preconditioning, weight and           the code: predicts x from raw inputs, levels uniform
                       log-normal levels, Adam at 1e-3 with a      from 0.1 to 40, the weight of EDM for a sigma_data
                       cosine, a moving average                    of 10, Adam at 5e-5, no average
flow                   rational-quadratic splines, coordinates     the code: LU permutations between splines
                       reversed between them
``raw_inputs``         off: the posterior reads x at unit          on: x and sigma as they are, as the code, which
                       variance and ln(sigma) / 4, as EDM's        appends sigma twice. On `mog40`, of scale 23, it
                       networks                                    finds the modes' shares better: -6.1 against -5.0
                                                                   (log MMD^2, 200,000 steps, one seed)
network inputs         scaled by the noise level, as EDM's         the code: raw values, for a learned teacher and the
                                                                   baseline's fake score too
=====================  ==========================================  ==================================================
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, get_args

import torch
from torch import Tensor, nn

from limbeck import posterior as posteriors
from limbeck.denoiser import Denoiser, expand
from limbeck.generator import Generator, OneStep
from limbeck.losses import per_sample
from limbeck.noise import Power
from limbeck.objective import Batch, Turn, perturb
from limbeck.optimizer import Optimizer

EXPONENTS = (0, 1, 2, 4)


def vardiu_bound(
    x: Tensor,
    noisy: Tensor,
    sigma: Tensor,
    log_q: Tensor,
    real: Tensor,
    weight: Tensor | float = 1.0,
    control_variate: bool = True,
) -> Tensor:
    """weight * (-log q(z | x_sigma) - log p_d(x_sigma)) per sample, with log p_d known up to its gradient: (B,).

    The gradient is that of the bound; the value is weight * -log q alone.

    Args:
        x: generator samples (B, ...).
        noisy: x + sigma eps, through which `log_q` depends on x.
        sigma: (B,).
        log_q: log q(z | noisy), (B,), with its graph to posterior and noisy.
        real: the teacher's clean estimate at `noisy`; a constant here.
        weight: (B,) or a number.
        control_variate: add eps / sigma, of mean zero, to the teacher's score.
    """
    score = ((real - (x if control_variate else noisy)) / expand(sigma, x) ** 2).detach()
    return -weight * (log_q + per_sample(score * (x - x.detach())))


def mean_weight(law: Power, exponent: int) -> float:
    """The mean of (sigma / sigma_max)^exponent over the law, by the binomial expansion of its quantile."""
    low, span = law.sigma_min, law.sigma_max - law.sigma_min
    terms = (
        math.comb(exponent, j) * low ** (exponent - j) * span**j / (law.power * j + 1) for j in range(exponent + 1)
    )
    return sum(terms) / law.sigma_max**exponent


@dataclass(frozen=True)
class VarDiU:
    """Hyper-parameters of VarDiU. Noise levels are in units of sigma_data / 0.5.

    Attributes:
        weight: exponent of the weight's noise level: 0, 1, 2 or 4.
        as_released: the public code's constant weight.
        control_variate: (D - x) / sigma^2 in the place of the teacher's score, equal to it in the mean.
        antithetic: each latent with both signs of its noise.
        posterior: diagonal, full or flow; full and flow read points.
        raw_inputs: the posterior reads samples and levels as they are.
        sigma_init: level at which the generator calls its network.
        levels: law of the noise after annealing.
        first_power: the law's power at the start: below 1 most draws are near sigma_max.
        anneal: generator images until the power is that of `levels`; 0 = from the start.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}
    product: ClassVar[str] = "generator"
    needs_real: ClassVar[bool] = False
    steps: ClassVar[int] = 10_000  # two to three minutes on ring8, a little longer than the others

    weight: int = 1
    as_released: bool = False
    control_variate: bool = True
    antithetic: bool = True
    posterior: posteriors.Kind = "diagonal"
    raw_inputs: bool = False
    sigma_init: float = 2.5
    levels: Power = field(default_factory=lambda: Power(0.002, 0.5, 2.0))
    first_power: float = 0.1
    anneal: int = 1_250_000

    def __post_init__(self) -> None:
        if self.weight not in EXPONENTS:
            raise ValueError(f"weight: must be 0, 1, 2 or 4, got {self.weight}")
        if self.posterior not in get_args(posteriors.Kind):
            raise ValueError(f"posterior: must be diagonal, full or flow, got {self.posterior!r}")
        if not 0 < self.first_power < math.inf:
            raise ValueError(f"first_power: must be positive, got {self.first_power:g}")
        if self.anneal < 0:
            raise ValueError(f"anneal: must not be negative, got {self.anneal}")

    def players(self, template: Denoiser, generator: Generator | None = None) -> dict[str, nn.Module]:
        """The generator, one call at sigma_init, on a copy of the template; and a fresh posterior of its latents."""
        if generator is None:
            generator = OneStep(copy.deepcopy(template), self.sigma_init * template.unit)
        elif generator.shape != template.shape:
            raise ValueError(f"generator: makes samples of shape {generator.shape}, the teacher's are {template.shape}")
        posterior = posteriors.build(self.posterior, template, generator, self.raw_inputs)
        return {"generator": generator, "posterior": posterior}

    def optimizers(self) -> dict[str, Optimizer]:
        return {
            "generator": Optimizer("adam", lr=5e-4, betas=(0.9, 0.99), schedule="cosine"),
            "posterior": Optimizer("adam", lr=1e-3, betas=(0.9, 0.99), schedule="cosine"),
        }

    def turns(self, step: int, images: int) -> Iterable[Turn]:
        yield Turn(("generator", "posterior"), partial(self.loss, self.law(images)))

    def law(self, images: int) -> Power:
        """The law of the noise after `images` generator images."""
        done = min(1.0, images / self.anneal) if self.anneal else 1.0
        power = self.first_power + done * (self.levels.power - self.first_power)
        return dataclasses.replace(self.levels, power=power)

    def loss(self, law: Power, nets: nn.ModuleDict, teacher: Denoiser, batch: Batch) -> Tensor:
        """The bound per latent (B,), the mean over both signs of its noise if antithetic."""
        z, cond, eps = batch.z, batch.cond, batch.eps
        x = nets["generator"](z, cond)
        sigma = law.scaled(teacher.unit).quantile(batch.u)
        if self.antithetic:
            x, z, sigma, eps = torch.cat([x, x]), torch.cat([z, z]), sigma.repeat(2), torch.cat([eps, -eps])
            cond = None if cond is None else cond.repeat(2, 1)
        noisy = perturb(x, sigma, eps)
        with torch.no_grad():
            real = teacher(noisy, sigma, cond)
        weight: Tensor | float = (sigma / (law.sigma_max * teacher.unit)) ** self.weight
        if self.as_released:
            weight = mean_weight(law, self.weight)
        log_q = nets["posterior"](z, noisy, sigma, cond)
        bound = vardiu_bound(x, noisy, sigma, log_q, real, weight, self.control_variate)
        return bound.reshape(-1, len(batch.z)).mean(0)
