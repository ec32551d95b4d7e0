r"""Diff-Instruct (Luo et al. 2023, arXiv:2305.18455): minimise the integral KL divergence of noised laws.

    IKL = int w(sigma) KL(p_sigma || q_sigma) dsigma,
    grad IKL = int w(sigma) E[(s_p(x_sigma) - s_q(x_sigma)) dx/dtheta] dsigma

with p the generator's noised law, q the teacher's, and no gradient through either score. In denoisers,
s_p - s_q = (D_fake - D_real) / sigma^2; the loss below with weight 1 is the case w(sigma) = sigma^2 density(sigma).

=====================  ==========================================  ==================================================
switch                 default                                     what else
=====================  ==========================================  ==================================================
``weight``             ``uniform``: 1, as the authors' code        ``dmd``: 1 / mean |x - D_real| per sample, DMD's
                                                                   normaliser (arXiv:2311.18828)
``levels``             log-normal, as the code                     any law, e.g. SiD's: ``levels = {stop = 0.8}``
``dropout_replay``     off: fake and teacher in eval mode          on: both in training mode with equal masks, as the
                                                                   code; not beside a critic on the fake score
``game.sigma_init``    2.5, as SiD and DMD's successors            the code's README: 1.0 for CIFAR-10
labels                 fresh in every turn                         the code reuses the fake score's labels for the
                                                                   generator's turn
``updated_at``         off: turn and sample call one generator     the noise input of a plain generator (`Direct`) in
                                                                   its own turn. VarDiU's authors update their
                                                                   baseline at 0 while they sample it, and train its
                                                                   fake score, at 1: another network's output
augmentation           none                                        the code augments the fake score's training samples
NaN gradients          the run stops                               the code replaces them by 0 or 1e5
=====================  ==========================================  ==================================================
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from limbeck.denoiser import Denoiser
from limbeck.game import Game
from limbeck.generator import Direct, Generator
from limbeck.losses import l1_scale, matching
from limbeck.noise import Law, LogNormal
from limbeck.objective import Batch, Turn
from limbeck.optimizer import Optimizer

diff_instruct_loss = matching


@dataclass(frozen=True)
class DiffInstruct:
    """Hyper-parameters of Diff-Instruct. Noise levels are in units of sigma_data / 0.5.

    Attributes:
        levels: law of the noise in the generator's turn.
        weight: uniform, or dmd.
        dropout_replay: teacher and fake score have dropout, with equal masks, in the generator's turn.
        updated_at: noise input at which a plain generator is updated; None = at which it samples.
        game: what methods with a fake score share.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}
    product: ClassVar[str] = "generator"
    warm_start: ClassVar[bool] = True

    levels: Law = field(default_factory=LogNormal)
    weight: Literal["uniform", "dmd"] = "uniform"
    dropout_replay: bool = False
    updated_at: float | None = None
    game: Game = field(default_factory=Game)

    def __post_init__(self) -> None:
        if self.weight not in ("uniform", "dmd"):
            raise ValueError(f"weight: must be uniform or dmd, got {self.weight!r}")
        a = self.game.adversarial
        if self.dropout_replay and a is not None and a.features == "fake":
            raise ValueError("dropout_replay: a critic on the fake score's features sees other masks; take teacher's")
        if self.updated_at is not None and self.game.joint:
            raise ValueError("game.joint: the generator is updated at another output than the fake score (updated_at)")

    @property
    def needs_real(self) -> bool:
        return self.game.adversarial is not None

    def players(self, template: Denoiser, generator: Generator | None = None) -> dict[str, nn.Module]:
        if self.updated_at is not None and not isinstance(generator, Direct):
            raise ValueError("updated_at: needs a plain generator; set generator.network")
        return self.game.players(template, generator)

    def optimizers(self) -> dict[str, Optimizer]:
        return self.game.optimizers()

    def turns(self, step: int, images: int) -> Iterable[Turn]:
        return self.game.turns(self.loss, step, images)

    def loss(
        self, nets: nn.ModuleDict, teacher: Denoiser, batch: Batch, call: int | None = None, judged: bool = True
    ) -> Tensor:
        """Per-sample surrogate (B,) whose gradient is the integral KL's, and the adversarial loss if there is one."""
        if self.updated_at is not None:
            batch = replace(batch, x=cast(Direct, nets["generator"]).at(batch.z, self.updated_at, batch.cond))
        with _equal_dropout(teacher, nets["fake"]) if self.dropout_replay else contextlib.nullcontext():
            view = self.game.view(nets, teacher, batch, self.levels, call, judged, graph=False)
        weight = 1.0 if self.weight == "uniform" else l1_scale(view.x / teacher.unit, view.real / teacher.unit)
        score_loss = diff_instruct_loss(view.x, view.fake, view.real, weight) / teacher.unit**2
        return score_loss + self.game.adversarial_loss(view)

    def health(self, nets: nn.ModuleDict, teacher: Denoiser, batch: Batch) -> dict[str, Tensor]:
        return self.game.health(nets, teacher, batch, self.levels)


@contextlib.contextmanager
def _equal_dropout(*players: nn.Module) -> Iterator[None]:
    """Players in training mode, each of whose calls draws its dropout from the same state."""
    states: list[Tensor] = []

    def rewind(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        # masks are drawn where the samples are
        generator: Any = torch.cuda if inputs[0].is_cuda else torch
        if not states:
            states.append(generator.get_rng_state())
        generator.set_rng_state(states[0])

    hooks = [player.train().register_forward_pre_hook(rewind) for player in players]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for player in players:
            player.eval()
