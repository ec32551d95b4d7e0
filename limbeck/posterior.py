r"""Variational posteriors q(z | x_sigma) of a generator's latent, given its noised sample.

    diagonal    N(m, diag(v)^2),  v = softplus(r) sigma / sigma_data
    full        N(m, L L^T),      L lower triangular in units of sigma / sigma_data, its diagonal by softplus
    flow        z -> splines -> N(m, diag(v)^2): rational-quadratic splines of z (arXiv:1906.04032)

m, r, L and the splines' parameters are functions of (x_sigma, sigma). Each is a normalised density in z, as a
variational bound needs. The unit sigma / sigma_data makes softplus(r) of order 1 at small noise, where a generator of
slope sigma_data has the exact posterior std sigma / sigma_data.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from limbeck import networks
from limbeck.denoiser import Denoiser, Preconditioned, expand
from limbeck.generator import Generator
from limbeck.losses import per_sample

Kind = Literal["diagonal", "full", "flow"]


class Encoder(nn.Module):
    """Numbers about the latent from (x_sigma, sigma, cond), by a fresh network of the template's kind.

    Such a network has as many outputs as inputs: the sample is padded with zero channels, or spare outputs are left.

    Args:
        template: tells the network's kind and arguments, and the data's scale.
        channels: outputs; of an image as many values per pixel.
        raw_inputs: read x and sigma as they are, not x at unit variance and c_noise.
    """

    def __init__(self, template: Denoiser, channels: int, raw_inputs: bool = False) -> None:
        super().__init__()
        kind = getattr(template.network, "name", "") if isinstance(template, Preconditioned) else ""
        if not isinstance(template, Preconditioned) or kind not in networks.NETWORKS or kind == "unet2d":
            raise ValueError("template: a posterior is built from one of Limbeck's networks; set template.network")
        first, *rest = template.shape
        shape = (max(first, channels), *rest)
        network = networks.like(template.network, shape, template.classes)
        self.home = Preconditioned(network, shape, template.classes, template.sigma_data)
        self.channels, self.padding, self.raw_inputs = channels, shape[0] - first, raw_inputs

    def inputs(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """What the network reads of a sample (B, *shape), its level (B,) and its condition rows."""
        home = self.home
        if self.raw_inputs:
            return x, sigma.to(x).expand(len(x)), home.labels(cond, x)
        scaled = x / (expand(sigma, x) ** 2 + home.sigma_data**2).sqrt()
        return scaled, home.c_noise(sigma, x), home.labels(cond, x)

    def forward(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
        """Outputs (B, channels, ...) for x (B, *shape), sigma (B,) and cond None or (B, classes)."""
        scaled, noise, rows = self.inputs(x, sigma, cond)
        padded = torch.cat([scaled, scaled.new_zeros(len(x), self.padding, *x.shape[2:])], 1)
        return self.home.network(padded, noise, rows)[:, : self.channels]


class Posterior(nn.Module):
    """Interface: `forward(z, x, sigma, cond)` is log q(z | x), (B,), for z (B, *latent_shape) and x (B, *shape)."""

    def forward(self, z: Tensor, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
        raise NotImplementedError


class Diagonal(Posterior):
    """N(m, diag(v)^2); of images in every pixel and channel, with z of the images' shape up to channels."""

    def __init__(self, template: Denoiser, latents: tuple[int, ...], raw_inputs: bool = False) -> None:
        super().__init__()
        if template.shape[1:] != latents[1:]:
            raise ValueError(
                f"posterior: latents of shape {latents} do not fit samples of shape {template.shape} pixel by pixel"
            )
        self.encoder = Encoder(template, 2 * latents[0], raw_inputs)

    def forward(self, z: Tensor, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
        mean, raw = self.encoder(x, sigma, cond).chunk(2, 1)
        return log_normal(z, mean, functional.softplus(raw) * relative(sigma, self.encoder, z))


class Full(Posterior):
    """N(m, L L^T) for points: d + d (d + 1) / 2 outputs."""

    def __init__(self, template: Denoiser, latents: tuple[int, ...], raw_inputs: bool = False) -> None:
        super().__init__()
        _points("full", template.shape, latents)
        (d,) = latents
        self.encoder = Encoder(template, d + d * (d + 1) // 2, raw_inputs)

    def forward(self, z: Tensor, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
        d = z.shape[1]
        mean, entries = self.encoder(x, sigma, cond).split([d, d * (d + 1) // 2], 1)
        factor = lower_triangular(entries, d) * relative(sigma, self.encoder, z)[..., None]
        return log_normal_full(z, mean, factor)


class SplineFlow(Posterior):
    """Splines of z whose parameters depend on (x_sigma, sigma), from a diagonal Gaussian that depends on them too.

    Autoregressive transforms with the coordinates' order reversed in turn; beyond |z| = 5 they are the identity, far
    in the tails of z ~ N(0, I).
    """

    def __init__(
        self,
        template: Denoiser,
        latents: tuple[int, ...],
        raw_inputs: bool = False,
        transforms: int = 4,
        width: int = 128,
    ) -> None:
        super().__init__()
        _points("flow", template.shape, latents)
        try:
            import zuko
        except ImportError:
            raise ValueError("posterior: the flow needs the package zuko; pip install 'limbeck[flow]'") from None
        (d,) = latents
        self.encoder = Encoder(template, 2 * d, raw_inputs)
        context = template.shape[0] + 1 + template.classes
        flow = zuko.flows.NSF(d, context, transforms=transforms, hidden_features=(width, width))
        self.splines: nn.Module = flow.transform

    def forward(self, z: Tensor, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
        scaled, noise, rows = self.encoder.inputs(x, sigma, cond)
        context = torch.cat([scaled, noise[:, None], *([] if rows is None else [rows])], 1)
        straight, log_volume = self.splines(context).call_and_ladj(z)
        mean, raw = self.encoder(x, sigma, cond).chunk(2, 1)
        return log_normal(straight, mean, functional.softplus(raw) * relative(sigma, self.encoder, z)) + log_volume


def build(kind: Kind, template: Denoiser, generator: Generator, raw_inputs: bool = False) -> Posterior:
    """A fresh posterior of `generator`'s latents.

    Args:
        raw_inputs: it reads x and sigma as they are.

    Raises:
        ValueError: if it cannot read the samples, or its package is missing.
    """
    made: Any = {"diagonal": Diagonal, "full": Full, "flow": SplineFlow}[kind]
    posterior: Posterior = made(template, generator.latent_shape, raw_inputs)
    return posterior


def relative(sigma: Tensor, encoder: Encoder, like: Tensor) -> Tensor:
    """sigma / sigma_data, shaped to broadcast over `like`."""
    return expand(sigma, like) / encoder.home.sigma_data


def lower_triangular(entries: Tensor, d: int) -> Tensor:
    """(B, ..., d (d + 1) / 2) numbers to lower triangular matrices (B, ..., d, d), the diagonal made positive."""
    rows, columns = torch.tril_indices(d, d, device=entries.device)
    values = torch.where(rows == columns, functional.softplus(entries), entries)
    matrix = entries.new_zeros(*entries.shape[:-1], d, d)
    matrix[..., rows, columns] = values
    return matrix


def log_normal(z: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """log N(z; mean, diag(std)^2), summed over everything but the batch: (B,)."""
    return per_sample(-(((z - mean) / std) ** 2) / 2 - std.log() - math.log(2 * math.pi) / 2)


def log_normal_full(z: Tensor, mean: Tensor, factor: Tensor) -> Tensor:
    """log N(z; mean, factor factor^T) for z and mean (B, d) and lower triangular factors (B, d, d): (B,)."""
    white = torch.linalg.solve_triangular(factor, (z - mean)[..., None], upper=False).squeeze(-1)
    log_volume = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return -white.pow(2).sum(-1) / 2 - log_volume - z.shape[-1] / 2 * math.log(2 * math.pi)


def _points(kind: str, shape: tuple[int, ...], latents: tuple[int, ...]) -> None:
    if len(shape) != 1 or len(latents) != 1:
        raise ValueError(f"posterior: {kind} is for points, the samples have shape {shape}; use diagonal")
