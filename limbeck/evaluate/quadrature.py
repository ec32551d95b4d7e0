"""Divergences of two densities in the plane, by the sum over a grid: exact to many digits for smooth densities."""

from collections.abc import Callable

import torch
from torch import Tensor


def kullback_leibler(
    log_p: Callable[[Tensor], Tensor], log_q: Callable[[Tensor], Tensor], reach: float, points: int = 401
) -> float:
    """KL(p || q) in the plane from log densities of rows (n, 2), over the square [-reach, reach]^2.

    The trapezoidal rule: for densities that vanish at the border its error falls faster than any power of the spacing,
    once that is below the narrowest feature's width.

    Raises:
        ValueError: if p has not all its mass in the square, within 1e-4, or is too narrow for the grid.
    """
    axis = torch.linspace(-reach, reach, points, dtype=torch.float64)
    rows = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        p, q = log_p(rows).double(), log_q(rows).double()
    cell = (axis[1] - axis[0]).square()
    mass = float(p.exp().sum() * cell)
    if not abs(mass - 1) < 1e-4:
        raise ValueError(f"reach: the density has mass {mass:.6f} on the grid of {points} points, up to {reach:g}")
    return float((p.exp() * (p - q)).sum() * cell)
