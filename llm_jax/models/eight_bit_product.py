"""Matrix products of 8-bit operands in training, of kernels that stay in full precision.

Every operand is scaled so that the largest magnitude along what the product sums over becomes the
largest of its format, and rounded: a row of x has a scale of its own, and so has every output
channel of the kernel. Rounding passes gradients straight through (arXiv:1308.3432).

int8: whole numbers, and sums that are exact. fp8: 3 bits of mantissa forward, 2 in gradients, which
need range more than digits (arXiv:2209.05433), and float32 sums.

The gradient of the kernel is never made of 8 bits: it sums over the whole batch, in which a few
loud tokens would set the scale of all others.

XLA (JAX 0.10.2) widens float8 to float32 on a CPU: the same numbers, no faster. For a TPU it keeps
the codes, between devices, too; of a product of 4096³ its compiler expects these parts of the
cycles of bfloat16: v5e int8 0.50, fp8 1.01; v6e int8 0.76, fp8 1.09; TPU 7x int8 1.03, fp8 0.48.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from llm_jax.models.product import input_gradient, kernel_gradient, last_axes, output_axes


class Format(NamedTuple):
    """8-bit numbers, and what products of them are summed in."""

    codes: Any
    largest: int
    sums: Any
    max_terms: float = math.inf  # of a sum that `sums` holds in any case


INT8 = Format(jnp.int8, 127, jnp.int32, (2**31 - 1) // 127**2)
E4M3 = Format(jnp.float8_e4m3fn, 448, jnp.float32)
E5M2 = Format(jnp.float8_e5m2, 57344, jnp.float32)


class Formats(NamedTuple):
    """Of one choice: those of x and of the kernel, and of the gradient of their product where that
    of x is made of 8 bits, too."""

    operands: Format
    gradient: Format | None


EightBit = Literal["int8_forward", "int8", "fp8_forward", "fp8"]
Matmul = Literal["default", EightBit]
FORMATS: dict[EightBit, Formats] = {
    "int8_forward": Formats(INT8, None),
    "int8": Formats(INT8, INT8),
    "fp8_forward": Formats(E4M3, None),
    "fp8": Formats(E4M3, E5M2),
}


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def eight_bit_product(
    x: jax.Array, kernel: jax.Array, dtype: Any, contracted: tuple[int, ...], matmul: EightBit
) -> jax.Array:
    """`product` of 8-bit operands, float32 [..., F...].

    An operand is off by at most: as int8, 1/254 of the largest magnitude with its scale; as fp8,
    1/16 of itself (1/8 in gradients), or about 2e-6 (1e-10) of the largest if that is more. Sums of
    normal operands are off by about 1% of their deviation as int8, by 4% as fp8 (6% in gradients).

    Args:
      x, kernel, contracted: as `product` has them.
      dtype: of all that is not 8 bits: the kernel's gradient, and that of x if `matmul` says so.
      matmul: which of `FORMATS`.

    Raises:
      ValueError: a sum has more terms than its format allows.
    """
    return _forward(x, kernel, dtype, contracted, matmul)[0]


def _forward(
    x: jax.Array, kernel: jax.Array, dtype: Any, contracted: tuple[int, ...], matmul: EightBit
) -> Any:
    x, format = x.astype(dtype), FORMATS[matmul].operands
    y = _dot(x, kernel, last_axes(x, len(contracted)), contracted, format, format)
    return y, (x, kernel)


def _backward(
    dtype: Any, contracted: tuple[int, ...], matmul: EightBit, residuals: Any, g: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals
    g, formats = g.astype(dtype), FORMATS[matmul]
    if formats.gradient is None:
        dx = input_gradient(x, kernel, g, contracted)
    else:
        outputs = output_axes(kernel, contracted)
        g_axes = last_axes(g, len(outputs))
        dx = _dot(g, kernel, g_axes, outputs, formats.gradient, formats.operands).astype(x.dtype)
    return dx, kernel_gradient(x, kernel, g, contracted)


eight_bit_product.defvjp(_forward, _backward)


def _dot(
    a: jax.Array, b: jax.Array, a_axes: Sequence[int], b_axes: Sequence[int],
    a_format: Format, b_format: Format,
) -> jax.Array:  # fmt: skip
    terms, sums_dtype = math.prod(a.shape[axis] for axis in a_axes), jnp.dtype(a_format.sums)
    if terms > a_format.max_terms:
        raise ValueError(
            f"a sum of {terms} products of 8-bit numbers may pass the range of {sums_dtype}"
        )
    (a, a_scales), (b, b_scales) = _codes(a, a_axes, a_format), _codes(b, b_axes, b_format)
    sums = jax.lax.dot_general(
        a,
        b,
        ((tuple(a_axes), tuple(b_axes)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,  # else a GPU may sum float8 in less than float32
        preferred_element_type=sums_dtype,
    )
    a_scales = jnp.expand_dims(a_scales, range(a_scales.ndim, sums.ndim))
    return sums.astype(jnp.float32) * a_scales * b_scales


def _codes(x: jax.Array, axes: Sequence[int], format: Format) -> tuple[jax.Array, jax.Array]:
    """x in an 8-bit format and float32 scales, one for all numbers along the axes.

    No code passes the largest of its format, even where a quotient does by an error of float32: it
    is rounded back. (A cast of what lies further out would make infinities, and nan of e4m3.)
    """
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=tuple(axes))
    scales = jnp.maximum(largest / format.largest, jnp.finfo(jnp.float32).tiny)  # of zeros, too
    codes = x / jnp.expand_dims(scales, tuple(axes))
    if jnp.issubdtype(format.codes, jnp.integer):
        codes = jnp.round(codes)  # a cast to floating point rounds by itself
    return codes.astype(format.codes), scales
