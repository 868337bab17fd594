"""Runs beside one another: the settings in which they differ, and what came of them."""

from __future__ import annotations

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


def _sorted(collection: Collection) -> list[Run]:
    """The best first; those without the measure last."""
    key = _measure(collection)
    end = collection.sweep.get("direction") or best_end(key or "")
    sign = 1 if end == "lowest" else -1

    def rank(run: Run) -> float:
        value = None if key is None else run.last(key)
        return sign * value if value is not None and is_finite(value) else float("inf")

    return sorted(collection.runs, key=rank)


def set_tables(collection: Collection) -> Iterable[Table]:
    """The settings in which runs differ, and what came of them."""
    runs, measure = _sorted(collection), _measure(collection)
    known = [run for run in runs if run.config]  # nothing is known of the others' settings
    changed = differences([run.config for run in known])
    columns = changed if len(changed) <= COLUMNS else {}
    names = [*columns, *([] if measure is None else [measure]), "status"]
    points = _points(collection)
    rows = []
    for place, run in enumerate(runs):
        cells = [Cell(run.name, link=f"#{anchor(run)}")]
        for values in columns.values():
            value = values[known.index(run)] if run in known else ABSENT
            cells.append(Cell(words.setting(value), numeric=is_finite(value)))
        if measure is not None:
            value, stderr = run.last(measure), run.last(f"{measure}_stderr")
            strong = place == 0 and is_finite(value)
            cells.append(Cell(words.measured(value, stderr), numeric=True, strong=strong))
        rows.append((*cells, Cell(_status(run, points))))
    begun = {run.name for run in runs}
    for point in (name for name in points if name not in begun):
        blank = [Cell(words.NOTHING)] * (len(names) - 1)
        rows.append((Cell(point), *blank, Cell(str(points[point].get("status", "not begun")))))
    yield make_table("Runs" if measure is None else "Runs, the best first", ["run", *names], rows)
    recorded = dict.fromkeys(key for run in runs for key in run.keys if key.startswith("eval/"))
    keys = [key for key in recorded if is_figure(key)][:COLUMNS]
    rows = []
    for run in runs:
        figures = (words.measured(run.last(key), run.last(f"{key}_stderr")) for key in keys)
        name = Cell(run.name, link=f"#{anchor(run)}")
        rows.append((name, *(Cell(text, numeric=True) for text in figures)))
    yield make_table("Held out, at the end", ["run", *map(_title, keys)], rows if keys else [])
    if not columns:
        rows = [(Cell(k), *(Cell(words.setting(v)) for v in row)) for k, row in changed.items()]
        yield make_table("Settings that differ", ["setting", *(run.name for run in known)], rows)


def _points(collection: Collection) -> dict[str, dict[str, Any]]:
    """What sweep.json tells of each point, by name; {} without one."""
    points = collection.sweep.get("points")
    entries = points if isinstance(points, list) else []
    return {str(entry["name"]): entry for entry in entries if "name" in entry}


def _status(run: Run, points: Mapping[str, dict[str, Any]]) -> str:
    """Of a run that did not finish, the sweep knows more: that it failed, or was pruned."""
    told = points.get(run.name, {}).get("status")
    return run.status if run.status == "finished" or told is None else str(told)


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
