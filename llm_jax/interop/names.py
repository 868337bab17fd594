"""What the tensors of each published family are called, and how they lie in our leaves.

A table gives for each of our leaves the tensors that it is made of, each as

    name: factors -> axes

where `name` may hold {layer} and {expert}, `factors` are the tensor's dimensions and `axes` the
leaf's, see `pieces.Piece`: "KGH D" is a matrix [K·G·H, D]. An axis "1@G" has size 1 and begins at
place G. Tensors of the same name within a leaf follow one another along their first dimension.

Legend: V vocabulary, P positions, D embed, K key/value heads, G query heads per key/value head,
F = G + 2 (queries, key, value), N = K·G query heads, H head dimension, M mlp, U = 2 (gate, up),
E experts, L = 1 label.
"""

from __future__ import annotations

from collections.abc import Mapping

Table = Mapping[str, tuple[str, ...]]


def _norms(**names: str) -> Table:
    """Norm of ours → name of the module."""
    return {
        f"{ours}/{leaf}": (f"{name}.{tensor}: D -> D",)
        for ours, name in names.items()
        for leaf, tensor in (("scale", "weight"), ("bias", "bias"))
    }


def _heads_norms(layout: Mapping[str, str]) -> Table:
    return {
        f"attention/{which}_norm/scale": (f"self_attn.{which[0]}_norm.weight: {layout[which]}",)
        for which in ("query", "key")
    }


_LLAMA_TOP: Table = {
    "embedding": ("embed_tokens.weight: V D -> V D",),
    "output": ("lm_head.weight: V D -> D V",),
    "reward_head/kernel": ("score.weight: L D -> D L",),
    **_norms(final_norm="norm"),
}
_SEPARATE_QKV: Table = {
    "attention/qkv/kernel": (
        "self_attn.q_proj.weight: KGH D -> K G D H",
        "self_attn.k_proj.weight: KH D -> K 1@G D H",
        "self_attn.v_proj.weight: KH D -> K 1@G+1 D H",
    ),
    "attention/qkv/bias": (
        "self_attn.q_proj.bias: KGH -> K G H",
        "self_attn.k_proj.bias: KH -> K 1@G H",
        "self_attn.v_proj.bias: KH -> K 1@G+1 H",
    ),
}
_OUTPUT: Table = {
    "attention/output/kernel": ("self_attn.o_proj.weight: D NH -> N H D",),
    "attention/output/bias": ("self_attn.o_proj.bias: D -> D",),
}
_DOWN: Table = {
    "mlp/down/kernel": ("mlp.down_proj.weight: D M -> M D",),
    "mlp/down/bias": ("mlp.down_proj.bias: D -> D",),
}
_SEPARATE_MLP: Table = {
    "mlp/gate_up/kernel": (
        "mlp.gate_proj.weight: M D -> 1@0 D M",
        "mlp.up_proj.weight: M D -> 1@1 D M",
    ),
    "mlp/gate_up/bias": ("mlp.gate_proj.bias: M -> 1@0 M", "mlp.up_proj.bias: M -> 1@1 M"),
    **_DOWN,
}
_NORMS_BEFORE = _norms(attention_norm="input_layernorm", mlp_norm="post_attention_layernorm")
_HEAD_NORMS = _heads_norms({"query": "H -> H", "key": "H -> H"})
_WHOLE_NORMS = _heads_norms({"query": "KGH -> K G H", "key": "KH -> K 1@0 H"})
_MIXTURE: Table = {
    "moe/router": ("mlp.gate.weight: E D -> D E",),
    "moe/gate_up": (
        "mlp.experts.{expert}.gate_proj.weight: M D -> 1@e 1@0 D M",
        "mlp.experts.{expert}.up_proj.weight: M D -> 1@e 1@1 D M",
    ),
    "moe/down": ("mlp.experts.{expert}.down_proj.weight: D M -> 1@e M D",),
}
_LLAMA_BLOCK: Table = {**_SEPARATE_QKV, **_OUTPUT, **_SEPARATE_MLP, **_NORMS_BEFORE}


def _tables(top: Table, layers: str, block: Table) -> Table:
    """One table of it all; `layers` is what stands before a layer's tensors."""
    inner = {
        f"layer/{ours}": tuple(f"{layers}.{{layer}}.{tensor}" for tensor in tensors)
        for ours, tensors in block.items()
    }
    return {**top, **inner}


LLAMA = _tables(_LLAMA_TOP, "layers", _LLAMA_BLOCK)
QWEN3 = _tables(_LLAMA_TOP, "layers", {**_LLAMA_BLOCK, **_HEAD_NORMS})
QWEN3_MOE = _tables(
    _LLAMA_TOP, "layers", {**_SEPARATE_QKV, **_OUTPUT, **_NORMS_BEFORE, **_HEAD_NORMS, **_MIXTURE}
)
OLMOE = _tables(
    _LLAMA_TOP, "layers", {**_SEPARATE_QKV, **_OUTPUT, **_NORMS_BEFORE, **_WHOLE_NORMS, **_MIXTURE}
)
MIXTRAL = _tables(
    _LLAMA_TOP,
    "layers",
    {
        **_SEPARATE_QKV,
        **_OUTPUT,
        **_NORMS_BEFORE,
        "moe/router": ("block_sparse_moe.gate.weight: E D -> D E",),
        "moe/gate_up": (
            "block_sparse_moe.experts.{expert}.w1.weight: M D -> 1@e 1@0 D M",
            "block_sparse_moe.experts.{expert}.w3.weight: M D -> 1@e 1@1 D M",
        ),
        "moe/down": ("block_sparse_moe.experts.{expert}.w2.weight: D M -> 1@e M D",),
    },
)
OLMO2 = _tables(
    _LLAMA_TOP,
    "layers",
    {
        **_SEPARATE_QKV,
        **_OUTPUT,
        **_SEPARATE_MLP,
        **_WHOLE_NORMS,
        **_norms(
            attention_post_norm="post_attention_layernorm",
            mlp_post_norm="post_feedforward_layernorm",
        ),
    },
)
GEMMA3 = _tables(
    _LLAMA_TOP,
    "layers",
    {
        **_SEPARATE_QKV,
        **_OUTPUT,
        **_SEPARATE_MLP,
        **_HEAD_NORMS,
        **_norms(
            attention_norm="input_layernorm",
            attention_post_norm="post_attention_layernorm",
            mlp_norm="pre_feedforward_layernorm",
            mlp_post_norm="post_feedforward_layernorm",
        ),
    },
)
PHI3 = _tables(
    _LLAMA_TOP,
    "layers",
    {
        "attention/qkv/kernel": (
            "self_attn.qkv_proj.weight: KGH D -> K G D H",
            "self_attn.qkv_proj.weight: KH D -> K 1@G D H",
            "self_attn.qkv_proj.weight: KH D -> K 1@G+1 D H",
        ),
        **_OUTPUT,
        "mlp/gate_up/kernel": ("mlp.gate_up_proj.weight: UM D -> U D M",),
        **_DOWN,
        **_NORMS_BEFORE,
    },
)
GPT2 = _tables(
    {
        "embedding": ("wte.weight: V D -> V D",),
        "position_embedding": ("wpe.weight: P D -> P D",),
        "output": ("lm_head.weight: V D -> D V",),
        "reward_head/kernel": ("score.weight: L D -> D L",),
        **_norms(final_norm="ln_f"),
    },
    "h",
    {
        "attention/qkv/kernel": ("attn.c_attn.weight: D FKH -> K F D H",),
        "attention/qkv/bias": ("attn.c_attn.bias: FKH -> K F H",),
        "attention/output/kernel": ("attn.c_proj.weight: NH D -> N H D",),
        "attention/output/bias": ("attn.c_proj.bias: D -> D",),
        "mlp/up/kernel": ("mlp.c_fc.weight: D M -> D M",),
        "mlp/up/bias": ("mlp.c_fc.bias: M -> M",),
        "mlp/down/kernel": ("mlp.c_proj.weight: M D -> M D",),
        "mlp/down/bias": ("mlp.c_proj.bias: D -> D",),
        **_norms(attention_norm="ln_1", mlp_norm="ln_2"),
    },
)
GPT_NEOX = _tables(
    {
        "embedding": ("embed_in.weight: V D -> V D",),
        "output": ("embed_out.weight: V D -> D V",),
        "reward_head/kernel": ("score.weight: L D -> D L",),
        **_norms(final_norm="final_layer_norm"),
    },
    "layers",
    {
        "attention/qkv/kernel": ("attention.query_key_value.weight: KFH D -> K F D H",),
        "attention/qkv/bias": ("attention.query_key_value.bias: KFH -> K F H",),
        "attention/output/kernel": ("attention.dense.weight: D NH -> N H D",),
        "attention/output/bias": ("attention.dense.bias: D -> D",),
        "mlp/up/kernel": ("mlp.dense_h_to_4h.weight: M D -> D M",),
        "mlp/up/bias": ("mlp.dense_h_to_4h.bias: M -> M",),
        "mlp/down/kernel": ("mlp.dense_4h_to_h.weight: D M -> M D",),
        "mlp/down/bias": ("mlp.dense_4h_to_h.bias: D -> D",),
        **_NORMS_BEFORE,
    },
)
# Tensors without the model's prefix in front: the heads on top of it.
HEADS = ("lm_head.weight", "embed_out.weight", "score.weight")
