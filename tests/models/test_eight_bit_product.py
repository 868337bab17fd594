"""Products of 8-bit operands against numpy's codes, float64, and the product they stand for."""

import dataclasses
import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llm_jax.config import build, defaults
from llm_jax.errors import UserError
from llm_jax.models import LanguageModel, ModelConfig
from llm_jax.models.eight_bit_product import FORMATS, INT8, Matmul, eight_bit_product
from llm_jax.models.lora import LoraConfig
from llm_jax.models.moe import MoeConfig
from llm_jax.models.product import product
from llm_jax.sharding import unbox

# Of a code, the largest, and how far rounding goes: in parts of the number, or in steps of its
# scale where that is more. A float8 of m bits of mantissa is off by 2^-(m + 1) of itself, or by
# half of its smallest subnormal number.
NUMBERS = {
    "int8": (np.int8, 127, 0, 1 / 2),
    "e4m3": (jnp.float8_e4m3fn, 448, 2**-4, 2**-10),
    "e5m2": (jnp.float8_e5m2, 57344, 2**-3, 2**-17),
}
# Of operands forward, and of the gradient of their product.
CHOICES = {"int8": ("int8", "int8"), "fp8": ("e4m3", "e5m2")}
# Deviation of the error of sums of normal operands, as a part of theirs: forward, and backward.
DEVIATIONS = {"int8": (0.015, 0.015), "fp8": (0.045, 0.07)}
SHAPES = {
    "plain": ((2, 5, 64), (64, 16), (0,)),
    "several out": ((2, 5, 64), (64, 3, 2, 4), (0,)),
    "several contracted": ((2, 5, 8, 8), (8, 8, 16), (0, 1)),
    "contracted between": ((2, 5, 64), (3, 64, 8), (1,)),
}


def operands(shape):
    random = np.random.default_rng(0)
    x, kernel = (random.normal(size=s).astype(np.float32) for s in shape[:2])
    x[0, 0] *= 100  # a loud token has a scale of its own
    x[0, 1] = 0
    kernel[..., 0] *= 0.01  # and so has a quiet channel
    return x, kernel


def matrix(kernel, contracted):
    """[C, F]."""
    return np.moveaxis(kernel, contracted, range(len(contracted))).reshape(64, -1)


def coded(x, numbers, axis):
    """What 8 bits make of x, in float64, and the largest errors of that."""
    dtype, largest, relative, absolute = NUMBERS[numbers]
    scales = np.abs(x).max(axis=axis, keepdims=True) / np.float32(largest)
    scales[scales == 0] = 1
    codes = np.rint(x / scales) if dtype == np.int8 else x / scales
    rounded = codes.astype(dtype).astype(np.float64) * scales
    return rounded, np.maximum(relative * np.abs(x), absolute * scales)


def by_hand(a, b, a_numbers, b_numbers):
    """[rows, C] by [C, columns] of 8 bits, and the largest error that rounding can make."""
    (a_coded, a_errors), (b_coded, b_errors) = coded(a, a_numbers, 1), coded(b, b_numbers, 0)
    bound = np.abs(a) @ b_errors + a_errors @ np.abs(b) + a_errors @ b_errors
    return a_coded @ b_coded, bound


@functools.partial(jax.jit, static_argnums=(2, 3))
def eight_bit(x, kernel, contracted, matmul):
    return eight_bit_product(x, kernel, "float32", contracted, matmul)


@pytest.mark.parametrize("matmul", CHOICES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_sum_is_that_of_8_bit_numbers_and_within_the_bound(shape, matmul):
    x, kernel = operands(shape)
    y = np.asarray(eight_bit(x, kernel, shape[2], matmul), np.float64)
    numbers = CHOICES[matmul][0]
    a, b = x.reshape(10, 64), matrix(kernel, shape[2])
    wanted, bound = by_hand(a, b, numbers, numbers)
    close = {"rtol": 1e-5, "atol": 1e-6 * np.abs(wanted).max()}
    np.testing.assert_allclose(y.reshape(wanted.shape), wanted, **close)
    error = y.reshape(wanted.shape) - a.astype(np.float64) @ b
    assert np.all(np.abs(error) <= bound + 1e-6)
    assert np.std(error[2:, 1:]) < DEVIATIONS[matmul][0] * np.std(wanted[2:, 1:])
    assert np.all(y[0, 1] == 0)


def gradients(multiply, *operands_and_probe):
    """Of the product, where the last argument is that of its result."""
    *operands, probe = operands_and_probe
    return jax.jit(lambda operands, probe: jax.vjp(multiply, *operands)[1](probe))(operands, probe)


@pytest.mark.parametrize("matmul", CHOICES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_rounding_passes_gradients_straight_through(shape, matmul):
    x, kernel = operands(shape)
    y = eight_bit(x, kernel, shape[2], matmul)
    probe = np.random.default_rng(1).normal(size=y.shape).astype(np.float32)
    probe[0, 2] = 0
    plain = gradients(lambda x, w: product(x, w, "float32", shape[2]), x, kernel, probe)
    forward, both = (
        gradients(functools.partial(eight_bit, contracted=shape[2], matmul=m), x, kernel, probe)
        for m in (f"{matmul}_forward", matmul)
    )
    jax.tree.map(np.testing.assert_array_equal, forward, plain)
    np.testing.assert_array_equal(both[1], plain[1])
    numbers, of_gradient = CHOICES[matmul]
    a, b = probe.reshape(10, -1), matrix(kernel, shape[2]).T
    wanted, bound = by_hand(a, b, of_gradient, numbers)
    np.testing.assert_allclose(np.reshape(both[0], wanted.shape), wanted, rtol=1e-4, atol=1e-6)
    error = (both[0] - plain[0]).reshape(wanted.shape)
    assert np.all(np.abs(error) <= bound + 1e-5)
    assert np.std(error) < DEVIATIONS[matmul][1] * np.std(wanted)


@pytest.mark.parametrize("matmul", CHOICES)
def test_the_largest_magnitudes_stay_numbers(matmul):
    """Of e4m3, a code above 464 would be nan; of e5m2, above 61440 infinite."""
    random = np.random.default_rng(0)
    large = 2 ** random.uniform(-100, 100, 4096)
    exact = [448, 57344, 127, 464, 61440, 1e5, 1e-37, 0]  # the last but one has a subnormal scale
    large = np.concatenate([large, exact]).astype(np.float32)
    x = np.stack([large, -large, large / 2, np.zeros_like(large)], axis=1)
    one = np.eye(4, dtype=np.float32)
    y = eight_bit(x, one, (0,), matmul)
    (dx,) = gradients(lambda x: eight_bit(x, one, (0,), matmul), x, x)
    for back in (y, dx):
        largest = np.asarray(back)[:-2, :2]
        np.testing.assert_allclose(largest, x[:-2, :2], rtol=1e-6)
        assert np.all(np.isfinite(back)) and np.all(back[-1] == 0)


def test_a_sum_that_int32_may_not_hold_is_refused():
    x, kernel = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, 2**18), (2**18, 1)))
    assert 2**18 > INT8.max_terms >= 2**17
    with pytest.raises(ValueError, match=r"262144 products .* int32"):
        eight_bit.eval_shape(x, kernel, (0,), "int8_forward")
    assert eight_bit.eval_shape(x, kernel, (0,), "fp8_forward").dtype == jnp.float32


CONFIG = ModelConfig(
    vocab_size=32, embed_dim=32, num_layers=1, num_heads=2, mlp_dim=64, scan_layers=True
)


@functools.cache
def losses(matmul):
    """Of a model that learns to say what follows in a rule of two tokens."""
    model = LanguageModel(dataclasses.replace(CONFIG, matmul=matmul))
    params = unbox(jax.jit(model.init)(jax.random.key(0)))
    optimizer = optax.adam(1e-2)

    def loss(params, rng):
        first = jax.random.randint(rng, (16, 2), 0, 32)
        columns = [first[:, 0], first[:, 1]]
        for _ in range(15):
            columns.append((columns[-1] + 3 * columns[-2]) % 32)
        rows = jnp.stack(columns, axis=1)
        logits = model.logits(params, model.apply(params, rows[:, :-1])[0])
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:])
        return jnp.mean(nats[:, 1:])

    def step(carry, rng):
        params, state = carry
        value, gradient = jax.value_and_grad(loss)(params, rng)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(params, updates), state), value

    rngs = jax.random.split(jax.random.key(1), 150)
    run = jax.jit(lambda params: jax.lax.scan(step, (params, optimizer.init(params)), rngs)[1])
    return np.asarray(run(params))


@pytest.mark.parametrize("matmul", ["int8", "fp8"])
def test_a_model_learns_as_well_as_in_float32(matmul):
    plain, rounded = (losses(m)[-20:].mean() for m in ("default", matmul))
    assert plain < 2.8  # of ln 32 = 3.47: it has learnt something
    assert rounded != plain and rounded < plain + 0.1


def test_every_choice_comes_back_from_its_config():
    choices = typing.get_args(Matmul)
    assert set(choices) == {"default", *FORMATS}
    for matmul in choices:
        config = defaults(ModelConfig, matmul=matmul)
        assert build(ModelConfig, config) == ModelConfig(matmul=matmul)


@pytest.mark.parametrize("matmul", FORMATS)
@pytest.mark.parametrize("changes", [{"moe": MoeConfig()}, {"lora": LoraConfig()}])
def test_kernels_that_are_not_dense_are_refused(changes, matmul):
    message = rf"model\.matmul='{matmul}' .* model\.(moe|lora) has others"
    with pytest.raises(UserError, match=message):
        ModelConfig(matmul=matmul, **changes)


def test_an_unknown_choice_is_refused():
    with pytest.raises(UserError, match=r"model\.matmul='int4'"):
        ModelConfig(matmul="int4")
