"""Products of 8-bit operands against whole numbers, float64, and the product they stand for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llm_jax.errors import UserError
from llm_jax.models import LanguageModel, ModelConfig
from llm_jax.models.int8_product import MAX_TERMS, int8_product
from llm_jax.models.lora import LoraConfig
from llm_jax.models.moe import MoeConfig
from llm_jax.models.product import product
from llm_jax.sharding import unbox

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


def by_hand(a, b):
    """[rows, C] by [C, columns] in whole numbers, and the largest error that rounding can make."""
    a_scales = np.abs(a).max(axis=1, keepdims=True) / np.float32(127)
    b_scales = np.abs(b).max(axis=0, keepdims=True) / np.float32(127)
    a_scales[a_scales == 0] = 1
    a_codes, b_codes = (np.rint(x / s).astype(int) for x, s in ((a, a_scales), (b, b_scales)))
    bound = a.shape[1] * 127**2 * (2 + 1 / 254) / 254 * a_scales * b_scales
    return (a_codes @ b_codes) * a_scales * b_scales, bound


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_sum_is_that_of_whole_numbers_and_within_the_bound(shape):
    x, kernel = operands(shape)
    y = np.asarray(int8_product(x, kernel, "float32", shape[2], False), np.float64)
    a, b = x.reshape(10, 64), matrix(kernel, shape[2])
    wanted, bound = by_hand(a, b)
    np.testing.assert_allclose(y.reshape(wanted.shape), wanted, rtol=1e-5)
    error = y.reshape(wanted.shape) - a.astype(np.float64) @ b
    assert np.all(np.abs(error) <= bound + 1e-6)
    assert np.std(error[2:, 1:]) < 0.015 * np.std(wanted[2:, 1:])
    assert np.all(y[0, 1] == 0)


def gradients(multiply, x, kernel, probe):
    return jax.jit(lambda x, kernel, probe: jax.vjp(multiply, x, kernel)[1](probe))(
        x, kernel, probe
    )


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_rounding_passes_gradients_straight_through(shape):
    x, kernel = operands(shape)
    y = int8_product(x, kernel, "float32", shape[2], False)
    probe = np.random.default_rng(1).normal(size=y.shape).astype(np.float32)
    plain = gradients(lambda x, w: product(x, w, "float32", shape[2]), x, kernel, probe)
    forward = gradients(
        lambda x, w: int8_product(x, w, "float32", shape[2], False), x, kernel, probe
    )
    both = gradients(lambda x, w: int8_product(x, w, "float32", shape[2], True), x, kernel, probe)
    jax.tree.map(np.testing.assert_array_equal, forward, plain)
    np.testing.assert_array_equal(both[1], plain[1])
    wanted, bound = by_hand(probe.reshape(10, -1), matrix(kernel, shape[2]).T)
    np.testing.assert_allclose(np.reshape(both[0], wanted.shape), wanted, rtol=1e-4, atol=1e-6)
    assert np.all(np.abs(both[0] - plain[0]).reshape(wanted.shape) <= bound + 1e-5)


def test_a_sum_that_int32_may_not_hold_is_refused():
    x, kernel = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, 2**18), (2**18, 1)))
    assert 2**18 > MAX_TERMS >= 2**17
    with pytest.raises(ValueError, match="262144 products"):
        jax.eval_shape(lambda x, w: int8_product(x, w, "float32", (0,), False), x, kernel)


CONFIG = ModelConfig(
    vocab_size=32, embed_dim=32, num_layers=1, num_heads=2, mlp_dim=64, scan_layers=True
)


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


def test_a_model_learns_as_it_does_in_float32():
    plain, rounded = (losses(m)[-20:].mean() for m in ("default", "int8"))
    assert plain < 2.8  # of ln 32 = 3.47: it has learnt something
    assert rounded != plain and rounded == pytest.approx(plain, abs=0.2)


@pytest.mark.parametrize("changes", [{"moe": MoeConfig()}, {"lora": LoraConfig()}])
def test_kernels_that_are_not_dense_are_refused(changes):
    with pytest.raises(UserError, match=r"model\.matmul='int8' .* model\.(moe|lora) has others"):
        ModelConfig(matmul="int8", **changes)


def test_an_unknown_choice_is_refused():
    with pytest.raises(UserError, match=r"model\.matmul='int4'"):
        ModelConfig(matmul="int4")
