"""The matrix product of projections against float64, and what it rounds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.models.product import _bfloat16_in_two_steps, batched_product, product, turned

SHAPES = {
    "plain": ((2, 5, 6), (6, 4), (0,)),
    "several out": ((2, 5, 6), (6, 3, 2, 4), (0,)),
    "several contracted": ((2, 5, 3, 2), (3, 2, 4), (0, 1)),
    "contracted between": ((2, 5, 6), (3, 2, 6, 4), (2,)),
    "contracted between, many rows": ((20, 5, 6), (3, 2, 6, 4), (2,)),
    "several contracted between": ((2, 5, 3, 2), (5, 3, 2, 4), (1, 2)),
    "no rows": ((6,), (6, 4), (0,)),
}


def operands(shape):
    rng = np.random.default_rng(0)
    x, kernel = (rng.normal(size=s) for s in shape[:2])
    lead = x.ndim - len(shape[2])
    y = np.tensordot(x, kernel, (range(lead, x.ndim), shape[2]))
    return x, kernel, y, rng.normal(size=y.shape)


def with_gradients(x, kernel, probe, dtype, contracted):
    def total(x, kernel):
        y = product(x, kernel, dtype, contracted)
        return jnp.sum(y * probe), y

    both = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))
    (_, y), gradients = both(x, kernel)
    return y, *gradients


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 0.1)])
def test_value_and_gradients(shape, dtype, tolerance):
    x, kernel, y, probe = operands(shape)
    contracted = shape[2]
    lead = x.ndim - len(contracted)
    kept = [axis for axis in range(kernel.ndim) if axis not in contracted]
    d_kernel = np.tensordot(x, probe, (range(lead), range(lead)))
    wanted = (
        y,
        np.tensordot(probe, kernel, (range(lead, probe.ndim), kept)),
        np.moveaxis(d_kernel, range(len(contracted)), contracted),
    )
    with jax.default_matmul_precision("highest"):
        found = with_gradients(
            x.astype(dtype), kernel.astype(np.float32), probe.astype(np.float32), dtype, contracted
        )
    assert [a.dtype for a in found] == [np.float32, jnp.dtype(dtype), np.float32]
    for actual, expected in zip(found, wanted, strict=True):
        assert actual.shape == expected.shape
        np.testing.assert_allclose(actual.astype(np.float32), expected, atol=tolerance)


def test_bfloat16_operands_are_summed_in_float32():
    """256 + 1 is not a bfloat16, so a sum kept in that type would lose every 1."""
    x = jnp.concatenate([jnp.full((1, 1), 256.0), jnp.ones((1, 63))], axis=1)
    y, dx, d_kernel = with_gradients(
        x.astype(jnp.bfloat16), jnp.ones((64, 3)), jnp.ones((1, 3)), "bfloat16", (0,)
    )
    assert y.tolist() == [[319.0] * 3]
    assert np.all(dx.astype(np.float32) == 3)
    rows = jnp.ones((300, 64), jnp.bfloat16)
    _, _, d_kernel = with_gradients(rows, jnp.ones((64, 3)), jnp.ones((300, 3)), "bfloat16", (0,))
    assert np.all(d_kernel == 300)


def test_rounding_is_that_of_a_cast():
    """Ties, subnormal numbers of both types, what overflows, infinities and NaN, bit for bit."""
    bits = np.random.default_rng(0).integers(0, 2**32, 10_000, np.uint32)
    halfway = np.arange(0, 2**32, 2**15, dtype=np.uint64).astype(np.uint32)  # every tie and every
    values = np.concatenate([bits, halfway, halfway + 1, halfway - 1]).view(np.float32)  # bfloat16
    actual = np.asarray(jax.jit(_bfloat16_in_two_steps)(values))
    expected = values.astype(jnp.bfloat16)
    assert actual.dtype == jnp.bfloat16
    unordered = np.isnan(values)
    assert unordered.any() and np.isnan(actual[unordered].astype(np.float32)).all()
    np.testing.assert_array_equal(
        actual[~unordered].view(np.uint16), expected[~unordered].view(np.uint16)
    )


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 0.1)])
def test_batched_value_and_gradients(transposed, dtype, tolerance):
    rng = np.random.default_rng(0)
    a, b, probe = (rng.normal(size=s) for s in ((2, 3, 4, 5), (2, 3, 5, 6), (2, 3, 4, 6)))
    wanted = a @ b, probe @ b.swapaxes(-1, -2), a.swapaxes(-1, -2) @ probe
    if transposed:
        b, wanted = b.swapaxes(-1, -2), (*wanted[:2], wanted[2].swapaxes(-1, -2))

    def total(a, b):
        y = batched_product(a, b, transposed)
        return jnp.sum(y * probe.astype(np.float32)), y

    with jax.default_matmul_precision("highest"):
        both = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))
        (_, y), gradients = both(a.astype(dtype), b.astype(dtype))
    assert y.dtype == np.float32
    for actual, expected in zip((y, *gradients), wanted, strict=True):
        np.testing.assert_allclose(actual.astype(np.float32), expected, atol=tolerance)


def test_turned_and_back():
    x = jnp.arange(24.0).reshape(2, 3, 4)
    np.testing.assert_array_equal(jax.jit(turned)(x), np.moveaxis(x, 0, -1))
    np.testing.assert_array_equal(turned(turned(x, 2), 1), x)
    np.testing.assert_array_equal(turned(x, 2, 1), np.swapaxes(x, 1, 2))
    probe = jnp.arange(24.0, 48.0).reshape(4, 2, 3)
    gradient = jax.grad(lambda x: jnp.sum(turned(x, 2) * probe))(x)
    np.testing.assert_array_equal(gradient, np.moveaxis(probe, 0, -1))
