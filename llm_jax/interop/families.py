"""The published families by model type, and which of them has room for a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from llm_jax.errors import UserError, did_you_mean
from llm_jax.interop import names
from llm_jax.interop.family import LAYER_TYPES, LLAMA_KEYS, PLAIN, Family, Json
from llm_jax.models.config import RUNTIME_FIELDS, LayerKind, ModelConfig


def _listed(written: Json) -> list[LayerKind] | None:
    """The kinds of layers where config.json lists them."""
    types = written.get("layer_types")
    if types is None:
        return None
    unknown = set(types) - LAYER_TYPES.keys()
    if unknown:
        raise UserError(f"config.json has layers of type {min(unknown)!r}, which is unknown.")
    return [LAYER_TYPES[kind] for kind in types]


def _every_layer(written: Json, layers: int) -> list[LayerKind]:
    del written
    return ["local"] * layers


def _last_layers(written: Json, layers: int) -> list[LayerKind]:
    """Qwen: off unless a switch says on, and then from a certain layer on."""
    if not written.get("use_sliding_window"):
        return ["global"] * layers
    first = written.get("max_window_layers", layers)
    return _listed(written) or ["global" if i < first else "local" for i in range(layers)]


def _all_or_none(written: Json, layers: int) -> list[LayerKind]:
    return ["local" if written.get("use_sliding_window") else "global"] * layers


def _all_but_one_in(period: int) -> Callable[[Json, int], list[LayerKind]]:
    """Gemma: every so many layers one sees all."""

    def kinds(written: Json, layers: int) -> list[LayerKind]:
        size = written.get("sliding_window_pattern", period)
        return _listed(written) or ["local" if (i + 1) % size else "global" for i in range(layers)]

    return kinds


_GEMMA_SETTINGS = {"norm_plus_one": True, "scale_embeddings": True}
_GEMMA_DEFAULTS = {"rms_norm_eps": 1e-6, "tie_word_embeddings": True, "head_dim": 256}
_GEMMA_REFUSED = {"attention_bias": (False,), "use_bidirectional_attention": (None, False)}
_GEMMA3_KEYS = {
    "query_pre_attention_scalar": "query_pre_attn_scalar",
    "logits_soft_cap": "final_logit_softcapping",
}
_GEMMA_CAPS = {**_GEMMA3_KEYS, "attention_soft_cap": "attn_logit_softcapping"}
_GEMMA_ACTIVATIONS = ("hidden_activation", {"gelu_pytorch_tanh": "geglu"})
_GEMMA_WINDOWS = ("sliding_window", "layer_types", "sliding_window_pattern")
_QWEN_WINDOWS = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")
_QWEN_DEFAULTS = {"max_window_layers": 28, "num_key_value_heads": 32}
_UNTIED = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False}

_ALL = (
    Family(
        "llama",
        "LlamaForCausalLM",
        names.LLAMA,
        keys={**LLAMA_KEYS, "mlp_bias": "mlp_bias"},
        defaults=_UNTIED,
        whole_heads=True,
        biases={False: "none", True: "all"},
    ),
    Family(
        "mistral",
        "MistralForCausalLM",
        names.LLAMA,
        defaults={**_UNTIED, "num_key_value_heads": 8, "sliding_window": 4096},
        windows=_every_layer,
    ),
    Family(
        "mixtral",
        "MixtralForCausalLM",
        names.MIXTRAL,
        defaults={
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "num_key_value_heads": 8,
            "num_experts_per_tok": 2,
        },
        windows=_every_layer,
        theta=1e6,
        experts=("num_local_experts", "intermediate_size"),
    ),
    Family(
        "qwen2",
        "Qwen2ForCausalLM",
        names.LLAMA,
        settings={"attention_bias": "qkv"},
        defaults={**_UNTIED, **_QWEN_DEFAULTS},
        windows=_last_layers,
        window_keys=_QWEN_WINDOWS,
    ),
    Family(
        "qwen3",
        "Qwen3ForCausalLM",
        names.QWEN3,
        settings={"qk_norm": "head"},
        defaults={**_UNTIED, **_QWEN_DEFAULTS, "head_dim": 128},
        windows=_last_layers,
        window_keys=_QWEN_WINDOWS,
        biases={False: "none", True: "all"},
    ),
    Family(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        names.QWEN3_MOE,
        settings={"qk_norm": "head"},
        defaults={**_UNTIED, "norm_topk_prob": False, "num_experts_per_tok": 8},
        refused={"decoder_sparse_step": (1,), "mlp_only_layers": ([], None)},
        windows=_all_or_none,
        window_keys=_QWEN_WINDOWS[:2],
        biases={False: "none", True: "all"},
        experts=("num_experts", "moe_intermediate_size"),
    ),
    Family(
        "gemma",
        "GemmaForCausalLM",
        names.LLAMA,
        settings=_GEMMA_SETTINGS,
        defaults={**_GEMMA_DEFAULTS, "num_key_value_heads": 16},
        refused=_GEMMA_REFUSED,
        # Published files say "gelu" and mean the tanh form, which all their readers take.
        activations=("hidden_act", {"gelu_pytorch_tanh": "geglu", "gelu": "geglu"}),
    ),
    Family(
        "gemma2",
        "Gemma2ForCausalLM",
        names.GEMMA3,
        settings={**_GEMMA_SETTINGS, "norm_placement": "both"},
        keys={**LLAMA_KEYS, **_GEMMA_CAPS},
        defaults={
            **_GEMMA_DEFAULTS,
            "num_key_value_heads": 4,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        refused=_GEMMA_REFUSED,
        activations=_GEMMA_ACTIVATIONS,
        windows=_all_but_one_in(2),
        window_keys=_GEMMA_WINDOWS[:2],
    ),
    Family(
        "gemma3_text",
        "Gemma3ForCausalLM",
        names.GEMMA3,
        settings={**_GEMMA_SETTINGS, "norm_placement": "both", "qk_norm": "head"},
        keys={**LLAMA_KEYS, **_GEMMA3_KEYS},
        # Within the config.json of a model with several parts most of it is left out.
        defaults={
            **_GEMMA_DEFAULTS,
            "vocab_size": 262_208,
            "hidden_size": 2304,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "intermediate_size": 9216,
            "max_position_embeddings": 131_072,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
        },
        # Its readers pass over the key.
        refused={**_GEMMA_REFUSED, "attn_logit_softcapping": (None,)},
        activations=_GEMMA_ACTIVATIONS,
        windows=_all_but_one_in(6),
        window_keys=_GEMMA_WINDOWS,
        theta=1e6,
        local_theta=1e4,
        prefixes=("model.", "language_model.model.", "model.language_model."),
        ignored=(r".*rotary_emb\.inv_freq", r".*vision_tower\..*", r".*multi_modal_projector\..*"),
    ),
    Family(
        "olmo2",
        "Olmo2ForCausalLM",
        names.OLMO2,
        settings={"norm_placement": "after", "qk_norm": "all"},
        defaults={"rms_norm_eps": 1e-5, "tie_word_embeddings": False},
        biases={False: "none", True: "all"},
    ),
    Family(
        "olmoe",
        "OlmoeForCausalLM",
        names.OLMOE,
        settings={"qk_norm": "all"},
        defaults={
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "norm_topk_prob": False,
            "num_experts_per_tok": 8,
            "num_experts": 64,
        },
        refused={"clip_qkv": (None,)},
        biases={False: "none", True: "all"},
        experts=("num_experts", "intermediate_size"),
    ),
    Family(
        "gpt_neox",
        "GPTNeoXForCausalLM",
        names.GPT_NEOX,
        settings={"norm": "layernorm", "mlp_bias": True},
        keys={
            **{k: v for k, v in LLAMA_KEYS.items() if k not in ("num_kv_heads", "head_dim")},
            "norm_epsilon": "layer_norm_eps",
            "parallel_residual": "use_parallel_residual",
        },
        defaults={
            "layer_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "use_parallel_residual": True,
            "attention_bias": True,
        },
        activations=("hidden_act", dict(reversed(PLAIN.items()))),
        fraction=0.25,
        biases={False: "none", True: "all"},
        prefixes=("gpt_neox.",),
        ignored=(r".*rotary_emb\.inv_freq", r".*attention\.(bias|masked_bias)"),
    ),
    Family(
        "phi3",
        "Phi3ForCausalLM",
        names.PHI3,
        defaults={"rms_norm_eps": 1e-5, "tie_word_embeddings": False},
        windows=_every_layer,
        fraction=1.0,
        scalings=("none", "longrope"),
    ),
    Family(
        "gpt2",
        "GPT2LMHeadModel",
        names.GPT2,
        settings={
            "position": "learned",
            "norm": "layernorm",
            "attention_bias": "all",
            "mlp_bias": True,
        },
        keys={
            "vocab_size": "vocab_size",
            "embed_dim": "n_embd",
            "num_layers": "n_layer",
            "num_heads": "n_head",
            "mlp_dim": "n_inner",
            "max_length": "n_positions",
            "norm_epsilon": "layer_norm_epsilon",
            "tie_embeddings": "tie_word_embeddings",
        },
        defaults={"layer_norm_epsilon": 1e-5, "tie_word_embeddings": True},
        refused={
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
        },
        activations=("activation_function", PLAIN),
        mlp_ratio=4,
        prefixes=("transformer.",),
        ignored=(r".*attn\.(bias|masked_bias)",),
    ),
)
FAMILIES: dict[str, Family] = {family.model_type: family for family in _ALL}


def family_of(config: Json) -> Family:
    """The family of a config.json.

    Raises:
      UserError: a model type that is not among them.
    """
    model_type = str(config.get("model_type"))
    if model_type not in FAMILIES:
        raise UserError(
            f"config.json has model_type={model_type!r}, which is not among the families."
            f"{did_you_mean(model_type, FAMILIES)}"
        )
    return FAMILIES[model_type]


def text_config(config: Json) -> Json:
    """The part of a config.json that describes the text model, of models with several parts."""
    part = config.get("text_config") or config
    if not isinstance(part, Mapping):
        raise UserError("config.json has a text_config that is no object: mend it.")
    return part


def family_for(model: ModelConfig, preferred: str | None = None) -> Family:
    """The first family that has room for an architecture: what it writes reads as the same.

    Args:
      preferred: a model type to try before the others.

    Raises:
      UserError: no family has room for it.
    """
    wanted = architecture(model)
    candidates = sorted(FAMILIES.values(), key=lambda family: family.model_type != preferred)
    for family in candidates:
        try:
            if architecture(family.read(family.write(model))) == wanted:
                return family
        except UserError:
            continue
    raise UserError(
        "no published family has this combination of model settings "
        f"({_unusual(model)}), so there is no Hugging Face format for it: export needs a model "
        f"that is one of {', '.join(FAMILIES)}."
    )


def architecture(model: ModelConfig) -> ModelConfig:
    """The model without what is the run's own choice: which dtype, which kernels, which dropout."""
    plain = ModelConfig()
    free: dict[str, Any] = {name: getattr(plain, name) for name in RUN_FIELDS}
    if model.position == "rotary":
        free["max_length"] = plain.max_length  # no parameter and no value depends on it
    if model.moe is not None:
        free["moe"] = dataclasses.replace(model.moe, capacity_factor=None)
    model = dataclasses.replace(model, **free)
    heads: dict[str, Any] = {"head_dim": model.resolved_head_dim, "num_kv_heads": model.kv_heads}
    return dataclasses.replace(model, **heads)


# What an architecture does not depend on.
RUN_FIELDS = (*RUNTIME_FIELDS, "scan_layers")


def _unusual(model: ModelConfig) -> str:
    plain = ModelConfig()
    names_ = [f.name for f in dataclasses.fields(model) if f.name not in RUN_FIELDS]
    sizes = ("vocab_size", "embed_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim",
             "mlp_dim", "max_length")  # fmt: skip
    changed = [n for n in names_ if n not in sizes and getattr(model, n) != getattr(plain, n)]
    return ", ".join(f"{name}={getattr(model, name)!r}" for name in changed)
