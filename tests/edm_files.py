"""Makes files as EDM, SiD, Diff-Instruct and PID write them, around given weights.

The pickles come from Python's own pickler and torch's own reductions. Modules that such a file names, and that are not
here or spelled otherwise, have stand-ins for as long as the pickling lasts.
"""

from __future__ import annotations

import collections
import contextlib
import io
import pickle
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def _function(module: str, name: str) -> Callable[..., None]:
    def unpickled(*arguments: Any) -> None:
        raise AssertionError("this file was unpickled")

    unpickled.__module__, unpickled.__qualname__, unpickled.__name__ = module, name, name
    return unpickled


class EasyDict(dict):
    pass


EasyDict.__module__ = "dnnlib.util"
reconstruct = _function("torch_utils.persistence", "_reconstruct_persistent_obj")
scalars = {old: _function(f"numpy.{'core' if old else '_core'}.multiarray", "scalar") for old in (False, True)}


@contextlib.contextmanager
def stand_ins() -> Iterator[None]:
    """Modules by which the pickler finds the names above; those that are there are put back."""
    names = {}
    for thing in (reconstruct, EasyDict, *scalars.values()):
        module = types.ModuleType(thing.__module__)
        setattr(module, thing.__name__, thing)
        names[thing.__module__] = module
        for end in range(1, len(thing.__module__.split("."))):
            parent = ".".join(thing.__module__.split(".")[:end])
            names.setdefault(parent, sys.modules.get(parent, types.ModuleType(parent)))
    before = {name: sys.modules.get(name) for name in names}
    sys.modules.update(names)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


class Persistent:
    """A pickled object of a class whose source travels with it."""

    def __init__(self, class_name: str, source: str, **state: Any) -> None:
        self.class_name, self.source, self.state = class_name, source, state

    def __reduce__(self) -> tuple[Any, ...]:
        meta = {
            "type": "class", "version": 6, "module_src": self.source, "class_name": self.class_name,
            "state": self.state,
        }  # fmt: skip
        return reconstruct, (meta,), None


def module_state(module: nn.Module, old: bool) -> dict[str, Any]:
    """The attributes of a module; torch 1 kept its tables in ordered dictionaries."""
    state = dict(module.__dict__)
    if old:
        for name, value in state.items():
            if type(value) is dict:
                state[name] = collections.OrderedDict(value)
    return state


class Pickler(pickle.Pickler):
    """Pickles modules as torch_utils.persistence does; `old` uses the spellings of torch 1 and numpy 1."""

    def __init__(self, file: io.BytesIO, protocol: int, old: bool) -> None:
        super().__init__(file, protocol=protocol)
        self.old = old

    def reducer_override(self, thing: Any) -> Any:
        if isinstance(thing, np.generic):
            return scalars[self.old], (thing.dtype, thing.tobytes())
        return NotImplemented


def _tree(state: Mapping[str, Tensor], buffers: set[str]) -> nn.Module:
    """Nested modules that hold `state` under its names; those that only hold others are containers."""
    root = nn.Module()
    for name, value in state.items():
        *path, leaf = name.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.ModuleDict() if part in ("enc", "dec") else nn.Module())
            module = module._modules[part]
        if leaf in buffers:
            module.register_buffer(leaf, value)
        else:
            module.register_parameter(leaf, nn.Parameter(value, requires_grad=False))
    return root


def network(
    precond: str,
    kwargs: Mapping[str, Any],
    state: Mapping[str, Tensor],
    source: str,
    *,
    attributes: Mapping[str, Any] | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    old: bool = False,
) -> Persistent:
    """A preconditioned network as EDM pickles it.

    Args:
        precond: class of the preconditioning.
        kwargs: its constructor's arguments, among them `model_type`.
        state: state dictionary of the whole.
        source: text of the module that defines the classes.
        attributes: changes of the object's attributes.
        model_kwargs: changes of the inner network's arguments.
    """
    numbers = dict(kwargs)
    model_type = numbers.pop("model_type")
    own = {name: numbers.pop(name) for name in ("img_resolution", "img_channels", "label_dim")}
    numbers = {
        "EDMPrecond": {"sigma_min": 0, "sigma_max": float("inf"), "sigma_data": 0.5},
        "VPPrecond": {
            "beta_d": 19.9, "beta_min": 0.1, "M": 1000, "epsilon_t": 1e-5,
            "sigma_min": 0.0009765625, "sigma_max": 152.16697692871094,
        },
        "VEPrecond": {"sigma_min": 0.02, "sigma_max": 100},
        "iDDPMPrecond": {"C_1": 0.001, "C_2": 0.008, "M": 1000},
    }.get(precond, {}) | numbers  # fmt: skip
    fixed = {name: numbers.pop(name) for name in list(numbers) if name in (
        "sigma_min", "sigma_max", "sigma_data", "beta_d", "beta_min", "M", "epsilon_t", "C_1", "C_2", "use_fp16",
    )}  # fmt: skip
    if precond == "iDDPMPrecond":
        fixed |= {"sigma_min": float(state["u"][-2]), "sigma_max": float(state["u"][0])}
    outputs = own["img_channels"] * (2 if precond == "iDDPMPrecond" else 1)
    inner = {
        "img_resolution": own["img_resolution"], "in_channels": own["img_channels"], "out_channels": outputs,
        "label_dim": own["label_dim"], **numbers, **(model_kwargs or {}),
    }  # fmt: skip

    def persistent(module: nn.Module, name: str) -> Persistent:
        """`module` with its children persistent, as every class of EDM's networks is."""
        for key, child in module._modules.items():
            if isinstance(child, nn.ModuleDict):
                for part, entry in child._modules.items():
                    child._modules[part] = persistent(entry, "UNetBlock")
            else:
                class_name = {"model": model_type, "map_noise": "FourierEmbedding"}.get(key)
                class_name = class_name or ("Linear" if key.startswith("map_") else "Conv2d")
                module._modules[key] = persistent(child, class_name)
        extra: dict[str, Any] = {"_init_args": (), "_init_kwargs": {}}
        if name == "UNetBlock":
            extra |= {"skip_scale": np.sqrt(0.5), "num_heads": 1, "adaptive_scale": False}
        if name == model_type:
            extra |= {"_init_kwargs": inner, "label_dropout": 0}
        return Persistent(name, source, **module_state(module, old), **extra)

    root = persistent(_tree(state, {"resample_filter", "freqs", "u"}), precond)
    root.state |= {**own, "use_fp16": False, **fixed, "_init_kwargs": dict(kwargs), **(attributes or {})}
    return root


def dumps(value: Any, protocol: int = 4, old: bool = False) -> bytes:
    """Pickle a tree of the objects above."""
    file = io.BytesIO()
    with stand_ins():
        Pickler(file, protocol, old).dump(value)
    return file.getvalue()


def snapshot(ema: Any, source: str = "") -> dict[str, Any]:
    """EDM's dictionary around its network."""
    return {
        "ema": ema,
        "loss_fn": Persistent("EDMLoss", source + "# loss", P_mean=-1.2, P_std=1.2, sigma_data=0.5),
        "augment_pipe": Persistent("AugmentPipe", source + "# augment", p=0.12, xflip=1e8, yflip=1),
        "dataset_kwargs": EasyDict(class_name="training.dataset.ImageFolderDataset", path="data.zip", use_labels=False),
    }


def state_file(state: Mapping[str, Tensor], zipped: bool = True) -> bytes:
    """A state dictionary as torch.save writes it."""
    file = io.BytesIO()
    ordered = collections.OrderedDict(state)
    ordered._metadata = collections.OrderedDict({"": {"version": 1}})
    torch.save(ordered, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()
