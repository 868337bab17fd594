"""Proximal policy optimisation: clipped policy and value losses, with text mixed in on demand.

Legend: B batch, T time.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from llm_jax.errors import UserError
from llm_jax.models import LanguageModel
from llm_jax.models.heads import CRITIC, values, values_of
from llm_jax.objectives.lm import token_nats
from llm_jax.objectives.policy import (
    PolicyOutputs,
    clipped_surrogate,
    log_ratios,
    masked_mean,
    policy_metrics,
    policy_outputs,
)
from llm_jax.step import Pooled
from llm_jax.types import Mean, RolloutBatch


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The losses of policy and critic, and their weights."""

    clip: float = 0.2  # the ratio of policies is clipped to [1 - clip, 1 + clip]
    value_clip: float = 0.2  # a value may move so far from what it was; 1e9 or so: freely
    value_coefficient: float = 0.1
    entropy_coefficient: float = 0.0  # of the entropy, which is to stay high
    # Of the loss on rows of pre-training text (PPO-ptx, arXiv:2203.02155, eq. 2), a mean over its
    # tokens as the rest is over those of completions. 0: no text is read.
    ptx_coefficient: float = 0.0
    chunk: int | None = None  # positions of each row whose logits are held at once; None = all

    def __post_init__(self) -> None:
        if not 0 < self.clip <= 1:
            raise UserError(f"config.loss.clip={self.clip} must lie in (0, 1].")
        if not self.value_clip > 0:
            raise UserError(f"config.loss.value_clip={self.value_clip} must be positive.")
        for name in ("value_coefficient", "entropy_coefficient", "ptx_coefficient"):
            if not getattr(self, name) >= 0:
                raise UserError(f"config.loss.{name}={getattr(self, name)} must not be negative.")
        if self.chunk is not None and self.chunk < 1:
            raise UserError(
                f"config.loss.chunk={self.chunk} must be positive; leave it out for no chunks."
            )


@flax.struct.dataclass
class Whole:
    """Sums over the whole batch, float32 [].

    tokens: counted tokens of completions. returns: their returns. errors: returns − old values.
    text_tokens: counted tokens of pre-training text.
    """

    tokens: jax.Array
    returns: jax.Array
    errors: jax.Array
    text_tokens: jax.Array


def make_objective(
    model: LanguageModel,
    config: LossConfig,
    *,
    temperature: float,
    max_completion_length: int,
    critic: LanguageModel | None = None,
) -> Pooled:
    """(params, RolloutBatch, rng) → (loss, metrics); the loss counts tokens of completions.

    A token's loss is −min(ρA, clip(ρ) A) + value_coefficient · ½ max((V − R)², (V_clipped − R)²)
    − entropy_coefficient · H, with the V of the value head (arXiv:1707.06347, eq. 9; the clipped
    value: arXiv:2005.12729). To their mean ptx_coefficient times the mean −log p of the tokens of
    `batch.pretraining` is added.

    Metrics: "policy_loss", "value_loss" (the ½ max), with text "ptx_loss"; "value_clip_fraction";
    "explained_variance", 1 − Var(R − V_old) / Var(R), over the whole batch; and those of
    `policy_metrics`.

    Args:
      model: the policy, which has the value head if there is no critic.
      config: the weights.
      temperature: at which the completions were sampled.
      max_completion_length: tokens that a completion may have at most.
      critic: a model of its own with the value head; its parameters are `params["critic"]`.
    """

    def pool(params: Any, batch: RolloutBatch, rng: jax.Array | None) -> Whole:
        return whole_of(batch)

    def objective(
        params: Any, batch: RolloutBatch, rng: jax.Array | None, whole: Whole | None = None
    ) -> tuple[Mean, dict[str, Mean]]:
        whole = whole_of(batch) if whole is None else whole
        policy = policy_outputs(
            model,
            params,
            batch.sequences,
            longest=max_completion_length,
            temperature=temperature,
            chunk=config.chunk,
            rng=rng,
        )
        if critic is None:
            values_BT = values_of(params, policy.hidden)
        else:
            values_BT = values(critic, params[CRITIC], batch.sequences, rng)
        loss, metrics = ppo_loss(config, policy, values_BT, batch, whole)
        if not config.ptx_coefficient:
            return loss, metrics
        text = batch.pretraining
        assert text is not None, "the source attaches rows of pre-training text"
        nats_BT = token_nats(model, params, text, config.chunk, rng)
        ptx = Mean(jnp.sum(text.loss_weights * nats_BT), jnp.sum(text.loss_weights))
        metrics["ptx_loss"] = jax.lax.stop_gradient(ptx)
        # The step divides by the tokens of completions; the text is to be divided by its own.
        share = whole.tokens / jnp.maximum(whole.text_tokens, 1)
        return Mean(loss.total + config.ptx_coefficient * share * ptx.total, loss.count), metrics

    return Pooled(pool, objective)


def whole_of(batch: RolloutBatch) -> Whole:
    """The sums over the rows of a batch."""
    mask_BT = batch.sequences.loss_weights > 0
    old_BT, returns_BT = _critic_data(batch)
    returns, errors = (masked_mean(x, mask_BT) for x in (returns_BT, returns_BT - old_BT))
    text = batch.pretraining
    text_tokens = jnp.float32(0) if text is None else jnp.sum(text.loss_weights)
    return Whole(returns.count, returns.total, errors.total, text_tokens)


def ppo_loss(
    config: LossConfig,
    policy: PolicyOutputs,
    values_BT: jax.Array,
    batch: RolloutBatch,
    whole: Whole,
) -> tuple[Mean, dict[str, Mean]]:
    """Loss and metrics of what policy and critic say, without text; see `make_objective`."""
    mask_BT = batch.sequences.loss_weights > 0
    log_ratio_BT = log_ratios(policy.logprobs, batch.old_logprobs, mask_BT)
    surrogate = clipped_surrogate(log_ratio_BT, batch.advantages, config.clip, config.clip)
    old_BT, returns_BT = _critic_data(batch)
    near_BT = old_BT + jnp.clip(values_BT - old_BT, -config.value_clip, config.value_clip)
    free_BT, clipped_BT = jnp.square(values_BT - returns_BT), jnp.square(near_BT - returns_BT)
    value_loss_BT = jnp.maximum(free_BT, clipped_BT) / 2
    loss_BT = (
        surrogate.loss
        + config.value_coefficient * value_loss_BT
        - config.entropy_coefficient * policy.entropies
    )
    metrics = policy_metrics(batch, surrogate, policy.logprobs, policy.entropies, mask_BT) | {
        "policy_loss": masked_mean(surrogate.loss, mask_BT),
        "value_loss": masked_mean(value_loss_BT, mask_BT),
        "value_clip_fraction": masked_mean(clipped_BT > free_BT, mask_BT),
        "explained_variance": _explained_variance(batch, whole, mask_BT),
    }
    return masked_mean(loss_BT, mask_BT), jax.lax.stop_gradient(metrics)


def _explained_variance(batch: RolloutBatch, whole: Whole, mask_BT: jax.Array) -> Mean:
    """(Σ (R − mean)² − Σ (error − mean)²) / Σ (R − mean)²: with the means of the whole batch, the
    sums of its rows add up."""
    tokens = jnp.maximum(whole.tokens, 1)
    old_BT, returns_BT = _critic_data(batch)
    spread_BT = jnp.square(returns_BT - whole.returns / tokens)
    left_BT = jnp.square(returns_BT - old_BT - whole.errors / tokens)
    explained = masked_mean(spread_BT - left_BT, mask_BT).total
    return Mean(explained, masked_mean(spread_BT, mask_BT).total)


def _critic_data(batch: RolloutBatch) -> tuple[jax.Array, jax.Array]:
    """What the critic expected before the batch, and what it is to expect: [batch, time] each."""
    assert batch.values is not None and batch.returns is not None, "the source attaches both"
    return batch.values, batch.returns
