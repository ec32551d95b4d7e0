"""Generators as graphs: ONNX and torch.export programs, both with any batch size.

Inputs are z (batch, *latent_shape) ~ N(0, I) and, for generators with classes, cond (batch, classes), one-hot rows,
zeros for no label, or contexts; the output is x (batch, *shape). The generator's card travels along under the name
`limbeck`.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.export import Dim, ExportedProgram

from limbeck.export.check import Probe, compare
from limbeck.files import write_atomically
from limbeck.generator import Generator

OPSET = 20


def to_program(generator: Generator, dynamic: Any = None) -> ExportedProgram:
    """The generator, in eval mode, as a torch.export program.

    Args:
        dynamic: what torch.export may assume of the batch; None: nothing.

    Raises:
        ValueError: if its network branches on the batch size.
    """
    shapes = {name: {0: dynamic or Dim("batch")} for name in _inputs(generator)}
    try:
        with _quiet(), torch.no_grad():
            return torch.export.export(generator, _example(generator), dynamic_shapes=shapes)
    except (RuntimeError, ValueError) as error:  # torch's own kinds of error are among them
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"to: torch.export cannot trace this generator for every batch size ({reason})") from None


def to_onnx(generator: Generator, card: Mapping[str, Any]) -> bytes:
    """The generator, in eval mode, as an ONNX model of opset 20 that holds its weights.

    Raises:
        ValueError: as `to_program`.
    """
    try:
        program = to_program(generator)
    except ValueError:
        # diffusers' UNet2DModel copies memory from batch 64 on: a branch in Python, but none in what is computed.
        program = to_program(generator, Dim.DYNAMIC)
    shapes = {name: {0: Dim("batch")} for name in _inputs(generator)}
    try:
        with _quiet():
            exported = torch.onnx.export(
                program,
                _example(generator),
                dynamo=True,
                verbose=False,
                opset_version=OPSET,
                external_data=False,
                input_names=_inputs(generator),
                output_names=["x"],
                dynamic_shapes=shapes,
            )
    except torch.onnx.OnnxExporterError as error:
        cause = error.__cause__ or error
        reason = str(cause).strip().splitlines()[0]
        raise ValueError(f"to: ONNX cannot express this generator ({reason}); torch can") from None
    assert exported is not None
    exported.model.metadata_props["limbeck"] = json.dumps(card, sort_keys=True)
    content: bytes = exported.model_proto.SerializeToString()
    return content


def write_onnx(generator: Generator, card: Mapping[str, Any], path: Path) -> tuple[float, int]:
    """Write an .onnx file that onnxruntime was seen to run; returns what `compare` returns.

    Raises:
        ValueError: if its samples are not PyTorch's.
    """
    import onnxruntime

    content = to_onnx(generator, card)
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])

    def run(probe: Probe) -> torch.Tensor:
        feeds = {"z": probe.z.numpy()} | ({} if probe.cond is None else {"cond": probe.cond.numpy()})
        return torch.from_numpy(session.run(["x"], feeds)[0])

    checked = compare("onnx", generator, run)
    write_atomically(path, content)
    return checked


def write_program(generator: Generator, card: Mapping[str, Any], path: Path) -> tuple[float, int]:
    """Write a .pt2 file that torch.export was seen to read; returns what `compare` returns.

    Raises:
        ValueError: if its samples are not PyTorch's, or its network branches on the batch size.
    """
    buffer = io.BytesIO()
    with _quiet():
        torch.export.save(to_program(generator), buffer, extra_files={"limbeck": json.dumps(card, sort_keys=True)})
        module = torch.export.load(io.BytesIO(buffer.getvalue())).module()
    checked = compare("torch", generator, lambda probe: module(*_arguments(probe)))
    write_atomically(path, buffer.getvalue())
    return checked


def _inputs(generator: Generator) -> list[str]:
    return ["z", "cond"] if generator.classes else ["z"]


def _example(generator: Generator) -> tuple[torch.Tensor, ...]:
    z = torch.zeros(2, *generator.latent_shape)
    return (z, torch.zeros(2, generator.classes)) if generator.classes else (z,)


def _arguments(probe: Probe) -> tuple[torch.Tensor, ...]:
    return (probe.z,) if probe.cond is None else (probe.z, probe.cond)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch's exporters report on their own workings and on packages that are not installed; none concerns the user."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
