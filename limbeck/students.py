"""What a recipe builds: the template of which players are copies, a plain generator, the trainer."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import nn

from limbeck import device, networks
from limbeck.config import Recipe
from limbeck.denoiser import Denoiser, Networked, Preconditioned
from limbeck.distributed import rank_and_world
from limbeck.folder import Tell
from limbeck.generator import Direct, Generator
from limbeck.noise import Karras, Power
from limbeck.train import Trainer


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
    if name is None:
        name = "mlp" if len(teacher.shape) < 3 or max(teacher.shape[1:]) <= 8 else "dit"
        name = name if own is None else networks.OWN
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        if name == networks.OWN:
            network = networks.build(name, options, own)
        elif name == "unet2d" and not options and isinstance(inner, networks.UNet2D):
            network = networks.UNet2D(inner.arguments["config"])
            network.load_state_dict(inner.state_dict())
        else:
            network = networks.for_samples(name, teacher.shape, teacher.classes, options)
    template = Preconditioned(
        network, teacher.shape, teacher.classes, teacher.sigma_data, teacher.sigma_min, teacher.sigma_max,
        noise_unit=1.0 if name == "unet2d" else None,
    )  # fmt: skip
    template.contexts = teacher.contexts
    return template


def fit_levels(recipe: Recipe, teacher: Denoiser, tell: Tell) -> Recipe:
    """The recipe with the method's default levels cut to the teacher's range.

    Raises:
        ValueError: if levels that are not the default leave that range.
    """
    levels = getattr(recipe.method, "levels", None)
    fields = {field.name: field for field in dataclasses.fields(recipe.method)}
    default: Any = fields["levels"].default_factory if "levels" in fields else dataclasses.MISSING
    if isinstance(levels, Karras | Power) and default is not dataclasses.MISSING and levels == default():
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


def trainer_of(recipe: Recipe, teacher: Denoiser, template: Denoiser, generator: Generator | None = None) -> Trainer:
    """The trainer of a recipe; of a given generator it trains a copy.

    Raises:
        ValueError: if a setting does not fit the method's players, or another setting.
    """
    split = None
    if recipe.sharded and rank_and_world()[1] > 1:
        from limbeck import shards  # takes a second to import

        split = shards.split
    made = Trainer(
        recipe.method, teacher, template, recipe.optimizer,
        steps=recipe.steps, ema=recipe.ema, clip=recipe.clip, seed=recipe.seed,
        generator=copy.deepcopy(generator),
        split=split,
        precision=recipe.precision, checkpointing=recipe.checkpointing,
        device=device.chosen(recipe.device),
    )  # fmt: skip
    twice = {"fake", "critic"}.intersection(recipe.checkpointing)
    if twice and getattr(getattr(recipe.method, "game", None), "joint", False):
        raise ValueError(
            f"checkpointing: {min(twice)} is called with and without gradients of its weights in a joint turn, which "
            "checkpoints cannot tell apart; leave it out, or set method.game.joint = false"
        )
    return made
