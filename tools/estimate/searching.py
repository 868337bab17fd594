"""`--search`: the cheapest rematerialisation that fits, and the largest batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from llm_jax.data.phases import Phase
from llm_jax.mesh import MeshConfig
from llm_jax.models.remat import Remat
from llm_jax.scaling.compiled import Program, TooLarge, compile_train_step
from llm_jax.scaling.divisibility import batch_shards
from llm_jax.scaling.presets import Cluster

# From the least to compute again to the least to keep.
LADDER: tuple[Remat, ...] = (
    "none",
    "save_products",
    "save_qkv_attention",
    "save_attention",
    "full",
    "offload",
)


def search(
    config: Any,
    phase: Phase,
    cluster: Cluster,
    devices: Sequence[Any],
    layout: MeshConfig,
) -> dict[str, Any]:
    """Tries batches of a phase, a row a batch shard and then twice as many each time, and for each
    the policies from the cheapest that fitted the batch before. Prints a line a trial.

    A larger batch needs more memory under every policy, so none is tried twice in vain.

    Returns:
      For JSON: all trials, the cheapest policy of the config's own batch, the largest batch and the
      cheapest policy that fits it; None where none fits.
    """
    shards = batch_shards(layout)
    usable = cluster.chip.device_usable
    trials: list[dict[str, Any]] = []
    policies = list(LADDER)

    def fits(batch: int, remat: Remat) -> bool:
        model = dataclasses.replace(config.model, remat=remat)
        step = compile_train_step(
            dataclasses.replace(config, model=model),
            dataclasses.replace(phase, batch=batch),
            devices,
        )
        peak = _peak(step)
        fitting = isinstance(step, Program) and step.memory.peak <= usable
        needed = "more than there is" if peak is None else f"{peak / 1e9:.2f} GB"
        print(
            f"  {batch:>6,} rows, remat {remat:<19} {needed}: {'fits' if fitting else 'too large'}"
        )
        trials.append({"batch": batch, "remat": remat, "peak_bytes": peak, "fits": fitting})
        return fitting

    def cheapest(batch: int) -> Remat | None:
        while policies and not fits(batch, policies[0]):
            policies.pop(0)
        return policies[0] if policies else None

    own = largest = None
    batch = shards
    while (found := cheapest(batch)) is not None:
        largest = {"batch": batch, "remat": found}
        if batch <= phase.batch:
            own = largest
        batch *= 2
    print(f"largest batch: {_say(largest)}")
    print(f"of up to the config's {phase.batch:,} rows: {_say(own)}")
    return {"trials": trials, "largest": largest, "config": own}


def _peak(step: Program | TooLarge) -> float | None:
    return step.memory.peak if isinstance(step, Program) else step.needed


def _say(found: dict[str, Any] | None) -> str:
    return "none fits" if found is None else f"{found['batch']:,} rows with remat {found['remat']}"
