"""Samplers for teachers: the probability-flow ODE dx/dsigma = (x - D(x; sigma)) / sigma and its stochastic sibling.

Karras et al. (2022), arXiv:2206.00364, Algorithm 1 (Heun, no churn); Euler is DDIM (Song et al. 2020,
arXiv:2010.02502) in this coordinate; ancestral sampling is DDPM's (Ho et al. 2020, arXiv:2006.11239).

All take z ~ N(0, I) (B, *shape), scale it to the first level themselves and return the sample in z's dtype. The state
is kept in float64, as EDM does; the denoiser sees z's dtype. `levels=None` is `Karras()` in the denoiser's units, cut
to its range of noise levels; `sigmas`, a decreasing 1-D tensor, replaces the grid altogether.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from limbeck.denoiser import Denoiser
from limbeck.noise import Karras, Levels


def default_levels(denoiser: Denoiser) -> Karras:
    """EDM's sampling levels, 0.002 to 80 in units of sigma_data / 0.5, cut to the denoiser's range."""
    base = Karras().scaled(denoiser.unit)
    return Karras(max(base.sigma_min, denoiser.sigma_min), min(base.sigma_max, denoiser.sigma_max), base.rho)


def _sigmas(denoiser: Denoiser, steps: int, levels: Levels | None, sigmas: Tensor | None) -> list[Tensor]:
    walk = (levels or default_levels(denoiser)).grid(steps) if sigmas is None else sigmas.double()
    if walk.ndim != 1 or len(walk) < 2 or not (walk[1:] < walk[:-1]).all() or not 0 <= walk[-1] < walk[0] < math.inf:
        raise ValueError("sigmas: must be a decreasing 1-D tensor of at least two finite levels, none negative")
    return list(walk)


def _clean(denoiser: Denoiser, x: Tensor, sigma: Tensor, z: Tensor, cond: Tensor | None) -> Tensor:
    return denoiser(x.to(z.dtype), sigma.to(z), cond).double()


def _heun(denoiser: Denoiser, z: Tensor, sigmas: list[Tensor], cond: Tensor | None) -> Iterator[Tensor]:
    x = z.double() * sigmas[0]
    yield x
    for t, s in itertools.pairwise(sigmas):
        slope = (x - _clean(denoiser, x, t, z, cond)) / t
        ahead = x + (s - t) * slope
        if s > 0:
            slope = (slope + (ahead - _clean(denoiser, ahead, s, z, cond)) / s) / 2
        x = x + (s - t) * slope
        yield x


def _euler(denoiser: Denoiser, z: Tensor, sigmas: list[Tensor], cond: Tensor | None) -> Iterator[Tensor]:
    x = z.double() * sigmas[0]
    yield x
    for t, s in itertools.pairwise(sigmas):
        # x + (s - t)(x - D)/t as a convex combination: exact at s = 0 and free of the 1/t at small t
        x = s / t * x + (1 - s / t) * _clean(denoiser, x, t, z, cond)
        yield x


def _last(path: Iterator[Tensor]) -> Tensor:
    x = next(path)
    for step in path:
        x = step
    return x


def _result(path: Iterator[Tensor], z: Tensor, whole: bool) -> Tensor:
    return (torch.stack(list(path)) if whole else _last(path)).to(z.dtype)


def heun(
    denoiser: Denoiser,
    z: Tensor,
    steps: int = 18,
    levels: Levels | None = None,
    cond: Tensor | None = None,
    *,
    sigmas: Tensor | None = None,
    path: bool = False,
) -> Tensor:
    """Second-order sampler of EDM: 2 * steps - 1 network calls (steps = 18 is 35 NFE) on a grid that ends at 0.

    With `path` the whole walk (steps + 1, B, *shape), else its end (B, *shape).
    """
    return _result(_heun(denoiser, z, _sigmas(denoiser, steps, levels, sigmas), cond), z, path)


def euler(
    denoiser: Denoiser,
    z: Tensor,
    steps: int = 18,
    levels: Levels | None = None,
    cond: Tensor | None = None,
    *,
    sigmas: Tensor | None = None,
    path: bool = False,
) -> Tensor:
    """First-order sampler (DDIM): `steps` network calls on a grid that ends at 0. Results as `heun`."""
    return _result(_euler(denoiser, z, _sigmas(denoiser, steps, levels, sigmas), cond), z, path)


def ancestral(
    denoiser: Denoiser,
    z: Tensor,
    steps: int = 18,
    levels: Levels | None = None,
    cond: Tensor | None = None,
    *,
    generator: torch.Generator | None = None,
    sigmas: Tensor | None = None,
) -> Tensor:
    """Stochastic sampler: each step draws x_s from q(x_s | x_t, x_0 = D), `steps` network calls, end (B, *shape).

    q has mean D + (s^2/t^2) (x_t - D) and variance s^2 (t^2 - s^2) / t^2, exact for Gaussian posteriors of no width.
    """
    walk = _sigmas(denoiser, steps, levels, sigmas)
    x = z.double() * walk[0]
    for t, s in itertools.pairwise(walk):
        clean = _clean(denoiser, x, t, z, cond)
        noise = torch.randn(z.shape, generator=generator, dtype=torch.float64, device=z.device)
        x = clean + (s / t) ** 2 * (x - clean) + s * torch.sqrt(1 - (s / t) ** 2) * noise
    return x.to(z.dtype)
