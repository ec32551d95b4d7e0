"""`limbeck VERB --help`: the keys of a command, printed by tyro from the dataclasses that validate them."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import tyro

from limbeck import cli, config, methods

# every key takes a value, and a list is one value: as the command line reads them
FORMS = (
    tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff, tyro.conf.UsePythonSyntaxForLiteralCollections,
)  # fmt: skip


def print_keys(verb: str, method: str | None) -> None:
    """Print the keys of `verb`; `method` picks the objective whose fields are shown.

    Raises:
        ValueError: for an unknown method.
    """
    form, _ = cli.VERBS[verb]
    for target, default in _subjects(verb, method):
        printed = io.StringIO()
        with contextlib.suppress(SystemExit), contextlib.redirect_stdout(printed):  # tyro leaves after printing help
            tyro.cli(
                target, prog=f"limbeck {verb} {form}", args=["--help"], default=default, use_underscores=True,
                config=FORMS,
            )  # fmt: skip
        text = printed.getvalue()
        for field, key in cli.RENAMED.get(verb, {}).items():
            text = text.replace(f"--{field} ", f"--{key} ".ljust(len(field) + 3))
        print(text, end="")


def _subjects(verb: str, method: str | None) -> list[tuple[Any, Any]]:
    if verb in ("distill", "teach"):
        known = methods.METHODS if verb == "distill" else config.TEACHING
        recipe = config.resolve({"method": {"name": method or next(iter(known))}}, known, foreign=verb == "distill")
        return [(config.Recipe, recipe)]
    kinds: dict[str, list[Any]] = {
        "sample": [cli.SampleOptions],
        "export": [cli.ExportOptions],
        "reference": [cli.ReferenceOptions],
        "import": [cli.ImportOptions],
        "doctor": [cli.DoctorOptions],
        "bench": [cli.BenchOptions],
        "compare": [cli.CompareOptions],
        "evaluate": [cli.EvaluateOptions, config.Evaluation],
    }
    return [(kind, tyro.MISSING_NONPROP) for kind in kinds[verb]]
