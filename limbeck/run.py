"""A run: one visible loop around the trainer, and the folder that it fills.

A run folder holds recipe.toml (resolved), log.jsonl, checkpoints/, samples/, and at the end the model as safetensors,
report.json and report.html. The same call again continues where the folder stands; a finished run says so.

Under `torchrun` all processes take the same steps, each on its share of the batch; the first one writes.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import math
import os
import shutil
import time
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

import limbeck
from limbeck import (
    artifact,
    checkpoint,
    config,
    data,
    doctor,
    folder,
    health,
    methods,
    networks,
    refine,
    resources,
    summary,
    teachers,
)
from limbeck.config import Every, Real, Recipe
from limbeck.denoiser import Denoiser, Networked, Preconditioned
from limbeck.distributed import gather, largest, rank_and_world, wait_for_all
from limbeck.evaluate import VALIDATION, Judge
from limbeck.evaluate.draws import generate, latents
from limbeck.exact import Empirical, Gaussian, Mixture, Policy
from limbeck.features import Classifier
from limbeck.files import check_folder, write_atomically
from limbeck.folder import Stop, Stopped, Tell
from limbeck.generator import Direct, Generator
from limbeck.given import Given
from limbeck.health import Monitor
from limbeck.machine import versions
from limbeck.noise import Karras
from limbeck.objective import Pairs
from limbeck.pictures import overview, png
from limbeck.randomness import seed_of
from limbeck.source import DataSource, NoiseSource, Provider, RealSource, in_parts, provider_of
from limbeck.stock import teacher_pairs
from limbeck.teaching import Imitation
from limbeck.train import NonFinite, Source, Trainer

WATCHED = ("fd_feature", "mmd")  # the distance by which a run's best step is chosen


@dataclass(frozen=True)
class Job:
    """What differs between distilling and teaching, to the loop."""

    recipe: Recipe
    out: Path
    trainer: Trainer
    source: Source
    identity: str  # fingerprint of the teacher or data
    product: str  # kind of the file that the run makes
    judge: Judge | None
    prepare: Preparation | None = None  # what has to be made before the first step, in a folder that is ours
    network: type[nn.Module] | None = None  # the caller's own class
    held_out: data.Data | None = None  # what a classifier is scored on
    given: str = ""  # fingerprint of a given generator
    parts: int = 1  # micro-batches

    @property
    def origin(self) -> str:
        """What the run began with: it is refused to go on with anything else."""
        return self.identity + self.given

    def in_parts(self, parts: int) -> Job:
        """The job with so many micro-batches."""
        prepare = self.prepare and replace(self.prepare, noise=in_parts(self.prepare.noise, parts))
        return replace(self, parts=parts, source=in_parts(self.source, parts), prepare=prepare)

    @property
    def best_file(self) -> Path:
        """The model of the checkpoint that scored best while the run was watched."""
        return self.out / f"{self.product}-best.safetensors"


def distill(
    teacher: str | Denoiser,
    method: Any = "pid",
    *,
    out: str | Path,
    tell: Tell = print,
    network: type[nn.Module] | None = None,
    generator: Generator | Mapping[str, Any] | None = None,
    **keys: Any,
) -> dict[str, Any]:
    """Distil `teacher` into a one-step generator, in the run folder `out`.

    Args:
        teacher: a name or file (see `teachers.load`), or a denoiser.
        method: a method's name, {"name": ..., fields}, or an objective.
        out: run folder; an existing one is continued.
        tell: receives progress, a line at a time.
        network: the caller's own network class, for files of teacher and generator whose network is none of Limbeck's.
        generator: a generator to refine, e.g. `limbeck.Given(gan, latent_shape=(64,), shape=(1, 28, 28))`, of which the
            run trains a copy; or the recipe's table `generator`.
        keys: recipe keys, e.g. steps=300, optimizer={"generator": {"lr": 1e-4}}, **{"every.save": 100}.

    Returns:
        The content of report.json.

    Raises:
        ValueError: for bad input, naming the key; nothing is written then.
        Stopped: after Ctrl-C or SIGTERM, when the run has been saved.
        NonFinite: when a loss or gradient is NaN or Inf; the last checkpoint is intact.
    """
    named = teacher if isinstance(teacher, str) else _class_of(teacher)
    given = None if isinstance(generator, Mapping) else generator
    if generator is not None:
        keys["generator"] = generator if isinstance(generator, Mapping) else {"file": _class_of(generator)}
    table = _table({"teacher": named, "method": method}, keys)
    recipe = config.resolve(table, methods.METHODS, foreign=True)
    check_folder(out)
    own = None if isinstance(teacher, str) else teacher
    return run_distillation(recipe, Path(out), tell, own, network, generator=given)


def run_distillation(
    recipe: Recipe,
    out: Path,
    tell: Tell,
    teacher: Denoiser | None = None,
    network: type[nn.Module] | None = None,
    judge: Judge | None = None,
    generator: Generator | None = None,
) -> dict[str, Any]:
    """`distill` for a resolved recipe; `teacher`, `judge` and `generator` replace those that the recipe names."""
    return _run(distillation(recipe, out, tell, teacher, network, judge, generator), tell)


def distillation(
    recipe: Recipe,
    out: Path,
    tell: Tell,
    teacher: Denoiser | None = None,
    network: type[nn.Module] | None = None,
    judge: Judge | None = None,
    generator: Generator | None = None,
) -> Job:
    """The job of a recipe, checked as far as it can be before anything is written; arguments as `run_distillation`."""
    if recipe.data is not None:
        raise ValueError("data: belongs to `limbeck teach`; a distillation has a teacher")
    if recipe.teacher is None:
        raise ValueError("teacher: is missing")
    name = recipe.teacher
    teacher = teachers.load(name, network) if teacher is None else teacher
    recipe = _fit_levels(recipe, teacher, tell)
    given = generator if generator is not None else refine.named(recipe, network)
    if given is not None:
        given, recipe = refine.accepted(given, teacher), refine.patient(recipe)
        if isinstance(given, Given):
            network = type(given.network)
    template = student_template(recipe, teacher, network if given is None else None)
    adversarial = getattr(getattr(recipe.method, "game", None), "adversarial", None)
    if adversarial is not None and adversarial.features == "teacher" and template is not teacher:
        raise ValueError(
            "method.game.adversarial.features: teacher needs a student of the teacher's own network, so leave template "
            "out; or take fake"
        )
    needs_data = recipe.real.source == "data" or (recipe.real.source == "auto" and not _exact_provider(teacher))
    if recipe.real.data is not None and not (recipe.method.needs_real and needs_data):
        raise ValueError("real.data: nothing reads it, with this method and teacher and real.source; leave it out")
    data.check_size(recipe.size, recipe.evaluate.data, recipe.real.data)
    if judge is None:
        judge = summary.judge_for(name, recipe.evaluate, teacher, recipe.size)
    start = given or direct_generator(recipe, teacher)
    trainer = _trainer(recipe, teacher, template, start)
    student = trainer.nets[recipe.method.product]
    assert isinstance(student, Generator)
    noise = NoiseSource(
        student.shape, student.latent_shape, recipe.batch, recipe.seed, student.classes, teacher.contexts,
        stratified=recipe.stratified, antithetic=recipe.antithetic,
    )  # fmt: skip
    provider = _provider(recipe, teacher) if recipe.method.needs_real else None
    prepare = Preparation(teacher, template, start, noise, provider)
    job = Job(
        recipe, out, trainer, noise, artifact.fingerprint(teacher), "generator", judge, prepare, network,
        given="" if given is None else artifact.fingerprint(given),
    )  # fmt: skip
    check(job)
    return job.in_parts(max(1, recipe.micro_batches))


def _provider(recipe: Recipe, teacher: Denoiser) -> Provider | None:
    """Real samples for a critic; None if they are to be drawn from the teacher's sampler.

    Raises:
        ValueError: if the data do not fit.
    """
    if recipe.real.source.startswith("teacher:"):
        return None
    if recipe.real.source == "auto" and (provider := _exact_provider(teacher)):
        return provider
    samples = data.load(recipe.real.data or recipe.teacher or "", recipe.size)
    if samples.shape != teacher.shape:
        raise ValueError(f"real.data: samples have shape {samples.shape}, the teacher's {teacher.shape}")
    return provider_of(samples.x, samples.y)


def _exact_provider(teacher: Denoiser) -> Provider | None:
    """The samples of an exact teacher."""
    if isinstance(teacher, Policy):
        return lambda n, rng, contexts: teacher.sample(n, rng, contexts)
    if isinstance(teacher, Gaussian | Mixture | Empirical):
        return lambda n, rng, labels: teacher.sample(n, rng)
    return None


WARM_SAMPLES = 5000  # teacher samples on which a student's network learns to imitate it


@dataclass(frozen=True)
class Preparation:
    """What a distillation makes of its teacher before the first step. An interrupted one goes on where it was."""

    teacher: Denoiser
    template: Denoiser
    generator: Generator | None  # with which the student starts, if it is no copy of the template
    noise: NoiseSource
    provider: Provider | None

    def __call__(self, job: Job, stop: Stop, tell: Tell) -> tuple[Job, float]:
        """The job with its real samples, pairs and a trainer whose players know the teacher; and the seconds spent."""
        method, provider = job.recipe.method, self.provider
        began = time.perf_counter()
        if method.needs_real and provider is None:
            provider = self._teacher_provider(job, int(job.recipe.real.source.partition(":")[2]), tell)
        pairs = self._pairs(job, method.pairs, tell) if hasattr(method, "pairs") else None
        if provider is not None or pairs is not None:
            job = replace(job, source=RealSource(self.noise, provider, pairs))
        seconds = time.perf_counter() - began
        fresh = self.template is not self.teacher and job.trainer.step == 0
        if fresh and job.recipe.warm_start and getattr(method, "warm_start", False):
            trainer, spent = self._warm_start(job, stop, tell)
            return replace(job, trainer=trainer), seconds + spent
        return job, seconds

    def _warm_start(self, job: Job, stop: Stop, tell: Tell) -> tuple[Trainer, float]:
        """A trainer whose players are copies of a template that imitates the teacher: all these methods start there."""
        recipe, teacher = job.recipe, self.teacher
        steps = recipe.warm_start
        tell(f"fitting the student's network to the teacher: {steps:,} steps")
        provider = _exact_provider(teacher) or self._teacher_provider(job, WARM_SAMPLES, tell)
        imitation = Imitation()
        noise = replace(self.noise, latent_shape=(1,), classes=teacher.classes)
        every = Every(log=recipe.every.log, save=recipe.every.save, sample=0)
        key = seed_of(job.identity, json.dumps(config.to_table(recipe)))
        warm = Job(
            replace(recipe, method=imitation, steps=steps, every=every),
            job.out / f"warm-start-{key:016x}",
            Trainer(imitation, teacher, self.template, steps=steps, seed=recipe.seed),
            RealSource(noise, provider), job.identity, "denoiser", None, parts=job.parts,
        )  # fmt: skip
        warm.out.mkdir(exist_ok=True)
        seconds, _, monitor = _resume(warm, tell)
        seconds, _ = _loop(warm, seconds, None, monitor, stop, tell)
        self.template.load_state_dict(warm.trainer.ema.whole().state_dict())
        trainer = _trainer(recipe, teacher, self.template, self.generator)
        wait_for_all()
        if _first():
            shutil.rmtree(warm.out)
        return trainer, seconds

    def _teacher_provider(self, job: Job, count: int, tell: Tell) -> Provider:
        pairs = self._pairs(job, count, tell)
        if pairs.cond is None:
            return provider_of(pairs.x, None)
        missing = torch.nonzero(pairs.cond.sum(0) == 0)[:, 0].tolist()
        if missing:
            raise ValueError(f"real.source: teacher:{count} holds no sample of class {missing[0]}; ask for more")
        return provider_of(pairs.x, pairs.cond.argmax(1))

    def _pairs(self, job: Job, count: int, tell: Tell) -> Pairs:
        steps = job.recipe.evaluate.teacher_steps

        def drawn(done: int) -> None:
            if done == count or done % 5000 == 0:
                tell(f"{done:,} of {count:,} teacher samples, {2 * steps - 1} network calls each")

        return teacher_pairs(self.teacher, count, job.recipe.seed, steps, job.out / "teacher-samples", drawn)


def teach(
    source: str,
    method: Any = "denoising",
    *,
    out: str | Path,
    tell: Tell = print,
    network: type[nn.Module] | None = None,
    **keys: Any,
) -> dict[str, Any]:
    """Train a teacher (method "denoising"), a feature network ("classification") or a small GAN ("gan") on data.

    Arguments, result and errors as `distill`; `source` is a data set (see `data.load`), `network` a class for the
    denoiser, built with the keys `template`.
    """
    table = _table({"data": source, "method": method}, keys)
    check_folder(out)
    return run_teaching(config.resolve(table, config.TEACHING), Path(out), tell, network)


def _table(table: dict[str, Any], keys: Mapping[str, Any]) -> dict[str, Any]:
    """`table` with dotted `keys`; the caller's dictionaries stay as they are."""
    if isinstance(table["method"], str):
        table["method"] = {"name": table["method"]}
    for key, value in {**table, **keys}.items():
        config.set_dotted(table, key, copy.deepcopy(value) if isinstance(value, dict) else value)
    return table


def run_teaching(recipe: Recipe, out: Path, tell: Tell, network: type[nn.Module] | None = None) -> dict[str, Any]:
    """`teach` for a resolved recipe."""
    return _run(teaching(recipe, out, network), tell)


def teaching(recipe: Recipe, out: Path, network: type[nn.Module] | None = None) -> Job:
    """The job of a recipe, checked as far as it can be before anything is written."""
    if recipe.teacher is not None:
        raise ValueError("teacher: belongs to `limbeck distill`; teaching has data")
    if recipe.generator:
        raise ValueError("generator: belongs to `limbeck distill`; teaching makes none")
    if recipe.data is None:
        raise ValueError("data: is missing")
    if recipe.real != Real():
        raise ValueError("real: belongs to `limbeck distill`; teaching reads its data")
    data.check_size(recipe.size, recipe.data, recipe.evaluate.data)
    samples = data.load(recipe.data, recipe.size)
    if samples.sigma_data == 0:
        raise ValueError(f"{recipe.data}: all values are 0; sigma_data must be positive")
    # carries the data's shape and scale to the objective, which builds its own network if it trains no denoiser; the
    # levels are those of EDM's samplers, which its training law covers
    reach = Karras().scaled(samples.sigma_data / 0.5)
    plain = Denoiser(samples.shape, samples.classes, samples.sigma_data, reach.sigma_min, reach.sigma_max)
    product = recipe.method.product
    template = student_template(recipe, plain, network) if product == "denoiser" else plain
    judge = None
    if product != "classifier":
        judge = summary.judge_for(recipe.data, recipe.evaluate, template, recipe.size)
    trainer = _trainer(recipe, plain, template)
    student = trainer.nets[product]
    latent_shape = student.latent_shape if isinstance(student, Generator) else samples.shape
    noise = NoiseSource(
        samples.shape, latent_shape, recipe.batch, recipe.seed, samples.classes,
        unlabelled=getattr(recipe.method, "label_dropout", 0.0),
        stratified=recipe.stratified, antithetic=recipe.antithetic,
    )  # fmt: skip
    train, held_out = samples.split() if product == "classifier" else (samples, None)
    source = DataSource(noise, train.x, train.y)
    job = Job(recipe, out, trainer, source, samples.fingerprint(), product, judge, network=network, held_out=held_out)
    check(job)
    return job.in_parts(max(1, recipe.micro_batches))


def student_template(recipe: Recipe, teacher: Denoiser, own: type[nn.Module] | None = None) -> Denoiser:
    """The denoiser of which players are copies: the recipe's network, the teacher's own, the caller's class `own`, or
    one for the shape.

    A UNet2D asked for by name and without arguments is the teacher's, if it has one: its weights, in EDM's
    preconditioning and the times of diffusers' consistency models.
    """
    options = dict(recipe.template)
    name = options.pop("network", None)
    inner: Any = getattr(teacher, "model", None)  # of a Rescaled
    built = isinstance(teacher, Networked) or hasattr(inner, "arguments")
    if name is None and not options and built:
        return teacher
    facts = (teacher.shape, teacher.classes, teacher.sigma_data, teacher.sigma_min, teacher.sigma_max)
    if name == "unet2d" and not options and isinstance(inner, networks.UNet2D):
        network: nn.Module = networks.UNet2D(inner.arguments["config"])
        network.load_state_dict(inner.state_dict())
        return Preconditioned(network, *facts, noise_unit=1.0)
    if name is None:
        name = "mlp" if len(teacher.shape) < 3 or max(teacher.shape[1:]) <= 8 else "dit"
        name = name if own is None else networks.OWN
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        if name == networks.OWN:
            network = networks.build(name, options, own)
        else:
            network = networks.for_samples(name, teacher.shape, teacher.classes, options)
    return Preconditioned(network, *facts, noise_unit=1.0 if name == "unet2d" else None)


def _fit_levels(recipe: Recipe, teacher: Denoiser, tell: Tell) -> Recipe:
    """The recipe with the method's default levels cut to the teacher's range.

    Raises:
        ValueError: if levels that are not the default leave that range.
    """
    levels = getattr(recipe.method, "levels", None)
    fields = {field.name: field for field in dataclasses.fields(recipe.method)}
    default: Any = fields["levels"].default_factory if "levels" in fields else dataclasses.MISSING
    if isinstance(levels, Karras) and default is not dataclasses.MISSING and levels == default():
        low, high = (
            max(levels.sigma_min, teacher.sigma_min / teacher.unit),
            min(levels.sigma_max, teacher.sigma_max / teacher.unit),
        )
        if low > levels.sigma_min * (1 + 1e-6) or high < levels.sigma_max * (1 - 1e-6):  # not by rounding alone
            tell(f"method.levels: cut to the teacher's range, {low:g} to {high:g}")
            cut = dataclasses.replace(levels, sigma_min=low, sigma_max=high)
            recipe = dataclasses.replace(recipe, method=dataclasses.replace(recipe.method, levels=cut))
    _check_levels(recipe, teacher)
    return recipe


def direct_generator(recipe: Recipe, teacher: Denoiser) -> Direct | None:
    """The generator that the recipe describes; None leaves it to the method.

    Raises:
        ValueError: naming the `generator` key that is wrong.
    """
    options = dict(recipe.generator)
    if not options:
        return None
    noise = options.pop("noise", 0.0)
    if not isinstance(noise, int | float):
        raise ValueError(f"generator.noise: must be a number, got {noise!r}")
    if "network" not in options:
        raise ValueError("generator.network: is missing")
    try:
        home = student_template(dataclasses.replace(recipe, template=options), teacher)
    except ValueError as error:
        raise ValueError(str(error).replace("template", "generator", 1)) from None
    assert isinstance(home, Preconditioned)
    return Direct(home, noise)


def _check_levels(recipe: Recipe, teacher: Denoiser) -> None:
    levels = getattr(recipe.method, "levels", None)
    for name, sign in (("sigma_min", 1), ("sigma_max", -1)):
        value = getattr(levels, name, None)
        if value is None:
            continue
        asked, bound = value * teacher.unit, getattr(teacher, name)
        if sign * asked < sign * bound * (1 - 1e-6 * sign):
            raise ValueError(
                f"method.levels.{name}: {value:g} is level {asked:g} of this data, outside the teacher's range of "
                f"{teacher.sigma_min:g} to {teacher.sigma_max:g}"
            )


def _trainer(recipe: Recipe, teacher: Denoiser, template: Denoiser, generator: Generator | None = None) -> Trainer:
    return Trainer(
        recipe.method, teacher, template, recipe.optimizer,
        steps=recipe.steps, ema=recipe.ema, clip=recipe.clip, seed=recipe.seed,
        generator=copy.deepcopy(generator),
        split=_shards().split if recipe.sharded and rank_and_world()[1] > 1 else None,
        precision=recipe.precision, checkpointing=recipe.checkpointing,
    )  # fmt: skip


def check(job: Job) -> None:
    """Raise ValueError for a model that cannot be stored, or a folder that holds something else."""
    artifact.describe(job.trainer.ema.module)
    world, parts = rank_and_world()[1], max(1, job.recipe.micro_batches)
    if job.recipe.batch < world * parts:
        raise ValueError(
            f"batch: {job.recipe.batch} samples are too few for {world} processes of micro_batches = {parts}"
        )
    _check_folder(job.out, config.to_table(job.recipe))


def fitted(job: Job, needs: resources.Needs, tell: Tell) -> Job:
    """The job in as few micro-batches as fit the free memory, if the recipe leaves their number open.

    A run that is continued keeps the number it had, as long as that fits.
    """
    free, world = resources.free_memory(), rank_and_world()[1]
    if job.recipe.micro_batches or free is None:
        return job
    share, before = -(-job.recipe.batch // world), 0
    with suppress(OSError, ValueError, KeyError, TypeError, IndexError):
        newest = sorted((job.out / "checkpoints").glob("ckpt-*"))[-1]
        before = int(json.loads((newest / "state.json").read_text())["micro_batches"])
    chosen = max(needs.fewest(share, round(resources.ROOM * free)) or share, before)
    parts = min(largest(chosen), job.recipe.batch // world)  # all processes take the same number
    tell(
        f"micro_batches: {parts}, of up to {-(-share // parts):,} samples each: about "
        f"{needs.memory(share, parts) / resources.GIB:.2g} GiB, with {free / resources.GIB:.2g} GiB free"
    )
    return job.in_parts(parts)


def _run(job: Job, tell: Tell) -> dict[str, Any]:
    recipe, out = job.recipe, job.out
    table = config.to_table(recipe)
    first = _first()
    if not first:
        tell = _silent
    wait_for_all()  # all have looked at the folder before anybody writes to it
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    opinion = None
    if recipe.teacher is not None and first:
        opinion = doctor.preflight(job.trainer.teacher, out / "doctor.json", job.identity, tell)
    needs, share = None, -(-recipe.batch // rank_and_world()[1])
    if recipe.micro_batches == 0 or not (out / folder.MANIFEST).is_file():
        needs = resources.measure(job.trainer, job.source)
        job = fitted(job, needs, tell)
        resources.check(needs, share, job.parts, recipe.keep, out)
    out.mkdir(parents=True, exist_ok=True)
    with folder.lock(out) if first else nullcontext(), folder.signals() as stop, resources.explained(needs, share):
        broken = folder.damaged(out)
        for name in broken:
            tell(f"{out / name}: damaged or missing; made again")
        seconds, best, monitor = _resume(job, tell)
        stop.step = job.trainer.step
        report = None if broken else _finished(job, table)
        wait_for_all()  # all have read what is there
        if first:
            write_atomically(out / "recipe.toml", config.dump_toml(table))
        if opinion is not None:
            write_atomically(out / "doctor.json", opinion)
        if report is not None:
            if first:
                folder.seal(out)  # the recipe's free keys may be others now
            tell(f"{out}: finished at step {job.trainer.step}; see {out / 'report.html'}")
            return report
        if first:
            (out / folder.MANIFEST).unlink(missing_ok=True)
        if needs is not None and job.trainer.step == 0 and needs.large(share, job.parts):
            tell(needs.line(share, job.parts, recipe.keep))
        if job.prepare is not None:
            job, spent = job.prepare(job, stop, tell)
            seconds += spent
        if recipe.compile and job.trainer.step < recipe.steps:
            with stop.waiting(True):
                job.trainer.compile(job.source, tell)
        seconds, best = _loop(job, seconds, best, monitor, stop, tell)
        model = job.trainer.ema.whole()
        facts = {**_facts(job), "seconds": round(seconds, 1)}
        if first:
            artifact.save(out / f"{job.product}.safetensors", job.product, model, facts)
        wait_for_all()
        report = summary.conclude(job, model, seconds, best, tell)
        if first:
            folder.seal(out)
        return report


def _first() -> bool:
    """Is this the process that writes?"""
    return rank_and_world()[0] == 0


def _silent(line: str) -> None:
    """The `tell` of the other processes."""


def _facts(job: Job) -> dict[str, Any]:
    """What a model file says of where it comes from."""
    return {
        "recipe": config.to_table(job.recipe),
        "step": job.trainer.step,
        "images": job.trainer.images,
        "made_by": limbeck.__version__,
    }


def _finished(job: Job, table: Mapping[str, Any]) -> dict[str, Any] | None:
    """The report of this run as it is asked for; None if there is anything left to train, store or score."""
    if job.trainer.step < job.recipe.steps or not (job.out / folder.MANIFEST).is_file():
        return None
    try:
        report: dict[str, Any] = json.loads((job.out / "report.json").read_text())
        same = report["steps"] == job.trainer.step and report["recipe"]["evaluate"] == table["evaluate"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return report if same else None


def _loop(
    job: Job, seconds: float, best: Best | None, monitor: Monitor, stop: Stop, tell: Tell
) -> tuple[float, Best | None]:
    """Play until the last step, going back where the recipe says so. Returns as `_sitting`."""
    policy, returns = job.recipe.health, 0
    while True:
        try:
            return _sitting(job, seconds, best, monitor, stop, tell)
        except NonFinite as error:
            kept, returns = _dump(job, error), returns + 1
            if policy.nonfinite == "stop" or returns > policy.rollbacks:
                hint = f"; `limbeck replay {job.out}` says where" if kept else ""
                raise NonFinite(f"{error}{hint}", error.turn, error.losses) from None
            tell(f"warning: {error}")
        factor = policy.shrink * job.trainer.rate_factor
        seconds, best, monitor = _resume(job, tell)
        job.trainer.rate_factor = factor
        tell(f"back at step {job.trainer.step:,}, with learning rates times {factor:g}")


def _sitting(
    job: Job, seconds: float, best: Best | None, monitor: Monitor, stop: Stop, tell: Tell
) -> tuple[float, Best | None]:
    """Play until the last step. Returns the seconds spent, those of earlier sittings included, and the best step."""
    recipe, trainer = job.recipe, job.trainer
    began, first = time.perf_counter() - seconds, trainer.step
    path = job.out / "log.jsonl"
    looks: health.Looks | None = None
    monitored = recipe.teacher is not None and job.product == "generator"
    with (
        summary.progress(recipe, trainer.step) as moved,
        open(path if _first() else os.devnull, "a", buffering=1) as log,
        stop.waiting(True),
    ):

        def write(row: Mapping[str, Any]) -> None:
            spent = round(time.perf_counter() - began, 2)
            log.write(json.dumps({"step": trainer.step, "images": trainer.images, "seconds": spent, **row}) + "\n")

        def watch() -> Best | None:
            """The best step, this one included. A signal cuts the evaluation short: it is made on resuming."""
            try:
                # of several processes none may leave alone
                with stop.waiting(rank_and_world()[1] > 1):
                    metrics = _watch(job)
            except Stopped:
                return best
            write({"metrics": metrics})
            return _keep_best(job, best, metrics)

        def save() -> None:
            _save(job, time.perf_counter() - began, best, log, monitor)

        watched = Due(first, recipe.steps)(recipe.every.evaluate) and job.judge is not None
        if first and watched and not _was_watched(path, first):
            best = watch()
        if first == 0 and recipe.health.nonfinite == "rollback":
            save()  # where to go back to
        while trainer.step < recipe.steps:
            told = trainer.advance(job.source)
            stop.signum = largest(stop.signum)  # a signal may reach processes in different steps
            stop.step = trainer.step
            due = Due(trainer.step, recipe.steps)
            if due(recipe.every.log):
                write({name: float(value) for name, value in (told | _health(job)).items()})
            if due(recipe.every.sample):
                _draw(job)
            if due(recipe.every.evaluate) and job.judge is not None:
                best = watch()
            if due(recipe.health.every) and monitored:
                looks = looks or _looks(job)
                for name in monitor.add(looks.look(recipe.method, trainer.nets, trainer.teacher)):
                    rule = health.RULES[name]
                    tell(f"warning: step {trainer.step}: {name}: {rule.meaning}; {rule.advice}")
                    write({"warning": name})
            if due(recipe.every.save) or stop.signum or trainer.step == recipe.steps:
                save()
            moved(trainer.step, told)
            if trainer.step == first + TIMED:
                left = (time.perf_counter() - began - seconds) / TIMED * (recipe.steps - trainer.step)
                if left > 60:
                    tell(f"about {resources.duration(left)} to go")
            if stop.signum:
                raise Stopped(stop.signum, trainer.step)
    if trainer.step > first:
        tell(f"{trainer.step - first:,} steps in {time.perf_counter() - began - seconds:.0f} s")
    return time.perf_counter() - began, best


def _looks(job: Job) -> health.Looks:
    """What the monitors look at."""
    network = getattr(job.judge, "network", None)
    classifier = network if isinstance(network, Classifier) else None
    return health.Looks.of(job.source, job.trainer.teacher, job.recipe.evaluate.teacher_steps, classifier)


def _dump(job: Job, error: NonFinite) -> bool:
    """Keep the turn that went wrong, for `limbeck replay`: weights before it, and its batches. Could it be kept?"""
    if not (job.out / "recipe.toml").is_file():  # a student's warm start
        return False
    own: dict[str, Tensor] = {}
    for number, batch in enumerate(job.source(job.trainer.step, error.turn)):
        tensors = {f.name: v for f in dataclasses.fields(batch) if isinstance(v := getattr(batch, f.name), Tensor)}
        if batch.pairs is not None:
            tensors |= {f"pairs.{name}": v for name, v in batch.pairs._asdict().items() if v is not None}
        own |= {f"rows {number} {name}": value for name, value in tensors.items()}
    every = gather({**own, "rows losses": error.losses})
    batches: dict[str, dict[str, Tensor]] = {}
    for rank, theirs in enumerate(every):
        for name, value in theirs.items():
            if name != "rows losses":
                _, part, field = name.split()
                batches.setdefault(str(rank * job.parts + int(part)), {})[field] = value
    state = {
        "trainer": job.trainer.state_dict(), "turn": error.turn, "batches": batches,
        "losses": torch.cat([theirs["rows losses"] for theirs in every]),
        "identity": job.origin, "threads": torch.get_num_threads(), "versions": versions(),
    }  # fmt: skip
    try:
        _store(job, NONFINITE, state, keep=1)
    except OSError:  # a full disk is not what stops this run
        return False
    return True


def _was_watched(log: Path, step: int) -> bool:
    """Are the scores of this step in the log?"""
    rows = log.read_text().splitlines()
    return any('"metrics"' in row for row in rows if folder.step_of(row) == step)


TIMED = 20  # steps after which the rest is estimated
NONFINITE = "nonfinite"  # the folder of a step to replay
HEALTH = 2**20  # the turn under which batches are drawn that nobody is trained on


def _health(job: Job) -> dict[str, Tensor]:
    """How a method's players stand, as far as the method can say."""
    look = getattr(job.recipe.method, "health", None)
    if look is None:
        return {}
    batch = next(iter(job.source(job.trainer.step, HEALTH)))
    told = look(job.trainer.nets, job.trainer.teacher, batch)
    return {f"health/{name}": value for name, value in told.items()}


@dataclass(frozen=True)
class Best:
    """The watched step with the lowest distance."""

    step: int
    metric: str
    value: float


def _keep_best(job: Job, best: Best | None, metrics: Mapping[str, float]) -> Best | None:
    """Store the model if its watched score is the lowest so far."""
    metric = next((name for name in WATCHED if name in metrics), None)
    if metric is None or math.isnan(metrics[metric]) or (best is not None and best.value <= metrics[metric]):
        return best
    model = job.trainer.ema.whole()
    if _first():
        artifact.save(job.best_file, job.product, model, _facts(job))
    return Best(job.trainer.step, metric, metrics[metric])


@dataclass(frozen=True)
class Due:
    """Is an event of period `every` due at this step? 0 = never; the last step is always due for others."""

    step: int
    last: int

    def __call__(self, every: int) -> bool:
        return every > 0 and (self.step % every == 0 or self.step == self.last)


def _save(job: Job, seconds: float, best: Best | None, log: IO[str], monitor: Monitor) -> None:
    state = {
        "trainer": job.trainer.state_dict(),
        "seconds": seconds,
        "best": dataclasses.asdict(best) if best else None,
        "log": folder.mark(log) if _first() else None,
        "monitor": monitor.state(),
        "micro_batches": job.parts,
        "compile": job.recipe.compile,
        "identity": job.origin,
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    _store(job, "checkpoints", state, job.recipe.keep)


def _store(job: Job, name: str, state: Mapping[str, Any], keep: int) -> None:
    """Write a checkpoint: each process its pieces, or the first one everything."""
    place, step = job.out / name, job.trainer.step
    if job.trainer.sharded:
        _shards().save(place, step, state, keep)
    elif _first():
        checkpoint.save(place, step, state, keep)


def _shards() -> Any:
    """Checkpoints in pieces; the module takes a second to import, so only runs that need it do."""
    from limbeck import shards

    return shards


def load_state(job: Job, path: Path) -> dict[str, Any]:
    """The state in a checkpoint of any number of processes."""
    if job.trainer.sharded or not (path / "state.safetensors").exists():
        state: dict[str, Any] = _shards().load(path, {"trainer": job.trainer.state_dict()})
        return state
    return checkpoint.read(path)


def _resume(job: Job, tell: Tell) -> tuple[float, Best | None, Monitor]:
    """Bring the trainer to the newest good checkpoint; the seconds that the run has taken, its best step and health."""
    state = checkpoint.load_newest(job.out / "checkpoints", tell, functools.partial(load_state, job))
    if state is None:
        if _first():
            (job.out / "log.jsonl").unlink(missing_ok=True)
        return 0.0, None, Monitor()
    if state["identity"] != job.origin:
        raise ValueError(f"out: {job.out} was begun with another teacher, data set or generator of the same name")
    for name, was, now in (
        ("threads", state["threads"], torch.get_num_threads()),
        ("versions", state["versions"], versions()),
        ("micro_batches", state.get("micro_batches", job.parts), job.parts),
        ("compile", state.get("compile", False), job.recipe.compile),
    ):
        if was != now:
            tell(f"{name}: {was} before, {now} now; results will not be bit-equal to an uninterrupted run")
    job.trainer.load_state_dict(state["trainer"])
    wait_for_all()  # others may still read the log that is cut now
    if _first():
        folder.cut_log(job.out / "log.jsonl", job.trainer.step, state.get("log"), tell)
    wait_for_all()
    if job.trainer.step < job.recipe.steps:
        tell(f"{job.out}: continuing at step {job.trainer.step}")
    best = Best(**state["best"]) if state.get("best") else None
    if best is not None and best.step < job.trainer.step and not artifact.is_whole(job.best_file):
        tell(f"{job.best_file}: damaged or missing; the best of the coming steps takes its place")
        best = None
    return float(state["seconds"]), best, Monitor.of(state["monitor"]) if "monitor" in state else Monitor()


def _draw(job: Job) -> None:
    """A picture of samples from fixed noise, samples/step-STEP.png."""
    if job.product == "classifier":
        return
    model = job.trainer.ema.whole()
    if not _first():
        return
    sampler, _, shape, classes = summary.sampler_of(model, job.recipe.evaluate.teacher_steps)
    tiny = len(shape) == 1
    drawn = latents(job.recipe.evaluate.seed, range(VALIDATION, VALIDATION + (2000 if tiny else 80)), shape, classes)
    picture = overview(generate(sampler, drawn, classes), 16, 3 * job.trainer.teacher.sigma_data)
    if picture is not None:
        place = job.out / "samples"
        place.mkdir(exist_ok=True)
        write_atomically(place / f"step-{job.trainer.step:09d}.png", png(picture))


def _watch(job: Job) -> dict[str, float]:
    """The scores that steer the run."""
    assert job.judge is not None
    return summary.watched(job.trainer.ema.whole(), job.judge, job.recipe.evaluate)


def _check_folder(out: Path, table: Mapping[str, Any]) -> None:
    """Refuse a folder that holds another run.

    Raises:
        ValueError: naming the keys.
    """
    check_folder(out)
    path = out / "recipe.toml"
    if not path.is_file():
        if out.is_dir() and any(p.name not in (".lock", ".recipe.toml.tmp") for p in out.iterdir()):
            raise ValueError(f"out: {out} holds other files, a run needs a folder of its own")
        return
    old = _resolved(config.read_toml(path))
    if "method" in old and not any((out / "checkpoints").glob("ckpt-*")):
        return  # nothing was made by the old settings
    changed = [key for key in config.differences(old, table) if key.split(".")[0] not in config.FREE]
    if changed and path.name in folder.damaged(out):
        raise ValueError(f"{path}: damaged ({', '.join(changed)}); the model's file holds the recipe too")
    if changed:
        raise ValueError(f"out: {out} holds a run with other settings ({', '.join(changed)}); choose another folder")
    if table["steps"] < old["steps"]:
        raise ValueError(f"steps: {out} holds a run of {old['steps']} steps, which can grow but not shrink")


def _resolved(table: dict[str, Any]) -> dict[str, Any]:
    """A stored recipe with the defaults of keys that are newer than it; as it is if it names the caller's own code."""
    known = config.TEACHING if "data" in table else methods.METHODS
    try:
        return config.to_table(config.resolve(table, known))
    except ValueError:
        return table


def _class_of(value: object) -> str:
    return f"<{type(value).__module__}.{type(value).__qualname__}>"
