"""Measures what the training loop adds to the bare train step.

    python -m tools.bench loop [--config=FILE --config.KEY=VALUE ...] [--rounds=3]

Runs a pre-training config with its data, log and asynchronous checkpoints, in a folder that is
removed afterwards. The loop and the bare step (the same program on batches that lie ready) take
turns
of one checkpoint interval each, so that every turn of the loop writes one checkpoint; compilation,
evaluations, samples and the save at the end stand outside. A shorter interval, such as
--config.checkpoint.every=50, makes shorter turns and lets the checkpoint weigh more.
"""

from __future__ import annotations

import tempfile
from typing import Any

from absl import flags
from rich import box
from rich.console import Console
from rich.table import Table

from llm_jax.errors import UserError
from tools.bench.protocol import Worker, WorkerError
from tools.bench.summary import show_spread, spread, tell, write_json


def define_flags() -> flags.FlagValues:
    values = flags.FlagValues()
    flags.DEFINE_string("config", "configs/pretrain.py", "pre-training config", flag_values=values)
    flags.DEFINE_integer("phase", 1, "which phase of the config, from 1", flag_values=values)
    flags.DEFINE_integer("rounds", 3, "turns of each side", flag_values=values)
    flags.DEFINE_string("output", None, "also write everything as JSON", flag_values=values)
    return values


def main(values: flags.FlagValues, overrides: list[str]) -> None:
    if values.rounds < 1:
        raise UserError(f"--rounds={values.rounds} must be at least 1.")
    with write_json(values.output) as write:
        result = _measure(values, overrides)
        _report(result)
        write(result)


def _measure(values: flags.FlagValues, overrides: list[str]) -> dict[str, Any]:
    try:
        with (
            tempfile.TemporaryDirectory(prefix="bench-run-") as workdir,
            Worker("tools.bench.run_worker") as worker,
        ):
            answer = worker.ask(
                "overhead",
                note=tell,
                config=values.config,
                overrides=overrides,
                phase=values.phase,
                rounds=values.rounds,
                workdir=workdir,
            )
    except WorkerError as error:
        raise UserError(str(error)) from error
    tell("")
    pairs = zip(answer["loop_seconds"], answer["bare_seconds"], strict=True)
    overheads = [loop / bare - 1 for loop, bare in pairs]
    return {
        "config": values.config,
        "overrides": overrides,
        "phase": values.phase,
        **answer,
        "overhead": {**spread(overheads), "rounds": overheads},
    }


def _report(result: dict[str, Any]) -> None:
    console = Console(highlight=False)
    console.print(
        f"{result['batch']} x {result['length']} tokens a step, {result['platform']}, jax "
        f"{result['jax']}; turns of {result['steps']} steps, each with a checkpoint and a log line "
        f"every {result['log_every']} steps",
        markup=False,
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("round", "bare tokens/s", "loop tokens/s", "overhead"):
        table.add_column(column, justify="right")
    seconds = zip(result["bare_seconds"], result["loop_seconds"], strict=True)
    for number, (bare, loop) in enumerate(seconds, start=1):
        speeds = [f"{result['tokens'] / s:,.0f}" for s in (bare, loop)]
        table.add_row(str(number), *speeds, f"{loop / bare - 1:.2%}")
    console.print(table)
    rounds = len(result["loop_seconds"])
    console.print(
        f"the loop adds {show_spread(result['overhead'], '.2%')} to the bare step, median (min to "
        f"max) of {rounds} rounds",
        markup=False,
    )
