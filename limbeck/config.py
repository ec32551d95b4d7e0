"""Recipes: everything that decides a run, as frozen dataclasses read from TOML and the command line.

A file and the command line meet in one nested dictionary, which is validated once; so both have one form of error, a
line that names the dotted key.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import math
import reprlib
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import tomli_w
from pydantic import TypeAdapter, ValidationError
from torch import nn

from limbeck import methods, teaching
from limbeck.ema import Average
from limbeck.noise import Levels
from limbeck.optimizer import Optimizer
from limbeck.passes import Precision

TEACHING: dict[str, type] = {
    "denoising": teaching.Denoising, "classification": teaching.Classification, "gan": teaching.GAN,
}  # fmt: skip


@dataclass(frozen=True)
class Every:
    """Steps between two events; 0 = never. The last step always saves.

    Attributes:
        log: a row of log.jsonl.
        save: a checkpoint.
        sample: a grid of samples.
        evaluate: scores on the validation indices.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    log: int = 50
    save: int = 1000
    sample: int = 1000
    evaluate: int = 0

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if value < 0:
                raise ValueError(f"{name}: must not be negative, got {value}")


@dataclass(frozen=True)
class Evaluation:
    """How a model is judged.

    Attributes:
        samples: samples of one draw.
        draws: independent draws; the score is their mean.
        seed: key of the samples' noise; sample j depends on (seed, j) alone.
        teacher_steps: Heun steps of the teacher, 2 * steps - 1 network calls.
        data: reference images for teachers that bring none (a name or file as for `teach`); or "exact:...", the law
            that a learned teacher learned.
        reference: a file of `limbeck reference`, or EDM's statistics (.npz), instead of `data`.
        features: feature network of `data` or `reference`: a bundled name, "pixels", a classifier's file, a TorchScript
            file (.pt, a program: named on the command line or in Python only) or, in Python, a module.
        quantize: score images as 8-bit values.
        mmd_scale: length in whose units the kernels of `mmd` have their widths; None = the exact law's sigma_data.
        watched: samples of the scores on the way (`every.evaluate`); 0 = a quarter of `samples`.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    samples: int = 10_000
    draws: int = 1
    seed: int = 0
    teacher_steps: int = 18
    data: str | None = None
    reference: str | None = None
    features: Any = None
    quantize: bool = True
    mmd_scale: float | None = None
    watched: int = 0

    def __post_init__(self) -> None:
        if not (self.features is None or isinstance(self.features, str | nn.Module)):
            raise ValueError(f"features: must be a name, a file or a module, got {reprlib.repr(self.features)}")
        for name, least in (("samples", 2), ("draws", 1), ("seed", 0), ("teacher_steps", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: must be at least {least}, got {getattr(self, name)}")
        if self.mmd_scale is not None and not 0 < self.mmd_scale < math.inf:
            raise ValueError(f"mmd_scale: must be positive and finite, got {self.mmd_scale}")
        if self.watched < 0 or self.watched == 1:
            raise ValueError(f"watched: must be 0 (a quarter of samples) or at least 2, got {self.watched}")


@dataclass(frozen=True)
class Real:
    """Where a method with a critic gets real samples.

    Attributes:
        source: auto: an exact teacher's samples, else data; data; or teacher:N, N Heun samples of the teacher, which
            keeps the method free of data.
        data: the data set (a name or file as for `teach`); None = that of the teacher's name, or what it was taught on.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    source: str = "auto"
    data: str | None = None

    def __post_init__(self) -> None:
        kind, _, count = self.source.partition(":")
        if self.source not in ("auto", "data") and not (kind == "teacher" and count.isdigit() and int(count) > 0):
            raise ValueError(f"source: must be auto, data or teacher:N, got {self.source!r}")


@dataclass(frozen=True)
class Health:
    """What a run does when it falls ill.

    Attributes:
        nonfinite: what follows a loss or gradient that is NaN or Inf: stop; or rollback, to the last checkpoint and on
            from there with a smaller step.
        shrink: factor on all learning rates at each return.
        rollbacks: returns until the run stops after all.
        every: steps between two looks of the monitors (see `limbeck.health`); 0 = never.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    nonfinite: Literal["stop", "rollback"] = "stop"
    shrink: float = 0.5
    rollbacks: int = 3
    every: int = 50

    def __post_init__(self) -> None:
        if self.nonfinite not in ("stop", "rollback"):
            raise ValueError(f"nonfinite: must be stop or rollback, got {self.nonfinite!r}")
        if not 0 < self.shrink < 1:
            raise ValueError(f"shrink: must lie between 0 and 1, got {self.shrink}")
        for name, least in (("rollbacks", 1), ("every", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: must be at least {least}, got {getattr(self, name)}")


@dataclass(frozen=True)
class Recipe:
    """One run.

    Attributes:
        method: the objective, by name with its hyper-parameters.
        teacher: what is distilled (`limbeck distill`).
        data: what is learned (`limbeck teach`).
        size: side to which pictures of a folder are resized (of data, real.data, evaluate.data).
        template: the student's network and its arguments; empty = the teacher's own, or one that suits the shape.
        generator: `file`, a generator to refine: its file, a run folder, or weights of the caller's class (--network)
            with a card; or network, its arguments and `noise` of a plain map from z to samples (`generator.Direct`),
            with fresh weights; empty = the generator that the method builds from the template.
        steps: length of the run; the default is that of the method, else 4,000.
        batch: samples of one turn.
        micro_batches: parts in which a turn's batch is computed, to save memory; under torchrun, each process's share;
            0 = as few as fit in the memory that is free when the run starts.
        precision: fp32, bf16 or fp16 by role (a player, or teacher), of its network passes while turns are played:
            precision.teacher = "bf16". Weights, optimisers and losses stay fp32. A role that is missing is fp32.
        checkpointing: roles whose activations are made again in the backward pass instead of kept: for networks with
            blocks about half the memory of a step, for a forward pass more.
        compile: compile the networks with torch.compile.
        device: where networks compute: auto (a GPU where there is one; of several processes, one each), cpu, cuda.
        sharded: under torchrun, split the players' weights over the processes, for models that outgrow a device.
        stratified: one u from each of `batch` equal intervals.
        antithetic: half of a batch has the negatives of the other half's latents and noise, at equal u.
        seed: key of everything random in training.
        optimizer: settings by player, over the method's defaults.
        ema: moving average of the weights that are exported.
        real: real samples, for methods with a critic.
        warm_start: steps in which a student network that is not the teacher's own first learns to imitate it, for
            methods whose players start as the teacher; 0 = random weights.
        clip: largest gradient norm.
        threads: CPU threads; results are bit-equal only at equal threads.
        keep: checkpoints kept.
        every: steps between rows of the log, checkpoints, grids of samples and scores on the way.
        evaluate: how the model is judged.
        health: what a run does when it falls ill.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    method: Any
    teacher: str | None = None
    data: str | None = None
    size: int | None = None
    template: dict[str, Any] = field(default_factory=dict)
    generator: dict[str, Any] = field(default_factory=dict)
    steps: int = 4000
    batch: int = 256
    micro_batches: int = 1
    precision: dict[str, Precision] = field(default_factory=dict)
    checkpointing: tuple[str, ...] = ()
    compile: bool = False
    device: str = "auto"
    sharded: bool = False
    stratified: bool = False
    antithetic: bool = False
    seed: int = 0
    optimizer: dict[str, Optimizer] = field(default_factory=dict)
    ema: Average = field(default_factory=Average)
    real: Real = field(default_factory=Real)
    warm_start: int = 2000
    clip: float | None = None
    threads: int | None = None
    keep: int = 2
    every: Every = field(default_factory=Every)
    evaluate: Evaluation = field(default_factory=Evaluation)
    health: Health = field(default_factory=Health)

    def __post_init__(self) -> None:
        for name, least in (
            ("steps", 1),
            ("batch", 1),
            ("micro_batches", 0),
            ("seed", 0),
            ("warm_start", 0),
            ("threads", 1),
            ("keep", 1),
            ("size", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}: must be at least {least}, got {value}")
        for name, most in (("seed", 2**63 - 1), ("threads", 1024)):
            value = getattr(self, name)
            if value is not None and value > most:
                raise ValueError(f"{name}: must be at most {most}, got {value}")
        if self.micro_batches > self.batch:
            raise ValueError(f"micro_batches: cannot exceed the batch of {self.batch}, got {self.micro_batches}")
        if self.clip is not None and not 0 < self.clip < math.inf:
            raise ValueError(f"clip: must be positive and finite, got {self.clip}")


# what may change when a run is continued
FREE = (
    "steps", "every", "evaluate", "health", "keep", "threads", "micro_batches", "sharded", "checkpointing", "compile",
    "device",
)  # fmt: skip


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file as a dictionary.

    Raises:
        ValueError: naming the file.
    """
    try:
        return tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not a readable TOML file ({error})") from None


def set_dotted(table: dict[str, Any], key: str, value: Any) -> None:
    """table["a"]["b"] = value for key "a.b".

    Raises:
        ValueError: if "a" is not a table.
    """
    *parents, leaf = key.split(".")
    for depth, parent in enumerate(parents):
        inner = table.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise ValueError(f"{key}: {'.'.join(parents[: depth + 1])} is a single value, it has no fields")
        table = inner
    table[leaf] = value


def merged(table: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a nested dictionary with the values of another one over its own, table by table."""
    result = copy.deepcopy(dict(table))
    for key, value in over.items():
        inner = result.get(key)
        if isinstance(value, Mapping) and isinstance(inner, Mapping):
            result[key] = merged(inner, value)
        else:
            result[key] = copy.deepcopy(value)
    return result


def resolve(table: Mapping[str, Any], known: Mapping[str, type], foreign: bool = False) -> Recipe:
    """A validated recipe from a nested dictionary.

    Args:
        known: methods by name (`methods.METHODS` or `TEACHING`).
        foreign: allow a method "package.module:Class", which runs the caller's code; never for a recipe from a file.

    Raises:
        ValueError: one line that names the dotted key.
    """
    table = {key: dict(value) if isinstance(value, Mapping) else value for key, value in table.items()}
    table["method"] = resolve_method(table.get("method"), known, foreign)
    if hasattr(table["method"], "steps"):
        table.setdefault("steps", table["method"].steps)
    defaults = table["method"].optimizers()
    given = table.get("optimizer", {})
    if not isinstance(given, dict):
        raise ValueError("optimizer: must be a table of players, e.g. optimizer.generator.lr")
    for player, settings in given.items():
        if player not in defaults:
            raise ValueError(f"optimizer.{player}: unknown player{_nearest(str(player), defaults, 'optimizer.')}")
        if not isinstance(settings, Mapping):
            raise ValueError(f"optimizer.{player}: must be a table, e.g. optimizer.{player}.lr")
    table["optimizer"] = {
        player: {**dataclasses.asdict(default), **given.get(player, {})} for player, default in defaults.items()
    }
    return validate(Recipe, table)


def resolve_method(value: Any, known: Mapping[str, type], foreign: bool = False) -> Any:
    """An objective from {"name": ..., fields}, or as it is if it already is one."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        if type(value) in known.values():
            validate(type(value), plain(value), "method")  # its constructor does not look at every field
        return value
    fields = {"name": value} if isinstance(value, str) else dict(value) if isinstance(value, Mapping) else {}
    name = fields.pop("name", None)
    if not isinstance(name, str):
        wrong = "missing" if name is None else f"must be a name, got {name!r}"
        raise ValueError(f"method.name: {wrong}; expected one of {', '.join(known)}")
    if name in known:
        return validate(known[name], _over(known[name](), fields), "method")
    if ":" not in name:
        raise ValueError(f"method.name: unknown method {name!r}{_nearest(name, known)}")
    if not foreign:
        raise ValueError(f"method.name: {name!r} names code; give it on the command line with --method, not in a file")
    try:
        cls = methods.resolve(name)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ValueError(f"method.name: cannot find {name!r} ({error})") from None
    if not dataclasses.is_dataclass(cls) or not isinstance(cls, type) or not hasattr(cls, "turns"):
        raise ValueError(f"method.name: {name!r} is not an objective (a dataclass with players, turns and optimizers)")
    return validate(cls, fields, "method")


def _over(default: Any, given: Any) -> Any:
    """`given`, whose tables are completed with what the default has in the same place.

    One key of a method's `game` leaves the rest as the method has it. A noise law of another kind is taken as given.
    """
    if not dataclasses.is_dataclass(default) or not isinstance(given, Mapping):
        return given
    names = [f.name for f in dataclasses.fields(default)]
    if isinstance(default, Levels) and not given.keys() <= set(names):
        return given
    return {**plain(default), **{k: _over(getattr(default, k), v) if k in names else v for k, v in given.items()}}


def method_name(method: Any) -> str:
    """The name under which a method's class is known, else "package.module:Class"."""
    cls = type(method)
    target = f"{cls.__module__}:{cls.__qualname__}"
    for name, entry in methods.TABLE.items():
        if entry.target == target:
            return name
    return next((name for name, known in TEACHING.items() if known is cls), target)


def validate(cls: type, table: Mapping[str, Any], prefix: str = "") -> Any:
    """An instance of the dataclass `cls` from a nested dictionary.

    Raises:
        ValueError: one line: the dotted key, what is wrong, and the nearest known key for an unknown one.
    """
    try:
        return TypeAdapter(cls).validate_python(dict(table))
    except ValidationError as error:
        raise ValueError(_line(error, cls, prefix)) from None


def _line(error: ValidationError, cls: type, prefix: str) -> str:
    errors = error.errors()
    path, holders = _walk(cls, errors[0]["loc"])
    if len(path) < len(errors[0]["loc"]):
        # one of several laws: what is wrong with the one whose keys these are, rather than the keys of another
        errors.sort(key=lambda e: e["type"] == "unexpected_keyword_argument")
        path, _ = _walk(cls, errors[0]["loc"])
    first = errors[0]
    dotted = ".".join([prefix, *path] if prefix else path)
    if first["type"] == "unexpected_keyword_argument":
        known = dict.fromkeys(f.name for holder in holders for f in dataclasses.fields(holder))
        return f"{dotted}: unknown key{_nearest(path[-1], known, dotted[: -len(path[-1])])}"
    if first["type"] == "value_error":  # from a __post_init__, whose message begins with the field's name
        return (f"{dotted}." if dotted else "") + str(first["ctx"]["error"])
    if first["type"] == "missing":
        return f"{dotted}: is missing"
    given = " ".join(reprlib.repr(first["input"]).split())  # shortened, and on one line whatever its type prints
    return f"{dotted}: {first['msg'][0].lower()}{first['msg'][1:]}, got {given}"


def _walk(cls: Any, loc: Iterable[int | str]) -> tuple[list[str], list[Any]]:
    """Our dotted path in pydantic's location of an error, and the dataclasses that may hold its last key.

    Pydantic adds the name of a union's member to the path; keys of ours are plain. What is no field is a player's name,
    whose settings are an `Optimizer`.
    """
    path: list[str] = []
    holders: tuple[Any, ...] = (cls,)
    for part in map(str, loc):
        if typing.get_origin(cls) is types.UnionType and part in (names := [m.__name__ for m in typing.get_args(cls)]):
            holders = typing.get_args(cls)
            cls = holders[names.index(part)]
            continue
        if cls not in holders:
            holders = (cls,)
        path.append(part)
        cls = typing.get_type_hints(cls).get(part, Optimizer) if dataclasses.is_dataclass(cls) else Optimizer
        if type(None) in (members := typing.get_args(cls)):  # a table that may be missing
            cls = members[0]
    return path, [holder for holder in holders if dataclasses.is_dataclass(holder)]


def _nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    known = list(known)
    match = difflib.get_close_matches(name, known, 1, 0.5)
    if match:
        return f", perhaps you meant {prefix}{match[0]}"
    return f"; expected one of {', '.join(known)}" if known else ""


def refuse_program(table: Mapping[str, Any], path: Path) -> None:
    """Raise ValueError if the recipe of a file names a TorchScript file: as with code, only the caller may."""
    settings = table.get("evaluate")
    source = settings.get("features") if isinstance(settings, Mapping) else None
    if isinstance(source, str) and source.endswith(".pt"):
        raise ValueError(f"evaluate.features: {path} names {source}, a program, which only the command line may name")


def to_table(recipe: Recipe) -> dict[str, Any]:
    """The whole recipe as a nested dictionary of JSON-able values; what is None is left out."""
    table = plain(recipe)
    table["method"] = {"name": method_name(recipe.method), **plain(recipe.method)}
    return table


def completed(table: dict[str, Any]) -> dict[str, Any]:
    """A stored recipe with the defaults of keys that are newer than it; as it is if it names the caller's own code."""
    try:
        return to_table(resolve(table, TEACHING if "data" in table else methods.METHODS))
    except ValueError:
        return table


def plain(value: Any) -> Any:
    """Nested values as JSON-able ones, without what is None; an object given in Python, e.g. a module, by its class."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(v) for f in dataclasses.fields(value) if (v := getattr(value, f.name)) is not None}
    if isinstance(value, Mapping):
        return {key: plain(v) for key, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return f"<{type(value).__module__}.{type(value).__qualname__}>"


def dump_toml(table: Mapping[str, Any]) -> str:
    """TOML text of a nested dictionary."""
    return tomli_w.dumps(table)


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys whose values differ."""
    keys: list[str] = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            keys += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            keys.append(prefix + key)
    return keys
