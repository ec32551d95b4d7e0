"""The end of a run: its model beside its teacher and the floor, as a table, report.json and report.html."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from limbeck import artifact, config, data, features, report, speed, teachers
from limbeck.config import Evaluation, Recipe
from limbeck.denoiser import Denoiser
from limbeck.device import CPU, from_cpu
from limbeck.distributed import rank_and_world
from limbeck.evaluate import VALIDATION, ExactJudge, Judge, Scores, measure
from limbeck.evaluate.draws import Sampler, for_the_eye, generate, in_order, latents
from limbeck.evaluate.judge import bundled_judge, measured_judge, read_judge
from limbeck.exact import Exact
from limbeck.features import Classifier
from limbeck.files import write_atomically
from limbeck.generator import Generator, Trajectory
from limbeck.machine import commit, machine, peak_memory_mib, versions
from limbeck.pictures import grid, png
from limbeck.sample import heun

if TYPE_CHECKING:
    from limbeck.loop import Best, Job

EXPORTED = 300  # seconds of training from which on the generator is also timed in ONNX Runtime: exporting takes ten
Panel = report.Picture | report.Scatter | report.Curve


def judge_for(
    law: str,
    settings: Evaluation,
    teacher: Denoiser | None,
    size: int | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    place: torch.device = CPU,
) -> Judge | None:
    """Who scores samples of a law; None if there is nothing to compare with.

    Args:
        law: name of the teacher or data set; a bundled one brings its reference.
        teacher: an exact teacher is its own judge.
        size: side to which pictures of a folder of reference data are resized.
        shapes: shape of a sample by the name of what makes it; None = the teacher's.
        place: where the feature network computes.

    Raises:
        ValueError: if the reference or its features are incomplete, or do not fit the samples.
    """
    if shapes is None:
        shapes = {} if teacher is None else {law: teacher.shape}
    judge = _judge(law, settings, teacher, size, shapes, place)
    if judge is not None:
        for who, shape in shapes.items():
            judge.check(who, tuple(shape))
    return judge


def _judge(
    law: str,
    settings: Evaluation,
    teacher: Denoiser | None,
    size: int | None,
    shapes: Mapping[str, tuple[int, ...]],
    place: torch.device,
) -> Judge | None:
    if isinstance(teacher, Exact):
        for name in ("data", "reference", "features"):
            if getattr(settings, name) is not None:
                raise ValueError(f"evaluate.{name}: an exact law is its own reference; leave evaluate.{name} out")
        return ExactJudge(teacher, settings.seed, scale=settings.mmd_scale, source=law)
    if settings.data is not None and settings.data.startswith("exact:"):
        target = teachers.load(settings.data)
        return _judge(settings.data, dataclasses.replace(settings, data=None), target, size, shapes, place)
    if settings.reference is not None or settings.data is not None:
        if settings.features is None:
            raise ValueError("evaluate.features: a reference needs a feature network (pixels is one)")
        if settings.reference is not None:
            return read_judge(Path(settings.reference), settings.features, settings.quantize, place)
        samples = data.load(settings.data or "", size)
        for who, shape in shapes.items():  # measuring takes minutes
            if tuple(shape) != samples.shape:
                raise ValueError(f"{who}: its samples have shape {shape}, those of {settings.data} {samples.shape}")
        return measured_judge(samples, settings.features, settings.quantize, place)
    if settings.features is not None:
        raise ValueError("evaluate.features: needs evaluate.data or evaluate.reference beside it")
    return bundled_judge(law, settings.quantize, place)


def sampler_of(model: nn.Module, teacher_steps: int) -> tuple[Sampler, int, tuple[int, ...], int, bool]:
    """(sampler, NFE, latent shape, classes, contexts) of a generator, or of a denoiser by Heun's method.

    The sampler takes latents and conditions on the CPU, and gives samples there.

    Raises:
        ValueError: for a model that draws no samples.
    """
    if isinstance(model, Generator):
        return from_cpu(model, model), model.nfe, model.latent_shape, model.classes, model.contexts
    if isinstance(model, Denoiser):

        def sample(z: Tensor, cond: Tensor | None) -> Tensor:
            return heun(model, z, teacher_steps, cond=cond)

        return from_cpu(sample, model), 2 * teacher_steps - 1, model.shape, model.classes, model.contexts
    raise ValueError(f"{type(model).__name__}: draws no samples")


@contextlib.contextmanager
def progress(recipe: Recipe, start: int) -> Iterator[Callable[[int, Mapping[str, Tensor]], None]]:
    """A progress bar on the terminal's error stream; silent where that is not a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[loss]}"))
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("steps", total=recipe.steps, completed=start, loss="")

        def moved(step: int, told: Mapping[str, Tensor]) -> None:
            if step % 10 == 0 or step == recipe.steps:
                loss = next((f"{name[5:]} {float(v):.3g}" for name, v in told.items() if name.startswith("loss/")), "")
                bar.update(task, completed=step, loss=loss)

        yield moved


def read_report(path: Path) -> dict[str, Any] | None:
    """A run's report.json, None if there is none.

    Raises:
        ValueError: if it is damaged, naming it.
    """
    if not path.is_file():
        return None
    try:
        told: dict[str, Any] = json.loads(path.read_text())
        int(told["steps"])
        for row in told.get("history", ()):
            dict(row["metrics"])
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path}: damaged; remove it, and the run's own command writes it again") from None
    return told


def conclude(
    job: Job, model: nn.Module, seconds: float, best: Best | None, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Score the finished model, write report.json and report.html, and print the table."""
    recipe = job.recipe
    table = config.to_table(recipe)
    rows = [json.loads(line) for line in (job.out / "log.jsonl").read_text().splitlines()]
    result: dict[str, Any] = {
        "limbeck": versions()["limbeck"],
        "kind": job.product,
        "method": table["method"],
        "teacher": recipe.teacher,
        "data": recipe.data,
        "steps": job.trainer.step,
        "images": job.trainer.images,
        "seconds": round(seconds, 1),
        "seed": recipe.seed,
        "processes": rank_and_world()[1],
        "micro_batches": job.parts,
        "compiled": job.trainer.passes.compiled,
        "device": job.trainer.device.type,
        "skipped": {key: [s.skipped, s.updates] for key, s in job.trainer.scalers.items()},
        "parameters": sum(p.numel() for p in model.parameters()),
        "peak_memory_mib": peak_memory_mib(),
        "history": [row for row in rows if "metrics" in row],
        "warnings": [row for row in rows if "warning" in row],
        "hashes": {
            "teacher" if recipe.teacher else "data": job.identity,
            job.product: artifact.fingerprint(model),
            **({"given": job.given} if job.given else {}),
            **(job.judge.hashes() if job.judge is not None else {}),
        },
        "recipe": table,
        "versions": versions(),
        "machine": machine(),
        "commit": commit(),
    }
    panels: list[Panel] = []
    if isinstance(model, Classifier) and job.held_out is not None:
        result["student"] = {"metrics": {"held_out_accuracy": held_out_accuracy(model, job.held_out)}}
    elif job.judge is not None:
        result |= compare(job, model, best)
        if rank_and_world()[0] == 0:
            panels = [*figures(job, model), *report.history_curves(result)]
    if rank_and_world()[0] != 0:
        return result
    if isinstance(model, Generator) and recipe.teacher is not None:
        result["speed"] = speed.measure(
            model, job.trainer.teacher, recipe.evaluate.teacher_steps, onnx=seconds > EXPORTED
        )
    write_atomically(job.out / "report.json", json.dumps(result, indent=1) + "\n")
    write_atomically(
        job.out / "report.html",
        report.render(result, panels, [r for r in rows if not {"metrics", "warning"} & r.keys()]),
    )
    for line in table_lines(result):
        tell(line)
    for line in speed.lines(result.get("speed", {})):
        tell(line)
    for key, scaler in job.trainer.scalers.items():
        tell(f"float16: {scaler.skipped:,} of {scaler.updates:,} updates of {key} skipped")
    tell(f"report: {job.out / 'report.html'}")
    return result


def compare(job: Job, model: nn.Module, best: Best | None) -> dict[str, Any]:
    """Scores of the last model, of an earlier best one, of the teacher on the same noise, and of the truth."""
    assert job.judge is not None
    settings = job.recipe.evaluate
    told: dict[str, Any] = {"student": dataclasses.asdict(_scores(job, model))}
    if best is not None and best.step < job.trainer.step:
        chosen = artifact.load(job.best_file, job.product, job.network).to(job.trainer.device)
        told["best"] = {**dataclasses.asdict(best), **dataclasses.asdict(_scores(job, chosen))}
        told["best"]["sha256"] = artifact.fingerprint(chosen)
    if job.recipe.teacher is not None:
        told["teacher_scores"] = job.teacher_scores or dataclasses.asdict(_scores(job, job.trainer.teacher))
    return told | truths(job.judge, settings.samples)


def truths(judge: Judge, samples: int) -> dict[str, Any]:
    """What the truth scores, as the blocks `floor` and, if known, `halves` of a report."""
    blocks = {"floor": judge.floor(samples), "halves": judge.halves()}
    return {name: dataclasses.asdict(truth) for name, truth in blocks.items() if truth is not None}


def _scores(job: Job, model: nn.Module) -> Scores:
    assert job.judge is not None
    s = job.recipe.evaluate
    sampler, nfe, shape, classes, contexts = sampler_of(model, s.teacher_steps)
    return measure(sampler, nfe, job.judge, shape, classes, contexts, samples=s.samples, draws=s.draws, seed=s.seed)


def watched(model: nn.Module, judge: Judge, settings: Evaluation) -> dict[str, float]:
    """Scores on the validation indices and the judge's separate half, of `settings.watched` samples."""
    sampler, nfe, shape, classes, contexts = sampler_of(model, settings.teacher_steps)
    count = settings.watched or max(2, settings.samples // 4)
    return measure(
        sampler,
        nfe,
        judge.watching(),
        shape,
        classes,
        contexts,
        samples=count,
        seed=settings.seed,
        first=VALIDATION,
    ).metrics


def held_out_accuracy(classifier: Classifier, held_out: data.Data) -> float:
    """Share of held-out samples that the classifier names right."""
    assert held_out.y is not None
    predicted = features.in_batches(classifier.logits, held_out.x).argmax(1)
    return float((predicted == held_out.y).double().mean())


def figures(job: Job, model: nn.Module) -> list[Panel]:
    """Samples of student and teacher from equal noise, the truth, and the student's paths."""
    settings, teacher = job.recipe.evaluate, job.trainer.teacher
    makers = {"Student": model}
    if job.recipe.teacher is not None:
        makers["Teacher"] = teacher
    panels: list[Panel] = []
    plane = len(teacher.shape) == 1 and teacher.shape[0] == 2
    clouds: dict[str, list[list[float]]] = {}
    if plane and isinstance(teacher, Exact):
        clouds["Target"] = cloud(teacher)
    for name, maker in makers.items():
        sampler, nfe, shape, classes, contexts = sampler_of(maker, settings.teacher_steps)
        drawn = for_the_eye(settings.seed, 2000 if plane else 100, shape, classes, contexts)
        x = generate(sampler, drawn, classes)
        calls = f"{nfe} network call{'s' if nfe > 1 else ''} per sample"
        if plane:
            clouds[f"{name}, {nfe} NFE"] = x.tolist()
        elif x.ndim == 4:
            rows = f", one {'context' if contexts else 'class'} per row" if classes else ""
            panels.append(
                report.Picture(name, f"{calls}; student and teacher start from equal noise{rows}.", png(grid(x, 10)))
            )
    if clouds:
        panels.append(report.Scatter("Samples", "Student and teacher start from equal noise.", clouds))
    if len(teacher.shape) == 3:
        panels.append(_real(job.recipe))
    if isinstance(model, Trajectory):
        panels += paths(model, teacher, settings.seed)
    return panels


def cloud(law: Exact) -> list[list[float]]:
    """Exact samples for the eye, of a policy in contexts in order."""
    labels = in_order(2000, law.classes, law.contexts)
    points: list[list[float]] = law.sample(2000, torch.Generator().manual_seed(0), labels).tolist()
    return points


def _real(recipe: Recipe) -> Panel:
    """Images of the data set, if the recipe or the teacher names one and it is on this machine."""
    try:
        real = data.load(recipe.evaluate.data or recipe.data or recipe.teacher or "", recipe.size)
    except ValueError:
        return report.Picture("Real", "The data are not on this machine.", b"")
    if real.y is None:
        return report.Picture("Real", "The data.", png(grid(real.x[:100], 10)))
    picks = torch.cat([torch.nonzero(real.y == k)[:10, 0] for k in range(min(real.classes, 10))])
    return report.Picture("Real", "The data, one class per row.", png(grid(real.x[picks], 10)))


def paths(student: Trajectory, teacher: Denoiser, seed: int) -> list[Panel]:
    """The student's path x(z, t) beside the teacher's ODE from the same z, scaled to unit variance."""
    levels = student.levels.grid(25)[:-1]
    drawn = latents(seed, range(6), student.latent_shape, 0)
    with torch.no_grad():
        learned = from_cpu(student.trajectory, student)(drawn.z, levels.to(drawn.z.dtype))
        solved = from_cpu(lambda z: heun(teacher, z, sigmas=levels, path=True), teacher)(drawn.z)
    shrink = torch.sqrt(teacher.sigma_data**2 + levels**2).reshape(-1, *(1,) * drawn.z.ndim)
    learned, solved = ((path.double() / shrink).float() for path in (learned, solved))
    text = "Each point is divided by sqrt(sigma_data^2 + sigma^2), so that noise and data have one scale."
    if learned.ndim == 3 and learned.shape[2] == 2:
        series = {
            f"{name} {k + 1}": [(float(x), float(y)) for x, y in path[:, k]]
            for k in range(len(drawn.z))
            for name, path in (("student", learned), ("teacher", solved))
        }
        return [report.Curve("Paths from noise to data", text, "x", "y", series)]
    if learned.ndim == 5:
        strips = torch.stack([learned, solved], 1)[::3]  # levels, who, sample, C, H, W
        rows = strips.permute(2, 1, 0, 3, 4, 5).flatten(0, 2) * teacher.sigma_data / 0.7
        caption = f"Rows in pairs: student, then teacher, from the same noise; left is noise, right the sample. {text}"
        return [report.Picture("Paths from noise to data", caption, png(grid(rows.clamp(-1, 1), len(strips))))]
    return []


MAIN = (
    "fid", "fd_feature", "fd_feature_rest", "fd_feature_infinity", "fd_pixel", "kid", "precision", "recall", "density",
    "coverage", "class_accuracy", "class_balance", "classifier_score", "inception_score", "mmd", "sliced_wasserstein",
    "log_density", "mode_recall", "mode_outside", "mode_spread", "c2st", "memorisation_share", "memorisation_ratio",
    "held_out_accuracy",
)  # fmt: skip


def table_lines(result: Mapping[str, Any]) -> list[str]:
    """The scores of a run as lines of text: student, best, teacher and floor."""
    places = {"student": "student", "best": "best", "teacher": "teacher_scores"}
    columns: dict[str, Any] = {name: result[key] for name, key in places.items() if result.get(key)}
    columns |= truth_columns(result, result.get("recipe", {}).get("evaluate", {}).get("samples"))
    if not columns:
        return ["no scores: there is nothing to compare with (set evaluate.data and evaluate.features)"]
    return table_of(columns)


def truth_columns(result: Mapping[str, Any], samples: int | None) -> dict[str, Any]:
    """The truth's blocks of a result by name; the name says of how many samples, if it is not those of the models."""
    blocks = {name: result[name] for name in report.TRUTHS if result.get(name)}
    return {column(name, block.get("samples"), samples): block for name, block in blocks.items()}


def column(name: str, count: int | None, samples: int | None) -> str:
    """The head of a column of `count` samples, which it tells if it is known and not `samples`."""
    return name if count in (None, 0, samples) else f"{name}, n={count}"


def notes_of(columns: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What the columns `floor` and `halves` are, and why scores are missing, each sentence once."""
    told = [f"{name}: {column['note']}." for name, column in columns.items() if column.get("note")]
    return list(dict.fromkeys([*told, *(note for column in columns.values() for note in column.get("notes", ()))]))


def table_of(columns: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Scores as lines of text: one row per metric, one column per name."""
    width = max(12, *(len(name) + 2 for name in columns))

    def row(name: str, cells: Iterable[str]) -> str:
        return f"{name:20}" + "".join(f"{cell:>{width}}" for cell in cells)

    lines = [row("", columns)]
    for name, key in (("network calls", "nfe"), ("ms per sample", "ms_per_image")):
        if any(column.get(key) for column in columns.values()):
            lines.append(row(name, (_cell(column.get(key)) for column in columns.values())))
    for name in MAIN:
        if any(name in column["metrics"] for column in columns.values()):
            lines.append(row(name, (_cell(column["metrics"].get(name)) for column in columns.values())))
        for label, cell in (("  95 % interval", _interval), ("  +- over draws", _deviation)):
            shown = [cell(column, name) for column in columns.values()]
            if any(shown):
                lines.append(row(label, (text or "-" for text in shown)))
    shares = [[v for k, v in column["metrics"].items() if k.startswith("share_")] for column in columns.values()]
    if any(shares):
        lines.append(row("share per mode, %", (f"{100 * min(s):.1f}-{100 * max(s):.1f}" if s else "-" for s in shares)))
    return [*lines, *notes_of(columns)]


def _interval(column: Mapping[str, Any], name: str) -> str:
    ends = column.get("intervals", {}).get(name)
    return "..".join(f"{end:.3g}" for end in ends) if ends else ""


def _deviation(column: Mapping[str, Any], name: str) -> str:
    value = column.get("spread", {}).get(name)
    return "" if value is None else f"{value:.2g}"


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
