"""From scores of completions to what each of their tokens is worth, on the host.

Arrays are NumPy's. Legend: B batch (completions), T time, P prompts, S samples of a prompt. A mask
is bool or float [batch, time], true where the target is a token of the completion.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import numpy as np

from llm_jax.errors import UserError

GROUP_EPSILON = 1e-4  # added to a deviation before scores are divided by it, as TRL does
WHITEN_EPSILON = 1e-8  # added to a variance


# --- rewards of tokens ----------------------------------------------------------------------------


def token_rewards(
    scores_B: np.ndarray,
    kl_BT: np.ndarray,
    mask_BT: np.ndarray,
    *,
    kl_coefficient: float,
    finished_B: np.ndarray | None = None,
    missing_end_penalty: float = 0.0,
) -> np.ndarray:
    """−kl_coefficient · kl at every token of the completion, and the score at its last one.

    This is the reward of arXiv:1909.08593, eq. 2, and of arXiv:2203.02155, eq. 2.

    Args:
      scores_B: float [batch]. That of a row without a token, whatever it is, goes nowhere.
      kl_BT: float [batch, time], an estimate of the divergence from the reference; k1 is unbiased.
      finished_B: bool [batch], whether the completion ended by itself.
      missing_end_penalty: subtracted from the score of those that did not.

    Returns:
      float32 [batch, time], 0 outside the mask.
    """
    mask_BT = np.asarray(mask_BT) > 0
    scores_B = np.asarray(scores_B, np.float32)
    if finished_B is not None:
        scores_B = scores_B - np.float32(missing_end_penalty) * ~np.asarray(finished_B, bool)
    rewards_BT = np.where(mask_BT, -kl_coefficient * np.asarray(kl_BT), 0.0).astype(np.float32)
    some_B = np.flatnonzero(mask_BT.any(axis=1))
    last_B = mask_BT.shape[1] - 1 - np.argmax(mask_BT[some_B, ::-1], axis=1)
    rewards_BT[some_B, last_B] += scores_B[some_B]
    return rewards_BT


def overlong_penalty(lengths_B: np.ndarray, limit: int, buffer: int) -> np.ndarray:
    """DAPO's soft punishment of long completions (arXiv:2503.14476, eq. 13), to add to scores.

    Args:
      lengths_B: int [batch], tokens of the completions.
      limit: tokens at which, and beyond which, the penalty is −1.
      buffer: tokens before the limit over which it falls to that from 0.

    Returns:
      float32 [batch].

    Raises:
      UserError: a buffer that is not in [1, limit].
    """
    if not 1 <= buffer <= limit:
        raise UserError(
            f"an over-long buffer of {buffer} tokens does not fit a limit of {limit}: it must be "
            "at least 1 and at most the limit."
        )
    beyond_B = np.asarray(lengths_B) - (limit - buffer)
    return -np.clip(beyond_B / buffer, 0.0, 1.0).astype(np.float32)


# --- advantages -----------------------------------------------------------------------------------


def gae(
    rewards_BT: np.ndarray,
    values_BT: np.ndarray,
    mask_BT: np.ndarray,
    gamma: float = 1.0,
    lambda_: float = 0.95,
) -> tuple[np.ndarray, np.ndarray]:
    """Generalised advantage estimation (arXiv:1506.02438, eq. 16), backwards from the last token.

    δ_t = r_t + γ V_{t+1} − V_t and A_t = δ_t + γλ A_{t+1}, where t + 1 is the next token inside the
    mask, and V and A are 0 after the last.

    Returns:
      advantages: float32 [batch, time], 0 outside the mask.
      returns: the same of advantages + values.
    """
    mask_BT = np.asarray(mask_BT) > 0
    rewards_BT, values_BT = np.asarray(rewards_BT, np.float64), np.asarray(values_BT, np.float64)
    advantages_BT = np.zeros(mask_BT.shape)
    next_value_B = next_advantage_B = np.zeros(len(mask_BT))
    for t in reversed(range(mask_BT.shape[1])):
        delta_B = rewards_BT[:, t] + gamma * next_value_B - values_BT[:, t]
        advantage_B = delta_B + gamma * lambda_ * next_advantage_B
        advantages_BT[:, t] = np.where(mask_BT[:, t], advantage_B, 0.0)
        next_advantage_B = np.where(mask_BT[:, t], advantage_B, next_advantage_B)
        next_value_B = np.where(mask_BT[:, t], values_BT[:, t], next_value_B)
    returns_BT = np.where(mask_BT, advantages_BT + values_BT, 0.0)
    return advantages_BT.astype(np.float32), returns_BT.astype(np.float32)


def whiten(values: np.ndarray, mask: np.ndarray, shift_mean: bool = True) -> np.ndarray:
    """The values inside the mask with variance 1 (unbiased), and mean 0 unless it is to stay.

    Returns:
      float32 of the values' shape, 0 outside the mask.
    """
    mask = np.asarray(mask) > 0
    chosen = np.asarray(values, np.float64)[mask]
    whitened = np.zeros(mask.shape, np.float32)
    if chosen.size:
        mean = chosen.mean()
        variance = np.sum(np.square(chosen - mean)) / max(chosen.size - 1, 1)
        scaled = (chosen - mean) / np.sqrt(variance + WHITEN_EPSILON)
        whitened[mask] = scaled if shift_mean else scaled + mean
    return whitened


@dataclasses.dataclass(frozen=True)
class GroupAdvantages:
    """advantages: float32 [prompts, samples]. constant: bool [prompts], see `constant_groups`."""

    advantages: np.ndarray
    constant: np.ndarray


def constant_groups(scores_PS: np.ndarray) -> np.ndarray:
    """Whether a group says nothing: all its scores are equal, or fewer than two are finite.

    Args:
      scores_PS: float [prompts, samples].

    Returns:
      bool [prompts].
    """
    known_PS = np.isfinite(scores_PS)
    highest_P = np.max(np.where(known_PS, scores_PS, -np.inf), axis=1)
    lowest_P = np.min(np.where(known_PS, scores_PS, np.inf), axis=1)
    return highest_P <= lowest_P  # the mean of equal scores may round, their order does not


def group_advantages(
    scores_PS: np.ndarray, scale: Literal["std", "none", "batch"] = "std"
) -> GroupAdvantages:
    """How much better than its group each sample is (GRPO, arXiv:2402.03300, section 4.1.2).

    The score minus the group's mean; divided by the unbiased deviation of the group ("std") or of
    all scores ("batch", arXiv:2508.08221), or by nothing ("none", Dr. GRPO, arXiv:2503.20783).

    Args:
      scores_PS: float [prompts, samples]; those that are not finite are left out, and
        have advantage 0.
      scale: by what to divide.
    """
    scores_PS = np.asarray(scores_PS, np.float64)
    known_PS = np.isfinite(scores_PS)
    constant_P = constant_groups(scores_PS)
    advantages_PS = np.zeros(scores_PS.shape)
    deviation = _deviation(scores_PS[known_PS]) if scale == "batch" else None
    for p in np.flatnonzero(~constant_P):
        known_S = known_PS[p]
        scores = scores_PS[p, known_S]
        centred = scores - scores.mean()
        if scale == "none":
            advantages_PS[p, known_S] = centred
        else:
            spread = _deviation(scores) if deviation is None else deviation
            advantages_PS[p, known_S] = centred / (spread + GROUP_EPSILON)
    return GroupAdvantages(advantages_PS.astype(np.float32), constant_P)


def _deviation(scores: np.ndarray) -> float:
    return float(np.std(scores, ddof=1)) if scores.size > 1 else 0.0


# --- the weight of the divergence -----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class KLConfig:
    """The weight of the divergence from the reference in the rewards of PPO."""

    coefficient: float = 0.05  # where it starts, and stays if there is no target
    # The divergence of a whole completion that is aimed for, in nats; None: the weight is fixed.
    target: float | None = None
    horizon: int = 10_000  # completions over which the weight follows

    def __post_init__(self) -> None:
        if not self.coefficient >= 0:
            raise UserError(f"config.kl.coefficient={self.coefficient} must not be negative.")
        if self.target is not None and not self.target > 0:
            raise UserError(
                f"config.kl.target={self.target} must be positive; leave it out for a fixed weight."
            )
        if self.target is not None and not self.coefficient:
            raise UserError(
                "config.kl.coefficient=0 never moves towards a target: make it positive, or leave "
                "config.kl.target out."
            )
        if self.horizon < 1:
            raise UserError(f"config.kl.horizon={self.horizon} must be at least 1.")


class KLController:
    """Turns the weight up where the divergence is above its target, and down below it.

    β ← β (1 + clip(KL / target − 1, ±0.2) · completions / horizon) (arXiv:1909.08593, section 2.2).
    """

    def __init__(self, config: KLConfig):
        self._config = config
        self.coefficient = config.coefficient

    def update(self, kl: float, completions: int) -> None:
        """Takes note of `kl`, the mean divergence of so many completions, each summed over tokens.

        A divergence that is no number changes nothing.
        """
        if self._config.target is None or math.isnan(kl):
            return
        error = min(max(kl / self._config.target - 1, -0.2), 0.2)
        self.coefficient *= 1 + error * completions / self._config.horizon

    def state(self) -> dict[str, Any]:
        """JSON-able; what `restore` needs."""
        return {"coefficient": self.coefficient}

    def restore(self, state: dict[str, Any]) -> None:
        self.coefficient = float(state["coefficient"])
