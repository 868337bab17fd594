"""The KV cache: a struct passed into `apply` and out again.

Legend: B batch, K key/value heads, S slots, T new tokens, H head dimension, L layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import flax.struct
import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from llm_jax.models.config import ModelConfig

LayerCache = tuple[jax.Array, jax.Array]  # keys and values, each [B, K, S, H]


@flax.struct.dataclass
class KVCache:
    """Keys and values of the tokens seen so far, slot by slot.

    layers: keys and values in the computation dtype: a tuple with one (keys_BKSH, values_BKSH) per
      layer; with `scan_layers` one tuple per place in the attention pattern, stacked over its
      repetitions, [repetition, B, K, S, H].
    segment_ids: int32 [batch, slots]; 0 marks an empty or padding slot, which nothing sees.
    lengths: int32 [batch], tokens held; a row's next token goes to slot lengths[row].

    Rows may be ragged: give padding segment id 0, at the right end of a row only. A padding
    token is written but not counted, so the row's next token takes its slot. No row may grow past
    the slots: lengths + T <= S is the caller's to keep.
    """

    layers: tuple[Any, ...]
    segment_ids: jax.Array
    lengths: jax.Array


def init_cache(config: ModelConfig, batch: int, length: int) -> KVCache:
    """An empty cache with room for `length` tokens a row."""
    shape: tuple[int, ...] = (batch, config.kv_heads, length, config.resolved_head_dim)
    entries = config.num_layers
    if config.scan_layers:
        entries = len(config.windows)
        shape = (config.num_layers // entries, *shape)
    return KVCache(
        layers=tuple(
            (jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype)) for _ in range(entries)
        ),
        segment_ids=jnp.zeros((batch, length), jnp.int32),
        lengths=jnp.zeros((batch,), jnp.int32),
    )


def write(slots: jax.Array, new: jax.Array, lengths: jax.Array, axis: int) -> jax.Array:
    """Puts `new` at each row's own place: row b at lengths[b] along `axis` of the row."""

    def row(slots: jax.Array, new: jax.Array, length: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(slots, new.astype(slots.dtype), length, axis)

    return jax.vmap(row)(slots, new, lengths)
