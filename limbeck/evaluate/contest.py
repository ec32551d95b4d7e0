"""Several models, teachers and sets of samples, scored side by side against one reference.

Every contestant's scores are stored as soon as they are known, under a key of everything that they depend on: the same
evaluation again reads them, an interrupted one goes on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from limbeck import artifact, config, data, features, refine, report, summary, teachers
from limbeck.config import Evaluation
from limbeck.data import Data
from limbeck.denoiser import Denoiser
from limbeck.device import CPU, from_cpu
from limbeck.distributed import gather, rank_and_world
from limbeck.evaluate import Judge, Scores, measure, measure_data
from limbeck.evaluate.draws import for_the_eye, generate
from limbeck.evaluate.judge import ExactJudge, ImageJudge
from limbeck.evaluate.neighbours import nearest_neighbour_distance
from limbeck.files import check_folder, write_atomically
from limbeck.generator import Generator
from limbeck.losses import denoising
from limbeck.machine import commit, machine, versions
from limbeck.objective import perturb
from limbeck.pictures import grid, png
from limbeck.randomness import stream
from limbeck.sample import default_levels
from limbeck.source import one_hot
from limbeck.summary import MAIN

Panel = report.Picture | report.Scatter | report.Curve

COSTS = ("nfe", "ms_per_image", "parameters", "images", "seconds", "peak_memory_mib")


@dataclass(frozen=True)
class Contestant:
    """Who is scored: a model, or given samples.

    Attributes:
        name: as on the command line.
        model: a generator or a denoiser; None for given samples.
        samples: given samples; None for a model.
        steps: Heun steps of a denoiser.
        run: the run folder, if it is one.
    """

    name: str
    model: nn.Module | None
    samples: Data | None
    steps: int
    run: Path | None = None

    def fingerprint(self) -> str:
        """SHA-256 of the model or the samples."""
        if self.samples is not None:
            return self.samples.fingerprint()
        assert self.model is not None
        return artifact.fingerprint(self.model)

    @property
    def shape(self) -> tuple[int, ...]:
        source: Any = self.samples if self.samples is not None else self.model
        return tuple(source.shape)


def contestant(source: str, steps: int, size: int | None = None, network: type[nn.Module] | None = None) -> Contestant:
    """The contestant named `source`: the folder of a run or an imported model, a model's file, a teacher ("digits";
    "digits@9" takes 9 Heun steps), an .npz file of samples or a folder of pictures. `network` is the caller's own
    class, for files that need one.

    Raises:
        ValueError: naming what is wrong.
    """
    name, at, number = source.rpartition("@")
    if at and number.isdigit() and not Path(source).exists():
        if int(number) < 2:
            raise ValueError(f"{source}: Heun's method takes at least 2 steps, e.g. {name}@2")
        return Contestant(source, teachers.load(name, network), None, int(number))
    path = Path(source)
    if path.is_dir():
        run = path if (path / "recipe.toml").is_file() else None  # without one the model was imported
        for kind in ("generator", "denoiser"):
            if (path / f"{kind}.safetensors").is_file():
                model = artifact.load(path / f"{kind}.safetensors", kind, network)
                return Contestant(source, model, None, steps, run)
        if (path / "classifier.safetensors").is_file():
            raise ValueError(f"{path}: holds a classifier, which draws no samples; it can be named with --features")
        if run is not None:
            raise ValueError(f"{path}: has no finished model yet")
    if path.is_dir() or path.suffix == ".npz":
        return Contestant(source, None, data.load(source, size), steps)
    generator = refine.generator_at(path, network)
    if generator is not None:
        return Contestant(source, generator, None, steps)
    return Contestant(source, teachers.load(source, network), None, steps)


def law_of(source: str) -> str:
    """Name of the law that a contestant imitates: the teacher or data of its recipe, or its own name."""
    recipe = _recipe_of(source)
    return str(recipe.get("teacher") or recipe.get("data") or _model_of(source))


def _recipe_of(source: str) -> dict[str, Any]:
    """The recipe of a run folder or a model's file; empty if there is none."""
    path = Path(_model_of(source))
    if (path / "recipe.toml").is_file():
        return config.read_toml(path / "recipe.toml")
    if path.is_file() and path.suffix == ".safetensors" and artifact.is_carded(path):
        return dict(artifact.read_card(path).get("recipe", {}))
    return {}


def _model_of(source: str) -> str:
    """`source` without its number of Heun steps."""
    name, _, number = source.rpartition("@")
    return name if name and number.isdigit() else source


def judge_of(
    law: str,
    settings: Evaluation,
    size: int | None,
    shapes: Mapping[str, tuple[int, ...]],
    place: torch.device = CPU,
) -> Judge:
    """Who scores samples of `law` and of `shapes` by name.

    Raises:
        ValueError: if there is nothing to score against, or the samples do not fit it.
    """
    exact = teachers.load(law) if law.startswith("exact:") else None
    judge = summary.judge_for(law, settings, exact, size, shapes, place)
    if judge is None:
        raise ValueError(f"reference: there is none for {law!r}; give --against NAME, or --features and a --reference")
    return judge


def contest(
    sources: Sequence[str],
    settings: Evaluation,
    out: Path | None,
    tell: Callable[[str], None],
    against: str | None = None,
    size: int | None = None,
    network: type[nn.Module] | None = None,
    teacher: bool = True,
    place: torch.device = CPU,
) -> dict[str, Any]:
    """Score `sources` side by side; with `out`, store the scores there and write contest.json and contest.html.

    Args:
        against: the law to score against, if not that of the first source.
        size: side to which pictures of folders are resized.
        teacher: score the teachers of generators too, if they are here.
        place: where models compute.

    Raises:
        ValueError: for a contestant that cannot be read or does not fit the reference, before anything is scored.
    """
    if out is not None:
        check_folder(out)
    data.check_size(size, *(source for source in sources if not _recipe_of(source)), settings.data)
    contestants = [contestant(source, settings.teacher_steps, size, network) for source in sources]
    if teacher:
        contestants += _teachers(contestants, settings.teacher_steps, network, tell)
    law = against or law_of(sources[0])
    judge = judge_of(law, settings, size, {who.name: who.shape for who in contestants}, place)
    for who in contestants:
        _check_given(who, judge)
        if who.model is not None:
            who.model.to(place)
    rows: list[dict[str, Any]] = []
    for who in contestants:
        scores = _scores(who, judge, settings, out)
        count = settings.samples if who.samples is None else len(who.samples.x)
        facts = {"name": who.name, "sha256": who.fingerprint(), "samples": count}
        rows.append({**facts, **dataclasses.asdict(scores), **_cost(who)})
        if rank_and_world()[0] == 0:
            tell(f"{who.name}: scored")
    result = {
        "law": law,
        "rows": rows,
        **summary.truths(judge, settings.samples),
        "hashes": judge.hashes(),
        "settings": config.plain(settings),
        "versions": versions(),
        "machine": machine(),
        "commit": commit(),
    }
    if out is not None and rank_and_world()[0] == 0:
        _write(out, result, lambda: page(result, contestants, judge, settings, size))
        tell(f"report: {out / 'contest.html'}")
    return result


def _write(out: Path, result: dict[str, Any], html: Callable[[], str]) -> None:
    """contest.html, then contest.json; nothing if they are there and say the same."""
    text, facts, shown = json.dumps(result, indent=1) + "\n", out / "contest.json", out / "contest.html"
    if shown.is_file() and facts.is_file() and facts.read_text() == text:
        return
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(shown, html())
    write_atomically(facts, text)


def _teachers(
    contestants: Sequence[Contestant], steps: int, network: type[nn.Module] | None, tell: Callable[[str], None]
) -> list[Contestant]:
    """The teachers of the generators among the contestants, but for those that are there already."""
    wanted = {law_of(who.name) for who in contestants if isinstance(who.model, Generator)}
    found = []
    for name in sorted(wanted - {_model_of(who.name) for who in contestants}):
        try:
            found.append(Contestant(name, teachers.load(name, network), None, steps))
        except ValueError as error:
            tell(f"the teacher is not scored: {error}")
    return found


def _check_given(who: Contestant, judge: Judge) -> None:
    """Given images are in [-1, 1]: only then their rounding to bytes is that of a file."""
    if who.samples is None:
        return
    if len(who.samples.x) < 2:
        raise ValueError(f"{who.name}: scores need at least 2 samples, got {len(who.samples.x)}")
    if isinstance(judge, ImageJudge) and judge.quantize:
        data.check_range(dataclasses.replace(who.samples, name=who.name))


def _scores(who: Contestant, judge: Judge, settings: Evaluation, out: Path | None) -> Scores:
    """The contestant's scores, from the store if it has them."""
    key: dict[str, Any] = {
        "model": who.fingerprint(),
        "read": None if who.model is None else artifact.reading(who.model),
        "judge": judge.hashes(),
        "settings": config.plain(settings),
        "v": versions(),
        "commit": commit(),
    }
    key["steps"] = who.steps if isinstance(who.model, Denoiser) else None
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    stored = out / "scores" / f"{digest}.json" if out is not None else None
    found = None if stored is None else _stored(stored)
    # all processes must agree, or one would wait for the others' samples forever
    known = gather({"known": torch.tensor(int(found is not None))})
    if found is not None and all(bool(state["known"]) for state in known):
        return found
    if who.samples is not None:
        scores = measure_data(who.samples, judge)
    else:
        assert who.model is not None
        sampler, nfe, shape, classes, contexts = summary.sampler_of(who.model, who.steps)
        scores = measure(
            sampler, nfe, judge, shape, classes, contexts,
            samples=settings.samples, draws=settings.draws, seed=settings.seed,
        )  # fmt: skip
    if stored is not None and rank_and_world()[0] == 0:
        stored.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(stored, json.dumps(dataclasses.asdict(scores)))
    return scores


def _stored(path: Path) -> Scores | None:
    """Scores from the store; None if they are missing or damaged, which means that they are measured anew."""
    try:
        scores = Scores(**json.loads(path.read_text()))
        return scores if isinstance(scores.metrics, dict) and isinstance(scores.details, dict) else None
    except (OSError, ValueError, TypeError):
        return None


def _cost(who: Contestant) -> dict[str, Any]:
    """Training cost of a run, and the size of a model."""
    told: dict[str, Any] = {}
    if who.model is not None:
        told["parameters"] = sum(p.numel() for p in who.model.parameters())
    facts = summary.read_report(who.run / "report.json") if who.run is not None else None
    if facts is not None:
        keys = ("steps", "images", "seconds", "peak_memory_mib", "history")
        told |= {key: facts[key] for key in keys if key in facts}
    return told


def page(
    result: dict[str, Any],
    contestants: Sequence[Contestant],
    judge: Judge,
    settings: Evaluation,
    size: int | None = None,
) -> str:
    """The contest as one HTML page."""
    rows = result["rows"]
    table = []
    for row in rows:
        line: dict[str, Any] = {"name": row["name"]}
        line |= {key: _noted(row, key) for key in MAIN if key in row["metrics"]}
        line |= {key: row[key] for key in COSTS if row.get(key)}
        table.append(line)
    truths = summary.truth_columns(result, settings.samples)
    for name, block in truths.items():
        table.append({"name": name, **{key: block["metrics"][key] for key in MAIN if key in block["metrics"]}})
    table = [{key: line[key] for key in ("name", *MAIN, *COSTS) if key in line} for line in table if len(line) > 1]
    panels: list[Panel] = [*_curves(result), *_pictures(contestants, judge, settings, size), *_classes(result)]
    panels += _noise_levels(contestants, result["law"], settings, size)
    intro = (
        f"{len(rows)} contestants against {result['law']}, {settings.samples:,} samples each"
        f"{f', {settings.draws} draws' if settings.draws > 1 else ''}. The floor is what the truth itself scores: "
        f"{result['floor']['note']}."
    )
    if "halves" in result:
        intro += f" Halves: {result['halves']['note']}."
    odd = [f"{row['name']} ({row['samples']:,})" for row in rows if row["samples"] != settings.samples]
    if odd:
        intro += f" Distances fall with the number of samples; these have another one: {', '.join(odd)}."
    intro += "".join(f" {note}" for note in summary.notes_of({row["name"]: row for row in rows}))
    models = {row["name"]: row["sha256"] for row in rows}
    provenance = {**result, "hashes": {**result["hashes"], "models": models}}
    return report.render_comparison(f"Evaluation on {result['law']}", intro, table, panels, provenance)


def _noted(row: dict[str, Any], key: str) -> report.Noted:
    """A score with its spread over draws and its interval, as far as there are any."""
    return report.Noted(row["metrics"][key], report.spread_text(key, row["spread"].get(key), row["intervals"].get(key)))


def _curves(result: dict[str, Any]) -> list[Panel]:
    """Score over network calls, and over images and seconds of training."""
    title = "Score over network calls"
    key = next((k for k in ("fid", "fd_feature", "mmd") if all(k in row["metrics"] for row in result["rows"])), None)
    if key is None:
        return [report.Picture(title, "Nothing to show: there is no distance that all contestants have.", b"")]
    floor = result["floor"]["metrics"].get(key)
    lines = {} if floor is None else {"floor": floor}
    series: dict[str, list[tuple[float, float]]] = {}
    for row in sorted((row for row in result["rows"] if row["nfe"]), key=lambda row: row["nfe"]):
        series.setdefault(_model_of(row["name"]), []).append((float(row["nfe"]), row["metrics"][key]))
    text = "What the network calls of one sample buy: one line per model."
    if all(row["nfe"] <= 1 for row in result["rows"]):
        text = "Nothing to show: no contestant takes more than one network call (add teachers: NAME@STEPS)."
        panels: list[Panel] = [report.Picture(title, text, b"")]
    else:
        panels = [report.Curve(title, text, "network calls", key, series, log_x=True, log_y=True, lines=lines)]
    for unit, label in (("images", "training images"), ("seconds", "training seconds")):
        runs = {
            row["name"]: [(r[unit], r["metrics"][key]) for r in row.get("history", []) if key in r["metrics"]]
            for row in result["rows"]
        }
        runs = {name: points for name, points in runs.items() if len(points) > 1}
        if runs:
            text = "Watched during training, on fewer samples than the table: compare the curves with each other only."
            panels.append(report.Curve(f"Score over {unit}", text, label, key, runs, log_y=True))
    return panels


def _pictures(contestants: Sequence[Contestant], judge: Judge, settings: Evaluation, size: int | None) -> list[Panel]:
    """Grids or clouds from equal noise, and the nearest training images of the first generator's samples."""
    panels: list[Panel] = []
    clouds: dict[str, list[list[float]]] = {}
    if isinstance(judge, ExactJudge) and tuple(judge.target.shape) == (2,):
        clouds["Target"] = summary.cloud(judge.target)
    for who in contestants:
        x, text = _some(who, settings.seed, 2000 if clouds else 100)
        if clouds:
            clouds[who.name] = x.tolist()
        elif x.ndim == 4 and x.shape[1] in (1, 3, 4):
            panels.append(report.Picture(who.name, text, png(grid(x, 10))))
    if clouds:
        panels.append(report.Scatter("Samples", "Models start from equal noise.", clouds))
    return panels + _neighbours(contestants, judge, settings, size)


def _some(who: Contestant, seed: int, count: int) -> tuple[Tensor, str]:
    """A few samples for the eye, one class or context per row where there are such."""
    if who.samples is not None:
        return who.samples.x[:count], "The first of the given samples."
    assert who.model is not None
    sampler, nfe, shape, classes, contexts = summary.sampler_of(who.model, who.steps)
    drawn = for_the_eye(seed, count, shape, classes, contexts)
    text = f"{nfe} network call{'s' if nfe > 1 else ''} per sample, equal noise for all models."
    return generate(sampler, drawn, classes), text


def _neighbours(contestants: Sequence[Contestant], judge: Judge, settings: Evaluation, size: int | None) -> list[Panel]:
    """Samples beside their nearest training images in features: copies would show."""
    who = next((c for c in contestants if isinstance(c.model, Generator)), None)
    if who is None or not isinstance(judge, ImageJudge):
        return []
    law = law_of(who.name)
    train = _data_of(law, who.shape, settings, size)
    if train is None:
        text = f"Nothing to show: the data of {law} are not on this machine (give --data)."
        return [report.Picture("Nearest training images", text, b"")]
    x, _ = _some(who, settings.seed, 100)
    x = x[::10]
    ours, theirs = features.in_batches(judge.network, x), features.in_batches(judge.network, train.x)
    nearest = torch.cdist(ours, theirs).argmin(1)
    gaps = nearest_neighbour_distance(x.flatten(1), train.x.flatten(1))
    pairs = torch.stack([x, train.x[nearest]], 1).flatten(0, 1)
    text = (
        f"Pairs: a sample of {who.name}, and the training image nearest to it in features. Smallest pixel distance "
        f"of a sample to any training image: {float(gaps.min()):.3g} (0 is a copy)."
    )
    return [report.Picture("Nearest training images", text, png(grid(pairs, 4)))]


def _data_of(law: str, shape: tuple[int, ...], settings: Evaluation, size: int | None) -> Data | None:
    """The data behind a law, if they are on this machine; a teacher that was taught here says in its recipe which."""
    try:
        size = _recipe_of(law).get("size") if settings.data is None else size
        samples = data.load(settings.data or law_of(law), size)
    except ValueError:
        return None
    return samples if samples.shape == tuple(shape) else None


def _classes(result: dict[str, Any]) -> list[Panel]:
    """Accuracy and share of each class."""
    panels: list[Panel] = []
    for key, title, text in (
        (
            "accuracy_by_class",
            "Accuracy by class",
            "Share of samples that the classifier assigns to the class asked for.",
        ),
        ("share_by_class", "Share by class", "Share of all samples that the classifier assigns to the class."),
    ):
        series = {
            row["name"]: [(float(k), value) for k, value in enumerate(row["details"][key])]
            for row in result["rows"]
            if key in row["details"]
        }
        if series:
            panels.append(report.Curve(title, text, "class", "share", series))
    return panels


def _noise_levels(contestants: Sequence[Contestant], law: str, settings: Evaluation, size: int | None) -> list[Panel]:
    """EDM's denoising loss of every denoiser at levels across its range: where it is worse than it should be."""
    title = "Denoising loss over noise levels"
    denoisers = {who.name: who.model for who in contestants if isinstance(who.model, Denoiser)}
    if not denoisers:
        return [report.Picture(title, "Nothing to show: no contestant is a denoiser (add the teacher).", b"")]
    clean = _truth(law, contestants[0].shape, settings, size)
    if clean is None:
        return [
            report.Picture(title, f"Nothing to show: the data of {law} are not on this machine (give --data).", b"")
        ]
    eps = torch.randn(clean.x.shape, generator=stream(settings.seed, "noise levels"))
    series: dict[str, list[tuple[float, float]]] = {}
    for name, denoiser in denoisers.items():
        levels = default_levels(denoiser).quantile(torch.linspace(0, 1, 16))
        cond = None
        # without the condition, where the law's labels are not the denoiser's
        if denoiser.classes and not denoiser.contexts and clean.y is not None and int(clean.y.max()) < denoiser.classes:
            cond = one_hot(clean.y, denoiser.classes)
        with torch.no_grad():
            losses = [_level_loss(denoiser, clean.x, eps, level, cond) for level in levels]
        series[name] = [(float(level), loss) for level, loss in zip(levels, losses, strict=True)]
    text = "1 is a network that has learned nothing; the weight is EDM's, (sigma^2 + sd^2) / (sigma sd)^2."
    return [report.Curve(title, text, "sigma", "loss", series, log_x=True, log_y=True)]


def _level_loss(denoiser: Denoiser, x: Tensor, eps: Tensor, level: Tensor, cond: Tensor | None) -> float:
    sigma = level.expand(len(x))
    estimate = from_cpu(denoiser, denoiser)(perturb(x, sigma, eps), sigma, cond)
    return float(denoising(estimate, x, sigma, denoiser.sigma_data).mean())


def _truth(law: str, shape: tuple[int, ...], settings: Evaluation, size: int | None) -> Data | None:
    """Five hundred samples of the law, if they can be had."""
    if law.startswith("exact:"):
        target: Any = teachers.load(law)
        return Data(law, target.sample(500, stream(settings.seed, "truth")), None)
    samples = _data_of(law, shape, settings, size)
    if samples is None:
        return None
    rows = torch.randperm(len(samples.x), generator=stream(settings.seed, "truth"))[:500]
    return Data(law, samples.x[rows], None if samples.y is None else samples.y[rows])
