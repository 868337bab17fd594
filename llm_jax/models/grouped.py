"""Products of rows that stand in groups, each group with a kernel of its own.

Legend: N rows, C contracted, G groups, F outputs of the product.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.models.product import rounded, turned

# Rows that the CPU multiplies at a time; a group's last block is on average half full.
CPU_BLOCK = 64


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_product(x_NC: jax.Array, kernel_GCF: jax.Array, sizes_G: jax.Array, dtype: Any) -> Any:
    """Each row by the kernel of its group, float32 [N, F]; 0 for rows behind the last group.

    Operands are rounded to `dtype`, sums and results are float32: forward, and in the gradients.

    Args:
      x_NC: rows in the order of their groups.
      kernel_GCF: float32.
      sizes_G: int32, rows of each group; their sum may be less than N.
      dtype: of the operands, such as bfloat16.
    """
    return _forward(x_NC, kernel_GCF, sizes_G, dtype)[0]


def _forward(x_NC: jax.Array, kernel_GCF: jax.Array, sizes_G: jax.Array, dtype: Any) -> Any:
    x_NC = x_NC.astype(dtype)
    y_NF = _rows_by_kernels(x_NC, rounded(kernel_GCF, dtype), sizes_G)
    return y_NF, (x_NC, kernel_GCF, sizes_G)


def _backward(dtype: Any, residuals: Any, g_NF: jax.Array) -> Any:
    x_NC, kernel_GCF, sizes_G = residuals
    g_NF = g_NF.astype(dtype)
    kernel_GFC = turned(rounded(kernel_GCF, dtype), lead=2, batch=1)
    dx_NC = _rows_by_kernels(g_NF, kernel_GFC, sizes_G)
    d_kernel_GCF = _rows_by_rows(x_NC, g_NF, sizes_G)
    return dx_NC.astype(x_NC.dtype), d_kernel_GCF.astype(kernel_GCF.dtype), None


grouped_product.defvjp(_forward, _backward)


def _rows_by_kernels(x_NC: jax.Array, kernel_GCF: jax.Array, sizes_G: jax.Array) -> jax.Array:
    def whole(x_NC: jax.Array, kernel_GCF: jax.Array, sizes_G: jax.Array) -> jax.Array:
        return jax.lax.ragged_dot(x_NC, kernel_GCF, sizes_G, preferred_element_type=jnp.float32)

    y_NF = jax.lax.platform_dependent(
        x_NC, kernel_GCF, sizes_G, cpu=_rows_by_kernels_in_blocks, default=whole
    )
    # What stands behind the last group is whatever the kernel of the platform leaves there.
    counted_N = jnp.arange(x_NC.shape[0]) < jnp.sum(sizes_G)
    return jnp.where(counted_N[:, None], y_NF, 0)


def _rows_by_rows(x_NC: jax.Array, g_NF: jax.Array, sizes_G: jax.Array) -> jax.Array:
    """Each group's xᵀ·g, float32 [G, C, F]."""

    def whole(x_NC: jax.Array, g_NF: jax.Array, sizes_G: jax.Array) -> jax.Array:
        return jax.lax.ragged_dot_general(
            x_NC,
            g_NF,
            sizes_G,
            jax.lax.RaggedDotDimensionNumbers(
                dot_dimension_numbers=(((0,), (0,)), ((), ())),
                lhs_ragged_dimensions=[0],
                rhs_group_dimensions=[],
            ),
            preferred_element_type=jnp.float32,
        )

    return jax.lax.platform_dependent(
        x_NC, g_NF, sizes_G, cpu=_rows_by_rows_in_blocks, default=whole
    )


# --- on a CPU -------------------------------------------------------------------------------------
# There XLA turns a ragged product into one over all rows for every group. These loops go through
# the blocks that a group has.


def _rows_by_kernels_in_blocks(
    x_NC: jax.Array, kernel_GCF: jax.Array, sizes_G: jax.Array
) -> jax.Array:
    x_NC, block = _padded(x_NC)

    def group(y_NF: jax.Array, operands: Any) -> tuple[jax.Array, None]:
        kernel_CF, begin, size = operands

        def multiply(i: jax.Array, y_NF: jax.Array) -> jax.Array:
            start = begin + i * block
            rows = jax.lax.dynamic_slice_in_dim(x_NC, start, block)
            y = jax.lax.dot(rows, kernel_CF, preferred_element_type=jnp.float32)
            # Rows of the next group at the end of a block are written again when its turn comes.
            return jax.lax.dynamic_update_slice_in_dim(y_NF, y, start, 0)

        return jax.lax.fori_loop(0, -(-size // block), multiply, y_NF), None

    y_NF = jnp.zeros((x_NC.shape[0], kernel_GCF.shape[-1]), jnp.float32)
    y_NF, _ = jax.lax.scan(group, y_NF, (kernel_GCF, jnp.cumsum(sizes_G) - sizes_G, sizes_G))
    return y_NF[:-block]


def _rows_by_rows_in_blocks(x_NC: jax.Array, g_NF: jax.Array, sizes_G: jax.Array) -> jax.Array:
    x_CN = turned(_padded(x_NC)[0])
    g_NF, block = _padded(g_NF)

    def group(_: None, operands: Any) -> tuple[None, jax.Array]:
        begin, size = operands

        def add(i: jax.Array, sum_CF: jax.Array) -> jax.Array:
            start = begin + i * block
            x = jax.lax.dynamic_slice_in_dim(x_CN, start, block, axis=1)
            g = jax.lax.dynamic_slice_in_dim(g_NF, start, block)
            own = start + jnp.arange(block) < begin + size
            g = jnp.where(own[:, None], g, 0)
            return sum_CF + jax.lax.dot(x, g, preferred_element_type=jnp.float32)

        zeros = jnp.zeros((x_CN.shape[0], g_NF.shape[1]), jnp.float32)
        return None, jax.lax.fori_loop(0, -(-size // block), add, zeros)

    return jax.lax.scan(group, None, (jnp.cumsum(sizes_G) - sizes_G, sizes_G))[1]


def _padded(x_NC: jax.Array) -> tuple[jax.Array, int]:
    """The rows with a block of zeros behind them, so that every block lies inside; and its size."""
    block = min(CPU_BLOCK, x_NC.shape[0])
    return jnp.pad(x_NC, ((0, block), (0, 0))), block
