"""How fast samples are drawn: a generator's call, in PyTorch and in ONNX Runtime, beside its teacher's many calls.

All makers are timed in turns, without labels, on this machine as it is loaded now: the ratios are what to read.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from limbeck.denoiser import Denoiser
from limbeck.device import from_cpu, on_cpu
from limbeck.generator import Generator
from limbeck.sample import heun

LIMIT = 0.2  # seconds that a batch of the generator may take
SHORT = 2  # Heun steps from which a teacher's time is extrapolated that would take too long


class Maker(NamedTuple):
    """Draws samples of z (n, *latent_shape); `factor` times what is timed is what it stands for."""

    call: Callable[[Tensor], Any]
    latent_shape: tuple[int, ...]
    factor: float = 1.0


def measure(generator: Generator, teacher: Denoiser, steps: int, onnx: bool) -> dict[str, Any]:
    """Images/s and milliseconds of one image, by maker; a few seconds, whatever the size of the networks.

    Args:
        steps: of the teacher's Heun sampler, 2 * steps - 1 calls.
        onnx: also in ONNX Runtime, if it is installed and can run the generator; exporting takes seconds.
    """
    call = from_cpu(generator, generator)
    with torch.no_grad():
        for _ in range(2):  # the first one warms up
            start = time.perf_counter()
            call(torch.zeros(1, *generator.latent_shape))
            one = time.perf_counter() - start
    batch = max(2**k for k in range(7) if k == 0 or 2**k * one < LIMIT)
    calls = 2 * steps - 1
    long = calls * batch * one > 5 * LIMIT
    makers = makers_of(generator, teacher, steps, SHORT if long else steps)
    if onnx and (session := in_onnx(generator)) is not None:
        makers["student, ONNX"] = Maker(session, generator.latent_shape)
    return sampling(makers, batch, repeats=1 if long else 3)


def makers_of(generator: Generator, teacher: Denoiser, steps: int = 18, timed: int = 18) -> dict[str, Maker]:
    """The generator's calls beside the teacher's 2 * steps - 1 (Heun), of which 2 * timed - 1 are made."""
    calls, made = 2 * steps - 1, 2 * timed - 1
    return {
        "student": Maker(from_cpu(generator, generator), generator.latent_shape),
        f"teacher, {calls} NFE": Maker(
            from_cpu(lambda z: heun(teacher, z, timed), teacher), teacher.shape, calls / made
        ),
    }


def in_onnx(generator: Generator) -> Callable[[Tensor], Any] | None:
    """The generator in ONNX Runtime, on as many threads as PyTorch has; None if that is not to be had."""
    if not all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime")):
        return None
    import onnxruntime

    from limbeck.export.graph import to_onnx

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(
            to_onnx(on_cpu(generator), {}), options, providers=["CPUExecutionProvider"]
        )
    except Exception:  # a network that cannot be exported, or not run there: this is a number less, and no failure
        return None

    def run(z: Tensor) -> Any:
        cond = z.new_zeros(len(z), generator.classes)
        return session.run(["x"], {"z": z.numpy()} | ({"cond": cond.numpy()} if generator.classes else {}))

    return run


@torch.no_grad()
def sampling(makers: Mapping[str, Maker], batch: int, repeats: int = 5) -> dict[str, Any]:
    """Images/s at `batch` and milliseconds of one image, of several makers in turns."""
    told: dict[str, dict[str, Any]] = {name: {"batch": batch} for name in makers}
    for count in dict.fromkeys((batch, 1)):
        times: dict[str, list[float]] = {name: [] for name in makers}
        for number in range(repeats + 1):
            for name, maker in makers.items():
                z = torch.randn(count, *maker.latent_shape, generator=torch.Generator().manual_seed(0))
                start = time.perf_counter()
                maker.call(z)
                if number:  # the first one warms up
                    times[name].append(maker.factor * (time.perf_counter() - start))
        for name in makers:
            seconds = statistics.median(times[name])
            if count == batch:
                told[name] |= {"seconds_of_a_batch": seconds, "images_per_second": batch / seconds}
            if count == 1:
                told[name] |= {"seconds_of_one": seconds, "ms_at_batch_1": 1000 * seconds}
    return told


def lines(told: Mapping[str, Mapping[str, float]]) -> list[str]:
    """What `sampling` gives, as text."""
    form = "{}: {:,.4g} samples/s in batches of {}, {:.3g} ms for one"
    return [
        form.format(name, row["images_per_second"], row["batch"], row["ms_at_batch_1"]) for name, row in told.items()
    ]
