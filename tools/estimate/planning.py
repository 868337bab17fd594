"""Lays a pre-training config out over a cluster: which mesh, and why.

    python -m tools.estimate plan --config=configs/pretrain.py:size=llama2-7b --chips=v5e-16
    python -m tools.estimate plan --config=... --chips=v5p-128 --length=131072 --batch=8

The config's own mesh does not count. Put the lines of the answer into the config, or let
configs/pretrain.py do it: `:size=llama2-7b,mesh=v5e-16`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from absl import flags

from llm_jax.errors import UserError


def define_flags() -> flags.FlagValues:
    values = flags.FlagValues()
    flags.DEFINE_string("config", None, "a pre-training config", flag_values=values)
    flags.DEFINE_string(
        "chips", None, "a cluster, such as v5e-16, v5p-128, 2xv5e-256 or h100x64",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_integer("length", None, "tokens a row; the longest phase's", flag_values=values)
    flags.DEFINE_integer("batch", None, "rows of the global batch", flag_values=values)
    flags.DEFINE_string("json", None, "also write the answer as JSON", flag_values=values)
    return values


def main(values: flags.FlagValues, overrides: Sequence[str] = ()) -> None:
    from llm_jax.mesh import MESH_AXES
    from llm_jax.scaling.planner import plan_mesh
    from llm_jax.scaling.presets import find_cluster
    from tools.bench.summary import write_json
    from tools.estimate.jobs import read_job

    if values.chips is None:
        raise UserError("name the cluster by --chips, such as --chips=v5e-16 or --chips=h100x64.")
    job, _ = read_job(values, overrides)
    with write_json(values.json) as write:
        found = plan_mesh(job, find_cluster(values.chips))
        first, *reasons = found.reasons()
        print(first)
        print("\n".join(f"  {reason}" for reason in reasons))
        settings = [f"--config.mesh.{axis}={getattr(found.mesh, axis)}" for axis in MESH_AXES]
        if found.micro_batch_tokens is not None:
            settings.append(f"--config.step.micro_batch_tokens={found.micro_batch_tokens}")
        print(f"\n{' '.join(settings)}")
        write(
            {
                "cluster": values.chips,
                "mesh": dataclasses.asdict(found.mesh),
                "micro_batch_tokens": found.micro_batch_tokens,
                "memory_bytes": found.memory.peak,
                "step_seconds": found.time.total,
                "reasons": [first, *reasons],
            }
        )
