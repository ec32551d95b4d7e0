"""One-step generators in forms that other programs open: ONNX, torch.export, diffusers, Hugging Face Hub, web page.

A form is written only after it was opened again and gave PyTorch's samples for the same noise (`check`).
"""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn

from limbeck import artifact, refine
from limbeck.files import check_folder
from limbeck.generator import Generator

Target = Literal["onnx", "torch", "diffusers", "hub", "web"]
TARGETS: tuple[Target, ...] = get_args(Target)
# what must be installed, and the extra that brings it
NEEDS: dict[Target, tuple[str, tuple[str, ...]]] = {
    "onnx": ("export", ("onnx", "onnxscript", "onnxruntime")),
    "torch": ("export", ()),
    "diffusers": ("hub", ("diffusers", "huggingface_hub")),
    "hub": ("hub", ("huggingface_hub",)),
    "web": ("export", ("onnx", "onnxscript", "onnxruntime")),
}
SUFFIX: dict[Target, str] = {"onnx": ".onnx", "torch": ".pt2"}


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: the file or folder.
        size: its bytes.
        difference: largest difference to PyTorch's samples (to its images in [0, 1] for diffusers).
        samples: number of samples compared.
    """

    path: Path
    size: int
    difference: float
    samples: int


def export(
    source: str | Path | Generator,
    to: Target,
    out: str | Path,
    runtime: str | Path = "web-runtime",
    network: type[nn.Module] | None = None,
) -> Exported:
    """Export a generator.

    Args:
        source: its safetensors file, a run folder, or the generator itself, in eval mode.
        to: the form.
        out: the file (.onnx, .pt2) or folder to write; a folder must be new or empty.
        runtime: for "web", the folder that holds onnxruntime-web's three files.
        network: the caller's own class, for a file whose network is none of Limbeck's.

    Raises:
        ValueError: naming what is wrong; nothing is written then.
    """
    if to not in TARGETS:
        raise ValueError(f"to: unknown form {to!r}, expected one of {', '.join(TARGETS)}")
    out = Path(out)
    if to in SUFFIX and out.suffix != SUFFIX[to]:
        raise ValueError(f"out: must end in {SUFFIX[to]}, got {out}")
    empty = out.is_dir() and not any(out.iterdir())
    if out.is_dir() if to in SUFFIX else out.exists() and not empty:
        raise ValueError(f"out: {out} exists; remove it or give another name")
    check_folder(out.parent)
    extra, modules = NEEDS[to]
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise ValueError(f"to: {to} needs {module}: pip install 'limbeck[{extra}]'")
    generator, card = _opened(source, network)
    if generator.contexts and to in ("diffusers", "web"):
        raise ValueError(f"to: {to} asks for classes, and this generator has contexts; take onnx or torch")
    out.parent.mkdir(parents=True, exist_ok=True)
    if to in SUFFIX:
        from limbeck.export import graph

        write = graph.write_onnx if to == "onnx" else graph.write_program
        return _exported(out, *write(generator, card, out))
    # a folder is filled beside its place and moved there, so that it is whole or absent
    work = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(work, ignore_errors=True)
    try:
        work.mkdir()
        if to == "web":
            from limbeck.export import web

            checked = web.write_folder(generator, card, work, Path(runtime))
        else:
            from limbeck.export import folders

            checked = (folders.write_hub if to == "hub" else folders.write_diffusers)(generator, card, work)
        work.replace(out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return _exported(out, *checked)


def _opened(source: str | Path | Generator, network: type[nn.Module] | None) -> tuple[Generator, dict[str, Any]]:
    """A generator and all that its file says."""
    if not isinstance(source, Generator):
        path = Path(artifact.locate(str(source), "generator"))
        if path.is_file() and not artifact.is_carded(path):  # plain weights with a card beside them
            beside = refine.generator_at(path, network)
            if beside is not None:
                return _opened(beside.eval(), network)
        return artifact.load_generator(path, network), artifact.read_card(path)
    if source.training:
        raise ValueError("generator: is in training mode; call generator.eval() first")
    card: dict[str, Any] = {"format": artifact.FORMAT, "kind": "generator"}
    with contextlib.suppress(ValueError):  # a network that Limbeck cannot rebuild has no card
        card["card"] = artifact.describe(source)
    return source, card


def _exported(path: Path, difference: float, samples: int) -> Exported:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return Exported(path, sum(file.stat().st_size for file in files), difference, samples)
