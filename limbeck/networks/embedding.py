"""Noise embedding shared by the networks that were designed for small CPUs (`mlp`, `dit`)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class NoiseEmbedding(nn.Module):
    """c_noise (B,) -> (B, width): cos and sin at geometric frequencies, then two layers.

    c_noise = ln(sigma)/4 spans about 2.7 over EDM's range; frequencies from pi/4 to 8 pi resolve a factor e in sigma
    and keep the embedding smooth in between.
    """

    frequencies: Tensor

    def __init__(self, width: int, pairs: int = 16) -> None:
        super().__init__()
        octaves = torch.linspace(-2, 3, pairs, dtype=torch.float64)
        self.register_buffer("frequencies", (math.pi * 2**octaves).float(), persistent=False)
        self.inner = nn.Linear(2 * pairs, width)
        self.outer = nn.Linear(width, width)

    def forward(self, noise: Tensor) -> Tensor:
        phase = torch.outer(noise, self.frequencies.to(noise.dtype))
        features = torch.cat([phase.cos(), phase.sin()], 1)
        return self.outer(nn.functional.silu(self.inner(features)))
