r"""Fréchet distance between Gaussians fitted to two sets of features.

.. math:: FD = |m_a - m_b|^2 + \mathrm{tr} A + \mathrm{tr} B - 2\,\mathrm{tr}\,(A^{1/2} B A^{1/2})^{1/2}

(Dowson & Landau 1982; as a score of generators Heusel et al. 2017, arXiv 1706.08500). The last trace is the sum of the
singular values of :math:`H_a H_b^T` for any factors with :math:`A = H_a^T H_a` and :math:`B = H_b^T H_b`. No matrix
square root of a product is formed and no square root of rounding errors is taken, so that singular covariances
(fewer samples than features) need no special care. With features other than Inception's this is a Fréchet distance,
not "FID", and its values compare only within one feature network and one number of samples.
"""

from typing import NamedTuple, Self

import torch
from torch import Tensor

from limbeck.evaluate.rows import as_rows


class Moments:
    """Mean and unbiased covariance of rows that arrive in batches, in float64 and d^2 memory.

    Batches are joined by the pairwise update of Chan, Golub & LeVeque (1979), which centres every batch on its own mean
    and therefore stays exact (about 1e-12) for any batching, also when the mean is far larger than the spread.
    Blind to everything beyond the first two moments.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}")
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    @classmethod
    def of(cls, count: int, mean: Tensor, cov: Tensor) -> Self:
        """The moments of ``count >= 2`` rows with mean (d,) and unbiased covariance (d, d), e.g. from a cache file."""
        if count < 2:
            raise ValueError(f"count must be at least 2 for an unbiased covariance, got {count}")
        mean, cov = _as_moments("mean", mean, "cov", cov)
        moments = cls(len(mean), mean.device)
        moments.count, moments.mean, moments.scatter = count, mean.clone(), cov * (count - 1)
        return moments

    @property
    def cov(self) -> Tensor:
        """Unbiased covariance (d, d); ValueError with fewer than two rows."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 rows, got {self.count}; update() with more features")
        return self.scatter / (self.count - 1)

    def update(self, features: Tensor) -> None:
        """Add a batch of features (n, d)."""
        rows = as_rows("features", features, least=0).to(self.mean.device)
        if rows.shape[1] != len(self.mean):
            raise ValueError(f"features must have {len(self.mean)} columns, got {rows.shape[1]}")
        if len(rows) == 0:
            return
        mean = rows.mean(0)
        rows = rows - mean
        self._join(len(rows), mean, rows.T @ rows)

    def merge(self, other: "Moments") -> None:
        """Add the rows that ``other`` has seen, e.g. on another rank; ``other`` is left as it is."""
        if len(other.mean) != len(self.mean):
            raise ValueError(f"cannot merge moments of {len(other.mean)} features into moments of {len(self.mean)}")
        self._join(other.count, other.mean.to(self.mean.device), other.scatter.to(self.mean.device))

    def _join(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        total = self.count + count
        if count == 0:
            return
        delta = mean - self.mean
        self.scatter = self.scatter + scatter + torch.outer(delta, delta) * (self.count * count / total)
        self.mean = self.mean + delta * (count / total)
        self.count = total


def frechet_distance(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """Squared Fréchet (2-Wasserstein) distance between N(mean_a, cov_a) and N(mean_b, cov_b).

    Means (d,), covariances (d, d), also singular ones. Identical inputs give zero up to rounding, which may be slightly
    negative (|FD| <= 1e-12 of the trace). Raises ValueError for wrong shapes, non-finite entries and matrices that are
    not symmetric positive semi-definite.

    Blind to all but two moments of the features: an over-concentrated sampler with the right covariance, or two sets
    that differ in shape only, score zero; it does not see memorisation. The estimate from N samples is biased upward by
    about C/N with a C that depends on the generator (``frechet_infinity``), so compare only at equal N.
    """
    mean_a, cov_a = _as_moments("mean_a", mean_a, "cov_a", cov_a)
    mean_b, cov_b = _as_moments("mean_b", mean_b, "cov_b", cov_b)
    if len(mean_a) != len(mean_b):
        raise ValueError(f"mean_a has {len(mean_a)} entries but mean_b has {len(mean_b)}; use one feature network")
    cross = _factor("cov_a", cov_a) @ _factor("cov_b", cov_b).T
    return _distance(mean_a - mean_b, float(cov_a.trace() + cov_b.trace()), cross)


class Extrapolation(NamedTuple):
    """The line ``estimate + slope / N``: the value at infinite N and the bias per 1/N."""

    estimate: float
    slope: float


def frechet_infinity(
    features: Tensor, mean: Tensor, cov: Tensor, *, smallest: int | None = None, points: int = 15, seed: int = 0
) -> Extrapolation:
    """Fréchet distance of ``features`` (N, d) to reference moments, extrapolated to infinitely many samples.

    FD_inf of Chong & Forsyth 2020 (arXiv 1911.07023): the distance is computed on ``points`` random subsets whose sizes
    run evenly from ``smallest`` (default: N/10) to N, and a least-squares line in 1/size is read off at zero.

    Blind to the same things as ``frechet_distance``, and it removes only the bias that comes from ``features``, not the
    one from the reference's own sample. The 1/N law needs ``smallest`` well above d.
    """
    features = as_rows("features", features, least=3)
    mean, cov = _as_moments("mean", mean, "cov", cov)
    count, dim = features.shape
    if dim != len(mean):
        raise ValueError(f"features have {dim} columns but mean has {len(mean)} entries; use one feature network")
    smallest = max(2, count // 10) if smallest is None else smallest
    if not 2 <= smallest < count:
        raise ValueError(f"smallest must be at least 2 and below the {count} rows of features, got {smallest}")
    if points < 2:
        raise ValueError(f"points must be at least 2 to fit a line, got {points}")
    generator = torch.Generator().manual_seed(seed)
    factor, trace = _factor("cov", cov), float(cov.trace())
    sizes = torch.linspace(smallest, count, points, dtype=torch.float64).round()
    distances = torch.empty(points, dtype=torch.float64)
    for i, size in enumerate(sizes.long().tolist()):
        rows = features[torch.randperm(count, generator=generator)[:size].to(features.device)]
        centre = rows.mean(0)
        half = (rows - centre) / (size - 1) ** 0.5
        own_trace = float(half.square().sum())
        # For many rows the (d, d) factor is cheaper in the singular values than the (size, d) one; both are exact.
        half = half if size <= dim else _factor("features", half.T @ half)
        distances[i] = _distance(centre - mean, own_trace + trace, half @ factor.T)
    inverse = 1 / sizes
    deviation = inverse - inverse.mean()
    slope = (deviation @ distances) / (deviation @ deviation)
    return Extrapolation(float(distances.mean() - slope * inverse.mean()), float(slope))


def _distance(difference: Tensor, traces: float, cross: Tensor) -> float:
    return float(difference.square().sum()) + traces - 2 * float(torch.linalg.svdvals(cross).sum())


def _factor(name: str, cov: Tensor) -> Tensor:
    """A factor H (rank, d) with cov = H^T H."""
    values, vectors = torch.linalg.eigh((cov + cov.T) / 2)
    if float(values[0]) < -1e-6 * float(values.abs().max()):
        raise ValueError(f"{name} must be positive semi-definite, its smallest eigenvalue is {float(values[0]):.3g}")
    # Eigenvalues below the rounding error of eigh carry no information, but their roots would add up to about 1e-8 d.
    kept = values > values[-1] * len(values) * torch.finfo(torch.float64).eps
    return values[kept].sqrt()[:, None] * vectors[:, kept].T


def _as_moments(name_mean: str, mean: Tensor, name_cov: str, cov: Tensor) -> tuple[Tensor, Tensor]:
    if mean.ndim != 1 or cov.shape != (len(mean), len(mean)):
        shapes = f"{tuple(mean.shape)} and {tuple(cov.shape)}"
        raise ValueError(f"{name_mean} and {name_cov} must have shapes (d,) and (d, d), got {shapes}")
    mean, cov = as_rows(name_mean, mean[None])[0], as_rows(name_cov, cov)
    if not torch.allclose(cov, cov.T, rtol=0, atol=1e-6 * float(cov.abs().max())):
        raise ValueError(f"{name_cov} must be symmetric")
    return mean, cov
