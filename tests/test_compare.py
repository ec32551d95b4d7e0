"""Comparisons: variants times grid, means over seeds, and the studies that the repository keeps."""

import json
import math
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from limbeck import artifact, cli, compare, config, summary
from limbeck.evaluate import Scores
from limbeck.loop import Job

STUDIES = Path(__file__).parent.parent / "studies"
HERE = Path("study.toml")
BASE: dict[str, Any] = {
    "teacher": "exact:ring8", "optimizer": {"generator": {"lr": 1e-4}}, "method": {"name": "pid", "N": 9},
}  # fmt: skip


def cells(**grid: Any) -> dict[str, tuple[dict[str, Any], config.Recipe]]:
    return {name: (settings, recipe) for name, settings, recipe in compare.cells_of({"base": BASE, **grid}, HERE, None)}


def test_variants_are_combined_with_the_whole_grid() -> None:
    other = {"name": "other one", "method": {"name": "sid"}, "optimizer": {"generator": {"betas": [0.5, 0.9]}}}
    with pytest.raises(ValueError, match=r"^method\.N: unknown key"):
        cells(variant=[other])
    other["method"] = {"N": 20}
    made = cells(variant=[{"name": "one"}, {**other, "batch": 7}], grid={"seed": [0, 3], "steps": [5]})
    assert list(made) == [
        "one-seed_0-steps_5", "one-seed_3-steps_5", "other_one-seed_0-steps_5", "other_one-seed_3-steps_5",
    ]  # fmt: skip
    settings, recipe = made["other_one-seed_3-steps_5"]
    assert settings == {"variant": "other one", "seed": 3, "steps": 5}
    assert (recipe.seed, recipe.steps, recipe.batch, recipe.method.N) == (3, 5, 7, 20)
    # tables are merged, not replaced; and the base stays as it is
    assert (recipe.optimizer["generator"].lr, recipe.optimizer["generator"].betas) == (1e-4, (0.5, 0.9))
    assert made["one-seed_0-steps_5"][1].method.N == 9 and BASE["method"] == {"name": "pid", "N": 9}


def test_a_variant_may_have_its_own_grid() -> None:
    made = cells(variant=[{"name": "a"}, {"name": "b", "grid": {"seed": [5], "method.N": [4]}}], grid={"seed": [0, 1]})
    assert list(made) == ["a-seed_0", "a-seed_1", "b-seed_5-N_4"]


def test_a_variant_may_start_from_an_earlier_one() -> None:
    first = {"name": "a", "batch": 7, "method": {"N": 4, "metric": "l1"}, "grid": {"seed": [5], "steps": [3, 4]}}
    second = {"name": "b", "like": "a", "method": {"N": 6}, "grid": {"steps": [9]}}
    made = cells(variant=[first, second, {"name": "c", "like": "b", "batch": 8}], grid={"seed": [0, 1]})
    assert list(made) == ["a-seed_5-steps_3", "a-seed_5-steps_4", "b-seed_5-steps_9", "c-seed_5-steps_9"]
    settings, b = made["b-seed_5-steps_9"]
    c = made["c-seed_5-steps_9"][1]
    assert settings == {"variant": "b", "seed": 5, "steps": 9}
    assert (b.batch, b.method.N, b.method.metric) == (7, 6, "l1") and (c.batch, c.method.N) == (8, 6)
    assert made["a-seed_5-steps_3"][1].method.N == 4 and second["method"] == {"N": 6}


def test_without_variants_cells_are_those_of_the_grid() -> None:
    assert list(cells(grid={"method.N": [4, 5]})) == ["N_4", "N_5"]
    assert list(cells()) == ["run"]


@pytest.mark.parametrize(
    ("grid", "line"),
    [
        ({"variant": {"name": "a"}}, "variant: must be a list of tables"),
        ({"variant": [{"method": {"N": 3}}]}, "variant.name: every variant needs a name"),
        ({"variant": [{"name": "a"}, {"name": "a"}]}, "variant.name: every variant needs a name"),
        ({"variant": [{"name": "a", "like": "b"}, {"name": "b"}]}, "variant.like: must name an earlier variant"),
        ({"variant": [{"name": "a", "like": ["b"]}]}, "variant.like: must name an earlier variant"),
        ({"variant": [{"name": "a", "like": "a"}]}, "variant.like: must name an earlier variant"),
        ({"variant": [{"name": "a", "grid": [1]}]}, "variant.grid: must be a table"),
        ({"variant": [{"name": "a", "grid": {"seed": 3}}]}, "grid.seed: must be a list"),
        ({"grid": {"seed": []}}, "grid.seed: must be a list"),
    ],
)
def test_bad_grids(grid: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError, match=f"^study.toml: {line}"):
        cells(**grid)


def row(variant: str, seed: int, **metrics: float) -> dict[str, Any]:
    floor = {"metrics": {"mmd": 0.1, "mode_recall": 1.0}}
    watched = [
        {"images": 100, "seconds": 1.0 + seed, "metrics": metrics},
        {"images": 50, "seconds": 0.5, "metrics": {"mmd": 2.0}},
    ]
    return {
        "settings": {"variant": variant, "seed": seed}, "student": {"metrics": metrics}, "floor": floor,
        "seconds": 2.0, "steps": 100, "images": 400, "history": watched,
    }  # fmt: skip


def test_means_are_over_seeds() -> None:
    rows = [row("a", 0, mmd=1.0, mode_recall=0.5), row("a", 1, mmd=3.0, mode_recall=1.0), row("b", 0, mmd=5.0)]
    a, b = compare._over_seeds(rows, ["mmd", "mode_recall"], None, {})
    assert (a["variant"], a["seeds"], a["student"], a["spread"], a["floor"]) == (
        "a",
        2,
        2.0,
        pytest.approx(2**0.5),
        0.1,
    )
    assert (a["mode_recall"], a["mode_recall spread"]) == (0.75, pytest.approx(0.5 / 2**0.5))
    assert a["mode_recall floor"] == 1.0 and a["ms per step"] == 20.0
    assert (b["student"], b["spread"], b["mode_recall"]) == (5.0, None, None)
    assert compare.history(rows, "mmd") == {"a": [(50, 2.0), (100, 2.0)], "b": [(50, 2.0), (100, 5.0)]}
    assert compare.history(rows, "mode_recall") == {"a": [(100, 0.75)]}
    assert compare.history(rows, "mmd", "seconds")["a"] == [(0.5, 2.0), (1.5, 2.0)]
    page = compare.page(
        {"title": "t", "metric": "mmd", "grid": {"also": ["mode_recall"]}, "rows": rows, "summary": [a, b]}
    )
    assert all(f"{name} over {unit}" in page for name in ("mmd", "mode_recall") for unit in ("images", "seconds"))


def test_the_target_is_where_a_run_first_comes_near_its_teacher(tmp_path: Path, tiny: dict[str, Any]) -> None:
    rows = [{"images": n, "seconds": n / 10, "metrics": {"mmd": m}} for n, m in ((10, 0.9), (20, 0.4), (30, 0.5))]
    assert compare.reached(rows, "mmd", 0.45) == {"images": 20, "seconds": 2.0}
    assert compare.reached(rows, "mmd", 0.1) is None
    assert compare.reached([{**rows[0], "metrics": {"mmd": -0.9}}], "mmd", -0.8) is None  # a teacher at 0, by chance
    base = {"teacher": "exact:ring8", "method": {"name": "pid", "N": 5}, **tiny, "every": {"evaluate": 3, "sample": 0}}
    for target, told in ((1e3, "2 of 2"), (1e-3, "0 of 2")):
        grid = {"metric": "mmd", "target": target, "base": base, "grid": {"seed": [0, 1]}}
        (tmp_path / "study.toml").write_text(config.dump_toml(grid))
        (row,) = compare.compare(tmp_path / "study.toml", tmp_path / "out", lambda line: None)["summary"]
        assert row["reached"] == told
        assert row["images until"] == (3 * tiny["batch"] if target > 1 else None)
    for row in json.loads((tmp_path / "out" / "comparison.json").read_text())["rows"]:
        assert row["history"][-1]["metrics"]["mmd"] == pytest.approx(row["student"]["metrics"]["mmd"])


def test_distances_on_the_way_end_at_the_final_ones() -> None:
    history = [
        {"images": n, "metrics": {"fd_feature": fd, "recall": 0.25 * n, "fd_pixel": 7.0}}
        for n, fd in ((1, 3.0), (2, 2.0))
    ]
    first, last = compare.levelled(history, {"fd_feature": 1.25, "recall": 0.75, "kid": 0.5})
    assert first == {"images": 1, "metrics": {"fd_feature": 2.25, "recall": 0.25, "fd_pixel": 7.0}}
    assert last == {"images": 2, "metrics": {"fd_feature": 1.25, "recall": 0.5, "fd_pixel": 7.0}}


def test_mmd_is_moved_by_its_square() -> None:
    """Few samples add to MMD squared; a difference of roots or logarithms is larger where the score is small."""

    def told(gap: float) -> dict[str, float]:
        return {"mmd": math.sqrt(gap), "mmd2": gap, "log_mmd2": math.log(gap)}

    history = [{"images": n, "metrics": told(gap)} for n, gap in ((1, 0.9), (2, 0.02), (3, 0.04))]
    for row, gap in zip(compare.levelled(history, told(0.01)), (0.87, -0.01, 0.01), strict=True):
        assert row["metrics"]["mmd2"] == pytest.approx(gap, abs=1e-15)
        assert row["metrics"]["mmd"] == pytest.approx(math.sqrt(max(gap, 0.0)))
        assert row["metrics"]["log_mmd2"] == pytest.approx(math.log(gap) if gap > 0 else math.log(1e-300))


def test_a_score_that_no_seed_has_is_left_open() -> None:
    """As a spread of modes of which none was found."""
    rows = [row("a", 0, mmd=1.0), row("a", 1, mmd=1.0)]
    (told,) = compare._over_seeds(rows, ["mode_spread", "mmd"], None, {})
    assert told["student"] is None and told["seeds"] == 0 and told["mmd"] == 1.0


def test_scores_may_be_means_of_the_last_ones_on_the_way(tmp_path: Path, tiny: dict[str, Any]) -> None:
    base = {"teacher": "exact:ring8", "method": {"name": "pid", "N": 5}, **tiny, "every": {"evaluate": 2, "sample": 0}}
    base["evaluate"] = {**base["evaluate"], "watched": base["evaluate"]["samples"]}
    for last in (None, 1, 2):
        grid = {"metric": "mmd", "also": ["log_density"], "base": base, "grid": {"seed": [0, 1]}}
        (tmp_path / "study.toml").write_text(config.dump_toml(grid | ({} if last is None else {"last": last})))
        told = compare.compare(tmp_path / "study.toml", tmp_path / "out", lambda line: None)
        for name, key in (("mmd", "student"), ("log_density", "log_density")):
            seeds = [
                row["student"]["metrics"][name]
                if last is None
                else statistics.fmean(entry["metrics"][name] for entry in row["history"][-last:])
                for row in told["rows"]
            ]
            assert told["summary"][0][key] == pytest.approx(statistics.fmean(seeds))
    # as many samples as at the end: nothing is taken off
    logged = [json.loads(line) for line in (tmp_path / "out" / "seed_0" / "log.jsonl").read_text().splitlines()]
    assert told["rows"][0]["history"] == [row for row in logged if "metrics" in row]


def test_better_than_perfect_is_flagged(tmp_path: Path, tiny: dict[str, Any]) -> None:
    """By more than three standard errors of the mean: of the seeds, and at least of a perfect sampler's score."""
    three = [-6.84, -6.85, -6.86]  # spread 0.01, error 0.00577
    assert not compare.beyond(three, -6.85 - 0.0172, 0.008) and compare.beyond(three, -6.85 - 0.0174, 0.008)
    assert not compare.beyond([-6.8], -6.85, 0.02) and compare.beyond([-6.8], -6.85, 0.016)
    assert compare.beyond([-9.0], -8.5, 0.1, lower=True) and not compare.beyond([-8.0], -8.5, 0.1, lower=True)
    base = {"teacher": "exact:ring8", "method": {"name": "pid", "N": 5}, **tiny}
    for anchor, flagged in ((-1e3, "log_density"), (1e3, None)):
        grid = {"metric": "mmd", "also": ["log_density"], "base": base, "grid": {"seed": [0, 1]}}
        grid["anchors"] = {"log_density": [anchor, 0.01], "mmd": [1e-9, 1e-9]}
        (tmp_path / "study.toml").write_text(config.dump_toml(grid))
        told = compare.compare(tmp_path / "study.toml", tmp_path / "out", lambda line: None)
        assert told["summary"][0]["better than perfect"] == flagged
        assert ("better than perfect" in compare.page(told)) == bool(flagged)


def test_how_scores_fall_over_images() -> None:
    """As a power, or as an exponential: each is told from the other."""
    points = [(float(x), 3 * x**-0.7) for x in (10, 200, 5000)]
    found = compare.fit(points)
    assert found is not None and found == compare.fit([*points, (1e6, 0.0)]) and compare.fit(points[:2]) is None
    assert found[:3] == pytest.approx((-0.7, 3, 1), abs=1e-12) and found.as_exponential < 0.8
    other = compare.fit([(float(x), 3 * math.exp(-x / 2000)) for x in (10, 200, 5000)])
    assert other is not None and other.as_exponential == pytest.approx(1, abs=1e-12) and other.as_power < 0.8
    assert compare.fit([(1.0, 2.0), (2.0, 2.0), (3.0, 2.0)]) == (0.0, 2.0, 1.0, 1.0)


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.toml")), ids=lambda path: path.stem)
def test_studies_are_valid(path: Path) -> None:
    grid = config.read_toml(path)
    assert not {*grid} - {*compare.KEYS}
    assert compare.cells_of(grid, path, None)


def test_two_variants_run(tmp_path: Path, tiny: dict[str, Any]) -> None:
    text = config.dump_toml(
        {
            "metric": "mmd", "also": ["log_density"],
            "base": {"teacher": "exact:ring8", **tiny, "every": {"evaluate": 3, "sample": 0}},
            "variant": [{"name": n, "method": {"name": n}} for n in ("vardiu", "vdd")], "grid": {"seed": [0, 1]},
        }
    )  # fmt: skip
    (tmp_path / "study.toml").write_text(text)
    told = compare.compare(tmp_path / "study.toml", tmp_path / "out", lambda line: None)
    assert [(r["variant"], r["seeds"]) for r in told["summary"]] == [("vardiu", 2), ("vdd", 2)]
    assert all(r["spread"] > 0 and "log_density spread" in r for r in told["summary"])
    assert len(told["rows"][0]["history"]) == 2
    again = compare.compare(tmp_path / "study.toml", tmp_path / "out", lambda line: None)
    assert again["summary"] == told["summary"]


def test_a_comparison_in_parts_is_the_whole(
    tmp_path: Path, tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    watch = {"every": {"evaluate": 3, "sample": 0}}
    base = {"teacher": "exact:ring8", "method": {"name": "pid", "N": 5}, **tiny, **watch}
    grid = {"metric": "mmd", "target": 1.2, "base": base, "grid": {"seed": [0, 1, 2]}}
    HERE.write_text(config.dump_toml(grid))

    def made(*words: str) -> dict[str, Any]:
        assert cli.main(["compare", "study.toml", *words]) == 0
        told: dict[str, Any] = json.loads(Path(words[words.index("--out") + 1], "comparison.json").read_text())
        return told

    def scores(told: dict[str, Any]) -> list[Any]:
        return [(row["name"], row["student"]["metrics"]) for row in told["rows"]]

    whole = made("--out", "whole")
    assert whole["missing"] == [] and all(
        row["commit"] and row["machine"] and row["versions"]["torch"] for row in whole["rows"]
    )
    first = made("--out", "one", "--only", "seed_[02]")
    assert first["missing"] == ["seed_1"] and first["summary"][0]["seeds"] == 2
    assert "1 of 3 runs are missing" in Path("one/comparison.html").read_text()
    second = made("--out", "two", "--known", "one/comparison.json")
    assert [path.name for path in sorted(Path("two").iterdir()) if path.is_dir()] == ["seed_1"]
    assert second["missing"] == [] and scores(second) == scores(whole) and second["rows"][0] == first["rows"][0]
    # another target is told of the same rows
    for factor, told in ((1e6, "3 of 3"), (1e-6, "0 of 3")):
        HERE.write_text(config.dump_toml({**grid, "target": factor}))
        other = made("--out", "aimed", "--known", "two/comparison.json")
        assert other["summary"][0]["reached"] == told and scores(other) == scores(whole)
    assert [path.name for path in Path("aimed").iterdir() if path.is_dir()] == []
    # a cell whose recipe has changed is played again
    HERE.write_text(config.dump_toml({**grid, "base": {**base, "method": {"name": "pid", "N": 6}}}))
    capsys.readouterr()
    assert made("--out", "three", "--known", "one/comparison.json")["rows"][0] != first["rows"][0]
    assert "known: 2 cells have another recipe now, seed_0 for one (method.N)" in capsys.readouterr().err
    # one that is older than a key of recipes is not: what is missing had its default
    HERE.write_text(config.dump_toml(grid))
    older = json.loads(Path("two/comparison.json").read_text())
    for row in older["rows"]:
        del row["recipe"]["evaluate"]["watched"], row["recipe"]["method"]["gradient"]
    Path("older.json").write_text(json.dumps(older))
    assert scores(made("--out", "five", "--known", "older.json")) == scores(whole)
    assert [path.name for path in Path("five").iterdir() if path.is_dir()] == []
    for name, text, words in (
        (
            "other.json",
            json.dumps({**whole, "grid": {**grid, "metric": "c2st"}}),
            "has metric = 'c2st', and study.toml has 'mmd'",
        ),
        ("no.json", "[]", "is no comparison.json"),
        ("missing.json", None, "cannot read missing.json (No such file"),
    ):
        if text is not None:
            Path(name).write_text(text)
        assert cli.main(["compare", "study.toml", "--out", "four", "--known", name]) == 2
        assert words in capsys.readouterr().err
    for known in ([], ["--known", "two/comparison.json"]):
        assert cli.main(["compare", "study.toml", "--out", "four", "--only", "sid*", *known]) == 2
        assert "only: no cell is called like 'sid*'; the first is seed_0" in capsys.readouterr().err
    assert not Path("four").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        *(({key: None}, f"row run lacks {key}") for key in ("settings", "hashes", "steps", "images", "seconds")),
        ({"student": {"metrics": {}}}, "row run lacks student with mmd"),
        ({"teacher_scores": {"metrics": {"c2st": 1.0}}}, "row run lacks teacher_scores with mmd"),
        ({"student": 3}, "row run is damaged"),
        ({"history": [{"images": 3}]}, "row run lacks scores on the way"),
        ({"history": []}, "row run lacks scores on the way"),
        ({"recipe": "0123"}, "1 cells have another recipe now, run for one (recipe)"),
    ],
    ids=str,
)
def test_rows_that_lack_something_are_named(
    change: dict[str, Any], words: str, tmp_path: Path, tiny: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    watch = {"every": {"evaluate": 4, "sample": 0}}  # at the steps 4 and 6
    grid = {"metric": "mmd", "last": 2, "base": {"teacher": "exact:ring8", "method": "pid", **tiny, **watch}}
    study, known = tmp_path / "study.toml", tmp_path / "known.json"
    study.write_text(config.dump_toml(grid))
    told = compare.compare(study, tmp_path / "one", lambda line: None)
    told["rows"][0] |= change
    known.write_text(json.dumps(told))
    code = cli.main(["compare", str(study), "--known", str(known), "--out", str(tmp_path / "two")])
    assert code == (0 if "recipe" in change else 2) and words in capsys.readouterr().err


def test_a_teacher_is_scored_once(tmp_path: Path, tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    scored: list[str] = []
    score = summary._scores

    def told(job: Job, model: nn.Module) -> Scores:
        scored.append(type(model).__name__)
        return score(job, model)

    monkeypatch.setattr(summary, "_scores", told)
    study = tmp_path / "study.toml"
    base = {"teacher": "exact:ring8", "method": {"name": "pid", "N": 5}, **tiny}

    def teachers_scored(name: str, base: dict[str, Any], known: Path | None = None) -> tuple[int, list[Any]]:
        scored.clear()
        study.write_text(config.dump_toml({"metric": "mmd", "base": base, "grid": {"seed": [0, 1]}}))
        result = compare.compare(study, tmp_path / name, lambda line: None, known=known)
        return scored.count("Mixture"), [row["teacher_scores"]["metrics"] for row in result["rows"]]

    count, whole = teachers_scored("one", base)
    assert count == 1 and whole[0] == whole[1]
    known = tmp_path / "one" / "comparison.json"
    assert teachers_scored("two", {**base, "steps": base["steps"] + 1}, known)[0] == 1  # no row is taken over
    half = json.loads(known.read_text())
    half["rows"] = half["rows"][:1]
    (tmp_path / "half.json").write_text(json.dumps(half))
    assert teachers_scored("three", base, tmp_path / "half.json") == (0, whole)
    # but not how long a sample took there: "seed_1" is measured here
    again = json.loads((tmp_path / "three" / "comparison.json").read_text())["rows"]
    assert again[0]["teacher_scores"]["ms_per_image"] > 0 and again[1]["teacher_scores"]["ms_per_image"] is None
    assert "Speed against the teacher" not in (tmp_path / "three" / "seed_1" / "report.html").read_text()
    assert "Speed against the teacher" in (tmp_path / "one" / "seed_1" / "report.html").read_text()
    count, other = teachers_scored("four", {**base, "evaluate": {**base["evaluate"], "seed": 5}})
    assert count == 1 and other[0] != whole[0]
    # scores on the way, which are moved, are taken over as they were told
    base = {**base, "every": {"evaluate": 3, "sample": 0}}
    teachers_scored("five", base)
    told = json.loads((tmp_path / "five" / "comparison.json").read_text())
    (tmp_path / "half.json").write_text(json.dumps({**told, "rows": told["rows"][:1]}))
    teachers_scored("six", base, tmp_path / "half.json")
    again = json.loads((tmp_path / "six" / "comparison.json").read_text())
    for one, other in zip(told["rows"], again["rows"], strict=True):
        assert [entry["metrics"] for entry in one["history"]] == [entry["metrics"] for entry in other["history"]]


def test_workers_make_what_one_process_makes(tmp_path: Path, tiny: dict[str, Any]) -> None:
    base = {"teacher": "exact:ring8", "method": {"name": "pid", "N": 5}, "threads": 1, **tiny}
    text = config.dump_toml({"metric": "mmd", "base": base, "grid": {"seed": [0, 1, 2]}})
    (tmp_path / "study.toml").write_text(text)
    lines: list[str] = []
    one = compare.compare(tmp_path / "study.toml", tmp_path / "one", lines.append)
    two = compare.compare(tmp_path / "study.toml", tmp_path / "two", lines.append, workers=2)
    assert [r["student"]["metrics"] for r in one["rows"]] == [r["student"]["metrics"] for r in two["rows"]]
    assert "[3/3]" in "".join(lines) and sum("is finished" in line for line in lines) == 3


def test_a_signal_ends_all_workers_and_the_comparison_goes_on(tmp_path: Path, tiny: dict[str, Any]) -> None:
    base = {"teacher": "exact:ring8", "method": {"name": "pid", "N": 5}, "threads": 1, **tiny}
    base |= {"steps": 1_000_000, "every": {"log": 1, "save": 0, "sample": 0}}
    grid = {"metric": "mmd", "base": base, "grid": {"seed": [0, 1, 2]}}  # one more than workers
    (tmp_path / "study.toml").write_text(config.dump_toml(grid))
    command = [sys.executable, "-m", "limbeck", "compare", "study.toml", "--out", "out", "--workers", "2"]
    job = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    logs = [tmp_path / "out" / f"seed_{seed}" / "log.jsonl" for seed in (0, 1)]
    deadline = time.monotonic() + 60
    while not all(log.is_file() and log.stat().st_size for log in logs) and time.monotonic() < deadline:
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    error = job.communicate(timeout=60)[1]
    assert job.returncode == 143 and error.strip().endswith("stopped, saved; the same command continues"), error
    assert all(list((log.parent / "checkpoints").glob("ckpt-*")) for log in logs)
    assert not (tmp_path / "out" / "seed_2").exists()


MISTAKES: dict[str, tuple[str, str]] = {
    "target": ('target = 0', "target: must be a positive factor"),
    "last": ("last = 0", "last: must be a number of scores on the way, got 0"),
    "an anchor of nothing": ("anchors.mmd = [nan, 1.0]", "anchors.mmd: must be [score, standard deviation above 0]"),
    "no end": ("target = inf", "target: must be a positive factor"),
    "no variant": ("variant = []", "variant: must not be empty"),
    "last of none": ("last = 3", "last: seed_0 has fewer than 3 scores on the way"),
    "anchors": ("anchors.mmd = 3", "anchors.mmd: must be [score, standard deviation above 0], got 3"),
    "anchor of another": ("anchors.fid = [3, 1]", "anchors.fid: must be the metric or one of `also`"),
    "metric": ('metric = "fid"', "metric: seed_0 will not have 'fid'"),
    "also": ('also = ["mmdd"]', "metric: seed_0 will not have 'mmdd'"),
    "also as text": ('also = "mmd"', "also: must be a list"),
    "x": ('x = "method.N"', "x: 'method.N' must be a key of the grid"),
    "title": ("title = 3", "title: must be text, got 3"),
    "euler as text": ('euler = "yes"', "euler: must be true or false, got 'yes'"),
    "euler": ('euler = true\nbase.method = "sid"', "euler: only PID has a grid of N levels, seed_0 has another method"),
    "seeds": ("grid.seed = [0, 0]", "grid: two cells are called seed_0"),
    "teacher": ('variant = [{name = "a"}, {name = "b", teacher = "nope"}]', "b-seed_0: teacher: no file or bundled"),
    "teachers": ('grid.teacher = ["exact:ring8"]', "grid.teacher: give every teacher a [[variant]] of its own"),
    "x of seeds": ('x = "seed"', "x: 'seed' must be a key of the grid, not the seed"),
    "a target of what may grow": ('target = 2\nmetric = "mode_recall"', "target: is a factor on a distance"),
    "a target below 0": ('target = 2\nmetric = "log_mmd2"', "target: is a factor on a distance, which log_mmd2 is not"),
    "last of what is not watched": (
        'last = 1\nalso = ["recall"]\nmetric = "fd_feature"\nbase.teacher = "digits"\nbase.every.evaluate = 100',
        "last: seed_0 will not have 'recall' on the way; it has class_accuracy, class_balance, classifier_score, fd_",
    ),
    "a target that is not watched": (
        'target = 2\nmetric = "fd_pixel"\nbase.teacher = "digits"', "target: seed_0 will not have 'fd_pixel' on the way"
    ),
    "program": ('base.evaluate.features = "x.pt"', "evaluate.features: grid.toml names x.pt, a program"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_found_before_anything_is_run(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = {"metric": '"mmd"', "base.teacher": '"exact:ring8"', "base.method": '"pid"', "grid.seed": "[0]"}
    given = dict(line.split(" = ", 1) for line in MISTAKES[case][0].splitlines())
    (tmp_path / "grid.toml").write_text("".join(f"{key} = {value}\n" for key, value in (lines | given).items()))
    assert cli.main(["compare", "grid.toml", "--out", "out"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert MISTAKES[case][1] in line and not (tmp_path / "out").exists()


def test_a_comparison_says_where_it_comes_from(tmp_path: Path, tiny: dict[str, Any]) -> None:
    grid = {
        "metric": "mmd",
        "base": {"teacher": "exact:ring8", "method": {"name": "pid"}, **tiny},
        "grid": {"seed": [0, 1]},
    }
    (tmp_path / "grid.toml").write_text(config.dump_toml(grid))
    told = compare.compare(tmp_path / "grid.toml", tmp_path / "out", lambda line: None)
    page = (tmp_path / "out" / "comparison.html").read_text()
    for row in told["rows"]:
        run_report = json.loads((tmp_path / "out" / row["name"] / "report.json").read_text())
        assert row["hashes"] == run_report["hashes"] and "commit" in run_report
        generator = artifact.load_generator(tmp_path / "out" / row["name"])
        assert row["hashes"]["generator"] == artifact.fingerprint(generator) and row["hashes"]["generator"] in page
    assert told["rows"][0]["hashes"]["generator"] != told["rows"][1]["hashes"]["generator"]
