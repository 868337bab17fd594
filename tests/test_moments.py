"""bfloat16 second moments: right on average where rounding to nearest stands still."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llm_jax.moments import keep_second_moment_in_bfloat16, round_to_bfloat16
from llm_jax.optim import OptimizerConfig, make_optimizer

DRAWS = 1 << 14


@pytest.mark.parametrize("x", [1 + 1 / 1024, -3.003, 1.9999, 1e-30, 2.5e-40])
def test_a_number_becomes_its_neighbours_in_proportion(x):
    exact = np.full(DRAWS, x, np.float32)
    rounded = np.asarray(round_to_bfloat16(exact, jax.random.key(0)), np.float32)
    low, high = np.unique(rounded)
    assert min(low, high) < exact[0] < max(low, high)
    bits = np.array([low, high], np.float32).view(np.uint32) >> 16
    assert abs(int(bits[0]) - int(bits[1])) == 1
    deviation = (high - low) / 2 / np.sqrt(DRAWS)
    assert np.mean(rounded, dtype=np.float64) == pytest.approx(float(exact[0]), abs=5 * deviation)


def test_numbers_that_bfloat16_has_stay():
    x = jnp.array([0.0, 1.0, -0.5, 3.0e38, 1e-38, 0.015625], jnp.bfloat16).astype(jnp.float32)
    for seed in range(4):
        np.testing.assert_array_equal(round_to_bfloat16(x, jax.random.key(seed)), x)


def second_moments(adam, gradients):
    """ν after each gradient, float32 [steps, DRAWS]."""

    def step(state, g):
        _, state = adam.update({"w": jnp.full(DRAWS, g)}, state)
        return state, state.nu["w"].astype(jnp.float32)

    start = adam.init({"w": jnp.zeros(DRAWS)})
    return np.asarray(jax.jit(lambda g: jax.lax.scan(step, start, g)[1])(gradients))


@pytest.mark.parametrize("b2", [0.95, 0.999])
def test_the_second_moment_is_the_exponential_mean(b2):
    """A loud step, then quiet ones: ν falls by a factor of e in 1 / (1 − b2) steps."""
    steps = round(1 / (1 - b2))
    gradients = jnp.array([1 / np.sqrt(1 - b2)] + [0.01] * steps, jnp.float32)
    adam = optax.scale_by_adam(0.9, b2)
    exact = second_moments(adam, gradients)[-1, 0]
    kept = second_moments(keep_second_moment_in_bfloat16(adam), gradients)[-1]
    # The mean over many parameters, and the spread of one that the docstring speaks of.
    assert kept.mean() == pytest.approx(exact, rel=0.002)
    assert 0.3 < kept.std() / exact / (0.002 / np.sqrt(1 - b2)) < 1.5

    nearest = jnp.bfloat16(1.0)
    for _ in range(3):  # what the state would be with a plain cast: it stays at 1 for good
        nearest = (0.999 * nearest.astype(jnp.float32)).astype(jnp.bfloat16)
    assert nearest == 1


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_first_update_is_that_of_float32(name):
    """Updates are made of ν before it is rounded, and only ν is kept in bfloat16."""
    params = {"table": np.ones((4, 8), np.float32), "scale": np.ones(8, np.float32)}
    gradients = jax.tree.map(lambda p: np.random.default_rng(0).normal(size=p.shape), params)

    def first(**changes):
        optimizer = make_optimizer(OptimizerConfig(name=name, **changes), params)
        return optimizer.update(
            gradients, optimizer.init(params), params, learning_rate=np.float32(0.1)
        )

    (updates, _), (rounded, state) = first(), first(nu_dtype="bfloat16")
    jax.tree.map(np.testing.assert_array_equal, updates, rounded)
    dtypes = {
        jax.tree_util.keystr(path).split(".")[-1].split("[")[0]: leaf.dtype
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }
    assert dtypes["nu"] == jnp.bfloat16 and dtypes["mu"] == jnp.float32


@pytest.mark.parametrize("b2", [0.95, 0.999])
def test_a_regression_learns_as_it_does_with_float32_moments(b2):
    random = np.random.default_rng(0)
    x, w = random.normal(size=(512, 32)), random.normal(size=(32, 8))
    x, y = jnp.asarray(x), jnp.asarray(x @ w + 0.5 * random.normal(size=(512, 8)))

    def loss(w, rows):
        return jnp.mean(jnp.square(x[rows] @ w - y[rows]))

    def final(**changes):
        config = OptimizerConfig(b2=b2, weight_decay=0.0, **changes)
        params = jnp.zeros((32, 8))
        optimizer = make_optimizer(config, {"kernel": params})

        def step(carry, rows):
            params, state = carry
            gradient = {"kernel": jax.grad(loss)(params["kernel"], rows)}
            updates, state = optimizer.update(gradient, state, params, learning_rate=0.03)
            return (optax.apply_updates(params, updates), state), None

        rows = jnp.asarray(random_rows)
        carry = ({"kernel": params}, optimizer.init({"kernel": params}))
        (params, _), _ = jax.jit(lambda c, r: jax.lax.scan(step, c, r))(carry, rows)
        return float(loss(params["kernel"], slice(None)))

    random_rows = random.integers(0, 512, (600, 64))
    assert final(nu_dtype="bfloat16") == pytest.approx(final(), rel=0.01)
