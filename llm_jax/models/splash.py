"""A chunk of queries against a chunk of keys, by the kernels of JAX's splash attention (for TPU).

The kernels' public face has a gradient only as a whole: it takes no logsumexp that was merged over
several chunks of keys, and makes its schedule from a mask that it walks through on the host. So
this file calls the kernels themselves; no other does. Their signatures are the same in jax 0.10.0,
0.10.1 and 0.10.2.

Legend: B batch, K key/value heads, G query heads per key/value head, N = K·G, C query time,
S key time, H head dimension, I blocks of queries, J blocks of keys.

The interface is that of `models.blockwise`, which says what the arguments mean.
"""

from __future__ import annotations

import dataclasses
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

BLOCK = 128  # the kernels' lane width: every chunk is a multiple of it


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
    """See `blockwise.forward`; the kernel rounds the output to the dtype of q."""
    kernels = _kernels()
    band = Band.of(q_BKGCH.shape[3], k_BKSH.shape[2], offset, window)
    schedule = _mask_info(band, band.keys_of_queries())

    def row(q_NCH: jax.Array, k_KSH: jax.Array, v_KSH: jax.Array, ids: Any) -> Any:
        return kernels._splash_attention_forward(
            schedule, q_NCH, k_KSH, v_KSH, ids,
            sinks=None,
            mask_value=kernels.DEFAULT_MASK_VALUE,
            is_mqa=False,
            block_sizes=kernels.BlockSizes(block_q=band.block_q, block_kv=band.block_kv),
            residual_checkpoint_name=None,
            save_residuals=True,
            mask_function=band.mask_function,
            attn_logits_soft_cap=soft_cap,
            interpret=interpret,
        )  # fmt: skip

    out_BNCH, (logsumexp_BNC,) = jax.vmap(row)(
        _join_heads(q_BKGCH), k_BKSH, v_BKSH, _segment_ids(segments)
    )
    # A query none of whose blocks has run has a sum of 0, and 0 / 0 for an output.
    out_BNCH = jnp.where(jnp.isneginf(logsumexp_BNC)[..., None], 0, out_BNCH)
    shape = q_BKGCH.shape
    return out_BNCH.reshape(shape).astype(jnp.float32), logsumexp_BNC.reshape(shape[:-1])


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
    """See `blockwise.backward`; the kernels round each gradient to the dtype of its operand."""
    kernels = _kernels()
    band = Band.of(q_BKGCH.shape[3], k_BKSH.shape[2], offset, window)
    by_queries = _mask_info(band, band.keys_of_queries())
    by_keys = _mask_info(band, band.queries_of_keys())
    layout = kernels.QKVLayout.HEAD_DIM_MINOR
    settings: dict[str, Any] = {
        "bq": band.block_q,
        "bkv": band.block_kv,
        "is_mqa": False,
        "mask_value": kernels.DEFAULT_MASK_VALUE,
        "attn_logits_soft_cap": soft_cap,
        "q_layout": layout,
        "k_layout": layout,
        "v_layout": layout,
        "mask_function": band.mask_function,
        "interpret": interpret,
    }

    def row(q_NCH: Any, k_KSH: Any, v_KSH: Any, ids: Any, *of_queries: Any) -> Any:
        operands = (q_NCH, k_KSH, v_KSH, ids, None, *of_queries)
        dq_NCH = kernels._splash_attention_bwd_dq(*operands, mask_info=by_queries, **settings)
        _, dk_KSH, dv_KSH = kernels._splash_attention_bwd_dkv(
            *operands, mask_info=by_keys, bkv_compute=band.block_kv, use_fused_bwd_kernel=False,
            **settings,
        )  # fmt: skip
        return dq_NCH, dk_KSH, dv_KSH

    d_out_BKGCH = d_out_BKGCH.astype(q_BKGCH.dtype)
    of_queries = (_join_heads(x) for x in (logsumexp_BKGC, d_out_BKGCH, weighted_BKGC))
    dq_BNCH, dk_BKSH, dv_BKSH = jax.vmap(row)(
        _join_heads(q_BKGCH), k_BKSH, v_BKSH, _segment_ids(segments), *of_queries
    )
    dq_BKGCH = dq_BNCH.reshape(q_BKGCH.shape)
    return dq_BKGCH.astype(jnp.float32), dk_BKSH.astype(jnp.float32), dv_BKSH.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Band:
    """What consecutive queries see of consecutive keys, block by block.

    The blocks that one block sees are a run of consecutive ones. The ends of the run follow from
    the offset, which may be known at run time only; the mask itself is never made whole.
    """

    queries: int
    keys: int
    block_q: int
    block_kv: int
    offset: jax.Array | int | None
    window: int | None

    @classmethod
    def of(cls, queries: int, keys: int, offset: Any, window: int | None) -> Band:
        return cls(queries, keys, _block(queries), _block(keys), offset, window)

    @property
    def start(self) -> jax.Array | int:
        return 0 if self.offset is None else self.offset

    @property
    def mask_function(self) -> Any:
        """(places of queries, places of keys) → bool, of one shape; None: every query sees all."""
        if self.offset is None:
            return None
        window = self.window
        if window is None:
            return lambda q, k: q >= k
        return lambda q, k: (q >= k) & (q - k < window)

    def keys_of_queries(self) -> tuple[jax.Array, jax.Array]:
        """Which key blocks each query block goes through: (index, whether it is seen), [I, J]."""
        begin_I = self.start + jnp.arange(0, self.queries, self.block_q)
        first_I = jnp.zeros_like(begin_I)
        if self.window is not None:
            first_I = begin_I - (self.window - 1)
        last_I = begin_I + self.block_q - 1
        return self._run(first_I, last_I, self.keys, self.block_kv, self.block_q)

    def queries_of_keys(self) -> tuple[jax.Array, jax.Array]:
        """Which query blocks each key block goes through: (index, whether it is seen), [I, J]."""
        begin_J = jnp.arange(0, self.keys, self.block_kv) - self.start
        last_J = jnp.full_like(begin_J, self.queries)
        if self.window is not None:
            last_J = begin_J + self.block_kv - 1 + (self.window - 1)
        blocks, seen = self._run(begin_J, last_J, self.queries, self.block_q, self.block_kv)
        return blocks.T, seen.T

    def _run(
        self, first: jax.Array, last: jax.Array, length: int, block: int, other_block: int
    ) -> tuple[jax.Array, jax.Array]:
        """The blocks with places from `first` to `last`, one run a row, as wide as any can be."""
        blocks = length // block
        width = blocks
        if self.window is not None:
            width = min(blocks, (other_block + self.window - 3) // block + 2)
        first = jnp.maximum(first, 0)[:, None] // block
        last = jnp.minimum(last, length - 1)[:, None] // block
        index = first + jnp.arange(width)
        # Past its end a run stays at its last block, so that nothing more is fetched.
        return jnp.clip(jnp.minimum(index, last), 0, blocks - 1), index <= last


def _mask_info(band: Band, run: tuple[jax.Array, jax.Array]) -> Any:
    """The kernels' schedule: every block that runs is masked by the mask function."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info

    if band.offset is None:
        return splash_attention_mask_info.MaskInfo(None, None, None, None, None)
    blocks, seen = (x.astype(jnp.int32)[None] for x in run)
    places_C: Any = band.start + jnp.arange(band.queries, dtype=jnp.int32)
    return splash_attention_mask_info.MaskInfo(blocks, None, seen, None, places_C)


def _kernels() -> ModuleType:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

    return splash_attention_kernel


def _block(length: int) -> int:
    """The largest block that divides a chunk keeps the kernels busy; past 512 it gains nothing."""
    return next(size for size in (512, 256, BLOCK) if length % size == 0)


def _join_heads(x_BKGC: jax.Array) -> jax.Array:
    return x_BKGC.reshape(x_BKGC.shape[0], -1, *x_BKGC.shape[3:])


def _segment_ids(segments: Any) -> Any:
    return None if segments is None else _kernels().SegmentIds(*segments)
