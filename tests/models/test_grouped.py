"""Products of grouped rows against one product a group, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.models import grouped
from llm_jax.models.grouped import grouped_product

# The sum is the number of rows or less; blocks are smaller than some groups and larger than others.
SIZES = [(0, 3, 150, 0, 47), (70, 0, 0, 1, 60), (0, 0, 0, 0, 0), (200, 0, 0, 0, 0)]
ROWS, C = 200, 6


@pytest.fixture(autouse=True)
def _exact_products():
    with jax.default_matmul_precision("highest"):
        yield


def operands(dtype="float32"):
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (ROWS, C)).astype(dtype)
    return x, jax.random.normal(keys[1], (5, C, 4))


def written_out(x, kernel, sizes):
    ends = np.cumsum(sizes)
    parts = [
        x[end - size : end] @ kernel[group]
        for group, (end, size) in enumerate(zip(ends, sizes, strict=True))
    ]
    return jnp.concatenate([*parts, jnp.zeros((ROWS - ends[-1], 4))])


def results(function, x, kernel):
    def total(x, kernel):
        y = function(x, kernel)
        return jnp.sum(jnp.sin(y)), y

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))(x, kernel)


@pytest.mark.parametrize("sizes", SIZES)
def test_every_row_meets_the_kernel_of_its_group(sizes):
    x, kernel = operands()
    (_, y), gradients = results(
        lambda x, kernel: grouped_product(x, kernel, jnp.array(sizes), "float32"), x, kernel
    )
    (_, expected), wanted = results(lambda x, kernel: written_out(x, kernel, sizes), x, kernel)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    for gradient, want in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(gradient, want, atol=1e-5)


@pytest.mark.parametrize("name", ["_rows_by_kernels", "_rows_by_rows"])
def test_blocks_equal_the_product_that_other_platforms_take(name):
    """The CPU's loops against `ragged_dot`, which CPUs have too, slowly."""
    x, kernel = operands()
    second = kernel if name == "_rows_by_kernels" else x[:, ::-1]
    function = getattr(grouped, name)
    closed = jax.make_jaxpr(function)(x, second, jnp.array(SIZES[0]))
    assert "ragged_dot" in str(closed)
    blocks = getattr(grouped, f"{name}_in_blocks")(x, second, jnp.array(SIZES[0]))
    np.testing.assert_allclose(function(x, second, jnp.array(SIZES[0])), blocks, atol=1e-5)


def test_bfloat16_rounds_operands_but_not_sums():
    x, kernel = operands("bfloat16")
    sizes = jnp.array(SIZES[0])
    (_, y), gradients = results(
        lambda x, kernel: grouped_product(x, kernel, sizes, "bfloat16"), x, kernel
    )
    rounded = kernel.astype(jnp.bfloat16).astype(jnp.float32)
    (_, expected), wanted = results(
        lambda x, kernel: written_out(x, kernel, SIZES[0]), x.astype(jnp.float32), rounded
    )
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, expected, atol=1e-5)
    assert [g.dtype for g in gradients] == [jnp.bfloat16, jnp.float32]
    for gradient, want in zip(gradients, wanted, strict=True):
        error = jnp.linalg.norm(gradient.astype(jnp.float32) - want) / jnp.linalg.norm(want)
        assert error < 0.01
