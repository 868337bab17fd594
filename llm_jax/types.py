"""What flows through the house: small structs of arrays. Legend: B batch, T time."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

Array = Any  # jax.Array or numpy.ndarray; structs hold either side of the transfer


@flax.struct.dataclass
class Batch:
    """Packed token rows.

    tokens: int32 [batch, time], the inputs.
    targets: int32 [batch, time], the token that follows each input in the same document.
    loss_weights: float32 [batch, time], 0 where the target does not count (padding, prompts).
    segment_ids: int32 [batch, time], 1, 2, ... per document within a row; 0 is padding.
    positions: int32 [batch, time], restarting at 0 with every segment.
    """

    tokens: Array
    targets: Array
    loss_weights: Array
    segment_ids: Array
    positions: Array


@flax.struct.dataclass
class PreferenceBatch:
    """Rows of K responses to one prompt; each response stands in a sequence of its own.

    responses: a Batch of [batch, K, time]; loss_weights are 1 where the target is a token of the
      response (its end of turn included). A slot without a response is padding throughout.
    scores: float32 [batch, K], the higher the better; only their order counts. Pairs hold the
      chosen response first, with scores 1 and 0.
    margins: float32 [batch], by how much the better response should win; 0 where nothing says.
    reference_logprobs: float32 [batch, K], log-probabilities of the responses under the reference
      model, summed over their tokens; None where the objective has no use for them.

    Rows of an unpaired batch hold an answer (K = 0) with the score 1 or 0, and the same prompt with
    the answer to another one (K = 1), from which KTO estimates a divergence.
    """

    responses: Batch
    scores: Array
    margins: Array
    reference_logprobs: Array | None


@flax.struct.dataclass
class RolloutBatch:
    """Sampled completions, one a row, to train a policy on.

    sequences: a Batch of [batch, time]: prompt, completion, padding at the right; loss_weights are
      1 where the target is a token of the completion, its end included. A row that is not to be
      trained on (no reward was had for it) has weight 0 throughout.
    old_logprobs: float32 [batch, time], of each such target when it was sampled, at the sampling
      temperature and before its filters; 0 elsewhere, as in the following.
    advantages: float32 [batch, time], how much better than expected the target was.
    reference_logprobs: float32 [batch, time], under the reference model; None without one.
    values, returns: float32 [batch, time], what the critic expected before each target, and what it
      is to expect; None without a critic.
    pretraining: rows of text for PPO-ptx, a whole number for each sequence; None without.
    """

    sequences: Batch
    old_logprobs: Array
    advantages: Array
    reference_logprobs: Array | None = None
    values: Array | None = None
    returns: Array | None = None
    pretraining: Batch | None = None


@flax.struct.dataclass
class DistillationBatch:
    """Packed rows and what a teacher says of their targets.

    rows: a Batch of [batch, time].
    likeliest: int32 [batch, time, k], the tokens that the teacher finds likeliest, best first.
    logprobs: float32 [batch, time, k + 1], of these tokens and, as the last, of all others
      together, at the temperature of the distillation; [batch, time, k] where there are no others.

    Where a target does not count both mean nothing.
    """

    rows: Batch
    likeliest: Array
    logprobs: Array


@flax.struct.dataclass
class Mean:
    """A mean that is not divided yet, so that sums over micro-batches and devices stay exact.

    total: float32 [], sum of the weighted values. count: float32 [], sum of the weights.
    """

    total: Array
    count: Array

    def __add__(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.count + other.count)

    def value(self) -> jax.Array:
        """total / count, and 0 (never NaN) where nothing was counted."""
        return jnp.where(self.count > 0, self.total / jnp.where(self.count > 0, self.count, 1), 0.0)


@flax.struct.dataclass
class TrainState:
    """What a step turns into the next.

    step: int32 []. params: dict of float arrays, which are trained. opt_state: optax state.
    rng: typed PRNG key. frozen: dict of the arrays that the model needs beside `params` and that
    never change (the base of adapters); None where everything is trained.
    """

    step: Array
    params: Any
    opt_state: Any
    rng: Array
    frozen: Any = None


def join(params: Any, frozen: Any) -> Any:
    """The whole parameter tree: nested dicts `params` and `frozen` as one, in either order.

    Raises:
      ValueError: a leaf is in both.
    """
    if frozen is None:
        return params
    both = params.keys() & frozen.keys()
    for key in sorted(both):
        if not (isinstance(params[key], dict) and isinstance(frozen[key], dict)):
            raise ValueError(f"parameter {key!r} is in both trees")
    return {**frozen, **params, **{key: join(params[key], frozen[key]) for key in both}}
