"""A device that is none: its tensors lie in this computer's memory, and refuse to meet those of the CPU, as a GPU's do.

Within `Pretend()` the device "pretend" can be used as "cuda" can where there is a GPU. Its arithmetic is the CPU's, so
that results must be equal up to rounding, and code that forgets to move a tensor fails as it would there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("pretend")
DEVICE = torch.device("pretend", 0)
# a GPU takes these from anywhere, too
MIXED = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default, torch.ops.aten.index.Tensor)


class There(Tensor):
    """A tensor on the device: a shell around one of the CPU's."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> There:
        made: Any = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=DEVICE,
        )  # fmt: skip
        made.held = held
        return made  # type: ignore[no-any-return]

    def __repr__(self, **_: Any) -> str:
        return f"There({self.held})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


class Pretend(TorchDispatchMode):
    """The context in which the device is there."""

    def __enter__(self) -> Any:
        self.methods = Methods()
        self.methods.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.methods.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


class Methods(TorchFunctionMode):
    """Methods that torch computes without dispatching an operation."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.new_tensor and args[0].device.type == DEVICE.type:
            return torch.tensor(args[1], dtype=args[0].dtype).to(DEVICE)
        if func is Tensor.tolist:
            return func(args[0].cpu())
        return func(*args, **(kwargs or {}))


def _computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation on what the shells hold; its results are on the device if its tensors are, or it was asked to."""
    tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
    shells = {id(t.held): t for t in tensors if isinstance(t, There)}
    if shells and func not in MIXED and any(not isinstance(t, There) and t.ndim > 0 for t in tensors):
        raise RuntimeError(f"expected all tensors to be on the same device, in {func}")
    asked = kwargs.get("device")
    there = bool(shells) if asked is None else torch.device(asked).type == DEVICE.type

    def inner(value: Any) -> Any:
        if isinstance(value, There):
            return value.held
        return torch.device("cpu") if isinstance(value, torch.device) else value

    own_args, own_kwargs = tree_map(inner, (args, kwargs))
    result = func(*own_args, **own_kwargs)
    if func is torch.ops.aten.copy_.default:
        return args[0]

    def outer(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) in shells:  # an operation in place
            return shells[id(value)]
        return There(value) if there else value

    return tree_map(outer, result)
