"""Retrieval accuracy over depth at one context length.

Legend: B batch, T time, A answer tokens, D embed, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.data.needle import NeedleExamples
from llm_jax.evals.batching import padded_batches
from llm_jax.placement import to_host
from llm_jax.types import Batch

# (params, batch) → int32 [B, A], the predicted answer tokens in the order of their positions.
Answer = Callable[[Any, Batch], Any]


def evaluate_needle(
    answer: Answer, params: Any, examples: NeedleExamples, batch_size: int
) -> dict[str, float]:
    """The share of examples whose answer is right in all its tokens.

    Each answer token is predicted from the *true* tokens before it. That the most likely token is
    the true one at all of them is the same as greedy decoding giving the answer: the first token is
    predicted from the same prompt in both; where it is right, so is the context of the second, and
    so on; and the first one that is wrong is wrong in both. So one forward pass is enough.

    With functools.partial over all but `params` it is an evaluation that a trainer can run. With
    several processes each of them calls it, with the same examples.

    Args:
      answer: jitted, such as `answer_tokens` with its model bound. It gets numpy arrays
        [batch_size, T], the same on every process, and places them itself where the mesh has more
        than one process (`placement.to_devices`).
      params: passed on to it.
      examples: what `needle_examples` returns.
      batch_size: rows at once.

    Returns:
      accuracy: over all examples; accuracy_by_depth/0.50: over those of that depth.
    """
    correct = np.zeros(len(examples.rows), bool)
    indices = range(len(examples.rows))
    for chosen, batch in padded_batches(examples.rows, indices, batch_size):
        predicted_BA = to_host(answer(params, batch))[: len(chosen)]
        marked = batch.loss_weights[: len(chosen)] > 0
        true_BA = batch.targets[: len(chosen)][marked].reshape(len(chosen), -1)
        correct[list(chosen)] = np.all(predicted_BA == true_BA, axis=1)
    result = {"accuracy": float(correct.mean())}
    for depth in np.unique(examples.depths):
        at_depth = correct[examples.depths == depth]
        result[f"accuracy_by_depth/{depth:.2f}"] = float(at_depth.mean())
    return result


def answer_tokens(model: Any, params: Any, batch: Batch, count: int) -> jax.Array:
    """The most likely token at the marked positions of each row.

    Only the hidden states of those positions are projected, so the logits are [B, A, V].

    Args:
      model: a LanguageModel.
      params: its parameters.
      batch: each row has `count` targets of positive weight, or none at all.
      count: static.

    Returns:
      int32 [B, A], in the order of the positions; arbitrary for rows without marked targets.
    """
    hidden_BTD, _ = model.apply(params, batch.tokens, batch.positions, batch.segment_ids)
    unmarked_BT = jnp.asarray(batch.loss_weights) <= 0
    where_BA = jnp.argsort(unmarked_BT, axis=1, stable=True)[:, :count]
    hidden_BAD = jnp.take_along_axis(hidden_BTD, where_BA[..., None], axis=1)
    return jnp.argmax(model.logits(params, hidden_BAD), axis=-1).astype(jnp.int32)
