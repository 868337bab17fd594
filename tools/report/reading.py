"""What a folder of runs holds: the runs, where each comes from, and what was measured of them.

Whatever is missing or damaged is left out and told as a problem: a report of half a run is a report
of that half.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from llm_jax.binding import binding
from llm_jax.config import digest, flatten
from llm_jax.errors import UserError
from llm_jax.json_files import read_json

DEPTH = (
    2  # folders below the given one in which runs are looked for: a sweep's points may be chains
)


@dataclasses.dataclass(frozen=True)
class Run:
    """A run directory.

    name: its path below the folder of the report. config, result, evaluation: its files, {} where
    there is none. meta: of its newest checkpoint, {} without one; checkpoint: that one's step.
    records: of metrics.jsonl. samples: (step, text). problems: what could not be read.
    """

    name: str
    path: Path
    config: dict[str, Any]
    result: dict[str, Any]
    evaluation: dict[str, Any]
    meta: dict[str, Any]
    checkpoint: int | None
    records: list[dict[str, float]]
    samples: list[tuple[int, str]]
    problems: tuple[str, ...]

    @property
    def stage(self) -> str:
        return str(self.result.get("stage") or self.config.get("trainer") or "unknown")

    @property
    def status(self) -> str:
        """finished, interrupted, unfinished, or "not begun" where nothing was recorded."""
        if "status" in self.result:
            return str(self.result["status"])
        return "unfinished" if self.records or self.checkpoint is not None else "not begun"

    @property
    def step(self) -> int:
        last = max((record["step"] for record in self.records), default=0)
        return int(self.result.get("step", last))

    @property
    def tokens(self) -> int | None:
        found = self.result.get("tokens", self.last("tokens"))
        return None if found is None else int(found)

    @property
    def seconds(self) -> float | None:
        return self.result.get("seconds")

    @property
    def device_seconds(self) -> float | None:
        """Time by devices; None where either is not on record."""
        devices = self.hardware.get("devices")
        return None if self.seconds is None or devices is None else self.seconds * devices

    @property
    def hardware(self) -> dict[str, Any]:
        return self.result.get("hardware", {})

    @property
    def lineage(self) -> list[dict[str, Any]]:
        """The stages before this one, oldest first."""
        return self.result.get("lineage") or self.meta.get("lineage") or []

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """The leaves of the config by dotted path."""
        return flatten(self.config)

    @functools.cached_property
    def digest(self) -> str:
        """The hash of the config by which lineages name it."""
        return digest(binding(self.config))

    def series(self, key: str) -> list[tuple[float, float]]:
        """Step and value wherever the key was recorded; values may be NaN."""
        return [(record["step"], record[key]) for record in self.records if key in record]

    def last(self, key: str) -> float | None:
        found = self.series(key)
        return found[-1][1] if found else None

    @functools.cached_property
    def keys(self) -> list[str]:
        """All keys that were recorded, in the order of their first appearance."""
        return list(dict.fromkeys(key for record in self.records for key in record))


@dataclasses.dataclass(frozen=True)
class Link:
    """From one stage to the next.

    parent, child: names of runs. step: of the parent's checkpoint. kind: "parent", or the config's
    key that names another run, such as a reward model.
    """

    parent: str
    child: str
    step: int | None
    kind: str = "parent"


@dataclasses.dataclass(frozen=True)
class Collection:
    """Some runs, oldest first.

    kind: a "chain" where one begins from another. outside: names of stages that a lineage names
    and that are in no folder here. measured: the lines of a recipe's yardstick. sweep: sweep.json.
    """

    path: Path
    kind: Literal["chain", "sweep", "run"]
    runs: tuple[Run, ...]
    links: tuple[Link, ...]
    outside: tuple[str, ...]
    measured: tuple[dict[str, Any], ...]
    sweep: dict[str, Any]
    problems: tuple[str, ...]

    def parent(self, run: Run) -> Run | None:
        names = [k.parent for k in self.links if k.child == run.name and k.kind == "parent"]
        return next((other for other in self.runs if other.name in names), None)


def read(folder: Path) -> Collection:
    """Reads a run with those that it comes from, or all runs in a folder.

    Raises:
      UserError: no such folder, or no run in it.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: name a run, a recipe's workdir or a sweep's.")
    if (folder / "config.json").exists():
        last = read_run(folder, folder.resolve().name)
        before = [Path(entry["run"]) for entry in last.lineage]
        runs = [read_run(path, path.name) for path in before if _is_other_run(path, folder)]
        runs.append(last)
    else:
        runs = [read_run(path, str(path.relative_to(folder))) for path in _run_folders(folder)]
        if not runs:
            raise UserError(
                f"{folder} holds no run: no config.json is in it or in the folders below it."
            )
    problems: list[str] = []
    links, outside = _links(runs, problems)
    inside = {link.parent for link in links} - set(outside)
    kind: Literal["chain", "sweep", "run"] = "chain" if inside else "sweep"
    return Collection(
        path=folder,
        kind="run" if len(runs) == 1 else kind,
        runs=_oldest_first(runs, links),
        links=tuple(links),
        outside=tuple(outside),
        measured=tuple(_lines(folder / "yardstick.jsonl", problems)),
        sweep=_json(folder / "sweep.json", problems),
        problems=tuple(problems),
    )


def read_run(path: Path, name: str) -> Run:
    """Reads one run directory, as far as it can be read."""
    from llm_jax.checkpoint import newest_meta
    from llm_jax.metrics import read_metrics_file, read_samples_file

    problems: list[str] = []

    def attempt(read_file: Callable[..., Any], path: Path, default: Any) -> Any:
        try:
            return read_file(path)
        except (UserError, OSError, ValueError) as error:
            problems.append(f"{error}".rstrip("."))
            return default

    has_metrics = (path / "metrics.jsonl").is_file()
    found = attempt(newest_meta, path, None)
    return Run(
        name=name,
        path=path,
        config=_json(path / "config.json", problems),
        result=_json(path / "result.json", problems),
        evaluation=_json(path / "evaluation.json", problems),
        meta=found[1] if found else {},
        checkpoint=found[0] if found else None,
        records=attempt(read_metrics_file, path / "metrics.jsonl", []) if has_metrics else [],
        samples=attempt(read_samples_file, path / "samples.jsonl", []),
        problems=tuple(problems),
    )


def is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _run_folders(folder: Path, depth: int = DEPTH) -> Iterator[Path]:
    for path in sorted(entry for entry in folder.iterdir() if entry.is_dir()):
        if path.name.startswith("."):
            continue
        if (path / "config.json").exists():
            yield path
        elif depth > 1:
            yield from _run_folders(path, depth - 1)


def _is_other_run(path: Path, folder: Path) -> bool:
    return (path / "config.json").exists() and path.resolve() != folder.resolve()


def _links(runs: Sequence[Run], problems: list[str]) -> tuple[list[Link], list[str]]:
    """The links between runs, and the names of parents that are not among them."""
    links, outside = [], dict[str, None]()
    by_path = {run.path.resolve(): run for run in runs}
    for run in runs:
        if run.lineage:
            entry = run.lineage[-1]
            parent = _find(entry, run, by_path)
            if parent is None:
                outside[str(entry["run"])] = None
            elif parent.config and parent.digest != entry["config"]:
                problems.append(
                    f"{run.name} began from {parent.name} before that was made anew with another "
                    "config"
                )
            name = str(entry["run"]) if parent is None else parent.name
            links.append(Link(name, run.name, entry.get("step")))
        parents = {link.parent for link in links if link.child == run.name}
        for key, value in run.settings.items():
            if not isinstance(value, str) or "\0" in value or key == "init_from":
                continue
            used = by_path.get(Path(value.partition("@")[0]).resolve())
            if used is not None and used is not run and used.name not in parents:
                links.append(Link(used.name, run.name, None, key))
    return links, list(outside)


def _find(entry: Mapping[str, Any], run: Run, by_path: Mapping[Path, Run]) -> Run | None:
    """The run that an entry of a lineage names; one that has moved along is beside its child."""
    path = Path(entry["run"])
    if path.resolve() in by_path:
        return by_path[path.resolve()]
    beside = by_path.get(run.path.resolve().parent / path.name)
    return beside if beside and beside.config and beside.digest == entry["config"] else None


def _oldest_first(runs: Sequence[Run], links: Sequence[Link]) -> tuple[Run, ...]:
    """Parents before children; those of one generation in the order in which they were begun."""
    depth: dict[str, int] = {run.name: len(run.lineage) for run in runs}
    for _ in runs:  # a reward model that a policy uses stands before it, too
        for link in links:
            if link.parent in depth:
                depth[link.child] = max(depth[link.child], depth[link.parent] + 1)

    def begun(run: Run) -> float:
        config = run.path / "config.json"
        return config.stat().st_mtime if config.exists() else 0.0

    is_chain = any(link.parent in depth for link in links)
    return tuple(sorted(runs, key=lambda run: (depth[run.name], begun(run) if is_chain else 0)))


def _json(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        return read_json(path) or {}
    except UserError as error:
        problems.append(f"{error}".rstrip("."))
        return {}


def _lines(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        problems.append(f"{path} cannot be read: {error}")
        return []
