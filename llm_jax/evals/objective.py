"""An objective's loss and metrics on held-out rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from llm_jax import sharding
from llm_jax.evals.batching import BatchRows, padded_batches
from llm_jax.placement import to_devices
from llm_jax.step import Objective
from llm_jax.types import Mean


def jit_objective(objective: Objective, mesh: Mesh) -> Callable[[Any, Any], Any]:
    """The objective without dropout, for host batches: `(params, batch) → (loss, metrics)`."""
    rows = sharding.batch_sharding(mesh)
    jitted = jax.jit(
        lambda params, batch: objective(params, batch, None),  # type: ignore[arg-type]
        out_shardings=sharding.replicated(mesh),
    )
    return lambda params, batch: jitted(params, to_devices(batch, rows))


def evaluate_objective(
    objective: Callable[[Any, Any], tuple[Mean, dict[str, Mean]]],
    params: Any,
    rows: BatchRows,
    batch_size: int,
    max_rows: int,
) -> dict[str, float]:
    """Loss and metrics of an objective over at most `max_rows` rows, spread evenly over all.

    Args:
      objective: jitted, `(params, batch) → (loss, metrics)`, replicated.
    """
    sums: dict[str, Mean] = {}
    for _, batch in padded_batches(rows, spread(rows, max_rows), batch_size):
        loss, metrics = jax.device_get(objective(params, batch))
        for name, mean in {"loss": loss, **metrics}.items():
            mean = Mean(float(mean.total), float(mean.count))
            sums[name] = sums[name] + mean if name in sums else mean
    return {name: mean.total / mean.count for name, mean in sums.items() if mean.count}


def spread(rows: BatchRows, max_rows: int) -> list[int]:
    """Indices of at most `max_rows` rows, spread evenly over all."""
    count = min(max_rows, len(rows))
    return [i * len(rows) // count for i in range(count)]
