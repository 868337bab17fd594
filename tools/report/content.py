"""What a page consists of: words in tables, charts, and a section for each run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from tools.report.charts import Chart
from tools.report.graph import Graph
from tools.report.reading import Run


@dataclasses.dataclass(frozen=True)
class Cell:
    """numeric: aligned by its last digit. strong: the best of its row. link: within the page."""

    text: str
    numeric: bool = False
    strong: bool = False
    link: str | None = None


@dataclasses.dataclass(frozen=True)
class Table:
    caption: str
    head: tuple[Cell, ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclasses.dataclass(frozen=True)
class Section:
    """One run. changes: settings that its parent has otherwise. alone: settings that only one of
    the two has. subtitle: what it is and comes from, or empty. samples: (step, text), the newest
    first."""

    anchor: str
    title: str
    subtitle: str
    status: str
    problems: tuple[str, ...]
    changes: Table | None
    alone: Table | None
    charts: tuple[Chart, ...]
    more_charts: tuple[Chart, ...]
    samples: tuple[tuple[int, str], ...]
    examples: tuple[tuple[str, Table], ...]


@dataclasses.dataclass(frozen=True)
class Page:
    """facts: (name, value) of the whole. tables: above the sections. charts: of all runs."""

    title: str
    kind: str
    facts: tuple[tuple[str, str], ...]
    problems: tuple[str, ...]
    graph: Graph | None
    tables: tuple[Table, ...]
    charts: tuple[Chart, ...]
    sections: tuple[Section, ...]


def make_table(caption: str, names: Sequence[str], rows: Sequence[tuple[Cell, ...]]) -> Table:
    """A name stands above numbers as they do."""
    head = [
        Cell(name, numeric=any(row[place].numeric for row in rows))
        for place, name in enumerate(names)
    ]
    return Table(caption, tuple(head), tuple(rows))


def anchor(run: Run) -> str:
    return "run-" + run.name.replace("/", "-").replace(" ", "_")
