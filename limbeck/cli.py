"""The command line: `limbeck VERB ... --KEY VALUE`.

Keys and values become one dictionary, which the same validation reads as a recipe file: bad input ends in one line and
exit code 2. Exit codes: 0 done, 1 a failure (one line), 2 a user's mistake, 130 Ctrl-C, 143 SIGTERM.

Nothing heavy is imported before the arguments are known, so that help answers at once.
"""

from __future__ import annotations

import io
import json
import os
import sys
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from limbeck.files import check_file, check_folder

VERBS = {
    "distill": ("SOURCE --out DIR [--method NAME] [--KEY VALUE ...]", "distil a teacher into a one-step generator"),
    "teach": (
        "DATA --out DIR [--method NAME] [--KEY VALUE ...]",
        "train a teacher, a classifier for evaluation, or a small GAN",
    ),
    "sample": (
        "FILE --count N --seed S [--class K | --context C] --out PNG|NPZ",
        "draw samples from a generator or a teacher",
    ),
    "evaluate": (
        "FILE ... [--out DIR] [--samples N ...] [--json]",
        "score runs, generators, teachers and samples side by side",
    ),
    "bench": (
        "SOURCE [--untrained cifar10] [--repeats N] [--out FILE.json] [--other.KEY VALUE ...] [--KEY VALUE ...]",
        "measure what a recipe's step costs, or compare two settings",
    ),
    "compare": (
        "GRID.toml --out DIR [--features F] [--workers N] [--known FILE.json] [--only PATTERN]",
        "run a grid of recipes and put their scores side by side",
    ),
    "export": (
        "FILE --to onnx|torch|diffusers|hub|web --out PATH [--runtime DIR] [--serve]",
        "write a generator in a form that other programs, or a browser, open",
    ),
    "reference": ("DATA --features F --out FILE.npz", "measure the moments that Fréchet distances refer to"),
    "import": (
        "FILE --out DIR [--as teacher|generator --sigma-init S]",
        "turn a checkpoint of EDM, SiD, Diff-Instruct or PID into a file of Limbeck's, without running it",
    ),
    "doctor": ("TEACHER [--out DIR] [--seconds N] [--json]", "look for mistakes in a teacher, without data"),
    "methods": ("[--unification]", "list the methods, or the table that unites them"),
    "show": ("RUN [--json]", "say what a run folder holds"),
    "replay": (
        "RUN [--device D] [--method M] [--json]",
        "play the turn again that met NaN or Inf; say where they begin",
    ),
}

RENAMED = {"sample": {"label": "class"}, "import": {"role": "as"}}  # fields by verb whose keys Python reserves
FLAGS = ("json", "unification", "serve")


class Mistake(ValueError):
    """A user's mistake on the command line."""


class Unhealthy(Exception):
    """The doctor found faults."""

    code = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    try:
        code = _command(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader, e.g. `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _command(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        import limbeck

        print(limbeck.__version__)
        return 0
    verb, rest = arguments[0], arguments[1:]
    try:
        if verb not in VERBS:
            raise Mistake(f"{verb}: unknown command, expected one of {', '.join(VERBS)}")
        words, keys = parse(rest)
        if "help" in keys:
            _help(verb, keys.get("method"))
            return 0
        ACTIONS[verb](words, keys)
    except ValueError as error:
        return _fail(error, 2)
    except KeyboardInterrupt:
        return _fail("stopped; what was saved is intact", 130)
    except BrokenPipeError:
        raise
    except (OSError, ArithmeticError, MemoryError) as error:
        return _fail(error, 1)
    except Exception as error:  # folder.Stopped, without importing torch here
        code = getattr(error, "code", None)
        if isinstance(error, RuntimeError):
            from limbeck.device import is_out_of_memory

            if is_out_of_memory(error):
                return _fail("out of memory; ask for less at once (batch, count, samples, template)", 1)
        if not isinstance(code, int):
            raise
        return _fail(error, code)
    return 0


def parse(arguments: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Words, and `--key value`, `--key=value` and flags as a dictionary of strings (lists and tables parsed as TOML).

    Raises:
        Mistake: for a key without a value or a flag with one, or a key given twice.
    """
    words: list[str] = []
    keys: dict[str, Any] = {}
    rest = iter(arguments)
    for item in rest:
        if item == "-h":
            item = "--help"
        if not item.startswith("--"):
            words.append(item)
            continue
        key, equals, value = item[2:].partition("=")
        key = key.replace("-", "_")
        if key in (*FLAGS, "help"):
            if equals:
                raise Mistake(f"--{key}: takes no value")
            keys[key] = "true"
            continue
        if not equals:
            value = next(rest, "--")
            if value.startswith("--"):
                raise Mistake(f"--{key}: needs a value")
        if not all(key.split(".")):
            raise Mistake(f"--{key}: is not a key")
        if key in keys:
            raise Mistake(f"--{key}: is given twice")
        keys[key] = _value(value)
    return words, keys


def _value(text: str) -> Any:
    """What a value means: lists (in parentheses too, as help prints them) and tables as TOML has them, else text."""
    bare = f"[{text[1:-1]}]" if text[:1] == "(" and text[-1:] == ")" else text
    if bare[:1] in ("[", "{"):
        try:
            return tomllib.loads(f"value = {bare}")["value"]
        except (tomllib.TOMLDecodeError, RecursionError):
            return text
    return text


def _usage() -> str:
    lines = ["limbeck distils pretrained diffusion models into generators that need one network call.", ""]
    lines += [f"  limbeck {verb} {form}".rstrip() + f"\n      {what}" for verb, (form, what) in VERBS.items()]
    return "\n".join([*lines, "", "limbeck VERB --help lists a command's keys."])


def _fail(message: object, code: int) -> int:
    text = " ".join(str(message).split()) or type(message).__name__
    print(f"limbeck: {text}", file=sys.stderr)
    return code


def _one(words: Sequence[str], what: str) -> str:
    if len(words) != 1:
        raise Mistake(f"{what}: expected one, got {' '.join(words) or 'none'}")
    return words[0]


def _say(line: str) -> None:
    print(line, file=sys.stderr)


@dataclass(frozen=True)
class SampleOptions:
    """Options of `limbeck sample`.

    Attributes:
        out: a .png picture (8-bit) or an .npz file: x (uint8 (n, H, W, C) for images, else float32), y (labels or
            contexts).
        count: number of samples.
        seed: sample j depends on (seed, j) alone.
        label: class of all samples (--class K); left out: uniform over the classes.
        context: context of all samples, numbers in [0, 1]; left out: uniform.
        steps: Heun steps for a teacher.
        device: where the network computes: auto, cpu, cuda.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    out: str
    count: int = 64
    seed: int = 0
    label: int | None = None
    context: float | tuple[float, ...] | None = None
    steps: int = 18
    device: str = "auto"

    def __post_init__(self) -> None:
        for name, least in (("count", 1), ("seed", 0), ("steps", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: must be at least {least}, got {getattr(self, name)}")
        if not all(0 <= value <= 1 for value in self.contexts):
            raise ValueError(f"context: must lie in [0, 1], got {self.context}")
        if Path(self.out).suffix not in (".png", ".npz"):
            raise ValueError(f"out: must end in .png or .npz, got {self.out}")
        check_file(self.out)

    @property
    def contexts(self) -> tuple[float, ...]:
        """The context's numbers; () = none is asked for."""
        if self.context is None:
            return ()
        return self.context if isinstance(self.context, tuple) else (self.context,)


@dataclass(frozen=True)
class EvaluateOptions:
    """Options of `limbeck evaluate` beside those of a recipe's `evaluate` table.

    Attributes:
        against: the law to score against, if it is not the first file's own teacher or data.
        out: folder for scores (an interrupted evaluation goes on), contest.json and contest.html.
        size: side to which pictures of a folder are resized.
        teacher: score the teachers of generators too, by Heun's method of `teacher_steps`, unless named already.
        device: where networks compute: auto, cpu, cuda.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    against: str | None = None
    out: str | None = None
    size: int | None = None
    teacher: bool = True
    device: str = "auto"


@dataclass(frozen=True)
class ExportOptions:
    """Options of `limbeck export`.

    Attributes:
        to: onnx, torch (a torch.export program), diffusers (a pipeline's folder), hub (a folder for the Hugging Face
            Hub) or web (a folder with a page on which the generator runs).
        out: the .onnx or .pt2 file, or a new folder.
        runtime: for web, the folder that holds onnxruntime-web's three files (`make web-runtime`).
        serve: for web, serve the folder to this machine's browser afterwards, until Ctrl-C.
        port: of --serve; 0 takes a free one.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    to: Literal["onnx", "torch", "diffusers", "hub", "web"]
    out: str
    runtime: str = "web-runtime"
    serve: bool = False
    port: int = 8000

    def __post_init__(self) -> None:
        if self.serve and self.to != "web":
            raise ValueError(f"serve: goes with --to web, not --to {self.to}")
        if not 0 <= self.port < 2**16:
            raise ValueError(f"port: must lie between 0 and 65535, got {self.port}")


@dataclass(frozen=True)
class DoctorOptions:
    """Options of `limbeck doctor`.

    Attributes:
        out: folder for doctor.json and samples.png.
        seconds: about the longest that it may take; large networks get fewer samples.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    out: str | None = None
    seconds: float = 60.0

    def __post_init__(self) -> None:
        if not 1 <= self.seconds <= 86400:
            raise ValueError(f"seconds: must be 1 to 86,400, got {self.seconds:g}")
        if self.out is not None:
            check_folder(self.out)


@dataclass(frozen=True)
class BenchOptions:
    """Options of `limbeck bench` beside a recipe's keys. Keys under `other.` make a second setting, for ratios.

    Attributes:
        untrained: cifar10 or imagenet64: in place of the recipe's teacher, a network of the size of EDM's with random
            weights.
        repeats: of each setting; the median counts.
        steps_each: steps of one repeat.
        out: a .json file for the result.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    untrained: Literal["cifar10", "imagenet64"] | None = None
    repeats: int = 5
    steps_each: int = 1
    out: str | None = None

    def __post_init__(self) -> None:
        for name in ("repeats", "steps_each"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1, got {getattr(self, name)}")
        if self.out is not None:
            check_file(self.out)


@dataclass(frozen=True)
class CompareOptions:
    """Options of `limbeck compare`.

    Attributes:
        features: replaces evaluate.features of all runs, e.g. by a TorchScript file.
        workers: cells that are played at the same time, each by a process of its own.
        known: a comparison.json of this grid, from another day or machine: its runs are not played again.
        only: play the cells whose names fit this pattern, with * for any text, e.g. "sid-*".
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    features: str | None = None
    workers: int = 1
    known: Path | None = None
    only: str = "*"

    def __post_init__(self) -> None:
        if not 1 <= self.workers <= 1000:
            raise ValueError(f"workers: must be 1 to 1,000, got {self.workers}")


@dataclass(frozen=True)
class ReferenceOptions:
    """Options of `limbeck reference`.

    Attributes:
        features: a bundled classifier's name, a classifier's file or a TorchScript file.
        out: the .npz file to write.
        size: side to which pictures of a folder are resized.
        device: where the feature network computes: auto, cpu, cuda.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    features: str
    out: str
    size: int | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        if Path(self.out).suffix != ".npz":
            raise ValueError(f"out: must end in .npz, got {self.out}")
        check_file(self.out)


@dataclass(frozen=True)
class ImportOptions:
    """Options of `limbeck import`.

    Attributes:
        out: the folder to write.
        role: teacher or generator (--as), where the file does not say it.
        sigma_init: noise level of a one-step generator; by default SiD trains at 2.5, Diff-Instruct at 1.0.
        preconditioning: edm, vp or ve, for bare weights that are no PID student.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    out: str
    role: Literal["teacher", "generator"] | None = None
    sigma_init: float | None = None
    preconditioning: Literal["edm", "vp", "ve"] | None = None


def _options(cls: type, verb: str, keys: dict[str, Any]) -> Any:
    """The validated options of a verb, some of whose fields have another name on the command line."""
    from limbeck import config

    for field, key in RENAMED[verb].items():
        if key in keys:
            keys[field] = keys.pop(key)
    try:
        return config.validate(cls, keys)
    except ValueError as error:
        text = str(error)
        for field, key in RENAMED[verb].items():
            text = text.replace(field, key)
        raise Mistake(text) from None


def _import(words: list[str], keys: dict[str, Any]) -> None:
    from limbeck import importer

    options: ImportOptions = _options(ImportOptions, "import", keys)
    path = Path(_one(words, "FILE"))
    target = importer.convert(path, Path(options.out), options.role, options.sigma_init, options.preconditioning)
    _say(f"{path}: {target.stem} in {target}; nothing of the file was run. {importer.LICENCE}")


def _network(keys: dict[str, Any]) -> Any:
    """The class that `--network pkg.mod:Class` names, None without it."""
    target = keys.pop("network", None)
    if target is None:
        return None
    from limbeck import networks

    return networks.named_by_caller(str(target))


def _methods(words: list[str], keys: dict[str, Any]) -> None:
    from limbeck.methods import TABLE

    unified = keys.pop("unification", None) == "true"
    _known(keys, ())
    if words:
        raise Mistake(f"{words[0]}: `limbeck methods` takes no argument")
    if unified:
        from limbeck import unification

        print("\n".join(unification.table()))
        return
    for name, entry in TABLE.items():
        print(f"{name:15} {entry.title} ({entry.paper})")


def _recipe(words: list[str], keys: dict[str, Any], field: str, default: str) -> tuple[dict[str, Any], Path, bool]:
    """The recipe table, the run folder, and whether the result is printed as JSON; arguments as `_table`."""
    source = _one(words, "SOURCE")
    as_json = keys.pop("json", None) == "true"
    out = _folder(keys.pop("out", None))
    return _table(source, keys, field, default), out, as_json


def _table(source: str, keys: dict[str, Any], field: str, default: str) -> dict[str, Any]:
    """The recipe table of SOURCE (a recipe file or a teacher or data set) with the keys of the command line.

    Args:
        field: the key that SOURCE is, if it is no recipe file.
        default: the method, if none is named.
    """
    from limbeck import config

    is_file = source.endswith(".toml") and not source.startswith("exact:")
    table: dict[str, Any] = config.read_toml(Path(source)) if is_file else {field: source}
    method = table.get("method", {})
    if isinstance(method, str):
        method = {"name": method}
    if isinstance(method, dict) and ":" in str(method.get("name", "")) and "method" not in keys:
        raise Mistake(f"method.name: {method['name']!r} names code; give it on the command line with --method")
    if is_file:
        config.refuse_program(table, Path(source))
    table["method"] = {"name": keys.pop("method")} if "method" in keys else method
    for key, value in keys.items():
        config.set_dotted(table, key, _literal(value) if _is_argument(key) else value)
    if isinstance(table["method"], dict):
        table["method"].setdefault("name", default)
    return table


def _folder(out: Any) -> Path:
    if not isinstance(out, str):
        raise Mistake("out: is missing; give a folder with --out DIR")
    check_folder(out)
    return Path(out)


def _is_argument(key: str) -> bool:
    """Is this an argument of a network, in a table without declared types?"""
    return key.startswith(("template.", "generator.")) and key != "generator.file"


def _literal(text: Any) -> Any:
    """Network arguments have no declared types: read numbers, booleans and lists as TOML does."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError):
        return text


def _distill(words: list[str], keys: dict[str, Any]) -> None:
    from limbeck import config, methods, run

    network = _network(keys)
    table, out, as_json = _recipe(words, keys, "teacher", "pid")
    recipe = config.resolve(table, methods.METHODS, foreign=True)
    _print_result(run.run_distillation(recipe, out, _say, network=network), as_json)


def _teach(words: list[str], keys: dict[str, Any]) -> None:
    from limbeck import config, run

    network = _network(keys)
    table, out, as_json = _recipe(words, keys, "data", "denoising")
    recipe = config.resolve(table, config.TEACHING)
    _print_result(run.run_teaching(recipe, out, _say, network), as_json)


def _print_result(result: dict[str, Any], as_json: bool) -> None:
    from limbeck.distributed import rank_and_world

    if as_json and rank_and_world()[0] == 0:
        print(json.dumps(result, indent=1))


def _sample(words: list[str], keys: dict[str, Any]) -> None:
    import numpy as np
    import torch

    from limbeck import device, summary
    from limbeck.distributed import gather, rank_and_world
    from limbeck.evaluate.draws import Latents, generate, latents
    from limbeck.files import write_atomically
    from limbeck.generator import Generator
    from limbeck.pictures import overview, png, to_bytes

    source, network = _one(words, "FILE"), _network(keys)
    options: SampleOptions = _options(SampleOptions, "sample", keys)
    model = _model(source, network).to(device.chosen(options.device))
    sampler, calls, shape, classes, contexts = summary.sampler_of(model, options.steps)
    if "steps" in keys and isinstance(model, Generator):
        raise Mistake(f"steps: belongs to teachers; {source} is a generator and takes {calls} network call(s)")
    rank, world = rank_and_world()
    if options.count < world:
        raise Mistake(f"count: must be at least the number of processes, {world}, got {options.count}")
    share = range(rank * options.count // world, (rank + 1) * options.count // world)
    drawn = latents(options.seed, share, shape, classes, contexts=contexts)
    asked = _condition(options, source, classes, contexts)
    if asked is not None and drawn.labels is not None:
        drawn = Latents(drawn.z, torch.tensor(asked).expand_as(drawn.labels))
    own = {"rows of x": generate(sampler, drawn, classes)}
    if drawn.labels is not None:
        own["rows of y"] = drawn.labels
    every = gather(own)
    if rank:
        return
    x = torch.cat([theirs["rows of x"] for theirs in every])
    out = Path(options.out)
    if out.suffix == ".png":
        picture = overview(x, max(1, round(options.count**0.5)), float(x.abs().max()) * 1.05)
        if picture is None:
            raise Mistake(f"out: samples of shape {tuple(x.shape[1:])} cannot be a picture; write an .npz file")
        content = png(picture)
    else:
        arrays: dict[str, Any] = {"x": to_bytes(x) if x.ndim == 4 else x.numpy()}
        if drawn.labels is not None:
            arrays["y"] = torch.cat([theirs["rows of y"] for theirs in every]).numpy()
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        content = buffer.getvalue()
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, content)
    _say(f"{options.count} samples in {out}")


def _condition(options: SampleOptions, source: str, classes: int, contexts: bool) -> int | tuple[float, ...] | None:
    """The class or context that is asked for, if it is one of this model's."""
    if contexts:
        known = f"has contexts of {classes} number{'s' if classes > 1 else ''} in [0, 1]"
    else:
        known = f"has classes 0 to {classes - 1}" if classes else "is unconditional"
    if options.label is not None and (contexts or not 0 <= options.label < classes):
        raise Mistake(f"class: {source} {known}, got {options.label}")
    if options.contexts and not (contexts and len(options.contexts) == classes):
        raise Mistake(f"context: {source} {known}, got {options.context}")
    return options.contexts or options.label


def _model(source: str, network: Any = None) -> Any:
    """A generator's file or run folder, else a teacher."""
    from limbeck import refine, teachers

    path = Path(source)
    generator = refine.generator_at(path, network)
    if generator is not None:
        return generator
    if (path / "classifier.safetensors").is_file():
        raise ValueError(f"{path}: holds a classifier, which draws no samples")
    if path.is_dir() and not (path / "denoiser.safetensors").is_file():
        raise ValueError(f"{path}: has no finished model yet")
    return teachers.load(source, network)


def _evaluate(words: list[str], keys: dict[str, Any]) -> None:
    from limbeck import config, device, summary
    from limbeck.config import Evaluation
    from limbeck.distributed import rank_and_world
    from limbeck.evaluate.contest import contest

    if not words:
        raise Mistake("FILE: expected at least one, got none")
    as_json, network = keys.pop("json", None) == "true", _network(keys)
    options: EvaluateOptions = config.validate(
        EvaluateOptions, {key: keys.pop(key) for key in ("against", "out", "size", "teacher", "device") if key in keys}
    )
    settings: Evaluation = config.validate(Evaluation, keys)
    out = None if options.out is None else _folder(options.out)
    place = device.chosen(options.device)
    result = contest(words, settings, out, _say, options.against, options.size, network, options.teacher, place)
    if rank_and_world()[0] != 0:
        return
    if as_json:
        print(json.dumps(result, indent=1))
    else:
        columns = {summary.column(row["name"], row["samples"], settings.samples): row for row in result["rows"]}
        columns |= summary.truth_columns(result, settings.samples)
        for line in summary.table_of(columns):
            print(line)


def _bench(words: list[str], keys: dict[str, Any]) -> None:
    import torch

    from limbeck import bench, config, methods
    from limbeck.files import write_atomically

    network, as_json = _network(keys), keys.pop("json", None) == "true"
    options: BenchOptions = config.validate(
        BenchOptions, {key: keys.pop(key) for key in ("untrained", "repeats", "steps_each", "out") if key in keys}
    )
    other = {key.removeprefix("other."): keys.pop(key) for key in list(keys) if key.startswith("other.")}
    source = _one(words, "SOURCE")
    tables = {"one": _table(source, dict(keys), "teacher", "pid")}
    if other:
        tables["other"] = _table(source, {**keys, **other}, "teacher", "pid")
    for table in tables.values():
        if "data" in table:
            raise Mistake(f"SOURCE: {source} teaches, and bench measures distillations")
    recipes = {name: config.resolve(table, methods.METHODS, foreign=True) for name, table in tables.items()}
    teacher = None if options.untrained is None else bench.untrained(options.untrained)
    threads = recipes["one"].threads
    if threads is not None:
        torch.set_num_threads(threads)
    result = bench.bench(recipes, teacher, network, options.repeats, options.steps_each)
    result = {"source": source, "untrained": options.untrained, "keys": keys, "other": other, **result}
    text = json.dumps(result, indent=1) + "\n"
    if options.out is not None:
        Path(options.out).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(Path(options.out), text)
    print(text if as_json else "\n".join(bench.lines(result)))


def _compare(words: list[str], keys: dict[str, Any]) -> None:
    from limbeck import compare, config

    out = _folder(keys.pop("out", None))
    as_json = keys.pop("json", None) == "true"
    options: CompareOptions = config.validate(CompareOptions, keys)
    result = compare.compare(
        Path(_one(words, "GRID.toml")), out, _say, options.features, options.workers, options.known, options.only
    )
    _print_result(result, as_json)


def _export(words: list[str], keys: dict[str, Any]) -> None:
    from limbeck import config
    from limbeck.export import export

    source, network = _one(words, "FILE"), _network(keys)
    options: ExportOptions = config.validate(ExportOptions, keys)
    done = export(source, options.to, options.out, options.runtime, network)
    _say(
        f"{done.path}: {done.size / 1e6:.1f} MB, largest difference to PyTorch {done.difference:.1e} "
        f"over {done.samples} samples"
    )
    if options.serve:
        from limbeck.export.web import serve

        serve(done.path, options.port, _say)


def _reference(words: list[str], keys: dict[str, Any]) -> None:
    from limbeck import config, data, device
    from limbeck.evaluate.judge import measured_reference

    options: ReferenceOptions = config.validate(ReferenceOptions, keys)
    source = _one(words, "DATA")
    data.check_size(options.size, source)
    place = device.chosen(options.device)
    samples = data.load(source, options.size)
    measured_reference(samples, options.features, device=place)[0].save(Path(options.out))
    _say(f"moments of {len(samples.x):,} samples in {options.out}")


def _doctor(words: list[str], keys: dict[str, Any]) -> None:
    from limbeck import config, doctor, teachers
    from limbeck.files import write_atomically
    from limbeck.pictures import overview, png

    source, network, as_json = _one(words, "TEACHER"), _network(keys), keys.pop("json", None) == "true"
    options: DoctorOptions = config.validate(DoctorOptions, keys)
    diagnosis = doctor.examine(teachers.load(source, network), options.seconds)
    text = json.dumps({"teacher": source, **diagnosis.table()}, indent=1)
    if options.out is not None:
        out = Path(options.out)
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / "doctor.json", text + "\n")
        x = diagnosis.samples[:64]
        picture = overview(x, 8, float(x.abs().max()) * 1.05) if len(x) and x.isfinite().all() else None
        if picture is not None:
            write_atomically(out / "samples.png", png(picture))
    print(text if as_json else "\n".join(diagnosis.lines()))
    if diagnosis.findings:
        raise Unhealthy(f"{source}: {', '.join(finding.check for finding in diagnosis.findings)}")


def _show(words: list[str], keys: dict[str, Any]) -> None:
    from limbeck import show

    as_json = keys.pop("json", None) == "true"
    _known(keys, ())
    show.show(Path(_one(words, "RUN")), as_json)


def _replay(words: list[str], keys: dict[str, Any]) -> None:
    from limbeck import replay

    network, as_json = _network(keys), keys.pop("json", None) == "true"
    place, method = keys.pop("device", None), keys.pop("method", None)
    _known(keys, ("network", "device", "method"))
    found = replay.replay(Path(_one(words, "RUN")), _say, network=network, place=place, method=method)
    print(json.dumps(found.table(), indent=1) if as_json else "\n".join(found.lines()))


def _known(keys: dict[str, Any], known: Sequence[str]) -> None:
    for key in keys:
        if key not in known:
            raise Mistake(f"{key}: unknown key{'; expected one of ' + ', '.join(known) if known else ''}")


def _help(verb: str, method: str | None) -> None:
    """What a command does and, if it has any, its keys."""
    form, what = VERBS[verb]
    print(f"limbeck {verb} {form}".rstrip() + f"\n\n{what}\n")
    if verb not in ("methods", "show", "replay"):
        from limbeck import manual

        manual.print_keys(verb, method)
    if verb in ("distill", "teach", "sample", "evaluate", "export", "doctor", "bench", "replay"):
        print("--network PACKAGE.MODULE:CLASS    your own network, for files and templates that need it")
    if verb in ("distill", "teach", "evaluate", "compare", "doctor", "show", "bench", "replay"):
        print("--json                            print the result as JSON")


ACTIONS: dict[str, Callable[[list[str], dict[str, Any]], None]] = {
    "distill": _distill,
    "teach": _teach,
    "sample": _sample,
    "evaluate": _evaluate,
    "bench": _bench,
    "compare": _compare,
    "export": _export,
    "import": _import,
    "reference": _reference,
    "doctor": _doctor,
    "methods": _methods,
    "show": _show,
    "replay": _replay,
}
