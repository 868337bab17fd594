"""Held-out comparisons: accuracy, its error and its calibration by hand, whatever the batches."""

import math

import jax
import numpy as np
import pytest

from llm_jax.data.example_store import STRENGTHS
from llm_jax.evals.objective import evaluate_objective
from llm_jax.evals.preferences import calibration, evaluate_rewards
from llm_jax.types import Batch, Mean, PreferenceBatch


class Rows:
    """Comparisons whose answers are single tokens: their rewards, as the tests say."""

    def __init__(self, *rows, strengths=None):
        """Each row is [(token, score), ...]; a token 0 is padding."""
        self._rows = rows
        self.strengths = np.array(strengths or [-1] * len(rows), np.int8)

    def __len__(self):
        return len(self._rows)

    def __getitem__(self, index):
        tokens = np.array([[token] for token, _ in self._rows[index]], np.int32)
        scores = np.array([score for _, score in self._rows[index]], np.float32)
        real = tokens > 0
        batch = Batch(tokens, tokens, real.astype(np.float32), real.astype(np.int32), tokens * 0)
        return PreferenceBatch(batch, scores, np.float32(0), None)


def rewards(params, batch):
    """The token itself; padding gets a number that must not count."""
    tokens = batch.responses.tokens[:, :, 0].astype(np.float32)
    return np.where(tokens > 0, tokens / params, 1e6)


def pair(better, worse):
    return [(better, 1), (worse, 0)]


PAIRS = Rows(pair(9, 5), pair(3, 4), pair(2, 1), pair(6, 6), strengths=[0, 0, 3, 3])


@pytest.mark.parametrize("batch_size", [1, 3, 4, 8])
def test_accuracy_counts_what_is_strictly_right(batch_size):
    result = evaluate_rewards(rewards, 1.0, PAIRS, batch_size, 100)
    assert result["accuracy"] == 0.5
    assert result["accuracy/significantly_better"] == 0.5
    assert result["accuracy/negligibly_better"] == 0.5  # a tie is not right
    assert not {"accuracy/better", "accuracy/slightly_better"} & result.keys()
    every = [9, 5, 3, 4, 2, 1, 6, 6]
    assert result["reward_mean"] == pytest.approx(np.mean(every))
    assert result["reward_std"] == pytest.approx(np.std(every))


def test_every_pair_of_a_ranked_group_counts_once():
    rows = Rows([(7, 3), (8, 2), (2, 1)], [(5, 2), (4, 2), (0, 0)], [(5, 2), (6, 1), (0, 0)])
    result = evaluate_rewards(rewards, 1.0, rows, 2, 100)
    # Right: 7 > 2 and 8 > 2. Wrong: 7 < 8 and 5 < 6. The answers that tie are no pair.
    assert result["accuracy"] == 0.5
    assert result["reward_mean"] == pytest.approx(np.mean([7, 8, 2, 5, 4, 5, 6]))


def test_the_standard_error_takes_the_pairs_of_a_prompt_as_one():
    rows = Rows([(7, 3), (8, 2), (2, 1)], [(5, 2), (6, 1), (0, 0)])
    accuracy, wins, pairs = 0.5, np.array([2, 0]), np.array([3, 1])
    squares = np.sum((wins - accuracy * pairs) ** 2)
    expected = math.sqrt(2 / 1 * squares) / 4
    result = evaluate_rewards(rewards, 1.0, rows, 2, 100)
    assert result["accuracy_stderr"] == pytest.approx(expected)


def test_the_standard_error_of_pairs_is_that_of_a_share():
    result = evaluate_rewards(rewards, 1.0, PAIRS, 2, 100)
    assert result["accuracy_stderr"] == pytest.approx(math.sqrt(0.5 * 0.5 / (4 - 1)))
    single = evaluate_rewards(rewards, 1.0, Rows(pair(2, 1)), 2, 100)
    assert "accuracy_stderr" not in single


def test_rows_are_spread_evenly_where_not_all_are_read():
    rows = Rows(*[pair(2, 1) if i % 3 == 0 else pair(1, 2) for i in range(9)])
    assert evaluate_rewards(rewards, 1.0, rows, 2, 3)["accuracy"] == 1.0


def logit(p):
    return math.log(p / (1 - p))


def test_calibration_by_hand():
    # Choices made with 0.62, 0.68 (one right), 0.75 (right) and 0.99 (right, right, wrong).
    gap = [logit(0.62), -logit(0.68), logit(0.75), logit(0.99), logit(0.99), -logit(0.99)]
    result = calibration(np.array(gap))
    error = (2 * abs(0.5 - 0.65) + abs(1 - 0.75) + 3 * abs(2 / 3 - 0.99)) / 6
    assert result == {
        "calibration_error": pytest.approx(error),
        "calibration/0.6": 0.5, "calibration_pairs/0.6": 2.0,
        "calibration/0.7": 1.0, "calibration_pairs/0.7": 1.0,
        "calibration/0.9": pytest.approx(2 / 3), "calibration_pairs/0.9": 3.0,
    }  # fmt: skip


def test_calibration_at_the_ends_of_the_bins():
    result = calibration(np.array([0.0, 1e-9, 800.0]))
    assert result["calibration_pairs/0.5"] == 2 and result["calibration_pairs/0.9"] == 1
    assert result["calibration/0.5"] == 0.5  # no difference is no right choice


def test_perfectly_calibrated_rewards_have_a_small_error():
    rng = np.random.default_rng(0)
    gap = np.abs(rng.normal(0, 2, 20_000))
    right = rng.random(len(gap)) < 1 / (1 + np.exp(-gap))
    signed = np.where(right, gap, -gap)
    assert calibration(signed)["calibration_error"] < 0.02
    assert calibration(10 * signed)["calibration_error"] > 0.1  # the same choices, too sure


@pytest.mark.parametrize("batch_size", [1, 2, 3, 16])
def test_the_metrics_of_an_objective_are_means_over_what_each_counts(batch_size):
    rows = Rows(*[pair(i, 1) for i in range(1, 6)])

    @jax.jit
    def objective(params, batch):
        tokens = batch.responses.tokens[:, 0, 0]
        real = batch.responses.segment_ids[:, 0, 0] > 0
        large = real & (tokens > 3)
        return Mean((real * tokens).sum() * params, real.sum()), {
            "large": Mean((large * tokens).sum(), large.sum()),
            "nothing": Mean(np.float32(0), np.float32(0)),
        }

    result = evaluate_objective(objective, 2.0, rows, batch_size, 100)
    assert result == {"loss": pytest.approx(6.0), "large": pytest.approx(4.5)}


def test_every_strength_has_its_own_accuracy():
    rows = Rows(*[pair(2, 1)] * len(STRENGTHS), strengths=list(range(len(STRENGTHS))))
    result = evaluate_rewards(rewards, 1.0, rows, 4, 100)
    assert {key for key in result if key.startswith("accuracy/")} == {
        "accuracy/significantly_better", "accuracy/better", "accuracy/slightly_better",
        "accuracy/negligibly_better",
    }  # fmt: skip
