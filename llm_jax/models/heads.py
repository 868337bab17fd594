"""Heads on the transformer: reward models and critics are language models with one more kernel.

Legend: B batch, K responses, T time, D embed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.models.language_model import LanguageModel
from llm_jax.sharding import Named
from llm_jax.types import Batch

REWARD = "reward_head"
VALUE = "value_head"
HEADS = (REWARD, VALUE)
CRITIC = "critic"  # where the parameters of a critic stand that is a model of its own


def init_reward_head(rng: jax.Array, embed_dim: int) -> dict[str, Any]:
    """{"reward_head": {"kernel": float32 [embed, 1] in a box}}.

    Drawn from N(0, 1 / (embed + 1)), as Stiennon et al. 2020 (arXiv:2009.01325) do.
    """
    kernel = jax.random.normal(rng, (embed_dim, 1)) / math.sqrt(embed_dim + 1)
    return {REWARD: {"kernel": Named(kernel, ("embed", "head_output"))}}


def init_heads(rng: jax.Array, names: Sequence[str], embed_dim: int) -> dict[str, Any]:
    """Fresh heads of these names, in boxes."""
    heads = {REWARD: lambda: init_reward_head(rng, embed_dim),
             VALUE: lambda: init_value_head(embed_dim)}  # fmt: skip
    return {name: tree for head in names for name, tree in heads[head]().items()}


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
    return _read(params[REWARD], hidden_BD).reshape(responses.tokens.shape[:-1])


def init_value_head(embed_dim: int) -> dict[str, Any]:
    """{"value_head": {"kernel": float32 [embed, 1] in a box}}, of zeros.

    A critic that has learnt nothing expects 0 everywhere, and so adds no noise to the first
    advantages.
    """
    kernel = jnp.zeros((embed_dim, 1), jnp.float32)
    return {VALUE: {"kernel": Named(kernel, ("embed", "head_output"))}}


def values(
    model: LanguageModel, params: Any, batch: Batch, rng: jax.Array | None = None
) -> jax.Array:
    """What is expected of each sequence after each of its tokens: float32 [batch, time].

    The value at a position has seen the tokens up to it, not its target. Padding's mean nothing.

    Args:
      params: those of the model, with a value head.
      batch: a Batch of [batch, time].
      rng: switches dropout on.
    """
    hidden_BTD, _ = model.apply(params, batch.tokens, batch.positions, batch.segment_ids, rng=rng)
    return values_of(params, hidden_BTD)


def values_of(params: Any, hidden_BTD: jax.Array) -> jax.Array:
    """`values` of given hidden states [batch, time, embed]."""
    return _read(params[VALUE], hidden_BTD)


def _read(head: Any, hidden: jax.Array) -> jax.Array:
    """The head's number for hidden states [..., embed]: float32 [...]."""
    # A sum and no matrix product, which accelerators round: rewards are compared, and their gaps
    # are small.
    return jnp.sum(hidden.astype(jnp.float32) * head["kernel"][:, 0], axis=-1)
