"""Runs a config at many points and says which is the best.

    python -m tools.sweep --config=configs/sweeps/lr.py --workdir=W [--parallel=N]
    python -m tools.sweep --config=configs/pretrain.py:size=tiny --workdir=W \\
        --grid 'optimizer.learning_rate=1e-3,3e-3' 'model.num_layers=2,4' [--config.a.b=v ...]
    python -m tools.sweep --config=... --workdir=W --emit=shell|slurm|jobset|table

A sweep file has `get_sweep(argument)` (see llm_jax/sweep.py); --grid sweeps over the keys of any
stage or recipe; --config.a.b=v holds for all points. Every point is checked before anything runs,
and then is a process of its own with a folder, W/POINT, and a log, W/logs/POINT.log. Given again,
the same command leaves finished points alone, resumes stopped ones and tries failed ones again.
Ctrl-C and SIGTERM stop all points with a checkpoint.

At the end W has sweep.md, sweep.csv, sweep.json, sweep.png (the metric against each key) and
curves.png; points that differ in their `seed` alone are averaged (mean ± standard error).

--parallel=N runs N at once, on one machine's devices: for CPUs, or GPUs with
XLA_PYTHON_CLIENT_MEM_FRACTION below 1/N. --emit writes the jobs for a cluster instead and runs
nothing; --emit=table makes tables and plots of what has been finished elsewhere.

Exit status: 0 all points finished, 1 some failed, 2 bad input, 130 or 143 stopped.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from llm_jax.errors import UserError, did_you_mean
from tools.cli import run_tool, split_overrides

if TYPE_CHECKING:
    from llm_jax.measures import Direction
    from llm_jax.sweep import Sweep
    from tools.sweep.outcome import Outcome

EMITS = ("shell", "slurm", "jobset", "table")


def define_flags() -> flags.FlagValues:
    values = flags.FlagValues()
    flags.DEFINE_string("config", None, "a sweep file, or with --grid a config", flag_values=values)
    flags.DEFINE_string("workdir", None, "folder of the sweep", flag_values=values)
    flags.DEFINE_multi_string(
        "grid", [], "KEY=VALUE,VALUE,... of the config; several make a product", flag_values=values
    )
    flags.DEFINE_integer("parallel", 1, "points at once", lower_bound=1, flag_values=values)
    flags.DEFINE_string("metric", None, "rank by this one instead", flag_values=values)
    flags.DEFINE_enum(
        "direction", None, ["lowest", "highest"], "which end is the best", flag_values=values
    )
    flags.DEFINE_enum(
        "emit", None, list(EMITS), "write jobs or the table, and run nothing", flag_values=values
    )
    return values


def main(values: flags.FlagValues, overrides: Sequence[str] = ()) -> None:
    if not values.config or not values.workdir:
        raise UserError("--config=FILE and --workdir=FOLDER are both needed.")
    # None of these makes JAX look for devices: they are the points'.
    from llm_jax.sweep import find_direction
    from tools.sweep.emitting import emit
    from tools.sweep.outcome import FAILED, FINISHED, read_outcome
    from tools.sweep.points import check_folders, read_sweep, resolve
    from tools.sweep.running import run_points
    from tools.sweep.table import Display, write_record

    sweep = read_sweep(values.config, values.grid, overrides)
    if values.metric is not None:
        sweep = dataclasses.replace(sweep, metric=values.metric, direction=None)
    sweep = dataclasses.replace(sweep, direction=values.direction or sweep.direction)
    direction = find_direction(sweep.metric, sweep.direction)
    points, workdir = resolve(sweep), Path(values.workdir)
    check_folders(points, workdir)
    outcomes = [read_outcome(point, workdir) for point in points]
    if values.emit in ("shell", "slurm", "jobset"):
        print(emit(values.emit, points, workdir))
        return
    stopped = None
    if values.emit is None:
        done = sum(outcome.status == FINISHED for outcome in outcomes)
        print(f"{len(points)} points, {done} of them finished already; logs in {workdir}/logs")
        workdir.mkdir(parents=True, exist_ok=True)
        write_record(sweep, outcomes, workdir, direction)
        with Display(sweep, outcomes, workdir, direction) as display:
            stopped = run_points(outcomes, workdir, values.parallel, display)
    _report(sweep, outcomes, workdir, direction)
    if stopped is not None:
        print("stopped: the same command goes on.", file=sys.stderr)
        sys.exit(128 + stopped)
    if any(outcome.status == FAILED for outcome in outcomes):
        sys.exit(1)


def _report(sweep: Sweep, outcomes: Sequence[Outcome], workdir: Path, direction: Direction) -> None:
    """Writes tables and plots, and prints the table."""
    from tools.sweep.plots import draw_curves, draw_metric
    from tools.sweep.table import markdown, write_tables

    write_tables(sweep, outcomes, workdir, direction)
    print(f"\n{markdown(sweep, outcomes, direction)}")
    known = {name for outcome in outcomes for name in outcome.metrics}
    if not any(outcome.metric(sweep.metric) is not None for outcome in outcomes):
        if known and sweep.metric not in known:
            print(f"no point has {sweep.metric!r}.{did_you_mean(sweep.metric, known)}")
        return
    try:
        draw_metric(sweep, outcomes, direction, workdir / "sweep.png")
        draw_curves(outcomes, workdir, sweep.metric, workdir / "curves.png")
    except UserError as error:  # no matplotlib
        print(error)
        return
    print(f"{workdir}/sweep.png, {workdir}/curves.png")


def spread_grid(arguments: Sequence[str]) -> list[str]:
    """`--grid A B` as `--grid=A --grid=B`, which is how flags are read."""
    spread, inside = [], False
    for argument in arguments:
        if argument.lstrip("-") == "grid" and argument.startswith("-"):
            inside = True
        elif inside and not argument.startswith("-"):
            spread.append(f"--grid={argument}")
        else:
            inside = False
            spread.append(argument)
    return spread


def run(argv: Sequence[str]) -> int:
    """Runs the command line; returns the exit status or leaves with it."""
    arguments, overrides = split_overrides(spread_grid(argv))
    return run_tool(
        lambda values: main(values, overrides), define_flags(), __doc__ or "", arguments
    )


if __name__ == "__main__":
    sys.exit(run(sys.argv))
