"""`limbeck VERB --help`: the keys of a command, printed by tyro from the dataclasses that validate them."""

from __future__ import annotations

import contextlib
from typing import Any

import tyro

from limbeck import cli, config, methods


def print_keys(verb: str, method: str | None) -> None:
    """Print the keys of `verb`; `method` picks the objective whose fields are shown.

    Raises:
        ValueError: for an unknown method.
    """
    target, default = _subject(verb, method)
    form, _ = cli.VERBS[verb]
    with contextlib.suppress(SystemExit):  # tyro leaves the process after printing help
        tyro.cli(
            target, prog=f"limbeck {verb} {form}", args=["--help"], default=default, use_underscores=True,
            config=(tyro.conf.AvoidSubcommands,),
        )  # fmt: skip


def _subject(verb: str, method: str | None) -> tuple[Any, Any]:
    if verb in ("distill", "teach"):
        known = methods.METHODS if verb == "distill" else config.TEACHING
        recipe = config.resolve({"method": {"name": method or next(iter(known))}}, known)
        return config.Recipe, recipe
    kinds: dict[str, Any] = {
        "sample": cli.SampleOptions,
        "reference": cli.ReferenceOptions,
        "import": cli.ImportOptions,
        "evaluate": config.Evaluation,
    }
    return kinds[verb], tyro.MISSING_NONPROP
