"""Named architectures: sizes for runs from scratch, and the published ones."""

from __future__ import annotations

from llm_jax.models.config import ModelConfig
from llm_jax.models.published import PUBLISHED

# From scratch: the tokenizer sets the vocabulary. The names of the small ones count parameters
# with a vocabulary of 8,192, those from 125m on with 32,768.
SCRATCH = {
    "tiny": ModelConfig(embed_dim=96, num_layers=3, num_heads=3, mlp_dim=256),
    "small": ModelConfig(embed_dim=320, num_layers=6, num_heads=5, mlp_dim=864),
    "125m": ModelConfig(embed_dim=768, num_layers=14, num_heads=12, mlp_dim=2048),
    "350m": ModelConfig(embed_dim=1024, num_layers=25, num_heads=16, mlp_dim=2816),
    "760m": ModelConfig(embed_dim=1536, num_layers=25, num_heads=16, mlp_dim=4096),
    "1b": ModelConfig(embed_dim=2048, num_layers=22, num_heads=16, num_kv_heads=8, mlp_dim=5632),
    "3b": ModelConfig(embed_dim=3072, num_layers=28, num_heads=24, num_kv_heads=8, mlp_dim=8192),
    "7b": ModelConfig(
        embed_dim=4096, num_layers=32, num_heads=32, num_kv_heads=8, mlp_dim=14_336,
        tie_embeddings=False,
    ),
}  # fmt: skip

PRESETS: dict[str, ModelConfig] = SCRATCH | PUBLISHED
