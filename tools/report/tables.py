"""Tables of all runs: what they cost, and what was measured of them."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Sequence
from typing import Any

from llm_jax.errors import UserError
from llm_jax.measures import best_end, is_figure
from tools.report import words
from tools.report.content import Cell, Table, anchor, make_table
from tools.report.reading import Run, is_finite


def facts(runs: Sequence[Run], price: float | None) -> Iterable[tuple[str, str]]:
    finished = sum(run.status == "finished" for run in runs)
    yield "finished", f"{finished} of {len(runs)}"
    tokens = [run.tokens for run in runs if run.tokens is not None]
    if tokens:
        yield "tokens trained on", words.count(sum(tokens))
    seconds = [run.seconds for run in runs if run.seconds is not None]
    if seconds:
        yield "time", _at_least(seconds, runs) + words.duration(sum(seconds))
    device_seconds = [run.device_seconds for run in runs if run.device_seconds is not None]
    if device_seconds:
        least = _at_least(device_seconds, runs)
        yield "device hours", least + words.hours(sum(device_seconds))
        if price is not None:
            yield "cost", least + words.money(sum(device_seconds) / 3600 * price)
    hardware = dict.fromkeys(_hardware(run) for run in runs if run.hardware)
    if hardware:
        yield "hardware", ", ".join(hardware)
    versions = dict.fromkeys(str(run.hardware["jax"]) for run in runs if "jax" in run.hardware)
    if versions:
        yield "jax", ", ".join(versions)


def _at_least(known: Sequence[float], runs: Sequence[Run]) -> str:
    return "≥\u202f" if len(known) < len(runs) else ""


def _hardware(run: Run) -> str:
    hardware = run.hardware
    if not hardware:
        return words.NOTHING
    processes = hardware.get("processes", 1)
    of = f" in {processes} processes" if processes != 1 else ""
    return (
        f"{hardware.get('devices', '?')} \N{MULTIPLICATION SIGN} {hardware.get('device', '?')}{of}"
    )


def cost_table(runs: Sequence[Run], price: float | None) -> Table:
    stages = {run.stage for run in runs}
    trainers = len(stages) > 1 and any(run.stage != run.name for run in runs)
    head = ["run", "trainer", "status", "parameters", "steps", "tokens", "time", "tokens/s", "MFU",
            "hardware", "device hours"]  # fmt: skip
    if not trainers:
        head.remove("trainer")
    rows = []
    for run in runs:
        speed, mfu = run.result.get("tokens_per_second"), run.result.get("mfu")
        hours = run.device_seconds
        texts = [
            words.count(_parameters(run)),
            f"{run.step:,}",
            words.count(run.tokens),
            words.duration(run.seconds),
            words.NOTHING if speed is None else words.count(speed),
            words.NOTHING if mfu is None else f"{mfu:.1%}",
        ]
        cells = [Cell(run.name, link=f"#{anchor(run)}")]
        cells += [Cell(run.stage), Cell(run.status)] if trainers else [Cell(run.status)]
        cells += [Cell(text, numeric=True) for text in texts]
        cells += [Cell(_hardware(run)), Cell(words.hours(hours), numeric=True)]
        if price is not None:
            cost = None if hours is None else hours / 3600 * price
            cells.append(Cell(words.money(cost), numeric=True))
        rows.append(tuple(cells))
    if price is not None:
        head.append("cost")
    return make_table("Time, cost, hardware", head, rows)


@functools.cache
def _count_parameters(model: str) -> int | None:
    from llm_jax.config import build
    from llm_jax.models import ModelConfig
    from llm_jax.models.size import parameter_count

    try:
        return parameter_count(build(ModelConfig, json.loads(model)))
    except UserError:
        return None  # of another version of the code


def _parameters(run: Run) -> int | None:
    model = run.meta.get("model")
    return run.evaluation.get("parameters") or (
        None if model is None else _count_parameters(json.dumps(model, sort_keys=True))
    )


def evaluation_table(runs: Sequence[Run]) -> Table | None:
    """Tasks by stages, of evaluation.json."""
    chosen = [run for run in runs if run.evaluation.get("tasks")]
    if not chosen:
        return None
    figures: dict[tuple[str, str], dict[str, tuple[float, float | None]]] = {}
    for run in chosen:
        for label, task in run.evaluation["tasks"].items():
            metrics = task.get("metrics", {})
            for key in filter(is_figure, metrics):
                pair = metrics[key], metrics.get(f"{key}_stderr")
                figures.setdefault((label, key), {})[run.name] = pair
    rows = []
    for (label, key), of_run in figures.items():
        values = {name: value for name, (value, _) in of_run.items() if is_finite(value)}
        best = _best(key, list(values.values()))
        cells = [Cell(label), Cell(key)]
        for run in chosen:
            value, stderr = of_run.get(run.name, (None, None))
            strong = best is not None and value == best
            cells.append(Cell(words.measured(value, stderr), numeric=True, strong=strong))
        rows.append(tuple(cells))
    names = [f"{run.name}@{run.evaluation.get('step', run.step)}" for run in chosen]
    return make_table("Evaluations", ["task", "measure", *names], rows)


def _best(key: str, values: Sequence[float]) -> float | None:
    """The best of several values that are not all the same, where it is known which is better."""
    end = best_end(key)
    if len(set(values)) < 2 or end is None:
        return None
    return min(values) if end == "lowest" else max(values)


def yardstick_table(measured: Sequence[dict[str, Any]]) -> Table | None:
    if not measured:
        return None
    rows, before = [], None
    for line in measured:
        reward = line.get("reward")
        gain = "" if before is None or reward is None else f"{reward - before:+.3f}"
        cells = (words.measured(reward, line.get("stderr")), words.minus(gain))
        rows.append((Cell(str(line.get("stage"))), *(Cell(text, numeric=True) for text in cells)))
        before = reward
    head = ["run", "reward", "over the one before"]
    return make_table("Reward on held-out prompts", head, rows)


def held_out_table(runs: Sequence[Run]) -> Table:
    """Each stage's own evaluations while it trained; two stages may hold out different things."""
    rows: list[tuple[Cell, ...]] = []
    for run in runs:
        before = None
        for key in run.keys:
            parts = key.split("/", 2)
            if parts[0] != "eval" or len(parts) < 3 or not is_figure(key):
                continue
            values = [value for _, value in run.series(key)]
            texts = [
                words.number(values[0]) if len(values) > 1 else words.NOTHING,
                words.measured(values[-1], run.last(f"{key}_stderr")),
            ]
            # What is as in the row above is not said again.
            stage = Cell(run.name, link=f"#{anchor(run)}") if before is None else Cell("")
            name = Cell("" if before == parts[1] else parts[1])
            before, figures = parts[1], (Cell(text, numeric=True) for text in texts)
            rows.append((stage, name, Cell(parts[2].replace("_", " ")), *figures))
    head = ["run", "evaluation", "measure", "first", "last"]
    return make_table("Held out, while training", head, rows)
