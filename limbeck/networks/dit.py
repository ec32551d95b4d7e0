"""A small diffusion transformer (Peebles & Xie 2022, arXiv:2212.09748): patches, adaptive layer norm, zero gates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from limbeck.networks.embedding import NoiseEmbedding


class Block(nn.Module):
    """Self-attention and a two-layer perceptron, each modulated by the embedding (adaLN-Zero)."""

    def __init__(self, width: int, heads: int, ratio: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.inner = nn.Linear(width, ratio * width)
        self.outer = nn.Linear(ratio * width, width)
        self.modulation = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(embedding)[:, None].chunk(6, -1)
        b, n, width = x.shape
        qkv = self.qkv(torch.addcmul(shift1, self.norm1(x), 1 + scale1))
        q, k, v = qkv.reshape(b, n, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, width)
        x = x + gate1 * self.proj(attended)
        hidden = functional.gelu(self.inner(torch.addcmul(shift2, self.norm2(x), 1 + scale2)), approximate="tanh")
        return x + gate2 * self.outer(functional.dropout(hidden, self.dropout, self.training))


class DiT(nn.Module):
    """Transformer over image patches.

    Args:
        shape: (C, H, W) of one sample.
        classes: width of a condition row; 0 = unconditional.
        patch: side of a patch in pixels; divides H and W.
        width: channels of a token; a multiple of `heads`.
        depth: transformer blocks.
        heads: attention heads.
        ratio: hidden units of a block's perceptron, in widths.
        dropout: probability at which those hidden units are dropped in training.
    """

    name: ClassVar[str] = "dit"

    def __init__(
        self,
        shape: Sequence[int],
        classes: int = 0,
        patch: int = 4,
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
        ratio: int = 4,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if len(shape) != 3:
            raise ValueError(f"template.network: dit needs images (C, H, W), the samples have shape {tuple(shape)}")
        channels, height, side = shape
        if patch < 1 or height % patch or side % patch:
            raise ValueError(f"template.patch: must divide the image size {height}x{side}, got {patch}")
        if heads < 1 or width % heads:
            raise ValueError(f"template.width: must be a multiple of heads = {heads}, got {width}")
        if depth < 1:
            raise ValueError(f"template.depth: must be at least 1, got {depth}")
        if not 0 <= dropout < 1:
            raise ValueError(f"template.dropout: must lie in [0, 1), got {dropout}")
        self.arguments: dict[str, Any] = {
            "shape": list(shape), "classes": classes, "patch": patch, "width": width, "depth": depth, "heads": heads,
            "ratio": ratio, "dropout": dropout,
        }  # fmt: skip
        self.patch, self.feature_width = patch, width
        tokens, size = (height // patch) * (side // patch), channels * patch**2
        self.noise = NoiseEmbedding(width)
        self.label = nn.Linear(classes, width, bias=False) if classes else None
        self.first = nn.Linear(size, width)
        self.position = nn.Parameter(0.02 * torch.randn(1, tokens, width))
        self.blocks = nn.ModuleList(Block(width, heads, ratio, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.last = nn.Linear(width, size)
        for layer in (self.modulation, self.last):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, noise: Tensor, cond: Tensor | None = None) -> Tensor:
        """Raw network output of the shape of x (B, C, H, W), for c_noise (B,), condition rows (B, classes) or None."""
        return self.trace(x, noise, cond)[0]

    def trace(self, x: Tensor, noise: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`forward`'s output, and the mean over patches of the last hidden layer (B, feature_width)."""
        embedding = self.noise(noise)
        if self.label is not None and cond is not None:
            embedding = embedding + self.label(cond)
        embedding = functional.silu(embedding)
        b, c, height, side = x.shape
        p, rows, columns = self.patch, height // self.patch, side // self.patch
        patches = x.reshape(b, c, rows, p, columns, p).permute(0, 2, 4, 1, 3, 5).reshape(b, rows * columns, c * p * p)
        h = self.first(patches) + self.position
        for block in self.blocks:
            h = block(h, embedding)
        shift, scale = self.modulation(embedding)[:, None].chunk(2, -1)
        hidden = torch.addcmul(shift, self.norm(h), 1 + scale)
        out = self.last(hidden).reshape(b, rows, columns, c, p, p).permute(0, 3, 1, 4, 2, 5)
        return out.reshape(x.shape), hidden.mean(1)
