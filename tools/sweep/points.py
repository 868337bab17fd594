"""The points of a sweep, resolved and checked before anything runs."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from llm_jax import checkpoint
from llm_jax.binding import binding, binding_digest
from llm_jax.config import build, digest, resolved
from llm_jax.errors import UserError, did_you_mean
from llm_jax.json_files import read_json
from llm_jax.main import check_file, parse
from llm_jax.recipe import RECIPE, STAGES
from llm_jax.sweep import Overrides, Sweep, name_points, parse_grid
from llm_jax.trainers import TRAINERS

RECORD = "sweep.json"


@dataclasses.dataclass(frozen=True)
class Point:
    """name: of its folder in the sweep's. flags: of llm_jax.main, without --workdir. hash: of all
    in its config that decides what comes out. stages: of a recipe, each a folder in the point's."""

    name: str
    overrides: Overrides
    flags: tuple[str, ...]
    hash: str
    stages: tuple[str, ...] = ()


def read_sweep(config: str, grid: Sequence[str], overrides: Sequence[str]) -> Sweep:
    """The sweep of a sweep file, or the grid over a stage's config.

    Args:
      config: a file with an optional argument.
      grid: terms such as "model.num_layers=2,4"; for a stage's config only.
      overrides: flags such as "--config.seed=1" for all points.

    Raises:
      UserError: a file that is neither, or a grid that does not fit it.
    """
    check_file(config)
    path, _, argument = config.partition(":")
    module = _load(Path(path))
    if not hasattr(module, "get_sweep"):
        if not grid:
            raise UserError(
                f"{path} is no sweep file (it has no get_sweep): sweep over its keys by --grid, "
                "for example --grid 'optimizer.learning_rate=1e-3,3e-4'."
            )
        return Sweep(config, parse_grid(grid), overrides=_read_overrides(overrides))
    if grid:
        raise UserError(f"--grid is for a stage's config, and {path} is a sweep file: change that.")
    sweep: Sweep = module.get_sweep(argument or None)
    shared = {**sweep.overrides, **_read_overrides(overrides)}
    return dataclasses.replace(sweep, overrides=shared)


def resolve(sweep: Sweep) -> list[Point]:
    """All points, after a look at each of their configs.

    Raises:
      UserError: a key that the config does not have, or a value that does not fit.
    """
    points = []
    for name, overrides in zip(name_points(sweep.space), sweep.space, strict=True):
        every = {**sweep.overrides, **overrides}
        changes = [f"--config.{key}={value}" for key, value in every.items()]
        flags = (f"--config={sweep.config}", *changes)
        try:
            config, _ = parse(["tools.sweep", *flags])
            points.append(Point(name, overrides, flags, *_identity(config)))
        except UserError as error:
            raise UserError(f"point {name}: {error}") from error
    return points


def check_folders(points: Sequence[Point], workdir: Path) -> None:
    """
    Raises:
      UserError: the folder of a point, or of the sweep, holds something else.
    """
    if (workdir / "config.json").exists():
        raise UserError(f"--workdir={workdir} is a run of its own: name another folder.")
    before = read_record(workdir)
    for point in points:
        folder = workdir / point.name
        held = before.get(point.name)
        if not point.stages and (folder / "config.json").exists():
            bound = checkpoint.latest_step(folder) is not None
            held = binding_digest(folder) if bound else None
        if folder.exists() and held is not None and held != point.hash:
            raise UserError(
                f"{folder} was made with another config (hash {held}, {point.hash} now): use "
                "another --workdir, or the old config to resume."
            )


def read_record(workdir: Path) -> dict[str, str]:
    """The hashes of points by name, as the sweep has written them down before."""
    path = workdir / RECORD
    written = read_json(path)
    if written is None:
        return {}
    try:
        return {point["name"]: point["hash"] for point in written["points"]}
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is no record of a sweep: use another --workdir.") from error


def _identity(config: Any) -> tuple[str, tuple[str, ...]]:
    """The hash of what binds a config, and the names of its stages if it is a recipe."""
    if config.get("trainer", None) != RECIPE:
        return digest(_bound(config)), ()
    stages = tuple(config[STAGES])
    rest = {key: resolved(config[key]) for key in config if key not in stages}
    return digest([rest, *(_bound(config[stage]) for stage in stages)]), stages


def _bound(config: Any) -> dict[str, Any]:
    name = str(config.get("trainer", None))
    if name not in TRAINERS:
        raise UserError(f"config.trainer={name!r} is no trainer.{did_you_mean(name, TRAINERS)}")
    return binding(resolved(build(TRAINERS[name].config, config)))


def _read_overrides(flags: Sequence[str]) -> dict[str, str]:
    pairs = [flag.lstrip("-").removeprefix("config.").partition("=") for flag in flags]
    return {key: value if equals else "True" for key, equals, value in pairs}


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"sweep_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is no Python file: name a sweep file or a stage's config.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
    return module
