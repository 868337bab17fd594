"""Runs beside one another: the settings in which they differ, and what came of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from llm_jax.config import ABSENT, differences
from llm_jax.measures import best_end, is_figure
from tools.report import words
from tools.report.charts import COLORS, OTHERS, Chart, Series, draw
from tools.report.content import Cell, Table, anchor, make_table
from tools.report.reading import Collection, Run, is_finite
from tools.report.sections import FIRST

# What a sweep is sorted by where it does not say: the first that all of its runs have.
MEASURES = ("eval/validation/loss", "eval/validation/bits_per_byte", "reward", "loss")
COLUMNS = 8  # of a table of settings or measures, at most


def _measure(collection: Collection) -> str | None:
    """What the runs are sorted by."""
    asked = collection.sweep.get("metric")
    if isinstance(asked, str):
        return asked
    begun = [run for run in collection.runs if run.records]
    for key in MEASURES:
        if begun and all(run.last(key) is not None for run in begun):
            return key
    return None


def _entries(collection: Collection) -> list[str]:
    """The names of the points of a sweep, begun or not, and of runs that are in none; the best
    first, those of which nothing was measured last."""
    points = _points(collection)
    others = (run.name for run in collection.runs if run.name.partition("/")[0] not in points)
    key = _measure(collection)
    end = collection.sweep.get("direction") or best_end(key or "")
    sign = 1 if end == "lowest" else -1

    def rank(name: str) -> float:
        value = _measured(collection, name, key)[0]
        return sign * value if value is not None and is_finite(value) else math.inf

    return sorted([*points, *others], key=rank)


def _measured(
    collection: Collection, name: str, key: str | None
) -> tuple[float | None, float | None]:
    """What the entries are sorted by, of one of them, and its standard error."""
    run = _runs(collection).get(name)
    if key is None:
        return None, None
    last = (None, None) if run is None else (run.last(key), run.last(f"{key}_stderr"))
    # Of a recipe the sweep alone knows it, as STAGE/KEY.
    return _points(collection).get(name, {}).get("metrics", {}).get(key, last[0]), last[1]


def _settings(collection: Collection) -> dict[str, dict[str, Any]]:
    """By dotted path, the settings in which entries differ, each by the name of the entry: what a
    sweep sweeps over, or else whatever is not the same in all configs that are known."""
    points, runs = _points(collection), _runs(collection)
    swept = dict.fromkeys(key for point in points.values() for key in point.get("overrides", ()))
    if swept:
        of_entry = {name: run.settings for name, run in runs.items()}
        of_entry |= {
            name: {**of_entry.get(name, {}), **point.get("overrides", {})}
            for name, point in points.items()
        }
        return {key: {n: own[key] for n, own in of_entry.items() if key in own} for key in swept}
    known = {name: run.config for name, run in runs.items() if run.config}
    changed = differences(list(known.values()))
    return {key: dict(zip(known, values, strict=True)) for key, values in changed.items()}


def entries_table(collection: Collection) -> Table:
    """Every point of a sweep, or every run, with the settings in which they differ and what came of
    it; the best is strong."""
    points, runs, measure = _points(collection), _runs(collection), _measure(collection)
    settings, entries = _settings(collection), _entries(collection)
    columns = settings if len(settings) <= COLUMNS else {}
    if points:
        best = [name for name, point in points.items() if point.get("best")]
    else:
        best = [n for n in entries[:1] if is_finite(_measured(collection, n, measure)[0])]
    rows = []
    for name in entries:
        cells = [Cell(name, link=f"#{anchor(runs[name])}" if name in runs else None)]
        for values in columns.values():
            value = values.get(name, ABSENT)
            cells.append(Cell(words.setting(value), numeric=is_finite(value)))
        if measure is not None:
            text = words.measured(*_measured(collection, name, measure))
            cells.append(Cell(text, numeric=True, strong=name in best))
        rows.append((*cells, Cell(_status(runs.get(name), points.get(name, {})))))
    kind = "Points" if points else "Runs"
    caption = kind if measure is None else f"{kind}, the best first"
    names = ["point" if points else "run", *columns, *([] if measure is None else [measure])]
    return make_table(caption, [*names, "status"], rows)


def set_tables(collection: Collection) -> Iterable[Table]:
    """What runs measured while they trained, and the settings in which they differ if these are too
    many for one table."""
    runs = _sorted(collection)
    recorded = dict.fromkeys(key for run in runs for key in run.keys if key.startswith("eval/"))
    keys = [key for key in recorded if is_figure(key)][:COLUMNS]
    rows = []
    for run in runs:
        figures = (words.measured(run.last(key), run.last(f"{key}_stderr")) for key in keys)
        name = Cell(run.name, link=f"#{anchor(run)}")
        rows.append((name, *(Cell(text, numeric=True) for text in figures)))
    yield make_table("Held out, at the end", ["run", *map(_title, keys)], rows if keys else [])
    settings = _settings(collection)
    if len(settings) > COLUMNS:
        names = [run.name for run in runs if run.config]
        rows = [
            (Cell(key), *(Cell(words.setting(values.get(name, ABSENT))) for name in names))
            for key, values in settings.items()
        ]
        yield make_table("Settings that differ", ["setting", *names], rows)


def _sorted(collection: Collection) -> list[Run]:
    """The runs that are entries."""
    runs = _runs(collection)
    return [runs[name] for name in _entries(collection) if name in runs]


def _runs(collection: Collection) -> dict[str, Run]:
    return {run.name: run for run in collection.runs}


def _points(collection: Collection) -> dict[str, dict[str, Any]]:
    """What sweep.json tells of each point, by name; {} without one."""
    points = collection.sweep.get("points")
    entries = points if isinstance(points, list) else []
    return {str(entry["name"]): entry for entry in entries if "name" in entry}


def _status(run: Run | None, point: Mapping[str, Any]) -> str:
    """Of a run that did not finish, the sweep knows more: that it failed, or was pruned."""
    if run is not None and (run.status == "finished" or "status" not in point):
        return run.status
    return str(point.get("status", "not begun"))


def _title(key: str) -> str:
    """eval/validation/bits_per_byte → validation bits per byte."""
    return key.removeprefix("eval/").replace("/", " ", 1).replace("_", " ")


def set_charts(collection: Collection) -> Iterable[Chart]:
    """A chart for each of the first keys, with a curve for each run: the best have colours."""
    runs = _sorted(collection)
    keys = dict.fromkeys(key for run in runs for key in run.keys if is_figure(key))
    wanted = [key for key in keys if key.removeprefix("eval/").split("/", 1)[-1] in FIRST]
    for key in sorted(wanted, key=lambda key: (not key.startswith("eval/"), list(keys).index(key))):
        series = []
        for place, run in enumerate(runs):
            named = place < COLORS
            color = place + 1 if named else OTHERS
            points = run.series(key)
            if points:
                name = run.name if named else ""
                series.append(Series(name, points, color, key.startswith("eval/")))
        chart = draw(_title(key), series)
        if chart is not None:
            yield chart
