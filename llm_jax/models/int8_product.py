"""Matrix products of 8-bit operands in training, of kernels that stay in full precision.

Every operand is scaled so that the largest magnitude along what the product sums over becomes 127,
and rounded: a row of x has a scale of its own, and so has every output channel of the kernel. Sums
are exact, in int32. Rounding passes gradients straight through (arXiv:1308.3432).

The gradient of the kernel is never made of 8 bits: it sums over the whole batch, in which a few
loud tokens would set the scale of all others.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from llm_jax.models.product import input_gradient, kernel_gradient, last_axes, output_axes

# int8_forward: the forward product. int8: the gradient of the inputs, too.
Matmul = Literal["default", "int8_forward", "int8"]
LARGEST = 127
MAX_TERMS = (2**31 - 1) // LARGEST**2  # of a sum that int32 holds in any case


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def int8_product(
    x: jax.Array, kernel: jax.Array, dtype: Any, contracted: tuple[int, ...], backward: bool
) -> jax.Array:
    """`product` of 8-bit operands, float32 [..., F...].

    Both operands are off by half a step at most, a sum of C terms therefore by C · max|x| · max|W|
    · (2 + 1/254) / 254 at most; for normal operands by about 1% of its deviation.

    Args:
      x, kernel, contracted: as `product` has them.
      dtype: of all that is not 8 bits: the kernel's gradient, and that of x unless `backward`.
      backward: make the gradient of x of 8-bit operands, too.

    Raises:
      ValueError: a sum of more than `MAX_TERMS` terms.
    """
    return _forward(x, kernel, dtype, contracted, backward)[0]


def _forward(
    x: jax.Array, kernel: jax.Array, dtype: Any, contracted: tuple[int, ...], backward: bool
) -> Any:
    del backward
    x = x.astype(dtype)
    y = _int8_dot(x, kernel, last_axes(x, len(contracted)), contracted)
    return y, (x, kernel)


def _backward(
    dtype: Any, contracted: tuple[int, ...], backward: bool, residuals: Any, g: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals
    g = g.astype(dtype)
    if backward:
        outputs = output_axes(kernel, contracted)
        dx = _int8_dot(g, kernel, last_axes(g, len(outputs)), outputs).astype(x.dtype)
    else:
        dx = input_gradient(x, kernel, g, contracted)
    return dx, kernel_gradient(x, kernel, g, contracted)


int8_product.defvjp(_forward, _backward)


def _int8_dot(
    a: jax.Array, b: jax.Array, a_axes: Sequence[int], b_axes: Sequence[int]
) -> jax.Array:
    terms = math.prod(a.shape[axis] for axis in a_axes)
    if terms > MAX_TERMS:
        raise ValueError(f"a sum of {terms} products of 8-bit numbers may pass the range of int32")
    (a, a_scales), (b, b_scales) = _codes(a, a_axes), _codes(b, b_axes)
    dimensions = ((tuple(a_axes), tuple(b_axes)), ((), ()))
    sums = jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.int32)
    a_scales = jnp.expand_dims(a_scales, range(a_scales.ndim, sums.ndim))
    return sums.astype(jnp.float32) * a_scales * b_scales


def _codes(x: jax.Array, axes: Sequence[int]) -> tuple[jax.Array, jax.Array]:
    """x as int8 in [-127, 127] and float32 scales, one for all numbers along the axes."""
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=tuple(axes))
    scales = jnp.where(largest > 0, largest, 1) / LARGEST
    return jnp.round(x / jnp.expand_dims(scales, tuple(axes))).astype(jnp.int8), scales
