"""Samples as rows: the checks and the chunked distance matrices that the metrics share.

Every metric computes in float64 on the device of its input. Distances come from the Gram matrix,
``|x - y|^2 = |x|^2 + |y|^2 - 2 <x, y>``, after both sets are shifted to the mean of the second one, which keeps the
cancellation small when the data lie far from the origin. The absolute error of a squared distance is then about
1e-16 times the squared diameter of the data.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

# Entries of a distance matrix held at once, 8 MiB in float64. Smaller blocks starve the matrix product in high
# dimension (7 s become 16 s at 2**18 for 10k against 10k rows of 512), larger ones leave the cache in low dimension.
BLOCK = 2**20


def as_rows(name: str, x: Tensor, least: int = 1) -> Tensor:
    """Check that ``x`` is a finite floating-point (N, d) tensor with ``N >= least``; return it detached, in float64."""
    if x.ndim != 2:
        raise ValueError(f"{name} must have shape (N, d), got {tuple(x.shape)}; flatten(1) turns images into rows")
    if not x.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {x.dtype}; convert it with .float()")
    if x.shape[0] < least or x.shape[1] < 1:
        raise ValueError(f"{name} needs at least {least} rows and one column, got {tuple(x.shape)}")
    if not bool(torch.isfinite(x).all()):
        raise ValueError(f"{name} has non-finite entries; look at the samples before scoring them")
    return x.detach().to(torch.float64)


def as_pair(name_x: str, x: Tensor, name_y: str, y: Tensor, least: int = 1) -> tuple[Tensor, Tensor]:
    """Check two sets of rows with ``as_rows`` and that they have equally many columns."""
    x, y = as_rows(name_x, x, least), as_rows(name_y, y, least)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"{name_x} has {x.shape[1]} columns but {name_y} has {y.shape[1]}; they must agree")
    return x, y


def squared_distances(x: Tensor, y: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield ``(rows, block)``: the squared distances (r, M) of ``x[rows]`` to all rows of ``y``, block after block."""
    centre = y.mean(0)
    y = y - centre
    y_norm = y.square().sum(1)
    step = max(1, BLOCK // len(y))
    for start in range(0, len(x), step):
        part = x[start : start + step] - centre  # not x as a whole, which may be 10,000 rows of 2,048 features
        block = torch.addmm(y_norm, part, y.T, alpha=-2).add_(part.square().sum(1, keepdim=True)).clamp_(min=0)
        yield slice(start, start + len(part)), block
