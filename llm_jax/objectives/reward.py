"""The Bradley–Terry loss of reward models, on pairs and on ranked groups.

Legend: B batch, K responses.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.errors import UserError
from llm_jax.models import LanguageModel
from llm_jax.models.heads import rewards
from llm_jax.step import Objective
from llm_jax.types import Mean, PreferenceBatch

MARGINS: dict[str, tuple[float, ...] | None] = {
    "none": None,
    "large": (3.0, 2.0, 1.0, 0.0),
    "small": (1.0, 2 / 3, 1 / 3, 0.0),
}


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The loss of reward models."""

    # Weight of (r_chosen + r_rejected)², which keeps rewards around 0 (arXiv:2312.09244 recommends
    # 0.01); 0: none, and the level of the rewards is free.
    centring: float = 0.0
    # By how much the better answer should win, by strength of preference (Llama 2,
    # arXiv:2307.09288, table 27): "none", "large", "small", or four numbers, "3,2,1,0", from
    # significantly to negligibly better. Answers without a strength have the margin 0.
    margins: str = "none"

    @property
    def margin_levels(self) -> tuple[float, ...] | None:
        """The margin of each strength; None for none."""
        if self.margins in MARGINS:
            return MARGINS[self.margins]
        try:
            levels = tuple(float(part) for part in self.margins.split(","))
        except ValueError:
            levels = ()
        if len(levels) != 4 or not all(map(math.isfinite, levels)):
            raise UserError(
                f"config.loss.margins={self.margins!r} is neither {', '.join(MARGINS)} nor four "
                "numbers such as 3,2,1,0."
            )
        return levels

    def __post_init__(self) -> None:
        _ = self.margin_levels  # refuses what is no margin
        if self.centring < 0:
            raise UserError(f"config.loss.centring={self.centring} must not be negative.")


def make_objective(model: LanguageModel, config: LossConfig) -> Objective:
    """(params, PreferenceBatch, rng) → (loss, metrics).

    The loss of a row is −log σ(r_i − r_j − margin) + centring · (r_i + r_j)², averaged over the
    pairs (i, j) of the row in which i has the higher score (InstructGPT, arXiv:2203.02155, eq. 1;
    margins: Llama 2, arXiv:2307.09288, eq. 2): so a prompt with many responses counts once, and its
    responses are read once. The loss counts rows that have such a pair.
    """

    def objective(
        params: Any, batch: PreferenceBatch, rng: jax.Array | None
    ) -> tuple[Mean, dict[str, Mean]]:
        rewards_BK = rewards(model, params, batch.responses, rng)
        return bradley_terry(rewards_BK, batch, config.centring)

    return objective


def bradley_terry(
    rewards_BK: jax.Array, batch: PreferenceBatch, centring: float = 0.0
) -> tuple[Mean, dict[str, Mean]]:
    """Loss and metrics of given rewards, float32 [batch, K].

    Metrics, averaged as the loss is: "rewards/chosen", "rewards/rejected" (the better and the worse
    response of each pair), "rewards/margins" (their difference), "rewards/accuracies" (the share of
    pairs whose better response has strictly the higher reward).
    """
    better_BKK = _pairs(batch)
    count_B = jnp.sum(better_BKK, axis=(1, 2))
    chosen_BK1, rejected_B1K = rewards_BK[:, :, None], rewards_BK[:, None, :]
    gap_BKK = chosen_BK1 - rejected_B1K

    def mean(values_BKK: jax.Array) -> Mean:
        sums_B = jnp.sum(jnp.where(better_BKK, values_BKK, 0.0), axis=(1, 2))
        total = jnp.sum(sums_B / jnp.maximum(count_B, 1))
        return Mean(total, jnp.sum(count_B > 0).astype(jnp.float32))

    loss_BKK = -jax.nn.log_sigmoid(gap_BKK - batch.margins[:, None, None])
    if centring:
        loss_BKK += centring * jnp.square(chosen_BK1 + rejected_B1K)
    metrics = {
        "rewards/chosen": mean(chosen_BK1),
        "rewards/rejected": mean(rejected_B1K),
        "rewards/margins": mean(gap_BKK),
        "rewards/accuracies": mean((gap_BKK > 0).astype(jnp.float32)),
    }
    return mean(loss_BKK), jax.lax.stop_gradient(metrics)


def _pairs(batch: PreferenceBatch) -> jax.Array:
    """bool [batch, K, K]: whether response i is better than j; padding is in no pair."""
    real_BK = jnp.any(batch.responses.segment_ids != 0, axis=-1)
    better_BKK = batch.scores[:, :, None] > batch.scores[:, None, :]
    return better_BKK & real_BK[:, :, None] & real_BK[:, None, :]
