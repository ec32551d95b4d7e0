"""The report pages: what they say, that they hold any input, and that a browser draws them."""

from __future__ import annotations

import base64
import hashlib
import html.parser
import io
import json
import math
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from limbeck import report as page
from limbeck.glossary import METRICS
from limbeck.report import (
    Curve,
    Picture,
    Scatter,
    _training,
    health_curves,
    history_curves,
    render,
    render_comparison,
)

NAN, INF = math.nan, math.inf


def png(width: int = 80, height: int = 80) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def full_report() -> dict:
    return {
        "limbeck": "0.1.0",
        "method": {"name": "pid", "N": 250},
        "teacher": "digits",
        "steps": 6000,
        "images": 1536000,
        "seconds": 151.2,
        "seed": 0,
        "parameters": 440123,
        "student": {
            "nfe": 1,
            "ms_per_image": 0.01,
            "metrics": {"fd_feature": 1.23, "fd_pixel": 0.33, "class_accuracy": 0.979, "class_balance": 0.011},
            "spread": {"fd_feature": 0.04},
        },
        "teacher_scores": {
            "nfe": 35,
            "ms_per_image": 0.4,
            "metrics": {"fd_feature": 0.88, "fd_pixel": 0.21, "class_accuracy": 0.985, "class_balance": 0.011},
        },
        "speed": {
            "student": {"images_per_second": 78_000.0, "ms_at_batch_1": 0.32},
            "teacher, 35 NFE": {"images_per_second": 1080.0, "ms_at_batch_1": 11.1},
        },
        "floor": {"metrics": {"fd_feature": 0.41, "class_accuracy": 0.991}, "note": "two halves of the data"},
        "history": [
            {"step": k, "images": 256 * k, "seconds": 0.1 * k, "metrics": {"fd_feature": 1.2 + 99 / k}}
            for k in (500, 1000, 1500)
        ],
        "hashes": {"generator.safetensors": "sha256:9f2c"},
        "recipe": {"teacher": "digits", "method": {"name": "pid"}, "optimizer": {"generator": {"lr": 2e-4}}},
        "versions": {"python": "3.11.2", "torch": "2.13.0"},
        "machine": {"cpu": "some", "memory": {"gb": 8}},
    }


def log_rows(count: int = 200) -> list[dict]:
    rng = np.random.default_rng(0)
    return [
        {
            "step": k,
            "images": 256 * k,
            "loss/generator": math.exp(-k / 50) * math.exp(0.1 * rng.normal()),
            "grad_norm/generator": 0.1 + rng.random(),
            "lr/generator": 1e-4,
            "loss/fake": rng.normal(),
        }
        for k in range(1, count + 1)
    ]


def panels() -> list[page.Panel]:
    ring = [[math.cos(k), math.sin(k)] for k in range(200)]
    return [
        Picture("Student", "One call each.", png()),
        Picture("Path", "From noise to digit.", png(400, 40)),
        Scatter("Samples", "Student over target.", {"target": ring, "student": [*ring, [50.0, 0.0]]}),
        Curve("Distance", "", "images", "FD", {"student": [(0, 4.0), (10, 2.0)]}, lines={"teacher": 1.0}),
    ]


class Outline(html.parser.HTMLParser):
    """Elements in order, text, and whether every end tag closes what is open."""

    VOID = frozenset({"meta", "link", "img"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.raw: dict[str, list[str]] = {"script": [], "style": []}
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"an attribute of {tag} is given twice"
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> within {self.open}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in self.raw:
            self.raw[self.open[-1]].append(data)
        else:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.words))

    def count(self, tag: str, kind: str) -> int:
        return sum(name == tag and kind in (at.get("class") or "").split() for name, at in self.elements)


COMPARED = [
    {"run": "a", "method": "PID", "fd_feature": 1.23, "class_accuracy": 0.9, "nfe": 1, "log_density": -2.0},
    {"run": "b", "method": "SiD", "fd_feature": 0.97, "class_accuracy": 0.95, "nfe": 1},
    {"run": "c", "method": "", "fd_feature": NAN, "nfe": 35},
]


def pages() -> dict[str, str]:
    return {
        "full": render(full_report(), panels(), log_rows()),
        "history": render(full_report(), [], []),
        "minimal": render({}, [], []),
        "comparison": render_comparison("Two methods", "One teacher.", COMPARED, panels()),
        "empty comparison": render_comparison("", "", [], []),
    }


@pytest.mark.parametrize("name", pages())
def test_page_is_balanced_and_loads_nothing(name: str) -> None:
    text = pages()[name]
    outline = Outline(text)
    assert "http://" not in text and "https://" not in text
    for tag, attributes in outline.elements:
        for key in ("src", "href", "srcset", "action", "data", "poster"):
            assert (attributes.get(key) or "data:").startswith("data:"), (tag, attributes)
    assert "@import" not in text and "url(" not in "".join(outline.raw["style"])


def test_policy_allows_the_one_script_only() -> None:
    outline = Outline(pages()["full"])
    scripts = [at for tag, at in outline.elements if tag == "script"]
    assert [at.get("type") for at in scripts].count(None) == 1
    source = outline.raw["script"][[at.get("type") for at in scripts].index(None)]
    digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
    (policy,) = [at["content"] for tag, at in outline.elements if at.get("http-equiv") == "Content-Security-Policy"]
    assert (
        policy is not None
        and f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" == policy
    )


def test_full_report_says_what_the_numbers_say() -> None:
    text = Outline(pages()["full"]).text
    assert "digits, distilled with PID" in text
    assert (
        "A one-step generator distilled from the teacher digits with PID: it needs 1 network call where the teacher "
        "needs 35 and scores 1.4× the teacher's Fréchet distance (lower is better)."
    ) in text
    for said in (
        "40×",
        "2 min 31 s",
        "1.54 million images",
        "440,123",
        "10,159",
        "± 0.04",
        "Floor: two halves of the data",
    ):
        assert said in text
    for key in ("fd_feature", "fd_pixel", "class_accuracy", "class_balance"):
        assert METRICS[key].meaning in text and METRICS[key].blind in text
    for missing in ("No scores", "No pictures", "No training log", "No cost", "No recipe", "was not recorded"):
        assert missing not in text


def test_missing_parts_say_so() -> None:
    outline = Outline(pages()["minimal"])
    for part in (
        "Nothing was recorded about this run.",
        "No scores were recorded for this run.",
        "No pictures or curves were recorded for this run.",
        "No training log was recorded for this run.",
        "No cost was recorded for this run.",
        "No recipe was recorded for this run.",
        "No hashes were recorded for this run.",
        "No versions were recorded for this run.",
        "No machine was recorded for this run.",
    ):
        assert part in outline.text
    empty = [Picture("P", "", b"no png"), Scatter("S", "", {"target": []}), Curve("C", "", "x", "y", {"a": [(1, NAN)]})]
    outline = Outline(render({}, empty, [{"step": 1, "loss/generator": NAN}]))
    for part in ("picture was not recorded", "No samples were", "No values were", "No finite value was"):
        assert part in outline.text
    assert outline.count("p", "missing") == 4 + 6  # four figures; scores, cost, and the four folds
    text = Outline(pages()["empty comparison"]).text
    assert "No runs were given." in text and "No pictures or curves were given" in text


ODD = [
    None,
    "",
    "x",
    3,
    -1,
    0,
    True,
    NAN,
    INF,
    10**400,
    [],
    [NAN],
    {},
    {"metrics": 3},
    {"metrics": {"mmd": "x", "y": NAN}},
    [[1]],
]


@pytest.mark.parametrize("odd", ODD, ids=repr)
def test_no_field_can_break_the_page(odd: object) -> None:
    for key in full_report():
        Outline(render(full_report() | {key: odd}, [], []))
    for key in ("nfe", "ms_per_image", "metrics", "spread", "shares"):
        for side in ("student", "teacher_scores", "floor"):
            Outline(render(full_report() | {side: full_report()[side] | {key: odd}}, [], []))
    for key in METRICS:
        Outline(render({side: {"metrics": {key: odd}} for side in ("student", "teacher_scores", "floor")}, [], []))
    Outline(render({}, [], [{"step": odd, "loss/generator": 1.0}, {"step": 1, "loss/generator": odd}]))
    Outline(render_comparison("", "", [{"a": odd, "fd_feature": odd}, {"a": 1.0}], []))  # type: ignore[dict-item]


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(
    "values", [[0, 0], [1.7e308, -1.7e308], [1e-320, 2e-320], [1, 1 + 1e-15], [1e99, 1], [5], [-3, -3], [1e-99, 1e99]]
)
def test_extreme_values_can_be_drawn(values: list[float], log: bool) -> None:
    points = [(float(v), float(v)) for v in values]
    curve = Curve("C", "", "x", "y", {"a": points}, log_x=log, log_y=log, lines={"floor": values[0]})
    text = render(
        {},
        [curve, Scatter("S", "", {"target": [list(p) for p in points]})],
        [{"step": k, "loss/a": v} for k, v in enumerate(values)],
    )
    drawn = [at["d"] or "" for tag, at in Outline(text).elements if tag == "path"]
    assert drawn and not any("nan" in d or "inf" in d for d in drawn)


HOSTILE = [
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(1)>",
    "' onload='x",
    '" onload="x',
    "<!--",
    "&lt;",
    "$title ${body}",
    "\ud800",
]


@pytest.mark.parametrize("bad", HOSTILE)
def test_hostile_text_stays_text(bad: str) -> None:
    report = full_report() | {"teacher": bad, "method": {"name": bad}, "seed": bad, "limbeck": bad}
    report |= {key: {bad: bad} for key in ("hashes", "versions", "machine")}
    report["recipe"] = {"teacher": bad, bad: {bad: [bad]}}
    report["floor"] = {"metrics": {bad: 1.0}, "note": bad}
    report["student"] = {"metrics": {bad: 2.0}, "spread": {bad: bad}}
    shown: list[page.Panel] = [
        Picture(bad, bad, png()),
        Scatter(bad, bad, {bad: [[0.0, 0.0], [1.0, 1.0]], bad + "2": [[0.0, 1.0]]}),
        Curve(bad, bad, bad, bad, {bad: [(0, 1), (1, 2)], bad + "2": [(0, 1)]}, lines={bad: 3.0}),
    ]
    log = [{"step": k, f"loss/{bad}": 1.0} for k in range(3)]
    harmless = render(full_report(), panels(), log_rows())
    for text in (render(report, shown, log), render_comparison(bad, bad, [{bad: bad, "x": 1.0}], shown)):
        text.encode()
        outline = Outline(text)
        names = {name for _, attributes in outline.elements for name in attributes}
        assert not any(name.startswith("on") for name in names)
        assert [tag for tag, _ in outline.elements].count("img") == 1
        assert outline.raw["script"].count(Outline(harmless).raw["script"][0]) == 1
        assert outline.count("script", "") == 0
        assert {at.get("type") for tag, at in outline.elements if tag == "script"} == {None, "application/json"}
        for source in outline.raw["script"][1:]:
            assert "<" not in source and json.loads(source)["lines"]
        if bad != "\ud800":
            assert bad in "".join(outline.words)


def test_numbers() -> None:
    told = {
        0: "0",
        1.2345: "1.23",
        0.98: "0.98",
        1.0: "1",
        123.4: "123",
        1234.5: "1,234",
        9.9996: "10",
        INF: "infinite",
    }
    told |= {-1.623: "−1.62", 0.000123: "1.23 × 10⁻⁴", 2.5e7: "2.5 × 10⁷", 1536000: "1,536,000"}
    assert {value: page._figure(value) for value in told} == told
    assert page._figure(NAN) == "not a number"
    durations = {
        0.5: "0.5 s",
        12.34: "12.3 s",
        151.2: "2 min 31 s",
        59.999: "60 s",
        3782: "1 h 3 min",
        400000: "4 d 15 h",
    }
    assert {value: page._duration(value) for value in durations} == durations
    ticks = {
        0.0: "0",
        250000: "250k",
        1.25e6: "1.25M",
        0.05: "0.05",
        -2.5: "−2.5",
        2000: "2000",
        1e-4: "10⁻⁴",
        3e-5: "3·10⁻⁵",
    }
    assert {value: page._short(value) for value in ticks} == ticks


def test_ticks_are_round_and_inside() -> None:
    assert page._Axis(0, 1).ticks(5) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert page._Axis(-0.13, 0.27).ticks(4) == [-0.1, 0, 0.1, 0.2]
    assert page._Axis(-3.2, 2.1, log=True).ticks(6) == [1e-3, 1e-2, 1e-1, 1, 10, 100]
    assert page._Axis(0, 1, log=True).ticks(5) == [1, 2, 5, 10]
    axis = page._Axis.around([3, 7], log=False, pad=0.25)
    assert (axis.low, axis.high, axis.at(5)) == (2, 8, 0.5)
    assert page._Axis.around([0.1, 7], log=False, pad=0.25, zero=True).low == 0


def test_curve_is_drawn_where_the_numbers_are() -> None:
    curve = Curve("C", "", "x", "y", {"a": [(0, 0), (50, 5), (100, 10)]}, lines={"floor": 5})
    outline = Outline(render({}, [curve], []))
    paths = {(at["class"], at["d"]) for tag, at in outline.elements if tag == "path" and at.get("class")}
    # x has 2% of room at either side, y starts at zero and has 6% at the top
    left, middle, right = 1000 * 0.02 / 1.04, 500, 1000 * 1.02 / 1.04
    tops = [1000, 1000 * (1 - 0.5 / 1.06), 1000 * (1 - 1 / 1.06)]
    wanted = "L".join(f"{a:.1f} {b:.1f}" for a, b in zip((left, middle, right), tops, strict=True))
    assert ("line c0", "M" + wanted) in paths
    assert ("level d0 target", f"M0 {tops[1]:.1f}H1000") in paths
    (data,) = [json.loads(source) for source in outline.raw["script"][1:]]
    assert data["lines"] == [{"name": "a", "role": "c0", "x": [0, 50, 100], "y": [0, 5, 10]}]


def test_thinning_keeps_the_spikes() -> None:
    points = [(float(k), math.sin(k)) for k in range(10_000)]
    points[5000], points[7001] = (5000.0, 99.0), (7001.0, -99.0)
    thin = page._thin(points)
    assert len(thin) <= 400 and (5000.0, 99.0) in thin and (7001.0, -99.0) in thin
    assert [x for x, _ in thin] == sorted({x for x, _ in thin})
    assert page._thin(points[:400]) == points[:400]
    rows = [{"step": k, "loss/generator": math.sin(k)} for k in range(5000)]
    drawn = [
        at for tag, at in Outline(render({}, [], rows)).elements if tag == "path" and "line" in (at.get("class") or "")
    ]
    assert drawn and all((at["d"] or "").count("L") < 400 for at in drawn)


def test_trend_is_the_running_mean() -> None:
    points = [(float(k), float(k % 2)) for k in range(40)]
    trend = page._trend(points, log=False)
    assert trend[0][1] == pytest.approx(1 / 2, abs=1e-12) and trend[10][1] == pytest.approx(2 / 3, abs=1e-12)
    trend = page._trend([(float(k), 10.0 ** (k % 2)) for k in range(40)], log=True)
    assert trend[10][1] == pytest.approx(10 ** (2 / 3), rel=1e-12)


def test_log_panels() -> None:
    rows = [*log_rows(), {"step": 201, "loss/generator": NAN, "grad_norm/generator": None}]
    outline = Outline(render({}, [], rows))
    assert (
        outline.text.index("Generator: loss")
        < outline.text.index("Generator: gradient norm")
        < outline.text.index("Fake: loss")
    )
    assert outline.text.count("1 value is not drawn (not finite).") == 2
    assert outline.count("path", "ghost") == 3


def test_picture_is_embedded_as_it_is() -> None:
    data = png(80, 40)
    outline = Outline(render({}, [Picture("P", "", data)], []))
    (image,) = [at for tag, at in outline.elements if tag == "img"]
    prefix = "data:image/png;base64,"
    assert image["src"] is not None and base64.b64decode(image["src"].removeprefix(prefix)) == data
    assert (image["width"], image["height"], image["class"]) == ("480", "240", "pixels")


def test_scatter_counts_what_misses_the_frame() -> None:
    outline = Outline(render({}, panels()[2:3], []))
    assert "201 samples, 1 outside the frame" in outline.text and "200 samples" in outline.text
    clouds = [
        at["d"] or ""
        for tag, at in outline.elements
        if tag == "path" and (at.get("class") or "") in ("student", "target")
    ]
    assert sum(d.count("M") for d in clouds) == 400


@pytest.mark.parametrize(
    ("key", "scores", "verdict"),
    [
        ("fd_feature", (1.5, 1.0, 0.5), "1.5× worse"),
        ("fd_feature", (0.5, 1.0, 0.5), "0.5× better"),
        ("fd_feature", (1.05, 1.0, 0.5), "1.05× within the spread"),
        ("class_accuracy", (0.5, 0.75, 0.9), "−25.0 points worse"),
        ("class_accuracy", (0.75, 0.75, 0.9), "0.0 points the same"),
        ("log_density", (-1.0, -2.0, -2.25), "+1 worse"),  # above the floor: over-concentrated
        ("log_density", (-2.5, -3.0, -2.25), "+0.5 better"),
        ("log_mmd2", (-5.0, -7.0, -8.0), "+2 worse"),
    ],
)
def test_verdict(key: str, scores: tuple[float, float, float], verdict: str) -> None:
    sides = zip(("student", "teacher_scores", "floor"), scores, strict=True)
    run = {side: {"metrics": {key: value}, "spread": {"fd_feature": 0.1}} for side, value in sides}
    row = page._verdict(page._Run.read(run), key, METRICS[key])
    assert re.sub(r"<[^>]*>", " ", row).split() == verdict.split()


def test_modes_of_an_exact_target() -> None:
    singly = {"mode_recall": 0.75, "mmd": 0.1} | {f"share_{k}": share for k, share in enumerate((0.5, 0.25, 0.25, 0))}
    report = {"teacher": "exact:four", "student": {"nfe": 1, "metrics": singly}, "floor": {"shares": [0.25] * 4}}
    outline = Outline(render(report, [], []))
    assert "finds 75.0 % of the target's modes" in outline.text and "per sample" in outline.text
    assert "1 of 4 modes receives no sample at all." in outline.text and "share_0" not in outline.text
    bars = [at for tag, at in outline.elements if tag == "rect"]
    assert [at["height"] for at in bars] == ["1000.0", "500.0", "500.0", "0.0"]


def test_teaching_has_no_student() -> None:
    report = {"kind": "denoiser", "data": "digits", "student": {"nfe": 35, "metrics": {"fd_feature": 1.0}}}
    report |= {"floor": {"metrics": {"fd_feature": 0.5, "fd_feature_halves": 0.6}}, "recipe": {"data": "digits"}}
    text = Outline(render(report, [], [])).text
    assert "A diffusion model trained on digits: it needs 35 network calls per image." in text
    assert "fd_feature_halves 0.6" in text and "limbeck teach recipe.toml" in text
    assert "Versus teacher" not in text and "Student" not in text
    accuracy = {"kind": "classifier", "data": "digits", "student": {"metrics": {"held_out_accuracy": 0.985}}}
    assert "names 98.5 % of the samples right" in Outline(render(accuracy, [], [])).text


def test_history_is_drawn_unless_curves_are_given() -> None:
    (curve,) = history_curves(full_report())
    assert curve.series == {"student": [(256 * k, 1.2 + 99 / k) for k in (500, 1000, 1500)]}
    assert curve.lines == {"teacher": 0.88, "floor": 0.41}
    assert Outline(pages()["history"]).count("div", "plot") == 1
    assert Outline(render(full_report(), panels()[3:], [])).count("div", "plot") == 1


def test_recipe_is_toml_that_reads_back() -> None:
    recipe = {
        "teacher": 'a "quoted" \\ name\n\x7f é </script>',
        "steps": 10,
        "lr": 1e-05,
        "big": 1e16,
        "inf": INF,
        "flag": True,
        "none": None,
        "a key": {"b.c": [1, 2.5, ["x"], {"d": 1, "e": None}]},
        "empty": {},
    }
    read = tomllib.loads(page._toml(recipe))
    wanted = {key: value for key, value in recipe.items() if value is not None}
    assert read == wanted | {"a key": {"b.c": [1, 2.5, ["x"], {"d": 1}]}}


def test_comparison_marks_the_best() -> None:
    outline = Outline(pages()["comparison"])
    cells = [at for tag, at in outline.elements if tag == "td"]
    best = [at["data-value"] for at in cells if "best" in (at.get("class") or "").split()]
    assert best == ["0.97", "0.95"]
    assert "Fréchet distance" in outline.text and "network calls" in outline.text and "not a number" in outline.text
    assert len(cells) == 3 * 6 and sum("data-value" not in at for at in cells) == 5  # blanks and the nan


# --- in a browser -----------------------------------------------------------------------------------------------------


def opened(text: str, folder: Path) -> str:
    """The page after headless Chromium has run its script; skips where Chromium is not installed."""
    chromium = shutil.which("chromium")
    if chromium is None:
        assert "CI" not in os.environ, "the gate opens the report page in chromium, which is not installed"
        pytest.skip("chromium not installed: the report page was not opened in a browser")
    path = folder / "report.html"
    path.write_text(text, encoding="utf-8")
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --virtual-time-budget=3000 --dump-dom"
    )
    command = [chromium, *flags.split(), f"--user-data-dir={folder / 'profile'}", path.as_uri()]
    done = subprocess.run(command, capture_output=True, timeout=120, check=True)
    return done.stdout.decode()


def root_of(dom: str) -> dict[str, str | None]:
    return next(attributes for tag, attributes in Outline(dom).elements if tag == "html")


@pytest.mark.parametrize("name", ["full", "minimal", "comparison"])
def test_browser_draws_the_page(name: str, tmp_path: Path) -> None:
    dom = opened(pages()[name], tmp_path)
    root = root_of(dom)
    assert root.get("data-ready") == "yes" and "data-error" not in root
    lines = Outline(dom).count("path", "line")
    assert lines == 0 if name == "minimal" else lines >= 2


def test_browser_refuses_injected_script(tmp_path: Path) -> None:
    text = pages()["minimal"].replace("</main>", "<script>document.documentElement.dataset.owned = 1</script></main>")
    root = root_of(opened(text, tmp_path))
    assert "data-owned" not in root and "blocked" in (root.get("data-error") or "")


def test_browser_readout_sorting_and_theme(tmp_path: Path) -> None:
    act = """<script>addEventListener("load", () => {
      document.querySelectorAll("table.sortable button")[2].click();
      document.getElementById("theme").click();
      const plot = document.querySelector(".plot"), frame = plot.getBoundingClientRect();
      plot.dispatchEvent(new PointerEvent("pointermove", { clientX: frame.right - 1, clientY: frame.top }));
    })</script>"""
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", pages()["comparison"])
    dom = opened(text.replace("</main>", act + "</main>"), tmp_path)
    root, outline = root_of(dom), Outline(dom)
    assert "data-error" not in root and root["data-theme"] in ("light", "dark")
    assert [row for row in re.findall(r'<td data-value="(\w)">', dom)] == ["b", "a", "c"]
    assert 'aria-sort="ascending"' in dom
    assert outline.count("div", "readout") == 1 and "images 10" in outline.text and "student 2" in outline.text


def test_losses_without_meaning_are_left_out() -> None:
    """The generator's where health is known, in joint turns too; a bound's share stays."""
    log = [{"images": 10 * n, "loss/generator+fake": 1.0, "grad_norm/fake": 2.0, "loss/fake": 3.0} for n in range(1, 4)]
    healthy = [{**row, "health/gap/1": -1.0, "health/fake_loss": 3.0} for row in log]
    joint, fake = "Generator and fake: loss", "Fake: loss"
    assert all(title in str(_training(log)) for title in (joint, fake))
    assert joint not in str(_training(healthy)) and fake in str(_training(healthy))


def test_samples_whose_ratio_was_cut_are_reported() -> None:
    log = [{"images": 10 * n, "ratio/clipped_logits": 0.0, "pull/limited": 3.0 * n} for n in range(4)]
    (curve,) = health_curves(log)
    assert curve.series["limited pulls"] == [(0, 0), (10, 3), (20, 6), (30, 9)] and "clipped logits" in curve.series
    assert not health_curves([{**row, "pull/limited": 0.0} for row in log])  # nothing was cut
