r"""A mixture of Gaussian experts as a generator: sum_k g_k(c) N(m_k(c), L_k(c) L_k(c)^T) for a condition c.

One call draws a sample: with u = Phi(z_1), uniform, the gate's expert is the k whose interval [G_{k-1}, G_k) of the
cumulative gate holds u; what is left of u inside that interval is uniform again and becomes z_1 anew by Phi^{-1}, so
that the latent has the sample's shape. Unlike other generators this one knows its density.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from limbeck.generator import Generator
from limbeck.posterior import lower_triangular


class Components(NamedTuple):
    """Their parameters at B conditions: log gate (B, K), means (B, K, d), lower triangular factors (B, K, d, d)."""

    log_gate: Tensor
    means: Tensor
    factors: Tensor

    def detached(self) -> Components:
        return Components(*(part.detach() for part in self))

    def log_experts(self, x: Tensor) -> Tensor:
        """log N_k(x) of all experts, (B, n, K), for n samples x (B, n, d) at each condition."""
        gaps = (x[:, None] - self.means[:, :, None]).transpose(2, 3)  # (B, K, d, n)
        white = torch.linalg.solve_triangular(self.factors, gaps, upper=False)
        log_volume = self.factors.diagonal(dim1=2, dim2=3).log().sum(2) + x.shape[2] / 2 * math.log(2 * math.pi)
        return (-white.pow(2).sum(2) / 2 - log_volume[..., None]).transpose(1, 2)

    def log_joint(self, x: Tensor) -> Tensor:
        """log g_k + log N_k(x), (B, n, K)."""
        return self.log_gate[:, None] + self.log_experts(x)


class Experts(Generator):
    """Gate and experts, each a perceptron of the condition alone; without conditions they are constants.

    Args:
        shape: (d,), points.
        classes: width of a condition row.
        experts: K.
        width: hidden units of the two perceptrons.
        scale: the data's scale, sigma_data: the unit of means and factors.
        contexts: condition rows are points of [0, 1]^classes.
    """

    def __init__(
        self, shape: tuple[int, ...], classes: int, experts: int, width: int, scale: float, contexts: bool = False
    ) -> None:
        super().__init__()
        if len(shape) != 1:
            raise ValueError(f"experts: are for points, the samples have shape {shape}")
        self.arguments = {
            "shape": list(shape), "classes": classes, "experts": experts, "width": width, "scale": scale,
            "contexts": contexts,
        }  # fmt: skip
        self.shape = self.latent_shape = tuple(shape)
        self.classes, self.contexts, self.count, self.scale = classes, contexts, experts, float(scale)
        (d,) = shape
        self.entries = d * (d + 1) // 2
        self.gate = _perceptron(classes, width, experts)
        self.experts = _perceptron(classes, width, experts * (d + self.entries))
        last = self.experts[-1]
        assert isinstance(last, nn.Linear)
        # experts start apart, spread as the data are
        with torch.no_grad():
            last.bias.reshape(experts, -1)[:, :d] = torch.randn(experts, d)

    def at(self, cond: Tensor | None, like: Tensor) -> Components:
        """The mixture at conditions (B, classes), None = zero rows; `like` (B, ...) gives batch size and dtype."""
        rows = like.new_zeros(like.shape[0], max(self.classes, 1))
        if cond is not None:
            if self.classes == 0 or cond.shape != rows.shape:
                raise ValueError(f"cond: expected shape {(like.shape[0], self.classes)}, got {tuple(cond.shape)}")
            rows = cond.to(like.dtype)
        (d,) = self.shape
        means, entries = self.experts(rows).reshape(like.shape[0], self.count, -1).split([d, self.entries], -1)
        return Components(
            functional.log_softmax(self.gate(rows), 1), self.scale * means, self.scale * lower_triangular(entries, d)
        )

    def forward(self, z: Tensor, cond: Tensor | None = None) -> Tensor:
        mixture = self.at(cond, z)
        edges = functional.pad(mixture.log_gate.exp().cumsum(1), (1, 0))
        u = torch.special.ndtr(z[:, :1])
        # rounding may leave the last edge below u
        k = ((u >= edges).sum(1) - 1).clamp(0, self.count - 1)
        row = torch.arange(z.shape[0], device=z.device)
        low, high = edges[row, k], edges[row, k + 1]
        tiny = torch.finfo(z.dtype).eps
        rest = ((u[:, 0] - low) / (high - low).clamp(min=tiny)).clamp(tiny, 1 - tiny)
        fresh = torch.cat([torch.special.ndtri(rest)[:, None], z[:, 1:]], 1)
        return mixture.means[row, k] + (mixture.factors[row, k] @ fresh[..., None]).squeeze(-1)

    def log_prob(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """Log density (B,) of samples x (B, d)."""
        return torch.logsumexp(self.at(cond, x).log_joint(x[:, None]), 2).squeeze(1)

    def card(self) -> dict[str, Any]:
        """Everything but the weights, as JSON-able values."""
        return {"generator": "experts", **self.arguments}


def _perceptron(inputs: int, width: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(max(inputs, 1), width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, outputs)
    )
