"""Heads on the transformer: a reward model is a language model with one more kernel.

Legend: B batch, K responses, T time, D embed.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.models.transformer import LanguageModel
from llm_jax.sharding import Named
from llm_jax.types import Batch

REWARD = "reward_head"


def init_reward_head(rng: jax.Array, embed_dim: int) -> dict[str, Any]:
    """{"reward_head": {"kernel": float32 [embed, 1] in a box}}.

    Drawn from N(0, 1 / (embed + 1)), as Stiennon et al. 2020 (arXiv:2009.01325) do.
    """
    kernel = jax.random.normal(rng, (embed_dim, 1)) / math.sqrt(embed_dim + 1)
    return {REWARD: {"kernel": Named(kernel, ("embed", "head_output"))}}


def rewards(
    model: LanguageModel, params: Any, responses: Batch, rng: jax.Array | None = None
) -> jax.Array:
    """The reward of each sequence, read at its last real token: float32 [...].

    Args:
      params: those of the model, with a reward head.
      responses: a Batch of [..., time], one sequence a row, padding at the right. Rows that are
        padding throughout get a number that means nothing.
      rng: switches dropout on.
    """
    rows = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), responses)
    hidden_BTD, _ = model.apply(params, rows.tokens, rows.positions, rows.segment_ids, rng=rng)
    last_B = jnp.maximum(jnp.sum(rows.segment_ids != 0, axis=-1) - 1, 0)
    hidden_BD = jnp.take_along_axis(hidden_BTD, last_B[:, None, None], axis=1)[:, 0]
    # A sum and no matrix product, which accelerators round: rewards are compared, and their gaps
    # are small.
    reward_B = jnp.sum(hidden_BD.astype(jnp.float32) * params[REWARD]["kernel"][:, 0], axis=-1)
    return reward_B.reshape(responses.tokens.shape[:-1])
