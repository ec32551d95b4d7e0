"""What a step costs: its time by part, its FLOPs by part, and how near that is to the machine's own limit.

A method's step should cost its network passes and nothing else. `Meter` splits a step into

    teacher     passes of the teacher
    forward     passes of the players, in turn or not
    backward    everything that runs under `backward`, the exchange of gradients aside
    exchange    waiting for other processes' gradients
    optimizer   the players' updates
    ema         the moving average
    rest        losses, noise, checks: what is no network pass

each without what it calls of another part. Times are compared within one process, in turns: `compare` plays a step of
one setting, then of the other, so that a machine that others load slows both, and gives the ratios pair by pair. The
largest rate of a matrix multiplication is measured before and after every repeat, so that "fraction of peak" is of the
same minute.

FLOPs are counted by torch, as 2 per multiplication and addition in matrix products, convolutions and attention. Torch
has no formula for the attention that a CPU runs; it is registered here.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from limbeck import loop, resources, run
from limbeck.config import Evaluation, Real, Recipe
from limbeck.denoiser import Denoiser, Preconditioned
from limbeck.device import CPU
from limbeck.game import Settling
from limbeck.machine import commit, machine, peak_memory_mib, versions
from limbeck.networks import for_samples
from limbeck.objective import Pairs
from limbeck.source import NoiseSource, RealSource, provider_of
from limbeck.train import ALL_OPEN, Source, Trainer

PARTS = ("teacher", "forward", "backward", "exchange", "optimizer", "ema", "rest")

# networks of EDM's published teachers, with fresh weights: (network, shape, classes, arguments)
UNTRAINED: dict[str, tuple[str, tuple[int, ...], int, dict[str, Any]]] = {
    "cifar10": ("songunet", (3, 32, 32), 0, {"channel_mult": (2, 2, 2), "dropout": 0.13, "augment_dim": 9}),
    "imagenet64": ("adm", (3, 64, 64), 1000, {}),
}


def untrained(name: str) -> Denoiser:
    """A denoiser of the size of a published teacher, with random weights: it costs what the teacher costs.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in UNTRAINED:
        raise ValueError(f"untrained: unknown {name!r}, expected one of {', '.join(UNTRAINED)}")
    network, shape, classes, options = UNTRAINED[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Preconditioned(
            for_samples(network, shape, classes, options), shape, classes, 0.5, 0.002, 80.0, noise_unit=1.0
        )


def _attention(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return int(sdpa_backward_flop_count(grad, query, key, value))


ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def flop_counter() -> FlopCounterMode:
    """Torch's counter, which also knows the attention of CPUs."""
    return FlopCounterMode(display=False, custom_mapping=ATTENTION)


class Meter:
    """Splits what a trainer does into parts. Used as a context: meanwhile it stands in for the functions that do it.

    Attributes:
        seconds, flops: by (turn, part), since the context was entered; the turn "" is what is outside of turns. FLOPs
            only with `count`, which is slow: the times are then not to be used.
    """

    def __init__(self, trainer: Trainer, count: bool = False) -> None:
        self.trainer = trainer
        self.seconds: dict[tuple[str, str], float] = defaultdict(float)
        self.flops: dict[tuple[str, str], int] = defaultdict(int)
        self._counter = flop_counter() if count else None
        self._stack: list[tuple[str, str]] = []
        self._since, self._counted = 0.0, 0
        self._replaced: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> Meter:
        trainer = self.trainer
        trainer.passes.around = lambda role, call: self._metered(call, "teacher" if role == "teacher" else "forward")
        for optimizer in trainer.optimizers.values():
            self._stand_in(optimizer, "step", "optimizer")
        self._stand_in(trainer, "_backward", "backward")
        self._stand_in(trainer, "_exchange", "exchange")
        self._stand_in(trainer.ema, "update", "ema")
        self._stand_in(trainer, "play", "rest", turn=lambda index, turn, *_: "+".join(turn.players))
        self._stand_in(trainer, "advance", "rest")
        if self._counter is not None:
            self._counter.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._counter is not None:
            self._counter.__exit__(*error)
        self.trainer.passes.around = None
        for owner, name, before in reversed(self._replaced):
            if before is None:
                delattr(owner, name)
            else:
                setattr(owner, name, before)

    def _stand_in(self, owner: Any, name: str, part: str, turn: Callable[..., str] | None = None) -> None:
        self._replaced.append((owner, name, vars(owner).get(name)))
        setattr(owner, name, self._metered(getattr(owner, name), part, turn))

    def _metered(self, inner: Callable[..., Any], part: str, turn: Callable[..., str] | None = None) -> Any:
        """`inner`, with its time booked on `part`."""

        def metered(*args: Any, **kwargs: Any) -> Any:
            now = turn(*args) if turn is not None else self._stack[-1][0] if self._stack else ""
            self._mark()
            self._stack.append((now, part))
            try:
                return inner(*args, **kwargs)
            finally:
                self._mark()
                self._stack.pop()

        return metered

    def _mark(self) -> None:
        """Book what has passed since the last mark on the part that was running."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        counted = self._counter.get_total_flops() if self._counter is not None else 0
        if self._stack:
            self.seconds[self._stack[-1]] += now - self._since
            self.flops[self._stack[-1]] += counted - self._counted
        self._since, self._counted = now, counted


class Kept:
    """Bytes that graphs keep for their backward passes, weights aside: the memory that a batch costs.

    A storage counts once, however many nodes keep it. What checkpointing makes again in the backward pass, a block at a
    time, is not seen here; it is among all that a step allocates ("step_mib"). Used as a context around a step.

    Attributes:
        peak: the most that was kept at once.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.now, self.peak = trainer, 0, 0
        weights = (*trainer.nets.parameters(), *trainer.teacher.parameters())
        self.weights = {p.untyped_storage().data_ptr() for p in weights}
        self.users: dict[int, int] = {}

    def __enter__(self) -> Kept:
        keeping = self

        class Hold:
            """One saved tensor, for as long as a node holds it."""

            def __init__(self, tensor: Tensor) -> None:
                self.tensor = tensor
                storage = tensor.untyped_storage()
                self.key, self.size = storage.data_ptr(), storage.nbytes()
                if self.key not in keeping.weights:
                    if keeping.users.get(self.key, 0) == 0:
                        keeping.now += self.size
                        keeping.peak = max(keeping.peak, keeping.now)
                    keeping.users[self.key] = keeping.users.get(self.key, 0) + 1

            def __del__(self) -> None:
                if self.key in keeping.users:
                    keeping.users[self.key] -= 1
                    if keeping.users[self.key] == 0:
                        keeping.now -= self.size
                        del keeping.users[self.key]

        self._hooks = torch.autograd.graph.saved_tensors_hooks(Hold, lambda held: held.tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)


def matmul_peak(size: int = 1024, seconds: float = 0.25, device: torch.device = CPU) -> float:
    """FLOP/s of the fastest of several float32 matrix products, on this many threads or this device, now."""
    a, b = torch.randn(2, size, size).to(device)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def prepared(
    recipe: Recipe, teacher: Denoiser | None = None, network: type[nn.Module] | None = None
) -> tuple[Trainer, Source]:
    """The trainer of a recipe, and batches like its own: what costs time to prepare, or is no cost of a step, is noise.

    Real samples and pairs are noise of the data's scale; there is no judge, and nothing is written.
    """
    exact = teacher is None and (recipe.teacher or "").startswith("exact:")  # such a law is its own source
    real = Real("teacher:1") if recipe.method.needs_real and not exact else Real()
    recipe = dataclasses.replace(recipe, real=real, evaluate=Evaluation())
    if teacher is not None:
        recipe = dataclasses.replace(recipe, teacher=f"<{type(teacher).__name__}>")
    job = run.distillation(recipe, Path(tempfile.gettempdir()) / "limbeck-bench", lambda line: None, teacher, network)
    if recipe.micro_batches == 0:
        job = loop.fitted(job, resources.measure(job.trainer, job.source), lambda line: None)
    noise = job.source
    assert isinstance(noise, NoiseSource)
    for net in job.trainer.nets.values():
        if isinstance(net, Settling):
            net.settled.fill_(1.0)  # a generator that waits costs nothing
    home = job.trainer.teacher
    rng = torch.Generator().manual_seed(0)
    x = home.sigma_data * torch.randn(max(256, home.classes), *noise.shape, generator=rng)
    pairs = None
    if hasattr(recipe.method, "pairs"):
        z = torch.randn(len(x), *noise.latent_shape, generator=rng)
        cond = torch.eye(home.classes)[torch.arange(len(x)) % home.classes] if home.classes else None
        pairs = Pairs(z, x, cond)
    labels = torch.arange(len(x)) % home.classes if home.classes and not home.contexts else None
    provider = provider_of(x, labels) if recipe.method.needs_real else None
    source = RealSource(noise, provider, pairs)
    if recipe.compile:
        job.trainer.compile(source, lambda line: print(line, file=sys.stderr))
    return job.trainer, source


def bench(
    recipes: Mapping[str, Recipe],
    teacher: Denoiser | None = None,
    network: type[nn.Module] | None = None,
    repeats: int = 5,
    steps: int = 1,
    first: int = ALL_OPEN,
) -> dict[str, Any]:
    """Measure the steps of one or two recipes, in turns.

    Args:
        recipes: by the name of the setting.
        teacher: in place of the one that the recipes name.
        network: the caller's own network class, for a teacher's file whose network is none of Limbeck's.
        repeats: of each setting.
        steps: of one repeat; of generators of K calls, rounds of K steps, in which every number of calls comes once.
        first: images that the method believes were seen: gates of critics are open.

    Returns:
        For every setting: seconds of a step (median over repeats) by turn and part, images/s, FLOPs per image and in
        units of one forward pass of the teacher's network, the fraction of the matrix product's peak, MiB that graphs
        keep, and all that a step allocates at once; and for two settings the ratios of their times, pair by pair.
    """
    sides = {name: prepared(recipe, teacher, network) for name, recipe in recipes.items()}
    place, *others = {trainer.device for trainer, _ in sides.values()}
    if others:
        raise ValueError("device: both settings must compute on one, or their times have no ratio")
    told: dict[str, dict[str, Any]] = {}
    rounds = {name: getattr(getattr(recipe.method, "game", None), "calls", 1) for name, recipe in recipes.items()}
    for name, (trainer, source) in sides.items():  # also the warm-up
        trainer.images = first
        with Meter(trainer, count=True) as meter:
            for _ in range(rounds[name]):
                trainer.advance(source)
        # steps of their own: counting keeps activations alive that are made again
        with Kept(trainer) as kept, resources.Watch(resources.standing(trainer)) as watch:
            for _ in range(rounds[name]):
                trainer.advance(source)
        batch = recipes[name].batch
        told[name] = _counts(trainer, rounds[name] * batch, meter) | {
            "batch": batch,
            "graph_mib": round(kept.peak / 2**20, 2),
            "step_mib": round(watch.top / 2**20, 2),
        }
    parts: dict[str, list[dict[tuple[str, str], float]]] = {name: [] for name in sides}
    around: dict[str, list[float]] = {name: [] for name in sides}
    peaks = [matmul_peak(device=place)]
    for number in range(repeats):
        order = list(sides) if number % 2 == 0 else list(sides)[::-1]
        for name in order:
            (trainer, source), played = sides[name], steps * rounds[name]
            with Meter(trainer) as meter:
                for _ in range(played):
                    trainer.advance(source)
            parts[name].append({key: value / played for key, value in meter.seconds.items()})
            peaks.append(matmul_peak(device=place))
            around[name].append((peaks[-2] + peaks[-1]) / 2)
    times = {name: [sum(each.values()) for each in repeated] for name, repeated in parts.items()}
    for name, recipe in recipes.items():
        seconds = statistics.median(times[name])
        middle = parts[name][times[name].index(statistics.median_low(times[name]))]
        told[name] |= {
            "seconds_per_step": seconds,
            "images_per_second": recipe.batch / seconds,
            "all_seconds": times[name],
            "parts": _by_part(middle),
            "turns": {turn: _by_part({k: v for k, v in middle.items() if k[0] == turn}) for turn, _ in middle},
            "gflop_per_second": told[name]["flops_per_image"] * recipe.batch / seconds / 1e9,
            # each repeat against the peak measured right before and after it
            "fraction_of_peak": statistics.median(
                told[name]["flops_per_image"] * recipe.batch / each / peak
                for each, peak in zip(times[name], around[name], strict=True)
            ),
        }
    result: dict[str, Any] = {
        "settings": told,
        "peak_gflop_per_second": statistics.median(peaks) / 1e9,
        "peak_memory_mib": peak_memory_mib(),
        "device_memory_mib": torch.cuda.max_memory_allocated() // 2**20 if place.type == "cuda" else None,
        "note": "absolute times are those of a machine that others may use at the same time; ratios and shares are "
        "of steps played in turns in one process",
        "versions": versions(),
        "machine": machine(),
        "commit": commit(),
    }
    if len(recipes) == 2:
        one, two = times.values()
        ratios = sorted(a / b for a, b in zip(one, two, strict=True))
        names = list(recipes)
        result["ratio"] = {
            "of": f"{names[0]} / {names[1]}",
            "median": statistics.median(ratios),
            "low": ratios[0],
            "high": ratios[-1],
        }
    return result


def _counts(trainer: Trainer, images: int, meter: Meter) -> dict[str, Any]:
    """FLOPs of what was just counted, per image, by turn and part, and in forward passes of the teacher."""
    forward = flops_of_a_pass(trainer)
    per_image = {key: value / images for key, value in meter.flops.items() if value}
    turns = dict.fromkeys(turn for turn, _ in per_image)
    return {
        "flops_per_image": sum(per_image.values()),
        "flops_of_a_pass": forward,
        "passes": sum(per_image.values()) / forward if forward else None,
        "passes_by_turn": {
            turn: {part: value / forward for (t, part), value in per_image.items() if t == turn} for turn in turns
        }
        if forward
        else {},
    }


def flops_of_a_pass(trainer: Trainer) -> int:
    """FLOPs of one forward pass of the product's network, or else the teacher's, for one image; 0 without one."""
    product = trainer.nets[trainer.objective.product]
    home = next((m for m in product.modules() if isinstance(m, Denoiser)), trainer.teacher)
    weight = next(home.parameters(), None)
    if weight is None:
        return 0
    x = torch.zeros(1, *home.shape, dtype=weight.dtype, device=weight.device)
    with torch.no_grad(), flop_counter() as counter:
        home(x, torch.ones(1, dtype=x.dtype, device=x.device), x.new_zeros(1, home.classes) if home.classes else None)
    return int(counter.get_total_flops())


def _by_part(seconds: Mapping[tuple[str, str], float]) -> dict[str, float]:
    total: dict[str, float] = defaultdict(float)
    for (_, part), value in seconds.items():
        total[part] += value
    return {part: total[part] for part in PARTS if part in total}


def lines(result: Mapping[str, Any]) -> list[str]:
    """A result of `bench` as text."""
    out = []
    for name, side in result["settings"].items():
        total = side["seconds_per_step"]
        passes = f"{side['passes']:.2f} passes" if side["passes"] else "no network"
        out.append(
            f"{name}: {side['images_per_second']:.4g} images/s, {total:.4g} s per step of {side['batch']}, "
            f"{side['flops_per_image'] / 1e9:.4g} GFLOP per image = {passes}, {side['gflop_per_second']:.4g} GFLOP/s "
            f"= {side['fraction_of_peak']:.2f} of {result['peak_gflop_per_second']:.4g} in float32, "
            f"graphs of {side['graph_mib']:g} MiB, {side['step_mib']:g} in all"
        )
        for turn, parts in side["turns"].items():
            spent = ", ".join(f"{part} {100 * value / total:.1f}%" for part, value in parts.items())
            out.append(f"  {turn or 'between turns'}: {spent}")
    out.append(f"resident memory at its largest: {result['peak_memory_mib']:,} MiB")
    if result["device_memory_mib"] is not None:
        out.append(f"the device's memory at its largest: {result['device_memory_mib']:,} MiB")
    if "ratio" in result:
        r = result["ratio"]
        out.append(f"time of {r['of']}: {r['median']:.3f} ({r['low']:.3f} to {r['high']:.3f})")
    return out
