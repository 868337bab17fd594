"""Draws the curves of one or more runs.

    python -m tools.plot --workdir=RUN[,RUN...] --output=F.png [--keys=loss,grad_norm] [--x=tokens]

Each key has a panel: its value in the training steps is a line, its values in evaluations
(eval/NAME/KEY) are points. With a single run the phases are shaded and carry their context length.
"""

from __future__ import annotations

import itertools
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from llm_jax.errors import UserError, did_you_mean
from tools.cli import run_tool

Records = list[dict[str, float]]

COLORS = ("#1f4e79", "#d1495b", "#2e8b57", "#edae49", "#7b5ea7", "#5c6770")


def define_flags() -> flags.FlagValues:
    values = flags.FlagValues()
    flags.DEFINE_list("workdir", [], "run directories, separated by commas", flag_values=values)
    flags.DEFINE_string("output", None, "picture to write: .png, .svg or .pdf", flag_values=values)
    flags.DEFINE_list("keys", ["loss"], "keys of metrics.jsonl, a panel each", flag_values=values)
    flags.DEFINE_enum("x", "step", ["step", "tokens"], "horizontal axis", flag_values=values)
    return values


def main(values: flags.FlagValues) -> None:
    if not values.workdir or not values.output:
        raise UserError("--workdir=RUN and --output=F.png are both needed.")
    from llm_jax.metrics import read_metrics_file

    folders = [Path(workdir) for workdir in values.workdir]
    distinct = len({folder.name for folder in folders}) == len(folders)
    runs = {
        folder.name if distinct else str(folder): read_metrics_file(folder / "metrics.jsonl")
        for folder in folders
    }
    plot(runs, values.keys, values.output, x=values.x)
    print(values.output)


def plot(
    runs: dict[str, Records], keys: Sequence[str], output: str | os.PathLike, x: str = "step"
) -> None:
    """Writes the picture `output` with a panel for each key.

    Args:
      runs: records of `llm_jax.metrics.read_metrics_file` by the name of the run.
      keys: what to draw, such as "loss" or "eval/needle/accuracy".
      output: the path; its suffix decides the format.
      x: "step" or "tokens".

    Raises:
      UserError: matplotlib is not installed, a key that no run has, a format that is not known.
    """
    figure = new_figure(8, 3.4 * len(keys))
    panels = figure.subplots(len(keys), 1, squeeze=False, sharex=True)[:, 0]
    for row, (panel, key) in enumerate(zip(panels, keys, strict=True)):
        _draw_key(panel, runs, key, x)
        if len(runs) == 1:
            _draw_phases(panel, next(iter(runs.values())), x, label=row == 0)
        panel.set_ylabel(key.removeprefix("eval/").replace("_", " "))
    panels[-1].set_xlabel("tokens" if x == "tokens" else "step")
    save_figure(figure, output)


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure, in inches.

    Raises:
      UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("plots need matplotlib: pip install 'llm_jax[plot]'.") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, output: str | os.PathLike) -> None:
    """Writes a figure; the suffix of the path decides the format.

    Raises:
      UserError: a format that is not known, or a path that cannot be written.
    """
    suffix = Path(output).suffix.lstrip(".")
    formats = figure.canvas.get_supported_filetypes()
    if suffix not in formats:
        raise UserError(f"--output={output} has no known format.{did_you_mean(suffix, formats)}")
    try:
        figure.savefig(output, dpi=160)
    except OSError as error:
        raise UserError(f"--output={output} cannot be written: {error.strerror}.") from error


def _draw_key(panel: Any, runs: dict[str, Records], key: str, x: str) -> None:
    found = False
    for index, (run, records) in enumerate(runs.items()):
        names = {name for record in records for name in record if _is_of(name, key)}
        training_first = sorted(names, key=lambda name: (name.startswith("eval/"), name))
        for place, name in enumerate(training_first):
            # One run: a colour for each series. Several: a colour for each run.
            color = COLORS[(index if len(runs) > 1 else place) % len(COLORS)]
            label = name.split("/")[1] if name.startswith("eval/") else "training"
            points = name.startswith("eval/")
            panel.plot(
                *_series(records, name, x),
                color=color,
                label=label if len(runs) == 1 else f"{run}, {label}",
                linewidth=0.8 if points else 1.4,
                linestyle=":" if points else "-",
                marker="o" if points else None,
                markersize=4,
            )
            found = True
    if not found:
        known = {name for records in runs.values() for record in records for name in record}
        raise UserError(f"no run has {key!r}.{did_you_mean(key, known - {'step'})}")
    tidy(panel)
    panel.margins(x=0.01)
    panel.set_xlim(left=0)
    panel.xaxis.set_major_formatter(_short)
    if len(panel.lines) > 1:
        panel.legend(frameon=False)


def tidy(panel: Any) -> None:
    """The look that all panels share."""
    panel.grid(color="#e3e6ea", linewidth=0.7)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


def _is_of(name: str, key: str) -> bool:
    parts = name.split("/", 2)
    return name == key or (len(parts) == 3 and parts[0] == "eval" and parts[2] == key)


def _series(records: Records, name: str, x: str) -> tuple[np.ndarray, np.ndarray]:
    own = [record for record in records if name in record]
    return _along(records, [record["step"] for record in own], x), np.array(
        [record[name] for record in own]
    )


def _along(records: Records, steps: Sequence[float], x: str) -> np.ndarray:
    """Places of steps on the horizontal axis; only training steps know their tokens."""
    if x == "step":
        return np.asarray(steps, float)
    known = [record for record in records if "tokens" in record]
    if not known:
        raise UserError("no record has tokens: use --x=step.")
    return np.interp(
        steps, [0.0, *(r["step"] for r in known)], [0.0, *(r["tokens"] for r in known)]
    )


def _draw_phases(panel: Any, records: Records, x: str, label: bool) -> None:
    """Shades every other phase, and writes the context lengths above the panel."""
    steps = [record for record in records if "phase" in record and "length" in record]
    if not steps:
        return
    starts = [(0.0, steps[0]["length"])]
    for before, after in itertools.pairwise(steps):
        if before["phase"] != after["phase"]:
            starts.append((before["step"], after["length"]))
    ends = [start for start, _ in starts[1:]] + [steps[-1]["step"]]
    for index, ((start, length), end) in enumerate(zip(starts, ends, strict=True)):
        left, right = _along(records, [start, end], x)
        if index % 2:
            panel.axvspan(left, right, color="#1f4e79", alpha=0.07, linewidth=0)
        if label:
            panel.text(
                (left + right) / 2,
                1.02,
                f"length {_short(length)}" if len(starts) < 4 or not index else _short(length),
                transform=panel.get_xaxis_transform(),
                horizontalalignment="center",
                fontsize=9,
                color="#5c6770",
            )


def _short(value: float, _: Any = None) -> str:
    """1500 → 1.5k, 2_000_000 → 2M; powers of two from 1024 on as 8K."""
    if value >= 1024 and math.log2(value).is_integer():
        return f"{value / 1024:g}K" if value < 2**20 else f"{value / 2**20:g}M"
    for size, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{suffix}"
    return f"{value:g}"


if __name__ == "__main__":
    sys.exit(run_tool(main, define_flags(), __doc__))
