"""Compiles a config's training step and decode step for TPUs that need not be there.

    python -m tools.estimate --config=configs/pretrain.py:size=llama2-7b --topology=v5e:4x4
    python -m tools.estimate --config=... --topology=v5p-128 --config.mesh.tensor=4 --json=F

Every phase of the config is compiled by the TPU's own compiler (pip install 'jax[tpu]'), which
knows the memory of each chip to the byte. Times are those of a chip at its peaks. A stage after
pre-training has the architecture of what it starts from (config.init_from, or config.json in
config.init_from_hf), or its own config's where it starts from nothing. Of PPO and GRPO the
reference is counted, but no reward model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

from llm_jax.errors import UserError

if TYPE_CHECKING:
    from llm_jax.mesh import MeshConfig
    from llm_jax.scaling.compiled import Program, TooLarge
    from llm_jax.scaling.presets import Cluster

GIGABYTE = 1e9


def define_flags() -> flags.FlagValues:
    values = flags.FlagValues()
    flags.DEFINE_string(
        "config",
        None,
        "a config of pre-training, SFT, reward modelling, DPO, PPO or GRPO",
        flag_values=values,
    )
    flags.DEFINE_string(
        "topology", None, "a slice, such as v5e:4x4, or a cluster by name, such as v5p-128",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_integer("phase", None, "only this phase, from 1 on", flag_values=values)
    flags.DEFINE_integer(
        "decode_rows", None, "rows that the decode step continues; 0: no decode step; a row a "
        "device", flag_values=values,
    )  # fmt: skip
    flags.DEFINE_boolean(
        "search", False, "find the cheapest rematerialisation that fits, and the largest batch",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_string("json", None, "also write everything as JSON", flag_values=values)
    return values


def main(values: flags.FlagValues, overrides: Sequence[str] = ()) -> None:
    from llm_jax.scaling import compiled

    compiled.prepare()
    from llm_jax import mesh
    from llm_jax.scaling import stages
    from tools.bench.summary import write_json
    from tools.estimate.jobs import read_stage_config

    if not values.topology:
        raise UserError("--topology is required, for example --topology=v5e:4x4.")
    config = read_stage_config(values, overrides)
    cluster, devices = compiled.describe(values.topology)
    phases = stages.phases_of(config)
    chosen = _choose(phases, values.phase)
    layout = mesh.resolve(config.mesh, len(devices))
    rows = len(devices) if values.decode_rows is None else values.decode_rows
    with write_json(values.json) as write:
        print(_head(values.topology, cluster, layout))
        if values.search:
            from tools.estimate import searching

            write(searching.search(config, chosen[-1], cluster, devices, layout))
            return
        programs = [_show(compiled.compile_train_step(config, p, devices), layout, cluster)
                    for p in chosen]  # fmt: skip
        if rows and config.trainer != "reward":
            length = chosen[-1].length
            step = compiled.compile_decode_step(config, rows, length, devices)
            programs.append(_show(step, layout, cluster))
        write({"topology": values.topology, "mesh": dataclasses.asdict(layout),
               "usable_bytes": cluster.chip.device_usable, "programs": programs})  # fmt: skip


def _choose(phases: Sequence[Any], number: int | None) -> Sequence[Any]:
    if number is None:
        return phases
    if not 1 <= number <= len(phases):
        raise UserError(f"--phase={number}: the config has phases 1 to {len(phases)}.")
    return phases[number - 1 : number]


def _head(name: str, cluster: Cluster, layout: MeshConfig) -> str:

    axes = [
        f"{a} {n}" for a, n in dataclasses.asdict(layout).items() if isinstance(n, int) and n > 1
    ]
    usable = cluster.chip.device_usable / GIGABYTE
    return (
        f"{name}: {cluster.devices} devices of {usable:.2f} GB ({', '.join(axes) or 'one device'})"
    )


def _show(step: Program | TooLarge, layout: MeshConfig, cluster: Cluster) -> dict[str, Any]:
    """Prints a program, and gives it as what JSON takes."""
    from llm_jax.scaling.compiled import TooLarge
    from llm_jax.scaling.roofline import roofline

    if isinstance(step, TooLarge):
        needed = "more" if step.needed is None else f"{step.needed / GIGABYTE:.2f} GB at least"
        print(f"\n{step.name}: does not fit, needs {needed} (compiled in {step.seconds:.0f} s)")
        return {"name": step.name, "fits": False, "needed_bytes": step.needed}
    times = roofline(step, layout, cluster)
    print("\n" + "\n".join(_lines(step, times, cluster)))
    fits = step.memory.peak <= cluster.chip.device_usable
    return {**dataclasses.asdict(step), "fits": fits, "roofline": dataclasses.asdict(times),
            "roofline_seconds": times.seconds}  # fmt: skip


def _lines(step: Program, times: Any, cluster: Cluster) -> Iterator[str]:
    memory = step.memory
    verdict = "fits" if memory.peak <= cluster.chip.device_usable else "does not fit"
    yield (
        f"{step.name}: {memory.peak / GIGABYTE:.2f} GB at the peak, {verdict} "
        f"(compiled in {step.seconds:.0f} s)"
    )
    parts = {
        "parameters": memory.parameters,
        "optimiser": memory.optimizer,
        "gradients": memory.gradients,
        "reference": memory.beside,
        "inputs": memory.other,
        "activations and the rest": memory.activations,
    }
    held = ", ".join(f"{name} {size / GIGABYTE:.2f}" for name, size in parts.items() if size > 5e6)
    yield f"  GB a device    {held}"
    if memory.host:
        yield f"  GB of a host   {memory.host / GIGABYTE:.2f} a device"
    yield (
        f"  arithmetic     {step.flops / 1e12:,.2f} TFLOP, {step.model_flops / 1e12:,.2f} of them "
        f"the model's: {_seconds(times.compute)}"
    )
    yield f"  memory         {step.traffic / GIGABYTE:,.1f} GB: {_seconds(times.memory)}"
    for axes, seconds in times.links.items():
        yield f"  links          {axes}: {_seconds(seconds)}"
    for exchange in step.collectives:
        yield (
            f"    {exchange.kind:<18} {' x '.join(exchange.axes):<14} {exchange.count:>8,.0f} times"
            f" {exchange.bytes / GIGABYTE:>10,.3f} GB"
        )
    for name, count in step.kernels.items():
        yield f"    kernel {name}, {count:,.0f} times"
    yield (
        f"  roofline       {_seconds(times.seconds)}, bound by {times.bound}; MFU {times.mfu:.0%}"
    )


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.2f} ms"
