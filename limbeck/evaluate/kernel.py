r"""Kernel two-sample distances: KID and the Gaussian-mixture MMD.

.. math:: MMD^2 = E\,k(x, x') + E\,k(y, y') - 2\,E\,k(x, y)

(Gretton et al. 2012). The unbiased estimate leaves out the diagonal of k(x, x'), so it scatters around zero for equal
laws; the biased V-statistic keeps it, is never negative, and has a floor of order 1/N.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from limbeck.evaluate.rows import BLOCK, as_pair, squared_distances


class Estimate(NamedTuple):
    """A mean over repetitions and the standard deviation of one repetition (not of the mean)."""

    mean: float
    std: float


def kid(features_a: Tensor, features_b: Tensor, subsets: int = 100, subset_size: int = 1000, seed: int = 0) -> Estimate:
    """Kernel inception distance of features (N, d) and (M, d): mean and std of the unbiased MMD^2 over random subsets.

    Binkowski et al. 2018 (arXiv 1801.01401), kernel ``(<x, y>/d + 1)^3``; each subset draws ``subset_size`` rows of
    either set without replacement. Unbiased, therefore comparable between different N, and negative half of the time
    for equal laws. The std belongs to one subset; subsets overlap, so it is no confidence interval (``bootstrap``).

    Blind to differences beyond the third moments of the features and to memorisation; not invariant to the scale of
    the features, so values compare only within one feature network. Raises ValueError if a set is smaller than a
    subset.
    """
    a, b = as_pair("features_a", features_a, "features_b", features_b, least=2)
    if subsets < 1:
        raise ValueError(f"subsets must be at least 1, got {subsets}")
    if not 2 <= subset_size <= min(len(a), len(b)):
        raise ValueError(
            f"subset_size must be between 2 and {min(len(a), len(b))} (the smaller set), got {subset_size}"
        )
    generator = torch.Generator().manual_seed(seed)
    values = torch.empty(subsets, dtype=torch.float64)
    for i in range(subsets):
        rows_a = torch.randperm(len(a), generator=generator)[:subset_size].to(a.device)
        rows_b = torch.randperm(len(b), generator=generator)[:subset_size].to(b.device)
        values[i] = polynomial_mmd2_unbiased(a[rows_a], b[rows_b])
    return Estimate(float(values.mean()), float(values.std(correction=0)))


def polynomial_mmd2_unbiased(a: Tensor, b: Tensor) -> float:
    """Unbiased MMD^2 (a U-statistic) of a (N, d) and b (M, d) with the kernel ``(<x, y>/d + 1)^3``; N, M >= 2.

    Blind to differences beyond the third moments and to memorisation.
    """
    a, b = as_pair("a", a, "b", b, least=2)
    n, m = len(a), len(b)
    within_a = (_cubic_sum(a, a) - _cubic_diagonal(a)) / (n * (n - 1))
    within_b = (_cubic_sum(b, b) - _cubic_diagonal(b)) / (m * (m - 1))
    return within_a + within_b - 2 * _cubic_sum(a, b) / (n * m)


def mmd2(x: Tensor, y: Tensor, scale: float = 1.0) -> float:
    """Biased MMD^2 (the V-statistic) of samples x (N, d) and y (M, d), in units of ``scale``.

    The kernel is the mean over h in {1/4, 1/2, 1, 2, 4} of ``exp(-|x - y|^2 / (2 h^2))``, applied to x/scale and
    y/scale: the measure used for 2-D toys by VarDiU (arXiv 2508.20646), whose tables print the log of this value and
    call it MMD. Never negative; two sets of N samples from one law give about 2 (1 - E k)/N, not zero, so a number is
    only readable beside that floor. Time O((N + M)^2 d), memory O(N + M): 10k against 10k takes seconds on one core.

    Blind to structure much finer than scale/4 and to how far away a sample lies once it is beyond about 10 scale (all
    such pairs have kernel zero), in high dimension to almost everything for the same reason, and to memorisation.
    A few dropped modes of many move it little: read mode recall beside it.
    """
    x, y = as_pair("x", x, "y", y)
    if not 0 < scale < float("inf"):
        raise ValueError(f"scale must be positive and finite, got {scale}")
    x, y = x / scale, y / scale
    n, m = len(x), len(y)
    return _gaussian_sum(x, x) / n**2 + _gaussian_sum(y, y) / m**2 - 2 * _gaussian_sum(x, y) / (n * m)


def _gaussian_sum(x: Tensor, y: Tensor) -> float:
    # With q = exp(-d^2/32), the kernel of h = 4, those of h = 2, 1, 1/2, 1/4 are q^4, q^16, q^64, q^256: one
    # exponential and eight squarings instead of five exponentials. The relative error grows to 256 roundings, 6e-14.
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for _, block in squared_distances(x, y):
        power = block.mul_(-1 / 32).exp_()
        total += power.sum()
        for _ in range(4):
            total += power.square_().square_().sum()
    return float(total) / 5


def _cubic_sum(a: Tensor, b: Tensor) -> float:
    total = torch.zeros((), dtype=torch.float64, device=a.device)
    for part in a.split(max(1, BLOCK // len(b))):
        gram = (part @ b.T).div_(a.shape[1]).add_(1)
        total += (gram.square() * gram).sum()
    return float(total)


def _cubic_diagonal(a: Tensor) -> float:
    return float((a.square().sum(1) / a.shape[1] + 1).pow(3).sum())
