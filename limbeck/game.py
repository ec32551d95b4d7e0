"""The alternating game of the score family: a generator, a fake score, and a critic where one is asked for.

Methods that compare scores need grad log p_sigma of the generator. The fake score learns it by denoising the
generator's samples, D_fake = argmin E |D(x + sigma eps; sigma) - x|^2 over x = G(z), with EDM's weight, in turns
between those of the generator. What the generator minimises is the method's; everything else is here, so that every
method can have several turns of the fake score, a critic, guidance, and a generator of several calls.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from limbeck.critic import Adversarial, critic_loss, critic_on, generator_loss, nudged, r1_penalty, traced
from limbeck.denoiser import Denoiser, Networked, guided
from limbeck.generator import FewStep, Generator, OneStep
from limbeck.losses import denoising, edm_weight
from limbeck.noise import Karras, Law, Levels, LogNormal
from limbeck.objective import Batch, State, Turn, perturb
from limbeck.optimizer import Optimizer

HEALTH_BINS = 6


@dataclass(frozen=True)
class Guidance:
    """Scales of classifier-free guidance, D_none + scale (D_cond - D_none), as in SiD-LSG (arXiv:2406.01561).

    Attributes:
        fake_turn: of the fake score in its own turn (k1).
        fake: of the fake score in the generator's turn (k2 = k3).
        teacher: of the teacher in the generator's turn (k4).
        dropout: share of labels dropped in the fake score's turn if `fake_turn` or `fake` is not 1, so that D_none is
            trained; of generated and of real samples alike.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    fake_turn: float = 1.0
    fake: float = 1.0
    teacher: float = 1.0
    dropout: float = 0.1

    def __post_init__(self) -> None:
        for name in ("fake_turn", "fake", "teacher"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name}: must be finite, got {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: must lie in [0, 1), got {self.dropout}")

    @property
    def reads_unlabelled(self) -> bool:
        """Is the fake score's D_none read, in its own turn or in the generator's?"""
        return {self.fake_turn, self.fake} != {1.0}


class View(NamedTuple):
    """The generator's samples, noised, as teacher and fake score see them.

    Attributes:
        x: samples (B, *shape), with their graph.
        sigma: levels (B,).
        noisy: x + sigma eps.
        real, fake: clean estimates at `noisy`.
        logits: the critic's (B,), with their graph to `noisy`; None if there is no critic or it does not count yet.
    """

    x: Tensor
    sigma: Tensor
    noisy: Tensor
    real: Tensor
    fake: Tensor
    logits: Tensor | None


@dataclass(frozen=True)
class Game:
    """What methods with a fake score share. Noise levels are in units of sigma_data / 0.5.

    Attributes:
        sigma_init: level at which the generator calls its network first.
        calls: network calls of the generator; more than one is the few-step generator of arXiv:2505.12674.
        fake_levels: law of the noise in the fake score's turn.
        fake_steps: turns of the fake score before each of the generator.
        joint: the generator's turn and the fake score's last are one, on one sample and one noise: a pass less, and
            each player sees the others as they were before.
        fake_first: images for which the fake score (and critic) play alone at the start.
        settle: 0; or a number of turns: the generator waits until the fake score's loss on fresh samples improves by
            less than 1% from one such window to the next. For generators that the fake score does not know yet: for
            one that is given (`generator.file`), 0 is 200.
        adversarial: a critic, which needs real samples; None = data-free.
        guidance: scales of guidance.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    sigma_init: float = 2.5
    calls: int = 1
    fake_levels: Law = field(default_factory=LogNormal)
    fake_steps: int = 1
    joint: bool = False
    fake_first: int = 0
    settle: int = 0
    adversarial: Adversarial | None = None
    guidance: Guidance = field(default_factory=Guidance)

    def __post_init__(self) -> None:
        if not 0 < self.sigma_init < math.inf:
            raise ValueError(f"sigma_init: must be positive and finite, got {self.sigma_init}")
        for name, least in (("calls", 1), ("fake_steps", 1), ("fake_first", 0), ("settle", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: must be at least {least}, got {getattr(self, name)}")

    def players(self, template: Denoiser, generator: Generator | None) -> dict[str, nn.Module]:
        """A generator (a copy of the template, or the given one), the fake score (another copy), and a critic.

        Raises:
            ValueError: if a given generator makes samples of another shape, or takes another number of calls, or the
                critic has no features to read, or guidance is asked of contexts.
        """
        if generator is not None and generator.shape != template.shape:
            raise ValueError(f"generator: makes samples of shape {generator.shape}, the teacher's are {template.shape}")
        if generator is not None and generator.nfe != self.calls:
            raise ValueError(
                f"method.game.calls: the given generator takes {generator.nfe} network calls, set it to that"
            )
        g = self.guidance
        if template.contexts and {g.fake_turn, g.fake, g.teacher} != {1.0}:
            raise ValueError("method.game.guidance: a teacher of contexts has none that stands for no condition")
        made: dict[str, nn.Module] = {
            "generator": generator or self._generator(copy.deepcopy(template)),
            "fake": copy.deepcopy(template),
        }
        if self.adversarial is not None:
            made["critic"] = critic_on(template)
        if self.settle:
            made["settling"] = Settling(self.settle)
        return made

    def _generator(self, denoiser: Denoiser) -> Generator:
        if self.calls == 1:
            return OneStep(denoiser, self.sigma_init * denoiser.unit)
        # levels of EDM's sampler from u_init, where it passes sigma_init, down in `calls` equal steps of u
        law = Karras()
        low, high, start = (s ** (1 / law.rho) for s in (law.sigma_min, law.sigma_max, self.sigma_init))
        u = (start - low) / (high - low) * (1 - torch.arange(self.calls, dtype=torch.float64) / self.calls)
        return FewStep(denoiser, law.scaled(denoiser.unit).quantile(u).tolist())

    def optimizers(self, generator: float = 2.5e-4, fake: float = 1e-3) -> dict[str, Optimizer]:
        """Adam without momentum, at these learning rates; the critic's is the fake score's."""
        slow = Optimizer("adam", lr=fake, betas=(0.0, 0.99), schedule="cosine")
        made = {"fake": slow, "generator": Optimizer("adam", lr=generator, betas=(0.0, 0.99), schedule="cosine")}
        return made | ({"critic": slow} if self.adversarial is not None else {})

    def turns(self, loss: Callable[..., Tensor], step: int, images: int) -> Iterable[Turn]:
        """`fake_steps` turns of the fake score, then one of the generator on the method's `loss`.

        `loss(nets, teacher, batch, call=k, judged=b)`: k is the number of calls of a few-step generator, which goes
        round from step to step; b says whether the critic counts yet.
        """
        call = 1 + step % self.calls
        alone = images < self.fake_first
        for _ in range(self.fake_steps - (self.joint and not alone)):
            yield self.fake_turn(call)
        if alone:
            return
        judged = self.adversarial is not None and images >= self.adversarial.after
        turn = Turn(("generator",), functools.partial(loss, call=call, judged=judged))
        if self.joint:
            turn = _joint(turn, self.fake_turn(call), call)
            if self.settle:
                yield self.fake_turn(call)._replace(when=lambda nets: not _settled(nets))
        yield turn._replace(when=_settled if self.settle else None)

    def fake_turn(self, call: int = 1) -> Turn:
        """One descent step of "fake", and of "critic" if there is one, on samples of the frozen generator."""

        def loss(nets: nn.ModuleDict, teacher: Denoiser, batch: Batch) -> Tensor:
            fake, a, scale = cast(Denoiser, nets["fake"]), self.adversarial, self.guidance.fake_turn
            with torch.no_grad():
                x = sample(nets["generator"], batch, call)
            sigma, cond = self.fake_levels.scaled(teacher.unit).quantile(batch.u), batch.cond
            if self.guidance.reads_unlabelled and cond is not None and batch.coin is not None:
                cond = cond * (batch.coin >= self.guidance.dropout)[:, None]
            noisy = perturb(x, sigma, batch.eps)
            if a is None:
                estimate = guided(fake, scale, noisy, sigma, cond)
            else:
                estimate, on_fake = self._judged(nets, teacher, scale, noisy, sigma, cond)
            value = denoising(estimate, x, sigma, fake.sigma_data)
            if self.settle:
                cast(Settling, nets["settling"]).add(value)
            if a is None:
                return value
            assert batch.real is not None
            noisy = perturb(batch.real, sigma, batch.eps)
            on_real = self._logits(nets, teacher, noisy, sigma, cond)
            game = critic_loss(on_real, on_fake, a.loss)
            if a.r1:
                assert batch.direction is not None
                near = nudged(noisy, sigma, batch.direction, fake.sigma_data)
                game = game + a.r1 * r1_penalty(on_real, self._logits(nets, teacher, near, sigma, cond))
            scale_of = edm_weight(sigma, fake.sigma_data) * fake.unit**2 if a.weighting == "edm" else 1.0
            return value + a.critic * scale_of * game

        return Turn(("fake",) if self.adversarial is None else ("fake", "critic"), loss)

    def _reads_teacher(self) -> bool:
        return self.adversarial is not None and self.adversarial.features == "teacher"

    def _logits(
        self, nets: nn.ModuleDict, teacher: Denoiser, noisy: Tensor, sigma: Tensor, cond: Tensor | None
    ) -> Tensor:
        """The critic's logits (B,) on the features of the fake score or teacher."""
        source = teacher if self._reads_teacher() else nets["fake"]
        logits: Tensor = nets["critic"](cast(Networked, source).features(noisy, sigma, cond))
        return logits

    def _judged(
        self, nets: nn.ModuleDict, teacher: Denoiser, scale: float, noisy: Tensor, sigma: Tensor, cond: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The fake score's estimate, guided, and the critic's logits: one pass, if the critic reads the fake score."""
        fake = cast(Denoiser, nets["fake"])
        if self._reads_teacher():
            return guided(fake, scale, noisy, sigma, cond), self._logits(nets, teacher, noisy, sigma, cond)
        estimate, features = traced(fake, noisy, sigma, cond)
        if scale != 1 and cond is not None:
            without = fake(noisy, sigma, torch.zeros_like(cond))
            estimate = without + scale * (estimate - without)
        return estimate, nets["critic"](features)

    def view(
        self,
        nets: nn.ModuleDict,
        teacher: Denoiser,
        batch: Batch,
        levels: Levels,
        call: int | None = None,
        judged: bool = True,
        graph: bool = True,
    ) -> View:
        """What the generator's turn looks at.

        Args:
            levels: law of the noise, in units of sigma_data / 0.5.
            call: of a few-step generator, see `turns`.
            judged: ask the critic, if there is one.
            graph: keep the graph of both estimates to the samples.
        """
        x = sample(nets["generator"], batch, call)
        sigma = levels.scaled(teacher.unit).quantile(batch.u)
        noisy = perturb(x, sigma, batch.eps)
        fake = cast(Denoiser, nets["fake"])
        asked = judged and self.adversarial is not None
        with torch.set_grad_enabled(graph and torch.is_grad_enabled()):
            real = guided(teacher, self.guidance.teacher, noisy, sigma, batch.cond)
            if not asked:
                estimate = guided(fake, self.guidance.fake, noisy, sigma, batch.cond)
                return View(x, sigma, noisy, real, estimate, None)
        estimate, logits = self._judged(nets, teacher, self.guidance.fake, noisy, sigma, batch.cond)
        return View(x, sigma, noisy, real, estimate if graph else estimate.detach(), logits)

    def adversarial_loss(self, view: View) -> Tensor:
        """The generator's adversarial loss (B,), per sample and times its number of coordinates; 0 without a critic."""
        if self.adversarial is None or view.logits is None or self.adversarial.weight == 0:
            return torch.zeros_like(view.sigma)
        return self.adversarial.weight * view.x[0].numel() * generator_loss(view.logits, self.adversarial.loss)

    @torch.no_grad()
    def health(self, nets: nn.ModuleDict, teacher: Denoiser, batch: Batch, levels: Levels) -> dict[str, Tensor]:
        """How the game stands, on a batch that nobody has been trained on.

        Returns:
            gap/SIGMA: ln E |D_fake - D_real|^2 per coordinate, in units of the data's variance, in six bins of the
            noise law, named by their middle level; fake_loss: the fake score's denoising loss; lag: see `lag`.
        """
        view = self.view(nets, teacher, batch, levels, judged=False, graph=False)
        gaps = (view.fake - view.real).flatten(1).square().mean(1) / teacher.sigma_data**2
        bins = (batch.u * HEALTH_BINS).long()
        middles = levels.quantile((torch.arange(HEALTH_BINS) + 0.5) / HEALTH_BINS).tolist()
        told = {f"gap/{s:.3g}": gaps[bins == k].mean().log() for k, s in enumerate(middles) if (bins == k).any()}
        sigma = self.fake_levels.scaled(teacher.unit).quantile(batch.u)
        noisy = perturb(view.x, sigma, batch.eps)
        estimate = guided(cast(Denoiser, nets["fake"]), self.guidance.fake_turn, noisy, sigma, batch.cond)
        return told | {
            "fake_loss": denoising(estimate, view.x, sigma, teacher.sigma_data).mean(),
            "lag": lag(view.x, noisy, sigma, estimate, teacher.sigma_data),
        }


def check_ratio(game: Game, divergence: str) -> None:
    """Refuse a critic whose logit is no log density ratio, for a divergence that needs one.

    Raises:
        ValueError: for the hinge loss, which is least for logits of -1 and 1 whatever the ratio.
    """
    if divergence != "reverse_kl" and game.adversarial is not None and game.adversarial.loss == "hinge":
        raise ValueError(f"game.adversarial.loss: {divergence} needs a density ratio, which softplus and bce give")


def lag(x: Tensor, noisy: Tensor, sigma: Tensor, estimate: Tensor, sigma_data: float) -> Tensor:
    """How far a denoiser is from that of the law of `x`, as a correlation in [0, 1]; 0 for the exact one, of any law.

    The residual x - D(x_sigma) of an exact denoiser has mean 0, and 0 is its inner product with x_sigma (Tweedie). The
    larger of the two, relative to the norms; what chance alone gives the mean of so many samples is taken off.
    """
    r = (x - estimate).flatten(1) * edm_weight(sigma, sigma_data).sqrt()[:, None]
    y = noisy.flatten(1) / torch.sqrt(sigma**2 + sigma_data**2)[:, None]
    power = r.square().sum(1).mean()
    shift = ((r.mean(0).square().sum() - power / len(r)).clamp(min=0) / power).sqrt()
    scale = (r * y).sum(1).mean().abs() / (power * y.square().sum(1).mean()).sqrt()
    return torch.maximum(shift, scale)


def sample(generator: nn.Module, batch: Batch, call: int | None = None) -> Tensor:
    """Samples (B, *shape) of the batch's latents; of a few-step generator after `call` calls, None = all."""
    if batch.x is not None:
        return batch.x
    if isinstance(generator, FewStep):
        x: Tensor = generator.roll(batch.z, batch.cond, call)
    else:
        x = generator(batch.z, batch.cond)
    return x


def _joint(generators: Turn, fakes: Turn, call: int) -> Turn:
    """Both turns in one: their losses are added, on one sample, and neither reaches the other's players."""

    def loss(nets: nn.ModuleDict, teacher: Denoiser, batch: Batch) -> Tensor:
        x = sample(nets["generator"], batch, call)
        with _at_rest(nets[name] for name in fakes.players):
            first = generators.loss(nets, teacher, replace(batch, x=x))
        return first + fakes.loss(nets, teacher, replace(batch, x=x.detach()))

    return Turn((*generators.players, *fakes.players), loss)


@contextlib.contextmanager
def _at_rest(players: Iterable[nn.Module]) -> Iterator[None]:
    """Players of this turn as they are in the turns of others: without dropout or gradients of their weights."""
    awake = [player for player in players if player.training]
    for player in awake:
        player.eval().requires_grad_(False)
    try:
        yield
    finally:
        for player in awake:
            player.train().requires_grad_(True)


class Settling(State):
    """Watches the fake score's loss on fresh samples, each seen before it is learned from: a held-out loss.

    Args:
        window: turns of which means are compared.
    """

    total: Tensor  # losses of this window
    count: Tensor  # and their number
    fresh: Tensor  # number of losses since the last commit
    turns: Tensor  # turns of this window
    before: Tensor  # mean of the window before
    settled: Tensor

    def __init__(self, window: int, improvement: float = 0.01) -> None:
        super().__init__()
        self.window, self.improvement = window, improvement
        for name in ("total", "count", "fresh", "turns", "before", "settled"):
            self.register_buffer(name, torch.tensor(math.inf if name == "before" else 0.0, dtype=torch.float64))

    def add(self, losses: Tensor) -> None:
        """Losses (B,) of one micro-batch."""
        self.total += losses.detach().double().sum()
        self.fresh += len(losses)

    def commit(self) -> None:
        if self.fresh == 0:  # a turn of somebody else
            return
        self.count += self.fresh
        self.turns += 1
        self.fresh.zero_()
        if self.turns == self.window:
            mean = self.total / self.count
            if mean > (1 - self.improvement) * self.before:
                self.settled.fill_(1.0)
            self.before.copy_(mean)
            for buffer in (self.total, self.count, self.turns):
                buffer.zero_()

    def told(self) -> dict[str, Tensor]:
        """Whether the generator plays: 1, or 0."""
        return {"settled": self.settled.clone()}


def _settled(nets: nn.ModuleDict) -> bool:
    return bool(cast(Settling, nets["settling"]).settled)
