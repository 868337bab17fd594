"""A chunk of queries against a chunk of keys, to be merged with what other chunks of keys give.

Legend: B batch, K key/value heads, G query heads per key/value head, C query time, S key time,
H head dimension, N blocks of queries.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.models.attention import MASKED_SCORE, attention_mask
from llm_jax.models.product import batched_product

QUERIES = 1024  # whose scores are held at once, at most


def forward(
    q_BKGCH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    segments: Any,
    *,
    offset: jax.Array | int | None,
    window: int | None,
    soft_cap: float | None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Attention to these keys alone, float32 [B, K, G, C, H], and its logsumexp, float32 [B, K, G,
    C]. Where a query sees none of them, the latter is below that of any query that sees one.

    Args:
      q_BKGCH: queries, scaled. k_BKSH, v_BKSH: keys and values.
      segments: int32 ([B, C], [B, S]) of queries and keys, or None.
      offset: the first query's place minus the first key's, int32 []; places are consecutive in
        each chunk. None: all keys are seen, as far as their places go.
      window: see `attention`; without an offset None.
      soft_cap: see `attention`.
      interpret: nothing here.
    """

    def block(operands: Any) -> tuple[jax.Array, jax.Array]:
        q_BKGCH, ids_BC, offset = operands
        scores_BKGCS = _scores(q_BKGCH, k_BKSH, _with(segments, ids_BC), offset, window, soft_cap)
        highest_BKGC1 = jnp.max(scores_BKGCS, axis=-1, keepdims=True)
        weights_BKGCS = jnp.exp(scores_BKGCS - highest_BKGC1)
        total_BKGC1 = jnp.sum(weights_BKGCS, axis=-1, keepdims=True)
        out_BKGCH = _weigh(weights_BKGCS, v_BKSH) / total_BKGC1
        return out_BKGCH, (highest_BKGC1 + jnp.log(total_BKGC1))[..., 0]

    blocks = _blocks(q_BKGCH.shape[3])
    operands = _queries(blocks, q_BKGCH, segments, offset)
    out_NBKGCH, logsumexp_NBKGC = jax.lax.map(block, operands)
    return whole(out_NBKGCH, 3), whole(logsumexp_NBKGC, 3)


def backward(
    q_BKGCH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    segments: Any,
    logsumexp_BKGC: jax.Array,
    d_out_BKGCH: jax.Array,
    weighted_BKGC: jax.Array,
    *,
    offset: jax.Array | int | None,
    window: int | None,
    soft_cap: float | None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What these keys add to the gradients of q, k and v, float32.

    Args:
      logsumexp_BKGC: over all keys of all chunks.
      d_out_BKGCH: the gradient of the merged output.
      weighted_BKGC: float32, Σ_H of the merged output times its gradient (arXiv:2205.14135).
      and those of `forward`.
    """

    def block(sums: Any, operands: Any) -> Any:
        (q_BKGCH, ids_BC, offset), logsumexp_BKGC, d_out_BKGCH, weighted_BKGC = operands

        def attend(q_BKGCH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array) -> Any:
            ids = _with(segments, ids_BC)
            scores_BKGCS = _scores(q_BKGCH, k_BKSH, ids, offset, window, soft_cap)
            weights_BKGCS = jnp.exp(scores_BKGCS - logsumexp_BKGC[..., None])
            return _weigh(weights_BKGCS, v_BKSH), jnp.sum(weights_BKGCS, axis=-1)

        # The softmax's own gradient takes `weighted` off that of every weight.
        _, pull = jax.vjp(attend, q_BKGCH, k_BKSH, v_BKSH)
        dq_BKGCH, *added = pull((d_out_BKGCH.astype(jnp.float32), -weighted_BKGC))
        return [a + b for a, b in zip(sums, added, strict=True)], dq_BKGCH

    blocks = _blocks(q_BKGCH.shape[3])
    operands = (
        _queries(blocks, q_BKGCH, segments, offset),
        *(chunks(x, 3, blocks) for x in (logsumexp_BKGC, d_out_BKGCH, weighted_BKGC)),
    )
    zeros = [jnp.zeros(x.shape, jnp.float32) for x in (k_BKSH, v_BKSH)]
    (dk_BKSH, dv_BKSH), dq_NBKGCH = jax.lax.scan(block, zeros, operands)
    return whole(dq_NBKGCH, 3).astype(jnp.float32), dk_BKSH, dv_BKSH


def merge(
    out: jax.Array, logsumexp: jax.Array, more_out: jax.Array, more_logsumexp: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Two results of `forward` for the same queries and different keys, as one for all the keys."""
    merged = jnp.logaddexp(logsumexp, more_logsumexp)
    out = out * jnp.exp(logsumexp - merged)[..., None]
    return out + more_out * jnp.exp(more_logsumexp - merged)[..., None], merged


def _scores(
    q_BKGCH: jax.Array,
    k_BKSH: jax.Array,
    segments: Any,
    offset: jax.Array | None,
    window: int | None,
    soft_cap: float | None,
) -> jax.Array:
    B, K, G, C, H = q_BKGCH.shape
    scores_BKNS = batched_product(q_BKGCH.reshape(B, K, G * C, H), k_BKSH, True)
    scores_BKGCS = scores_BKNS.reshape(B, K, G, C, -1)
    if soft_cap is not None:
        scores_BKGCS = soft_cap * jnp.tanh(scores_BKGCS / soft_cap)
    if offset is not None:
        places_1C = (offset + jnp.arange(C))[None]
        ids_BC, ids_BS = (None, None) if segments is None else segments
        mask_BCS = attention_mask(places_1C, jnp.arange(k_BKSH.shape[2]), ids_BC, ids_BS, window)
    elif segments is not None:
        mask_BCS = segments[0][:, :, None] == segments[1][:, None, :]
    else:
        return scores_BKGCS
    return jnp.where(mask_BCS[:, None, None], scores_BKGCS, MASKED_SCORE)


def _weigh(weights_BKGCS: jax.Array, v_BKSH: jax.Array) -> jax.Array:
    B, K, G, C, S = weights_BKGCS.shape
    weights_BKNS = weights_BKGCS.reshape(B, K, G * C, S).astype(v_BKSH.dtype)
    return batched_product(weights_BKNS, v_BKSH).reshape(B, K, G, C, -1)


def _blocks(queries: int) -> int:
    """The fewest equal blocks that are not too long."""
    fewest = -(-queries // QUERIES)
    return next(blocks for blocks in range(fewest, queries + 1) if queries % blocks == 0)


def _queries(blocks: int, q_BKGCH: jax.Array, segments: Any, offset: Any) -> Any:
    """Queries, their segments and offsets, block by block."""
    ids_NBC = None if segments is None else chunks(segments[0], 1, blocks)
    offsets_N = None
    if offset is not None:
        offsets_N = offset + jnp.arange(blocks) * (q_BKGCH.shape[3] // blocks)
    return chunks(q_BKGCH, 3, blocks), ids_NBC, offsets_N


def _with(segments: Any, query_ids_BC: jax.Array | None) -> Any:
    return None if segments is None else (query_ids_BC, segments[1])


def chunks(x: jax.Array, axis: int, number: int) -> jax.Array:
    """[..., time, ...], time at `axis`, → [number, ..., time / number, ...]."""
    shape = (*x.shape[:axis], number, -1, *x.shape[axis + 1 :])
    return jnp.moveaxis(x.reshape(shape), axis, 0)


def whole(x: jax.Array, axis: int) -> jax.Array:
    """The inverse of `chunks`."""
    x = jnp.moveaxis(x, 0, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
