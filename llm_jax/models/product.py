"""Matrix products of the model: rounded operands, float32 sums, forward and backward."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def product(x: jax.Array, kernel: jax.Array, dtype: Any, contracted: int = 1) -> jax.Array:
    """The last `contracted` dimensions of x with the first ones of a kernel, float32 [..., F...].

    Operands are rounded to `dtype`, sums and results are float32: forward, and in the gradients.
    (Of a bfloat16 kernel the gradient's sums are rounded before they travel between devices.)

    Args:
      x: [..., C...]. kernel: [C..., F...].
      dtype: of the operands, such as bfloat16.
    """
    return _forward(x, kernel, dtype, contracted)[0]


def _forward(x: jax.Array, kernel: jax.Array, dtype: Any, contracted: int) -> tuple[jax.Array, Any]:
    x = x.astype(dtype)
    y = _dot(x, kernel.astype(dtype), range(x.ndim - contracted, x.ndim), range(contracted))
    return y, (x, kernel)


def _backward(dtype: Any, contracted: int, residuals: Any, g: jax.Array) -> Any:
    x, kernel = residuals
    g = g.astype(dtype)
    return input_gradient(x, kernel, g, contracted), kernel_gradient(x, kernel, g, contracted)


def input_gradient(x: jax.Array, kernel: jax.Array, g: jax.Array, contracted: int) -> jax.Array:
    """What `product` passes to x; x and g have the operands' dtype."""
    outputs = range(x.ndim - contracted, g.ndim)
    dx = _dot(g, kernel.astype(g.dtype), outputs, range(contracted, kernel.ndim))
    return dx.astype(x.dtype)


def kernel_gradient(x: jax.Array, kernel: jax.Array, g: jax.Array, contracted: int) -> jax.Array:
    """What `product` passes to its kernel; x and g have the operands' dtype."""
    lead = x.ndim - contracted
    sum_dtype = jnp.promote_types(g.dtype, kernel.dtype)
    d_kernel = _dot(turned(x, lead), g, range(contracted, x.ndim), range(lead), sum_dtype)
    return d_kernel.astype(kernel.dtype)


product.defvjp(_forward, _backward)


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


def _dot(
    a: jax.Array, b: jax.Array, a_axes: range, b_axes: range, dtype: Any = jnp.float32
) -> jax.Array:
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
