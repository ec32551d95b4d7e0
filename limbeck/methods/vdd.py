r"""VDD, Variational Diffusion Distillation (Zhou et al. 2024, arXiv:2406.12538): a mixture of experts from a score.

The student is p_G(x | c) = sum_k g_k(c) N_k(x | c). For any responsibilities r, because E KL(p_G(k | x) || r) >= 0,

    KL(p_G || p_d) <= U = sum_k g_k E_{x ~ N_k} [log g_k + log N_k(x) - log r_k(x) - log p_d(x)],

VarDiU's bound with a discrete latent and no added noise, tight for r = p_G(k | x). That r is known here: the present
student's own, held constant. The experts descend U, with the teacher's score at one small noise level in the place of
grad log p_d. That score cannot weigh one mode against another; so the gate is fitted to data by EM's M-step, the
cross-entropy of p_G(k | x) to g_k.

=====================  ==========================================  ==================================================
switch                 default                                     what else
=====================  ==========================================  ==================================================
``experts``            8                                           as the paper's toy in the plane
``width``              perceptrons of 2 x 64                       the code: residual networks of 2 x 64
``sigma``              0.02, of a law of standard deviation 0.5    the paper: the smallest level of the teacher
entropy                of N_k along its samples, parameters        the code: the entropy as a term; equal in the mean,
                       constant: no variance at the optimum        and this has variance there
gate                   EM's cross-entropy, in the experts' turn    the code: the same loss
samples                one of each expert per condition            the code: 64
rate                   Adam at 5e-3, cosine                        the code: 5e-4
=====================  ==========================================  ==================================================
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from limbeck.denoiser import Denoiser
from limbeck.experts import Experts
from limbeck.generator import Generator
from limbeck.objective import Batch, Turn
from limbeck.optimizer import Optimizer


def vdd_bound(x: Tensor, log_gate: Tensor, log_expert: Tensor, log_responsibility: Tensor, score: Tensor) -> Tensor:
    """sum_k g_k (log g_k + log N_k(x_k) - log r_k(x_k) - log p_d(x_k)), with log p_d known up to its gradient: (B,).

    Args:
        x: a sample of each expert (B, K, d).
        log_gate: log g (B, K).
        log_expert: log N_k(x_k) (B, K), with its graph to x.
        log_responsibility: log r_k(x_k) (B, K), with its graph to x.
        score: the teacher's score at x (B, K, d); a constant here.
    """
    log_p = (score.detach() * (x - x.detach())).sum(-1)
    return (log_gate.exp() * (log_gate + log_expert - log_responsibility - log_p)).sum(1)


@dataclass(frozen=True)
class VDD:
    """Hyper-parameters of VDD. The noise level is in units of sigma_data / 0.5.

    Attributes:
        experts: Gaussian components of the student.
        width: hidden units of gate and experts, functions of the condition.
        sigma: level at which the teacher's score is read.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}
    product: ClassVar[str] = "generator"
    needs_real: ClassVar[bool] = True

    experts: int = 8
    width: int = 64
    sigma: float = 0.02

    def __post_init__(self) -> None:
        for name in ("experts", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1, got {getattr(self, name)}")
        if not 0 < self.sigma < math.inf:
            raise ValueError(f"sigma: must be positive and finite, got {self.sigma}")

    def players(self, template: Denoiser, generator: Generator | None = None) -> dict[str, nn.Module]:
        """The mixture of experts: nothing of the template but shape, labels and scale."""
        if generator is None:
            generator = Experts(
                template.shape, template.classes, self.experts, self.width, template.sigma_data, template.contexts
            )
        elif not isinstance(generator, Experts):
            raise ValueError("generator: VDD trains a mixture of experts (limbeck.experts.Experts)")
        return {"generator": generator}

    def optimizers(self) -> dict[str, Optimizer]:
        return {"generator": Optimizer("adam", lr=5e-3, betas=(0.9, 0.99), schedule="cosine")}

    def turns(self, step: int, images: int) -> Iterable[Turn]:
        yield Turn(("generator",), self.loss)

    def loss(self, nets: nn.ModuleDict, teacher: Denoiser, batch: Batch) -> Tensor:
        """The experts' bound and the gate's cross-entropy, whose parameters are apart: (B,)."""
        assert batch.real is not None
        mixture = cast(Experts, nets["generator"]).at(batch.cond, batch.z)
        still = mixture.detached()
        x = mixture.means + (mixture.factors @ batch.eps[:, None, :, None]).squeeze(-1)  # (B, K, d)
        with torch.no_grad():
            flat = x.detach().flatten(0, 1)
            level = flat.new_full((len(flat),), self.sigma * teacher.unit)
            rows = None if batch.cond is None else batch.cond.repeat_interleave(x.shape[1], 0)
            score = ((teacher(flat, level, rows) - flat) / level[:, None] ** 2).reshape(x.shape)
        joint = still.log_joint(x)  # (B, K, K): every expert at each one's sample
        log_responsibility = joint.log_softmax(-1).diagonal(dim1=1, dim2=2)
        log_expert = still.log_experts(x).diagonal(dim1=1, dim2=2)
        bound = vdd_bound(x, still.log_gate, log_expert, log_responsibility, score)
        found = still.log_joint(batch.real[:, None]).squeeze(1).softmax(1)
        return bound - (found * mixture.log_gate).sum(1)
