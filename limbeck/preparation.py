"""What a distillation makes of its teacher before the first step: real samples, pairs, and students that know it."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace

import torch

from limbeck import config, data, loop
from limbeck.config import Every, Recipe
from limbeck.denoiser import Denoiser
from limbeck.exact import Exact
from limbeck.folder import Stop, Tell
from limbeck.generator import Generator
from limbeck.objective import Pairs
from limbeck.randomness import seed_of
from limbeck.source import NoiseSource, Provider, RealSource, Recorded, provider_of
from limbeck.stock import teacher_pairs
from limbeck.students import trainer_of
from limbeck.teaching import Imitation
from limbeck.train import Trainer


def provider_for(recipe: Recipe, teacher: Denoiser) -> Provider | Recorded | None:
    """Real samples for a critic; None if they are to be drawn from the teacher's sampler.

    Raises:
        ValueError: if the data do not fit.
    """
    if recipe.real.source.startswith("teacher:"):
        return None
    if recipe.real.source == "auto" and (provider := exact_provider(teacher)):
        return provider
    samples = data.load(recipe.real.data or recipe.teacher or "", recipe.size)
    if samples.shape != teacher.shape:
        raise ValueError(f"real.data: samples have shape {samples.shape}, the teacher's {teacher.shape}")
    if teacher.contexts:
        width = 0 if samples.contexts is None else samples.contexts.shape[1]
        if samples.contexts is None or width != teacher.classes:
            raise ValueError(f"real.data: has {width} numbers a context (y), the teacher {teacher.classes}")
        return Recorded(samples.x, samples.contexts)
    if samples.y is not None:
        missing = sorted(set(range(teacher.classes)) - set(samples.y.tolist()))
        if missing:
            raise ValueError(f"real.data: holds no sample of class {missing[0]}, and the teacher has {teacher.classes}")
    return provider_of(samples.x, samples.y)


def exact_provider(teacher: Denoiser) -> Provider | None:
    """The samples of an exact teacher."""
    if isinstance(teacher, Exact):
        return lambda n, rng, cond: teacher.sample(n, rng, cond)
    return None


WARM_SAMPLES = 5000  # teacher samples on which a student's network learns to imitate it


@dataclass(frozen=True)
class Preparation:
    """What a distillation makes of its teacher before the first step. An interrupted one goes on where it was."""

    teacher: Denoiser
    template: Denoiser
    generator: Generator | None  # with which the student starts, if it is no copy of the template
    noise: NoiseSource
    provider: Provider | Recorded | None

    def __call__(self, job: loop.Job, stop: Stop, tell: Tell) -> tuple[loop.Job, float]:
        """The job with its real samples, pairs and a trainer whose players know the teacher; and the seconds spent."""
        method, provider = job.recipe.method, self.provider
        began = time.perf_counter()
        if method.needs_real and provider is None:
            provider = self._teacher_provider(job, int(job.recipe.real.source.partition(":")[2]), tell)
        game = getattr(method, "game", None)
        guidance = game.guidance.teacher if game is not None else 1.0
        pairs = self._pairs(job, method.pairs, tell, guidance) if hasattr(method, "pairs") else None
        if provider is not None or pairs is not None:
            job = replace(job, source=RealSource(self.noise, provider, pairs))
        seconds = time.perf_counter() - began
        fresh = self.template is not self.teacher and job.trainer.step == 0
        if fresh and job.recipe.warm_start and getattr(method, "warm_start", False):
            trainer, spent = self._warm_start(job, stop, tell)
            return replace(job, trainer=trainer), seconds + spent
        return job, seconds

    def _warm_start(self, job: loop.Job, stop: Stop, tell: Tell) -> tuple[Trainer, float]:
        """A trainer whose players are copies of a template that imitates the teacher: all these methods start there."""
        recipe, teacher = job.recipe, self.teacher
        steps = recipe.warm_start
        tell(f"fitting the student's network to the teacher: {steps:,} steps")
        provider = exact_provider(teacher) or self._teacher_provider(job, WARM_SAMPLES, tell)
        game = getattr(recipe.method, "game", None)
        guided = game is not None and game.guidance.reads_unlabelled
        blind = self.generator is not None and self.generator.classes == 0
        imitation = Imitation(unlabelled=0.1 if guided or blind else 0.0)  # then its estimate without a label is read
        noise = replace(self.noise, latent_shape=(1,), classes=teacher.classes)
        every = Every(log=recipe.every.log, save=recipe.every.save, sample=0)
        key = seed_of(job.identity, json.dumps(config.to_table(recipe)))
        warm = loop.Job(
            replace(recipe, method=imitation, steps=steps, every=every),
            job.out / f"warm-start-{key:016x}",
            Trainer(
                imitation, teacher, self.template, steps=steps, seed=recipe.seed, device=job.trainer.device
            ),
            RealSource(noise, provider), job.identity, "denoiser", None, parts=job.parts,
        )  # fmt: skip
        warm.out.mkdir(exist_ok=True)
        seconds, _, monitor = loop.resume(warm, tell)
        seconds, _ = loop.play(warm, seconds, None, monitor, stop, tell)
        self.template.load_state_dict(warm.trainer.ema.whole().state_dict())
        trainer = trainer_of(recipe, teacher, self.template, self.generator)
        return trainer, seconds

    def _teacher_provider(self, job: loop.Job, count: int, tell: Tell) -> Provider | Recorded:
        pairs = self._pairs(job, count, tell)
        if pairs.cond is None:
            return provider_of(pairs.x, None)
        if self.teacher.contexts:
            return Recorded(pairs.x, pairs.cond)
        missing = torch.nonzero(pairs.cond.sum(0) == 0)[:, 0].tolist()
        if missing:
            raise ValueError(f"real.source: teacher:{count} holds no sample of class {missing[0]}; ask for more")
        return provider_of(pairs.x, pairs.cond.argmax(1))

    def _pairs(self, job: loop.Job, count: int, tell: Tell, guidance: float = 1.0) -> Pairs:
        steps = job.recipe.evaluate.teacher_steps

        def drawn(done: int) -> None:
            if done == count or done % 5000 == 0:
                tell(f"{done:,} of {count:,} teacher samples, {2 * steps - 1} network calls each")

        place = job.out / "teacher-samples"
        return teacher_pairs(job.trainer.teacher, count, job.recipe.seed, steps, place, drawn, guidance)
