"""A residual multilayer perceptron on the flattened sample: points in the plane, tiny images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional

from limbeck.networks.embedding import NoiseEmbedding


class MLP(nn.Module):
    """h <- h + W2 silu(W1 norm(h) + A e), with e the embedding of noise level and label.

    Args:
        shape: shape of one sample.
        classes: width of a condition row; 0 = unconditional.
        width: hidden units.
        depth: residual blocks.
        dropout: probability at which hidden units of a block are dropped in training.
    """

    name: ClassVar[str] = "mlp"

    def __init__(
        self, shape: Sequence[int], classes: int = 0, width: int = 128, depth: int = 3, dropout: float = 0.0
    ) -> None:
        super().__init__()
        for field, value in (("width", width), ("depth", depth)):
            if value < 1:
                raise ValueError(f"template.{field}: must be at least 1, got {value}")
        if not 0 <= dropout < 1:
            raise ValueError(f"template.dropout: must lie in [0, 1), got {dropout}")
        self.arguments: dict[str, Any] = {
            "shape": list(shape), "classes": classes, "width": width, "depth": depth, "dropout": dropout,
        }  # fmt: skip
        self.feature_width = width
        size = math.prod(shape)
        self.noise = NoiseEmbedding(width)
        self.label = nn.Linear(classes, width, bias=False) if classes else None
        self.first = nn.Linear(size, width)
        self.shifts = nn.Linear(width, depth * width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))
        self.inner = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(depth))
        self.outer = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.last = nn.Linear(width, size)
        self.dropout = dropout
        # blocks start as the identity and the output at 0, EDM's start for a preconditioned network
        for layer in (*self.outer, self.last):
            assert isinstance(layer, nn.Linear)
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, noise: Tensor, cond: Tensor | None = None) -> Tensor:
        """Raw output of the shape of x (B, *shape), for c_noise (B,) and condition rows (B, classes) or None."""
        return self.trace(x, noise, cond)[0]

    def trace(self, x: Tensor, noise: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`forward`'s output, and the last hidden layer (B, feature_width): what a critic reads."""
        embedding = self.noise(noise)
        if self.label is not None and cond is not None:
            embedding = embedding + self.label(cond)
        shifts = self.shifts(functional.silu(embedding)).chunk(len(self.inner), 1)
        h = self.first(x.flatten(1))
        for norm, inner, outer, shift in zip(self.norms, self.inner, self.outer, shifts, strict=True):
            active = functional.silu(inner(norm(h)) + shift)
            h = h + outer(functional.dropout(active, self.dropout, self.training))
        hidden = functional.silu(self.norm(h))
        return self.last(hidden).reshape(x.shape), hidden
