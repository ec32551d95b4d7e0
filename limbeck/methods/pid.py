r"""PID, Physics Informed Distillation (Tee et al. 2024, arXiv:2411.08378): the student is the teacher's whole ODE path.

The probability-flow ODE is t dx/dt = x - D(x, t). With the student x(t) = (t/T) z + (1 - t/T) F(z, t) and the slope
between two grid levels t > s, the ODE's right-hand side asks for

    P := x(t) - t (x(t) - x(s)) / (t - s)   to equal   Q := D(x(t), t),

so a residual of 0 on the whole grid is the explicit Euler solution with N - 1 steps. The start z cancels in P:

    P = F(t) - t (1 - s/T) (F(t) - F(s)) / (t - s),

which keeps the digits that the first form loses against |z| ~ T. The teacher is a constant: neither its weights nor its
input get a gradient. No data are read.

Where the paper, the authors' code and this file differ:

=====================  ==========================================  ==================================================
switch                 default                                     what else
=====================  ==========================================  ==================================================
``last_index``         ``flip``: the last level looks back to      ``drop``: N - 1 residuals, the forward differences
                       larger t, as the code does; N equations     of the paper's theorem, exactly Euler's method.
                       for N - 1 unknowns, an error of 8e-8 at
                       N = 250
``gradient``           ``both``: through F(t) and F(s), as the     ``causal``: F(t) is a constant, as in BOOT.
                       code does
``metric``             ``l2``, the theorem's                       ``l1``, ``huber``; ``features``: squared distance
                                                                   in a feature network (the paper's best image
                                                                   results use LPIPS, whose weights are not bundled)
P                      the well-conditioned form above             the code forms x(t), x(s) and subtracts: equal in
                                                                   exact arithmetic, up to 1.4e-3 off in float32
``levels``             in units of sigma_data / 0.5                the code has 80 and 0.002 as literals in three
                                                                   places
dropout                none: a difference between the two calls    as the code, whose networks have it hard-coded to 0
                       is multiplied by up to 30
micro-batches          mean over the whole batch                   the code sums the gradients of micro-batch means
length                 ``steps``                                   the released loop does not stop at its total
optimiser              Adam, betas 0.9 and 0.99, cosine decay:     the paper's RAdam (betas 0.9, 0.999, constant rate)
                       at equal images 0.14 against 0.33 on        is one key away
                       digits (Fréchet distance in features)
=====================  ==========================================  ==================================================
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from limbeck import features as feature_networks
from limbeck.denoiser import Denoiser, expand
from limbeck.device import on_cpu
from limbeck.generator import Generator, Trajectory, path_point
from limbeck.losses import absolute, pseudo_huber, squared
from limbeck.noise import Karras
from limbeck.objective import Batch, Turn
from limbeck.optimizer import Optimizer


def pid_prediction(f_t: Tensor, f_s: Tensor, t: Tensor, s: Tensor, t_max: float | Tensor) -> Tensor:
    """P = F(t) - t (1 - s/T) (F(t) - F(s)) / (t - s), the student's clean estimate at level t.

    Args:
        f_t, f_s: network outputs (B, ...) at levels t and s.
        t, s: levels, broadcastable to f_t, t != s.
        t_max: T, the level at which paths start.
    """
    return f_t - t * (1 - s / t_max) * (f_t - f_s) / (t - s)


def neighbours(u: Tensor, levels: Tensor, last_index: Literal["flip", "drop"]) -> tuple[Tensor, Tensor]:
    """Uniform u (B,) in [0, 1) to a pair (t, s) of neighbouring levels, each (B,) in the dtype of u.

    t is uniform over the decreasing grid `levels` (N,), s the next one down. The last level has none: with `flip` its
    partner is the one above, with `drop` it is never drawn.
    """
    n = len(levels)
    i = (u.double() * (n if last_index == "flip" else n - 1)).long()
    j = torch.where(i < n - 1, i + 1, i - 1)
    return levels[i].to(u.dtype), levels[j].to(u.dtype)


@dataclass(frozen=True)
class PID:
    """Hyper-parameters of PID. Noise levels are in units of sigma_data / 0.5.

    Attributes:
        N: number of grid levels; the student is at best the Euler solution of N - 1 steps.
        levels: the grid's law; its maximum is where paths start, its minimum where samples are read.
        metric: distance between P and Q: l2, l1, huber or features.
        features: feature network of the metric "features": a bundled name ("digits"), a classifier's file or a module.
        last_index: partner of the last level: flip (the authors' code) or drop (the paper's theorem).
        gradient: both branches, or causal (F(t) constant).
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}
    product: ClassVar[str] = "generator"
    needs_real: ClassVar[bool] = False

    N: int = 250
    levels: Karras = field(default_factory=Karras)
    metric: Literal["l2", "l1", "huber", "features"] = "l2"
    features: Any = None
    last_index: Literal["flip", "drop"] = "flip"
    gradient: Literal["both", "causal"] = "both"

    def __post_init__(self) -> None:
        if not 2 <= self.N <= 1_000_000:
            raise ValueError(f"N: must be 2 to 1,000,000 levels, got {self.N}")
        if (self.features is None) == (self.metric == "features"):
            raise ValueError('features: name a feature network with metric = "features", and only then')
        if isinstance(self.features, str) and self.features.endswith(".pt"):
            raise ValueError("features: a TorchScript file reads bytes, which have no gradient; name a classifier")

    def players(self, template: Denoiser, generator: Generator | None = None) -> dict[str, nn.Module]:
        """The generator, a `Trajectory` on a copy of the template; and the frozen feature network, if any."""
        if generator is None:
            generator = Trajectory(copy.deepcopy(template), self.levels.scaled(template.unit))
        elif not isinstance(generator, Trajectory):
            raise ValueError("generator: PID trains a whole path, so it needs a limbeck.generator.Trajectory")
        nets: dict[str, nn.Module] = {"generator": generator}
        if self.features is not None:
            # a copy: the run moves it to its device
            nets["features"] = on_cpu(copy.deepcopy(feature_networks.load(self.features)))
            try:
                nets["features"](torch.zeros(1, *template.shape))
            except (ValueError, RuntimeError) as error:
                raise ValueError(f"features: does not read samples of shape {template.shape} ({error})") from None
        return nets

    def optimizers(self) -> dict[str, Optimizer]:
        return {"generator": Optimizer("adam", lr=2e-3, betas=(0.9, 0.99), schedule="cosine")}

    def turns(self, step: int, images: int) -> Iterable[Turn]:
        yield Turn(("generator",), self.loss)

    def loss(self, nets: nn.ModuleDict, teacher: Denoiser, batch: Batch) -> Tensor:
        """d(P, Q) per sample (B,), in units of the data's scale."""
        student = cast(Trajectory, nets["generator"])
        student.eval()  # no dropout: what differs between the two calls is multiplied by the gain of P
        law = student.levels
        t, s = neighbours(batch.u, law.grid(self.N)[:-1].to(batch.u.device), self.last_index)
        both = None if batch.cond is None else batch.cond.repeat(2, 1)
        z = batch.z
        # one batch of 2B: the same noise at two output times; the residual stays in full precision
        f_t, f_s = student.raw(torch.cat([z, z]), torch.cat([t, s]), both).to(z.dtype).chunk(2)
        t_, s_ = expand(t, z), expand(s, z)
        with torch.no_grad():
            q = teacher(path_point(f_t, z, t_, law.sigma_max), t, batch.cond)
        p = pid_prediction(f_t.detach() if self.gradient == "causal" else f_t, f_s, t_, s_, law.sigma_max)
        return self.distance(nets, p, q, teacher.unit)

    def distance(self, nets: nn.ModuleDict, p: Tensor, q: Tensor, unit: float) -> Tensor:
        """The metric between P and Q, (B,); in units of the data's scale, but feature networks see the data's own."""
        match self.metric:
            case "l2":
                return squared(p / unit, q / unit)
            case "l1":
                return absolute(p / unit, q / unit)
            case "huber":
                return pseudo_huber(p / unit, q / unit)
            case "features":
                return squared(nets["features"](p), nets["features"](q))
