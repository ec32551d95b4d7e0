"""Generators, denoisers and classifiers as files: safetensors weights, with a JSON card in the file's metadata.

A card holds names and numbers. Names resolve in the literal tables of this module and of `networks`, nowhere else, so
that opening a file can never run code from it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.resources
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from limbeck import networks, schedule
from limbeck.denoiser import Denoiser, EpsPreconditioned, Preconditioned, Rescaled
from limbeck.experts import Experts
from limbeck.files import write_atomically
from limbeck.generator import Dirac, Direct, FewStep, Generator, OneStep, Trajectory
from limbeck.given import Given
from limbeck.noise import Karras

FORMAT = 2  # with a hash of everything in it, which format 1 has not
KINDS = ("generator", "denoiser", "classifier")
TENSORS = 10_000  # in one file; the largest networks here have 600


def bundled(name: str) -> Path:
    """Path of a file of package data."""
    return Path(str(importlib.resources.files("limbeck") / "assets" / name))


def locate(source: str, kind: str) -> Path:
    """The file meant by `source`: a path, a run folder, or the name of a bundled model.

    Raises:
        ValueError: if there is no such file.
    """
    path = Path(source)
    if path.is_dir():
        # a folder with a model of another kind is refused where that is loaded, by its name
        files = [path / f"{name}.safetensors" for name in (kind, *KINDS)]
        path = next((file for file in files if file.is_file()), path)
    if path.is_file():
        return path
    names = sorted(p.name.removesuffix(f"-{kind}.safetensors") for p in bundled("").glob(f"*-{kind}.safetensors"))
    if source in names:
        return bundled(f"{source}-{kind}.safetensors")
    known = f"no bundled {kind} of that name (there is: {', '.join(names)})" if names else f"no {kind} is bundled"
    raise ValueError(f"{kind}: no file {source!r}, and {known}")


def save(path: Path, kind: str, module: nn.Module, facts: Mapping[str, Any], dtype: torch.dtype | None = None) -> None:
    """Write `module` with its card and `facts` (recipe, scores, ...) to `path`, atomically.

    Args:
        kind: generator, denoiser or classifier.
        dtype: store floating-point tensors as this type (half precision for small files); None keeps them.
    """
    card = {"format": FORMAT, "kind": kind, "card": describe(module), **facts}
    card = json.loads(json.dumps(card))  # as it will be read
    tensors = {
        # copied, because safetensors stores no tensor under two names, as tied weights have
        name: t.to("cpu", dtype if t.is_floating_point() else None, copy=True).contiguous()
        for name, t in module.state_dict().items()
    }
    card["sha256"] = _hash(card, tensors)
    write_atomically(path, safetensors.torch.save(tensors, {"limbeck": json.dumps(card, sort_keys=True)}))


def describe(module: nn.Module) -> dict[str, Any]:
    """The card of a module: everything but the weights.

    Raises:
        ValueError: for a module that Limbeck cannot rebuild from names and numbers.
    """
    any_module: Any = module
    try:
        described: dict[str, Any] = any_module.card()
    except AttributeError as error:  # "'Mine' object has no attribute 'name'"
        raise ValueError(
            f"{type(module).__name__}: cannot be stored in a file, its parts are not all Limbeck's own ({error}); "
            "template.network gives a student one of Limbeck's networks"
        ) from None
    return described


def read_card(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The card of a file, without its weights.

    Raises:
        ValueError: if the file is not one of Limbeck's, or is newer than this version.
    """
    text = _metadata(path)
    if text is None:
        beside = Path(path).with_suffix(".json")
        where = (
            f"{beside.name} beside it is no card of this kind" if beside.is_file() else f"no {beside.name} beside it"
        )
        raise ValueError(f"{path}: a safetensors file without Limbeck's card in its metadata, and {where}")
    try:
        card = json.loads(text)
        version, kind = card["format"], card["kind"]
        dict(card.get("recipe", {}))
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ValueError(f"{path}: its card is damaged") from None
    if type(version) is not int or not 1 <= version <= FORMAT:
        raise ValueError(f"{path}: written in format {version!r}, this version of Limbeck reads formats up to {FORMAT}")
    if kind not in KINDS:
        raise ValueError(f"{path}: holds an unknown kind of model {kind!r}")
    return card


def is_carded(path: str | os.PathLike[str]) -> bool:
    """Does a safetensors file carry Limbeck's card?"""
    return _metadata(path) is not None


def _metadata(path: str | os.PathLike[str]) -> str | None:
    try:
        with safetensors.safe_open(str(path), "pt") as file:
            text: str | None = (file.metadata() or {}).get("limbeck")
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from None
    return text


def load(path: str | os.PathLike[str], kind: str, network: type[nn.Module] | None = None) -> Any:
    """Rebuild the module of a file, in float32 and eval mode.

    Args:
        network: the caller's own class, for a file whose network is none of Limbeck's.

    Raises:
        ValueError: if the file is damaged, holds another kind of model, or its weights do not fit its card.
    """
    card = read_card(path)
    if card["kind"] != kind:
        raise ValueError(f"{path}: holds a {card['kind']}, expected a {kind}")
    tensors = read_tensors(path)
    module = rebuild(path, kind, card.get("card"), tensors, network)
    check(path, card, tensors)
    return module


def check(path: str | os.PathLike[str], card: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError if a file's card and tensors are not those that were stored."""
    if card["format"] > 1 and card.get("sha256") != _hash(card, tensors):
        raise ValueError(f"{path}: damaged, it does not match its hash")


def is_whole(path: Path) -> bool:
    """Is this a file of Limbeck's, as it was stored?"""
    try:
        check(path, read_card(path), read_tensors(path))
    except ValueError:
        return False
    return True


def _hash(card: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of a card, but for its entry of this, and of tensors."""
    return _digest(json.dumps({k: v for k, v in card.items() if k != "sha256"}, sort_keys=True), tensors)


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        ValueError: if it cannot be read, or holds more than a network has.
    """
    try:
        with safetensors.safe_open(str(path), "pt") as file:
            count = len(file.keys())
        if count > TENSORS:
            raise ValueError(f"{path}: holds {count:,} tensors, more than any network here")
        return safetensors.torch.load_file(str(path))
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from None


def rebuild(
    path: str | os.PathLike[str],
    kind: str,
    card: Any,
    tensors: Mapping[str, Tensor],
    network: type[nn.Module] | None = None,
) -> Any:
    """The module of a card and of the weights that came with it, in float32 and eval mode.

    Args:
        network: the caller's own class, for a card whose network is none of Limbeck's.

    Raises:
        ValueError: naming the file `path`, if names, shapes or numbers do not fit each other exactly.
    """
    place = torch.device("meta" if network is None else "cpu")  # a caller's class may read values
    with _reading(path, kind), place, _at_most(len(tensors) + 1000):
        # a size of which the file cannot hold one byte each
        if _largest(card) > max(os.path.getsize(path), 2**16):
            raise ValueError("it claims a network larger than the file")
        wanted = _BUILDERS[kind](card, network).state_dict()
    _compare(wanted, tensors, path)  # before memory is taken for sizes that a card merely claims
    with _reading(path, kind), torch.random.fork_rng(devices=[]):
        module = _BUILDERS[kind](card, network).eval()
        module.load_state_dict({name: tensor.to(wanted[name].dtype) for name, tensor in tensors.items()})
        _try_out(module)
    return module


def load_generator(path: str | os.PathLike[str], network: type[nn.Module] | None = None) -> Generator:
    """A generator, in float32 and eval mode: generator(z, cond) with z ~ N(0, I) of shape (n, *generator.latent_shape).

    Args:
        path: a generator's safetensors file, or a run folder.
        network: the caller's own class, for a generator whose network is none of Limbeck's.

    Raises:
        ValueError: naming the file and what is wrong with it.
    """
    generator: Generator = load(locate(str(path), "generator"), "generator", network)
    return generator


def fingerprint(module: nn.Module) -> str:
    """SHA-256 over a module's class, form and contexts, and the names, shapes and values of its tensors."""
    facts = f"{getattr(module, 'form', '')}{' of contexts' if getattr(module, 'contexts', False) else ''}"
    return _digest(type(module).__name__ + facts, module.state_dict())


def reading(module: nn.Module) -> str:
    """How a model's weights are read, which their hash leaves out: its card, or what it says of its levels and scale.

    Equal weights in another convention are another model.
    """
    with contextlib.suppress(ValueError, TypeError):  # a card may hold what no file can
        return json.dumps(describe(module), sort_keys=True)
    told = {
        name: getattr(module, name, None) for name in ("sigma_data", "sigma_min", "sigma_max", "noise_unit", "output")
    }
    return json.dumps({name: value for name, value in told.items() if isinstance(value, int | float | str)})


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def _reading(path: str | os.PathLike[str], kind: str) -> Iterator[None]:
    """Whatever a strange card makes a constructor raise is the file's fault."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ValueError, RuntimeError, ArithmeticError, MemoryError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: its card does not describe a {kind} ({reason})") from None


@contextlib.contextmanager
def _at_most(count: int) -> Iterator[None]:
    """Stop a construction at more than `count` parameters: a number in a card may ask for billions of layers."""
    made = 0

    def count_up(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal made
        made += parameter is not None
        if made > count:
            raise ValueError(f"its network has more than {count} tensors, and the file fewer")

    hook = register_module_parameter_registration_hook(count_up)
    try:
        yield
    finally:
        hook.remove()


def _largest(value: Any) -> int:
    """The largest integer in nested lists and dictionaries."""
    if isinstance(value, Mapping | list):
        return max(map(_largest, value.values() if isinstance(value, Mapping) else value), default=0)
    return value if isinstance(value, int) else 0


def _compare(wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    if wanted.keys() != tensors.keys():
        odd = sorted(wanted.keys() ^ tensors.keys())[0]
        shown = " ".join(odd.split())[:100]  # it may be the file's own text
        raise ValueError(f"{path}: {shown} is {'missing' if odd in wanted else 'not part of the network'}")
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            raise ValueError(f"{path}: {name} has shape {tuple(tensor.shape)}, expected {tuple(wanted[name].shape)}")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: {name} contains NaN or Inf")


@torch.no_grad()
def _try_out(module: Any) -> None:
    """One call on zeros: numbers of a card that do not fit each other fail here, not later in the user's hands.

    Samples of more than 2^14 values could cost more memory and time than the file is worth.
    """
    shape = getattr(module, "latent_shape", module.shape)
    if max(math.prod(module.shape), math.prod(shape)) > 2**14:
        return
    level = (torch.ones(1),) if isinstance(module, Denoiser) else ()
    call = getattr(module, "logits", module)  # a classifier's own call stops at its features
    if not torch.isfinite(call(torch.zeros(1, *shape), *level)).all():
        raise ValueError("its output is not finite")


def _denoiser(card: Mapping[str, Any], own: type[nn.Module] | None) -> Denoiser:
    made = _preconditioned(card, own)
    made.contexts = bool(card.get("contexts", False))
    return made


def _preconditioned(card: Mapping[str, Any], own: type[nn.Module] | None) -> Denoiser:
    network = networks.build(card["network"], card["arguments"], own)
    if networks.takes(network) not in (None, (list(card["shape"]), card["classes"])):
        raise ValueError("its network is for samples of another shape or number of classes")
    sigma_max = math.inf if card["sigma_max"] is None else card["sigma_max"]
    law = (tuple(card["shape"]), card["classes"], card["sigma_data"], card["sigma_min"], sigma_max)
    match card.get("preconditioning", "edm"):
        case "edm":
            return Preconditioned(network, *law, card["noise_unit"])
        case "rescaled":
            return Rescaled(network, schedule.named(card["schedule"]), card["output"], *law)
        case form:
            return EpsPreconditioned(network, form, *law, card["steps"], card["beta_d"], card["beta_min"])


def _generator(card: Mapping[str, Any], own: type[nn.Module] | None) -> Generator:
    contexts = bool(card.get("contexts", False))
    if card["generator"] == "dirac":
        return Dirac(card["shape"], card["classes"], card["scale"])
    if card["generator"] == "given":
        network = networks.build(card["network"], card["arguments"], own, networks.DECODERS)
        return Given(network, card["latent_shape"], card["shape"], card["classes"], card["arguments"], contexts)
    if card["generator"] == "experts":
        sizes = (card["classes"], card["experts"], card["width"], card["scale"])
        return Experts(tuple(card["shape"]), *sizes, contexts)
    denoiser = _denoiser(card["denoiser"], own)
    match card["generator"]:
        case "one_step":
            return OneStep(denoiser, card["sigma"])
        case "few_step":
            return FewStep(denoiser, card["sigmas"])
        case "direct" if isinstance(denoiser, Preconditioned):
            return Direct(denoiser, card["noise"])
        case "trajectory":
            return Trajectory(denoiser, Karras(**card["levels"]))
        case other:
            raise ValueError(f"unknown generator {other!r}")


def _classifier(card: Mapping[str, Any], own: type[nn.Module] | None) -> nn.Module:
    from limbeck.features import Classifier  # features loads its networks through this module

    if card["network"] != "classifier":
        raise ValueError(f"unknown classifier {card['network']!r}")
    return Classifier(**card["arguments"])


_BUILDERS = {"generator": _generator, "denoiser": _denoiser, "classifier": _classifier}
