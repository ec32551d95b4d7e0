"""Measure what "What it costs" tells: `python tools/cost.py` writes results/cost.json, in about a quarter of an hour;
`python tools/cost.py PART ...` only some of its parts.

One thing at a time, on two threads or, where settings are compared, on one; what is compared is played in turns.
"""

import copy
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from limbeck import bench, compare, config, methods, speed, teachers
from limbeck.files import write_atomically
from limbeck.generator import OneStep
from limbeck.machine import commit, machine, versions

ROOT = Path(__file__).parent.parent
METHODS = ("pid", "diff_instruct", "sid", "uni_instruct")


def steps(teacher: str, batch: int, repeats: int, each: int, untrained: str | None = None) -> dict[str, Any]:
    """Benches of the methods on one network, by method; in processes of their own, for their largest memory."""
    told = {}
    for name in METHODS:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            result = pool.submit(step_of, name, teacher, batch, repeats, each, untrained).result()
        print("\n".join(bench.lines(result)), file=sys.stderr, flush=True)
        peaks = {key: result[key] for key in ("peak_gflop_per_second", "peak_memory_mib")}
        told[name] = {**result["settings"][name], **peaks}
    return told


def step_of(name: str, teacher: str, batch: int, repeats: int, each: int, untrained: str | None) -> dict[str, Any]:
    """The bench of a method."""
    torch.set_num_threads(2)
    home = None if untrained is None else bench.untrained(untrained)
    recipe = config.resolve({"teacher": teacher, "method": name, "batch": batch}, methods.METHODS)
    return bench.bench({name: recipe}, home, repeats=repeats, steps=each)


def optimizers(numbers: int = 40, side: int = 512, repeats: int = 9) -> dict[str, float]:
    """Time of an update of 10.5 million weights by Adam, operation by operation (foreach), over that of a fused one."""
    weights = [torch.nn.Parameter(torch.randn(side, side)) for _ in range(numbers)]
    foreach, fused = (update(torch.optim.Adam, weights, **{how: True}) for how in ("foreach", "fused"))
    return {"ratio": in_turns(foreach, fused, repeats, 1)["median"]}


def update(kind: Any, weights: list[torch.nn.Parameter], **how: bool) -> Callable[[], None]:
    """An optimiser's update of copies of these weights."""
    copies = [torch.nn.Parameter(w.detach().clone()) for w in weights]
    for one in copies:
        one.grad = torch.randn_like(one)
    optimizer = kind(copies, lr=1e-4, **how)
    return lambda: optimizer.step() and None


def samplers(teacher: Any, batch: int, repeats: int) -> dict[str, Any]:
    """One call of a generator, eager and in ONNX Runtime, beside 35 calls of its teacher."""
    generator = OneStep(teacher, 2.5 * teacher.unit).eval()
    makers = speed.makers_of(generator, teacher)
    session = speed.in_onnx(generator)
    assert session is not None
    makers["student, ONNX"] = speed.Maker(session, generator.latent_shape)
    return speed.sampling(makers, batch, repeats)


def sampling() -> dict[str, Any]:
    full = bench.untrained("cifar10").eval().requires_grad_(False)
    return {"digits": samplers(teachers.load("digits"), 64, 9), "cifar10": samplers(full, 4, 1)}


SWITCHES: dict[str, dict[str, Any]] = {
    "teacher in bf16": {"precision": {"teacher": "bf16"}},
    "all passes in bf16": {"precision": {"teacher": "bf16", "generator": "bf16"}},
    "checkpointing of the generator": {"checkpointing": ["generator"]},
    "teacher in fp16": {"precision": {"teacher": "fp16"}},
    "all passes in fp16": {"precision": {"teacher": "fp16", "generator": "fp16"}},
    "2 micro-batches": {"micro_batches": 2},
    "compiled": {"compile": True},
}


def switches() -> dict[str, Any]:
    """Time and memory of a step of PID with a switch on, as ratios to the same step without, in turns."""
    told: dict[str, Any] = {"digits": {name: switched("digits", name) for name in SWITCHES}}
    # compiling the large network takes longer than all the rest: a part of its own; fp16 takes minutes a pass on a CPU
    slow = ("compiled", "teacher in fp16", "all passes in fp16")
    told["cifar10"] = {name: switched("cifar10", name) for name in SWITCHES if name not in slow}
    full: Any = bench.untrained("cifar10")
    told["cifar10"]["channels-last, one network"] = {"batch": 2, "time": channels_last(full.network.train(), 5)}
    return told


def switched(network: str, name: str) -> dict[str, Any]:
    """The ratios of one switch."""
    large = network in bench.UNTRAINED
    batch, repeats, each = (2, 3, 1) if large else (128, 9, 5)
    table = {"teacher": "<untrained>" if large else network, "method": {"name": "pid"}, "batch": batch}
    recipes = {
        name: config.resolve({**table, **SWITCHES[name]}, methods.METHODS),
        "off": config.resolve(table, methods.METHODS),
    }
    result = bench.bench(recipes, bench.untrained(network) if large else None, repeats=repeats, steps=each)
    print("\n".join(bench.lines(result)), file=sys.stderr, flush=True)
    on, off = result["settings"].values()
    return {"batch": batch, "time": result["ratio"], **{k: on[k] / off[k] for k in ("graph_mib", "step_mib")}}


def channels_last(network: torch.nn.Module, repeats: int) -> dict[str, Any]:
    """Time of a forward and a backward pass with weights and images in the other layout, over that in the usual one."""
    x = torch.randn(2, 3, 32, 32)
    other: Any = copy.deepcopy(network)
    layout = torch.channels_last

    def both_passes(one: torch.nn.Module, images: torch.Tensor) -> None:
        one.zero_grad(set_to_none=True)
        one(images, torch.zeros(2)).sum().backward()

    on = partial(both_passes, other.to(memory_format=layout), x.to(memory_format=layout))
    return {"of": "on / off", **in_turns(on, partial(both_passes, network, x), repeats, 1)}


def iterations() -> dict[str, Any]:
    """Time of an iteration of every variant of the VarDiU study, alternating with its first one."""
    path = ROOT / "studies" / "vardiu-mog40.toml"
    recipes = {
        settings["variant"]: recipe
        for _, settings, recipe in compare.cells_of(config.read_toml(path), path, None)
        if settings["seed"] == 0 and not settings["variant"].endswith("1M")
    }
    base, told = next(iter(recipes)), {}
    for name, recipe in recipes.items():
        pair = {name: recipe, f"{base}, the other": recipes[base]}
        result = bench.bench(pair, repeats=7, steps=20)
        told[name] = {"ms": 1000 * result["settings"][name]["seconds_per_step"], "time": result["ratio"]}
        print(name, told[name], file=sys.stderr, flush=True)
    return told


def inner() -> dict[str, Any]:
    """What is built in, beside how it would be done otherwise: time of one over that of the other."""
    teacher: Any = teachers.load("digits")
    player: Any = copy.deepcopy(teacher).train().requires_grad_(True)
    z = torch.randn(128, *teacher.shape)
    sigma, cond = torch.linspace(0.1, 20, 128), torch.eye(10)[torch.arange(128) % 10]
    weights = list(player.parameters())
    average = [w.detach().clone() for w in weights]
    query = torch.randn(128, 4, 64, 32)

    def one_call() -> None:
        player(torch.cat([z, z]), sigma.repeat(2), cond.repeat(2, 1)).sum().backward()

    def two_calls() -> None:
        (player(z, sigma, cond).sum() + player(z, sigma, cond).sum()).backward()

    def without_graph() -> None:
        with torch.no_grad():
            teacher(z, sigma, cond)

    def with_graph() -> None:
        player(z, sigma, cond)

    def at_once() -> None:
        torch._foreach_lerp_(average, [w.detach() for w in weights], 1e-3)

    def one_by_one() -> None:
        for mean, weight in zip(average, weights, strict=True):
            mean.lerp_(weight.detach(), 1e-3)

    def fused() -> None:
        torch.nn.functional.scaled_dot_product_attention(query, query, query)

    def explicit() -> None:
        (query @ query.transpose(-1, -2) / 32**0.5).softmax(-1) @ query

    pairs: dict[str, tuple[Callable[[], None], Callable[[], None]]] = {
        "PID's two branches in one call, against two": (one_call, two_calls),
        "a pass without a graph, against one with": (without_graph, with_graph),
        "moving average of all weights at once, against one by one": (at_once, one_by_one),
        "fused attention, against the formula": (fused, explicit),
        "RAdam for all weights at once, against one by one": (
            update(torch.optim.RAdam, weights, foreach=True), update(torch.optim.RAdam, weights, foreach=False),
        ),
    }  # fmt: skip
    return {name: {"time": in_turns(*pair)} for name, pair in pairs.items()}


def in_turns(one: Callable[[], None], other: Callable[[], None], repeats: int = 15, each: int = 5) -> dict[str, Any]:
    """Ratios of the times of two calls that alternate."""
    ratios = []
    for number in range(repeats + 1):
        times = []
        for call in (one, other):
            start = time.perf_counter()
            for _ in range(each):
                call()
            times.append(time.perf_counter() - start)
        if number:  # the first one warms up
            ratios.append(times[0] / times[1])
    return {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}


ALONE = ("switches", "compiled", "inner", "vardiu")  # on one thread
PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "switches": switches,
    "compiled": lambda: switched("cifar10", "compiled"),
    "inner": inner,
    "optimizer": optimizers,
    "sampling": sampling,
    "digits": lambda: steps("digits", 128, 7, 20),
    "fashion": lambda: steps("fashion", 32, 3, 2),
    "vardiu": iterations,
    "cifar10": lambda: steps("<untrained>", 8, 3, 1, "cifar10"),
}


def main() -> int:
    path = ROOT / "results" / "cost.json"
    for part in sys.argv[1:] or PARTS:
        threads = 1 if part in ALONE else 2
        torch.set_num_threads(threads)
        rows = PARTS[part]()
        torch.set_num_threads(threads)  # a recipe may have set its own
        where = machine()
        told = json.loads(path.read_text()) if path.is_file() else {}
        told["note"] = "absolute times are those of a machine that others may use at the same time"
        told[part] = {"rows": rows, "versions": versions(), "machine": where, "commit": commit()}
        write_atomically(path, json.dumps(told, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
