"""The two networks of a small GAN for images, in the manner of DCGAN (Radford et al. 2016, arXiv:1511.06434)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional


class Decoder(nn.Module):
    """A linear layer to a small picture, then transposed convolutions that double it; tanh at the end.

    Groups of channels are normalised, never the batch: a sample depends on its own latent alone.

    Args:
        shape: (C, H, W) of one sample.
        classes: width of a condition row; 0 = unconditional.
        latent: size of the latent, a vector.
        width: channels before the last layer; twice as many at each coarser size.
    """

    name: ClassVar[str] = "decoder"

    def __init__(self, shape: Sequence[int], classes: int = 0, latent: int = 64, width: int = 64) -> None:
        super().__init__()
        sizes = sizes_of(shape, width)
        if latent < 1:
            raise ValueError(f"latent: must be at least 1, got {latent}")
        self.arguments: dict[str, Any] = {
            "shape": list(shape), "classes": classes, "latent": latent, "width": width,
        }  # fmt: skip
        self.sizes = sizes
        widths = [width * 2**level for level in range(len(sizes) - 1)][::-1]
        self.start = (widths[0], *sizes[0])
        self.first = nn.Linear(latent + classes, math.prod(self.start))
        self.norms = nn.ModuleList(nn.GroupNorm(math.gcd(8, width), width) for width in widths)
        self.doubles = nn.ModuleList(nn.ConvTranspose2d(a, b, 4, 2, 1) for a, b in pairwise([*widths, shape[0]]))

    def forward(self, z: Tensor, cond: Tensor | None = None) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] for z (B, latent) and condition rows (B, classes), None without classes."""
        h = self.first(z if cond is None else torch.cat([z, cond], 1)).unflatten(1, self.start)
        for norm, double, (height, side) in zip(self.norms, self.doubles, self.sizes[1:], strict=True):
            h = double(functional.silu(norm(h)))[:, :, :height, :side]
        return torch.tanh(h)


class Discriminator(nn.Module):
    """Strided convolutions; the label enters by a projection of the features (Miyato & Koyama 2018, arXiv:1802.05637).

    Args:
        shape: (C, H, W) of one sample.
        classes: width of a condition row; 0 = unconditional.
        width: channels after the first layer; twice as many at each coarser size.
        features: size of the last hidden layer.
    """

    def __init__(self, shape: Sequence[int], classes: int = 0, width: int = 32, features: int = 128) -> None:
        super().__init__()
        sizes = sizes_of(shape, width)
        widths = [shape[0], *(width * 2**level for level in range(len(sizes) - 1))]
        self.halves = nn.ModuleList(nn.Conv2d(a, b, 4, 2, 1) for a, b in pairwise(widths))
        with torch.no_grad():
            flat = math.prod(self.body(torch.zeros(1, *shape)).shape)
        self.hidden = nn.Linear(flat, features)
        self.last = nn.Linear(features, 1)
        self.label = nn.Linear(classes, features, bias=False) if classes else None

    def body(self, x: Tensor) -> Tensor:
        """Activations of the last convolution."""
        for half in self.halves:
            x = functional.silu(half(x))
        return x

    def forward(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """Logits (B,), real against generated, for x (B, C, H, W) and condition rows (B, classes) or None."""
        h = functional.silu(self.hidden(self.body(x).flatten(1)))
        logits: Tensor = self.last(h).squeeze(1)
        if self.label is not None and cond is not None:
            logits = logits + (self.label(cond) * h).sum(1)
        return logits


def sizes_of(shape: Sequence[int], width: int) -> list[tuple[int, int]]:
    """(H, W) from the smallest picture, at most 7 pixels wide and high, to the whole one, each half of the next.

    Raises:
        ValueError: for samples that are no images of at least 8 pixels.
    """
    if len(shape) != 3 or max(shape[1:]) < 8:
        raise ValueError(f"gan: needs images (C, H, W) of at least 8 pixels, the samples have shape {tuple(shape)}")
    if width < 1:
        raise ValueError(f"width: must be at least 1, got {width}")
    _, height, side = shape
    sizes = [(height, side)]
    while max(height, side) > 7:
        height, side = (height + 1) // 2, (side + 1) // 2
        sizes.append((height, side))
    return sizes[::-1]
