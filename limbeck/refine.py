"""Refinement of a generator that the caller brings, e.g. a GAN's: Diff-Instruct's second scenario (arXiv:2305.18455).

Methods with a fake score ask two things of a generator: samples of the teacher's shape, and a gradient through them.
Its latents are its own. The fake score starts as the teacher, which knows nothing of the generator's law; so the
generator waits until the fake score has settled on its samples (`game.settle`).
"""

from __future__ import annotations

import copy
import dataclasses
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from limbeck import artifact, networks
from limbeck.config import Recipe
from limbeck.denoiser import Denoiser
from limbeck.game import Game
from limbeck.generator import Generator
from limbeck.given import Given
from limbeck.teachers import own

SETTLE = 200  # turns of a window of the fake score's loss, see `game.Settling`


@dataclass(frozen=True)
class Card:
    """What `WEIGHTS.json` says of `WEIGHTS.safetensors`, the weights of a generator of the caller's class.

    Attributes:
        latent_shape: shape of one latent z ~ N(0, I), e.g. [64].
        shape: shape of one sample, e.g. [3, 32, 32].
        classes: width of a condition row; 0 = unconditional, the class is called as network(z), else network(z, cond).
        contexts: condition rows are points of [0, 1]^classes instead of one-hot labels.
        arguments: the class's constructor arguments.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    latent_shape: list[int]
    shape: list[int]
    classes: int = 0
    contexts: bool = False
    arguments: dict[str, Any] = field(default_factory=dict)


def generator_at(path: Path, network: type[nn.Module] | None = None) -> Generator | None:
    """The generator in a run folder, in a file of Limbeck's, or in plain weights with a `Card` beside them.

    None if there is none.

    Args:
        network: the caller's own class, for a file whose network is none of Limbeck's.

    Raises:
        ValueError: naming the file and what is wrong with it.
    """
    path = path / "generator.safetensors" if path.is_dir() else path
    if not path.is_file():
        return None
    card = own.card_of(path)
    if card is None:
        holds = artifact.is_carded(path) and artifact.read_card(path)["kind"] == "generator"
        return artifact.load_generator(path, network) if holds else None
    table = own.read_json(card)
    if "latent_shape" not in table:
        return None
    facts: Card = own.validated(Card, table, card)
    if network is None:
        raise ValueError(f"{card}: the network is the caller's own class; give it with --network pkg.mod:Class")
    described = {"generator": "given", "network": networks.OWN + network.__name__, **asdict(facts)}
    placed = {f"network.{name}": tensor for name, tensor in artifact.read_tensors(path).items()}
    generator: Generator = artifact.rebuild(path, "generator", described, placed, network)
    return generator


def named(recipe: Recipe, network: type[nn.Module] | None) -> Generator | None:
    """The generator of the key `generator.file`: a file or run folder; None without that key.

    Raises:
        ValueError: if there is none, or other keys stand beside it.
    """
    if "file" not in recipe.generator:
        return None
    source, *more = recipe.generator["file"], *(key for key in recipe.generator if key != "file")
    if more:
        raise ValueError(f"generator.{more[0]}: describes a fresh generator; leave it out beside generator.file")
    found = generator_at(Path(str(source)), network)
    if found is None:
        raise ValueError(
            f"generator.file: no generator in {str(source)!r}; expected a generator's file, a run folder, or weights "
            "(.safetensors) with a card (.json) that has latent_shape beside them"
        )
    return found


def accepted(generator: nn.Module, teacher: Denoiser) -> Generator:
    """A copy of a given generator that a run may train and store.

    Raises:
        ValueError: naming what it lacks.
    """
    if not isinstance(generator, Generator):
        raise ValueError(
            f"generator: must be a limbeck.generator.Generator, got {type(generator).__name__}; a network becomes one "
            "by limbeck.Given(network, latent_shape=..., shape=...)"
        )
    classes, z = generator.classes, torch.zeros(2, *generator.latent_shape)
    if classes not in (0, teacher.classes):
        raise ValueError(f"generator: has {classes} classes, the teacher {teacher.classes}")
    if generator.contexts != teacher.contexts:
        ours, theirs = ("contexts" if it.contexts else "none" for it in (generator, teacher))
        raise ValueError(f"generator: has {ours}, the teacher {theirs}; set contexts of what it was built with")
    try:
        made = copy.deepcopy(generator).eval().requires_grad_(True)
        x = made(z, torch.zeros(2, classes) if classes else None)
        if isinstance(made, Given):
            _check_rebuilt(made)
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"generator: {' '.join(str(error).split())} (latents {tuple(z.shape[1:])})") from None
    if x.dtype != z.dtype:
        raise ValueError(f"generator: makes samples of {x.dtype}, a run computes in {z.dtype}")
    if not x.requires_grad:
        raise ValueError("generator: its samples have no gradient with respect to its weights")
    return made


def _check_rebuilt(generator: Given) -> None:
    """Is what the file will say enough to build the network again?"""
    card = json.loads(json.dumps(generator.card()))
    with torch.random.fork_rng(devices=[]):
        fresh = networks.build(card["network"], card["arguments"], type(generator.network), networks.DECODERS)
    shapes, wanted = ({k: v.shape for k, v in net.state_dict().items()} for net in (fresh, generator.network))
    if shapes != wanted:
        name = type(fresh).__name__
        raise ValueError(f"{name}(**{card['arguments']}) has other weights than the network given; set arguments")


def patient(recipe: Recipe) -> Recipe:
    """The recipe of a given generator: it waits for the fake score, for windows of `SETTLE` turns if none are set."""
    game = getattr(recipe.method, "game", None)
    if not isinstance(game, Game) or game.settle:
        return recipe
    waiting = dataclasses.replace(recipe.method, game=dataclasses.replace(game, settle=SETTLE))
    return dataclasses.replace(recipe, method=waiting)
