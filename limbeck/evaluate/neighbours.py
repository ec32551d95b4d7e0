"""Nearest-neighbour metrics: precision, recall, density, coverage, and a check for memorisation.

The support of a law is estimated by the balls around its samples that reach to their k-th nearest neighbour
(Kynkäänniemi et al. 2019, arXiv 1904.06991; Naeem et al. 2020, arXiv 2002.09797). All of these count neighbours under
the Euclidean distance, so the scale of the features matters. Time O(N M d), memory O(N + M).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from limbeck.evaluate.rows import as_pair, as_rows, squared_distances


class PRDC(NamedTuple):
    """Fidelity (precision, density) and diversity (recall, coverage); 1 is good, only density can exceed it."""

    precision: float
    recall: float
    density: float
    coverage: float


def precision_recall_density_coverage(real: Tensor, fake: Tensor, k: int = 5) -> PRDC:
    """Precision, recall, density and coverage of fake (M, d) against real (N, d), with balls to the k-th neighbour.

    precision: share of fakes inside some real ball; recall: share of reals inside some fake ball; density: mean number
    of real balls around a fake, over k; coverage: share of real balls that hold a fake.

    Not 1 for a perfect generator (measure the real data against themselves for the ceiling) and dependent on k, N and
    M. Blind to how the mass is spread inside the support. Precision and recall are inflated by outliers, whose balls
    are large; precision and density do not see dropped modes, recall hardly sees noise (which widens the fake balls). A
    copy of the training data scores perfectly. Raises ValueError unless both sets have more than k rows.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    real, fake = as_pair("real", real, "fake", fake, least=k + 1)
    real_radii, fake_radii = _squared_radii(real, k), _squared_radii(fake, k)
    recalled, covered = 0, 0
    around_fake = torch.zeros(len(fake), dtype=torch.int64, device=fake.device)
    for rows, block in squared_distances(real, fake):
        in_real_ball = block < real_radii[rows, None]
        around_fake += in_real_ball.sum(0)
        covered += int(in_real_ball.any(1).sum())
        recalled += int((block < fake_radii).any(1).sum())
    balls, inside = int(around_fake.sum()), int((around_fake > 0).sum())
    n, m = len(real), len(fake)
    return PRDC(precision=inside / m, recall=recalled / n, density=balls / (k * m), coverage=covered / n)


def nearest_neighbour_distance(queries: Tensor, points: Tensor) -> Tensor:
    """Euclidean distance (N,), float64, of each row of queries (N, d) to its nearest row of points (M, d).

    An exact copy has distance exactly zero.
    """
    queries, points = as_pair("queries", queries, "points", points)
    # The block is only trusted to name the neighbour: its cancellation would leave a copy at about 1e-8.
    nearest = torch.cat([block.argmin(1) for _, block in squared_distances(queries, points)])
    return (queries - points[nearest]).norm(dim=1)


class Memorisation(NamedTuple):
    """Distances to the training set: near ``ratio`` 1 and ``share`` 0.01 the fakes are as new as held-out data."""

    ratio: float
    share: float


def memorisation(fake: Tensor, train: Tensor, held_out: Tensor) -> Memorisation:
    """Are fake rows (F, d) nearer to the training rows (N, d) than held-out real rows (H, d) are?

    ratio: median nearest-neighbour distance of the fakes over that of the held-out rows; below 1 hints at copying.
    share: fraction of fakes that lie nearer to the training set than all but 1% of the held-out rows (0.01 for a
    perfect generator; needs a few hundred held-out rows to be stable).

    Blind to quality: pure noise looks new; over-smoothed samples in the middle of the data look copied. Only as good as
    the features' idea of distance: in pixels a shifted copy is far away. Raises ValueError if half of the held-out rows
    are themselves in the training set.
    """
    fake, train = as_pair("fake", fake, "train", train)
    own = nearest_neighbour_distance(fake, train)
    reference = nearest_neighbour_distance(as_rows("held_out", held_out), train)
    if float(reference.median()) == 0:
        raise ValueError("held_out must not be part of train: the median distance between them is zero")
    share = (own < reference.quantile(0.01)).double().mean()
    return Memorisation(ratio=float(own.median() / reference.median()), share=float(share))


def _squared_radii(x: Tensor, k: int) -> Tensor:
    """Squared distance (N,) of each row to its k-th nearest other row, less a margin for rounding."""
    radii = torch.cat([block.topk(k + 1, largest=False).values[:, -1] for _, block in squared_distances(x, x)])
    # A fake that copies the k-th neighbour lies on the rim, which is outside: rounding must not decide that.
    return radii * (1 - 1e-10)
