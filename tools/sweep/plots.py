"""Plots of a sweep: the metric against each key, and the curves of all points."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llm_jax.measures import Direction
from llm_jax.metrics import read_metrics_file
from llm_jax.sweep import SEED, Overrides, Sweep
from tools import plot
from tools.sweep.outcome import FINISHED, Group, Outcome, group_seeds


@dataclasses.dataclass(frozen=True)
class Axis:
    """keys: those that change together (by zip), the first of which names the axis. values: of that
    one, in their order, numbers sorted."""

    keys: tuple[str, ...]
    values: tuple[Any, ...]

    @property
    def numeric(self) -> bool:
        return all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in self.values)

    @property
    def logarithmic(self) -> bool:
        """Whether the values are nearer to a geometric progression than to an arithmetic one."""
        if not self.numeric or len(self.values) < 3 or min(self.values) <= 0:
            return False
        values = np.array(self.values, float)
        return _unevenness(np.log(values)) < _unevenness(values)


def draw_metric(
    sweep: Sweep, outcomes: Sequence[Outcome], direction: Direction, output: Path
) -> None:
    """Writes a picture with a panel for each key: the metric over its values, a line for each
    setting of the others, standard errors over seeds as bars, the best one ringed.

    Raises:
      UserError: matplotlib is not installed.
    """
    groups = [g for g in group_seeds(outcomes, sweep.metric, direction) if g.mean is not None]
    every = find_axes([outcome.point.overrides for outcome in outcomes])
    figure = plot.new_figure(5.2 * len(every), 4.2)
    panels = figure.subplots(1, len(every), squeeze=False, sharey=True)[0]
    for panel, axis in zip(panels, every, strict=True):
        others = [other for other in every if other is not axis]
        _draw_panel(panel, axis, others, groups)
    panels[0].set_ylabel(sweep.metric.removeprefix("eval/").replace("_", " "))
    plot.save_figure(figure, output)


def draw_curves(outcomes: Sequence[Outcome], workdir: Path, metric: str, output: Path) -> None:
    """Writes the training curves of all finished points, by `tools.plot`."""
    done = [o for o in outcomes if o.status == FINISHED and not o.point.stages]
    axes = find_axes([outcome.point.overrides for outcome in outcomes])
    keys = [*(axis.keys[0] for axis in axes), SEED]
    runs = {
        _label(keys, o.point.overrides): [
            read_metrics_file(workdir / o.point.name / "metrics.jsonl")
        ]
        for o in done
    }
    if runs:
        parts = metric.split("/", 2)
        plot.plot(runs, [parts[2] if parts[0] == "eval" else metric], output)


def find_axes(points: Sequence[Overrides]) -> list[Axis]:
    """The keys of a sweep but its seed, those together that determine each other."""
    keys = list(dict.fromkeys(key for point in points for key in point if key != SEED))
    columns = {key: [repr(point.get(key)) for point in points] for key in keys}
    found: list[list[str]] = []
    for key in keys:
        for together in found:
            pairs = set(zip(columns[key], columns[together[0]], strict=True))
            if len(pairs) == len(set(columns[key])) == len(set(columns[together[0]])):
                together.append(key)
                break
        else:
            found.append([key])
    axes = []
    for together in found:
        values = {repr(p[together[0]]): p[together[0]] for p in points if together[0] in p}
        axis = Axis(tuple(together), tuple(values.values()))
        ordered = tuple(sorted(axis.values)) if axis.numeric else axis.values
        axes.append(dataclasses.replace(axis, values=ordered))
    return axes


def _draw_panel(panel: Any, axis: Axis, others: Sequence[Axis], groups: Sequence[Group]) -> None:
    key = axis.keys[0]
    lines: dict[str, list[Group]] = {}
    for group in groups:
        if key in group.overrides:
            label = _label([other.keys[0] for other in others], group.overrides)
            lines.setdefault(label, []).append(group)
    order = sorted(lines, key=lambda label: [_place(o, lines[label][0]) for o in others])
    for number, label in enumerate(order):
        members = sorted(lines[label], key=lambda group: _place(axis, group))
        panel.errorbar(
            [_place(axis, group) for group in members],
            [group.mean for group in members],
            [group.error or 0.0 for group in members],
            label=label, color=plot.color(number), marker="o", markersize=4, linewidth=1.4,
        )  # fmt: skip
        for group in members:
            if group.best:
                panel.plot(_place(axis, group), group.mean, marker="o", markersize=12,
                           color=plot.color(number), fillstyle="none", clip_on=False)  # fmt: skip
    if axis.logarithmic:
        panel.set_xscale("log")
        panel.minorticks_off()
    places = axis.values if axis.numeric else range(len(axis.values))
    panel.set_xticks(list(places), [f"{v:g}" if axis.numeric else str(v) for v in axis.values])
    plot.tidy(panel)
    panel.set_xlabel(key if len(axis.keys) == 1 else f"{key} (and {', '.join(axis.keys[1:])})")
    if others and lines:
        panel.legend(frameon=False, fontsize=8)


def _label(keys: Sequence[str], overrides: Overrides) -> str:
    settings = ((key.rpartition(".")[2], overrides[key]) for key in keys if key in overrides)
    return ", ".join(f"{key} {value}" for key, value in settings)


def _place(axis: Axis, group: Group) -> float:
    """Where a group stands on an axis; before all others if it leaves that key alone."""
    value = group.overrides.get(axis.keys[0])
    if value is None:
        return -1.0
    return float(value) if axis.numeric else float([*map(repr, axis.values)].index(repr(value)))


def _unevenness(values: np.ndarray) -> float:
    """How much the steps from value to value differ, as a share of their mean."""
    steps = np.diff(values)
    return float(np.std(steps) / np.mean(steps))
