"""Memory, time, money and checkpoints of a pre-training config, by formulas on paper.

    python -m tools.estimate paper --config=configs/pretrain.py:size=llama2-7b --chip=v5e --chips=16
    python -m tools.estimate paper --config=... --chips=v5p-128 --utilisation=0.5 --price=4.2

The mesh is the config's; `python -m tools.estimate plan` finds one. Nothing is compiled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, get_args

from absl import flags

from llm_jax.errors import UserError

if TYPE_CHECKING:
    from llm_jax.mesh import MeshConfig
    from llm_jax.scaling.planner import Job
    from llm_jax.scaling.presets import Cluster

SECONDS_A_DAY = 24 * 3600


def define_flags() -> flags.FlagValues:
    values = flags.FlagValues()
    flags.DEFINE_string("config", None, "a pre-training config", flag_values=values)
    flags.DEFINE_string("chip", None, "a chip, such as v5e or h100", flag_values=values)
    flags.DEFINE_string("chips", None, "how many, or a cluster: v5p-128", flag_values=values)
    flags.DEFINE_integer("length", None, "tokens a row; the longest phase's", flag_values=values)
    flags.DEFINE_integer("batch", None, "rows of the global batch", flag_values=values)
    flags.DEFINE_float("tokens", None, "of the whole run; the phases'", flag_values=values)
    flags.DEFINE_float("utilisation", 0.4, "share of the peak in training", flag_values=values)
    flags.DEFINE_float("price", None, "of a chip for an hour, in any money", flag_values=values)
    flags.DEFINE_float(
        "write_gigabytes", 2.0, "of a checkpoint that all hosts write a second", flag_values=values
    )
    flags.DEFINE_string("json", None, "also write everything as JSON", flag_values=values)
    return values


def main(values: flags.FlagValues, overrides: Sequence[str] = ()) -> None:
    from llm_jax.mesh import resolve
    from llm_jax.scaling.divisibility import batch_shards, check_mesh
    from llm_jax.step import fewest_parts
    from tools.bench.summary import write_json
    from tools.estimate.jobs import read_cluster, read_job

    if not 0 < values.utilisation <= 1:
        raise UserError(f"--utilisation={values.utilisation} must be above 0 and at most 1.")
    if not values.write_gigabytes > 0:
        raise UserError(f"--write_gigabytes={values.write_gigabytes} must be positive.")
    cluster = read_cluster(values.chip, values.chips)
    job, config = read_job(values, overrides)
    mesh = resolve(config.mesh, cluster.devices)
    check_mesh(job.model, mesh, job.length, job.batch)
    rows = job.batch // batch_shards(mesh)
    parts = fewest_parts(rows, job.length, config.step.micro_batch_tokens)
    tokens = values.tokens or sum(
        phase.tokens or (phase.steps or 0) * phase.length * phase.batch for phase in config.phases
    )
    with write_json(values.json) as write:
        found = {
            "training": _training(job, cluster, tokens, values.utilisation, values.price),
            "memory": _memory(job, cluster, mesh, parts),
            "checkpoints": _checkpoints(job, cluster, mesh, values.write_gigabytes * 1e9),
            "generation": _generation(job),
        }
        print("\n\n".join(_table(title, rows) for title, rows in found.items()))
        write({title: {row.name: row.value for row in rows} for title, rows in found.items()})


@dataclasses.dataclass(frozen=True)
class Row:
    """One figure: its name, its value in plain units, and how it is shown."""

    name: str
    value: float | str
    shown: str


def _training(
    job: Job, cluster: Cluster, tokens: float, utilisation: float, price: float | None
) -> list[Row]:
    from llm_jax.models.size import active_parameter_count, flops_per_token, parameter_count
    from llm_jax.scaling import paper

    parameters, active = parameter_count(job.model), active_parameter_count(job.model)
    flops = flops_per_token(job.model, job.length) * tokens
    rule = paper.training_flops(active, tokens)
    hours = paper.chip_hours(flops, cluster.chip.flops, utilisation)
    days = paper.training_seconds(flops, cluster.chips * cluster.chip.flops * utilisation)
    lifetimes = paper.reading_lifetimes(tokens)
    rows = [
        Row("parameters", parameters, f"{parameters:,}"),
        Row("tokens", tokens, f"{tokens:,.0f}, {tokens / active:.3g} a parameter"),
        Row("compute-optimal tokens", paper.optimal_tokens(active),
            f"{paper.optimal_tokens(active):,.0f}, {paper.TOKENS_A_PARAMETER} a parameter"),
        Row("FLOPs, 6 N D", rule, f"{rule:.3g}"),
        Row("FLOPs with attention", flops, f"{flops:.3g} at length {job.length:,}"),
        Row("chip hours", hours,
            f"{hours:,.0f} of {cluster.chip.name} at {utilisation:.0%} of its peak"),
        Row("days", days / SECONDS_A_DAY, f"{days / SECONDS_A_DAY:,.1f} on {cluster.chips} chips"),
        Row("reading lifetimes", lifetimes,
            f"{lifetimes:,.1f}, each {paper.READING_YEARS} years of {paper.READING_HOURS_A_DAY} "
            f"hours a day, at {paper.WORDS_A_MINUTE} words a minute of "
            f"{paper.TOKENS_A_WORD:.2f} tokens"),
    ]  # fmt: skip
    if active != parameters:
        rows.insert(1, Row("active parameters", active, f"{active:,}, which N counts"))
    if price is not None:
        rows.append(Row("cost", hours * price, f"{hours * price:,.0f}"))
    return rows


def _memory(job: Job, cluster: Cluster, mesh: MeshConfig, micro_batches: int) -> list[Row]:
    from llm_jax.mesh import MESH_AXES
    from llm_jax.scaling.memory import training_memory

    memory = training_memory(
        job.model, job.optimizer, mesh, length=job.length, batch=job.batch,
        micro_batches=micro_batches, chunk=job.chunk, platform=cluster.platform,
    )  # fmt: skip
    axes = [f"{axis} {getattr(mesh, axis)}" for axis in MESH_AXES if getattr(mesh, axis) > 1]
    rows = [
        Row("mesh", ", ".join(axes), ", ".join(axes) or "one device"),
        Row("batch", job.batch, f"{job.batch} rows of {job.length:,} in {micro_batches} "
            f"micro-batch{'es' * (micro_batches > 1)}, remat {job.model.remat}"),
        *(_bytes(f"always: {name}", size) for name, size in memory.state.items()),
    ]  # fmt: skip
    for point, parts in memory.points.items():
        rows += [_bytes(f"{point}: {name}", size) for name, size in parts.items()]
    usable = cluster.chip.device_usable
    verdict = "it fits" if memory.peak <= usable else "it does not fit"
    peak = _bytes(f"most, at the {memory.fullest}", memory.peak)
    rows.append(dataclasses.replace(
        peak, shown=f"{peak.shown} of {usable / 2**30:.2f} that XLA has: {verdict}"
    ))  # fmt: skip
    return rows


def _checkpoints(job: Job, cluster: Cluster, mesh: MeshConfig, write_rate: float) -> list[Row]:
    from llm_jax.interop.plan import plan
    from llm_jax.scaling import paper
    from llm_jax.scaling.memory import checkpoint_bytes

    size = checkpoint_bytes(plan(job.model, mesh), job.optimizer)
    seconds = size / write_rate
    failures = paper.seconds_between_failures(cluster.chips)
    interval = paper.save_interval(seconds, failures)
    lost = paper.lost_share(interval, seconds, failures)
    return [
        _bytes("a checkpoint", size),
        Row("seconds to write", seconds, f"{seconds:,.1f}, if training waits for all of it"),
        Row("hours between failures", failures / 3600, f"{failures / 3600:,.0f}, of all chips"),
        Row("best minutes between saves", interval / 60, f"{interval / 60:,.0f} (Young)"),
        Row("share of time lost", lost, f"{lost:.2%}"),
    ]


def _generation(job: Job) -> list[Row]:
    from llm_jax.scaling.memory import WeightKind, cache_bytes, weight_bytes, windowed_cache_bytes

    rows = [_bytes(f"weights in {k}", weight_bytes(job.model, k)) for k in get_args(WeightKind)]
    whole = cache_bytes(job.model, 1, job.length)
    rows.append(_bytes(f"cache of a row of {job.length:,}", whole))
    windowed = windowed_cache_bytes(job.model, 1, job.length)
    if windowed < whole:
        rows.append(_bytes("of which windows see", windowed))
    return rows


def _bytes(name: str, size: float) -> Row:
    return Row(name, size, f"{size / 2**30:,.3f} GiB")


def _table(title: str, rows: Sequence[Row]) -> str:
    width = max(len(row.name) for row in rows)
    return "\n".join([title, *(f"  {row.name:<{width}}  {row.shown}" for row in rows)])
