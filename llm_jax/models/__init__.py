"""The transformer: `ModelConfig`, `LanguageModel`, presets, KV cache, RoPE, attention, adapters."""

from llm_jax.models.cache import KVCache, init_cache
from llm_jax.models.config import ModelConfig, check_length
from llm_jax.models.language_model import LanguageModel
from llm_jax.models.lora import LoraConfig
from llm_jax.models.moe import MoeConfig
from llm_jax.models.rope import RopeConfig
from llm_jax.models.size import (
    active_parameter_count,
    adapter_count,
    flops_per_token,
    parameter_count,
)

__all__ = [
    "KVCache",
    "LanguageModel",
    "LoraConfig",
    "ModelConfig",
    "MoeConfig",
    "RopeConfig",
    "active_parameter_count",
    "adapter_count",
    "check_length",
    "flops_per_token",
    "init_cache",
    "parameter_count",
]
