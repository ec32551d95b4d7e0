"""The loop around the trainer, and the folder that it fills.

A run folder holds recipe.toml (resolved), log.jsonl, checkpoints/, samples/, and at the end the model as safetensors,
report.json and report.html. The same call again continues where the folder stands; a finished run says so.

Under `torchrun` all processes take the same steps, each on its share of the batch; the first one writes.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

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
    resources,
    summary,
)
from limbeck.config import Recipe
from limbeck.distributed import gather, largest, rank_and_world, wait_for_all
from limbeck.evaluate import VALIDATION, Judge
from limbeck.evaluate.draws import generate, latents
from limbeck.features import Classifier
from limbeck.files import check_folder, write_atomically
from limbeck.folder import Stop, Stopped, Tell
from limbeck.health import Monitor
from limbeck.machine import versions
from limbeck.pictures import overview, png
from limbeck.source import in_parts
from limbeck.train import NonFinite, Source, Trainer

if TYPE_CHECKING:
    from limbeck.preparation import Preparation

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
    reading: str = ""  # how the teacher's weights are read
    parts: int = 1  # micro-batches
    teacher_scores: dict[str, Any] | None = None  # where they are known already: they take minutes

    @property
    def origin(self) -> str:
        """What the run began with: it is refused to go on with anything else."""
        read = hashlib.sha256(self.reading.encode()).hexdigest() if self.reading else ""
        return self.identity + self.given + read

    def began_with(self, origin: str) -> bool:
        """Is this the job's origin, also as earlier versions wrote it, without how the teacher is read?"""
        return origin in (self.origin, self.identity + self.given)

    def in_parts(self, parts: int) -> Job:
        """The job with so many micro-batches."""
        prepare = self.prepare and replace(self.prepare, noise=in_parts(self.prepare.noise, parts))
        return replace(self, parts=parts, source=in_parts(self.source, parts), prepare=prepare)

    @property
    def best_file(self) -> Path:
        """The model of the checkpoint that scored best while the run was watched."""
        return self.out / f"{self.product}-best.safetensors"


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
    free, world = resources.free_memory(needs.device), rank_and_world()[1]
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


def run(job: Job, tell: Tell) -> dict[str, Any]:
    """Bring a job to its end, from wherever its folder stands. Returns the content of report.json."""
    recipe, out = job.recipe, job.out
    table = config.to_table(recipe)
    first = is_first()
    if not first:
        tell = _silent
    wait_for_all()  # all have looked at the folder before anybody writes to it
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    opinion = None
    if job.prepare is not None and first:
        opinion = doctor.preflight(job.prepare.teacher, out / "doctor.json", job.identity, tell)
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
        gone = (out / folder.MANIFEST).is_file() and not _is_begun(out)  # to save room; the log is to stay
        seconds, best, monitor = (0.0, None, Monitor()) if gone else resume(job, tell)
        stop.step = job.trainer.step
        report = None if broken else _finished(job, table, recipe.steps if gone else job.trainer.step)
        if gone and report is None:
            raise ValueError(f"out: {out} holds a model without the checkpoints to go on from; choose another folder")
        wait_for_all()  # all have read what is there
        if first:
            write_atomically(out / "recipe.toml", config.dump_toml(table))
        if opinion is not None:
            write_atomically(out / "doctor.json", opinion)
        if report is not None:
            if first:
                folder.seal(out)  # the recipe's free keys may be others now
            tell(f"{out}: finished at step {report['steps']}; see {out / 'report.html'}")
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
        seconds, best = play(job, seconds, best, monitor, stop, tell)
        model = job.trainer.ema.whole()
        facts = {**_facts(job), "seconds": round(seconds, 1)}
        if first:
            artifact.save(out / f"{job.product}.safetensors", job.product, model, facts)
        wait_for_all()
        report = summary.conclude(job, model, seconds, best, tell)
        if first:
            folder.seal(out)
        return report


def is_first() -> bool:
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


def _finished(job: Job, table: Mapping[str, Any], step: int) -> dict[str, Any] | None:
    """The report of this run, which is at `step`, as asked for; None if anything is left to train, store or score."""
    if step < job.recipe.steps or not (job.out / folder.MANIFEST).is_file():
        return None
    try:
        report: dict[str, Any] = json.loads((job.out / "report.json").read_text())
        judged = config.completed(report["recipe"])["evaluate"]
        same = report["steps"] == step and judged == table["evaluate"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return report if same else None


def play(
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
        seconds, best, monitor = resume(job, tell)
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
        open(path if is_first() else os.devnull, "a", buffering=1) as log,
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
            # asked once: a signal reaches processes at different moments, and all must take the same step as the last
            ending = largest(stop.signum)
            if due(recipe.every.save) or ending or trainer.step == recipe.steps:
                save()
            moved(trainer.step, told)
            if trainer.step == first + TIMED:
                left = (time.perf_counter() - began - seconds) / TIMED * (recipe.steps - trainer.step)
                if left > 60:
                    tell(f"about {resources.duration(left)} to go")
            if ending:
                raise Stopped(ending, trainer.step)
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
        "device": job.trainer.device.type,
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
    _store_best(job)
    return Best(job.trainer.step, metric, metrics[metric])


def _store_best(job: Job) -> None:
    model = job.trainer.ema.whole()
    if is_first():
        artifact.save(job.best_file, job.product, model, _facts(job))


def _holds(path: Path, step: int) -> bool:
    """Is this the whole model of that step? A later one may have been stored, and its checkpoint not."""
    return artifact.is_whole(path) and artifact.read_card(path).get("step") == step


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
        "log": folder.mark(log) if is_first() else None,
        "monitor": monitor.state(),
        "micro_batches": job.parts,
        "processes": rank_and_world()[1],
        "compile": job.recipe.compile,
        "device": job.trainer.device.type,
        "steps": job.recipe.steps,
        "identity": job.origin,
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    _store(job, "checkpoints", state, job.recipe.keep)
    if job.trainer.step and is_first():  # what the first steps began with is not needed again
        for done in job.out.glob("warm-start-*"):
            shutil.rmtree(done)


def _store(job: Job, name: str, state: Mapping[str, Any], keep: int) -> None:
    """Write a checkpoint: each process its pieces, or the first one everything."""
    place, step = job.out / name, job.trainer.step
    if job.trainer.sharded:
        _shards().save(place, step, state, keep)
    elif is_first():
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


def restore(job: Job, state: Mapping[str, Any]) -> None:
    """Bring the trainer to a stored state.

    Raises:
        ValueError: if that is of other networks; a recipe does not say which class of his own a caller gave.
    """
    try:
        job.trainer.load_state_dict(state["trainer"])
    except RuntimeError:
        raise ValueError(f"network: {job.out} was begun with another network; give the same --network") from None


def resume(job: Job, tell: Tell) -> tuple[float, Best | None, Monitor]:
    """Bring the trainer to the newest good checkpoint; the seconds that the run has taken, its best step and health."""
    state = checkpoint.load_newest(job.out / "checkpoints", tell, functools.partial(load_state, job))
    if state is None:
        if is_first():
            (job.out / "log.jsonl").unlink(missing_ok=True)
        return 0.0, None, Monitor()
    if not job.began_with(state["identity"]):
        raise ValueError(f"out: {job.out} was begun with another teacher, data set or generator of the same name")
    # rates that fall do so towards the last step
    falling = any(optimizer.schedule != "constant" for optimizer in job.recipe.optimizer.values())
    steps = job.recipe.steps
    for name, was, now in (
        ("steps", state.get("steps", steps) if falling else steps, steps),
        ("threads", state["threads"], torch.get_num_threads()),
        ("versions", state["versions"], versions()),
        ("micro_batches", state.get("micro_batches", job.parts), job.parts),
        ("processes", state.get("processes", rank_and_world()[1]), rank_and_world()[1]),
        ("compile", state.get("compile", False), job.recipe.compile),
        ("device", state.get("device", "cpu"), job.trainer.device.type),
    ):
        if was != now:
            tell(f"{name}: {was} before, {now} now; results will not be bit-equal to an uninterrupted run")
    restore(job, state)
    wait_for_all()  # others may still read the log that is cut now
    if is_first():
        folder.cut_log(job.out / "log.jsonl", job.trainer.step, state.get("log"), tell)
    wait_for_all()
    if job.trainer.step < job.recipe.steps:
        tell(f"{job.out}: continuing at step {job.trainer.step}")
    best = Best(**state["best"]) if state.get("best") else None
    if best is not None and largest(int(not _holds(job.best_file, best.step))):
        if best.step == job.trainer.step:
            _store_best(job)
        else:
            tell(f"{job.best_file}: damaged, missing or newer; the best of the coming steps takes its place")
            best = None
    return float(state["seconds"]), best, Monitor.of(state["monitor"]) if "monitor" in state else Monitor()


def _draw(job: Job) -> None:
    """A picture of samples from fixed noise, samples/step-STEP.png."""
    if job.product == "classifier":
        return
    model = job.trainer.ema.whole()
    if not is_first():
        return
    sampler, _, shape, classes, contexts = summary.sampler_of(model, job.recipe.evaluate.teacher_steps)
    tiny = len(shape) == 1
    indices = range(VALIDATION, VALIDATION + (2000 if tiny else 80))
    drawn = latents(job.recipe.evaluate.seed, indices, shape, classes, contexts=contexts)
    picture = overview(generate(sampler, drawn, classes), 16, 3 * job.trainer.teacher.sigma_data)
    if picture is not None:
        place = job.out / "samples"
        place.mkdir(exist_ok=True)
        write_atomically(place / f"step-{job.trainer.step:09d}.png", png(picture))


def _watch(job: Job) -> dict[str, float]:
    """The scores that steer the run."""
    assert job.judge is not None
    return summary.watched(job.trainer.ema.whole(), job.judge, job.recipe.evaluate)


def _is_begun(out: Path) -> bool:
    return any((out / "checkpoints").glob("ckpt-*"))


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
    old = config.completed(config.read_toml(path))
    if "method" in old and not _is_begun(out) and not any(out.glob("*.safetensors")):
        return  # nothing was made by the old settings
    changed = [key for key in config.differences(old, table) if key.split(".")[0] not in config.FREE]
    if changed and path.name in folder.damaged(out):
        raise ValueError(f"{path}: damaged ({', '.join(changed)}); the model's file holds the recipe too")
    if changed:
        raise ValueError(f"out: {out} holds a run with other settings ({', '.join(changed)}); choose another folder")
    if table["steps"] < old["steps"]:
        raise ValueError(f"steps: {out} holds a run of {old['steps']} steps, which can grow but not shrink")
