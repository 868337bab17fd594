import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from llm_jax.errors import UserError
from llm_jax.generation.sampler import SamplerConfig, candidates, penalize, sample

LOGITS = np.array([1.0, -0.5, 2.0, 0.3, 2.0, -3.0, 0.0], np.float32)

CONFIGS = {
    "plain": SamplerConfig(),
    "hot": SamplerConfig(temperature=2.0),
    "top_k": SamplerConfig(top_k=3),
    "top_p": SamplerConfig(top_p=0.7),
    "min_p": SamplerConfig(min_p=0.2),
    "all": SamplerConfig(temperature=0.7, top_k=5, top_p=0.9, min_p=0.1),
}


def reference_distribution(logits, config):
    """Sampling probabilities, float64 [vocab], one token at a time."""
    probabilities = special.softmax(logits.astype(np.float64) / config.temperature)
    ranked = sorted(range(len(logits)), key=lambda token: (-probabilities[token], token))
    ranked = ranked[: config.top_k]
    whole = sum(probabilities[token] for token in ranked)
    kept, mass = [], 0.0
    for token in ranked:
        if kept and config.top_p is not None and mass / whole >= config.top_p:
            break
        kept.append(token)
        mass += probabilities[token]
    highest = probabilities[kept[0]]
    kept = [token for token in kept if probabilities[token] >= (config.min_p or 0) * highest]
    mass = sum(probabilities[token] for token in kept)
    distribution = np.zeros(len(logits))
    distribution[kept] = probabilities[kept] / mass
    return distribution


def candidate_distribution(logits, config):
    scaled, ids = candidates(jnp.asarray(logits)[None], config)
    distribution = np.zeros(len(logits))
    np.add.at(distribution, np.asarray(ids[0]), special.softmax(np.asarray(scaled[0])))
    return distribution


choose = jax.jit(sample, static_argnames="config")


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


@pytest.mark.parametrize("top_k", [None, 1, 2, 6, 50])
@pytest.mark.parametrize("top_p", [None, 0.01, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("min_p", [None, 0.05, 0.6, 1.0])
def test_candidates_match_the_reference(top_k, top_p, min_p):
    config = SamplerConfig(temperature=0.8, top_k=top_k, top_p=top_p, min_p=min_p)
    rng = np.random.default_rng(0)
    for logits in [LOGITS, *rng.normal(0, 2, (5, 20)).astype(np.float32)]:
        expected = reference_distribution(logits, config)
        np.testing.assert_allclose(candidate_distribution(logits, config), expected, atol=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_frequencies_match_the_distribution(name):
    config, count = CONFIGS[name], 20_000
    logits = jnp.tile(LOGITS, (count, 1))
    tokens, _ = choose(logits, keys(count), config)
    seen = np.bincount(tokens, minlength=len(LOGITS))
    expected = reference_distribution(LOGITS, config)
    assert not seen[expected == 0].any()
    possible = expected > 0
    assert stats.chisquare(seen[possible], count * expected[possible]).pvalue > 1e-3


@pytest.mark.parametrize("name", CONFIGS)
def test_logprob_is_of_the_tempered_model_before_the_filters(name):
    config = CONFIGS[name]
    tokens, logprobs = choose(jnp.tile(LOGITS, (50, 1)), keys(50), config)
    expected = special.log_softmax(LOGITS.astype(np.float64) / config.temperature)
    np.testing.assert_allclose(logprobs, expected[tokens], atol=1e-5)


def test_greedy_takes_the_first_maximum_at_temperature_one():
    token, logprob = choose(
        jnp.asarray(LOGITS)[None], keys(1), SamplerConfig(temperature=0, top_k=3)
    )
    assert token[0] == 2
    np.testing.assert_allclose(logprob[0], special.log_softmax(LOGITS)[2], atol=1e-6)


def test_equal_logits_rank_by_token_and_do_not_widen_the_filters():
    equal = np.zeros(8, np.float32)
    top_k = candidate_distribution(equal, SamplerConfig(top_k=3))
    np.testing.assert_allclose(top_k, [1 / 3, 1 / 3, 1 / 3, 0, 0, 0, 0, 0], atol=1e-6)
    top_p = candidate_distribution(equal, SamplerConfig(top_p=0.5))
    np.testing.assert_allclose(top_p, [0.25] * 4 + [0] * 4, atol=1e-6)


def test_top_p_counts_what_top_k_kept():
    # Over all tokens the first holds 0.4 of the probability, among two 0.57: past top_p alone.
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1], np.float32))
    both = candidate_distribution(logits, SamplerConfig(top_k=2, top_p=0.5))
    np.testing.assert_allclose(both, [1, 0, 0, 0], atol=1e-6)
    alone = candidate_distribution(logits, SamplerConfig(top_p=0.5))
    np.testing.assert_allclose(alone, [4 / 7, 3 / 7, 0, 0], atol=1e-6)


def test_min_p_is_a_share_of_the_highest_probability():
    logits = np.log(np.array([0.2, 0.5, 0.04, 0.06, 0.2], np.float32))
    kept = candidate_distribution(logits, SamplerConfig(min_p=0.1))  # at least 0.05
    np.testing.assert_allclose(kept, np.array([0.2, 0.5, 0, 0.06, 0.2]) / 0.96, atol=1e-6)
    kept = candidate_distribution(logits, SamplerConfig(min_p=0.3, top_k=2))
    np.testing.assert_allclose(kept, np.array([0.2, 0.5, 0, 0, 0]) / 0.7, atol=1e-6)


def test_min_p_is_taken_at_the_temperature():
    # At temperature 2 the probabilities are as their square roots: 3 to 2 to 1.
    logits = np.log(np.array([9.0, 4.0, 1.0], np.float32))
    kept = candidate_distribution(logits, SamplerConfig(temperature=2.0, min_p=0.5))
    np.testing.assert_allclose(kept, [3 / 5, 2 / 5, 0], atol=1e-6)
    kept = candidate_distribution(logits, SamplerConfig(min_p=0.5))
    np.testing.assert_allclose(kept, [1, 0, 0], atol=1e-6)


def test_min_p_comes_after_top_p():
    # Were min_p first, the two that top_p then kept would hold 0.7 / 0.9 > 0.75 of the rest.
    logits = np.log(np.array([0.5, 0.2, 0.2, 0.1], np.float32))
    kept = candidate_distribution(logits, SamplerConfig(top_p=0.75, min_p=0.3))
    np.testing.assert_allclose(kept, [5 / 9, 2 / 9, 2 / 9, 0], atol=1e-6)


def test_seen_tokens_are_penalized_by_their_sign():
    seen = jnp.array([[True, True, False, False, True, True, True]])
    config = SamplerConfig(repetition_penalty=1.5)
    penalized = penalize(jnp.asarray(LOGITS)[None], seen, config)[0]
    expected = [1.0 / 1.5, -0.5 * 1.5, 2.0, 0.3, 2.0 / 1.5, -3.0 * 1.5, 0.0]
    np.testing.assert_allclose(penalized, expected, rtol=1e-6)


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"top_k": 1}])
def test_the_penalty_comes_before_the_choice_and_the_filters(settings):
    config = SamplerConfig(repetition_penalty=2.0, **settings)
    seen = jnp.zeros((1, 7), bool).at[0, 2].set(True)
    token, logprob = choose(jnp.asarray(LOGITS)[None], keys(1), config, seen)
    assert token[0] == 4  # as probable as token 2, which is seen
    np.testing.assert_allclose(logprob[0], special.log_softmax(LOGITS)[4], atol=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_row_does_not_depend_on_its_batch(name):
    logits = jnp.asarray(np.random.default_rng(1).normal(0, 1, (6, 30)), jnp.float32)
    rng = keys(6)
    together, _ = choose(logits, rng, CONFIGS[name])
    some = jnp.array([4, 1])
    apart, _ = choose(logits[some], rng[some], CONFIGS[name])
    np.testing.assert_array_equal(apart, together[some])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"min_p": -0.1}, "min_p=-0.1"),
        ({"min_p": 1.1}, "min_p=1.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty=inf"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        SamplerConfig(**settings)
