"""The methods by name. `TABLE` can be read without importing torch; `METHODS` maps each name to its class."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple


class Entry(NamedTuple):
    """Where a method lives and what it is."""

    target: str
    title: str
    paper: str


TABLE: dict[str, Entry] = {
    "pid": Entry("limbeck.methods.pid:PID", "Physics Informed Distillation", "arXiv:2411.08378"),
    "diff_instruct": Entry("limbeck.methods.diff_instruct:DiffInstruct", "Diff-Instruct", "arXiv:2305.18455"),
    "sds": Entry("limbeck.methods.sds:SDS", "Score distillation sampling, of a single point", "arXiv:2209.14988"),
    "sid": Entry("limbeck.methods.sid:SiD", "Score identity Distillation", "arXiv:2404.04057"),
    "sida": Entry("limbeck.methods.sida:SiDA", "Adversarial score identity distillation", "arXiv:2410.14919"),
    "sim": Entry("limbeck.methods.sim:SIM", "Score Implicit Matching", "arXiv:2410.16794"),
    "dmd": Entry("limbeck.methods.dmd:DMD", "Distribution matching distillation", "arXiv:2311.18828"),
    "dmd2": Entry("limbeck.methods.dmd2:DMD2", "Improved distribution matching distillation", "arXiv:2405.14867"),
    "f_distill": Entry("limbeck.methods.f_distill:FDistill", "f-distill", "arXiv:2502.15681"),
    "vardiu": Entry("limbeck.methods.vardiu:VarDiU", "VarDiU, a variational upper bound", "arXiv:2508.20646"),
    "vdd": Entry("limbeck.methods.vdd:VDD", "Variational Diffusion Distillation", "arXiv:2406.12538"),
    "uni_instruct": Entry("limbeck.methods.uni_instruct:UniInstruct", "Uni-Instruct", "arXiv:2505.20755"),
}


def resolve(target: str) -> Any:
    """The object named by "package.module:Name"."""
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def __getattr__(name: str) -> dict[str, type]:
    if name == "METHODS":
        return {key: resolve(entry.target) for key, entry in TABLE.items()}
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
