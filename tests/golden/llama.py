"""From the state dicts of transformers' Llama and of peft's adapters to the trees of llm_jax.

A torch weight is [outputs, inputs]; here inputs come first, or second to last where one kernel
holds what one product makes; heads have an axis of their own, query head k·G + g is [k, g].
"""

import jax.numpy as jnp
import numpy as np

# Names of torch's projections, by the place and the part that they have here.
PARTS = {
    "q_proj": ("attention", "qkv", "query"),
    "k_proj": ("attention", "qkv", "key"),
    "v_proj": ("attention", "qkv", "value"),
    "o_proj": ("attention", "output", "output"),
    "gate_proj": ("mlp", "gate_up", "gate"),
    "up_proj": ("mlp", "gate_up", "up"),
    "down_proj": ("mlp", "down", "down"),
}
ADAPTER_LEAVES = {
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_magnitude_vector": "magnitude",
}


def llama_params(arrays, config):
    """Parameters of `LanguageModel(config)`, unrolled, from arrays by their state-dict names."""

    def kernel(layer, *names):
        parts = []
        for name in names:
            inputs, outputs = part_shapes(config, name)
            weight = arrays[f"model.layers.{layer}.{module_of(name)}.{name}.weight"]
            parts.append(weight.T.reshape(*inputs, *outputs))
        if len(parts) == 1:
            return {"kernel": jnp.asarray(parts[0])}
        # [inputs, ..., fused, width], the parts side by side
        return {"kernel": jnp.moveaxis(np.concatenate(parts, -2), 0, -2)}

    def norm(name):
        return {"scale": jnp.asarray(arrays[f"{name}.weight"])}

    params = {"embedding": jnp.asarray(arrays["model.embed_tokens.weight"])}
    if not config.tie_embeddings:
        params["output"] = jnp.asarray(arrays["lm_head.weight"].T)
    for layer in range(config.num_layers):
        params[f"layer_{layer}"] = {
            "attention_norm": norm(f"model.layers.{layer}.input_layernorm"),
            "attention": {
                "qkv": kernel(layer, "q_proj", "k_proj", "v_proj"),
                "output": kernel(layer, "o_proj"),
            },
            "mlp_norm": norm(f"model.layers.{layer}.post_attention_layernorm"),
            "mlp": {
                "gate_up": kernel(layer, "gate_proj", "up_proj"),
                "down": kernel(layer, "down_proj"),
            },
        }
    params["final_norm"] = norm("model.norm")
    return params


def llama_adapters(arrays, config):
    """The adapters-only tree from arrays by the names of peft's adapter state dict."""
    adapters = {}
    for name, array in arrays.items():
        layer, _, projection, kind = name.removeprefix("base_model.model.model.layers.").split(
            ".", 3
        )
        module, kernel, part = PARTS[projection]
        leaf = ADAPTER_LEAVES[kind]
        inputs, outputs = part_shapes(config, projection)
        shape = {
            "a": (*inputs, -1),
            "b": (-1, *outputs),
            "magnitude": outputs,
        }[leaf]
        branch = adapters.setdefault(f"layer_{layer}", {}).setdefault(module, {})
        branch = branch.setdefault(kernel, {}).setdefault("lora", {}).setdefault(part, {})
        branch[leaf] = jnp.asarray(array.T.reshape(shape))
    return adapters


def module_of(name):
    return "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn"


def part_shapes(config, name):
    """The input and output dimensions that a torch projection has here."""
    D, M, K, G = config.embed_dim, config.mlp_dim, config.kv_heads, config.group
    H = config.resolved_head_dim
    return {
        "q_proj": ((D,), (K, G, H)),
        "k_proj": ((D,), (K, 1, H)),
        "v_proj": ((D,), (K, 1, H)),
        "o_proj": ((K * G, H), (D,)),
        "gate_proj": ((D,), (1, M)),
        "up_proj": ((D,), (1, M)),
        "down_proj": ((M,), (D,)),
    }[name]
