"""Rows that are split over the mesh axis `context`: which device has which part of a row.

A causal row cut into equal consecutive parts would leave its first device almost nothing to do. It
is cut into twice as many chunks as there are devices instead, and device i has the chunks i and
2n - 1 - i of n devices: an early and a late one, together the same work everywhere (the zigzag
layout of ring attention). Outside the model rows are in their natural order: tokens enter in
zigzag, and hidden states come back from it.

Legend: B batch, T time, D embed, n devices of the context axis, c = 2n chunks of a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from llm_jax.errors import UserError
from llm_jax.models import splash
from llm_jax.models.config import ModelConfig
from llm_jax.sharding import RULES, spec

(AXIS,) = RULES["activation_time"]


def context_ways(time: int, backend: str) -> int:
    """How many devices a row of `time` tokens is split over, by the current mesh.

    1 for a row that cannot be cut into equal chunks that the backend takes, such as a prompt: every
    device of the context axis then has all of it.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or time % _multiple(mesh.shape[AXIS], backend):
        return 1
    return mesh.shape[AXIS]


def check_context(
    config: ModelConfig, backend: str, mesh: Mesh | AbstractMesh, length: int | None = None
) -> None:
    """Refuses what rows split over the mesh's context axis cannot do.

    Args:
      length: of the rows to be trained on; None = only the model is looked at.

    Raises:
      UserError: a length that has no equal chunks, or an attention that has no parts.
    """
    ways = mesh.shape[AXIS]
    if ways == 1:
        return
    if config.attention_dropout:
        raise UserError(
            f"model.attention_dropout={config.attention_dropout} is not for rows split over "
            f"config.mesh.context={ways}: set it to 0, or use model.residual_dropout."
        )
    if config.attention_backend in ("xla", "cudnn"):
        raise UserError(
            f"attention backend {config.attention_backend!r} takes whole rows only, and "
            f"config.mesh.context={ways} splits them: set model.attention_backend=auto."
        )
    if length is None:
        return
    multiple = math.lcm(_multiple(ways, backend), ways * mesh.shape["tensor"])
    if length % multiple:
        below, above = length // multiple * multiple, -(-length // multiple) * multiple
        nearest = f"{below} or {above}" if below else f"{above}"
        raise UserError(
            f"length {length} is not a multiple of {multiple}, which config.mesh.context={ways} "
            f"and config.mesh.tensor={mesh.shape['tensor']} split rows by: make it {nearest}."
        )


def _multiple(ways: int, backend: str) -> int:
    return 2 * ways * (splash.BLOCK if backend == "splash" else 1)


def zigzag(time: int, ways: int) -> np.ndarray:
    """The place in the row of each token in zigzag order, int64 [T].

    `x[:, zigzag(T, n)]` lays x out, `np.argsort` of it is the way back.
    """
    places_cC = np.arange(time).reshape(2 * ways, -1)
    return np.stack([places_cC[:ways], places_cC[: -ways - 1 : -1]], axis=1).reshape(-1)


def lay_out(
    tokens_BT: jax.Array, positions_BT: jax.Array | None, segment_ids_BT: jax.Array | None,
    ways: int,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:  # fmt: skip
    """Tokens, positions and segment ids from natural into zigzag order; positions are made."""
    order_T = zigzag(tokens_BT.shape[1], ways)
    if positions_BT is None:
        positions_BT = jnp.arange(tokens_BT.shape[1])[None]
    if segment_ids_BT is not None:
        segment_ids_BT = segment_ids_BT[:, order_T]
    return tokens_BT[:, order_T], positions_BT[:, order_T], segment_ids_BT


def to_natural(hidden_BTD: jax.Array, ways: int) -> jax.Array:
    """Hidden states from zigzag into natural order.

    In natural order a device has an even chunk and the odd one after it, in zigzag one of each
    kind too: each kind goes to its places in one permutation, and no device ever holds more.
    """
    sent = [(i, 2 * ways - 1 - i) for i in range(ways)]  # the chunks of device i
    routes = [
        [(i, chunk // 2) for i, chunks in enumerate(sent) for chunk in chunks if chunk % 2 == odd]
        for odd in (0, 1)
    ]

    def local(x_BTD: jax.Array) -> jax.Array:
        early_BCD, late_BCD = jnp.split(x_BTD, 2, axis=1)
        is_even = jax.lax.axis_index(AXIS) % 2 == 0
        even_BCD = jnp.where(is_even, early_BCD, late_BCD)
        odd_BCD = jnp.where(is_even, late_BCD, early_BCD)
        parts = (even_BCD, odd_BCD)
        received = [
            jax.lax.ppermute(part, AXIS, route) for part, route in zip(parts, routes, strict=True)
        ]
        return jnp.concatenate(received, axis=1)

    rows = spec(("activation_rows", "activation_time", "activation_embed"))
    return over_shards(local, (rows,), rows, hidden_BTD)


def over_shards(
    local: Callable[..., Any], in_specs: Sequence[PartitionSpec], out_specs: PartitionSpec,
    *operands: Any,
) -> Any:  # fmt: skip
    """`shard_map` over all mesh axes of what has rows in its first dimension.

    A few prompts need not fill the shards of the batch: rows of zeros do.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = in_specs[0][0]
    batch = operands[0].shape[0]
    padding = -batch % math.prod(mesh.shape[axis] for axis in axes)

    def pad(x: jax.Array) -> jax.Array:
        return jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1))

    mapped = jax.shard_map(local, in_specs=tuple(in_specs), out_specs=out_specs, check_vma=False)
    return mapped(*jax.tree.map(pad, operands))[:batch]
