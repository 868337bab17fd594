"""Causal grouped-query attention: one interface, four backends.

Legend: B batch, K key/value heads, G query heads per key/value head, T query time, S key time,
H head dimension. Heads stand before time everywhere, so that both products are plain batched matrix
products with nothing to transpose in between.

A query sees a key that stands no later in the row, in the same segment, and fewer than `window`
places back (the query's own place counts). Padding is segment 0 and sees only padding: every
query has at least its own key, hence no row of the softmax is empty and nothing can become NaN.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.errors import UserError, did_you_mean
from llm_jax.models.product import batched_product
from llm_jax.models.remat import named
from llm_jax.sharding import spec

if TYPE_CHECKING:
    from llm_jax.models.config import ModelConfig

BACKENDS = ("einsum", "xla", "cudnn", "splash")

# Finite, so that the gradient through a masked score is 0 and not NaN.
MASKED_SCORE = -0.7 * float(np.finfo(np.float32).max)
SPLASH_BLOCK = 128  # the TPU kernel's lane width; its blocks are multiples of it


def attention(
    q_BKGTH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    *,
    backend: str,
    scale: float | None = None,
    query_segment_ids_BT: jax.Array | None = None,
    key_segment_ids_BS: jax.Array | None = None,
    query_places_BT: jax.Array | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    dropout: float = 0.0,
    dropout_rng: jax.Array | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Attention output [batch, kv_heads, group, time, head_dim] in the dtype of q.

    Scores and softmax are float32.

    Args:
      q_BKGTH: queries, already rotated.
      k_BKSH: keys, already rotated. v_BKSH: values.
      backend: one of `BACKENDS`.
      scale: what scores are multiplied by; None = 1 / √head_dim.
      query_segment_ids_BT, key_segment_ids_BS: int32, both or neither; 0 is padding.
      query_places_BT: int32 index of each query among the keys; None = 0, 1, 2, ... with T = S.
        Only the einsum backend takes it: the others compile the causal mask in.
      window: keys that a query sees at most, itself included; None = all before it.
      soft_cap: scores become soft_cap · tanh(score / soft_cap) (arXiv:2408.00118).
      dropout: probability of dropping an attention weight, with `dropout_rng`; einsum only.
      interpret: runs the splash kernel in the Pallas interpreter, on any platform.

    Raises:
      UserError: the backend cannot do what is asked.
    """
    check_backend(backend, dtype=q_BKGTH.dtype, soft_cap=soft_cap, dropout=dropout)
    if (query_segment_ids_BT is None) != (key_segment_ids_BS is None):
        raise ValueError("give segment ids for queries and keys, or for neither")
    if query_places_BT is not None and backend != "einsum":
        raise ValueError(f"attention backend {backend!r} takes no query_places: use einsum")
    segments = (query_segment_ids_BT, key_segment_ids_BS)
    scale = q_BKGTH.shape[-1] ** -0.5 if scale is None else scale
    if backend == "einsum":
        out_BKGTH = _einsum(
            q_BKGTH, k_BKSH, v_BKSH, segments, query_places_BT, scale, window, soft_cap, dropout,
            dropout_rng,
        )  # fmt: skip
        return named(out_BKGTH, "attention_output")
    if backend == "splash":
        return _splash(q_BKGTH, k_BKSH, v_BKSH, segments, scale, window, soft_cap, interpret)
    out_BKGTH = _dot_product_attention(q_BKGTH, k_BKSH, v_BKSH, segments, scale, window, backend)
    # The policies of `remat` know the outputs of both flash kernels by other means.
    return out_BKGTH if backend == "cudnn" else named(out_BKGTH, "attention_output")


def check_backend(backend: str, *, dtype: jax.typing.DTypeLike, soft_cap: float | None,
                  dropout: float) -> None:  # fmt: skip
    """Raises UserError where the backend cannot honour a setting."""
    if backend not in BACKENDS:
        raise UserError(
            f"model.attention_backend={backend!r} is unknown.{did_you_mean(backend, BACKENDS)}"
        )
    mend = "set model.attention_backend=einsum, or leave it at auto."
    if dropout and backend != "einsum":
        raise UserError(f"attention backend {backend!r} has no attention dropout: {mend}")
    if soft_cap is not None and backend in ("xla", "cudnn"):
        raise UserError(f"attention backend {backend!r} has no soft cap on scores: {mend}")
    if backend == "cudnn" and jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        raise UserError(
            f"attention backend 'cudnn' computes in 16 bits, not {jnp.dtype(dtype).name}: "
            "set model.dtype=bfloat16, or model.attention_backend=xla."
        )


def choose_backend(config: ModelConfig, platform: str) -> str:
    """The backend that a model uses on a platform ("cpu", "gpu" or "tpu"); made once and logged.

    "auto" is einsum on CPU (its heads-major products are the fastest there), and cuDNN's flash
    kernel on GPU and splash on TPU where they can do what the config asks.

    Raises:
      UserError: a backend named by the config does not exist on the platform or cannot do what the
        config asks.
    """
    settings: dict[str, Any] = {
        "dtype": config.dtype,
        "soft_cap": config.attention_soft_cap,
        "dropout": config.attention_dropout,
    }
    platform = {"cuda": "gpu", "rocm": "gpu"}.get(platform, platform)
    asked = config.attention_backend
    homes = {"cudnn": "gpu", "splash": "tpu"}
    if asked != "auto":
        check_backend(asked, **settings)
        if homes.get(asked, platform) != platform:
            raise UserError(
                f"attention backend {asked!r} runs on {homes[asked]} and this is {platform}: "
                "set model.attention_backend=auto."
            )
        return asked
    preferred = {"gpu": ("cudnn", "xla"), "tpu": ("splash",)}.get(platform, ())
    for backend in preferred:
        if backend == "cudnn" and (config.resolved_head_dim % 8 or config.resolved_head_dim > 128):
            continue  # what the kernel takes on every generation that has it
        try:
            check_backend(backend, **settings)
        except UserError:
            continue
        return backend
    return "einsum"


def attention_mask(
    query_places_BT: jax.Array,
    key_places_S: jax.Array,
    query_segment_ids_BT: jax.Array | None,
    key_segment_ids_BS: jax.Array | None,
    window: int | None,
) -> jax.Array:
    """True where a query sees a key, bool [batch or 1, time, key_time]."""
    back_BTS = query_places_BT[:, :, None] - key_places_S
    mask_BTS = back_BTS >= 0
    if window is not None:
        mask_BTS &= back_BTS < window
    if query_segment_ids_BT is not None and key_segment_ids_BS is not None:
        mask_BTS &= query_segment_ids_BT[:, :, None] == key_segment_ids_BS[:, None, :]
    return mask_BTS


def attention_entropy(
    q_BKGTH: jax.Array,
    k_BKSH: jax.Array,
    segment_ids_BT: jax.Array | None,
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
) -> jax.Array:
    """−Σ p log p of each query's attention weights, float32 [batch, kv_heads, group, time] in nats.

    It is 0 where all weight is on one key, and log n where the n keys that the query sees share it
    evenly. The arguments are those of `attention`, with as many keys as queries.
    """
    entropies = []
    for queries, keys, mask_BTS in _blocks(q_BKGTH, k_BKSH, (segment_ids_BT,) * 2, None, window):
        q, k = q_BKGTH[:, :, :, queries], k_BKSH[:, :, keys]
        shifted_BKGTS = _shifted_scores(q, k, mask_BTS, scale, soft_cap)
        weights_BKGTS = jnp.exp(shifted_BKGTS)
        total_BKGT = jnp.sum(weights_BKGTS, axis=-1)
        mean_BKGT = jnp.sum(weights_BKGTS * shifted_BKGTS, axis=-1) / total_BKGT
        entropies.append(jnp.log(total_BKGT) - mean_BKGT)
    return jnp.concatenate(entropies, axis=3)


def _einsum(q, k, v, segments, query_places_BT, scale, window, soft_cap, dropout, dropout_rng):
    """The explicit form, and the reference for the other backends."""
    blocks = list(_blocks(q, k, segments, query_places_BT, window))
    rngs: Any = [None] * len(blocks)
    if dropout_rng is not None:
        rngs = jax.random.split(dropout_rng, len(blocks))
    outputs = [
        _attend(
            q[:, :, :, queries], k[:, :, keys], v[:, :, keys], mask_BTS, scale, soft_cap, dropout,
            rng,
        )
        for (queries, keys, mask_BTS), rng in zip(blocks, rngs, strict=True)
    ]  # fmt: skip
    return outputs[0] if len(blocks) == 1 else jnp.concatenate(outputs, axis=3)


def _blocks(q, k, segments, query_places_BT, window) -> Iterator[tuple[slice, slice, jax.Array]]:
    """Queries in blocks, each with only the keys that it can see, and the mask between the two."""
    time = q.shape[3]
    blocks = 1 if query_places_BT is not None else _query_blocks(time)
    if query_places_BT is None:
        query_places_BT = jnp.arange(time)[None]
    for block in range(blocks):
        begin, end = block * time // blocks, (block + 1) * time // blocks
        first = 0 if window is None else max(0, begin - window + 1)
        last = end if blocks > 1 else k.shape[2]
        mask_BTS = attention_mask(
            query_places_BT[:, begin:end],
            jnp.arange(first, last),
            None if segments[0] is None else segments[0][:, begin:end],
            None if segments[1] is None else segments[1][:, first:last],
            window,
        )
        yield slice(begin, end), slice(first, last), mask_BTS


def _query_blocks(time: int) -> int:
    """Four blocks save 3/8 of the work; blocks under 128 queries lose more than that in calls."""
    return max(1, min(4, time // 128))


def _shifted_scores(q, k, mask_BTS, scale, soft_cap):
    """Scores of the keys that a mask lets each query see, less the highest of them, which keeps
    their exponentials finite."""
    batch, kv_heads, group, time, head_dim = q.shape
    q_BKNH = (q * scale).reshape(batch, kv_heads, group * time, head_dim)
    scores_BKNS = batched_product(q_BKNH, k, True)
    scores_BKGTS = scores_BKNS.reshape(batch, kv_heads, group, time, -1)
    if soft_cap is not None:
        scores_BKGTS = soft_cap * jnp.tanh(scores_BKGTS / soft_cap)
    scores_BKGTS = jnp.where(mask_BTS[:, None, None], scores_BKGTS, MASKED_SCORE)
    return scores_BKGTS - jax.lax.stop_gradient(jnp.max(scores_BKGTS, axis=-1, keepdims=True))


def _attend(q, k, v, mask_BTS, scale, soft_cap, dropout, dropout_rng):
    """Softmax attention over keys of which a mask says who sees them."""
    weights_BKGTS = jnp.exp(_shifted_scores(q, k, mask_BTS, scale, soft_cap))
    total_BKGT1 = jnp.sum(weights_BKGTS, axis=-1, keepdims=True)
    if dropout and dropout_rng is not None:
        keep = jax.random.bernoulli(dropout_rng, 1 - dropout, weights_BKGTS.shape)
        weights_BKGTS = jnp.where(keep, weights_BKGTS / (1 - dropout), 0)
    # Dividing the sum of values, not the weights: head_dim numbers a query instead of one for each
    # key, forward and backward.
    batch, kv_heads, group, time, keys = weights_BKGTS.shape
    weights_BKNS = weights_BKGTS.astype(v.dtype).reshape(batch, kv_heads, group * time, keys)
    out_BKGTH = batched_product(weights_BKNS, v).reshape(q.shape)
    return (out_BKGTH / total_BKGT1).astype(q.dtype)


def _dot_product_attention(q, k, v, segments, scale, window, implementation):
    """`jax.nn.dot_product_attention`, which wants time before heads, segments as a mask."""
    batch, kv_heads, group, time, head_dim = q.shape
    q_BTNH = q.reshape(batch, kv_heads * group, time, head_dim).swapaxes(1, 2)
    mask = None
    if segments[0] is not None:
        mask = (segments[0][:, :, None] == segments[1][:, None, :])[:, None]
    out_BTNH = jax.nn.dot_product_attention(
        q_BTNH,
        k.swapaxes(1, 2),
        v.swapaxes(1, 2),
        mask=mask,
        scale=scale,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation=implementation,
    )
    return out_BTNH.swapaxes(1, 2).reshape(q.shape)


def _splash(q, k, v, segments, scale, window, soft_cap, interpret):
    """The TPU kernel; rows are padded to whole blocks, and shards run it on their own heads."""
    # A Pallas call is opaque to the partitioner, so the sharding of its operands is spelt out.
    mesh = jax.sharding.get_abstract_mesh()
    local = functools.partial(
        _splash_local, scale=scale, window=window, soft_cap=soft_cap, interpret=interpret
    )
    if mesh.empty or mesh.size == 1:
        return local(q, k, v, segments)
    heads = ("activation_batch", "activation_heads")
    return jax.shard_map(
        local,
        in_specs=(spec(heads), spec(heads), spec(heads), spec(heads[:1])),
        out_specs=spec(heads),
        check_vma=False,
    )(q, k, v, segments)


def _splash_local(q, k, v, segments, scale, window, soft_cap, interpret):
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel,
        splash_attention_mask,
    )

    batch, kv_heads, group, time, head_dim = q.shape
    padding = -time % SPLASH_BLOCK
    length = time + padding

    def pad(x, axis):
        widths = [(0, padding if i == axis else 0) for i in range(x.ndim)]
        return jnp.pad(x, widths)

    q = pad(q * scale, 3).reshape(batch, kv_heads * group, length, head_dim)
    k, v = pad(k, 2), pad(v, 2)
    ids = None
    if segments[0] is not None:
        ids = splash_attention_kernel.SegmentIds(pad(segments[0], 1), pad(segments[1], 1))
    left = None if window is None else window - 1
    mask = splash_attention_mask.LocalMask((length, length), (left, 0), offset=0)
    # The largest block that divides the length keeps the kernel busy; past 512 it gains nothing.
    block = next(size for size in (512, 256, SPLASH_BLOCK) if length % size == 0)
    kernel = splash_attention_kernel.make_splash_mha_single_device(
        splash_attention_mask.MultiHeadMask([mask] * (kv_heads * group)),
        block_sizes=splash_attention_kernel.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        attn_logits_soft_cap=soft_cap,
        residual_checkpoint_name="attention_output",
        interpret=interpret,
    )
    out = jax.vmap(kernel)(q, k, v, ids)
    return out.reshape(batch, kv_heads, group, length, head_dim)[:, :, :, :time]
