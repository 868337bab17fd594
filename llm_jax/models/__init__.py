"""The transformer: `ModelConfig`, `LanguageModel`, presets, KV cache, RoPE and attention."""

from llm_jax.models.cache import KVCache, init_cache
from llm_jax.models.config import ModelConfig, check_length
from llm_jax.models.rope import RopeConfig
from llm_jax.models.size import flops_per_token, parameter_count
from llm_jax.models.transformer import LanguageModel

__all__ = [
    "KVCache",
    "LanguageModel",
    "ModelConfig",
    "RopeConfig",
    "check_length",
    "flops_per_token",
    "init_cache",
    "parameter_count",
]
