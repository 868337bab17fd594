"""The table that `tools.bench train` prints."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from tools.bench.summary import show_flops, show_spread


def report(result: dict[str, Any]) -> None:
    """Prints the sides as columns, the measured peak and the ratios."""
    console = Console(highlight=False)
    sides = result["sides"]
    jax_side = next(side for side in sides if side["name"] != "torch")
    console.print(
        f"{jax_side['parameters']:,} parameters, {jax_side['batch']} x {jax_side['length']} tokens "
        f"a step, {jax_side['devices']} x {jax_side['device']}, jax {jax_side['jax']}",
        markup=False,
    )
    for side in sides:
        console.print(f"{side['name']}: {side['setting'] or 'the config as it is'}", markup=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("median (min to max)")
    for side in sides:
        table.add_column(side["name"], justify="right")
    for label, cells in _rows(sides):
        table.add_row(label, *cells)
    console.print(table)
    for dtype, peak in result["matrix_product_peak"].items():
        console.print(
            f"measured matrix-product peak, {dtype}: {show_flops(peak['flops_per_second'])}/s "
            f"at {peak['size']}²",
            markup=False,
        )
    for ratio in result["ratios"]:
        console.print(
            f"tokens/s of {ratio['of']} / {ratio['to']}: {show_spread(ratio, '.3f')} over "
            f"{len(ratio['rounds'])} rounds of {result['steps']} steps",
            markup=False,
        )


def _rows(sides: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    return [
        ("tokens/s", [show_spread(s["tokens_per_second"], ",.0f") for s in sides]),
        ("milliseconds a step", [show_spread(s["step_seconds"], ".1f", 1000) for s in sides]),
        ("micro-batches", [str(s.get("micro_batches", "")) for s in sides]),
        ("FLOPs a token", [_flops_a_token(s) for s in sides]),
        ("MFU of the measured peak", [_mfu(s) for s in sides]),
        ("compile seconds, cold", [_compile_seconds(s, "cold") for s in sides]),
        ("compile seconds, warm", [_compile_seconds(s, "warm") for s in sides]),
        ("peak memory, MiB", [f"{s['peak_memory_bytes'] / 2**20:,.0f}" for s in sides]),
        ("  as", [s["memory_of"] for s in sides]),
        ("last loss", [f"{s['loss']:.3f}" for s in sides]),
    ]


def _flops_a_token(side: dict[str, Any]) -> str:
    return show_flops(side["flops_per_token"]) if "flops_per_token" in side else ""


def _mfu(side: dict[str, Any]) -> str:
    return f"{side['mfu']:.1%} ({side['model']['dtype']})" if "mfu" in side else ""


def _compile_seconds(side: dict[str, Any], which: str) -> str:
    """The sum, and how much of it is tracing; torch tells only how long its first step took."""
    seconds = side["compile_seconds"]
    if "first_step" in seconds:
        return f"{seconds['first_step']:.1f} (first step)" if which == "cold" else ""
    parts = seconds[which]
    return f"{sum(parts.values()):.2f} (tracing {parts['tracing']:.2f})"
