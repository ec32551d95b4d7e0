"""A plain multilayer perceptron on the flattened sample, noise level and label: no embedding, norms or skips.

The network of VarDiU's experiments in the plane (arXiv:2508.20646), which need no more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional


class Perceptron(nn.Module):
    """Linear layers with SiLU between them, on [x, c_noise, cond].

    Args:
        shape: shape of one sample.
        classes: width of a condition row; 0 = unconditional.
        width: hidden units.
        depth: hidden layers.
    """

    name: ClassVar[str] = "perceptron"

    def __init__(self, shape: Sequence[int], classes: int = 0, width: int = 128, depth: int = 4) -> None:
        super().__init__()
        for field, value in (("width", width), ("depth", depth)):
            if value < 1:
                raise ValueError(f"template.{field}: must be at least 1, got {value}")
        self.arguments: dict[str, Any] = {"shape": list(shape), "classes": classes, "width": width, "depth": depth}
        self.feature_width = width
        size = math.prod(shape)
        sizes = (size + 1 + classes, *(width,) * depth)
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.last = nn.Linear(width, size)
        self.classes = classes

    def forward(self, x: Tensor, noise: Tensor, cond: Tensor | None = None) -> Tensor:
        """Raw output of the shape of x (B, *shape), for c_noise (B,) and condition rows (B, classes) or None."""
        return self.trace(x, noise, cond)[0]

    def trace(self, x: Tensor, noise: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`forward`'s output, and the last hidden layer (B, feature_width): what a critic reads."""
        rows = [x.flatten(1), noise[:, None]]
        if self.classes:
            rows.append(x.new_zeros(len(x), self.classes) if cond is None else cond)
        h = torch.cat(rows, 1)
        for layer in self.hidden:
            h = functional.silu(layer(h))
        return self.last(h).reshape(x.shape), h
