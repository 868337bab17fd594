"""Draws the curves of one or more runs, or what a model finds in its context.

    python -m tools.plot --workdir=RUN[,RUN...] --output=F.png [--keys=loss,grad_norm] [--x=tokens]
    python -m tools.plot --needle=RUN/evaluation.json --output=F.png

Each key has a panel: its value in the training steps is a line, its values in evaluations
(eval/NAME/KEY) are points on a dotted one. With a single run the phases are shaded and carry their
context length. With --mean, runs whose configs differ in nothing but the seed become one curve:
their mean, in a band from the lowest to the highest.

With --needle, the tasks of tools.evaluate whose rows have a depth and a length (needle, key_value)
are heat maps of their accuracy.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from llm_jax.errors import UserError, did_you_mean
from tools.cli import run_tool

Records = list[dict[str, float]]

GREY = "#5c6770"
COLORS = ("#1f4e79", "#d1495b", "#2e8b57", "#edae49", "#7b5ea7", GREY, "#3aa6c9", "#9c5a2c",
          "#e58ab5", "#8db600", "#12304a", "#b7a6d6")  # fmt: skip
MARKERS = ("o", "s", "^", "D", "v")
TRAINING = "training"
LEGEND_CHARACTERS = 95  # that fit beside one another
LEGEND_ROW = 0.21  # inches


@dataclasses.dataclass(frozen=True)
class Curve:
    """A key of a run, or of several runs that differ in their seeds.

    run: the name. series: TRAINING, or the name of the evaluation.
    places: float [points], on the horizontal axis. values: float [seeds, points].
    """

    run: str
    series: str
    places: np.ndarray
    values: np.ndarray


def define_flags() -> flags.FlagValues:
    values = flags.FlagValues()
    flags.DEFINE_list("workdir", [], "run directories, separated by commas", flag_values=values)
    flags.DEFINE_string("output", None, "picture to write: .png, .svg or .pdf", flag_values=values)
    flags.DEFINE_string(
        "needle",
        None,
        "JSON of tools.evaluate, whose retrieval over depth and length is drawn",
        flag_values=values,
    )
    flags.DEFINE_list("keys", ["loss"], "keys of metrics.jsonl, a panel each", flag_values=values)
    flags.DEFINE_enum("x", "step", ["step", "tokens"], "horizontal axis", flag_values=values)
    flags.DEFINE_boolean(
        "mean", False, "one curve for runs that differ in their seeds alone", flag_values=values
    )
    return values


def main(values: flags.FlagValues) -> None:
    if bool(values.workdir) == bool(values.needle) or not values.output:
        raise UserError("--output=F.png is needed, and either --workdir=RUN or --needle=F.json.")
    if values.needle:
        from tools.needle_map import plot_needle

        plot_needle(Path(values.needle), values.output)
        print(values.output)
        return
    from llm_jax.metrics import read_metrics_file

    folders = [Path(workdir) for workdir in values.workdir]
    distinct = len({folder.name for folder in folders}) == len(folders)
    names = {folder: folder.name if distinct else str(folder) for folder in folders}
    groups = by_config(folders) if values.mean else [[folder] for folder in folders]
    runs = {
        group_name([names[folder] for folder in group]): [
            read_metrics_file(folder / "metrics.jsonl") for folder in group
        ]
        for group in groups
    }
    plot(runs, values.keys, values.output, x=values.x)
    print(values.output)


def plot(
    runs: Mapping[str, Sequence[Records]],
    keys: Sequence[str],
    output: str | os.PathLike,
    x: str = "step",
) -> None:
    """Writes the picture `output` with a panel for each key.

    Args:
      runs: by name the records of `llm_jax.metrics.read_metrics_file` of one run, or of several,
        which are drawn as their mean over the steps that all of them have.
      keys: what to draw, such as "loss" or "eval/needle/accuracy".
      output: the path; its suffix decides the format.
      x: "step" or "tokens".

    Raises:
      UserError: matplotlib is not installed, a key that no run has, a format that is not known.
    """
    figure = new_figure(8, 3.4 * len(keys))
    panels = figure.subplots(len(keys), 1, squeeze=False, sharex=True)[:, 0]
    curves = {key: list(_curves(runs, key, x)) for key in keys}
    drawn = {curve.series for of_key in curves.values() for curve in of_key}
    series = sorted(drawn, key=lambda name: (name != TRAINING, name))
    for row, (panel, key) in enumerate(zip(panels, keys, strict=True)):
        for curve in curves[key]:
            # One run: a colour for each series. Several: a colour for each run.
            place = series.index(curve.series) if len(runs) == 1 else list(runs).index(curve.run)
            _draw(panel, curve, {**_line(series, curve.series), "color": color(place)})
        if len(runs) == 1:
            _draw_phases(panel, next(iter(runs.values()))[0], x, label=row == 0)
        tidy(panel)
        panel.margins(x=0.01)
        panel.set_xlim(left=0)
        panel.xaxis.set_major_formatter(_short)
        panel.set_ylabel(key.removeprefix("eval/").replace("_", " "))
    panels[-1].set_xlabel("tokens" if x == "tokens" else "step")
    _add_legend(figure, list(runs), series)
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


def tidy(panel: Any) -> None:
    """The look that all panels share."""
    panel.grid(color="#e3e6ea", linewidth=0.7)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


def by_config(folders: Sequence[Path]) -> list[list[Path]]:
    """The runs that differ in nothing but the seed of their configs, together."""
    from llm_jax.json_files import read_json

    groups: dict[str, list[Path]] = {}
    for folder in folders:
        config = read_json(folder / "config.json")
        if config is None:
            raise UserError(f"{folder} is no run: it has no config.json.")
        config.pop("seed", None)
        groups.setdefault(json.dumps(config, sort_keys=True), []).append(folder)
    return list(groups.values())


def group_name(names: Sequence[str]) -> str:
    """grpo_0, grpo_1 and grpo_2 → grpo_{0,1,2}."""
    if len(names) == 1:
        return names[0]
    alike = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    start = "".join(letters[0] for letters in alike)
    return f"{start}{{{','.join(name[len(start) :] for name in names)}}}"


def _curves(runs: Mapping[str, Sequence[Records]], key: str, x: str) -> Iterator[Curve]:
    """
    Raises:
      UserError: no run has the key.
    """
    every = [records for seeds in runs.values() for records in seeds]
    known = {name for records in every for record in records for name in record}
    names = [name for name in known if _is_of(name, key)]
    names.sort(key=lambda name: (name.startswith("eval/"), name))
    if not names:
        raise UserError(f"no run has {key!r}.{did_you_mean(key, known - {'step'})}")
    for run, seeds in runs.items():
        for name in names:
            found = [{r["step"]: r[name] for r in records if name in r} for records in seeds]
            steps = sorted(set.intersection(*map(set, found)))
            if steps:
                values = np.array([[of_seed[step] for step in steps] for of_seed in found], float)
                series = name.split("/")[1] if name.startswith("eval/") else TRAINING
                yield Curve(run, series, _along(seeds[0], steps, x), values)


def _draw(panel: Any, curve: Curve, style: dict[str, Any]) -> None:
    # A marker on the axis is drawn whole.
    panel.plot(curve.places, curve.values.mean(axis=0), clip_on="marker" not in style, **style)
    if len(curve.values) > 1:
        low, high = curve.values.min(axis=0), curve.values.max(axis=0)
        panel.fill_between(curve.places, low, high, color=style["color"], alpha=0.15, linewidth=0)


def color(place: int) -> str:
    """Of the curve at a place among several."""
    return COLORS[place % len(COLORS)]


def _line(series: Sequence[str], name: str) -> dict[str, Any]:
    """Training is a line; every evaluation has points of its own."""
    if name == TRAINING:
        return {"linewidth": 1.4}
    marker = MARKERS[[other for other in series if other != TRAINING].index(name) % len(MARKERS)]
    return {"linewidth": 0.8, "linestyle": ":", "marker": marker, "markersize": 4}


def _add_legend(figure: Any, runs: Sequence[str], series: Sequence[str]) -> None:
    """One for all panels, above them: a line for each run, and one for each series."""
    from matplotlib.lines import Line2D

    several = len(runs) > 1
    lines = [
        Line2D([], [], label=run, color=color(place), linewidth=1.4)
        for place, run in enumerate(runs if several else ())
    ] + [
        Line2D([], [], label=name, color=GREY if several else color(place), **_line(series, name))
        for place, name in enumerate(series if not several or len(series) > 1 else ())
    ]
    if len(lines) > 1:
        longest = max(len(str(line.get_label())) for line in lines)
        columns = max(1, LEGEND_CHARACTERS // (7 + longest))
        rows = math.ceil(len(lines) / columns)
        figure.set_figheight(figure.get_figheight() + LEGEND_ROW * max(0, rows - 2))
        figure.legend(handles=lines, loc="outside upper center", ncols=columns, frameon=False)


def _is_of(name: str, key: str) -> bool:
    parts = name.split("/", 2)
    return name == key or (len(parts) == 3 and parts[0] == "eval" and parts[2] == key)


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
                color=GREY,
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
