r"""Sliced Wasserstein distance.

.. math:: SW_2^2 = E_\theta\, W_2^2(\langle\theta, x\rangle, \langle\theta, y\rangle),
    \qquad W_2^2(p, q) = \int_0^1 (F_p^{-1}(u) - F_q^{-1}(u))^2 du

over directions theta uniform on the sphere (Rabin et al. 2011; Bonneel et al. 2015). The quantile functions of samples
are steps, so the integral is a finite sum, exact also for unequal numbers of samples.
"""

import torch
from torch import Tensor

from limbeck.evaluate.rows import BLOCK, as_pair


def directions(dim: int, count: int, seed: int) -> Tensor:
    """``count`` unit vectors (count, dim), float64, uniform on the sphere."""
    if dim < 1 or count < 1:
        raise ValueError(f"dim and count must be at least 1, got {dim} and {count}")
    normal = torch.randn(count, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return normal / normal.norm(dim=1, keepdim=True)


def sliced_wasserstein(x: Tensor, y: Tensor, projections: int = 256, seed: int = 0) -> float:
    """Sliced 2-Wasserstein distance of samples x (N, d) and y (M, d), in units of the data.

    The root of the mean over ``projections`` random directions of the squared one-dimensional W_2; exact for d = 1. Two
    sets from one law give a floor of order N^(-1/2), and the distance shrinks with dimension (a shift by v scores
    |v| / sqrt(d)), so values compare only within one d and N.

    Blind in high dimension to what sets few directions apart, and weak on fine structure: it is led by mean, scale and
    outliers. Does not see memorisation.
    """
    x, y = as_pair("x", x, "y", y)
    axes = directions(x.shape[1], projections, seed).to(x.device)
    n, m = len(x), len(y)
    # Both quantile functions are constant between the breakpoints {i/n} and {j/m}, kept as integers over n m.
    breaks = torch.cat([torch.arange(n + 1) * m, torch.arange(m + 1) * n]).unique().to(x.device)
    left, width = breaks[:-1], breaks.diff().double() / (n * m)
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for part in axes.split(max(1, 4 * BLOCK // (n + m))):
        x_sorted, y_sorted = (part @ x.T).sort(1).values, (part @ y.T).sort(1).values
        total += ((x_sorted[:, left // m] - y_sorted[:, left // n]).square() @ width).sum()
    return float((total / projections).sqrt())
