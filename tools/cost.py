"""Measure what "What it costs" tells: `python tools/cost.py` writes results/cost.json, in about a quarter of an hour;
`python tools/cost.py PART ...` only some of its parts.

Two threads, one process, one thing at a time; what is compared is played in turns.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from limbeck import artifact, bench, config, methods, teachers
from limbeck.export import export
from limbeck.files import write_atomically
from limbeck.generator import OneStep
from limbeck.machine import commit, machine, versions

ROOT = Path(__file__).parent.parent
METHODS = ("pid", "diff_instruct", "sid", "uni_instruct")


def steps(teacher: str, batch: int, repeats: int, each: int, untrained: str | None = None) -> dict[str, Any]:
    """Benches of the methods on one network, by method."""
    told = {}
    home = None if untrained is None else bench.untrained(untrained)
    for name in METHODS:
        recipe = config.resolve({"teacher": teacher, "method": name, "batch": batch}, methods.METHODS)
        result = bench.bench({name: recipe}, home, repeats=repeats, steps=each)
        print("\n".join(bench.lines(result)), file=sys.stderr)
        told[name] = {**result["settings"][name], "peak_gflop_per_second": result["peak_gflop_per_second"]}
    return told


def optimizers(numbers: int = 40, side: int = 512, repeats: int = 9) -> dict[str, float]:
    """Seconds of an update of 10.5 million weights by Adam, one operation at a time (foreach) and fused, in turns."""
    made = {}
    for kind in ("foreach", "fused"):
        weights = [torch.nn.Parameter(torch.randn(side, side)) for _ in range(numbers)]
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        made[kind] = torch.optim.Adam(weights, lr=1e-4, foreach=kind == "foreach", fused=kind == "fused")
        made[kind].step()
    times: dict[str, list[float]] = {kind: [] for kind in made}
    for _ in range(repeats):
        for kind, optimizer in made.items():
            start = time.perf_counter()
            optimizer.step()
            times[kind].append(time.perf_counter() - start)
    ratio = statistics.median(a / b for a, b in zip(times["foreach"], times["fused"], strict=True))
    return {**{kind: statistics.median(t) for kind, t in times.items()}, "ratio": ratio}


def samplers(teacher: Any, batch: int, repeats: int) -> dict[str, Any]:
    """One call of a generator, eager and in ONNX Runtime, beside 35 calls of its teacher."""
    import onnxruntime

    generator = OneStep(teacher, 2.5 * teacher.unit)
    makers: dict[str, Callable[[Tensor], Any]] = dict(bench.makers_of(generator, teacher))
    with tempfile.TemporaryDirectory() as folder:
        artifact.save(Path(folder) / "g.safetensors", "generator", generator, {})
        export(str(Path(folder) / "g.safetensors"), "onnx", f"{folder}/g.onnx")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(f"{folder}/g.onnx", options)
        names = [given.name for given in session.get_inputs()]

        def run(z: Tensor) -> Any:
            rows = {"z": z.numpy(), "cond": np.zeros((len(z), teacher.classes), np.float32)}
            return session.run(None, {name: rows[name] for name in names})

        makers = {"generator": makers.pop("generator"), "generator, ONNX": run, **makers}
        return bench.sampling(makers, generator.latent_shape, batch, repeats)


def sampling() -> dict[str, Any]:
    full = bench.untrained("cifar10").eval().requires_grad_(False)
    return {"digits": samplers(teachers.load("digits"), 64, 9), "cifar10": samplers(full, 4, 1)}


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "optimizer": optimizers,
    "sampling": sampling,
    "digits": lambda: steps("digits", 128, 7, 20),
    "cifar10": lambda: steps("<untrained>", 8, 3, 1, "cifar10"),
}


def main() -> int:
    torch.set_num_threads(2)
    path = ROOT / "results" / "cost.json"
    told = json.loads(path.read_text()) if path.is_file() else {}
    for part in sys.argv[1:] or PARTS:
        told[part] = PARTS[part]()
    told |= {
        "note": "absolute times are those of a machine that others may use at the same time",
        "versions": versions(), "machine": machine(), "commit": commit(),
    }  # fmt: skip
    write_atomically(path, json.dumps(told, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
