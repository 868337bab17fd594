"""Divergences against exact ones; log-probabilities and entropies against the sampler's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.generation.sampler import SamplerConfig, logprob
from llm_jax.objectives.policy import (
    KL_ESTIMATORS,
    clipped_surrogate,
    log_ratios,
    masked_mean,
    policy_metrics,
    policy_outputs,
)

LOGITS = jnp.array([0.3, -1.0, 1.4, 0.0])
OTHER = jnp.array([0.0, 0.5, 0.9, -0.8])


@pytest.fixture(autouse=True)
def _exact_products():
    with jax.default_matmul_precision("highest"):
        yield


# --- estimators of divergences, exactly in expectation over a small distribution ------------------


def divergence(logits, other):
    """KL(softmax(logits) ‖ softmax(other))."""
    p, q = jax.nn.log_softmax(logits), jax.nn.log_softmax(other)
    return jnp.sum(jnp.exp(p) * (p - q))


def expected(estimator, logits, other):
    p, q = jax.nn.log_softmax(logits), jax.nn.log_softmax(other)
    return jnp.sum(jnp.exp(p) * KL_ESTIMATORS[estimator](p - q))


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(estimator):
    exact = float(divergence(LOGITS, OTHER))
    assert float(expected(estimator, LOGITS, OTHER)) == pytest.approx(exact, rel=1e-5)


def test_k2_is_near_where_distributions_are():
    near = LOGITS + 0.05 * OTHER
    exact = float(divergence(LOGITS, near))
    assert float(expected("k2", LOGITS, near)) == pytest.approx(exact, rel=0.05)
    far = float(divergence(LOGITS, OTHER))
    assert float(expected("k2", LOGITS, OTHER)) != pytest.approx(far, rel=0.05)


def test_k2_and_k3_are_never_negative_and_0_only_at_0():
    k1 = jnp.linspace(-3, 3, 61)
    for name in ("k2", "k3"):
        values = KL_ESTIMATORS[name](k1)
        assert np.all(np.delete(values, 30) > 0) and abs(values[30]) < 1e-9
    assert float(KL_ESTIMATORS["k3"](jnp.float32(1e-4))) == pytest.approx(5e-9, rel=0.05)


@pytest.mark.parametrize(
    "estimator, exact",
    [
        ("k1", lambda logits: 0.0),
        ("k2", lambda logits: divergence(logits, OTHER)),
        ("k3", lambda logits: divergence(OTHER, logits)),
    ],
)
def test_expected_gradients_in_a_loss(estimator, exact):
    """Of samples that are given, as in a loss: k1 gives nothing, k3 the divergence turned round."""
    weights = jax.nn.softmax(LOGITS)

    def loss(logits):
        k1 = jax.nn.log_softmax(logits) - jax.nn.log_softmax(OTHER)
        return jnp.sum(weights * KL_ESTIMATORS[estimator](k1))

    np.testing.assert_allclose(jax.grad(loss)(LOGITS), jax.grad(exact)(LOGITS), atol=1e-6)


# --- the clipped loss -----------------------------------------------------------------------------


def test_clipping_takes_the_gradient_away_on_one_side_of_each_bound():
    ratios = jnp.array([[0.5, 0.9, 1.1, 1.5] * 2])
    advantages = jnp.array([[2.0] * 4 + [-2.0] * 4])

    def surrogate(log_ratio):
        return clipped_surrogate(log_ratio, advantages, low=0.2, high=0.3)

    found = surrogate(jnp.log(ratios))
    losses = [[-1.0, -1.8, -2.2, -2.6, 1.6, 1.8, 2.2, 3.0]]
    np.testing.assert_allclose(found.loss, losses, rtol=1e-6)
    assert found.clipped_low.tolist() == [[False] * 4 + [True] + [False] * 3]
    assert found.clipped_high.tolist() == [[False] * 3 + [True] + [False] * 4]
    gradient = jax.grad(lambda x: jnp.sum(surrogate(x).loss))(jnp.log(ratios))
    clipped = found.clipped_low | found.clipped_high
    np.testing.assert_allclose(gradient, jnp.where(clipped, 0, -ratios * advantages), rtol=1e-6)


# --- metrics --------------------------------------------------------------------------------------


def test_metrics_are_means_over_tokens_of_completions(make_rollouts):
    batch = make_rollouts([3, 6, 0, 5, 6])
    mask = batch.sequences.loss_weights > 0
    draw = np.random.default_rng(1)
    logprobs = jnp.asarray(np.where(mask, batch.old_logprobs + draw.normal(0, 0.5, mask.shape), -7))
    entropies = jnp.asarray(draw.gamma(2, 1, mask.shape), jnp.float32)
    log_ratio = log_ratios(logprobs, batch.old_logprobs, mask)
    surrogate = clipped_surrogate(log_ratio, batch.advantages, 0.2, 0.2)
    metrics = policy_metrics(batch, surrogate, logprobs, entropies, mask)
    assert {float(metric.count) for metric in metrics.values()} == {20}
    inside = np.asarray(mask)
    k1 = np.float64(logprobs - batch.reference_logprobs)[inside]
    drift = np.float64(logprobs - batch.old_logprobs)[inside]
    clipped = np.abs(np.exp(drift) - 1) > 0.2
    clipped &= np.sign(drift) == np.sign(batch.advantages[inside])
    expected = {
        "ratio": np.exp(drift).mean(),
        "entropy": np.float64(entropies)[inside].mean(),
        "kl": (np.exp(-k1) - 1 + k1).mean(),
        "approx_kl": (np.exp(drift) - 1 - drift).mean(),
        "clip_fraction": clipped.mean(),
        "clip_fraction_low": (clipped & (drift < 0)).mean(),
        "clip_fraction_high": (clipped & (drift > 0)).mean(),
    }
    assert expected["clip_fraction_low"] * expected["clip_fraction_high"] > 0
    assert {k: float(v.value()) for k, v in metrics.items()} == pytest.approx(expected, rel=1e-4)
    without = batch.replace(reference_logprobs=None)
    assert "kl" not in policy_metrics(without, surrogate, logprobs, entropies, mask)


def test_a_masked_mean_of_nothing_is_0():
    nothing = masked_mean(jnp.full((2, 3), jnp.nan), jnp.zeros((2, 3), bool))
    assert (float(nothing.total), float(nothing.count)) == (0, 0)


# --- what the policy says of the targets ----------------------------------------------------------


@pytest.mark.parametrize(
    "temperature, chunk, longest", [(1.0, None, 8), (0.6, 3, 5), (0.0, 8, 6), (1.0, 2, 20)]
)
@pytest.mark.parametrize("later", [0, 2])
def test_outputs_are_those_at_the_sampling_temperature(
    bigram, make_rollouts, temperature, chunk, longest, later
):
    """Also where the longest completion would pass the end of the row."""
    model, params = bigram
    batch = jax.tree.map(lambda x: np.roll(x, later, axis=1), make_rollouts([3, 5]).sequences)
    outputs = jax.jit(
        functools.partial(
            policy_outputs, model, temperature=temperature, chunk=chunk, longest=longest
        )
    )(params, batch)
    hidden, _ = model.apply(params, batch.tokens, batch.positions, batch.segment_ids)
    logits = model.logits(params, hidden)
    # The sampler's filters are no part of what it records, nor of what is trained.
    sampler = SamplerConfig(temperature=temperature, top_p=0.5)
    sampled = logprob(logits.reshape(-1, 32), batch.targets.reshape(-1), sampler)
    inside = batch.loss_weights > 0
    sampled = np.asarray(sampled).reshape(inside.shape)
    np.testing.assert_allclose(outputs.logprobs[inside], sampled[inside], atol=1e-4)
    p = jax.nn.softmax(logits / (temperature or 1.0))
    entropies = -jnp.sum(p * jnp.log(p), axis=-1)
    np.testing.assert_allclose(outputs.entropies[inside], entropies[inside], atol=1e-4)
    np.testing.assert_allclose(outputs.hidden, hidden, atol=1e-4)


def test_chunks_change_no_gradient(bigram, make_rollouts):
    model, params = bigram
    batch = make_rollouts([3, 5]).sequences

    def gradient(chunk):
        def total(params):
            outputs = policy_outputs(model, params, batch, longest=6, temperature=0.7, chunk=chunk)
            return jnp.sum(batch.loss_weights * (outputs.logprobs + 0.3 * outputs.entropies))

        return jax.jit(jax.grad(total))(params)

    for actual, whole in zip(
        jax.tree.leaves(gradient(3)), jax.tree.leaves(gradient(None)), strict=True
    ):
        np.testing.assert_allclose(actual, whole, atol=1e-4)
        assert np.any(whole)
