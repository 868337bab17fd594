"""The bootstrap against the normal theory, and its coverage on data whose truth is known."""

import dataclasses

import numpy as np
import pytest

from llm_jax.evals.bootstrap import Sample, compare
from llm_jax.evals.perplexity import LN_2, bits_per_byte


def sample(amounts, sizes=None):
    amounts = np.atleast_2d(np.asarray(amounts, float))
    sizes = np.ones_like(amounts) if sizes is None else np.broadcast_to(sizes, amounts.shape)
    return Sample(amounts, sizes)


def test_of_many_units_it_is_the_normal_theory():
    rng = np.random.default_rng(0)
    common = rng.normal(size=400)
    a, b = common + rng.normal(0.1, 0.5, 400), common + rng.normal(0, 0.5, 400)
    result = compare(sample(a), sample(b))
    stderr = np.std(a - b, ddof=1) / np.sqrt(400)
    assert result.difference == pytest.approx(np.mean(a - b))
    assert result.stderr == pytest.approx(stderr, rel=0.03)
    assert result.low == pytest.approx(result.difference - 1.96 * stderr, abs=0.1 * stderr)
    assert result.high == pytest.approx(result.difference + 1.96 * stderr, abs=0.1 * stderr)
    normal = np.mean(rng.normal(result.difference, stderr, 200_000) < 0)
    assert result.probability_lower == pytest.approx(normal, abs=0.01)
    # Pairing pays: what is hard for both is no difference.
    unpaired = np.sqrt((np.var(a, ddof=1) + np.var(b, ddof=1)) / 400)
    assert result.stderr < 0.6 * unpaired


def test_a_ratio_has_the_standard_error_of_bits_per_byte():
    rng = np.random.default_rng(1)
    sizes = rng.integers(20, 400, size=150)
    bits = sizes * rng.normal(2, 0.3, 150)
    expected = bits_per_byte(bits * LN_2, sizes, np.arange(150))
    result = compare(sample(bits, sizes), sample(np.zeros(150), sizes))
    assert result.a == pytest.approx(expected["bits_per_byte"])
    assert result.stderr == pytest.approx(expected["bits_per_byte_stderr"], rel=0.04)


def test_equal_models_are_equal_and_the_better_one_is_told():
    values = np.arange(10.0)
    same = compare(sample(values), sample(values))
    assert (same.difference, same.low, same.high, same.probability_lower) == (0, 0, 0, 0.5)
    lower = compare(sample(values - 1), sample(values))
    assert (lower.low, lower.high) == pytest.approx((-1, -1)) and lower.probability_lower == 1


def test_the_same_seed_gives_the_same_answer_whatever_the_block(monkeypatch):
    rng = np.random.default_rng(2)
    a, b = sample(rng.normal(size=30)), sample(rng.normal(size=30))
    first = compare(a, b, resamples=500)
    assert compare(a, b, resamples=500) == first
    assert compare(a, b, resamples=500, seed=1) != first
    monkeypatch.setattr("llm_jax.evals.bootstrap._BLOCK", 30 * 64)
    assert compare(a, b, resamples=500) == first


@pytest.mark.parametrize("seeds", [1, 3])
def test_intervals_cover_the_truth_as_often_as_they_say(seeds):
    """A is better by 0.2; units share their difficulty, and seeds have noise of their own."""
    covered, repeats = 0, 400
    for repeat in range(repeats):
        rng = np.random.default_rng(repeat)
        difficulty = rng.normal(0, 1, 60)

        def model(shift, rng=rng, difficulty=difficulty):
            of_seed = rng.normal(0, 0.15 if seeds > 1 else 0, (seeds, 1))
            return sample(shift + difficulty + of_seed + rng.normal(0, 0.5, (seeds, 60)))

        result = compare(model(-0.2), model(0), resamples=400, seed=repeat)
        covered += result.low <= -0.2 <= result.high
    # Its own standard error is 0.011.
    assert 0.91 <= covered / repeats <= 0.98


def test_the_noise_of_seeds_widens_the_interval_by_what_it_is():
    rng = np.random.default_rng(3)
    of_seed = np.array([[-0.3], [0.1], [0.2]])
    a = sample(rng.normal(0, 1e-3, (3, 50)) + of_seed)
    b = sample(rng.normal(0, 1e-3, (1, 50)))
    result = compare(a, b, resamples=20_000)
    assert result.stderr == pytest.approx(np.std(of_seed, ddof=1) / np.sqrt(3), rel=0.03)
    assert (result.seeds_a, result.seeds_b) == (3, 1)
    # Two degrees of freedom: Student's t is 4.303.
    assert result.high - result.difference == pytest.approx(4.303 * result.stderr, rel=0.01)
    one = dataclasses.replace(a, amounts_SU=a.amounts_SU[:1], sizes_SU=a.sizes_SU[:1])
    assert compare(one, b).stderr < 0.01


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (sample([1.0]), sample([1.0, 2.0])),
        (sample([]), sample([])),
        (sample([1.0], 0), sample([1.0])),
    ],
)
def test_what_cannot_be_paired_is_refused(a, b):
    with pytest.raises(ValueError, match="units"):
        compare(a, b)
