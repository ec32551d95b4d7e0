"""Runs by their recipes: `distill` and `teach`, and the jobs that `loop` plays."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from limbeck import artifact, config, data, device, loop, methods, refine, summary, teachers
from limbeck.config import Real, Recipe
from limbeck.denoiser import Denoiser
from limbeck.evaluate import Judge
from limbeck.files import check_folder
from limbeck.folder import Tell
from limbeck.generator import Generator
from limbeck.given import Given
from limbeck.loop import Job
from limbeck.noise import Karras
from limbeck.preparation import Preparation, exact_provider, provider_for
from limbeck.source import DataSource, NoiseSource
from limbeck.students import direct_generator, fit_levels, student_template, trainer_of


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
    return loop.run(distillation(recipe, out, tell, teacher, network, judge, generator), tell)


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
    teacher = teachers.load(name, network) if teacher is None else device.on_cpu(teacher)
    recipe = fit_levels(recipe, teacher, tell)
    given = generator if generator is not None else refine.named(recipe, network)
    if given is not None:
        given, recipe = refine.accepted(device.on_cpu(given), teacher), refine.patient(recipe)
        if isinstance(given, Given):
            network = type(given.network)
    template = student_template(recipe, teacher, network if given is None else None)
    adversarial = getattr(getattr(recipe.method, "game", None), "adversarial", None)
    if adversarial is not None and adversarial.features == "teacher" and template is not teacher:
        raise ValueError(
            "method.game.adversarial.features: teacher needs a student of the teacher's own network, so leave template "
            "out; or take fake"
        )
    needs_data = recipe.real.source == "data" or (recipe.real.source == "auto" and not exact_provider(teacher))
    if recipe.real.data is not None and not (recipe.method.needs_real and needs_data):
        raise ValueError("real.data: nothing reads it, with this method and teacher and real.source; leave it out")
    data.check_size(recipe.size, recipe.evaluate.data, recipe.real.data)
    if judge is None:
        judge = summary.judge_for(name, recipe.evaluate, teacher, recipe.size, place=device.chosen(recipe.device))
    start = given or direct_generator(recipe, teacher)
    trainer = trainer_of(recipe, teacher, template, start)
    student = trainer.nets[recipe.method.product]
    assert isinstance(student, Generator)
    noise = NoiseSource(
        student.shape, student.latent_shape, recipe.batch, recipe.seed, student.classes, teacher.contexts,
        stratified=recipe.stratified, antithetic=recipe.antithetic, device=trainer.device,
    )  # fmt: skip
    provider = provider_for(recipe, teacher) if recipe.method.needs_real else None
    prepare = Preparation(teacher, template, start, noise, provider)
    job = Job(
        recipe, out, trainer, noise, artifact.fingerprint(teacher), "generator", judge, prepare, network,
        given="" if given is None else artifact.fingerprint(given), reading=artifact.reading(teacher),
    )  # fmt: skip
    loop.check(job)
    return job.in_parts(max(1, recipe.micro_batches))


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
    return loop.run(teaching(recipe, out, network), tell)


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
    if samples.contexts is not None:
        raise ValueError(f"{recipe.data}: y holds contexts; what is taught has class numbers, or none")
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
        judge = summary.judge_for(
            recipe.data, recipe.evaluate, template, recipe.size, place=device.chosen(recipe.device)
        )
    trainer = trainer_of(recipe, plain, template)
    student = trainer.nets[product]
    latent_shape = student.latent_shape if isinstance(student, Generator) else samples.shape
    noise = NoiseSource(
        samples.shape, latent_shape, recipe.batch, recipe.seed, samples.classes,
        unlabelled=getattr(recipe.method, "label_dropout", 0.0),
        stratified=recipe.stratified, antithetic=recipe.antithetic, device=trainer.device,
    )  # fmt: skip
    train, held_out = samples.split() if product == "classifier" else (samples, None)
    source = DataSource(noise, train.x, train.y)
    job = Job(recipe, out, trainer, source, samples.fingerprint(), product, judge, network=network, held_out=held_out)
    loop.check(job)
    return job.in_parts(max(1, recipe.micro_batches))


def _class_of(value: object) -> str:
    return f"<{type(value).__module__}.{type(value).__qualname__}>"
