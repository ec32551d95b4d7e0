"""Networks by name. A name in a file resolves here and nowhere else; any other class comes from the caller.

Every network is called as network(x, c_noise, cond) and keeps its constructor's arguments in `arguments`; those of
`DECODERS` are called as network(z) or network(z, cond).
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from limbeck.networks.adm import ADM
from limbeck.networks.dit import DiT
from limbeck.networks.gan import Decoder
from limbeck.networks.mlp import MLP
from limbeck.networks.perceptron import Perceptron
from limbeck.networks.songunet import SongUNet
from limbeck.networks.unet2d import UNet2D

NETWORKS: dict[str, type[nn.Module]] = {
    "mlp": MLP, "dit": DiT, "songunet": SongUNet, "adm": ADM, "perceptron": Perceptron, "unet2d": UNet2D,
}  # fmt: skip
DECODERS: dict[str, type[nn.Module]] = {"decoder": Decoder}  # of a latent alone (`given.Given`)
OWN = "own:"  # prefix of the name under which a network of the caller's class is stored


def build(
    name: str,
    arguments: Mapping[str, Any],
    own: type[nn.Module] | None = None,
    known: Mapping[str, type[nn.Module]] = NETWORKS,
) -> nn.Module:
    """A fresh network.

    Args:
        own: the caller's class, which is built where the name is none of Limbeck's.
        known: Limbeck's, by name.

    Raises:
        ValueError: for an unknown name or arguments that it does not take.
    """
    if isinstance(name, str) and name.startswith(OWN):
        if own is None:
            raise ValueError(
                f"network: {name[len(OWN) :]} is the caller's own class; give it with network=CLASS or --network"
            )
        return _build_own(own, arguments)
    if name not in known:
        raise ValueError(f"network: unknown name {name!r}, expected one of {', '.join(known)}")
    try:
        return known[name](**arguments)
    except TypeError as error:
        raise ValueError(f"network: {name} does not take these arguments: {error}") from None


def takes(network: Any) -> tuple[list[int], int] | None:
    """Shape of the samples and width of the condition rows that a network was built for; None if it does not say."""
    a = network.arguments
    if network.name in ("songunet", "adm"):
        return [a["in_channels"], a["img_resolution"], a["img_resolution"]], a["label_dim"]
    return (a["shape"], a["classes"]) if network.name in NETWORKS and "shape" in a else None


def _build_own(own: type[nn.Module], arguments: Mapping[str, Any]) -> nn.Module:
    """A network of the caller's class, with the name and arguments by which a file can describe it."""
    if not (isinstance(own, type) and issubclass(own, nn.Module)):
        raise ValueError(f"network: must be a subclass of torch.nn.Module, got {own!r}")
    try:
        network: Any = own(**arguments)
    except TypeError as error:
        raise ValueError(f"network: {own.__name__} does not take these arguments: {error}") from None
    network.name, network.arguments = OWN + own.__name__, dict(arguments)
    return network


def named_by_caller(target: str) -> type[nn.Module]:
    """The class "package.module:Class" that a caller names; never for a name that comes from a file.

    Raises:
        ValueError: if there is no such class of networks.
    """
    module, _, name = target.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ValueError(f"network: cannot find {target!r}, expected package.module:Class ({error})") from None
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ValueError(f"network: {target!r} is not a subclass of torch.nn.Module")
    return found


def for_samples(name: str, shape: Sequence[int], classes: int, options: Mapping[str, Any]) -> nn.Module:
    """A fresh network for samples of `shape` with condition rows of width `classes`; `options` are its other arguments.

    Raises:
        ValueError: naming the `template` key that is wrong.
    """
    if not isinstance(name, str) or name not in NETWORKS:
        raise ValueError(f"template.network: unknown name {name!r}, expected one of {', '.join(NETWORKS)}")
    if name == "unet2d":
        if len(shape) != 3:
            raise ValueError(f"template.network: unet2d needs images (C, H, W), got {tuple(shape)}")
        unet = {"sample_size": list(shape[1:]), "in_channels": shape[0], "out_channels": shape[0]}
        return UNet2D({**unet, "num_class_embeds": classes or None, **options})
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
