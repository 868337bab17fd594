"""Writes lora.npz: logits of a tiny random Llama with adapters, by transformers and peft.

Imports nothing of llm_jax, so that it is an independent judge:

    pip install torch transformers peft && python tests/golden/make_lora.py

The file holds `input_ids`, the base's weights as `base/NAME` and its `base_logits`, and for each of
the three kinds its adapters as `KIND/NAME` and `KIND_logits`; names are those of the state dicts.
"""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import peft
import torch
import transformers

OUTPUT = Path(__file__).with_name("lora.npz")
KINDS = {
    "standard": {},
    "rank_stabilised": {"use_rslora": True},
    "dora": {"use_dora": True},
}
TARGETS = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]


def make_base() -> transformers.LlamaForCausalLM:
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    model = transformers.LlamaForCausalLM(config).eval()
    randomise(model.named_parameters())
    return model


def randomise(parameters) -> None:
    """Values at which every weight matters: gains around 1, all others around 0."""
    for name, parameter in parameters:
        noise = torch.randn_like(parameter)
        gain = "norm" in name or "magnitude" in name
        parameter.data = parameter.data * (1 + 0.2 * noise) if gain else 0.2 * noise


def main() -> None:
    torch.manual_seed(0)
    base = make_base()
    tokens = torch.randint(64, (2, 12))
    arrays = {f"base/{name}": value for name, value in base.state_dict().items()}
    with torch.no_grad():
        arrays["base_logits"] = base(tokens).logits
        for kind, switches in KINDS.items():
            config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=TARGETS, **switches)
            model = peft.get_peft_model(copy.deepcopy(base), config).eval()
            randomise((n, p) for n, p in model.named_parameters() if "lora_" in n)
            adapters = peft.get_peft_model_state_dict(model)
            arrays |= {f"{kind}/{name}": value for name, value in adapters.items()}
            arrays[f"{kind}_logits"] = model(tokens).logits
    numpy = {name: value.float().numpy() for name, value in arrays.items()}
    np.savez_compressed(OUTPUT, input_ids=tokens.numpy().astype(np.int32), **numpy)


if __name__ == "__main__":
    main()
