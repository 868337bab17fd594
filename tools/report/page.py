"""What the page of a collection shows; templates lay it out."""

from __future__ import annotations

from tools.report import words
from tools.report.content import Page, anchor
from tools.report.graph import Edge, Graph, Node, lay_out
from tools.report.reading import Collection
from tools.report.sections import make_section
from tools.report.sets import entries_table, set_charts, set_tables
from tools.report.tables import (
    cost_table,
    evaluation_table,
    facts,
    held_out_table,
    yardstick_table,
)


def make_page(collection: Collection, price_per_device_hour: float | None = None) -> Page:
    """
    Args:
      price_per_device_hour: in any currency; None: costs are not shown.
    """
    runs, price = collection.runs, price_per_device_hour
    is_sweep = collection.kind == "sweep"
    tables = [
        entries_table(collection) if is_sweep or collection.sweep else None,
        *(set_tables(collection) if is_sweep else ()),
        evaluation_table(runs),
        yardstick_table(collection.measured),
        cost_table(runs, price),
        None if is_sweep else held_out_table(runs),
    ]
    return Page(
        title=collection.path.resolve().name,
        kind=_kind(collection),
        facts=tuple(facts(runs, price)),
        problems=collection.problems,
        graph=None if is_sweep else _graph(collection),
        tables=tuple(table for table in tables if table is not None and table.rows),
        charts=tuple(set_charts(collection)) if is_sweep else (),
        sections=tuple(
            make_section(
                run, None if is_sweep else collection.parent(run), with_charts=not is_sweep
            )
            for run in runs
        ),
    )


def _kind(collection: Collection) -> str:
    count = len(collection.runs)
    if collection.kind == "run":
        return f"one {collection.runs[0].stage} run"
    return f"a chain of {count} stages" if collection.kind == "chain" else f"a set of {count} runs"


def _graph(collection: Collection) -> Graph:
    nodes = {
        name: Node(name.rsplit("/", 1)[-1], ("not in this folder",), None, "outside")
        for name in collection.outside
    }
    for run in collection.runs:
        figures = f"{run.step:,} steps, {words.count(run.tokens)} tokens"
        words_of = [run.stage] if run.stage != run.name else []
        words_of += [run.status] if run.status != "finished" else []
        lines = (", ".join(words_of), figures) if words_of else (figures,)
        nodes[run.name] = Node(run.name, lines, f"#{anchor(run)}", run.status)
    order = list(nodes)
    edges = [
        Edge(
            link.parent,
            link.child,
            (f"@{link.step}" if link.step is not None else "") if link.kind == "parent" else "uses",
            dashed=link.kind != "parent",
        )
        for link in collection.links
        if link.parent in nodes and order.index(link.parent) < order.index(link.child)
    ]
    return lay_out(nodes, edges)
