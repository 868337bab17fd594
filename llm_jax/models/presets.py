"""Named architectures: sizes for runs from scratch, and published shapes.

The published ones hold every number of the release that shapes or values depend on, so that its
checkpoints mean the same here; dtype, layer scanning and rematerialisation are the run's to choose.
"""

from __future__ import annotations

from llm_jax.models.config import ModelConfig
from llm_jax.models.rope import RopeConfig

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


def _llama2(embed: int, layers: int, heads: int, kv_heads: int, mlp: int) -> ModelConfig:
    """arXiv:2307.09288."""
    return ModelConfig(
        vocab_size=32_000, embed_dim=embed, num_layers=layers, num_heads=heads,
        num_kv_heads=kv_heads, mlp_dim=mlp, max_length=4096, tie_embeddings=False,
    )  # fmt: skip


def _llama31(
    embed: int, layers: int, heads: int, mlp: int, tied: bool = False, factor: float = 8.0
) -> ModelConfig:
    """arXiv:2407.21783, and the 3.2 release for the two small ones."""
    return ModelConfig(
        vocab_size=128_256, embed_dim=embed, num_layers=layers, num_heads=heads, num_kv_heads=8,
        mlp_dim=mlp, max_length=131_072, tie_embeddings=tied,
        rope=RopeConfig(theta=500_000.0, scaling="llama3", factor=factor, original_length=8192),
    )  # fmt: skip


def _qwen3(
    embed: int, layers: int, heads: int, mlp: int, tied: bool, kv_heads: int = 8
) -> ModelConfig:
    """arXiv:2505.09388, the dense sizes."""
    return ModelConfig(
        vocab_size=151_936, embed_dim=embed, num_layers=layers, num_heads=heads,
        num_kv_heads=kv_heads, head_dim=128, mlp_dim=mlp, max_length=40_960, norm_epsilon=1e-6,
        tie_embeddings=tied, qk_norm="head", rope=RopeConfig(theta=1_000_000.0),
    )  # fmt: skip


def _mistral(vocabulary: int, theta: float, window: int | None) -> ModelConfig:
    """arXiv:2310.06825 and the later releases of the same shape."""
    return ModelConfig(
        vocab_size=vocabulary, embed_dim=4096, num_layers=32, num_heads=32, num_kv_heads=8,
        mlp_dim=14_336, max_length=32_768, tie_embeddings=False, window=window,
        rope=RopeConfig(theta=theta),
    )  # fmt: skip


PUBLISHED = {
    "llama2-7b": _llama2(4096, 32, 32, 32, 11_008),
    "llama2-13b": _llama2(5120, 40, 40, 40, 13_824),
    "llama2-70b": _llama2(8192, 80, 64, 8, 28_672),
    "llama3.1-8b": _llama31(4096, 32, 32, 14_336),
    "llama3.1-70b": _llama31(8192, 80, 64, 28_672),
    "llama3.1-405b": _llama31(16_384, 126, 128, 53_248),
    "llama3.2-1b": _llama31(2048, 16, 32, 8192, tied=True, factor=32.0),
    "llama3.2-3b": _llama31(3072, 28, 24, 8192, tied=True, factor=32.0),
    "mistral-7b-v0.1": _mistral(32_000, 10_000.0, window=4096),
    "mistral-7b-v0.3": _mistral(32_768, 1_000_000.0, window=None),
    "qwen3-0.6b": _qwen3(1024, 28, 16, 3072, tied=True),
    "qwen3-1.7b": _qwen3(2048, 28, 16, 6144, tied=True),
    "qwen3-4b": _qwen3(2560, 36, 32, 9728, tied=True),
    "qwen3-8b": _qwen3(4096, 36, 32, 12_288, tied=False),
    "qwen3-14b": _qwen3(5120, 40, 40, 17_408, tied=False),
    "qwen3-32b": _qwen3(5120, 64, 64, 25_600, tied=False),
}

PRESETS: dict[str, ModelConfig] = SCRATCH | PUBLISHED
