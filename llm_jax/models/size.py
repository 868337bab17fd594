"""How large a model is and what a token costs, from its shapes alone."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from llm_jax.models.config import ModelConfig
from llm_jax.models.language_model import LanguageModel
from llm_jax.models.layers import GATED
from llm_jax.models.lora import init_adapters
from llm_jax.sharding import unbox


def parameter_count(config: ModelConfig) -> int:
    """All parameters but adapters; makes no array."""
    return _size(_shapes(config))


def active_parameter_count(config: ModelConfig) -> int:
    """Of `parameter_count`, those that a token meets: all but the experts it does not choose."""
    count = parameter_count(config)
    if config.moe is not None:
        idle = config.moe.num_experts - config.moe.experts_per_token
        count -= config.num_layers * idle * mlp_weights(config)
    return count


def adapter_count(config: ModelConfig) -> int:
    """All parameters of the adapters of `config.lora`, 0 without; makes no array.

    Raises:
      UserError: a target of `config.lora` matches no part of the model.
    """
    if config.lora is None:
        return 0
    rng = jax.random.key(0)
    return _size(jax.eval_shape(lambda base: init_adapters(rng, config, base), _shapes(config)))


def flops_per_token(config: ModelConfig, length: int) -> float:
    """Floating-point operations of training on one token, in rows of `length` tokens.

    Counted are the matrix products, a multiply-add as two: 2 forward and 4 backward per weight that
    a token is multiplied with (projections, MLP or router and chosen experts, output head; not the
    embedding lookup, norms and biases), and the two products of attention, for which a query meets
    only the keys that it sees: half of the row on average, or a window's worth. Rematerialisation
    is not counted, nor that packed documents see less than the row. (PaLM, arXiv:2204.02311,
    appendix B, with attention halved for causality.)

    With `config.lora` the weights are frozen: the 2 backward operations for their own gradients are
    left out, and the adapters counted like weights.
    """
    assert config.vocab_size is not None
    D, H = config.embed_dim, config.resolved_head_dim
    heads = config.num_heads * H
    qkv = D * (config.num_heads + 2 * config.kv_heads) * H
    mlp = mlp_weights(config)
    if config.moe is not None:
        mlp = config.moe.experts_per_token * mlp + D * config.moe.num_experts
    layer = qkv + heads * D + mlp
    weights = config.num_layers * layer + D * config.vocab_size
    seen = sum(keys_seen(length, config.layer_window(i)) for i in range(config.num_layers))
    trained = weights if config.lora is None else adapter_count(config)
    frozen = 0 if config.lora is None else weights
    return 6.0 * trained + 4.0 * frozen + 3 * 2 * 2 * heads * seen


def mlp_weights(config: ModelConfig) -> int:
    """Weights of one MLP, or of one expert."""
    return (3 if config.mlp in GATED else 2) * config.embed_dim * config.mlp_dim


@functools.lru_cache(maxsize=128)
def _shapes(config: ModelConfig) -> Any:
    # The attention backend has no parameters, and the one named may not exist on this machine.
    model = LanguageModel(dataclasses.replace(config, attention_backend="einsum"))
    return unbox(jax.eval_shape(model.init, jax.random.key(0)))


def _size(tree: Any) -> int:
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def keys_seen(length: int, window: int | None) -> float:
    """Keys that a query of a full row sees on average, its own included."""
    width = length if window is None else min(window, length)
    return (width * (width + 1) / 2 + (length - width) * width) / length
