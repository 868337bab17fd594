"""Log-probabilities of whole responses, for preference learning.

Legend: B batch, T time.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.models import LanguageModel
from llm_jax.objectives.lm import token_nats
from llm_jax.types import Batch


def response_logprobs(
    model: LanguageModel,
    params: Any,
    responses: Batch,
    *,
    chunk: int | None = None,
    rng: jax.Array | None = None,
) -> jax.Array:
    """Σ log p(token) over the counted tokens of each sequence: float32 [...], in nats.

    Args:
      responses: a Batch of [..., time], one sequence a row; `loss_weights` say what counts.
      chunk: positions whose logits are held at once; None = all.
      rng: switches dropout on.
    """
    rows = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), responses)
    nats_BT = token_nats(model, params, rows, chunk, rng)
    logprobs_B = -jnp.sum(jnp.where(rows.loss_weights > 0, nats_BT, 0.0), axis=-1)
    return logprobs_B.reshape(responses.tokens.shape[:-1])


def response_lengths(responses: Batch) -> jax.Array:
    """Counted tokens of each sequence: float32 [...]."""
    return jnp.sum(responses.loss_weights > 0, axis=-1).astype(jnp.float32)
