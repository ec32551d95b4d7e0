"""f-divergences of noised laws, as far as score methods need them.

With r = q_sigma / p_sigma (teacher over student) and D_f = E_p f(r), everything depends on h(r) = r^2 f''(r):

    D_f(q_a || p_a) - D_f(q_b || p_b) = int_a^b 1/2 E_p[h(r) |s_p - s_q|^2] d(sigma^2),

the expansion behind Uni-Instruct (Wang et al. 2025, arXiv:2505.20755), and grad D_f(q_sigma || p_sigma) =
E_p[h(r) (s_p - s_q) dx], the weight of f-distill (Xu et al. 2025, arXiv:2502.15681).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Divergence:
    """One f with f(1) = 0, and h(r) = r^2 f''(r) with the two derivatives that the exact gradient takes.

    Attributes:
        title: its usual name.
        f: the generator, element-wise on r > 0.
        h: r^2 f''(r).
        h1: r h'(r).
        h2: r^2 h''(r).
    """

    title: str
    f: Callable[[Tensor], Tensor]
    h: Callable[[Tensor], Tensor]
    h1: Callable[[Tensor], Tensor]
    h2: Callable[[Tensor], Tensor]


def _zero(r: Tensor) -> Tensor:
    return torch.zeros_like(r)


DIVERGENCES: dict[str, Divergence] = {
    "reverse_kl": Divergence("reverse KL", lambda r: -r.log(), torch.ones_like, _zero, _zero),
    "forward_kl": Divergence("forward KL", lambda r: r * r.log(), lambda r: r, lambda r: r, _zero),
    "jeffreys": Divergence("Jeffreys", lambda r: (r - 1) * r.log(), lambda r: 1 + r, lambda r: r, _zero),
    "jensen_shannon": Divergence(
        "Jensen-Shannon",
        lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(),
        lambda r: r / (1 + r),
        lambda r: r / (1 + r) ** 2,
        lambda r: -2 * r**2 / (1 + r) ** 3,
    ),
    "hellinger": Divergence(
        "squared Hellinger",
        lambda r: (r.sqrt() - 1) ** 2,
        lambda r: r.sqrt() / 2,
        lambda r: r.sqrt() / 4,
        lambda r: -r.sqrt() / 8,
    ),
    "pearson": Divergence(
        "Pearson chi2", lambda r: (r - 1) ** 2, lambda r: 2 * r**2, lambda r: 4 * r**2, lambda r: 4 * r**2
    ),
    "neyman": Divergence("Neyman chi2", lambda r: (1 - r) ** 2 / r, lambda r: 2 / r, lambda r: -2 / r, lambda r: 4 / r),
    "softened_reverse_kl": Divergence(
        "softened reverse KL",
        lambda r: (1 + r) * ((1 + r) / r).log() - (1 + r) * math.log(2),
        lambda r: 1 / (1 + r),
        lambda r: -r / (1 + r) ** 2,
        lambda r: 2 * r**2 / (1 + r) ** 3,
    ),
}
