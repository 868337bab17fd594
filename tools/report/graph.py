"""The geometry of a lineage: stages from left to right, and what each comes from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

BOX_WIDTH, BOX_HEIGHT, GAP_X, GAP_Y, MARGIN = 178.0, 62.0, 62.0, 22.0, 6.0
HEAD = 7.0  # of an arrow


@dataclasses.dataclass(frozen=True)
class Node:
    """A stage. name: its title. lines: what stands below it. link: of the page, None without."""

    name: str
    lines: tuple[str, ...]
    link: str | None
    status: str


@dataclasses.dataclass(frozen=True)
class Box:
    node: Node
    x: float
    y: float
    width: float = BOX_WIDTH
    height: float = BOX_HEIGHT


@dataclasses.dataclass(frozen=True)
class Arrow:
    """path: of SVG. text: beside it, at x and y. dashed: it is no inheritance of weights."""

    path: str
    text: str
    x: float
    y: float
    dashed: bool


@dataclasses.dataclass(frozen=True)
class Graph:
    width: float
    height: float
    boxes: tuple[Box, ...]
    arrows: tuple[Arrow, ...]
    summary: str


@dataclasses.dataclass(frozen=True)
class Edge:
    """From a node to one that comes from it. text: written beside it. dashed: it inherits no
    weights."""

    parent: str
    child: str
    text: str = ""
    dashed: bool = False


def lay_out(nodes: Mapping[str, Node], edges: Sequence[Edge]) -> Graph:
    """Every node stands to the right of those that it comes from.

    Args:
      nodes: by name, parents before children.
      edges: between them.
    """
    places: dict[str, tuple[int, int]] = {}  # column and row
    taken: set[tuple[int, int]] = set()
    for name in nodes:
        parents = sorted((e for e in edges if e.child == name), key=lambda edge: edge.dashed)
        column = max((places[edge.parent][0] + 1 for edge in parents), default=0)
        # On the row of its parent, or the next one on which nothing stands between them.
        before, row = places[parents[0].parent] if parents else (-1, 0)
        while taken & {(between, row) for between in range(before + 1, column + 1)}:
            row += 1
        taken |= {(between, row) for between in range(before + 1, column + 1)}
        places[name] = column, row
    boxes = {
        name: Box(
            nodes[name],
            MARGIN + column * (BOX_WIDTH + GAP_X),
            MARGIN + row * (BOX_HEIGHT + GAP_Y),
        )
        for name, (column, row) in places.items()
    }
    told = [f"{edge.child} comes from {edge.parent}" for edge in edges if not edge.dashed]
    return Graph(
        width=max(box.x for box in boxes.values()) + BOX_WIDTH + MARGIN,
        height=max(box.y for box in boxes.values()) + BOX_HEIGHT + MARGIN,
        boxes=tuple(boxes.values()),
        arrows=tuple(_arrow(edge, boxes[edge.parent], boxes[edge.child]) for edge in edges),
        summary="; ".join(told) or "one stage",
    )


def _arrow(edge: Edge, begin: Box, end: Box) -> Arrow:
    """It changes its row in the gap beside the box that it leaves, or, dashed, before the other."""
    x0, y0 = begin.x + BOX_WIDTH, begin.y + BOX_HEIGHT / 2
    x1, y1 = end.x - HEAD, end.y + BOX_HEIGHT / 2
    turn = end.x - GAP_X if edge.dashed else x0
    middle = turn + GAP_X / 2
    curve = f"C{middle:g},{y0:g} {middle:g},{y1:g} {min(turn + GAP_X, x1):g},{y1:g}"
    return Arrow(
        path=f"M{x0:g},{y0:g}L{turn:g},{y0:g}{curve}L{x1:g},{y1:g}",
        text=edge.text,
        x=end.x - GAP_X / 2,
        y=y1 + 16 if y1 > y0 else y1 - 7,
        dashed=edge.dashed,
    )
