"""The geometry of curves: what a template draws as inline SVG.

A chart is as wide as a column of the page is on a telephone, so that its letters have one size
everywhere; a wide page sets charts side by side.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

from tools.report.words import minus, number, short

WIDTH, HEIGHT = 360.0, 220.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 10.0, 10.0, 34.0
COLORS = 8  # that the style sheet has
POINTS = 300  # of a curve; more would lie closer than pixels
OTHERS = 0  # the colour of curves without a name

Point = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Series:
    """What is to be drawn: values by step, NaN where one was not finite.

    color: 1 to COLORS, or OTHERS. marked: whether each value is a point, as of evaluations.
    """

    name: str
    points: Sequence[Point]
    color: int
    marked: bool = False


@dataclasses.dataclass(frozen=True)
class Curve:
    """A drawn series. path: of SVG. marks: x, y and words of each point that is marked.

    first, last: values in words.
    """

    name: str
    color: int
    path: str
    marks: tuple[tuple[str, str, str], ...]
    marked: bool
    first: str
    last: str


@dataclasses.dataclass(frozen=True)
class Tick:
    place: str
    text: str


@dataclasses.dataclass(frozen=True)
class Chart:
    """title: what is drawn. summary: the chart in words. x_ticks, y_ticks: places and texts."""

    title: str
    summary: str
    curves: tuple[Curve, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    width: float = WIDTH
    height: float = HEIGHT
    left: float = LEFT
    right: float = WIDTH - RIGHT
    top: float = TOP
    bottom: float = HEIGHT - BOTTOM


def draw(title: str, series: Sequence[Series]) -> Chart | None:
    """A chart of some series over steps; None where nothing is finite."""
    finite = [p for one in series for p in one.points if math.isfinite(p[1])]
    if not finite:
        return None
    # From step 0 on, unless the record begins late.
    last_step = max(x for x, _ in finite)
    first_step = min(x for x, _ in finite)
    x_low = 0.0 if first_step < last_step / 2 or first_step == last_step else first_step
    x_places = ticks(x_low, last_step, 5)
    y_places = ticks(min(y for _, y in finite), max(y for _, y in finite), 5)
    y_low = min(y_places[0], min(y for _, y in finite))
    y_high = max(y_places[-1], max(y for _, y in finite))
    if y_low == y_high:  # in the middle
        y_low, y_high = y_low - 1, y_high + 1

    def across(x: float) -> float:
        return LEFT + (x - x_low) / ((last_step - x_low) or 1) * (WIDTH - LEFT - RIGHT)

    def down(y: float) -> float:
        return TOP + (y_high - y) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    curves = []
    for one in series:
        values = [p for p in one.points if math.isfinite(p[1])]
        if not values:
            continue
        placed = [(across(x), down(y)) for x, y in thinned(one.points)]
        marks = tuple(
            (f"{across(x):.1f}", f"{down(y):.1f}", f"{one.name}, step {x:,.0f}: {number(y)}")
            for x, y in (values if one.marked else values[:1] if len(values) == 1 else [])
        )
        first, last = number(values[0][1]), number(values[-1][1])
        curves.append(Curve(one.name, one.color, _path(placed), marks, one.marked, first, last))
    told = "; ".join(f"{c.name} from {c.first} to {c.last}" for c in curves if c.name)
    return Chart(
        title=title,
        summary=f"{title} over {last_step:,.0f} steps: {told}",
        curves=tuple(curves),
        x_ticks=tuple(Tick(f"{across(x):.1f}", short(x)) for x in x_places),
        y_ticks=tuple(Tick(f"{down(y):.1f}", _tick_text(y, y_places)) for y in y_places),
    )


def ticks(low: float, high: float, count: int) -> list[float]:
    """At most `count` + 1 round numbers that span [low, high], 1, 2 or 5 times a power of ten
    apart; the outermost may lie inside the range by less than one such distance."""
    if high <= low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    distance = next(power * m for m in (1, 2, 5, 10) if power * m >= raw * (1 - 1e-9))
    first, last = math.ceil(low / distance - 1e-9), math.floor(high / distance + 1e-9)
    return [i * distance for i in range(first, last + 1)] or [low, high]


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most about POINTS of the points: of each stretch the lowest and the highest, so that a
    spike stays; and all NaNs, which break the line."""
    if len(points) <= POINTS:
        return list(points)
    size = math.ceil(2 * len(points) / POINTS)
    kept = []
    for begin in range(0, len(points), size):
        part = points[begin : begin + size]
        finite = [p for p in part if math.isfinite(p[1])]
        broken = [p for p in part if not math.isfinite(p[1])]
        ends = [min(finite, key=_value), max(finite, key=_value)] if finite else []
        kept += sorted({*ends, *broken[:1]}, key=lambda p: p[0])
    return kept


def _tick_text(value: float, places: Sequence[float]) -> str:
    """With as many decimals as the distance between the places needs."""
    distance = places[1] - places[0] if len(places) > 1 else value or 1.0
    largest = max(abs(place) for place in places)
    if largest >= 1e3 or (largest and largest < 1e-2):
        return short(value) if largest >= 1e3 else number(value)
    decimals = max(0, -math.floor(math.log10(abs(distance)) + 1e-9))
    return minus(f"{value:.{decimals}f}")


def _path(points: Sequence[Point]) -> str:
    """Lines between the points; one that is not finite ends a line."""
    parts = []
    for is_finite, run in itertools.groupby(points, key=lambda p: math.isfinite(p[1])):
        if is_finite:
            parts.append("M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in run))
    return "".join(parts)


def _value(point: Point) -> float:
    return point[1]
