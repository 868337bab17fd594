"""What flows through the house: small structs of arrays. Legend: B batch, T time."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

Array = Any  # jax.Array or numpy.ndarray; structs hold either side of the transfer


@flax.struct.dataclass
class Batch:
    """Packed token rows.

    tokens: int32 [batch, time], the inputs.
    targets: int32 [batch, time], the token that follows each input in the same document.
    loss_weights: float32 [batch, time], 0 where the target does not count (padding, prompts).
    segment_ids: int32 [batch, time], 1, 2, ... per document within a row; 0 is padding.
    positions: int32 [batch, time], restarting at 0 with every segment.
    """

    tokens: Array
    targets: Array
    loss_weights: Array
    segment_ids: Array
    positions: Array


@flax.struct.dataclass
class Mean:
    """A mean that is not divided yet, so that sums over micro-batches and devices stay exact.

    total: float32 [], sum of the weighted values. count: float32 [], sum of the weights.
    """

    total: Array
    count: Array

    def __add__(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.count + other.count)

    def value(self) -> jax.Array:
        """total / count, and 0 (never NaN) where nothing was counted."""
        return jnp.where(self.count > 0, self.total / jnp.where(self.count > 0, self.count, 1), 0.0)


@flax.struct.dataclass
class TrainState:
    """step: int32 []; params: dict of float arrays; opt_state: optax state; rng: typed PRNG key."""

    step: Array
    params: Any
    opt_state: Any
    rng: Array
