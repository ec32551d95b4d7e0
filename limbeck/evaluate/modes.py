"""Modes of an exact isotropic mixture: which of them the samples reach, and how often.

The expected squared radius of a standard d-dimensional normal inside a ball is that of a truncated chi-square law,
``E[r^2 | r <= w] = d P(d/2 + 1, w^2/2) / P(d/2, w^2/2)`` with the regularised lower incomplete gamma function P.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from limbeck.evaluate.rows import as_pair, squared_distances


@dataclass(frozen=True, eq=False)
class ModeStatistics:
    """What ``mode_statistics`` counts.

    recall: share of modes found. shares (K,): share of all samples in each mode. outside: share of all samples in none.
    spread: root-mean-square radius inside the modes over its exact value; 1 for the truth, below 1 when the samples are
    too concentrated, nan when all of them lie outside.
    """

    recall: float
    shares: Tensor
    outside: float
    spread: float


def mode_statistics(
    samples: Tensor, means: Tensor, stds: Tensor | float, within: float = 3.0, weights: Tensor | None = None
) -> ModeStatistics:
    """Assign samples (N, d) to the modes N(means_k, stds_k^2 I) of a mixture; means (K, d), stds (K,) or one float.

    A sample belongs to the mode with the smallest |x - mean| / std if that is at most ``within``, else to none. A mode
    is found if its share of the samples reaches half its weight (default 1/K, i.e. a share of 1/(2K)).

    ``within`` is a radius in standard deviations: a perfect sampler leaves 1% outside in 2-D at 3, but nearly all of it
    from d = 20 on; there take about sqrt(d) + 2. Blind to the shape within a mode except its radius, and unreliable
    where modes overlap. Chance alone loses modes when N is not well above 10 K.
    """
    samples, means = as_pair("samples", samples, "means", means)
    modes, dim = means.shape
    scales = torch.as_tensor(stds, dtype=torch.float64, device=means.device).expand(modes)
    if not bool(((scales > 0) & torch.isfinite(scales)).all()):
        raise ValueError(f"stds must be positive and finite, got {scales.tolist()}")
    if not within > 0:
        raise ValueError(f"within must be positive, got {within}")
    law = torch.full_like(scales, 1 / modes) if weights is None else weights.to(scales)
    if law.shape != (modes,) or bool((law < 0).any()) or not abs(float(law.sum()) - 1) < 1e-6:
        raise ValueError(f"weights must hold {modes} non-negative numbers that sum to 1, got {law.tolist()}")
    nearest = [(block / scales.square()).min(1) for _, block in squared_distances(samples, means)]
    squared_radius = torch.cat([part.values for part in nearest])
    mode = torch.cat([part.indices for part in nearest])
    inside = squared_radius <= within**2
    shares = mode[inside].bincount(minlength=modes).double() / len(samples)
    half = torch.tensor([dim / 2, dim / 2 + 1], dtype=torch.float64)
    mass, moment = torch.special.gammainc(half, torch.full_like(half, within**2 / 2)).tolist()
    return ModeStatistics(
        recall=float((shares >= law / 2).double().mean()),
        shares=shares,
        outside=1 - int(inside.sum()) / len(samples),
        spread=float((squared_radius[inside].mean() / (dim * moment / mass)).sqrt()),
    )
