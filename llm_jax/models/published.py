"""Published architectures by name: release and size.

Each holds every number of the release that shapes or values depend on (its config.json), so that
its checkpoints mean the same here; dtype, layer scanning and rematerialisation are the run's to
choose. Where the models of one size differ, the base model counts unless its family says otherwise.
"""

from __future__ import annotations

from llm_jax.models.config import ModelConfig
from llm_jax.models.moe import MoeConfig
from llm_jax.models.rope import RopeConfig


def _gpt2(embed: int, layers: int, heads: int) -> ModelConfig:
    """Radford et al. 2019."""
    return ModelConfig(
        vocab_size=50_257, embed_dim=embed, num_layers=layers, num_heads=heads, mlp_dim=4 * embed,
        max_length=1024, position="learned", norm="layernorm", mlp="gelu", attention_bias="all",
        mlp_bias=True,
    )  # fmt: skip


def _pythia(embed: int, layers: int, heads: int, vocabulary: int = 50_304) -> ModelConfig:
    """arXiv:2304.01373; trained on the deduplicated Pile or not. The table's rows are padded."""
    return ModelConfig(
        vocab_size=vocabulary, embed_dim=embed, num_layers=layers, num_heads=heads,
        mlp_dim=4 * embed, max_length=2048, norm="layernorm", parallel_residual=True,
        mlp="gelu_erf", tie_embeddings=False, attention_bias="all", mlp_bias=True,
        rope=RopeConfig(fraction=0.25),
    )  # fmt: skip


def _llama(embed: int, layers: int, heads: int, mlp: int, epsilon: float = 1e-6) -> ModelConfig:
    """arXiv:2302.13971."""
    return ModelConfig(
        vocab_size=32_000, embed_dim=embed, num_layers=layers, num_heads=heads, mlp_dim=mlp,
        max_length=2048, norm_epsilon=epsilon, tie_embeddings=False,
    )  # fmt: skip


def _llama2(embed: int, layers: int, heads: int, kv_heads: int, mlp: int) -> ModelConfig:
    """arXiv:2307.09288."""
    return ModelConfig(
        vocab_size=32_000, embed_dim=embed, num_layers=layers, num_heads=heads,
        num_kv_heads=kv_heads, mlp_dim=mlp, max_length=4096, tie_embeddings=False,
    )  # fmt: skip


def _llama3(
    embed: int, layers: int, heads: int, mlp: int, factor: float | None = None, tied: bool = False
) -> ModelConfig:
    """arXiv:2407.21783; from 3.1 on with a context that is longer than 8,192 by scaled RoPE."""
    rope = RopeConfig(theta=500_000.0)
    if factor is not None:
        rope = RopeConfig(theta=500_000.0, scaling="llama3", factor=factor, original_length=8192)
    return ModelConfig(
        vocab_size=128_256, embed_dim=embed, num_layers=layers, num_heads=heads, num_kv_heads=8,
        mlp_dim=mlp, max_length=8192 if factor is None else 131_072, tie_embeddings=tied, rope=rope,
    )  # fmt: skip


def _mistral(vocabulary: int, theta: float, window: int | None) -> ModelConfig:
    """arXiv:2310.06825 and the later releases of the same shape."""
    return ModelConfig(
        vocab_size=vocabulary, embed_dim=4096, num_layers=32, num_heads=32, num_kv_heads=8,
        mlp_dim=14_336, max_length=32_768, tie_embeddings=False, window=window,
        rope=RopeConfig(theta=theta),
    )  # fmt: skip


def _mixtral(
    embed: int, layers: int, heads: int, mlp: int, length: int, vocabulary: int
) -> ModelConfig:
    """arXiv:2401.04088."""
    return ModelConfig(
        vocab_size=vocabulary, embed_dim=embed, num_layers=layers, num_heads=heads, num_kv_heads=8,
        mlp_dim=mlp, moe=MoeConfig(num_experts=8, experts_per_token=2), max_length=length,
        tie_embeddings=False, rope=RopeConfig(theta=1_000_000.0),
    )  # fmt: skip


def _qwen25(
    embed: int, layers: int, heads: int, kv_heads: int, mlp: int, length: int,
    epsilon: float = 1e-6, tied: bool = False, vocabulary: int = 152_064,
) -> ModelConfig:  # fmt: skip
    """arXiv:2412.15115."""
    return ModelConfig(
        vocab_size=vocabulary, embed_dim=embed, num_layers=layers, num_heads=heads,
        num_kv_heads=kv_heads, mlp_dim=mlp, max_length=length, norm_epsilon=epsilon,
        tie_embeddings=tied, attention_bias="qkv", rope=RopeConfig(theta=1_000_000.0),
    )  # fmt: skip


def _qwen3(
    embed: int, layers: int, heads: int, mlp: int, tied: bool = False, kv_heads: int = 8,
    moe: MoeConfig | None = None,
) -> ModelConfig:  # fmt: skip
    """arXiv:2505.09388; the models after post-training, whose context is a quarter longer."""
    return ModelConfig(
        vocab_size=151_936, embed_dim=embed, num_layers=layers, num_heads=heads,
        num_kv_heads=kv_heads, head_dim=128, mlp_dim=mlp, moe=moe, max_length=40_960,
        norm_epsilon=1e-6, tie_embeddings=tied, qk_norm="head",
        rope=RopeConfig(theta=1_000_000.0),
    )  # fmt: skip


def _gemma(embed: int, layers: int, heads: int, kv_heads: int, mlp: int) -> ModelConfig:
    """arXiv:2403.08295."""
    return ModelConfig(
        vocab_size=256_000, embed_dim=embed, num_layers=layers, num_heads=heads,
        num_kv_heads=kv_heads, head_dim=256, mlp_dim=mlp, max_length=8192, norm_epsilon=1e-6,
        norm_plus_one=True, mlp="geglu", scale_embeddings=True,
    )  # fmt: skip


def _gemma2(
    embed: int, layers: int, heads: int, kv_heads: int, mlp: int, head: int = 256,
    query_scalar: int | None = None,
) -> ModelConfig:  # fmt: skip
    """arXiv:2408.00118."""
    return ModelConfig(
        vocab_size=256_000, embed_dim=embed, num_layers=layers, num_heads=heads,
        num_kv_heads=kv_heads, head_dim=head, mlp_dim=mlp, max_length=8192, norm_epsilon=1e-6,
        norm_plus_one=True, norm_placement="both", mlp="geglu", scale_embeddings=True,
        query_pre_attention_scalar=query_scalar, attention_soft_cap=50.0, logits_soft_cap=30.0,
        window=4096, attention_pattern=("local", "global"),
    )  # fmt: skip


def _gemma3(
    embed: int, layers: int, heads: int, kv_heads: int, mlp: int, window: int = 1024,
    head: int = 256, query_scalar: int | None = None, reads_images: bool = True,
) -> ModelConfig:  # fmt: skip
    """arXiv:2503.19786, the text part; models that read images have 64 rows for their tokens."""
    rope = RopeConfig(theta=1_000_000.0)
    if reads_images:
        rope = RopeConfig(theta=1_000_000.0, scaling="linear", factor=8.0)
    return ModelConfig(
        vocab_size=262_208 if reads_images else 262_144, embed_dim=embed, num_layers=layers,
        num_heads=heads, num_kv_heads=kv_heads, head_dim=head, mlp_dim=mlp,
        max_length=131_072 if reads_images else 32_768, norm_epsilon=1e-6, norm_plus_one=True,
        norm_placement="both", mlp="geglu", scale_embeddings=True, qk_norm="head",
        query_pre_attention_scalar=query_scalar, window=window,
        attention_pattern=("local",) * 5 + ("global",), rope=rope, local_rope=RopeConfig(),
    )  # fmt: skip


def _olmo2(
    embed: int, layers: int, heads: int, mlp: int, kv_heads: int | None = None
) -> ModelConfig:
    """arXiv:2501.00656."""
    return ModelConfig(
        vocab_size=100_352, embed_dim=embed, num_layers=layers, num_heads=heads,
        num_kv_heads=kv_heads, mlp_dim=mlp, max_length=4096, norm_epsilon=1e-6,
        norm_placement="after", tie_embeddings=False, qk_norm="all",
        rope=RopeConfig(theta=500_000.0),
    )  # fmt: skip


def _olmoe() -> ModelConfig:
    """arXiv:2409.02060."""
    return ModelConfig(
        vocab_size=50_304, embed_dim=2048, num_layers=16, num_heads=16, mlp_dim=1024,
        moe=MoeConfig(num_experts=64, experts_per_token=8, normalize_weights=False),
        max_length=4096, tie_embeddings=False, qk_norm="all",
    )  # fmt: skip


def _phi3(embed: int, layers: int, heads: int, kv_heads: int, mlp: int) -> ModelConfig:
    """arXiv:2404.14219, the models of context 4,096."""
    return ModelConfig(
        vocab_size=32_064, embed_dim=embed, num_layers=layers, num_heads=heads,
        num_kv_heads=kv_heads, mlp_dim=mlp, max_length=4096, tie_embeddings=False, window=2047,
    )  # fmt: skip


_QWEN3_EXPERTS = MoeConfig(num_experts=128, experts_per_token=8)

PUBLISHED: dict[str, ModelConfig] = {
    "gpt2": _gpt2(768, 12, 12),
    "gpt2-medium": _gpt2(1024, 24, 16),
    "gpt2-large": _gpt2(1280, 36, 20),
    "gpt2-xl": _gpt2(1600, 48, 25),
    "pythia-70m": _pythia(512, 6, 8),
    "pythia-160m": _pythia(768, 12, 12),
    "pythia-410m": _pythia(1024, 24, 16),
    "pythia-1b": _pythia(2048, 16, 8),
    "pythia-1.4b": _pythia(2048, 24, 16),
    "pythia-2.8b": _pythia(2560, 32, 32),
    "pythia-6.9b": _pythia(4096, 32, 32, vocabulary=50_432),
    "pythia-12b": _pythia(5120, 36, 40, vocabulary=50_688),
    "llama-7b": _llama(4096, 32, 32, 11_008),
    "llama-13b": _llama(5120, 40, 40, 13_824),
    "llama-33b": _llama(6656, 60, 52, 17_920),
    "llama-65b": _llama(8192, 80, 64, 22_016, epsilon=1e-5),
    "llama2-7b": _llama2(4096, 32, 32, 32, 11_008),
    "llama2-13b": _llama2(5120, 40, 40, 40, 13_824),
    "llama2-70b": _llama2(8192, 80, 64, 8, 28_672),
    "llama3-8b": _llama3(4096, 32, 32, 14_336),
    "llama3-70b": _llama3(8192, 80, 64, 28_672),
    "llama3.1-8b": _llama3(4096, 32, 32, 14_336, factor=8.0),
    "llama3.1-70b": _llama3(8192, 80, 64, 28_672, factor=8.0),
    "llama3.1-405b": _llama3(16_384, 126, 128, 53_248, factor=8.0),
    "llama3.2-1b": _llama3(2048, 16, 32, 8192, factor=32.0, tied=True),
    "llama3.2-3b": _llama3(3072, 28, 24, 8192, factor=32.0, tied=True),
    "mistral-7b-v0.1": _mistral(32_000, 10_000.0, window=4096),
    "mistral-7b-v0.3": _mistral(32_768, 1_000_000.0, window=None),
    "mixtral-8x7b": _mixtral(4096, 32, 32, 14_336, length=32_768, vocabulary=32_000),
    "mixtral-8x22b": _mixtral(6144, 56, 48, 16_384, length=65_536, vocabulary=32_000),
    "qwen2.5-0.5b": _qwen25(896, 24, 14, 2, 4864, 32_768, tied=True, vocabulary=151_936),
    "qwen2.5-1.5b": _qwen25(1536, 28, 12, 2, 8960, 131_072, tied=True, vocabulary=151_936),
    "qwen2.5-3b": _qwen25(2048, 36, 16, 2, 11_008, 32_768, tied=True, vocabulary=151_936),
    "qwen2.5-7b": _qwen25(3584, 28, 28, 4, 18_944, 131_072),
    "qwen2.5-14b": _qwen25(5120, 48, 40, 8, 13_824, 131_072, epsilon=1e-5),
    "qwen2.5-32b": _qwen25(5120, 64, 40, 8, 27_648, 131_072, epsilon=1e-5),
    "qwen2.5-72b": _qwen25(8192, 80, 64, 8, 29_568, 131_072, epsilon=1e-5),
    "qwen3-0.6b": _qwen3(1024, 28, 16, 3072, tied=True),
    "qwen3-1.7b": _qwen3(2048, 28, 16, 6144, tied=True),
    "qwen3-4b": _qwen3(2560, 36, 32, 9728, tied=True),
    "qwen3-8b": _qwen3(4096, 36, 32, 12_288),
    "qwen3-14b": _qwen3(5120, 40, 40, 17_408),
    "qwen3-32b": _qwen3(5120, 64, 64, 25_600),
    "qwen3-30b-a3b": _qwen3(2048, 48, 32, 768, kv_heads=4, moe=_QWEN3_EXPERTS),
    "qwen3-235b-a22b": _qwen3(4096, 94, 64, 1536, kv_heads=4, moe=_QWEN3_EXPERTS),
    "gemma-2b": _gemma(2048, 18, 8, 1, 16_384),
    "gemma-7b": _gemma(3072, 28, 16, 16, 24_576),
    "gemma2-2b": _gemma2(2304, 26, 8, 4, 9216),
    "gemma2-9b": _gemma2(3584, 42, 16, 8, 14_336),
    "gemma2-27b": _gemma2(4608, 46, 32, 16, 36_864, head=128, query_scalar=144),
    "gemma3-270m": _gemma3(640, 18, 4, 1, 2048, window=512, reads_images=False),
    "gemma3-1b": _gemma3(1152, 26, 4, 1, 6912, window=512, reads_images=False),
    "gemma3-4b": _gemma3(2560, 34, 8, 4, 10_240),
    "gemma3-12b": _gemma3(3840, 48, 16, 8, 15_360),
    "gemma3-27b": _gemma3(5376, 62, 32, 16, 21_504, head=128, query_scalar=168),
    "olmo2-1b": _olmo2(2048, 16, 16, 8192),
    "olmo2-7b": _olmo2(4096, 32, 32, 11_008),
    "olmo2-13b": _olmo2(5120, 40, 40, 13_824),
    "olmo2-32b": _olmo2(5120, 64, 40, 27_648, kv_heads=8),
    "olmoe-1b-7b": _olmoe(),
    "phi3-mini-4k": _phi3(3072, 32, 32, 32, 8192),
    "phi3-medium-4k": _phi3(5120, 40, 40, 10, 17_920),
}
