"""Matrix products of the model: rounded operands, float32 sums, forward and backward."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

Axes = Sequence[int]

# Up to so many rows a CPU multiplies by one matrix of a kernel after the other.
CPU_FEW_ROWS = 32


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def product(
    x: jax.Array, kernel: jax.Array, dtype: Any, contracted: tuple[int, ...] = (0,)
) -> jax.Array:
    """The last dimensions of x with as many of a kernel, summed over: float32 [..., F...].

    Operands are rounded to `dtype`, sums and results are float32: forward, and in the gradients.
    (Of a bfloat16 kernel the gradient's sums are rounded before they travel between devices.)

    Args:
      x: [..., C...]. kernel: C... and F..., each in its order, wherever they stand.
      dtype: of the operands, such as bfloat16.
      contracted: the axes of the kernel that C... are, side by side.
    """
    return _forward(x, kernel, dtype, contracted)[0]


def _forward(
    x: jax.Array, kernel: jax.Array, dtype: Any, contracted: tuple[int, ...]
) -> tuple[jax.Array, Any]:
    x = x.astype(dtype)
    return _multiplied(x, rounded(kernel, dtype), contracted), (x, kernel)


def _backward(dtype: Any, contracted: tuple[int, ...], residuals: Any, g: jax.Array) -> Any:
    x, kernel = residuals
    g = g.astype(dtype)
    return input_gradient(x, kernel, g, contracted), kernel_gradient(x, kernel, g, contracted)


def input_gradient(
    x: jax.Array, kernel: jax.Array, g: jax.Array, contracted: tuple[int, ...]
) -> jax.Array:
    """What `product` passes to x; x and g have the operands' dtype."""
    outputs = output_axes(kernel, contracted)
    dx = _dot(g, rounded(kernel, g.dtype), last_axes(g, len(outputs)), outputs)
    return dx.astype(x.dtype)


def kernel_gradient(
    x: jax.Array, kernel: jax.Array, g: jax.Array, contracted: tuple[int, ...]
) -> jax.Array:
    """What `product` passes to its kernel; x and g have the operands' dtype."""
    lead = x.ndim - len(contracted)
    sum_dtype = jnp.promote_types(g.dtype, kernel.dtype)
    d_kernel = _dot(turned(x, lead), g, last_axes(x, lead), range(lead), sum_dtype)
    d_kernel = jnp.moveaxis(d_kernel, range(len(contracted)), contracted)
    return d_kernel.astype(kernel.dtype)


product.defvjp(_forward, _backward)


def last_axes(x: jax.Array, count: int) -> range:
    return range(x.ndim - count, x.ndim)


def output_axes(kernel: jax.Array, contracted: tuple[int, ...]) -> tuple[int, ...]:
    """The axes of a kernel that its product has."""
    return tuple(axis for axis in range(kernel.ndim) if axis not in contracted)


def rounded(kernel: jax.Array, dtype: Any) -> jax.Array:
    """kernel.astype(dtype), where it stands.

    On a TPU, XLA would round the kernels of all scanned layers ahead of their loop and hold what
    comes out until the backward loop ends. A reduction of the precision it leaves in the loop.
    """
    if jnp.dtype(dtype) != jnp.bfloat16:
        return kernel.astype(dtype)
    return jax.lax.platform_dependent(
        kernel, cpu=lambda kernel: kernel.astype(dtype), default=_bfloat16_in_two_steps
    )


def _bfloat16_in_two_steps(x: jax.Array) -> jax.Array:
    info = jnp.finfo(jnp.bfloat16)
    return jax.lax.reduce_precision(x, info.nexp, info.nmant).astype(jnp.bfloat16)


def _multiplied(x: jax.Array, kernel: jax.Array, contracted: tuple[int, ...]) -> jax.Array:
    """The product of operands of one dtype."""
    lead = x.ndim - len(contracted)
    whole = functools.partial(_dot, a_axes=last_axes(x, len(contracted)), b_axes=contracted)
    if contracted[0] == 0 or math.prod(x.shape[:lead]) > CPU_FEW_ROWS:
        return whole(x, kernel)
    by_matrix = functools.partial(_by_matrix, contracted=contracted)
    return jax.lax.platform_dependent(x, kernel, cpu=by_matrix, default=whole)


def _by_matrix(x: jax.Array, kernel: jax.Array, contracted: tuple[int, ...]) -> jax.Array:
    """One product for every place in front of the axes that are summed over.

    A single product turns the whole kernel on a CPU, which takes few rows, as decoding has, longer
    than to be multiplied.
    """
    first, count = contracted[0], len(contracted)
    matrices = kernel.reshape(-1, *kernel.shape[first:])
    lead = x.ndim - count
    multiply = jax.vmap(
        lambda x, matrix: _dot(x, matrix, last_axes(x, count), range(count)), 0, lead
    )
    y = multiply(jnp.broadcast_to(x, (len(matrices), *x.shape)), matrices)
    return y.reshape(*x.shape[:lead], *kernel.shape[:first], *y.shape[lead + 1 :])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def batched_product(a: jax.Array, b: jax.Array, transposed: bool = False) -> jax.Array:
    """Matrices [..., M, C] by [..., C, N], or by [..., N, C] if transposed: float32 [..., M, N].

    Gradients come from operands of the same dtype as a and b, summed in float32.
    """
    return _batched_dot(a, b, transposed)


def _batched_backward(transposed: bool, residuals: Any, g: jax.Array) -> Any:
    a, b = residuals
    g = g.astype(a.dtype)
    da = _batched_dot(g, b, not transposed)
    first, last = (g, a) if transposed else (a, g)
    db = _batched_dot(turned(first, lead=first.ndim - 1, batch=first.ndim - 2), last)
    return da.astype(a.dtype), db.astype(b.dtype)


batched_product.defvjp(
    lambda a, b, transposed: (_batched_dot(a, b, transposed), (a, b)), _batched_backward
)


def _batched_dot(a: jax.Array, b: jax.Array, transposed: bool = False) -> jax.Array:
    batch = tuple(range(a.ndim - 2))
    dimensions = (((a.ndim - 1,), (b.ndim - 1 if transposed else b.ndim - 2,)), (batch, batch))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _dot(a: jax.Array, b: jax.Array, a_axes: Axes, b_axes: Axes, dtype: Any = jnp.float32) -> Any:
    dimensions = ((tuple(a_axes), tuple(b_axes)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def turned(x: jax.Array, lead: int = 1, batch: int = 0) -> jax.Array:
    """[N..., A..., B...] → [N..., B..., A...], N the first `batch` dimensions and A those up to
    `lead`; on a CPU in memory too.

    XLA's CPU backend multiplies 16-bit operands as such only if they are contracted along their
    last and first axes. Left to itself it folds a transposition into the product, and then widens
    both operands to float32.
    """
    order = (*range(batch), *range(lead, x.ndim), *range(batch, lead))
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.size > 1:
        # The partitioner cannot cut a constrained layout, and would gather x for it.
        return x.transpose(order)
    rows = Layout(tuple(range(x.ndim)))  # on both sides: either neighbour may be the product
    return jax.lax.platform_dependent(
        x,
        cpu=lambda x: with_layout_constraint(
            with_layout_constraint(x, rows).transpose(order), rows
        ),
        default=lambda x: x.transpose(order),
    )


turned.defvjp(
    lambda x, lead, batch: (turned(x, lead, batch), None),
    lambda lead, batch, _, g: (turned(g, g.ndim - lead + batch, batch),),
)
