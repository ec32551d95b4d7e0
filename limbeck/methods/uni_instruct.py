r"""Uni-Instruct (Wang et al. 2025, arXiv:2505.20755): minimise an f-divergence through its expansion over noise levels.

With h(r) = r^2 f''(r), r = q_sigma / p_sigma and delta = s_p - s_q, one level of the expansion is E_p[h(r) |delta|^2]
(`divergence`). Its gradient, with both scores and the critic's weights frozen, splits exactly into three terms, here in
denoisers (times sigma^4):

    2 h(r) (D_real - D_fake) . (D_fake - x)            gradient through x_sigma, also inside h(r(x_sigma))
    [h - r h'] |D_fake - D_real|^2                     bracket constant: the path term
    [r^2 h'' |D_fake - D_real|^2 (D_fake - D_real) / sigma^2] . x_sigma      bracket constant

The reverse KL needs no ratio: its three coefficients are 2, 1 and 0, which is twice SiD at alpha = 1/2. The released
code keeps the first term only, with h detached and a ratio that on images is 1 to three digits: SiD at alpha = 1.

=====================  ==========================================  ==================================================
switch                 default                                     what else
=====================  ==========================================  ==================================================
``divergence``         ``jensen_shannon``                          any of the table; all but ``reverse_kl`` need the
                                                                   critic, which reads real samples
ratio                  exp(logit) with its graph to x_sigma,       ``as_released``: the code's L / (L - 1), constant,
                       at most E_fake[r] = 1 in bins of u          of the adversarial loss L = w d softplus(-logit), in
                                                                   the hundreds; here per sample, there of a micro-batch
``ratio_raised``       off: a mean ratio below 1 is left           on: brought up to 1, as the true ratio's is; where
                                                                   all samples have strayed, the student then flees
``pull_limit``         |D_fake - D_real|^2 / sigma^2 in the third  inf: the exact gradient, which flees from the data
                       term counts up to 1                         where a critic lags
``normalizer``         ``l1``: 1 / mean |x - D_real|, constant     ``none``
``game.adversarial``   the ratio alone, weight 0                   the code adds the generator's adversarial loss with
                                                                   the normaliser, as ``sida``; weights are relative to
                                                                   2 h times what it calls the score term
Jeffreys               the sum of both KL divergences, also with   the code: 0.4 forward and 0.6 reverse
                       ``as_released``
gate                   the critic counts after 100,000 images;     ``game.adversarial.after``; the code: 200,000
                       before, h(1) times the reverse KL
``levels``             log-normal, as the fake score's (see        SiD's law: ``levels = {stop = 0.8}``
                       ``sid``)
=====================  ==========================================  ==================================================

The third term is cubic in the gap of the scores, and for Jensen-Shannon and Hellinger it repels. In the exact gradient
the ratio, which vanishes where the gap is wide, keeps it small; a learned ratio that lags does not, and samples that it
drives away make the gap wider. With |D_fake - D_real|^2 / sigma^2 at most 1 its pull along x_sigma is at most a quarter
of the first term's at equal r (r / (1 + r)^2 of it for Jensen-Shannon), and cannot outweigh it. The log counts the
samples for which this differs from the exact gradient (`pull/limited`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from limbeck.critic import Adversarial, RatioScale
from limbeck.denoiser import Denoiser, expand
from limbeck.divergence import DIVERGENCES
from limbeck.game import Game, check_ratio
from limbeck.generator import Generator
from limbeck.losses import l1_scale, per_sample
from limbeck.noise import Law, LogNormal
from limbeck.objective import Batch, Count, Turn
from limbeck.optimizer import Optimizer

RELEASED = ("forward_kl", "jeffreys")  # of the public code's branches, those that use the ratio and run


def uni_instruct_loss(
    x: Tensor,
    noisy: Tensor,
    sigma: Tensor,
    fake: Tensor,
    real: Tensor,
    ratio: Tensor | None,
    divergence: str,
    pull_limit: float = math.inf,
) -> Tensor:
    """The three terms, summed over coordinates, unweighted: (B,). Its gradient is that of E_p[h(r) |fake - real|^2].

    Args:
        x: generator samples (B, ...).
        noisy: x + sigma eps, through which `fake`, `real` and `ratio` depend on x.
        sigma: (B,).
        fake, real: clean estimates at `noisy`, with their graphs to it.
        ratio: r at `noisy`, teacher over student, (B,), with its graph to it; None for the reverse KL only.
        divergence: a key of `divergence.DIVERGENCES`.
        pull_limit: largest |fake - real|^2 / sigma^2 in the third term.

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
    steepness = (squares / sigma**2).clamp(max=pull_limit)
    pull = expand((d.h2(ratio) * steepness).detach(), gap) * gap.detach()
    return score_term + path_term + per_sample(pull * noisy)


def released_ratio(logits: Tensor, scale: Tensor) -> Tensor:
    """The public code's "density ratio" L / (L - 1), L = scale * softplus(-logit): (B,), constant."""
    loss = scale * functional.softplus(-logits.detach())
    return loss / (loss - 1)


@dataclass(frozen=True)
class UniInstruct:
    """Hyper-parameters of Uni-Instruct. Noise levels are in units of sigma_data / 0.5.

    Attributes:
        divergence: a key of `divergence.DIVERGENCES`.
        as_released: the public code's form: the first term only, its ratio and h constant (`forward_kl`, `jeffreys`).
        levels: law of the noise in the generator's turn.
        pull_limit: largest |D_fake - D_real|^2 / sigma^2 in the third term; inf = exact.
        normalizer: l1, or none.
        ratio_bins: bins of u in which the ratio is brought down to mean 1.
        ratio_raised: a mean below 1 is brought up to 1 too.
        game: what methods with a fake score share; its critic gives the ratio. reverse_kl needs none: with an
            adversarial weight of 0 it has none, and no real samples are read.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}
    product: ClassVar[str] = "generator"
    warm_start: ClassVar[bool] = True
    steps: ClassVar[int] = 3500  # two minutes on ring8, as the others

    divergence: str = "jensen_shannon"
    as_released: bool = False
    levels: Law = field(default_factory=LogNormal)
    pull_limit: float = 1.0
    normalizer: Literal["l1", "none"] = "l1"
    ratio_bins: int = 10
    ratio_raised: bool = False
    game: Game = field(default_factory=lambda: Game(adversarial=Adversarial(after=100_000)))

    def __post_init__(self) -> None:
        if self.divergence not in DIVERGENCES:
            raise ValueError(f"divergence: unknown {self.divergence!r}, expected one of {', '.join(DIVERGENCES)}")
        if self.as_released and self.divergence not in RELEASED:
            raise ValueError(f"as_released: the public code runs for {' and '.join(RELEASED)}, not {self.divergence}")
        if not self.pull_limit >= 0:
            raise ValueError(f"pull_limit: must not be negative, got {self.pull_limit}")
        if not 1 <= self.ratio_bins <= 1000:
            raise ValueError(f"ratio_bins: must be 1 to 1,000, got {self.ratio_bins}")
        if self.game.adversarial is None and self.divergence != "reverse_kl":
            raise ValueError(
                f"divergence: {self.divergence} needs the density ratio of a critic, and game.adversarial is missing; "
                "reverse_kl does without"
            )
        check_ratio(self.game, self.divergence)

    @property
    def _game(self) -> Game:
        """The game without a critic that nobody would read."""
        a = self.game.adversarial
        idle = self.divergence == "reverse_kl" and a is not None and a.weight == 0
        return replace(self.game, adversarial=None) if idle else self.game

    @property
    def needs_real(self) -> bool:
        return self._game.adversarial is not None

    def players(self, template: Denoiser, generator: Generator | None = None) -> dict[str, nn.Module]:
        """The players of the game and, with a critic, its ratio's running mean and the count of limited pulls."""
        made = self._game.players(template, generator)
        ratio = {"ratio": RatioScale(self.ratio_bins, raised=self.ratio_raised), "pull": Count("limited")}
        return made | (ratio if self.needs_real else {})

    def optimizers(self) -> dict[str, Optimizer]:
        # its path term, unlike SiD's at alpha = 1, feels every lag of the fake score
        return self._game.optimizers(generator=1.5e-4, fake=2e-3)

    def turns(self, step: int, images: int) -> Iterable[Turn]:
        return self._game.turns(self.loss, step, images)

    def loss(
        self, nets: nn.ModuleDict, teacher: Denoiser, batch: Batch, call: int | None = None, judged: bool = True
    ) -> Tensor:
        """The normalised sum of the three terms and the adversarial loss, per sample (B,)."""
        view = self._game.view(nets, teacher, batch, self.levels, call, judged)
        x, fake, real = view.x, view.fake, view.real
        weight = (
            l1_scale(x / teacher.unit, real / teacher.unit) if self.normalizer == "l1" else torch.ones_like(batch.u)
        )
        one, h = torch.ones_like(view.sigma), DIVERGENCES[self.divergence].h
        if self.as_released:
            ratio = one if view.logits is None else released_ratio(view.logits, weight * x[0].numel())
            terms = -2 * h(ratio) * per_sample((fake - real) * (fake - x))
        elif view.logits is None:
            # no ratio yet: with h constant the gradient is the reverse KL's. The coefficients at r = 1 would not do:
            # their third term repels the student from the data unless r falls as the scores say
            terms = h(one) * uni_instruct_loss(x, view.noisy, view.sigma, fake, real, None, "reverse_kl")
        else:
            ratio = cast(RatioScale, nets["ratio"]).ratio(view.logits, batch.u)
            terms = uni_instruct_loss(x, view.noisy, view.sigma, fake, real, ratio, self.divergence, self.pull_limit)
            steep = per_sample((fake - real).detach() ** 2) > self.pull_limit * view.sigma**2
            pulled = DIVERGENCES[self.divergence].h2(ratio.detach()) != 0
            cast(Count, nets["pull"]).add(steep & pulled)
        return weight * (terms / teacher.unit**2 + self._game.adversarial_loss(view))

    def health(self, nets: nn.ModuleDict, teacher: Denoiser, batch: Batch) -> dict[str, Tensor]:
        return self._game.health(nets, teacher, batch, self.levels)
