"""Reward and value heads: where they are read, in which precision, and how they begin."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.models import LanguageModel, ModelConfig
from llm_jax.models.heads import (
    REWARD,
    VALUE,
    init_reward_head,
    init_value_head,
    rewards,
    values,
)
from llm_jax.sharding import unbox
from llm_jax.types import Batch

CONFIG = ModelConfig(
    vocab_size=32, embed_dim=16, num_layers=2, num_heads=2, mlp_dim=16, residual_dropout=0.5
)
TIME = 8
LENGTHS = [[5, TIME], [1, 0]]  # the last sequence is padding


@pytest.fixture(autouse=True)
def _exact_products():
    with jax.default_matmul_precision("highest"):
        yield


def make(**changes):
    model = LanguageModel(dataclasses.replace(CONFIG, **changes))
    params = unbox(jax.jit(model.init)(jax.random.key(0)))
    return model, params | unbox(init_reward_head(jax.random.key(1), CONFIG.embed_dim))


@pytest.fixture(scope="module")
def made():
    """A function of responses and parameters, and the parameters."""
    model, params = make()
    return jax.jit(functools.partial(rewards, model)), params


def make_responses():
    real = np.arange(TIME) < np.array(LENGTHS)[..., None]
    tokens = np.random.default_rng(0).integers(0, 32, (2, 2, TIME)).astype(np.int32)
    segments = real.astype(np.int32)
    positions = np.arange(TIME, dtype=np.int32) * segments
    return Batch(tokens, tokens, np.zeros((2, 2, TIME), np.float32), segments, positions)


def change(responses, row, column, places):
    """Other tokens there."""
    tokens = responses.tokens.copy()
    tokens[row, column, places] = (tokens[row, column, places] + 7) % 32
    return responses.replace(tokens=tokens)


def test_rewards_are_the_head_on_the_last_real_token(made):
    model, params = make()
    function, _ = made
    responses = make_responses()
    values = function(params, responses)
    assert values.shape == (2, 2)
    kernel = np.asarray(params[REWARD]["kernel"])[:, 0]
    for row, column in np.argwhere(LENGTHS):
        tokens = responses.tokens[row, column, : LENGTHS[row][column]]
        hidden, _ = model.apply(params, tokens[None])
        assert float(values[row, column]) == pytest.approx(float(hidden[0, -1] @ kernel), abs=1e-5)
    assert np.isfinite(values[1, 1])


def test_padding_changes_nothing_and_every_real_token_something(made):
    function, params = made
    responses = make_responses()
    values = function(params, responses)
    padded = change(change(responses, 0, 0, slice(5, None)), 1, 0, slice(1, None))
    np.testing.assert_array_equal(function(params, padded)[:, 0], values[:, 0])
    for row, column, places in ((0, 0, 4), (0, 0, 0), (0, 1, TIME - 1), (1, 0, 0)):
        moved = np.abs(function(params, change(responses, row, column, places)) - values) > 1e-4
        assert np.argwhere(moved).tolist() == [[row, column]], "that sequence and no other"


def test_leading_axes_are_kept(made):
    function, params = made
    values = function(params, make_responses())
    flat = jax.tree.map(lambda x: x.reshape(4, TIME), make_responses())
    np.testing.assert_allclose(function(params, flat), values.reshape(4), atol=1e-5)


def test_rewards_are_float32_whatever_the_model_computes_in():
    model, params = make(dtype="bfloat16")
    responses = jax.tree.map(lambda x: x[0], make_responses())
    values = jax.jit(functools.partial(rewards, model))(params, responses)
    hidden, _ = jax.jit(model.apply)(
        params, responses.tokens, responses.positions, responses.segment_ids
    )
    hidden = np.asarray(hidden[np.arange(2), np.array(LENGTHS[0]) - 1], np.float64)
    kernel = params[REWARD]["kernel"][:, 0]
    assert values.dtype == kernel.dtype == jnp.float32
    np.testing.assert_allclose(values, hidden @ np.float64(kernel), atol=1e-6)
    rounded = hidden @ np.float64(kernel.astype(jnp.bfloat16))
    assert np.abs(values - rounded).max() > 1e-4


def test_a_key_switches_dropout_on(made):
    function, params = made
    first, same, other = (
        function(params, make_responses(), jax.random.key(seed)) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, same)
    assert np.abs(first - other)[0].max() > 0.01


def test_gradients_reach_the_head_and_the_model_but_not_from_padding(made):
    function, params = made

    def gradient(row, column):
        return jax.grad(lambda params: function(params, make_responses())[row, column])(params)

    for leaf in jax.tree.leaves(gradient(0, 0)):
        assert np.all(np.isfinite(leaf)) and np.any(leaf)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient(1, 1)))


def test_the_head_begins_as_in_stiennon_et_al():
    head = init_reward_head(jax.random.key(0), 40_000)[REWARD]["kernel"]
    assert head.names == ("embed", "head_output")
    kernel = np.asarray(unbox(head))
    assert (kernel.shape, kernel.dtype) == ((40_000, 1), np.float32)
    # The deviation of 40,000 draws is known to 0.35 %, their mean to 0.005 deviations.
    deviation = 1 / np.sqrt(40_001)
    assert kernel.std() == pytest.approx(deviation, rel=0.02)
    assert abs(kernel.mean()) < 0.02 * deviation
    few = [unbox(init_reward_head(jax.random.key(s), 3))[REWARD]["kernel"] for s in range(2000)]
    assert np.std(few) == pytest.approx(1 / 2, rel=0.04), "1 / sqrt(d + 1), not 1 / sqrt(d)"


# --- values ---------------------------------------------------------------------------------------


def test_values_are_the_head_on_every_position_and_see_nothing_later():
    model, params = make()
    kernel = params[REWARD]["kernel"]
    params |= {VALUE: {"kernel": 2 * kernel}}
    batch = jax.tree.map(lambda x: x[0], make_responses())
    function = jax.jit(functools.partial(values, model))
    found = function(params, batch)
    assert (found.shape, found.dtype) == ((2, TIME), jnp.float32)
    for row, length in enumerate(LENGTHS[0]):
        hidden, _ = model.apply(params, batch.tokens[row : row + 1, :length])
        np.testing.assert_allclose(found[row, :length], 2 * hidden[0] @ kernel[:, 0], atol=1e-4)
    tokens = batch.tokens.copy()
    tokens[1, 4] = (tokens[1, 4] + 7) % 32
    moved = np.abs(function(params, batch.replace(tokens=tokens)) - found) > 1e-4
    assert np.argwhere(moved)[:, 0].min() == 1 and np.argwhere(moved)[:, 1].min() == 4


def test_a_critic_that_has_learnt_nothing_expects_0():
    model, params = make()
    params |= unbox(init_value_head(CONFIG.embed_dim))
    batch = jax.tree.map(lambda x: x[0], make_responses())
    assert init_value_head(16)[VALUE]["kernel"].names == ("embed", "head_output")

    def total(params):
        found = values(model, params, batch)
        return jnp.sum(jnp.square(found - 1)), found

    gradient, found = jax.jit(jax.grad(total, has_aux=True))(params)
    assert found.dtype == jnp.float32 and not np.any(found)
    assert np.any(gradient[VALUE]["kernel"]), "it learns"
