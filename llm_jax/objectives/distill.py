"""Knowledge distillation: a student's distributions drawn to those of a teacher, token by token.

Legend: B batch, T time, C time positions of a chunk, D embed, V vocabulary, K tokens that the
teacher finds likeliest, E events: V tokens, or K tokens and the event that it is any other.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp

from llm_jax.errors import UserError
from llm_jax.models import LanguageModel
from llm_jax.objectives.lm import over_time, pick
from llm_jax.sharding import constrain
from llm_jax.step import Objective
from llm_jax.types import Batch, DistillationBatch, Mean

TEACHER = "teacher"  # the teacher's weights among the parameters that an objective is given


@dataclasses.dataclass(frozen=True)
class DivergenceConfig:
    """How far the student is from the teacher."""

    # forward_kl: KL(teacher ‖ student), which spreads the student over all that the teacher does.
    # reverse_kl: KL(student ‖ teacher), which settles it on what the teacher does most. jsd: the
    # generalised Jensen-Shannon divergence between them.
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    # Of jsd: the teacher's share in the mixture. Near 0 it is beta times the forward divergence,
    # near 1 (1 - beta) times the reverse.
    beta: float = 0.5
    temperature: float = 1.0  # that the logits of both are divided by
    chunk: int | None = None  # positions of each row whose logits are held at once; None = all

    def __post_init__(self) -> None:
        if not 0 < self.beta < 1:
            raise UserError(
                f"config.loss.beta={self.beta} must lie between 0 and 1; its limits are "
                "config.loss.divergence='forward_kl' and 'reverse_kl'."
            )
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise UserError(f"config.loss.temperature={self.temperature} must be positive.")
        if self.chunk is not None and self.chunk < 1:
            raise UserError(
                f"config.loss.chunk={self.chunk} must be positive; leave it out for no chunks."
            )


@dataclasses.dataclass(frozen=True)
class LossConfig(DivergenceConfig):
    """The divergence, mixed with the cross-entropy of the targets."""

    alpha: float = 0.5  # share of the cross-entropy; the divergence has the rest

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise UserError(f"config.loss.alpha={self.alpha} must lie in [0, 1].")


def make_objective(
    model: LanguageModel, teacher: LanguageModel, config: DivergenceConfig, alpha: float = 0.0
) -> Objective:
    """(params, batch, rng) → (loss, metrics), with the teacher's weights in `params[TEACHER]`.

    A token's loss is alpha · −log p(target) + (1 − alpha) · temperature² · divergence, summed with
    the batch's loss weights, in nats; its count is the sum of the weights. The factor keeps the
    size of the gradient at any temperature (arXiv:1503.02531, section 2.1). The divergence is
    that of `divergence` between the distributions over the tokens that both models have.

    Metrics: "distill_loss", temperature² · divergence; "cross_entropy" of the targets at
    temperature 1; "token_agreement", the share of tokens where both find the same one likeliest.

    Args:
      model: the student.
      teacher: no gradient flows to it, and its dropout is off.
      config: which divergence.
      alpha: the share of the cross-entropy.
    """
    shared = shared_vocabulary(model, teacher)

    def objective(params: Any, batch: Batch, rng: jax.Array | None) -> tuple[Mean, dict[str, Mean]]:
        hidden_BTD, _ = model.apply(
            params, batch.tokens, batch.positions, batch.segment_ids, rng=rng
        )
        kernel_DV = model.output_kernel(params)
        teacher_BTD, teacher_kernel_DV = jax.lax.stop_gradient(
            _states(teacher, params[TEACHER], batch)
        )

        def read(hidden_BCD: jax.Array, targets_BC: jax.Array, teacher_BCD: jax.Array) -> Any:
            logits_BCV = _logits(model, hidden_BCD, kernel_DV)
            teacher_BCV = _logits(teacher, teacher_BCD, teacher_kernel_DV)[..., :shared]
            known_BCV = jax.nn.log_softmax(teacher_BCV / config.temperature)
            learnt_BCV = jax.nn.log_softmax(logits_BCV[..., :shared] / config.temperature)
            favourite_BC = jnp.argmax(known_BCV, axis=-1)
            return _of_tokens(config, logits_BCV, targets_BC, known_BCV, learnt_BCV, favourite_BC)

        made = over_time(read, config.chunk, hidden_BTD, batch.targets, teacher_BTD)
        return _loss(made, alpha, batch.loss_weights)

    return objective


def make_cached_objective(
    model: LanguageModel, config: DivergenceConfig, alpha: float, vocabulary: int
) -> Objective:
    """`make_objective` for a DistillationBatch, which holds what the teacher says; see there.

    The divergence is between distributions over the batch's tokens and the event that it is any
    other. Merging events can only bring distributions closer (the data-processing inequality), so
    it is a lower bound of that over all tokens, 0 where these agree; with all of them in the batch
    it is the same. To leave the others out and scale the rest to 1 would teach the student to give
    them nothing.

    Args:
      vocabulary: how many tokens both models have.
    """

    def objective(
        params: Any, batch: DistillationBatch, rng: jax.Array | None
    ) -> tuple[Mean, dict[str, Mean]]:
        rows = batch.rows
        hidden_BTD, _ = model.apply(params, rows.tokens, rows.positions, rows.segment_ids, rng=rng)
        kernel_DV = model.output_kernel(params)

        def read(
            hidden_BCD: jax.Array,
            targets_BC: jax.Array,
            tokens_BCK: jax.Array,
            known_BCE: jax.Array,
        ) -> Any:
            logits_BCV = _logits(model, hidden_BCD, kernel_DV)
            learnt_BCE = _merged(logits_BCV[..., :vocabulary] / config.temperature, tokens_BCK)
            favourite_BC = tokens_BCK[..., 0]
            return _of_tokens(config, logits_BCV, targets_BC, known_BCE, learnt_BCE, favourite_BC)

        made = over_time(
            read, config.chunk, hidden_BTD, rows.targets, batch.likeliest, batch.logprobs
        )
        return _loss(made, alpha, rows.loss_weights)

    return objective


def likeliest_tokens(
    teacher: LanguageModel,
    params: Any,
    batch: Batch,
    *,
    k: int,
    vocabulary: int,
    temperature: float,
    chunk: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """What a DistillationBatch holds of the teacher: `likeliest` and `logprobs`.

    Args:
      k: tokens, at most `vocabulary`.
      vocabulary: the first so many tokens are those that both models have.
      temperature: that logits are divided by.
      chunk: positions of each row whose logits are held at once; None = all.
    """
    hidden_BTD, kernel_DV = _states(teacher, params, batch)

    def read(hidden_BCD: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits_BCV = _logits(teacher, hidden_BCD, kernel_DV)[..., :vocabulary] / temperature
        _, tokens_BCK = jax.lax.top_k(logits_BCV, k)
        return tokens_BCK, _merged(logits_BCV, tokens_BCK)

    return over_time(read, chunk, hidden_BTD)


def divergence(config: DivergenceConfig, teacher: jax.Array, student: jax.Array) -> jax.Array:
    """The divergence of distributions given by log-probabilities: float32 [..., events] → [...].

    The generalised Jensen-Shannon divergence of P (teacher) and Q (student) is β KL(P ‖ M) +
    (1 − β) KL(Q ‖ M) with M = βP + (1 − β)Q (GKD, arXiv:2306.13649, eq. 1). Divided by β it goes
    to KL(P ‖ Q) for β → 0, divided by 1 − β to KL(Q ‖ P) for β → 1: TRL's trainer takes these two
    for β = 0 and 1.
    """
    if config.divergence == "forward_kl":
        return _kl(teacher, student)
    if config.divergence == "reverse_kl":
        return _kl(student, teacher)
    beta = config.beta
    mixture = jnp.logaddexp(math.log(beta) + teacher, math.log1p(-beta) + student)
    return beta * _kl(teacher, mixture) + (1 - beta) * _kl(student, mixture)


def shared_vocabulary(model: LanguageModel, teacher: LanguageModel) -> int:
    """How many tokens both have: models with one tokenizer may pad their tables differently."""
    sizes = (model.config.vocab_size, teacher.config.vocab_size)
    return min(size for size in sizes if size is not None)


def _kl(p: jax.Array, q: jax.Array) -> jax.Array:
    return jnp.sum(jnp.exp(p) * (p - q), axis=-1)


def _states(model: LanguageModel, params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Hidden states and output projection of a teacher."""
    assert model.config.vocab_size is not None
    # A student with a larger table may have sampled what the teacher has no embedding of.
    tokens_BT = jnp.minimum(batch.tokens, model.config.vocab_size - 1)
    hidden_BTD, _ = model.apply(params, tokens_BT, batch.positions, batch.segment_ids)
    return hidden_BTD, model.output_kernel(params)


def _logits(model: LanguageModel, hidden_BCD: jax.Array, kernel_DV: jax.Array) -> jax.Array:
    logits_BCV = model.project(hidden_BCD, kernel_DV)
    return constrain(logits_BCV, "activation_rows", "activation_time", "activation_vocab")


def _merged(logits_BCV: jax.Array, tokens_BCK: jax.Array) -> jax.Array:
    """Log-probabilities of the tokens, in their order, and of all others together as the last
    event; without that one where there are no others."""
    normaliser_BC1 = jax.nn.logsumexp(logits_BCV, axis=-1, keepdims=True)
    chosen_BCK = jnp.take_along_axis(logits_BCV, tokens_BCK, axis=-1) - normaliser_BC1
    if tokens_BCK.shape[-1] == logits_BCV.shape[-1]:
        return chosen_BCK
    # From their own logits: 1 minus the chosen probabilities would be lost in rounding.
    others_BCV = jnp.put_along_axis(logits_BCV, tokens_BCK, -jnp.inf, axis=-1, inplace=False)
    rest_BC1 = jax.nn.logsumexp(others_BCV, axis=-1, keepdims=True) - normaliser_BC1
    return jnp.concatenate([chosen_BCK, rest_BC1], axis=-1)


def _of_tokens(
    config: DivergenceConfig,
    logits_BCV: jax.Array,
    targets_BC: jax.Array,
    known_BCE: jax.Array,
    learnt_BCE: jax.Array,
    favourite_BC: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Divergence, cross-entropy and agreement of each token, float32 [batch, chunk]."""
    apart_BC = config.temperature**2 * divergence(config, known_BCE, learnt_BCE)
    nats_BC = jax.nn.logsumexp(logits_BCV, axis=-1) - pick(logits_BCV, targets_BC)
    agrees_BC = jnp.argmax(logits_BCV, axis=-1) == favourite_BC
    return apart_BC, nats_BC, agrees_BC.astype(jnp.float32)


def _loss(
    made: tuple[jax.Array, jax.Array, jax.Array], alpha: float, weights_BT: jax.Array
) -> tuple[Mean, dict[str, Mean]]:
    count = jnp.sum(weights_BT)

    def mean(values_BT: jax.Array) -> Mean:
        return Mean(jnp.sum(jnp.where(weights_BT > 0, weights_BT * values_BT, 0.0)), count)

    apart_BT, nats_BT, agrees_BT = made
    metrics = {
        "distill_loss": mean(apart_BT),
        "cross_entropy": mean(nats_BT),
        "token_agreement": mean(agrees_BT),
    }
    loss = mean(alpha * nats_BT + (1 - alpha) * apart_BT)
    return loss, jax.lax.stop_gradient(metrics)
