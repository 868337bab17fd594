"""Held-out comparisons: accuracy by strength of preference, and calibration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from llm_jax.data.example_store import STRENGTHS
from llm_jax.data.preferences import PreferenceRows
from llm_jax.evals.batching import padded_batches
from llm_jax.evals.objective import spread
from llm_jax.evals.statistics import ratio
from llm_jax.placement import to_host
from llm_jax.types import PreferenceBatch

BINS = np.linspace(0.5, 1.0, 6)  # of the probability that a reward model gives its choice


def evaluate_rewards(
    rewards: Callable[[Any, PreferenceBatch], Any],
    params: Any,
    rows: PreferenceRows,
    batch_size: int,
    max_rows: int,
) -> dict[str, float]:
    """Measures a reward model on comparisons; every pair with different scores counts once.

    Args:
      rewards: jitted, `(params, batch) → float32 [batch, K]`.

    Returns:
      accuracy: the share of pairs whose better answer has strictly the higher reward, and
        accuracy_stderr, the pairs of one prompt being one unit.
      accuracy/STRENGTH: the same for each strength of preference that occurs.
      calibration_error: the mean distance between the probability σ(difference) that the model
        gives its choice and how often it is right, over bins of it (arXiv:1706.04599).
      calibration/P, calibration_pairs/P: for each bin that begins at P, the share of right choices
        and the number of pairs.
      reward_mean, reward_std: over all answers.
    """
    gaps: list[np.ndarray] = []
    prompts: list[np.ndarray] = []
    strengths: list[np.ndarray] = []
    every: list[np.ndarray] = []
    for chosen, batch in padded_batches(rows, spread(rows, max_rows), batch_size):
        values = to_host(rewards(params, batch)).astype(np.float64)
        real = np.any(batch.responses.segment_ids != 0, axis=-1)
        better = batch.scores[:, :, None] > batch.scores[:, None, :]
        better &= real[:, :, None] & real[:, None, :]
        row, winner, loser = np.nonzero(better)
        gaps.append(values[row, winner] - values[row, loser])
        prompts.append(np.asarray(chosen)[row])
        strengths.append(rows.strengths[np.asarray(chosen)[row]])
        every.append(values[real])
    gap, prompt, strength = (np.concatenate(x) for x in (gaps, prompts, strengths))
    right = gap > 0
    _, where = np.unique(prompt, return_inverse=True)
    result = ratio("accuracy", np.bincount(where, weights=right), np.bincount(where))
    for index, name in enumerate(STRENGTHS):
        if np.any(strength == index):
            key = f"accuracy/{name.replace(' ', '_')}"
            result[key] = float(right[strength == index].mean())
    result |= calibration(gap)
    rewards_of_all = np.concatenate(every)
    return result | {
        "reward_mean": float(rewards_of_all.mean()),
        "reward_std": float(rewards_of_all.std()),
    }


def calibration(gap: np.ndarray) -> dict[str, float]:
    """Calibration of the choices that rewards make; see `evaluate_rewards`.

    Args:
      gap: float [pairs], reward of the better answer minus that of the worse.
    """
    probability = 1 / (1 + np.exp(-np.abs(gap)))
    bins = np.clip(np.searchsorted(BINS, probability, side="right") - 1, 0, len(BINS) - 2)
    result, error = {}, 0.0
    for index, lower in enumerate(BINS[:-1]):
        inside = bins == index
        if inside.any():
            right = float(np.mean(gap[inside] > 0))
            error += inside.mean() * abs(right - probability[inside].mean())
            result[f"calibration/{lower:.1f}"] = right
            result[f"calibration_pairs/{lower:.1f}"] = float(inside.sum())
    return {"calibration_error": float(error), **result}
