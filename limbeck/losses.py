"""Per-sample loss atoms. Every function returns one value per sample, (B,); reduction is the trainer's."""

from __future__ import annotations

import math

from torch import Tensor

from limbeck.denoiser import expand


def per_sample(x: Tensor, reduce: str = "sum") -> Tensor:
    """Sum or mean of everything but the batch dimension: (B, ...) -> (B,)."""
    flat = x.flatten(1)
    return flat.sum(1) if reduce == "sum" else flat.mean(1)


def denoising(estimate: Tensor, clean: Tensor, sigma: Tensor, sigma_data: float) -> Tensor:
    """EDM's loss (sigma^2 + sd^2) / (sigma sd)^2 |D - x|^2, mean over coordinates (arXiv:2206.00364, Table 1).

    The weight makes the loss of a network of zero output equal to 1 at every level.
    """
    return per_sample(expand(edm_weight(sigma, sigma_data), clean) * (estimate - clean) ** 2, "mean")


def edm_weight(sigma: Tensor, sigma_data: float) -> Tensor:
    """(sigma^2 + sd^2) / (sigma sd)^2."""
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


def squared(a: Tensor, b: Tensor) -> Tensor:
    """Mean over coordinates of (a - b)^2."""
    return per_sample((a - b) ** 2, "mean")


def absolute(a: Tensor, b: Tensor) -> Tensor:
    """Mean over coordinates of |a - b|."""
    return per_sample((a - b).abs(), "mean")


def pseudo_huber(a: Tensor, b: Tensor, c: float | None = None) -> Tensor:
    """sqrt(|a - b|^2 + c^2) - c, norms over a whole sample; c = 0.00054 sqrt(d) by default (arXiv:2310.14189)."""
    gap = per_sample((a - b) ** 2)
    c = 0.00054 * math.sqrt(a[0].numel()) if c is None else c
    # the form that does not cancel for gaps below c
    return gap / ((gap + c**2).sqrt() + c)


def l1_scale(x: Tensor, real: Tensor) -> Tensor:
    """1 / max(mean |x - D_real|, 1e-5) per sample (B,), without gradient: the normaliser of DMD and SiD.

    x and real are in units of the data's scale, so that the floor is.
    """
    return 1 / per_sample((x - real).abs(), "mean").detach().clamp(min=1e-5)


def matching(x: Tensor, fake: Tensor, real: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    """weight * (fake - real) . x, whose gradient in x is weight * (fake - real): (B,). Its value means nothing.

    The surrogate of the reverse KL divergence of noised laws, as Diff-Instruct, DMD and f-distill descend it.

    Args:
        x: generator samples (B, ...).
        fake, real: clean estimates at the noised samples under the fake score and the teacher; constants here.
        weight: (B,) or a number; a constant here.
    """
    gap = (fake - real).detach()
    scale = expand(weight.detach(), gap) if isinstance(weight, Tensor) else weight
    return per_sample(scale * gap * x)


def score_identity(x: Tensor, fake: Tensor, real: Tensor, alpha: float) -> Tensor:
    """(real - fake) . ((real - x) - alpha (real - fake)), summed over coordinates, unweighted: (B,).

    The loss of the SiD line. Gradients flow through both estimates; see `methods.sid` for what it descends.

    Args:
        x: generator samples (B, ...).
        fake, real: clean estimates at the noised samples, with their graphs to x.
        alpha: 1/2 is the Fisher divergence's gradient, 1 leaves its path term out.
    """
    gap = real - fake
    return per_sample(gap * ((real - x) - alpha * gap))
