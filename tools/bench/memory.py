"""Compares the memory of a train step with what `llm_jax.scaling.memory` says on paper.

    python -m tools.bench memory [--config=FILE --config.KEY=VALUE ...] [--cases=TEXT]

Each case is a train step on this machine's CPU, in a process of its own: what the formula predicts,
what the compiler has allocated for it (arguments and temporaries, donated buffers once), and by how
much the process grows while it takes a few steps. A case is a list KEY=VALUE,KEY=VALUE of config
overrides; `;` stands between cases.
"""

from __future__ import annotations

from typing import Any

from absl import flags
from rich import box
from rich.console import Console
from rich.table import Table

from llm_jax.errors import UserError
from tools.bench.protocol import Worker, WorkerError
from tools.bench.summary import tell, write_json
from tools.bench.train import DEFAULT_CONFIG, Setting

AT_ONCE = "step.micro_batch_tokens=1000000"
# glibc keeps what is freed for later; here it gives that back, so that a process is as large as
# what it holds.
RETURN_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
}
CASES = (
    "model.remat=none",
    "model.remat=full",
    "model.remat=dots",
    "model.remat=dots_no_batch",
    "model.remat=full,phases[0].batch=4",
    "model.remat=full,phases[0].batch=32,loss.chunk=32",
    "model.remat=none,model.dtype=bfloat16,loss.chunk=64",
    "model.remat=full,model.dtype=bfloat16,loss.chunk=64",
    "model.remat=full,model.tie_embeddings=False",
    "model.remat=full,model.num_kv_heads=1,model.mlp=gelu",
    "model.remat=full,optimizer.mu_dtype=bfloat16,optimizer.ema_decay=0.99",
    "model.remat=full,step.micro_batch_tokens=512",
    "model.remat=full,model.embed_dim=640,model.num_heads=10,model.mlp_dim=1728",
)


def define_flags() -> flags.FlagValues:
    values = flags.FlagValues()
    flags.DEFINE_string("config", str(DEFAULT_CONFIG), "pre-training config", flag_values=values)
    flags.DEFINE_string("cases", ";".join(CASES), "overrides to measure", flag_values=values)
    flags.DEFINE_string("output", None, "also write everything as JSON", flag_values=values)
    return values


def main(values: flags.FlagValues, overrides: list[str]) -> None:
    cases = [Setting.parse(text) for text in values.cases.split(";")]
    with write_json(values.output) as write:
        results: list[dict[str, Any]] = []
        for case in cases:
            tell(f"{case.text}: measuring")
            results.append({"case": case.text, **_ask(values.config, case, overrides)})
        _report(results)
        write({"results": results})


def _ask(config: str, case: Setting, overrides: list[str]) -> dict[str, Any]:
    environment = {"JAX_PLATFORMS": "cpu", **RETURN_MEMORY, **case.environment}
    # Layers are stacked, as large models train; XLA's CPU backend undoes the recomputation of
    # others, and keeps what remat would drop.
    defaults = ["--config.model.scan_layers=True", f"--config.{AT_ONCE}"]
    try:
        with Worker("tools.bench.memory_worker", environment=environment) as worker:
            return worker.ask(
                "measure", config=config, overrides=[*defaults, *overrides, *case.overrides]
            )
    except WorkerError as error:
        raise UserError(str(error)) from error


def _report(results: list[dict[str, Any]]) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for column in ("predicted MB", "compiled MB", "", "grown MB", ""):
        table.add_column(column, justify="right")
    for result in results:
        predicted = result["predicted_bytes"]
        measured = (result["compiled_bytes"], result["resident_bytes"])
        cells = [f"{predicted / 1e6:,.0f}"]
        for size in measured:
            cells += [f"{size / 1e6:,.0f}", f"{predicted / size - 1:+.1%}"]
        table.add_row(str(result["case"]), *cells)
    Console(highlight=False, width=120).print(table)
