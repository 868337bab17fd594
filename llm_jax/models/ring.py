"""Exact attention of rows that are split over the mesh axis `context`, in the zigzag layout.

ring: keys and values go round the devices (Ring Attention, arXiv:2310.01889), so that a device
holds its own part of them and one that passes. all_gather: every device gathers all of them for its
own queries (Llama 3, arXiv:2407.21783, section 3.3.2). Both keep for the backward pass no more than
what the device holds anyway, its output and the logsumexp of its scores.

Legend: B batch, K key/value heads, G query heads per key/value head, T time of a shard, H head
dimension, P the two chunks of a shard (the early one is 0, the late one 1), C time of a chunk,
S time of the whole row.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.models import blockwise, splash
from llm_jax.models.blockwise import chunks, merge, whole
from llm_jax.models.context import AXIS, over_shards
from llm_jax.sharding import spec


@dataclasses.dataclass(frozen=True)
class Layer:
    """How a chunk of queries attends to a chunk of keys: `blockwise` with the layer's settings."""

    backend: str
    window: int | None
    soft_cap: float | None
    interpret: bool

    def forward(self, q: jax.Array, k: jax.Array, *others: Any, offset: Any) -> Any:
        attend = self._attend(self._kernel.forward, offset, q, k, *others)
        if self._is_always_seen(offset):
            return attend()
        nothing = (jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:-1], -jnp.inf))
        return jax.lax.cond(self._is_seen(offset, k), attend, lambda: nothing)

    def backward(self, q: jax.Array, k: jax.Array, *others: Any, offset: Any) -> Any:
        attend = self._attend(self._kernel.backward, offset, q, k, *others)
        if self._is_always_seen(offset):
            return attend()
        zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, k))
        return jax.lax.cond(self._is_seen(offset, k), attend, lambda: zeros)

    @property
    def _kernel(self) -> ModuleType:
        return splash if self.backend == "splash" else blockwise

    def _attend(self, function: Any, offset: Any, *operands: Any) -> Callable[[], Any]:
        return functools.partial(
            function, *operands, offset=offset, window=self.window, soft_cap=self.soft_cap,
            interpret=self.interpret,
        )  # fmt: skip

    def _is_always_seen(self, offset: Any) -> bool:
        return self.window is None or isinstance(offset, int)

    def _is_seen(self, offset: jax.Array, k: jax.Array) -> jax.Array:
        """Whether the first query's window reaches the last key."""
        assert self.window is not None
        return offset - (k.shape[-2] - 1) < self.window


def context_attention(
    q_BKGTH: jax.Array,
    k_BKTH: jax.Array,
    v_BKTH: jax.Array,
    segment_ids_BT: jax.Array | None,
    *,
    kind: str,
    backend: str,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    interpret: bool = False,
) -> jax.Array:
    """`attention` of whole rows in zigzag order to themselves, in the dtype of q.

    Args:
      kind: "ring" or "all_gather".
      backend: splash is computed by its kernels, which round what each chunk of keys gives to the
        dtype of q; any other in plain products.
      and those of `attention`.
    """
    layer = Layer(backend, window, soft_cap, interpret)
    run = {"ring": _ring, "all_gather": _all_gather}[kind]

    def local(q_BKGTH: jax.Array, k_BKTH: jax.Array, v_BKTH: jax.Array, ids_BT: Any) -> jax.Array:
        ids_PBC = None if ids_BT is None else chunks(ids_BT, 1, 2)
        operands = (chunks(q_BKGTH, 3, 2), chunks(k_BKTH, 2, 2), chunks(v_BKTH, 2, 2), ids_PBC)
        return whole(run(layer, *operands), 3)

    heads = ("activation_batch", "activation_heads")
    queries, keys = spec((*heads, None, "activation_time")), spec((*heads, "activation_time"))
    ids = spec(("activation_batch", "activation_time"))
    return over_shards(
        local, (queries, keys, keys, ids), queries, q_BKGTH * scale, k_BKTH, v_BKTH, segment_ids_BT
    )


def _differentiable(forward: Callable[..., Any], backward: Callable[..., Any]) -> Any:
    """(layer, q, k, v, ids) → out of `forward`, which gives (out, logsumexp), with a gradient."""

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def attend(layer: Layer, q: jax.Array, k: jax.Array, v: jax.Array, ids: Any) -> jax.Array:
        return forward(layer, q, k, v, ids)[0].astype(q.dtype)

    def keep(layer: Layer, q: jax.Array, k: jax.Array, v: jax.Array, ids: Any) -> Any:
        out, logsumexp = forward(layer, q, k, v, ids)
        out = out.astype(q.dtype)
        return out, (q, k, v, ids, out, logsumexp)

    def pull(layer: Layer, kept: Any, d_out: jax.Array) -> Any:
        q, k, v, ids, out, logsumexp = kept
        weighted = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)
        gradients = backward(layer, q, k, v, ids, logsumexp, d_out, weighted)
        return *(g.astype(x.dtype) for g, x in zip(gradients, (q, k, v), strict=True)), None

    attend.defvjp(keep, pull)
    return attend


# --- ring -----------------------------------------------------------------------------------------


def _ring_forward(layer: Layer, q: Any, k: Any, v: Any, ids: Any) -> Any:
    def meet(results: Any, keys: Any, owner: Any) -> Any:
        k, v, key_ids = keys
        for mine, theirs, offset in _pairs(layer, owner, q.shape[-2]):
            more = layer.forward(
                _take(q, mine), _take(k, theirs), _take(v, theirs),
                _segments(ids, mine, key_ids, theirs), offset=offset,
            )  # fmt: skip
            merged = merge(*_take(results, mine), *more)
            results = _put(results, mine, merged)
        return results

    nothing = (jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:-1], -jnp.inf))
    results = meet(nothing, (k, v, ids), None)
    return _go_round(meet, results, (k, v, ids))


def _ring_backward(layer: Layer, q: Any, k: Any, v: Any, ids: Any, *of_queries: Any) -> Any:
    """The sums of the gradients of keys and values follow them round, and go one step further."""

    def meet(sums: Any, keys: Any, owner: Any) -> Any:
        k, v, key_ids = keys
        dq, *dkv = sums
        if owner is not None:
            dkv = _pass_on(dkv)
        for mine, theirs, offset in _pairs(layer, owner, q.shape[-2]):
            more_dq, *more_dkv = layer.backward(
                _take(q, mine), _take(k, theirs), _take(v, theirs),
                _segments(ids, mine, key_ids, theirs), *_take(of_queries, mine), offset=offset,
            )  # fmt: skip
            dq = _add(dq, mine, more_dq)
            dkv = [_add(x, theirs, more) for x, more in zip(dkv, more_dkv, strict=True)]
        return [dq, *dkv]

    zeros = [jnp.zeros(x.shape, jnp.float32) for x in (q, k, v)]
    sums = meet(zeros, (k, v, ids), None)
    dq, *dkv = _go_round(meet, sums, (k, v, ids))
    return dq, *_pass_on(dkv)


_ring = _differentiable(_ring_forward, _ring_backward)


def _pairs(layer: Layer, owner: Any, length: int) -> list[tuple[Any, Any, Any]]:
    """(chunk of queries, chunk of keys, offset) of all that this device's queries see of the keys
    of device `owner`; None is the device itself.

    A late chunk sees every early one. Of two early chunks the later one sees the other whole, of
    two late ones too, and the device that has the later early chunk has the earlier late one: two
    whole pairs on every device at every step.
    """
    me, ways = jax.lax.axis_index(AXIS), jax.lax.axis_size(AXIS)
    other = me if owner is None else owner

    def pair(mine: Any, theirs: Any) -> tuple[Any, Any, Any]:
        if layer.window is None:
            return mine, theirs, None
        return mine, theirs, (_chunk(me, mine, ways) - _chunk(other, theirs, ways)) * length

    if owner is None:
        return [(0, 0, 0), (1, 1, 0), pair(1, 0)]
    both = (owner > me).astype(jnp.int32)
    return [pair(1, 0), pair(both, both)]


def _go_round(meet: Callable[..., Any], results: Any, keys: Any) -> Any:
    """`meet(results, keys, owner)` with the keys of every other device, one after another."""
    me, ways = jax.lax.axis_index(AXIS), jax.lax.axis_size(AXIS)

    def step(carry: Any, back: Any) -> Any:
        results, keys = carry
        # The next keys travel while these are attended to.
        return (meet(results, keys, (me - back) % ways), _pass_on(keys)), None

    carry = (results, _pass_on(keys))
    (results, keys), _ = jax.lax.scan(step, carry, jnp.arange(1, ways - 1))
    return meet(results, keys, (me + 1) % ways)


def _pass_on(tree: Any) -> Any:
    ways = jax.lax.axis_size(AXIS)
    return jax.lax.ppermute(tree, AXIS, [(i, (i + 1) % ways) for i in range(ways)])


# --- all_gather -----------------------------------------------------------------------------------


def _gather_forward(layer: Layer, q: Any, k: Any, v: Any, ids: Any) -> Any:
    k, v, key_ids = _gather(k, 2), _gather(v, 2), None if ids is None else _gather(ids, 1)
    results = [
        layer.forward(
            q[mine], k, v, None if ids is None else (ids[mine], key_ids),
            offset=_first_place(mine, q.shape[-2]),
        )
        for mine in (0, 1)
    ]  # fmt: skip
    return jax.tree.map(lambda *x: jnp.stack(x), *results)


def _gather_backward(layer: Layer, q: Any, k: Any, v: Any, ids: Any, *of_queries: Any) -> Any:
    k, v, key_ids = _gather(k, 2), _gather(v, 2), None if ids is None else _gather(ids, 1)
    early, late = (
        layer.backward(
            q[mine], k, v, None if ids is None else (ids[mine], key_ids),
            *(x[mine] for x in of_queries), offset=_first_place(mine, q.shape[-2]),
        )
        for mine in (0, 1)
    )  # fmt: skip
    dk, dv = (_scatter(a + b, 2) for a, b in zip(early[1:], late[1:], strict=True))
    return jnp.stack([early[0], late[0]]), dk, dv


_all_gather = _differentiable(_gather_forward, _gather_backward)


def _first_place(mine: int, length: int) -> jax.Array:
    return _chunk(jax.lax.axis_index(AXIS), mine, jax.lax.axis_size(AXIS)) * length


def _gather(x: jax.Array, axis: int) -> jax.Array:
    """[P, ..., C, ...] of every device as the natural row [..., S, ...]; `axis` is that of time in
    the latter."""
    x = jax.lax.all_gather(x, AXIS)
    return whole(jnp.concatenate([x[:, 0], x[::-1, 1]]), axis)


def _scatter(x: jax.Array, axis: int) -> jax.Array:
    """The inverse of `_gather`, which sums what the devices have."""
    ways = jax.lax.axis_size(AXIS)
    x = chunks(x, axis, 2 * ways)
    x = jnp.stack([x[:ways], x[: ways - 1 : -1]], axis=1)
    return jax.lax.psum_scatter(x, AXIS)


# --- chunks ---------------------------------------------------------------------------------------


def _chunk(device: Any, part: Any, ways: int) -> Any:
    """Which chunk of the row is the early or the late one of a device."""
    return jnp.where(part == 0, device, 2 * ways - 1 - device)


def _take(tree: Any, chunk: Any) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, chunk, keepdims=False), tree)


def _put(tree: Any, chunk: Any, values: Any) -> Any:
    def put(x: jax.Array, value: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(x, value, chunk, 0)

    return jax.tree.map(put, tree, values)


def _add(x: jax.Array, chunk: Any, value: jax.Array) -> jax.Array:
    return _put(x, chunk, _take(x, chunk) + value)


def _segments(ids: Any, mine: Any, key_ids: Any, theirs: Any) -> Any:
    return None if ids is None else (_take(ids, mine), _take(key_ids, theirs))
