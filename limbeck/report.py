"""One self-contained HTML page for a run, and one for a comparison of runs.

A page loads nothing: style, script, pictures and data lie in the file, and a content security policy with the hash of
the one script makes the browser refuse everything else, so that a hostile name in a report can neither run nor call
out. Curves are drawn here, as SVG, and need no script; the script adds read-outs, sorting and the light/dark switch.
Student, teacher and data keep one colour each through the whole page.
"""

from __future__ import annotations

import base64
import hashlib
import html
import itertools
import json
import math
import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from string import Template
from typing import Any, NamedTuple

import numpy as np

from limbeck.glossary import AIMS, COLUMNS, HEADLINES, METHODS, METRICS, PRODUCTS, READINGS, Metric, Product

CURVE_POINTS = 400  # per line; more than a screen can show
CLOUD_POINTS = 3000  # per series of a scatter


@dataclass(frozen=True)
class Picture:
    """A PNG: sample grid, trajectory strip. Small ones are shown enlarged by a whole factor, pixels kept sharp."""

    title: str
    caption: str
    png: bytes


@dataclass(frozen=True)
class Scatter:
    """2-D samples, name -> [[x, y], ...] with at most `CLOUD_POINTS` shown of each; the first series is the target.

    Every series gets its own square, drawn over the target in grey and framed by the target's extent.
    """

    title: str
    caption: str
    series: dict[str, list[list[float]]]


@dataclass(frozen=True)
class Curve:
    """Lines, name -> [(x, y), ...], and horizontal reference `lines`, name -> y (teacher, floor)."""

    title: str
    caption: str
    x_label: str
    y_label: str
    series: dict[str, list[tuple[float, float]]]
    log_x: bool = False
    log_y: bool = False
    lines: dict[str, float] = field(default_factory=dict)


Panel = Picture | Scatter | Curve


class Noted(NamedTuple):
    """A score of a comparison, with its spread or interval in words."""

    value: float
    note: str


TRUTHS = ("floor", "halves")  # rows of a comparison, and blocks of a report, that are the truth's own scores


def render(report: Mapping[str, Any], panels: Sequence[Panel], log: Sequence[Mapping[str, Any]]) -> str:
    """The page of one run: `report` is the content of report.json, `log` the rows of log.jsonl.

    Any part may be missing or of the wrong kind and then says so in one grey line. If no `Curve` is among `panels`,
    the metrics in `report["history"]` are drawn after them (`history_curves`). Write the result as UTF-8.
    """
    run = _Run.read(report)
    curves = [] if any(isinstance(panel, Curve) for panel in panels) else history_curves(report)
    title = run.source or "A run of Limbeck"
    how = f", {run.product.title}{f' with {run.method}' if run.method and run.distilled else ''}" if run.source else ""
    return _page(
        "report",
        title + how,
        _el("h1", title, _el("span.with", how)),
        _el("p.lead", *_summary(run)),
        _el("p.about", run.product.about, f" With {run.method}, {run.idea}." if run.idea else None),
        _tiles(run),
        _scores(run),
        _panels("Samples and progress", [*panels, *curves], "No pictures or curves were recorded for this run."),
        _training(log),
        _cost(run),
        _provenance(report, run.product.verb),
        version=_text(report.get("limbeck")),
    )


def render_comparison(
    title: str,
    intro: str,
    table: Sequence[Mapping[str, str | float | Noted]],
    panels: Sequence[Panel],
    provenance: Mapping[str, Any] | None = None,
) -> str:
    """The page that compares runs: a sortable table with one row per run, then `panels`. Write the result as UTF-8.

    `provenance` holds the blocks `hashes`, `versions`, `machine` and `commit` of a result.

    Columns are the union of the rows' keys, in order of appearance; keys of `METRICS` get their name, the direction of
    improvement and an explanation, and the best value of such a column is marked.
    """
    return _page(
        "comparison",
        title,
        _el("h1", title),
        _el("p.lead", intro),
        _section(
            "Runs", "Click the head of a column to sort by it. The best score of a column is green.", _runs(table)
        ),
        _panels("Pictures and curves", panels, "No pictures or curves were given for this comparison."),
        None if provenance is None else _section("Where the numbers come from", "", *_origin(provenance)),
        version=_text(_mapping((provenance or {}).get("versions")).get("limbeck")),
    )


def history_curves(report: Mapping[str, Any]) -> list[Curve]:
    """One curve per known metric in `report["history"]`, at most four, with the teacher and the floor as lines."""
    run = _Run.read(report)
    history = [row for row in _sequence(report.get("history")) if isinstance(row, Mapping)]
    unit = "images" if any(_number(row.get("images")) is not None for row in history) else "step"
    curves: list[Curve] = []
    for key, metric in METRICS.items():
        scale = 100.0 if metric.percent else 1.0
        points = [
            (x, scale * y)
            for row in history
            if (x := _number(row.get(unit))) is not None
            and (y := _number(_mapping(row.get("metrics")).get(key))) is not None
        ]
        if not points or (metric.echoes and any(metric.echoes == curve.title for curve in curves)):
            continue
        values = [y for _, y in points]
        decades = not metric.percent and min(values) > 0 and max(values) > 20 * min(values)
        levels = {"teacher": run.teacher_scores.score(key), "floor": run.floor.score(key)}
        curves.append(
            Curve(
                title=metric.name,
                caption=f"{metric.meaning} Watched during training on fewer samples than the table's, which the lines "
                "are from.",
                x_label=f"{run.noun}s" if unit == "images" else "training step",
                y_label=AIMS[metric.aim] + (", in %" if metric.percent else ""),
                series={"student": points},
                log_y=decades,
                lines={name: scale * level for name, level in levels.items() if level is not None},
            )
        )
    return curves[:4]


# --- reading a report that may lack anything --------------------------------------------------------------------------


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _sequence(value: object) -> Sequence[Any]:
    return value if isinstance(value, Sequence) and not isinstance(value, str | bytes) else []


def _real(value: object) -> float | None:
    """`value` if it is a real number, else None. nan and inf pass: a score that came out as nan must be seen."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        return None
    try:
        return float(value)
    except OverflowError:  # an int beyond the range of floats
        return None


def _number(value: object) -> float | None:
    """`value` if it is a finite real number, else None."""
    number = _real(value)
    return number if number is not None and math.isfinite(number) else None


def _whole(value: object) -> int | None:
    number = _number(value)
    return None if number is None else round(number)


def _text(value: object) -> str:
    return value if isinstance(value, str) else "" if value is None else str(value)


@dataclass(frozen=True)
class _Side:
    """Scores and cost of the student, of the teacher, or of real data (the floor)."""

    role: str  # the class that carries its colour
    name: str
    calls: int | None
    ms: float | None
    metrics: Mapping[str, float]
    spread: Mapping[str, Any]
    intervals: Mapping[str, Any]
    notes: Sequence[str]
    shares: Sequence[float]

    @classmethod
    def read(cls, role: str, name: str, block: Mapping[str, Any]) -> _Side:
        given = {_text(key): value for key, value in _mapping(block.get("metrics")).items()}
        metrics = {key: number for key, value in given.items() if (number := _real(value)) is not None}
        # the shares of the modes come as a list, or as one metric each
        single = {key: metrics.pop(key) for key in list(metrics) if key.startswith("share_")}
        listed = _sequence(block.get("shares")) or _sequence(given.get("shares")) or list(single.values())
        shares = [share for value in listed if (share := _number(value)) is not None and share >= 0]
        return cls(
            role,
            name,
            _whole(block.get("nfe")),
            _number(block.get("ms_per_image")),
            metrics,
            _mapping(block.get("spread")),
            _mapping(block.get("intervals")),
            [_text(note) for note in _sequence(block.get("notes"))],
            shares if len(shares) == len(listed) else [],
        )

    def score(self, key: str) -> float | None:
        return _number(self.metrics.get(key))


@dataclass(frozen=True)
class _Run:
    """What the page says of a report, None or empty where it is silent."""

    product: Product
    distilled: bool
    source: str  # the teacher's name, or the data's
    method: str
    idea: str
    noun: str  # what a sample of this run is called
    student: _Side
    best: _Side
    teacher_scores: _Side
    floor: _Side
    halves: _Side
    floor_note: str
    floor_samples: int | None
    samples: int | None  # of the scores
    seconds: float | None
    steps: int | None
    images: int | None
    parameters: int | None
    seed: str
    speed: Mapping[str, Any]

    @classmethod
    def read(cls, report: Mapping[str, Any]) -> _Run:
        given = report.get("method")
        name = _text(given.get("name")) if isinstance(given, Mapping) else _text(given)
        method, idea = METHODS.get(name, (name, ""))
        kind = "gan" if name == "gan" else _text(report.get("kind"))
        product = PRODUCTS.get(kind, PRODUCTS["generator"])
        student = _Side.read("student", product.name, _mapping(report.get("student")))
        floor, halves = _mapping(report.get("floor")), _mapping(report.get("halves"))
        best = _mapping(report.get("best"))
        return cls(
            product=product,
            distilled=product.verb == "distill",
            source=_text(report.get("teacher")) or _text(report.get("data")),
            method=method,
            idea=idea,
            noun="sample" if {"log_density", "mode_recall"} & set(student.metrics) else "image",
            student=student,
            best=_Side.read("student", f"Best, step {_text(best.get('step'))}", best),
            teacher_scores=_Side.read("teacher", "Teacher", _mapping(report.get("teacher_scores"))),
            floor=_Side.read("target", "Floor", floor),
            halves=_Side.read("target", f"Halves, {_figure(_whole(halves.get('samples')) or 0)} each", halves),
            floor_note=". ".join(
                f"{name}: {note}"
                for name, block in (("Floor", floor), ("Halves", halves))
                if (note := _text(block.get("note")))
            ),
            floor_samples=_whole(floor.get("samples")),
            samples=_whole(_mapping(_mapping(report.get("recipe")).get("evaluate")).get("samples")),
            seconds=_number(report.get("seconds")),
            steps=_whole(report.get("steps")),
            images=_whole(report.get("images")),
            parameters=_whole(report.get("parameters")),
            seed=_text(report.get("seed")),
            speed=_mapping(report.get("speed")),
        )

    @property
    def sides(self) -> tuple[_Side, ...]:
        return self.student, self.teacher_scores, self.floor

    @property
    def columns(self) -> list[_Side]:
        """The sides of the table of scores: all for a distillation, also those without scores, which shows that.

        An earlier checkpoint, "best", stands beside the last one if the run chose one.
        """
        told = [side for side in self.sides if side.metrics or self.distilled]
        told += [self.halves] if self.halves.metrics else []
        return [told[0], self.best, *told[1:]] if self.best.metrics else told

    @property
    def speed_up(self) -> float | None:
        ours, theirs = self.student.ms, self.teacher_scores.ms
        return theirs / ours if ours and theirs and ours > 0 else None

    @property
    def headline(self) -> str | None:
        """The metric that stands for the others at the top of the page."""
        return next((key for key in HEADLINES if self.student.score(key) is not None), None)


# --- numbers as text --------------------------------------------------------------------------------------------------


def _figure(value: float, digits: int = 3) -> str:
    """`digits` significant digits, whole numbers in full, powers of ten outside 1e-3 ... 1e6; a true minus sign."""
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite" if value > 0 else "−infinite"
    if value == 0:
        return "0"
    if isinstance(value, int) and abs(value) < 10**15:
        return f"{value:,}".replace("-", "−")
    power = math.floor(math.log10(abs(value)))
    if not -3 <= power < 6:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        return f"{mantissa} × 10{_superscript(int(exponent))}".replace("-", "−")
    text = f"{value:,.{max(0, digits - 1 - power)}f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text).replace("-", "−")


def _superscript(power: int) -> str:
    return str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %".replace("-", "−")


def _short(value: float) -> str:
    """For the ticks of an axis, which are round numbers."""
    size = abs(value)
    if size >= 1e9 or 0 < size < 1e-3:
        mantissa, exponent = f"{value:.3e}".split("e")
        mantissa = mantissa.rstrip("0").rstrip(".")
        text = f"10{_superscript(int(exponent))}"
        return (text if mantissa == "1" else f"{mantissa}·{text}").replace("-", "−")
    for unit, letter in ((1e6, "M"), (1e3, "k")):
        if size >= unit and (unit > 1e3 or size >= 1e4):
            return f"{value / unit:.10g}{letter}".replace("-", "−")
    return f"{value:.10g}".replace("-", "−")


def _count(value: float) -> str:
    """A large count in words: 1.54 million."""
    for unit, word in ((1e9, "billion"), (1e6, "million")):
        if abs(value) >= unit:
            return f"{_figure(value / unit)} {word}"
    return _figure(round(value))


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{_figure(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _milliseconds(value: float) -> str:
    return f"{_figure(1000 * value)}\N{NO-BREAK SPACE}µs" if value < 0.01 else f"{_figure(value)}\N{NO-BREAK SPACE}ms"


def _value(metric: Metric | None, value: float) -> str:
    return _percent(value) if metric and metric.percent else _figure(value)


# --- HTML that is escaped by construction -----------------------------------------------------------------------------


class _Html(str):
    """Text that is HTML already. Everything else is escaped when it enters an element."""

    __slots__ = ()


_VOID = frozenset({"img"})


def _escape(text: str) -> str:
    return text if isinstance(text, _Html) else html.escape(text)


def _el(tag: str, *children: str | None, at: Mapping[str, str] | None = None) -> _Html:
    """The element `tag`, written name.class.class, with attributes `at`.

    Attribute values and children that are not `_Html` are escaped; None is left out.
    """
    name, *classes = tag.split(".")
    attributes = ({"class": " ".join(classes)} if classes else {}) | dict(at or {})
    opening = "".join(f' {key}="{_escape(value)}"' for key, value in attributes.items())
    if name in _VOID:
        return _Html(f"<{name}{opening}>")
    return _Html(f"<{name}{opening}>{''.join(_escape(child) for child in children if child is not None)}</{name}>")


def _join(parts: Iterable[str | None], separator: str = "\n") -> _Html:
    return _Html(separator.join(_escape(part) for part in parts if part is not None))


def _json(data: object) -> _Html:
    """JSON for a script element: no character in it can end the element or open a comment."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return _Html(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _page(kind: str, title: str, *body: _Html | None, version: str = "") -> str:
    assets = resources.files("limbeck") / "assets"
    template, style, script = (
        (assets / f"report.{suffix}").read_text(encoding="utf-8") for suffix in ("html", "css", "js")
    )
    # the browser hashes exactly what stands between the tags: a line feed and the script
    digest = base64.b64encode(hashlib.sha256(f"\n{script}".encode()).digest()).decode()
    page = Template(template).substitute(
        title=html.escape(f"{title} · Limbeck"),
        kind=html.escape(kind),
        style=style,
        script=script,
        script_hash=f"sha256-{digest}",
        body=_join(body),
        footer=html.escape(
            f"Made by Limbeck {version}".strip() + ". This file is complete: it loads nothing from elsewhere."
        ),
    )
    return page.encode("utf-8", "replace").decode()  # JSON may carry lone surrogates, which no file can


def _section(title: str, intro: str, *children: str | None) -> _Html:
    return _el("section", _el("h2", title), _el("p.intro", intro) if intro else None, *children)


def _missing(sentence: str) -> _Html:
    return _el("p.missing", sentence)


def _note(sentence: str) -> _Html:
    return _el("p.note", sentence)


# --- axes and drawings ------------------------------------------------------------------------------------------------

BOX = 1000  # side of every drawing's viewBox


@dataclass(frozen=True)
class _Axis:
    """A linear or decimal-logarithmic axis; `low` and `high` are in the plotted coordinate."""

    low: float
    high: float
    log: bool = False

    @classmethod
    def around(cls, values: Sequence[float], log: bool, pad: float, zero: bool = False) -> _Axis:
        """The axis that holds all `values` (positive if `log`) with a margin; from 0 if `zero` and it costs little."""
        plotted = [math.log10(value) for value in values] if log else values
        low, high = min(plotted), max(plotted)
        if high - low <= max(1e-100, 1e-12 * max(abs(low), abs(high))):
            margin = 0.5 if log else abs(low) / 10 if abs(low) > 1e-100 else 1.0
            return cls(low - margin, high + margin, log)
        margin = pad * (high - low)
        from_zero = zero and not log and 0 <= low < high / 3
        return cls(0.0 if from_zero else low - margin, high + margin, log)

    def at(self, value: float) -> float:
        """Position of `value`, 0 ... 1 inside the axis."""
        return ((math.log10(value) if self.log else value) - self.low) / (self.high - self.low)

    def ticks(self, count: int) -> list[float]:
        """About `count` round values inside the axis."""
        if not self.log:
            return _round_values(self.low, self.high, count)
        powers = range(math.ceil(self.low - 1e-9), math.floor(self.high + 1e-9) + 1)
        if len(powers) >= 3:
            return [10.0**power for power in powers[:: math.ceil(len(powers) / count)]]
        steps = (1, 2, 5) if self.high - self.low > 0.6 else ()
        fine = [
            leading * 10.0**power
            for power in range(math.floor(self.low), math.ceil(self.high) + 1)
            for leading in steps
            if self.low <= math.log10(leading * 10.0**power) <= self.high
        ]
        return fine if len(fine) >= 2 else _round_values(10**self.low, 10**self.high, count)


def _round_values(low: float, high: float, count: int) -> list[float]:
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(lead * power for lead in (1, 2, 2.5, 5, 10) if lead * power >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)]


class _Line(NamedTuple):
    name: str
    role: str  # the class that carries the colour
    points: list[tuple[float, float]]
    ghost: bool = False  # drawn faintly behind the others, without legend and read-out


class _Level(NamedTuple):
    """A horizontal reference line."""

    name: str
    role: str
    value: float


def _thin(points: list[tuple[float, float]], limit: int = CURVE_POINTS) -> list[tuple[float, float]]:
    """At most `limit` points that keep every visible spike: the lowest and the highest of each of limit/2 stretches."""
    if len(points) <= limit:
        return points
    heights = np.array([y for _, y in points])
    edges = np.linspace(0, len(points), limit // 2 + 1).astype(int)
    kept: set[int] = set()
    for start, stop in itertools.pairwise(edges):
        kept |= {int(start + heights[start:stop].argmin()), int(start + heights[start:stop].argmax())}
    return [points[index] for index in sorted(kept)]


def _trend(points: list[tuple[float, float]], log: bool) -> list[tuple[float, float]]:
    """Centred running mean over a twentieth of the run, in the plotted coordinate."""
    heights = np.array([y for _, y in points])
    heights = np.log10(heights) if log else heights
    reach = max(1, len(points) // 40)
    total = np.concatenate([[0.0], heights.cumsum()])
    index = np.arange(len(points))
    start, stop = (index - reach).clip(0), (index + reach + 1).clip(max=len(points))
    means = (total[stop] - total[start]) / (stop - start)
    means = 10**means if log else means
    return [(x, float(mean)) for (x, _), mean in zip(points, means, strict=True)]


def _path(points: Iterable[tuple[float, float]], x: _Axis, y: _Axis, dots: bool = False) -> str:
    """Path data in the viewBox; a dot is a line of no length with round ends, which stays round when stretched."""
    # far outside the frame the position does not matter, but huge numbers upset renderers
    places = [(BOX * x.at(a), BOX * min(9.0, max(-8.0, 1 - y.at(b)))) for a, b in points]
    if dots:
        return "".join(f"M{a:.1f} {b:.1f}h0" for a, b in places)
    return "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in places)


def _drawing(*children: str | None) -> _Html:
    return _el(
        "svg", *children, at={"viewBox": f"0 0 {BOX} {BOX}", "preserveAspectRatio": "none", "aria-hidden": "true"}
    )


def _stroke(kind: str, data: str) -> _Html:
    return _el(f"path.{kind}", at={"d": data})


def _chart(
    title: str, lines: Sequence[_Line], levels: Sequence[_Level], x: _Axis, y: _Axis, x_label: str, y_label: str
) -> _Html:
    """The plot of `lines` (not empty) and horizontal `levels`, with legend, ticks and the data for the read-out."""
    named = [line for line in lines if not line.ghost]
    x_ticks, y_ticks = x.ticks(6), y.ticks(5)
    marks = [_stroke("grid", _across(y, tick)) for tick in y_ticks] + [_stroke("axis", f"M0 {BOX}H{BOX}")]
    legend: dict[str, _Html] = {}
    for line in lines:
        kind = f"line.{line.role}"
        marks.append(_stroke(kind + ".ghost" * line.ghost, _path(line.points, x, y)))
        if len(line.points) <= 40 and not line.ghost:
            marks.append(_stroke(f"{kind}.dots", _path(line.points, x, y, dots=True)))
        if not line.ghost and (len(named) > 1 or levels):
            # lines of one role are many paths, "student 1", "student 2", and share an entry
            name = line.name.rstrip(" 0123456789") if line.role in ROLES.values() else line.name
            legend[name] = _el("span", _swatch(kind), name)
    for index, level in enumerate(levels):
        kind = f"level.d{index % 4}.{level.role}"
        marks.append(_stroke(kind, _across(y, level.value)))
        legend[f"level {level.name}"] = _el("span", _swatch(kind), f"{level.name} {_figure(level.value)}")
    labels = [_el("span.tick.y", _short(tick), at={"style": f"bottom:{100 * y.at(tick):.2f}%"}) for tick in y_ticks]
    for index, tick in enumerate(x_ticks):  # a phone has room for every other one
        place = {"style": f"left:{100 * x.at(tick):.2f}%"}
        labels.append(_el("span.tick.x" + ".extra" * (index % 2), _short(tick), at=place))
    data = {
        "x": {"label": x_label, "low": x.low, "high": x.high, "log": x.log},
        "y": {"low": y.low, "high": y.high, "log": y.log},
        "lines": [
            {"name": line.name, "role": line.role, "x": [a for a, _ in line.points], "y": [b for _, b in line.points]}
            for line in named
        ],
    }
    source = _el("script", _json(data), at={"type": "application/json"})
    about = {"tabindex": "0", "role": "img", "aria-label": f"{title}: {y_label or title} over {x_label}"}
    chart = [
        _el("div.y-label", y_label) if y_label else None,
        _el("div.plot", _drawing(*marks), *labels, source, at=about),
        _el("div.x-label", x_label),
    ]
    return _join([_el("div.legend", *legend.values()) if legend else None, _el("div.chart", *chart)])


def _across(y: _Axis, value: float) -> str:
    return f"M0 {BOX * (1 - y.at(value)):.1f}H{BOX}"


def _swatch(kind: str) -> _Html:
    return _el("svg", _stroke(kind, "M0 4H22"), at={"viewBox": "0 0 22 8", "aria-hidden": "true"})


ROLES = {"student": "student", "teacher": "teacher"} | dict.fromkeys(("floor", "target", "data", "real"), "target")


def _roles(names: Iterable[str]) -> dict[str, str]:
    """A colour class per name: student, teacher and data keep theirs ("Student, 1 NFE"), others take the palette."""
    fixed = {name: ROLES.get(re.split(r"[\s,:]", name.lower(), maxsplit=1)[0]) for name in names}
    twins = {"student": "c0", "teacher": "c1"}  # the colours of the palette that look the same
    used = {twins.get(role) for role in fixed.values() if role}
    palette = itertools.cycle([f"c{index}" for index in range(6) if f"c{index}" not in used])
    return {name: role or next(palette) for name, role in fixed.items()}


def _points(rows: object, log_x: bool = False, log_y: bool = False) -> tuple[list[tuple[float, float]], int]:
    """The pairs of numbers that can be drawn, and how many rows cannot."""
    kept, total = [], 0
    for row in _sequence(rows):
        total += 1
        pair = _sequence(row)
        x, y = (_drawable(pair[0], log_x), _drawable(pair[1], log_y)) if len(pair) == 2 else (None, None)
        if x is not None and y is not None:
            kept.append((x, y))
    return kept, total - len(kept)


def _drawable(value: object, log: bool = False) -> float | None:
    """`value` if an axis can show it: finite, its square too, and positive if `log`."""
    number = _number(value)
    return number if number is not None and (1e-100 if log else -1e100) < number < 1e100 else None


def _left_out(count: int, positive: bool = False) -> str:
    why = "not finite, or not positive on a logarithmic axis" if positive else "not finite"
    return f" {_figure(count)} value{' is' if count == 1 else 's are'} not drawn ({why})." if count else ""


# --- panels -----------------------------------------------------------------------------------------------------------


def _panels(title: str, panels: Sequence[Panel], missing: str) -> _Html:
    figures = [_figure_of(panel) for panel in panels]
    return _section(title, "", _el("div.panels", *figures) if figures else _missing(missing))


def _figure_of(panel: Panel) -> _Html:
    if isinstance(panel, Picture):
        return _picture(panel)
    return _scatter(panel) if isinstance(panel, Scatter) else _curve(panel)


def _frame(title: str, caption: str, content: _Html, full: bool = False) -> _Html:
    return _el("figure.card" + ".full" * full, _el("h3", title), _el("figcaption", caption), content)


def _picture(panel: Picture) -> _Html:
    size = _png_size(panel.png)
    if size is None:
        return _frame(panel.title, panel.caption, _missing("This picture was not recorded."))
    width, height = size
    strip, scale = width > 3 * height, max(1, 480 // width)
    image = {
        "src": "data:image/png;base64," + base64.b64encode(panel.png).decode(),
        "width": str(width * scale),
        "height": str(height * scale),
        "alt": panel.title,
    }
    tag = "img" + ".pixels" * (width <= 480) + ".strip" * strip
    return _frame(panel.title, panel.caption, _el("div.shot", _el(tag, at=image)), full=strip)


def _png_size(png: bytes) -> tuple[int, int] | None:
    """Width and height from the header of a PNG, None for anything else."""
    if len(png) < 24 or png[:8] != b"\x89PNG\r\n\x1a\n" or png[12:16] != b"IHDR":
        return None
    width, height = struct.unpack(">II", png[16:24])
    return (width, height) if width and height else None


def _curve(panel: Curve) -> _Html:
    found = {name: _points(rows, panel.log_x, panel.log_y) for name, rows in panel.series.items()}
    roles = _roles([*found, *panel.lines])
    lines = [_Line(name, roles[name], _thin(points)) for name, (points, _) in found.items() if points]
    if not lines:
        return _frame(panel.title, panel.caption, _missing("No values were recorded for this curve."))
    given = {name: _drawable(value, panel.log_y) for name, value in panel.lines.items()}
    levels = [_Level(name, roles[name], value) for name, value in given.items() if value is not None]
    heights = [level.value for level in levels] + [y for line in lines for _, y in line.points]
    x = _Axis.around([x for line in lines for x, _ in line.points], panel.log_x, 0.02)
    y = _Axis.around(heights, panel.log_y, 0.06, zero=True)
    lost = sum(skipped for _, skipped in found.values())
    caption = panel.caption + _left_out(lost, positive=panel.log_x or panel.log_y)
    return _frame(panel.title, caption, _chart(panel.title, lines, levels, x, y, panel.x_label, panel.y_label))


def _scatter(panel: Scatter) -> _Html:
    found = {name: _points(rows) for name, rows in panel.series.items()}
    clouds = {name: points for name, (points, _) in found.items() if points}
    if not clouds:
        return _frame(panel.title, panel.caption, _missing("No samples were recorded for this plot."))
    first = next(iter(found))
    roles = _roles(clouds) | {first: "target"}
    x, y = _square(clouds.get(first) or [point for points in clouds.values() for point in points])
    under = _cloud("target.under", clouds.get(first, []), x, y, CLOUD_POINTS // 2)
    squares = []
    for name, points in clouds.items():
        inside = [(a, b) for a, b in points if 0 <= x.at(a) <= 1 and 0 <= y.at(b) <= 1]
        outside = len(points) - len(inside)
        said = f"{_figure(len(points))} samples" + (f", {_figure(outside)} outside the frame" if outside else "")
        title = _el("h4", _el(f"span.key.{roles[name]}"), name, _el("small", said))
        drawing = _drawing(under if name != first else None, _cloud(roles[name], inside, x, y, CLOUD_POINTS))
        squares.append(_el("div.cloud", title, drawing))
    caption = panel.caption + _left_out(sum(skipped for _, skipped in found.values()))
    return _frame(panel.title, caption, _el("div.clouds", *squares), full=True)


def _square(points: list[tuple[float, float]]) -> tuple[_Axis, _Axis]:
    """Axes of equal scale around `points`, with room at the sides for samples that miss."""
    fitted = [_Axis.around([point[axis] for point in points], False, 0.1) for axis in (0, 1)]
    reach = max(axis.high - axis.low for axis in fitted) / 2
    x, y = (_Axis((axis.low + axis.high) / 2 - reach, (axis.low + axis.high) / 2 + reach) for axis in fitted)
    return x, y


def _cloud(kind: str, points: list[tuple[float, float]], x: _Axis, y: _Axis, limit: int) -> _Html:
    shown = points[:: math.ceil(len(points) / limit)] if points else []
    # dots of one path blend as one shape, however many overlap; eight paths let density show as darkness
    layers = [shown[start::8] for start in range(min(8, len(shown)))]
    return _join([_stroke(kind, _path(layer, x, y, dots=True)) for layer in layers], "")


# --- sections of a run ------------------------------------------------------------------------------------------------


def _summary(run: _Run) -> list[str]:
    """One sentence made from the numbers, in parts."""
    student, teacher = run.student, run.teacher_scores
    if not (run.method or run.source or student.calls is not None or student.metrics):
        return ["Nothing was recorded about this run."]
    steps = f"{'one' if student.calls == 1 else student.calls}-step " if student.calls and run.distilled else ""
    subject = [f"A {steps}{run.product.subject}"]
    subject += [f" {run.product.origin} ", _el("em", run.source)] if run.source else []
    subject += [f" with {run.method}"] if run.method and run.distilled else []
    claims = []
    if student.calls is not None:
        versus = f" where the teacher needs {_figure(teacher.calls)}" if teacher.calls else f" per {run.noun}"
        claims.append(f"needs {_calls(student.calls)}{versus}")
    key = run.headline
    ours, theirs = (student.score(key), teacher.score(key)) if key else (None, None)
    if key and ours and theirs and ours > 0 and theirs > 0:
        claims.append(f"scores {_figure(ours / theirs, 2)}× the teacher's {METRICS[key].name} (lower is better)")
    right = student.score("held_out_accuracy")
    if right is not None:
        claims.append(f"names {_percent(right)} of the samples right that were kept out of its training")
    found = student.score("mode_recall")
    if found is not None:
        claims.append(f"finds {'all' if found == 1 else _percent(found) + ' of'} the target's modes")
    listed = " and ".join(filter(None, [", ".join(claims[:-1]), *claims[-1:]]))
    return [*subject, f": it {listed}." if claims else "."]


def _calls(count: int) -> str:
    return f"{_figure(count)} network call{'' if count == 1 else 's'}"


def _tiles(run: _Run) -> _Html | None:
    student, teacher = run.student, run.teacher_scores
    tiles: list[tuple[str, str, str]] = []
    if student.calls is not None:
        versus = f"the teacher needs {_figure(teacher.calls)}" if teacher.calls is not None else ""
        tiles.append((f"Network calls per {run.noun}", _figure(student.calls), versus))
    if run.speed_up and student.ms and teacher.ms:
        versus = f"{_milliseconds(student.ms)} per {run.noun}, teacher {_milliseconds(teacher.ms)}"
        tiles.append(("Speed against the teacher", f"{_figure(run.speed_up, 2)}×", versus))
    if run.headline:
        metric, score = METRICS[run.headline], student.metrics[run.headline]
        beside = [(side.name.lower(), side.score(run.headline)) for side in (teacher, run.floor)]
        versus = ", ".join(f"{name} {_figure(mark)}" for name, mark in beside if mark is not None)
        tiles.append((f"{metric.name} ({AIMS[metric.aim][2:]})", _figure(score), versus))
    if run.seconds is not None:
        tiles.append(
            ("Training time", _duration(run.seconds), f"{_count(run.images)} {run.noun}s" if run.images else "")
        )
    drawn = [_el("div.tile", _el("dt", name), _el("dd.big", big), _el("dd.small", small)) for name, big, small in tiles]
    return _el("dl.tiles", *drawn) if drawn else None


def _scores(run: _Run) -> _Html:
    recorded = {key for side in run.columns for key in side.metrics}
    # a number that only the floor has, and that has no explanation here, compares with nothing
    extra = sorted(set(run.floor.metrics) - set(METRICS) - set(run.student.metrics) - set(run.teacher_scores.metrics))
    keys = [key for key in METRICS if key in recorded] + sorted(recorded - set(METRICS) - set(extra))
    if not keys:
        return _section("Scores", "", _missing("No scores were recorded for this run."), _shares(run))
    heads = [_el("th", "Metric")]
    for side in run.columns:
        calls = f" · {side.calls} call{'' if side.calls == 1 else 's'}" if side.calls is not None else None
        heads.append(_el("th", _el(f"span.key.{side.role}"), side.name, calls))
    heads += [_el("th", "Versus teacher")] if run.teacher_scores in run.columns else []
    rows = []
    for key in keys:
        metric = METRICS.get(key)
        values = [value for side in run.columns if (value := side.score(key)) is not None]
        full = 1.0 if metric and metric.percent and metric.aim == "higher" else max(values, default=0.0)
        full = 0.0 if min(values, default=0.0) < 0 else full  # bars start at zero, or there are none
        cells = [_score_cell(side, key, metric, full) for side in run.columns]
        cells += [_verdict(run, key, metric)] if run.teacher_scores in run.columns else []
        rows.append(_el("tr", _metric_cell(key, metric), *cells))
    table = _el("table.scores", _el("thead", _el("tr", *heads)), _el("tbody", *rows))
    teacher = "The teacher is the model that was distilled, sampled with all its network calls. "
    floor = "The floor is what real data score: with this many samples, no model can be expected to do better. "
    if run.floor_samples and run.samples and run.floor_samples != run.samples:
        floor = (
            f"The floor is what {_figure(run.floor_samples)} real {run.noun}s score, not as many as the "
            f"{_figure(run.samples)} of the models: distances fall with their number, so it bounds nothing here. "
        )
    halves = "Halves: one random half of the real data against the other. "
    best = (
        "The first column is the last step. Best is the checkpoint that scored best on other noise against one half of "
        "the reference; its distance to the other half, which the choice has not seen, is fd_feature_rest. "
    )
    intro = (best if run.best.metrics else "") + (teacher if run.distilled else "")
    intro += floor if run.floor in run.columns else ""
    intro += halves if run.halves in run.columns else ""
    note = " ".join(filter(None, [run.floor_note, *(f"{key} {_figure(run.floor.metrics[key])}." for key in extra)]))
    missing = dict.fromkeys(note for side in run.columns for note in side.notes)
    spreads = any(side.spread for side in run.columns), any(side.intervals for side in run.columns)
    terms = ("± is the standard deviation over repeated draws.", "a … b is a 95 % bootstrap interval over the samples.")
    return _section(
        "Scores",
        intro,
        _el("div.card.wide", table),
        _note(note) if note else None,
        *(_note(text) for text, shown in zip(terms, spreads, strict=True) if shown),
        *map(_note, missing),
        _shares(run),
    )


def _metric_cell(key: str, metric: Metric | None) -> _Html:
    if metric is None:
        return _el("th", _el("span.name", key))
    return _el("th", _el("span.name", metric.name), _el("span.aim", AIMS[metric.aim]), _el("span.why", metric.about))


def _score_cell(side: _Side, key: str, metric: Metric | None, full: float) -> _Html:
    """The score with its spread, and a bar whose full length is `full` (none if that is 0)."""
    value, number = side.metrics.get(key), side.score(key)
    spread = spread_text(key, side.spread.get(key), side.intervals.get(key))
    gauge = None
    if number is not None and full > 0:
        gauge = _el("span.gauge", _el("i", at={"style": f"width:{min(100.0, 100 * number / full):.1f}%"}))
    shown = "–" if value is None else _value(metric, value)
    parts = [_el("span.value", shown), gauge, _el("span.pm", spread) if spread else None]
    return _el(f"td.{side.role}", *parts, at={"data-label": side.name})


def spread_text(key: str, *found: object) -> str:
    """The spreads and intervals of a score of the metric `key`, in words."""
    return ", ".join(filter(None, (_spread(METRICS.get(key), value) for value in found)))


def _spread(metric: Metric | None, spread: object) -> str:
    """A standard deviation as ±, a pair as an interval."""
    if (number := _number(spread)) is not None:
        return f"± {_percent(number) if metric and metric.percent else _figure(number, 2)}"
    ends = [end for end in map(_number, _sequence(spread)) if end is not None]
    return f"{_value(metric, ends[0])} … {_value(metric, ends[1])}" if len(ends) == 2 else ""


def _verdict(run: _Run, key: str, metric: Metric | None) -> _Html:
    """How the student stands to the teacher: a ratio where both are distances, else a difference."""
    ours, theirs, floor = (side.score(key) for side in run.sides)
    floor = run.halves.score(key) if floor is None else floor
    if metric is None or ours is None or theirs is None or (metric.aim == "floor" and floor is None):
        return _el("td.verdict.void")
    gain = theirs - ours if metric.aim == "lower" else ours - theirs
    if metric.aim == "floor" and floor is not None:
        gain = abs(theirs - floor) - abs(ours - floor)
    sign = "+" if ours > theirs else ""
    if metric.percent:
        said = f"{sign}{100 * (ours - theirs):.1f} points".replace("-", "−")
    elif metric.aim == "lower" and ours > 0 and theirs > 0:
        said = f"{_figure(ours / theirs)}×"
    else:
        said = f"{sign}{_figure(ours - theirs)}"
    kind, word = ("good", "better") if gain > 0 else ("poor", "worse")
    if abs(gain) <= (_number(run.student.spread.get(key)) or 0.0):
        kind, word = "even", "within the spread" if gain else "the same"
    return _el(f"td.verdict.{kind}", _el("b", said), _el("small", word), at={"data-label": "Versus teacher"})


def _shares(run: _Run) -> _Html | None:
    """Bars: which share of the student's samples each mode of the target receives."""
    shares = run.student.shares
    if not shares:
        return None
    reference = next((side for side in (run.floor, run.teacher_scores) if len(side.shares) == len(shares)), None)
    due = reference.shares if reference else []
    top, slot = max([*shares, *due]) or 1.0, BOX / len(shares)
    marks = []
    for index, share in enumerate(shares):
        place = {
            "x": slot * (index + 0.15),
            "y": BOX * (1 - share / top),
            "width": slot * 0.7,
            "height": BOX * share / top,
        }
        marks.append(_el("rect", at={name: f"{value:.1f}" for name, value in place.items()}))
    for index, share in enumerate(due):
        marks.append(_stroke("mark", f"M{slot * (index + 0.05):.1f} {BOX * (1 - share / top):.1f}h{slot * 0.9:.1f}"))
    empty = sum(share == 0 for share in shares)
    caption = (
        f"{empty} of {len(shares)} modes receive{'s' * (empty == 1)} no sample at all."
        if empty
        else "Every mode receives samples."
    )
    caption += " One bar is one mode of the target, its height the share of the student's samples that lie there."
    caption += f" The line at a bar marks the share of the {reference.name.lower()}." if reference else ""
    bars = _el("div.bars", _drawing(*marks))
    return _el("div.panels.under", _frame("Samples per mode", caption, bars, full=True))


def _training(log: Sequence[Mapping[str, Any]]) -> _Html:
    """Small multiples of every player's loss and gradient norm."""
    rows = [row for row in log if isinstance(row, Mapping)]
    unit = "step" if any("step" in row for row in rows) else "images"
    keys = {tuple(key.split("/", 1)) for row in rows for key in row if key.startswith(("loss/", "grad_norm/"))}
    health = health_curves(rows)
    if health:  # methods that can say how they stand have a generator's loss without meaning
        keys -= {("loss", player) for _, player in keys if player.startswith("generator")}
    if not keys:
        return _section("Training", "", _missing("No training log was recorded for this run."))
    order = sorted(keys, key=lambda key: (not key[1].startswith("generator"), key[1], key[0] != "loss"))
    return _section(
        "Training",
        "What the optimiser saw. Faint: the values; bold: the running mean over a twentieth of the run. "
        "A loss is not a measure of quality: judge the model by its scores.",
        _el("div.panels", *(_figure_of(panel) for panel in health)) if health else None,
        _el("div.panels.small", *(_log_figure(quantity, player, rows, unit) for quantity, player in order)),
    )


def health_curves(log: Sequence[Mapping[str, Any]]) -> list[Curve]:
    """How a fake score stands: its gap to the teacher by level, its loss on fresh samples, where its ratio was cut."""
    gaps = sorted({key for row in log for key in row if key.startswith("health/gap/")}, key=lambda key: float(key[11:]))

    def points(key: str) -> list[tuple[float, float]]:
        pairs = [(_number(row.get("images")), _number(row.get(key))) for row in log]
        return [(x, y) for x, y in pairs if x is not None and y is not None]

    curves = []
    if gaps:
        curves.append(
            Curve(
                "Gap between the scores, by noise level",
                "Mean squared distance of the two clean estimates, fake and teacher's, in its natural logarithm. "
                "All lines should sink; one that stays high names the noise level, hence the size of detail, that the "
                "student still gets wrong.",
                "images",
                "ln gap, lower is better",
                {f"sigma {key[11:]}": points(key) for key in gaps},
            )
        )
    if fresh := points("health/fake_loss"):
        curves.append(
            Curve(
                "Fake score's loss on fresh samples",
                "How well the fake score knows samples that it was not trained on. It should sink and stay; a rise "
                "means that the student runs ahead of it: more fake steps, or a smaller step for the generator.",
                "images",
                "denoising loss",
                {"fake": fresh},
            )
        )
    counts = {"clipped logits": points("ratio/clipped_logits"), "limited pulls": points("pull/limited")}
    if any(value for line in counts.values() for _, value in line):
        curves.append(
            Curve(
                "Where the critic's ratio was cut",
                "Samples so far whose logit was out of bounds, or whose third term was limited. Neither is the exact "
                "gradient: lines that go on rising steeply mean that the critic or the fake score lags.",
                "images",
                "samples",
                {name: line for name, line in counts.items() if line},
            )
        )
    return curves


def _log_figure(quantity: str, player: str, rows: Sequence[Mapping[str, Any]], unit: str) -> _Html:
    key, name = f"{quantity}/{player}", "loss" if quantity == "loss" else "gradient norm"
    points, lost = _points([(row.get(unit), row[key]) for row in rows if key in row])
    title = f"{player.capitalize().replace('+', ' and ')}: {name}"
    caption = READINGS.get(key, READINGS[quantity]) + _left_out(lost)
    if not points:
        return _frame(title, caption, _missing("No finite value was recorded."))
    heights = [y for _, y in points]
    log_y = min(heights) > 0 and max(heights) > 30 * min(heights)
    # one spike must not flatten all the rest of a linear plot: its frame holds 99% of the values
    frame = heights if log_y else [float(edge) for edge in np.quantile(heights, [0.005, 0.995])]
    role = "student" if player.split("+")[0] in PRODUCTS else "teacher" if player == "fake" else "c3"
    lines = [_Line(name, role, _thin(points))]
    if len(points) > 60:
        lines = [lines[0]._replace(ghost=True), _Line(f"mean {name}", role, _thin(_trend(points, log_y)))]
    x, y = _Axis.around([x for x, _ in points], False, 0.02), _Axis.around(frame, log_y, 0.08, zero=True)
    return _frame(title, caption, _chart(title, lines, [], x, y, unit, ""))


def _cost(run: _Run) -> _Html:
    noun, rate = run.noun, run.images / run.seconds if run.images and run.seconds else None
    facts = {
        "Training time": None if run.seconds is None else _duration(run.seconds),
        "Training steps": None if run.steps is None else _figure(run.steps),
        f"{noun.capitalize()}s used in training": None if run.images is None else _figure(run.images),
        f"{noun.capitalize()}s per second of training": None if rate is None else _figure(rate),
        "Parameters": None if run.parameters is None else _figure(run.parameters),
        "Seed": run.seed or None,
        f"{run.student.name}, per {noun}": None if run.student.ms is None else _milliseconds(run.student.ms),
        f"Teacher, per {noun}": None if run.teacher_scores.ms is None else _milliseconds(run.teacher_scores.ms),
        "Speed-up": None if run.speed_up is None else f"{_figure(run.speed_up, 2)}×",
    }
    for name, row in run.speed.items():
        many, one = _number(_mapping(row).get("images_per_second")), _number(_mapping(row).get("ms_at_batch_1"))
        if many is not None and one is not None:
            who = _text(name)
            facts[f"{who[:1].upper()}{who[1:]}: {noun}s per second, and one alone"] = (
                f"{_figure(many)}, {_milliseconds(one)}"
            )
    known = [_el("div", _el("dt", name), _el("dd", value)) for name, value in facts.items() if value is not None]
    return _section("Cost", "", _el("dl.facts", *known) if known else _missing("No cost was recorded for this run."))


def _provenance(report: Mapping[str, Any], verb: str) -> _Html:
    recipe = _mapping(report.get("recipe"))
    again = ["Saved as recipe.toml, it runs again with ", _el("code", f"limbeck {verb} recipe.toml --out DIR"), "."]
    source = _el("div.code", _el("pre", _toml(recipe), at={"tabindex": "0"}))
    fold = (
        _fold("Recipe", "every setting, as TOML", _join([_el("p.intro", *again), source]))
        if recipe
        else _missing("No recipe was recorded for this run.")
    )
    return _section("How to repeat it", "", fold, *_origin(report))


def _origin(report: Mapping[str, Any]) -> list[_Html]:
    """Hashes, versions with the commit, and the machine."""
    folds = []
    if commit := _text(report.get("commit")):
        report = {**report, "versions": {**_mapping(report.get("versions")), "commit": commit}}
    for key, about in (("hashes", "of the run's files"), ("versions", "of the software"), ("machine", "where it ran")):
        leaves = [(".".join(path), _text(value)) for path, value in _leaves(_mapping(report.get(key)))]
        rows = [_el("tr", _el("td", name), _el("td", value)) for name, value in leaves]
        missing = _missing(f"No {key} {'was' if key == 'machine' else 'were'} recorded for this run.")
        folds.append(_fold(key.capitalize(), about, _el("table.plain", *rows)) if rows else missing)
    return folds


def _fold(title: str, about: str, content: _Html) -> _Html:
    return _el("details", _el("summary", title, _el("small", about)), _el("div", content))


def _leaves(values: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(path of keys, value) for every value of nested mappings that is not itself one, or is empty."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, (*path, _text(key)))
        else:
            yield (*path, _text(key)), value


def _toml(values: Mapping[str, Any]) -> str:
    """Dotted keys, which are TOML and the options of the command line at once; None, which TOML lacks, as a comment."""
    lines = []
    for path, value in _leaves(values):
        key = ".".join(map(_toml_key, path))
        lines.append(f"# {key} is not set" if value is None else f"{key} = {_toml_value(value)}")
    return "\n".join(lines)


def _toml_key(key: str) -> str:
    bare = key.isascii() and key.replace("-", "").replace("_", "").isalnum()
    return key if bare else _toml_value(key)


def _toml_value(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Mapping):
        pairs = [f"{_toml_key(_text(key))} = {_toml_value(item)}" for key, item in value.items() if item is not None]
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml_value(item) for item in value if item is not None) + "]"
    return json.dumps(_text(value), ensure_ascii=False).replace("\x7f", "\\u007f")


# --- the table of a comparison ----------------------------------------------------------------------------------------


def _runs(table: Sequence[Mapping[str, str | float | Noted]]) -> _Html:
    notes = [{key: value.note for key, value in row.items() if isinstance(value, Noted)} for row in table]
    table = [{key: value.value if isinstance(value, Noted) else value for key, value in row.items()} for row in table]
    columns = list(dict.fromkeys(key for row in table for key in row))
    if not columns:
        return _missing("No runs were given.")
    heads, cells = [], []
    for key in columns:
        metric, values = METRICS.get(key), [row.get(key) for row in table]
        numeric = all(_real(value) is not None for value in values if value not in (None, ""))
        aim = _el("small", AIMS[metric.aim][2:]) if metric else None
        name = _el("button", _el("span", metric.name if metric else COLUMNS.get(key, key)), aim, at={"type": "button"})
        heads.append(_el("th" + ".num" * numeric, name, at={"title": metric.about} if metric else None))
        # the truth does not compete
        rivals = [row.get(key) for row in table if _text(row.get("name")).split(",")[0] not in TRUTHS]
        scores = [score for value in rivals if (score := _number(value)) is not None]
        best = None
        if metric and metric.aim != "floor" and len(scores) > 1:
            best = min(scores) if metric.aim == "lower" else max(scores)
        cells.append(
            [
                _run_cell(value, metric, numeric, best, note.get(key, ""))
                for value, note in zip(values, notes, strict=True)
            ]
        )
    rows = [_el("tr", *row) for row in zip(*cells, strict=True)]
    table_html = _el("table.sortable", _el("thead", _el("tr", *heads)), _el("tbody", *rows))
    known = [METRICS[key] for key in columns if key in METRICS]
    terms = [_el("div", _el("dt", metric.name), _el("dd", f" ({AIMS[metric.aim]}) {metric.about}")) for metric in known]
    return _join([_el("div.card.wide", table_html), _el("dl.glossary", *terms) if terms else None])


def _run_cell(value: object, metric: Metric | None, numeric: bool, best: float | None, note: str = "") -> _Html:
    """A cell; what it is sorted by goes into `data-value`, and nothing if it is missing or not finite."""
    real, number = _real(value), _number(value)
    if value is None or value == "":
        return _el("td" + ".num" * numeric, "–")
    if real is None:
        return _el("td", _text(value), at={"data-value": _text(value)})
    whole = metric is None and number is not None and number.is_integer()
    shown = _figure(int(real)) if whole else _value(metric, real)
    tag = "td" + ".num" * numeric + ".best" * (number is not None and number == best)
    return _el(
        tag, shown, _el("span.pm", note) if note else None, at=None if number is None else {"data-value": repr(number)}
    )
