"""The table of a sweep: live on a terminal, and as sweep.md, sweep.csv and sweep.json."""

from __future__ import annotations

import csv
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table

from llm_jax.console import clock_time
from llm_jax.json_files import write_json
from llm_jax.measures import Direction
from llm_jax.sweep import SEED, Sweep
from tools.sweep.outcome import FAILED, FINISHED, RUNNING, Group, Outcome, group_seeds
from tools.sweep.points import RECORD

REDRAW_SECONDS = 1.0  # steps of metrics.jsonl come no faster, and a table takes time to draw


class Display:
    """A table drawn over itself on a terminal; elsewhere a line when a point starts or ends.

    It is a `running.Watcher`, and also writes the sweep's record whenever a point has ended.
    """

    def __init__(
        self, sweep: Sweep, outcomes: Sequence[Outcome], workdir: Path, direction: Direction
    ):
        self._sweep, self._outcomes, self._workdir = sweep, outcomes, workdir
        self._direction = direction
        self._live: Live | None = None
        if sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
            self._live = Live(
                console=Console(highlight=False),
                get_renderable=self._table,
                refresh_per_second=1 / REDRAW_SECONDS,
                transient=True,  # the table in Markdown follows
            )

    def __enter__(self) -> Display:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._live is not None:
            self._live.stop()

    def held(self, outcome: Outcome) -> None:
        self._say(outcome, f" waits: {outcome.reason}")

    def started(self, outcome: Outcome) -> None:
        resumes = "" if outcome.step is None else f" resumes from step {outcome.step} or before"
        self._say(outcome, resumes or " starts")

    def ended(self, outcome: Outcome) -> None:
        write_record(self._sweep, self._outcomes, self._workdir, self._direction)
        value = outcome.metric(self._sweep.metric)
        found = "" if value is None else f", {self._sweep.metric} {value:.4g}"
        reason = f" ({outcome.reason})" if outcome.reason else ""
        took = clock_time(outcome.seconds)
        step = "" if outcome.step is None else f" at step {outcome.step}"
        self._say(outcome, f" {outcome.status}{reason}{step} after {took}{found}")

    def _say(self, outcome: Outcome, text: str) -> None:
        if self._live is None:
            number = list(self._outcomes).index(outcome) + 1
            print(f"{number}/{len(self._outcomes)} {outcome.point.name}{text}", flush=True)

    def _table(self) -> Table:
        columns, rows = cells(self._sweep, self._outcomes, self._direction)
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for column in columns:
            table.add_column(column, justify="right")
        styles = {RUNNING: "bold", FAILED: "red"}
        for row, group in rows:
            style = next((styles[o.status] for o in group.outcomes if o.status in styles), None)
            table.add_row(*row, style="green" if group.best else style)
        return table


def cells(
    sweep: Sweep, outcomes: Sequence[Outcome], direction: Direction
) -> tuple[list[str], list[tuple[list[str], Group]]]:
    """The table's columns, and a row of texts for each group of points that differ in seeds."""
    keys = [key for key in sweep.keys if key != SEED]
    seeds = SEED in sweep.keys
    columns = [*keys, *(["seeds"] if seeds else []), "status", "step", "time", sweep.metric]
    rows = []
    for group in group_seeds(outcomes, sweep.metric, direction):
        cell = [str(group.overrides.get(key, "")) for key in keys]
        if seeds:
            cell.append(str(sum(o.metric(sweep.metric) is not None for o in group.outcomes)))
        cell.append(_status(group))
        cell.append(", ".join("" if o.step is None else str(o.step) for o in group.outcomes))
        cell.append(clock_time(sum(o.seconds for o in group.outcomes)))
        cell.append(_metric(group))
        rows.append((cell, group))
    return columns, rows


def markdown(sweep: Sweep, outcomes: Sequence[Outcome], direction: Direction) -> str:
    """The table, what failed and why, and the flags of the best point."""
    columns, rows = cells(sweep, outcomes, direction)
    lines = [f"# {sweep.config}: {len(outcomes)} points by {direction} {sweep.metric}", ""]
    lines += [_row(columns), _row(["---"] * len(columns))]
    lines += [_row(cell) for cell, _ in rows]
    failed = [outcome for outcome in outcomes if outcome.status == FAILED]
    lines += ["", *(f"- {o.point.name} failed: {o.reason}" for o in failed)] if failed else []
    best = next((group for _, group in rows if group.best), None)
    if best is not None and best.overrides:
        settings = [f"--config.{key}={value}" for key, value in best.overrides.items()]
        lines += ["", f"Best: {shlex.join(settings)}"]
    return "\n".join(lines).rstrip() + "\n"


def write_tables(
    sweep: Sweep, outcomes: Sequence[Outcome], workdir: Path, direction: Direction
) -> None:
    """Writes sweep.md, sweep.csv (a line for each point, with all its metrics) and the record."""
    (workdir / "sweep.md").write_text(markdown(sweep, outcomes, direction), encoding="utf-8")
    metrics = sorted({name for outcome in outcomes for name in outcome.metrics})
    with open(workdir / "sweep.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["name", *sweep.keys, "status", "step", "seconds", *metrics])
        for o in outcomes:
            settings = [o.point.overrides.get(key, "") for key in sweep.keys]
            values = [o.metrics.get(name, "") for name in metrics]
            writer.writerow([o.point.name, *settings, o.status, o.step, o.seconds, *values])
    write_record(sweep, outcomes, workdir, direction)


def write_record(
    sweep: Sweep, outcomes: Sequence[Outcome], workdir: Path, direction: Direction
) -> None:
    """Writes sweep.json: all that is known of each point. Only points of this sweep are in it."""
    groups = group_seeds(outcomes, sweep.metric, direction)
    best = {o.point.name for group in groups if group.best for o in group.outcomes}
    record = {
        "config": sweep.config,
        "metric": sweep.metric,
        "direction": direction,
        "overrides": dict(sweep.overrides),
        "points": [
            {
                "name": o.point.name,
                "overrides": dict(o.point.overrides),
                "hash": o.point.hash,
                "status": o.status,
                "best": o.point.name in best,
                "step": o.step,
                "seconds": round(o.seconds, 3),
                **({"reason": o.reason} if o.reason else {}),
                "metrics": dict(o.metrics),
            }
            for o in outcomes
        ],
    }
    write_json(workdir / RECORD, json.loads(json.dumps(record)))


def _status(group: Group) -> str:
    """The status that most needs a look at, and how many have it where there are several."""
    found = [outcome.status for outcome in group.outcomes]
    if len(set(found)) == 1:
        return found[0]
    return ", ".join(f"{found.count(status)} {status}" for status in dict.fromkeys(found))


def _metric(group: Group) -> str:
    if group.mean is None:
        done = any(outcome.status == FINISHED for outcome in group.outcomes)
        return "none" if done else ""
    text = f"{group.mean:.4f}"
    text += "" if group.error is None else f" ± {group.error:.4f}"
    return f"{text} best" if group.best else text


def _row(texts: Sequence[str]) -> str:
    return f"| {' | '.join(texts)} |"
