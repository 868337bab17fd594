"""Measures the host memory of importing a published checkpoint.

    python -m tools.bench import_memory [--megabytes=800] [--files=4]

Makes a Llama-like folder of random weights, in bfloat16 and in float32. One process converts it to
a run directory, another loads it onto eight simulated devices. What is told is the peak of resident
memory above that of the process before, without the arrays that are asked for: against the largest
file for the conversion, against the largest shard of a device for loading.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from absl import flags
from rich import box
from rich.console import Console
from rich.table import Table

from llm_jax.errors import UserError
from tools.bench.protocol import Worker, WorkerError
from tools.bench.summary import tell, write_json

DTYPES = ("bfloat16", "float32")
DEVICES = 8
TASKS = {
    "convert": "conversion to a run, against the largest file",
    "load": f"loading onto {DEVICES} devices, against the largest shard",
}


def define_flags() -> flags.FlagValues:
    values = flags.FlagValues()
    flags.DEFINE_integer("megabytes", 800, "of weights in float32", flag_values=values)
    flags.DEFINE_integer("files", 4, "that the weights are spread over", flag_values=values)
    flags.DEFINE_string("output", None, "also write everything as JSON", flag_values=values)
    return values


def main(values: flags.FlagValues, overrides: list[str]) -> None:
    if overrides:
        raise UserError(f"{overrides[0]!r}: this command has no config.")
    if values.megabytes < 100 or values.files < 1:
        raise UserError("give at least --megabytes=100 and --files=1.")
    with write_json(values.output) as write:
        results = [result for dtype in DTYPES for result in _measure(values, dtype)]
        _report(results)
        write({"results": results})


def _measure(values: flags.FlagValues, dtype: str) -> list[dict[str, Any]]:
    settings = {"megabytes": values.megabytes, "files": values.files, "dtype": dtype}
    with tempfile.TemporaryDirectory(prefix="bench-import-") as folder:
        tell(f"writing {values.megabytes} MB of weights, in {dtype}")
        _ask("make", folder, settings)
        results = []
        for task in TASKS:
            tell(f"{task}: measuring")
            results.append({"task": task, **settings, **_ask(task, folder, settings)})
    return results


def _ask(task: str, folder: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Every task has a process of its own, whose memory no other task has touched."""
    environment = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(DEVICES)}
    try:
        with Worker("tools.bench.import_worker", environment=environment) as worker:
            return worker.ask(task, folder=str(Path(folder)), **settings)
    except WorkerError as error:
        raise UserError(str(error)) from error


def _report(results: list[dict[str, Any]]) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("", "stored in", "unit MB", "peak MB", "ratio"):
        table.add_column(column, justify="left" if column in ("", "stored in") else "right")
    for result in results:
        unit, peak = result["unit_bytes"], result["peak_bytes"]
        table.add_row(
            TASKS[result["task"]],
            result["dtype"],
            f"{unit / 1e6:,.0f}",
            f"{peak / 1e6:,.0f}",
            f"{peak / unit:.2f}",
        )
    Console(highlight=False).print(table)
