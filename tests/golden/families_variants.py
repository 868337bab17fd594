"""The table of `make_families.py`: tiny configs of every family, by the name of their folder.

Shapes are the smallest at which nothing coincides: head sizes differ from hidden / heads where a
family allows it, windows and lengths are so small that 24 tokens meet them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Variant:
    """One folder: transformers' `architecture` and what its config says other than `SHAPE`.

    `old`: keys of a second file, config_old.json, in an earlier spelling, by which the `dropped`
    keys of config.json are replaced. `short`: lengths of a second, shorter batch. `dtype` and
    `shards` are those of the stored tensors, `embedding_scale` is the embedding's deviation.
    """

    architecture: str
    config: dict[str, Any] = field(default_factory=dict)
    old: dict[str, Any] | None = None
    dropped: tuple[str, ...] = ("rope_parameters", "dtype")
    short: tuple[int, ...] = ()
    dtype: str = "float32"
    shards: int = 1
    embedding_scale: float = 0.25


SHAPE = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    rms_norm_eps=2e-3,  # so large that a wrong one shows
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
WIDE_HEADS = dict(num_attention_heads=2, num_key_value_heads=1, head_dim=16)
TIED = dict(tie_word_embeddings=True)


def rope(rope_type: str = "default", theta: float = 10_000.0, **others: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": theta, **others}}


def llama(*parts: dict[str, Any], **others: Any) -> Variant:
    return Variant("LlamaForCausalLM", merged(*parts), **others)


def merged(*parts: dict[str, Any]) -> dict[str, Any]:
    return {key: value for part in parts for key, value in part.items()}


GPT2 = dict(n_positions=40, n_embd=32, n_layer=2, n_head=4, layer_norm_epsilon=2e-3)
QWEN_MOE = dict(
    rope(theta=1_000_000.0), head_dim=12, num_experts=5, num_experts_per_tok=2,
    moe_intermediate_size=12, decoder_sparse_step=1, mlp_only_layers=[],
)  # fmt: skip
NEOX = dict(
    rope(theta=10_000.0, partial_rotary_factor=0.25),
    num_attention_heads=2,
    layer_norm_eps=2e-3,
    tie_word_embeddings=False,
)
LOCAL, GLOBAL = "sliding_attention", "full_attention"
GEMMA3_ROPE = {
    LOCAL: {"rope_type": "default", "rope_theta": 1_000.0},
    GLOBAL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 100_000.0},
}
GEMMA3 = dict(
    hidden_size=24, intermediate_size=24, num_attention_heads=2, num_key_value_heads=1, head_dim=10,
    query_pre_attn_scalar=14, sliding_window=8, rope_parameters=GEMMA3_ROPE,
)  # fmt: skip
LONGROPE = dict(
    short_factor=[1.0, 1.05, 1.1, 1.2, 1.3, 1.5], long_factor=[1.0, 1.3, 1.8, 2.6, 3.3, 4.0]
)
LLAMA3 = dict(
    factor=8.0, low_freq_factor=0.5, high_freq_factor=2.0, original_max_position_embeddings=16
)

VARIANTS: dict[str, Variant] = {
    "gpt2": Variant("GPT2LMHeadModel", GPT2),
    "gpt2_classifier": Variant(
        "GPT2ForSequenceClassification", merged(GPT2, dict(n_inner=48, num_labels=1))
    ),
    "llama": llama(dict(intermediate_size=48, tie_word_embeddings=False)),
    "llama_bias": llama(dict(attention_bias=True, mlp_bias=True, head_dim=12), TIED),
    "llama3": llama(
        WIDE_HEADS, TIED, rope("llama3", 500.0, **LLAMA3),
        old=dict(
            rope_theta=500.0, rope_scaling={**LLAMA3, "rope_type": "llama3"}, torch_dtype="bfloat16"
        ),
    ),
    "llama_linear": llama(
        TIED, rope("linear", factor=2.5),
        old=dict(rope_scaling={"type": "linear", "factor": 2.5}, torch_dtype="float16"),
        dropped=("rope_parameters", "dtype", "head_dim"),
    ),
    "llama_dynamic": llama(
        WIDE_HEADS, TIED, dict(max_position_embeddings=16), rope("dynamic", factor=2.0),
        short=(12, 9, 5),
    ),
    "llama_yarn": llama(
        WIDE_HEADS, TIED, dict(max_position_embeddings=16_384),
        rope("yarn", factor=4.0, original_max_position_embeddings=4_096),
    ),
    "llama_yarn_truncate_false": llama(
        WIDE_HEADS, TIED,
        rope(
            "yarn", 1_000.0, factor=4.0, original_max_position_embeddings=32, beta_fast=2.0,
            beta_slow=0.5, truncate=False, attention_factor=1.3,
        ),
    ),
    "llama_yarn_mscale": llama(
        WIDE_HEADS, TIED,
        rope(
            "yarn", 1_000.0, factor=4.0, original_max_position_embeddings=32, beta_fast=2.0,
            beta_slow=0.5, mscale=1.0, mscale_all_dim=0.4,
        ),
    ),
    "llama_sharded_bf16": llama(dict(tie_word_embeddings=False), dtype="bfloat16", shards=3),
    "llama_classifier": Variant("LlamaForSequenceClassification", dict(num_labels=1)),
    "mistral": Variant("MistralForCausalLM", dict(sliding_window=8, head_dim=12)),
    "mistral_nowindow": Variant("MistralForCausalLM", dict(TIED, sliding_window=None)),
    "mixtral": Variant(
        "MixtralForCausalLM",
        dict(
            rope(theta=1_000_000.0), intermediate_size=20, num_local_experts=4,
            num_experts_per_tok=2, sliding_window=None,
        ),
    ),
    "qwen2": Variant(
        "Qwen2ForCausalLM",
        dict(
            rope(theta=1_000_000.0), sliding_window=8, use_sliding_window=False, max_window_layers=1
        ),
        old=dict(
            rope_theta=1_000_000.0, sliding_window=8, use_sliding_window=False,
            max_window_layers=1, torch_dtype="bfloat16",
        ),
        dropped=("rope_parameters", "dtype", "layer_types"),
    ),
    "qwen2_window": Variant(
        "Qwen2ForCausalLM",
        dict(
            TIED, num_hidden_layers=3, sliding_window=8, use_sliding_window=True,
            max_window_layers=1,
        ),
    ),
    "qwen3": Variant("Qwen3ForCausalLM", dict(rope(theta=1_000_000.0), **TIED, head_dim=12)),
    "qwen3_yarn": Variant(
        "Qwen3ForCausalLM",
        merged(
            WIDE_HEADS, TIED, dict(max_position_embeddings=131_072),
            rope("yarn", 1_000_000.0, factor=4.0, original_max_position_embeddings=32_768),
        ),
        old=dict(
            rope_theta=1_000_000.0, torch_dtype="bfloat16",
            rope_scaling=dict(
                type="yarn", factor=4.0, original_max_position_embeddings=32_768
            ),
        ),
    ),
    "qwen3_classifier": Variant(
        "Qwen3ForSequenceClassification", dict(rope(theta=1_000_000.0), head_dim=12, num_labels=1)
    ),
    "qwen3_moe": Variant(
        "Qwen3MoeForCausalLM",
        dict(QWEN_MOE, norm_topk_prob=True),
        old=dict(
            rope_theta=1_000_000.0, rope_scaling=None, num_experts=5, max_window_layers=2,
            torch_dtype="bfloat16",
        ),
        dropped=("rope_parameters", "dtype", "num_local_experts"),
    ),
    "qwen3_moe_unnormalised": Variant(
        "Qwen3MoeForCausalLM", dict(QWEN_MOE, norm_topk_prob=False, num_experts=4)
    ),
    "gemma": Variant("GemmaForCausalLM", WIDE_HEADS, embedding_scale=0.15),
    "gemma2": Variant(
        "Gemma2ForCausalLM",
        dict(
            WIDE_HEADS, num_hidden_layers=4, intermediate_size=32, query_pre_attn_scalar=20,
            sliding_window=8, attn_logit_softcapping=5.0, final_logit_softcapping=3.0,
        ),
        embedding_scale=0.15,
    ),
    "gemma3_text": Variant(
        "Gemma3ForCausalLM",
        dict(GEMMA3, num_hidden_layers=7, layer_types=([LOCAL] * 2 + [GLOBAL]) * 2 + [LOCAL]),
        old=dict(
            rope_theta=100_000.0, rope_local_base_freq=1_000.0, sliding_window_pattern=3,
            rope_scaling={"factor": 8.0, "rope_type": "linear"}, torch_dtype="bfloat16",
        ),
        dropped=("rope_parameters", "dtype", "layer_types", "_sliding_window_pattern"),
        embedding_scale=0.15,
    ),
    "gemma3": Variant(
        "Gemma3ForConditionalGeneration",
        dict(
            text_config=dict(
                {**SHAPE, **GEMMA3}, num_hidden_layers=4, layer_types=[LOCAL, LOCAL, GLOBAL, LOCAL]
            ),
            vision_config=dict(
                hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
                image_size=16, patch_size=8, vision_use_head=False,
            ),
            mm_tokens_per_image=1, boi_token_index=94, eoi_token_index=95, image_token_index=96,
        ),
        embedding_scale=0.15,
    ),
    "olmo2": Variant("Olmo2ForCausalLM", rope(theta=500_000.0)),
    "olmoe": Variant(
        "OlmoeForCausalLM",
        dict(
            num_key_value_heads=4, intermediate_size=12, num_experts=6, num_experts_per_tok=2,
            norm_topk_prob=False, clip_qkv=None,
        ),
    ),
    "gpt_neox": Variant(
        "GPTNeoXForCausalLM",
        dict(NEOX, use_parallel_residual=True),
        old=dict(rotary_pct=0.25, rotary_emb_base=10_000, torch_dtype="float16"),
    ),
    "gpt_neox_sequential": Variant("GPTNeoXForCausalLM", dict(NEOX, use_parallel_residual=False)),
    "phi3": Variant("Phi3ForCausalLM", dict(sliding_window=8, tie_word_embeddings=False)),
    "phi3_longrope": Variant(
        "Phi3ForCausalLM",
        dict(
            TIED, num_attention_heads=2, num_key_value_heads=1, sliding_window=None,
            original_max_position_embeddings=16,
            **rope("longrope", partial_rotary_factor=0.75, **LONGROPE),
        ),
        old=dict(
            rope_theta=10_000.0, partial_rotary_factor=0.75, torch_dtype="bfloat16",
            rope_scaling={"type": "longrope", **LONGROPE},
        ),
        short=(12, 9, 5),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Adapter:
    """One adapter's folder: the name of its base in `VARIANTS` and the options of LoraConfig."""

    base: str
    config: dict[str, Any]


LLAMA_TARGETS = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
ADAPTERS: dict[str, Adapter] = {
    "llama_lora": Adapter("llama", dict(target_modules=LLAMA_TARGETS)),
    "llama_rslora": Adapter("llama", dict(target_modules=LLAMA_TARGETS, use_rslora=True)),
    "llama_dora": Adapter("llama", dict(target_modules=LLAMA_TARGETS, use_dora=True)),
    "qwen2_lora": Adapter("qwen2", dict(target_modules="all-linear")),
    "gpt2_lora": Adapter("gpt2", dict(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
    "phi3_lora": Adapter("phi3", dict(target_modules=["qkv_proj", "o_proj"])),
}
