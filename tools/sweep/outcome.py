"""How far each point of a sweep has come, read from its folder."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_jax.evals.statistics import mean
from llm_jax.json_files import read_json
from llm_jax.measures import Direction
from llm_jax.sweep import SEED
from tools.sweep.points import Point

WAITING, RUNNING, FINISHED, STOPPED, FAILED = "waiting", "running", "finished", "stopped", "failed"


@dataclasses.dataclass
class Outcome:
    """metrics: the last of each key, of a recipe as STAGE/KEY. step: the last one logged, None
    before the first. seconds: that the runs have taken. reason: why it has failed."""

    point: Point
    status: str = WAITING
    step: int | None = None
    seconds: float = 0.0
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    reason: str = ""

    def metric(self, name: str) -> float | None:
        """A metric of a finished point; None where it has none, or one that is not finite."""
        value = self.metrics.get(name) if self.status == FINISHED else None
        return value if value is not None and math.isfinite(value) else None


@dataclasses.dataclass(frozen=True)
class Group:
    """Points that differ in nothing but the seed. error: the standard error of the mean, None for a
    single value. outcomes: all of them; mean and error are of those that have the metric."""

    overrides: Mapping[str, Any]
    outcomes: tuple[Outcome, ...]
    mean: float | None
    error: float | None
    best: bool = False


def read_outcome(point: Point, workdir: Path) -> Outcome:
    """What a point's folder says, which no process is at work in."""
    folder = workdir / point.name
    if not point.stages:
        return _read_run(point, folder)
    parts = {stage: _read_run(point, folder / stage) for stage in point.stages}
    last = [part for part in parts.values() if part.status != WAITING]
    if not last:
        return Outcome(point)
    done = all(part.status == FINISHED for part in parts.values())
    return Outcome(
        point,
        FINISHED if done else STOPPED,
        last[-1].step,
        sum(part.seconds for part in last),
        {
            f"{name}/{key}": value
            for name, part in parts.items()
            for key, value in part.metrics.items()
        },
    )


def group_seeds(outcomes: Sequence[Outcome], metric: str, direction: Direction) -> list[Group]:
    """The points with their repetitions together, in their order, the best one marked."""
    together: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        rest = {key: value for key, value in outcome.point.overrides.items() if key != SEED}
        together.setdefault(repr(rest), []).append(outcome)
    groups = []
    for members in together.values():
        rest = {key: value for key, value in members[0].point.overrides.items() if key != SEED}
        values = [value for member in members if (value := member.metric(metric)) is not None]
        found = mean("metric", values)
        error = found.get("metric_stderr")
        groups.append(Group(rest, tuple(members), found.get("metric"), error))
    means = [group.mean for group in groups if group.mean is not None]
    if not means:
        return groups
    best = min(means) if direction == "lowest" else max(means)
    first = next(i for i, group in enumerate(groups) if group.mean == best)
    groups[first] = dataclasses.replace(groups[first], best=True)
    return groups


def latest_step(point: Point, workdir: Path) -> int | None:
    """The last step that a point has logged, of a recipe in its latest stage; None before that."""
    folder = workdir / point.name
    folders = [folder / stage for stage in reversed(point.stages)] or [folder]
    steps = (_last_step(each / "metrics.jsonl") for each in folders)
    return next((step for step in steps if step is not None), None)


def _last_step(path: Path) -> int | None:
    """The step of the last whole line, while the file is being written."""
    if not path.exists():
        return None
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        lines = file.read().decode(errors="replace").splitlines()
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):  # a line of which a part is written
            continue
    return None


def _read_run(point: Point, folder: Path) -> Outcome:
    result = read_json(folder / "result.json")
    if result is None:
        step = _last_step(folder / "metrics.jsonl")
        return Outcome(point, WAITING if step is None else STOPPED, step)
    status = FINISHED if result["status"] == "finished" else STOPPED
    return Outcome(point, status, result["step"], result["seconds"], result["metrics"])
