import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from llm_jax.errors import UserError
from llm_jax.generation.sampler import SamplerConfig, candidates, sample

LOGITS = np.array([1.0, -0.5, 2.0, 0.3, 2.0, -3.0, 0.0], np.float32)

CONFIGS = {
    "plain": SamplerConfig(),
    "hot": SamplerConfig(temperature=2.0),
    "top_k": SamplerConfig(top_k=3),
    "top_p": SamplerConfig(top_p=0.7),
    "all": SamplerConfig(temperature=0.7, top_k=5, top_p=0.9),
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
def test_candidates_match_the_reference(top_k, top_p):
    config = SamplerConfig(temperature=0.8, top_k=top_k, top_p=top_p)
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
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        SamplerConfig(**settings)
