r"""SDS, score distillation sampling (Poole et al. 2022, DreamFusion, arXiv:2209.14988): Diff-Instruct of one point.

A generator that makes one point x whatever its latent has the noised law N(x, sigma^2), whose score is known, so that
E[x_0 | x_sigma] = x needs no fake score:

    grad = E[w(sigma) (x - D_real(x + sigma eps; sigma))].

The point goes to where this pull, averaged over the noise law, vanishes: near a mode if the law is low, towards the
mean if it is high. This is what optimises images or scenes, not a generator of many samples.

=====================  ==========================================  ==================================================
switch                 default                                     what else
=====================  ==========================================  ==================================================
``levels``             log-normal around 0.08                      DreamFusion: nearly all levels. On ``ring8`` the
                                                                   default ends 0.02 from a mode, Diff-Instruct's
                                                                   law and weight 1.04, halfway to the mean (LOG.md)
``weight``             ``dmd``: 1 / mean |x - D_real|              ``uniform``, Diff-Instruct's
``guidance``           1                                           DreamFusion: 100
labels                 one point per class
=====================  ==========================================  ==================================================
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from limbeck.denoiser import Denoiser, guided
from limbeck.generator import Dirac, Generator
from limbeck.losses import l1_scale, matching
from limbeck.noise import Law, LogNormal
from limbeck.objective import Batch, Turn, perturb
from limbeck.optimizer import Optimizer


@dataclass(frozen=True)
class SDS:
    """Hyper-parameters of SDS. Noise levels are in units of sigma_data / 0.5.

    Attributes:
        levels: law of the noise.
        weight: uniform, or dmd.
        guidance: scale of the teacher's classifier-free guidance.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}
    product: ClassVar[str] = "generator"
    needs_real: ClassVar[bool] = False

    levels: Law = field(default_factory=lambda: LogNormal(-2.5, 1.2))
    weight: Literal["uniform", "dmd"] = "dmd"
    guidance: float = 1.0

    def __post_init__(self) -> None:
        if self.weight not in ("uniform", "dmd"):
            raise ValueError(f"weight: must be uniform or dmd, got {self.weight!r}")
        if not math.isfinite(self.guidance):
            raise ValueError(f"guidance: must be finite, got {self.guidance}")

    def players(self, template: Denoiser, generator: Generator | None = None) -> dict[str, nn.Module]:
        """The point, or points of the classes; a given generator must have a Dirac law too."""
        if generator is not None and not isinstance(generator, Dirac):
            raise ValueError("generator: SDS knows the score of a single point only, limbeck.generator.Dirac")
        if template.contexts:
            raise ValueError("teacher: sds has a point for each class, and none for contexts")
        return {"generator": generator or Dirac(template.shape, template.classes, template.sigma_data)}

    def optimizers(self) -> dict[str, Optimizer]:
        return {"generator": Optimizer("adam", lr=1e-2, betas=(0.0, 0.99), schedule="cosine")}

    def turns(self, step: int, images: int) -> Iterable[Turn]:
        yield Turn(("generator",), self.loss)

    def loss(self, nets: nn.ModuleDict, teacher: Denoiser, batch: Batch) -> Tensor:
        """Surrogate per sample (B,)."""
        x = nets["generator"](batch.z, batch.cond)
        sigma = self.levels.scaled(teacher.unit).quantile(batch.u)
        with torch.no_grad():
            real = guided(teacher, self.guidance, perturb(x, sigma, batch.eps), sigma, batch.cond)
        weight = 1.0 if self.weight == "uniform" else l1_scale(x / teacher.unit, real / teacher.unit)
        return matching(x, x, real, weight) / teacher.unit**2
