"""Limbeck distils pretrained diffusion models into generators that need one network call.

>>> import limbeck
>>> report = limbeck.distill("digits", "pid", out="runs/first")        # doctest: +SKIP
>>> generator = limbeck.load("runs/first")                             # doctest: +SKIP

Submodules are imported on first use, so that `import limbeck` and the command line's help cost nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_SUBMODULES = (
    "config", "data", "denoiser", "doctor", "evaluate", "exact", "export", "features", "generator", "hub", "importer",
    "losses", "methods",
    "networks", "noise", "objective", "refine", "run", "sample", "schedule", "teachers", "teaching", "train",
)  # fmt: skip

if TYPE_CHECKING:
    from limbeck.artifact import load_generator as load
    from limbeck.given import Given
    from limbeck.run import distill, teach

__all__ = ["Given", "__version__", "distill", "load", "teach"]


def __getattr__(name: str) -> Any:
    if name in ("distill", "teach"):
        return getattr(importlib.import_module("limbeck.run"), name)
    if name == "Given":
        return importlib.import_module("limbeck.given").Given
    if name == "load":
        return importlib.import_module("limbeck.artifact").load_generator
    if name in _SUBMODULES:
        return importlib.import_module(f"limbeck.{name}")
    raise AttributeError(f"module 'limbeck' has no attribute {name!r}")
