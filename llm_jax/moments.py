"""How moments are kept between two steps: in fewer bits than are computed, or on the host.

ν ← b2 · ν + (1 − b2) · g² moves ν by a small share of itself. bfloat16 has 8 significant bits, so a
rounding to the nearest number undoes every change of less than 1/512 to 1/256 of ν: with b2 = 0.999
ν never falls at all, whatever the gradients, and with b2 = 0.95 it stays within a few percent of
where it is. Here the update is float32, and its result is rounded up or down at random with the
probabilities that make the expectation exact (arXiv:2010.06192). ν then is right on average; the
roundings of the last 1 / (1 − b2) steps add up to a relative error of about 0.002 / √(1 − b2),
half of which an update sees: 0.5% with b2 = 0.95, 4% with 0.999.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax


def keep_second_moment_in_bfloat16(
    adam: optax.GradientTransformation,
) -> optax.GradientTransformation:
    """`optax.scale_by_adam` whose state holds ν in bfloat16; updates are made of ν before rounding.

    The randomness is that of the state's count, so a resumed run goes on bit for bit, on any mesh.
    """

    def init(params: Any) -> Any:
        state: Any = adam.init(params)
        return state._replace(nu=optax.tree.cast(state.nu, jnp.bfloat16))

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        state = state._replace(nu=optax.tree.cast(state.nu, jnp.float32))
        updates, new = adam.update(updates, state, params)
        leaves, structure = jax.tree.flatten(new.nu)
        rngs = jax.random.split(jax.random.fold_in(jax.random.key(0), new.count), len(leaves))
        rounded = [round_to_bfloat16(x, rng) for x, rng in zip(leaves, rngs, strict=True)]
        return updates, new._replace(nu=jax.tree.unflatten(structure, rounded))

    return optax.GradientTransformation(init, update)


def round_to_bfloat16(x: jax.Array, rng: jax.Array) -> jax.Array:
    """Finite float32 numbers as one of the two bfloat16 neighbours, nearer ones more often.

    The expectation is x itself; numbers that bfloat16 has stay as they are.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    # A carry out of the lower half moves to the neighbour away from 0, exponent included.
    bits += jax.random.bits(rng, x.shape, jnp.uint16).astype(jnp.uint32)
    upper = (bits >> 16).astype(jnp.uint16)
    return jax.lax.bitcast_convert_type(upper, jnp.bfloat16)


def keep_on_host(
    inner: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """Keeps the arrays of `inner`'s state, scalars aside, in the host's memory between updates.

    Inside a jitted function only; `init` says by its results' memory spaces where they live.
    """

    def moved(state: Any, space: Any) -> Any:
        return jax.tree.map(lambda x: jax.device_put(x, space) if x.ndim else x, state)

    def init(params: Any) -> Any:
        return moved(inner.init(params), jax.memory.Space.Host)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        state = moved(state, jax.memory.Space.Device)
        updates, state = inner.update(updates, state, params, **extra)
        return updates, moved(state, jax.memory.Space.Host)

    return optax.GradientTransformationExtraArgs(init, update)
