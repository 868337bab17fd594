"""Log-probabilities of responses against a soft-max written out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.models import LanguageModel, ModelConfig
from llm_jax.objectives.logprobs import response_lengths, response_logprobs
from llm_jax.sharding import unbox
from llm_jax.types import Batch

TIME, VOCABULARY = 11, 32
PROMPTS, LENGTHS = [[3, 1], [4, 0]], [[5, 2], [7, 0]]  # the last sequence is padding


@pytest.fixture(autouse=True)
def _exact_products():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def model_and_params():
    config = ModelConfig(
        vocab_size=VOCABULARY,
        embed_dim=16,
        num_layers=1,
        num_heads=2,
        mlp_dim=16,
        residual_dropout=0.5,
    )
    model = LanguageModel(config)
    return model, jax.tree.map(lambda x: 3 * x, unbox(jax.jit(model.init)(jax.random.key(0))))


def make_responses(seed=0):
    """[2, 2, time], as the data comes; what stands in padding is drawn anew by every seed."""
    prompts, ends = np.array(PROMPTS)[..., None], np.add(PROMPTS, LENGTHS)[..., None]
    place = np.arange(TIME)
    fixed = np.random.default_rng(0).integers(0, VOCABULARY, (2, 2, TIME))
    noise = np.random.default_rng(seed).integers(0, VOCABULARY, (2, 2, TIME))
    tokens = np.where(place < ends, fixed, noise).astype(np.int32)
    return Batch(
        tokens=tokens,
        targets=np.roll(tokens, -1, axis=-1),
        loss_weights=((place >= prompts - 1) & (place < ends - 1)).astype(np.float32),
        segment_ids=(place < ends).astype(np.int32),
        positions=(place * (place < ends)).astype(np.int32),
    )


def logprobs_of(model, params, responses, chunk=None):
    return jax.jit(functools.partial(response_logprobs, model, chunk=chunk))(params, responses)


def written_out(model, params, tokens, prompt):
    """Σ log p(token | all before it) over one response, without padding, from all logits."""
    hidden, _ = model.apply(params, tokens[None])
    logits = np.asarray(model.logits(params, hidden)[0], np.float64)
    logprobs = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
    return sum(logprobs[place - 1, tokens[place]] for place in range(prompt, len(tokens)))


@pytest.mark.parametrize("chunk", [None, 1, 4, TIME, 64])
def test_sums_over_the_tokens_of_the_response(model_and_params, chunk):
    model, params = model_and_params
    responses = make_responses()
    logprobs = logprobs_of(model, params, responses, chunk)
    assert (logprobs.shape, logprobs.dtype) == ((2, 2), jnp.float32)
    for row, column in np.argwhere(LENGTHS):
        prompt = PROMPTS[row][column]
        tokens = responses.tokens[row, column, : prompt + LENGTHS[row][column]]
        expected = written_out(model, params, tokens, prompt)
        assert float(logprobs[row, column]) == pytest.approx(expected, abs=1e-4)
    assert logprobs[1, 1] == 0


def test_any_leading_axes_will_do(model_and_params):
    model, params = model_and_params
    responses = make_responses()
    logprobs = logprobs_of(model, params, responses)
    flat = jax.tree.map(lambda x: x.reshape(4, TIME), responses)
    np.testing.assert_allclose(logprobs_of(model, params, flat), logprobs.reshape(4), atol=1e-5)
    single = jax.tree.map(lambda x: x[0, 0], responses)
    np.testing.assert_allclose(logprobs_of(model, params, single), logprobs[0, 0], atol=1e-5)


def test_what_stands_in_padding_means_nothing(model_and_params):
    model, params = model_and_params
    first, second = make_responses(), make_responses(seed=1)
    assert np.any(first.tokens != second.tokens)
    np.testing.assert_array_equal(
        logprobs_of(model, params, first), logprobs_of(model, params, second)
    )


@pytest.mark.parametrize("chunk", [None, 4])
def test_gradients_are_finite_and_padding_rows_have_none(model_and_params, chunk):
    model, params = model_and_params
    responses = make_responses()

    @jax.jit
    def gradient(params, weights):
        return jax.grad(
            lambda params: jnp.sum(
                weights * response_logprobs(model, params, responses, chunk=chunk)
            )
        )(params)

    for leaf in jax.tree.leaves(gradient(params, jnp.ones((2, 2)))):
        assert np.all(np.isfinite(leaf)) and np.any(leaf)
    padding = jnp.zeros((2, 2)).at[1, 1].set(1)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient(params, padding)))


def test_a_key_switches_dropout_on(model_and_params):
    model, params = model_and_params
    function = jax.jit(lambda rng: response_logprobs(model, params, make_responses(), rng=rng))
    none, first, same, other = (function(rng) for rng in (None, *map(jax.random.key, (0, 0, 1))))
    np.testing.assert_array_equal(first, same)
    assert np.abs(first - none).max() > 0.01 and np.abs(first - other).max() > 0.01
    np.testing.assert_allclose(none, logprobs_of(model, params, make_responses()), atol=1e-5)


def test_lengths_count_what_counts():
    lengths = response_lengths(make_responses())
    assert lengths.dtype == jnp.float32
    np.testing.assert_array_equal(lengths, LENGTHS)
