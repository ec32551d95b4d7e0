"""`make accept`: the checks that take longer than a test may. Writes results/*.json and says what holds.

Most checks are comparisons (`limbeck compare`) whose cells are run folders: an interrupted acceptance continues.
"""

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import faults
import torch
from torch import nn

from limbeck import artifact, config, folder, loop, methods, resources, run, teachers
from limbeck.compare import compare
from limbeck.data import Data
from limbeck.evaluate import ImageJudge, Reference, measure
from limbeck.evaluate.draws import latents
from limbeck.evaluate.judge import bundled_judge
from limbeck.evaluate.quadrature import kullback_leibler
from limbeck.files import write_atomically
from limbeck.health import Looks
from limbeck.machine import commit, machine, peak_memory_mib, versions

ROOT = Path(__file__).parent.parent
# of this commit: a finished run is not made again. Results that are written make the tree another one
RUNS = ROOT / "runs" / "accept" / (commit() or "unknown").rstrip("+")


def ring8(result: dict[str, Any]) -> list[tuple[str, bool]]:
    """Every seed: mmd at most 0.05, each mode holds 8 to 17% of the samples, two minutes on one core."""
    told = []
    for row in result["rows"]:
        metrics = row["student"]["metrics"]
        shares = [value for name, value in metrics.items() if name.startswith("share_")]
        told += [
            (f"{row['name']}: mmd {metrics['mmd']:.4f} <= 0.05", metrics["mmd"] <= 0.05),
            (
                f"{row['name']}: shares {min(shares):.3f} to {max(shares):.3f}",
                min(shares) >= 0.08 and max(shares) <= 0.17,
            ),
            (f"{row['name']}: {row['seconds']:.0f} s < 120 s", row["seconds"] < 120),
        ]
    return told


def pid_digits(result: dict[str, Any]) -> list[tuple[str, bool]]:
    """PID's student: at most twice the teacher's distance, class accuracy within 3 points."""
    told = []
    for row in result["rows"]:
        student, teacher = row["student"]["metrics"], row["teacher_scores"]["metrics"]
        ratio, points = (
            student["fd_feature"] / teacher["fd_feature"],
            student["class_accuracy"] - teacher["class_accuracy"],
        )
        told += [
            (f"{row['name']}: fd_feature {ratio:.2f}x the teacher's, <= 2", ratio <= 2),
            (f"{row['name']}: class accuracy {100 * points:+.1f} points of the teacher's", abs(points) <= 0.03),
        ]
    return told


def trend(result: dict[str, Any]) -> list[tuple[str, bool]]:
    """Euler's own score, the student's ceiling, falls with N, and the student's at N = 500 is below that at N = 18."""
    told = []
    for who in ("euler", "student"):
        first, last = (row[who] for row in (result["summary"][0], result["summary"][-1]))
        told.append((f"{who}: the score falls from {first:.4f} to {last:.4f}", last < first))
    return told


def first_minutes() -> dict[str, Any]:
    """What `make demo` runs, in a fresh folder on two threads: under five minutes, at most 1.2 times its teacher."""
    with tempfile.TemporaryDirectory() as out:
        command = ["-m", "limbeck", "distill", str(ROOT / "recipes" / "digits-sid.toml"), "--out", f"{out}/demo"]
        start = time.perf_counter()
        subprocess.run([sys.executable, *command], check=True, env={**os.environ, "OMP_NUM_THREADS": "2"})
        seconds = time.perf_counter() - start
        report = json.loads((Path(out) / "demo" / "report.json").read_text())
    student, teacher = (report[who]["metrics"]["fd_feature"] for who in ("student", "teacher_scores"))
    return {
        "seconds": seconds, "student": report["student"], "teacher_scores": report["teacher_scores"],
        "versions": versions(), "machine": machine(), "commit": commit(),
        "checks": [
            (f"{seconds:.0f} s < 300 s", seconds < 300),
            (f"fd_feature {student:.4f}, {student / teacher:.2f}x the teacher's, <= 1.2", student <= 1.2 * teacher),
        ],
    }  # fmt: skip


def compared(name: str, holds: Callable[[dict[str, Any]], list[tuple[str, bool]]]) -> dict[str, Any]:
    """The comparison of studies/NAME.toml, and what holds of it."""
    result = compare(ROOT / "studies" / f"{name}.toml", RUNS / name, print, workers=os.cpu_count() or 1)
    return {**result, "checks": holds(result)}


def evaluation_memory() -> dict[str, Any]:
    """50,000 images of 3 x 32 x 32 are scored within 2 GiB in 2,048 features of a small network."""
    # a process of its own: what other checks have held does not count
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        result = pool.submit(evaluated, 50_000, 2048).result()
    peak = result["peak_memory_mib"]
    return {**result, "checks": [(f"{peak:,} MiB resident <= 2,048 MiB", peak <= 2048)]}


def evaluated(samples: int, width: int) -> dict[str, Any]:
    """Scores of noise in random features, a reference of 10,000 images included, and what they took."""
    start, shape = time.perf_counter(), (3, 32, 32)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3072, width), nn.ReLU()).requires_grad_(False)
    images = Data("noise", latents(1, range(10_000), shape, 0).z.mul_(0.25).clamp_(-1, 1), None)
    judge = ImageJudge(Reference.measure(images, network, "random"), network, images.fingerprint())
    scores = measure(lambda z, cond: (0.25 * z).clamp(-1, 1), 0, judge, shape, 0, samples=samples)
    return {
        "samples": samples, "features": width, "peak_memory_mib": peak_memory_mib(), "metrics": scores.metrics,
        "seconds": time.perf_counter() - start, "versions": versions(), "machine": machine(), "commit": commit(),
    }  # fmt: skip


def survived() -> dict[str, Any]:
    """The long form of `make faults`: what a run, its files and its user's input may meet without harm."""
    rows = {row.fault: row for row in faults.play(faults.SIZES["long"], list(faults.FAULTS), print)}
    killed = sum(row.injected for name, row in rows.items() if name.startswith("kill"))
    damaged, malformed = (rows[name].injected for name in ("damaged files", "malformed input"))
    bad = {name: sum(getattr(row, name) for row in rows.values()) for name in ("wrong", "tracebacks", "executed")}
    lost = max(row.lost for row in rows.values())
    return {
        **faults.summary(list(rows.values())),
        "checks": [
            (f"{killed} kills >= 200, over {len(methods.METHODS)} methods", killed >= 200),
            (f"{damaged} corruptions >= 500", damaged >= 500),
            (f"{malformed:,} malformed inputs >= 5,000", malformed >= 5000),
            (f"{lost} steps lost at most <= {faults.SAVE}, the save interval", lost <= faults.SAVE),
            *((f"{name}: {count}", count == 0) for name, count in bad.items()),
        ],
    }


def safety_cost() -> dict[str, Any]:
    """What checkpoints, hashes, monitors and the estimate of memory take of the demo's processor time."""
    spent: dict[str, float] = {}

    def timed(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.process_time()
            try:
                return real(*args, **kwargs)
            finally:
                spent[name] = spent.get(name, 0.0) + time.process_time() - began

        return call

    places: dict[str, list[tuple[Any, str]]] = {
        "checkpoints": [(loop, "_save")],
        "hashes": [(folder, "seal"), (folder, "damaged"), (artifact, "check")],
        "monitors": [(loop, "_looks"), (Looks, "look")],
        "estimate": [(resources, "measure")],
    }
    real = {(place, name): getattr(place, name) for pairs in places.values() for place, name in pairs}
    try:
        for what, pairs in places.items():
            for place, name in pairs:
                setattr(place, name, timed(what, real[place, name]))
        recipe = config.resolve(config.read_toml(ROOT / "recipes" / "digits-sid.toml"), methods.METHODS)
        with tempfile.TemporaryDirectory() as out:
            began = time.process_time()
            run.run_distillation(recipe, Path(out) / "demo", print)
            total = time.process_time() - began
    finally:
        for (place, name), function in real.items():
            setattr(place, name, function)
    share = sum(spent.values()) / total
    return {
        "seconds": total, "spent": spent, "share": share, "versions": versions(), "machine": machine(),
        "commit": commit(), "checks": [(f"{100 * share:.2f}% of the demo's time < 3%", share < 0.03)],
    }  # fmt: skip


def gan_refinement() -> dict[str, Any]:
    """The GAN of recipes/fashion-gan.toml, refined in 3 seeds: its distance falls by more than draws differ."""
    place = RUNS / "gan-refinement"
    table = config.read_toml(ROOT / "recipes" / "fashion-gan.toml")
    run.run_teaching(config.resolve(table, config.TEACHING), place / "gan", print)
    makers = {"gan": place / "gan"}
    for seed in range(3):
        table = config.read_toml(ROOT / "recipes" / "fashion-refine.toml")
        # scored below, in more draws: the teacher's 35 calls a sample would take longer than all the rest
        table |= {"generator": {"file": str(place / "gan")}, "seed": seed}
        table |= {"evaluate": {"samples": 64}, "health": {"every": 0}}
        makers[f"seed={seed}"] = place / f"seed={seed}"
        run.run_distillation(config.resolve(table, methods.METHODS), makers[f"seed={seed}"], print)
    judge = bundled_judge("fashion", True)
    assert judge is not None
    rows = []
    for name, out in makers.items():
        model, report = artifact.load_generator(out), json.loads((out / "report.json").read_text())
        scores = measure(model, 1, judge, model.latent_shape, model.classes, samples=5000, draws=4)
        rows.append({
            "name": name, "metrics": scores.metrics, "spread": scores.spread, "steps": report["steps"],
            "images": report["images"], "seconds": report["seconds"], "hashes": report["hashes"],
        })  # fmt: skip
    before, *after = rows
    first, spread = before["metrics"]["fd_feature"], max(row["spread"]["fd_feature"] for row in rows)
    return {
        "samples": 5000, "draws": 4, "rows": rows, "versions": versions(), "machine": machine(), "commit": commit(),
        "checks": [
            (
                f"{row['name']}: fd_feature {first:.4f} to {row['metrics']['fd_feature']:.4f}, spread {spread:.4f}",
                first - row["metrics"]["fd_feature"] > spread,
            )
            for row in after
        ],
    }  # fmt: skip


def vdd_recovers() -> dict[str, Any]:
    """VDD with its defaults on both toys, four seeds: KL(student || teacher), by a sum over a grid, at most 0.02."""
    rows = []
    steps = 500
    for name, reach in (("exact:mixture8", 6.0), ("exact:policy4", 5.0)):
        teacher = teachers.load(name)
        contexts = (0.0, 0.25, 0.5, 0.75, 1.0) if teacher.contexts else (None,)
        for seed in range(4):
            with tempfile.TemporaryDirectory() as out:
                keys = {"teacher": name, "method": "vdd", "steps": steps, "batch": 128, "seed": seed, "threads": 1}
                keys |= {"evaluate": {"samples": 100, "teacher_steps": 2}}
                recipe = config.resolve(keys, methods.METHODS)
                seconds = run.run_distillation(recipe, Path(out) / "run", print)["seconds"]
                student = artifact.load_generator(Path(out) / "run").double()
            found = [divergence(student, teacher, context, reach) for context in contexts]
            row = {"teacher": name, "seed": seed, "steps": steps, "contexts": contexts, "kl": found, "seconds": seconds}
            rows.append(row)
    return {
        "rows": rows, "versions": versions(), "machine": machine(), "commit": commit(),
        "checks": [
            (f"{row['teacher']}, seed {row['seed']}: KL {max(row['kl']):.4f} <= 0.02", max(row["kl"]) <= 0.02)
            for row in rows
        ],
    }  # fmt: skip


def divergence(student: Any, teacher: Any, context: float | None, reach: float, points: int = 241) -> float:
    """KL(student || teacher) of two densities of the plane, in a context if they have any."""
    if context is None:
        return kullback_leibler(student.log_prob, teacher.log_prob, reach, points)
    cond = torch.full((points**2, 1), context, dtype=torch.float64)
    return kullback_leibler(
        lambda x: student.log_prob(x, cond), lambda x: teacher.log_prob(x, 0.0, cond), reach, points
    )


CHECKS: dict[str, Callable[[], dict[str, Any]]] = {
    "methods-ring8": lambda: compared("methods-ring8", ring8),
    "pid-digits": lambda: compared("pid-digits", pid_digits),
    "demo": first_minutes,
    "pid-trend-ring8": lambda: compared("pid-trend-ring8", trend),
    "pid-trend-digits": lambda: compared("pid-trend-digits", trend),
    "evaluation-memory": evaluation_memory,
    "gan-refinement": gan_refinement,
    "vdd": vdd_recovers,
    "faults": survived,
    "safety-cost": safety_cost,
}


def main() -> int:
    failed = 0
    names = sys.argv[1:] or list(CHECKS)
    for name in names:
        result = CHECKS[name]()
        checks = result["checks"]
        for text, good in checks:
            print(f"{'ok  ' if good else 'FAIL'} {name}: {text}")
        failed += sum(not good for _, good in checks)
        result["checks"] = [{"check": text, "holds": good} for text, good in checks]
        (ROOT / "results").mkdir(exist_ok=True)
        write_atomically(ROOT / "results" / f"{name}.json", json.dumps(result, indent=1) + "\n")
    if shutil.which("git") is None:
        print("no git: the results name no commit")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
