r"""Uni-Instruct (Wang et al. 2025, arXiv:2505.20755): minimise an f-divergence through its expansion over noise levels.

With h(r) = r^2 f''(r), r = q_sigma / p_sigma and delta = s_p - s_q, one level of the expansion is E_p[h(r) |delta|^2]
(`divergence`). Its gradient, with both scores and the critic's weights frozen, splits exactly into three terms, here in
denoisers (times sigma^4):

    2 h(r) (D_real - D_fake) . (D_fake - x)            gradient through x_sigma, also inside h(r(x_sigma))
    [h - r h'] |D_fake - D_real|^2                     bracket constant: the path term
    [r^2 h'' |D_fake - D_real|^2 (D_fake - D_real) / sigma^2] . x      bracket constant

The reverse KL needs no ratio: its three coefficients are 2, 1 and 0, which is twice SiD at alpha = 1/2. The released
code keeps the first term only, with h detached and a ratio that is 1 to three digits or more.
This module holds the loss; the ratio comes from the caller: exactly, from two exact laws, or from a critic.
"""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.denoiser import expand
from limbeck.divergence import DIVERGENCES
from limbeck.losses import per_sample


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
