"""Group-relative policy optimisation, its variants by name.

Legend: B batch, T time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from llm_jax.errors import UserError, did_you_mean
from llm_jax.models import LanguageModel
from llm_jax.objectives.policy import (
    KL_ESTIMATORS,
    clipped_surrogate,
    log_ratios,
    masked_mean,
    policy_metrics,
    policy_outputs,
)
from llm_jax.step import Objective
from llm_jax.types import Mean, RolloutBatch


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Which policy loss, and its constants."""

    variant: str = "grpo"  # one of VARIANTS
    # The ratio is clipped to [1 - epsilon_low, 1 + epsilon_high]; None: as in the variant's paper.
    epsilon_low: float | None = None
    epsilon_high: float | None = None
    beta: float = 0.0  # weight of the divergence from the reference model; 0: none is needed
    kl_estimator: Literal["k3", "k2"] = "k3"  # how the divergence in the loss is estimated
    chunk: int | None = None  # positions of each row whose logits are held at once; None = all

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise UserError(
                f"config.loss.variant={self.variant!r} is unknown."
                f"{did_you_mean(self.variant, VARIANTS)}"
            )
        low, high = self.clipping
        if not 0 < low <= 1:
            raise UserError(f"config.loss.epsilon_low={self.epsilon_low} must lie in (0, 1].")
        if not high > 0:
            raise UserError(f"config.loss.epsilon_high={self.epsilon_high} must be positive.")
        if not self.beta >= 0:
            raise UserError(f"config.loss.beta={self.beta} must not be negative.")
        if self.chunk is not None and self.chunk < 1:
            raise UserError(
                f"config.loss.chunk={self.chunk} must be positive; leave it out for no chunks."
            )

    @property
    def clipping(self) -> tuple[float, float]:
        """How far the ratio may go below and above 1."""
        low, high = VARIANTS[self.variant].clipping
        return (
            low if self.epsilon_low is None else self.epsilon_low,
            high if self.epsilon_high is None else self.epsilon_high,
        )


@dataclasses.dataclass(frozen=True)
class Variant:
    """mean: `(losses [batch, time], mask [batch, time], longest completion) → Mean`, such that the
    step's one division by the global count gives the variant's average. by_sequence: a sequence
    has one ratio, the geometric mean of its tokens'. clipping: how far the ratio may go below and
    above 1, where the config does not say. scale: what advantages are divided by, likewise."""

    mean: Callable[[jax.Array, jax.Array, int], Mean]
    by_sequence: bool = False
    clipping: tuple[float, float] = (0.2, 0.2)
    scale: Literal["std", "none"] = "std"


def make_objective(
    model: LanguageModel, config: LossConfig, *, temperature: float, max_completion_length: int
) -> Objective:
    """(params, RolloutBatch, rng) → (loss, metrics).

    A token's loss is −min(ρA, clip(ρ) A) + beta · KL (DeepSeekMath, arXiv:2402.03300, eq. 3); the
    variants differ in how tokens are averaged. Rows without a counted token count nowhere.

    Metrics: "policy_loss", the loss without the divergence, and those of `policy_metrics`. Right
    after sampling ρ is 1, so the loss says nothing while its gradient does: rewards tell whether
    the policy learns.

    Args:
      model: the policy.
      config: the variant.
      temperature: at which the completions were sampled.
      max_completion_length: tokens that a completion may have at most; dr_grpo divides by it.
    """

    def objective(
        params: Any, batch: RolloutBatch, rng: jax.Array | None
    ) -> tuple[Mean, dict[str, Mean]]:
        policy = policy_outputs(
            model,
            params,
            batch.sequences,
            longest=max_completion_length,
            temperature=temperature,
            chunk=config.chunk,
            rng=rng,
        )
        return grpo_loss(config, policy.logprobs, policy.entropies, batch, max_completion_length)

    return objective


def grpo_loss(
    config: LossConfig,
    logprobs_BT: jax.Array,
    entropies_BT: jax.Array,
    batch: RolloutBatch,
    max_completion_length: int,
) -> tuple[Mean, dict[str, Mean]]:
    """Loss and metrics of what the policy says of the targets; see `make_objective`."""
    variant = VARIANTS[config.variant]
    mask_BT = batch.sequences.loss_weights > 0
    log_ratio_BT = log_ratios(logprobs_BT, batch.old_logprobs, mask_BT)
    if variant.by_sequence:
        log_ratio_BT = jnp.broadcast_to(_row_means(log_ratio_BT, mask_BT)[:, None], mask_BT.shape)
    surrogate = clipped_surrogate(log_ratio_BT, batch.advantages, *config.clipping)
    policy_loss = variant.mean(surrogate.loss, mask_BT, max_completion_length)
    metrics = policy_metrics(batch, surrogate, logprobs_BT, entropies_BT, mask_BT)
    metrics["policy_loss"] = jax.lax.stop_gradient(policy_loss)
    if not config.beta:
        return policy_loss, metrics
    assert batch.reference_logprobs is not None, "the source attaches reference_logprobs"
    reference_k1_BT = log_ratios(logprobs_BT, batch.reference_logprobs, mask_BT)
    divergence_BT = config.beta * KL_ESTIMATORS[config.kl_estimator](reference_k1_BT)
    return variant.mean(surrogate.loss + divergence_BT, mask_BT, max_completion_length), metrics


# --- the variants: (losses [batch, time], mask [batch, time], longest completion) → Mean ----------


def _by_row(losses_BT: jax.Array, mask_BT: jax.Array, longest: int) -> Mean:
    return Mean(jnp.sum(_row_means(losses_BT, mask_BT)), _rows(mask_BT))


def _by_token(losses_BT: jax.Array, mask_BT: jax.Array, longest: int) -> Mean:
    return masked_mean(losses_BT, mask_BT)


def _by_token_of_micro_batch(losses_BT: jax.Array, mask_BT: jax.Array, longest: int) -> Mean:
    """Micro-batches weigh the same, however many tokens they have; without any, nothing."""
    mean = masked_mean(losses_BT, mask_BT)
    return Mean(mean.value(), (mean.count > 0).astype(jnp.float32))


def _by_constant(losses_BT: jax.Array, mask_BT: jax.Array, longest: int) -> Mean:
    return Mean(masked_mean(losses_BT, mask_BT).total, _rows(mask_BT) * longest)


def _row_means(values_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """The mean of each row's values inside the mask, float32 [batch]; 0 where nothing is."""
    total_B = jnp.sum(jnp.where(mask_BT, values_BT, 0.0), axis=-1)
    return total_B / jnp.maximum(jnp.sum(mask_BT, axis=-1), 1)


def _rows(mask_BT: jax.Array) -> jax.Array:
    return jnp.sum(jnp.any(mask_BT, axis=-1)).astype(jnp.float32)


VARIANTS: dict[str, Variant] = {
    "grpo": Variant(_by_row),  # arXiv:2402.03300: the mean over sequences of their tokens' mean
    "bnpo": Variant(_by_token_of_micro_batch),  # TRL's name: over the tokens of a micro-batch
    # arXiv:2503.14476, eq. 8: over the tokens of the whole batch; "clip higher" is section 3.1.
    "dapo": Variant(_by_token, clipping=(0.2, 0.28)),
    # arXiv:2503.20783: over sequences of constant length.
    "dr_grpo": Variant(_by_constant, scale="none"),
    # arXiv:2507.18071, eq. 5; section 5.1.
    "gspo": Variant(_by_row, by_sequence=True, clipping=(3e-4, 4e-4)),
}
