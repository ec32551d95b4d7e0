"""Networks by name. A name in a file resolves here and nowhere else.

Every network is called as network(x, c_noise, cond) and keeps its constructor's arguments in `arguments`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from limbeck.networks.adm import ADM
from limbeck.networks.dit import DiT
from limbeck.networks.mlp import MLP
from limbeck.networks.perceptron import Perceptron
from limbeck.networks.songunet import SongUNet

NETWORKS: dict[str, type[nn.Module]] = {
    "mlp": MLP, "dit": DiT, "songunet": SongUNet, "adm": ADM, "perceptron": Perceptron,
}  # fmt: skip


def build(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """A fresh network.

    Raises:
        ValueError: for an unknown name or arguments that it does not take.
    """
    if name not in NETWORKS:
        raise ValueError(f"network: unknown name {name!r}, expected one of {', '.join(NETWORKS)}")
    try:
        return NETWORKS[name](**arguments)
    except TypeError as error:
        raise ValueError(f"network: {name} does not take these arguments: {error}") from None


def takes(network: Any) -> tuple[list[int], int]:
    """Shape of the samples and width of the condition rows that a network was built for."""
    a = network.arguments
    if "shape" in a:
        return a["shape"], a["classes"]
    return [a["in_channels"], a["img_resolution"], a["img_resolution"]], a["label_dim"]


def for_samples(name: str, shape: Sequence[int], classes: int, options: Mapping[str, Any]) -> nn.Module:
    """A fresh network for samples of `shape` with condition rows of width `classes`; `options` are its other arguments.

    Raises:
        ValueError: naming the `template` key that is wrong.
    """
    if not isinstance(name, str) or name not in NETWORKS:
        raise ValueError(f"template.network: unknown name {name!r}, expected one of {', '.join(NETWORKS)}")
    sized = _sized(name, shape, classes)
    known = [key for key in inspect.signature(NETWORKS[name]).parameters if key not in sized]
    for key in options:
        if key not in known:
            raise ValueError(f"template.{key}: {name} has no such argument, expected one of {', '.join(known)}")
    try:
        return NETWORKS[name](**sized, **options)
    except TypeError as error:
        raise ValueError(f"template: {name} cannot be built from {dict(options)}: {error}") from None


def like(network: nn.Module, shape: Sequence[int], classes: int) -> nn.Module:
    """A fresh network of the kind and arguments of `network`, one of `NETWORKS`, for samples of another shape."""
    given: Any = network
    return NETWORKS[given.name](**{**given.arguments, **_sized(given.name, shape, classes)})


def _sized(name: str, shape: Sequence[int], classes: int) -> dict[str, Any]:
    """The arguments that say what samples a network reads."""
    if name not in ("songunet", "adm"):
        return {"shape": list(shape), "classes": classes}
    if len(shape) != 3 or shape[1] != shape[2]:
        raise ValueError(f"template.network: {name} needs square images (C, H, H), got {tuple(shape)}")
    return {"img_resolution": shape[1], "in_channels": shape[0], "out_channels": shape[0], "label_dim": classes}
