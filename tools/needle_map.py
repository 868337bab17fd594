"""The heat map of what a model finds in its context: a cell for each depth and length."""

from __future__ import annotations

import collections
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_jax.errors import UserError
from tools.evaluate import read_record
from tools.plot import new_figure, save_figure

COLORS = "RdYlGn"
_CELL = 0.62  # inches


def plot_needle(file: Path, output: str | os.PathLike) -> None:
    """Draws every task of a record of tools.evaluate whose rows have a depth and a length.

    Raises:
      UserError: no such record, none of its tasks has such rows; and as `save_figure` says.
    """
    record = read_record(file)
    if record is None:
        raise UserError(f"--needle={file} is not there: make it by tools.evaluate.")
    grids = {label: grid for label, entry in record["tasks"].items() if (grid := accuracies(entry))}
    if not grids:
        raise UserError(
            f"{file} has no task over depth and length: evaluate one first, such as --tasks=needle."
        )
    rows = max(len({depth for depth, _ in grid}) for grid in grids.values())
    columns = max(len({length for _, length in grid}) for grid in grids.values())
    width = max(4.5, 1.6 + 1.2 * _CELL * columns)
    figure = new_figure(width * len(grids) + 0.6, 1.5 + _CELL * rows)
    panels = figure.subplots(1, len(grids), squeeze=False)[0]
    for panel, (label, grid) in zip(panels, grids.items(), strict=True):
        image = _draw(panel, grid)
        panel.set_title(label.replace("_", " "), fontsize=11)
        panel.set_xlabel("context length (tokens)")
    panels[0].set_ylabel("depth (0 = start of the context)")
    figure.colorbar(image, ax=list(panels), label="accuracy", fraction=0.05)
    figure.suptitle(f"{Path(record['run']).name}, checkpoint {record['step']:,}", fontsize=11)
    save_figure(figure, output)


def accuracies(entry: Mapping[str, Any]) -> dict[tuple[float, int], float]:
    """The share of right rows by (depth, length); empty for a task without such rows."""
    cells = collections.defaultdict(list)
    for row in entry.get("examples", ()):
        if {"depth", "length", "correct"} <= row.keys():
            cells[row["depth"], row["length"]].append(row["correct"])
    return {cell: sum(rows) / len(rows) for cell, rows in sorted(cells.items())}


def _draw(panel: Any, grid: Mapping[tuple[float, int], float]) -> Any:
    depths = sorted({depth for depth, _ in grid})
    lengths = sorted({length for _, length in grid})
    values = [[grid.get((depth, length), float("nan")) for length in lengths] for depth in depths]
    image = panel.imshow(values, cmap=COLORS, vmin=0, vmax=1, aspect="auto")
    panel.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    panel.set_yticks(range(len(depths)), [f"{depth:.2f}" for depth in depths])
    panel.spines[:].set_visible(False)
    panel.tick_params(length=0)
    _draw_borders(panel, len(depths), len(lengths))
    for (depth, length), value in grid.items():
        panel.text(
            lengths.index(length),
            depths.index(depth),
            f"{value:.2f}",
            horizontalalignment="center",
            verticalalignment="center",
            fontsize=9,
            color="white" if value < 0.15 or value > 0.85 else "black",
        )
    return image


def _draw_borders(panel: Any, rows: int, columns: int) -> None:
    """White lines between the cells."""
    panel.set_xticks([x - 0.5 for x in range(1, columns)], minor=True)
    panel.set_yticks([y - 0.5 for y in range(1, rows)], minor=True)
    panel.grid(which="minor", color="white", linewidth=1.5)
    panel.tick_params(which="minor", length=0)
