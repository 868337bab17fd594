"""Rewards of tokens, advantages and the weight of the divergence against closed forms."""

import json

import numpy as np
import pytest

from llm_jax.errors import UserError
from llm_jax.rl.advantages import (
    KLConfig,
    KLController,
    gae,
    group_advantages,
    overlong_penalty,
    token_rewards,
    whiten,
)

# Two tokens of prompt; completions of 3, 1 and 0 tokens, and one with a hole (a tool's output).
MASK = np.array([[0, 1, 1, 1, 0, 0], [0, 1, 0, 0, 0, 0], [0] * 6, [0, 1, 0, 0, 1, 1]], np.float32)


def draw(seed=0):
    return np.random.default_rng(seed).normal(size=MASK.shape).astype(np.float32)


# --- rewards of tokens ----------------------------------------------------------------------------


def test_the_score_stands_at_the_last_token_and_the_divergence_at_every_one():
    kl = draw()
    rewards = token_rewards(np.array([2.0, -1, np.nan, 0.5]), kl, MASK, kl_coefficient=0.1)
    expected = -0.1 * kl * MASK
    expected[0, 3] += 2
    expected[1, 1] -= 1
    expected[3, 5] += 0.5
    np.testing.assert_allclose(rewards, expected, rtol=1e-6)
    assert rewards.dtype == np.float32 and not np.any(rewards[2]), "NaN has no token to stand at"


def test_fractional_scores_survive():
    rewards = token_rewards(np.array([0.75, 0.25, 0, 1]), np.zeros((4, 6)), MASK, kl_coefficient=0)
    np.testing.assert_array_equal(rewards.sum(axis=1), [0.75, 0.25, 0, 1])
    whole = token_rewards(np.array([1, 2, 0, 3]), draw(), MASK, kl_coefficient=0.1)
    assert np.any(whole % 1), "scores of integers do not truncate the divergence"


def test_what_does_not_end_by_itself_pays_for_it():
    finished = np.array([True, False, False, True])
    rewards = token_rewards(
        np.zeros(4), np.zeros((4, 6)), MASK, kl_coefficient=0.1, finished_B=finished,
        missing_end_penalty=1.5,
    )  # fmt: skip
    assert rewards[1, 1] == -1.5 and np.count_nonzero(rewards) == 1


def test_overlong_completions_are_punished_softly():
    penalty = overlong_penalty(np.array([0, 80, 81, 90, 100, 130]), limit=100, buffer=20)
    np.testing.assert_allclose(penalty, [0, 0, -0.05, -0.5, -1, -1], rtol=1e-6)
    assert penalty.dtype == np.float32


@pytest.mark.parametrize("buffer", [0, 101])
def test_a_senseless_buffer_is_refused(buffer):
    with pytest.raises(UserError, match=f"buffer of {buffer} tokens does not fit a limit of 100"):
        overlong_penalty(np.array([1]), limit=100, buffer=buffer)


# --- generalised advantage estimation -------------------------------------------------------------


def test_without_discount_and_divergence_advantages_are_score_minus_value():
    scores, values = np.array([0.75, -2, 5, 1]), draw()
    rewards = token_rewards(scores, draw(1), MASK, kl_coefficient=0)
    advantages, returns = gae(rewards, values, MASK, gamma=1, lambda_=1)
    np.testing.assert_allclose(advantages, (scores[:, None] - values) * MASK, atol=1e-6)
    np.testing.assert_allclose(returns, scores[:, None] * MASK, atol=1e-6)
    assert advantages.dtype == returns.dtype == np.float32


def test_lambda_0_is_the_temporal_difference():
    rewards, values = draw() * MASK, draw(1)
    advantages, _ = gae(rewards, values, MASK, gamma=0.9, lambda_=0)
    following = np.array([[0, values[0, 2], values[0, 3], 0, 0, 0]])
    expected = (rewards[0] + 0.9 * following - values[0]) * MASK[0]
    np.testing.assert_allclose(advantages[:1], expected, atol=1e-6)


def test_advantages_are_discounted_sums_of_differences():
    gamma, lambda_ = 0.9, 0.8
    rewards, values = draw() * MASK, draw(1)
    advantages, returns = gae(rewards, values, MASK, gamma, lambda_)
    for row, mask in enumerate(MASK):
        places = np.flatnonzero(mask)
        r, v = rewards[row, places], np.append(values[row, places], 0)
        differences = r + gamma * v[1:] - v[:-1]
        for i, place in enumerate(places):
            powers = (gamma * lambda_) ** np.arange(len(places) - i)
            assert advantages[row, place] == pytest.approx(powers @ differences[i:], abs=1e-5)
    np.testing.assert_allclose(returns, (advantages + values) * MASK, atol=1e-6)
    assert not np.any(advantages[MASK == 0])


def test_what_stands_outside_the_mask_means_nothing():
    rewards, values = draw(), draw(1)
    junk = np.where(MASK > 0, values, np.nan), np.where(MASK > 0, rewards, 1e9)
    for actual, expected in zip(
        gae(junk[1], junk[0], MASK), gae(rewards, values, MASK), strict=True
    ):
        np.testing.assert_array_equal(actual, expected)


# --- whitening ------------------------------------------------------------------------------------


def test_whitening_is_masked_and_unbiased():
    values = np.where(MASK > 0, 5 + 3 * draw(), 1e6)
    whitened = whiten(values, MASK)
    inside = whitened[MASK > 0]
    assert inside.mean() == pytest.approx(0, abs=1e-6)
    assert inside.std(ddof=1) == pytest.approx(1, abs=1e-6)
    assert not np.any(whitened[MASK == 0]) and whitened.dtype == np.float32
    kept = whiten(values, MASK, shift_mean=False)
    shift = values[MASK > 0].mean()
    np.testing.assert_allclose(kept[MASK > 0], inside + shift, rtol=1e-5)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("values, mask", [([3.0, 3, 3], [1, 1, 1]), ([7.0, 9], [1, 0]), ([1], [0])])
def test_whitening_what_does_not_vary_gives_0(values, mask):
    assert not np.any(whiten(np.array(values), np.array(mask)))


# --- groups ---------------------------------------------------------------------------------------

SCORES = np.array([[1.0, 0.0, 0.75, 0.25], [0.1, 0.1, 0.1, 0.1], [2.0, 4.0, 2.0, 4.0]])


def test_scores_are_compared_within_their_group():
    found = group_advantages(SCORES)
    centred = SCORES - SCORES.mean(axis=1, keepdims=True)
    deviations = SCORES.std(axis=1, ddof=1, keepdims=True)
    expected = centred / (deviations + 1e-4)
    np.testing.assert_allclose(found.advantages[[0, 2]], expected[[0, 2]], rtol=1e-6)
    assert found.advantages.dtype == np.float32
    assert found.constant.tolist() == [False, True, False]


@pytest.mark.parametrize("scale", ["std", "none", "batch"])
def test_a_constant_group_has_no_advantages_at_all(scale):
    scores = np.array([[0.1, 0.1, 0.1], [0.0, 1.0, 0.0]])
    assert np.any(scores[0] - scores[0].mean()), "the mean rounds"
    assert not np.any(group_advantages(scores, scale).advantages[0])


def test_other_scales():
    centred = SCORES - SCORES.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(group_advantages(SCORES, "none").advantages, centred, atol=1e-7)
    batch = centred / (SCORES.std(ddof=1) + 1e-4)
    np.testing.assert_allclose(group_advantages(SCORES, "batch").advantages, batch, atol=1e-7)


@pytest.mark.parametrize("scale", ["std", "none", "batch"])
@pytest.mark.parametrize("missing", [np.nan, np.inf, -np.inf])
def test_missing_scores_are_left_out(scale, missing):
    few = group_advantages(np.array([[1.0, 0.5, 0.0], [2.0, 5.0, 3.5]]), scale)
    with_missing = np.array([[1.0, missing, 0.5, 0.0], [2.0, 5.0, missing, 3.5]])
    found = group_advantages(with_missing, scale)
    np.testing.assert_array_equal(found.advantages[0, [0, 2, 3]], few.advantages[0])
    np.testing.assert_array_equal(found.advantages[1, [0, 1, 3]], few.advantages[1])
    assert found.advantages[0, 1] == found.advantages[1, 2] == 0
    assert not np.any(found.constant)


@pytest.mark.parametrize("group", [[np.nan, np.nan], [3.0, np.nan], [np.nan, np.inf]])
@pytest.mark.parametrize("scale", ["std", "batch"])
def test_a_group_with_fewer_than_two_scores_says_nothing(group, scale):
    found = group_advantages(np.array([group]), scale)
    assert found.constant.tolist() == [True] and not np.any(found.advantages)


# --- the weight of the divergence -----------------------------------------------------------------


@pytest.mark.parametrize(
    "kl, factor",
    [(6.0, 1), (6.6, 1 + 0.1 * 64 / 1000), (5.4, 1 - 0.1 * 64 / 1000), (600, 1 + 0.2 * 64 / 1000),
     (0, 1 - 0.2 * 64 / 1000), (np.inf, 1 + 0.2 * 64 / 1000), (np.nan, 1)],
)  # fmt: skip
def test_the_weight_follows_the_divergence_in_proportion(kl, factor):
    controller = KLController(KLConfig(coefficient=0.05, target=6.0, horizon=1000))
    controller.update(kl, completions=64)
    assert controller.coefficient == pytest.approx(0.05 * factor)


def test_without_a_target_the_weight_is_fixed():
    controller = KLController(KLConfig(coefficient=0.05))
    controller.update(100.0, completions=1000)
    assert controller.coefficient == 0.05


def test_the_weight_goes_on_where_it_stopped():
    first, second = (KLController(KLConfig(target=6.0, horizon=100)) for _ in range(2))
    first.update(9.0, completions=7)
    second.restore(json.loads(json.dumps(first.state())))
    assert second.coefficient == first.coefficient != KLConfig().coefficient


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"coefficient": -1}, "coefficient=-1 must not be negative"),
        ({"target": 0.0}, "target=0.0 must be positive"),
        ({"target": 6.0, "coefficient": 0}, "coefficient=0 never moves towards a target"),
        ({"horizon": 0}, "horizon=0 must be at least 1"),
    ],
)
def test_senseless_configs_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        KLConfig(**changes)
