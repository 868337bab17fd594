"""A published family: how its config.json reads as a `ModelConfig`, and back.

One transformer has them all: a family is settings of it, the names of its keys in config.json,
and a table of tensor names.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from llm_jax.config import build
from llm_jax.errors import UserError, did_you_mean
from llm_jax.interop.names import Table
from llm_jax.interop.rope_settings import read_fraction, read_local_rope, read_rope, write_rope
from llm_jax.models.config import LayerKind, ModelConfig
from llm_jax.models.moe import MoeConfig

Json = Mapping[str, Any]

# The kinds of layers as "layer_types" of a config.json names them.
LAYER_TYPES: dict[str, LayerKind] = {"full_attention": "global", "sliding_attention": "local"}
# Activations by their names in config.json; the first of a kind is the one that is written.
GATED = {"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu"}
PLAIN = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu_fast": "gelu", "gelu": "gelu_erf"}
LLAMA_KEYS = {
    "vocab_size": "vocab_size",
    "embed_dim": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "mlp_dim": "intermediate_size",
    "max_length": "max_position_embeddings",
    "norm_epsilon": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
_READ_AS = "config.json, read as {}"  # before the name of a field in a message
# Keys that switch something off by null, and leave it to the default by not being there.
_NONE_IF_NULL = ("attn_logit_softcapping", "final_logit_softcapping", "sliding_window")
_REQUIRED = ("vocab_size", "embed_dim", "num_layers", "num_heads", "mlp_dim", "max_length")


@dataclasses.dataclass(frozen=True)
class Family:
    """A model type of Hugging Face folders.

    model_type, architecture: what config.json says of it. table: of its tensors, see `names`.
    settings: fields of `ModelConfig` that all its models have alike.
    keys: other fields by the name of their key. defaults: values of keys that are absent.
    refused: keys with the values that are understood, for switches that our transformer lacks.
    activations: key and meanings.
    windows: (config.json, layers) → kind of each layer, None for a family without windows.
    window_keys: what is written of them.
    theta, local_theta, fraction: of RoPE where no key says. Without a local base all layers have
      the same RoPE, without a fraction all dimensions are rotated.
    scalings: of RoPE, where its readers do not know all. whole_heads: its readers want the
      embedding to be a multiple of the heads.
    biases: where attention has them by a key "attention_bias", otherwise by `settings`.
    experts: the key of their number and that of their width.
    mlp_ratio: the MLP's width over the embedding's, where no key need say it.
    prefixes: what may stand before the tensors' names; the first is written.
    ignored: tensors that carry no parameter, as regular expressions.
    """

    model_type: str
    architecture: str
    table: Table
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    keys: Mapping[str, str] = dataclasses.field(default_factory=lambda: LLAMA_KEYS)
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    refused: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    activations: tuple[str, Mapping[str, str]] = ("hidden_act", GATED)
    windows: Callable[[Json, int], list[LayerKind]] | None = None
    window_keys: tuple[str, ...] = ("sliding_window",)
    theta: float = 10_000.0
    local_theta: float | None = None
    fraction: float | None = None
    scalings: tuple[str, ...] | None = None
    whole_heads: bool = False
    biases: Mapping[bool, str] = dataclasses.field(default_factory=dict)
    experts: tuple[str, str] | None = None
    mlp_ratio: int | None = None
    prefixes: tuple[str, ...] = ("model.",)
    ignored: tuple[str, ...] = (r".*rotary_emb\.inv_freq",)

    @property
    def classifier(self) -> str:
        """The architecture with a head of labels instead of the output projection."""
        name = re.sub("ForCausalLM|LMHeadModel", "", self.architecture)
        text = "Text" if self.model_type.endswith("_text") else ""
        return f"{name}{text}ForSequenceClassification"

    def read(self, config: Json) -> ModelConfig:
        """The architecture that a config.json describes.

        Raises:
          UserError: a key is missing or of the wrong type, or asks for what this transformer does
            not do.
        """
        self._refuse(config)
        written = {**self.defaults, **{k: v for k, v in config.items() if v is not None}}
        for key in _NONE_IF_NULL:
            if key in config and config[key] is None:
                written.pop(key, None)
        model = build(ModelConfig, self._plain(written), _READ_AS.format("model"))
        nested: dict[str, Any] = {}
        if self.windows is not None:
            nested |= _windows(self.windows(written, model.num_layers), written)
        if self.experts is not None:
            nested |= self._experts(written)
        if model.position == "rotary":
            nested |= self._ropes(written, model.max_length, nested.get("window"))
        model = dataclasses.replace(model, **nested)
        # What a key says and what is its default here are one architecture.
        same: dict[str, Any] = {
            "head_dim": model.embed_dim / model.num_heads,
            "num_kv_heads": model.num_heads,
            "query_pre_attention_scalar": model.resolved_head_dim,
        }
        given: dict[str, Any] = {
            name: None for name, value in same.items() if getattr(model, name) == value
        }
        return dataclasses.replace(model, **given)

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """The fields of config.json that describe an architecture; `read` gives it back.

        Only sensible for a model that the family has room for: read it back to find out.

        Raises:
          UserError: a RoPE scaling without a published name.
        """
        model = dataclasses.replace(
            model,
            head_dim=model.resolved_head_dim,
            num_kv_heads=model.kv_heads,
            query_pre_attention_scalar=(
                model.query_pre_attention_scalar or model.resolved_head_dim
            ),
        )
        if self.whole_heads and model.embed_dim % model.num_heads:
            raise UserError(f"{self.model_type} models have an embed_dim that num_heads divides.")
        config: dict[str, Any] = {
            "model_type": self.model_type,
            **{key: getattr(model, field) for field, key in self.keys.items()},
        }
        key, meanings = self.activations
        config[key] = next((k for k, mlp in meanings.items() if mlp == model.mlp), None)
        if self.biases:
            config["attention_bias"] = model.attention_bias == self.biases[True]
        if self.windows is not None:
            config |= {key: _written_windows(model)[key] for key in self.window_keys}
        if self.experts is not None and model.moe is not None:
            number, width = self.experts
            config |= {
                number: model.moe.num_experts,
                "num_experts_per_tok": model.moe.experts_per_token,
                width: model.mlp_dim,
            }
            if "norm_topk_prob" in self.defaults:
                config["norm_topk_prob"] = model.moe.normalize_weights
        if model.position == "rotary":
            config |= write_rope(model.rope)
            if self.fraction is not None:
                config["partial_rotary_factor"] = model.rope.fraction
            if model.rope.scaling == "dynamic":
                config["max_position_embeddings"] = model.rope.original_length
            if model.rope.scaling == "longrope":
                config["original_max_position_embeddings"] = model.rope.original_length
            if model.local_rope is not None:
                config["rope_local_base_freq"] = model.local_rope.theta
        return config

    def _refuse(self, config: Json) -> None:
        for key, understood in self.refused.items():
            if config.get(key, understood[0]) not in understood:
                raise UserError(
                    f"config.json has {key}={config[key]!r}, and of {self.model_type} models only "
                    f"{' or '.join(map(repr, understood))} is understood."
                )

    def _plain(self, written: Json) -> dict[str, Any]:
        """The fields of `ModelConfig` that keys say alone."""
        values: dict[str, Any] = {**self.settings, "mlp": self._activation(written)}
        for field, key in self.keys.items():
            if key in written:
                values[field] = written[key]
            elif field == "mlp_dim" and self.mlp_ratio is not None:
                values[field] = self.mlp_ratio * values["embed_dim"]
            elif field in _REQUIRED:
                raise UserError(f"config.json of a {self.model_type} model lacks {key!r}: add it.")
        if self.biases:
            values["attention_bias"] = self.biases[bool(written.get("attention_bias"))]
        return values

    def _activation(self, written: Json) -> str:
        key, meanings = self.activations
        name = str(written.get(key, next(iter(meanings))))
        if name not in meanings:
            raise UserError(
                f"config.json has {key}={name!r}, which is unknown.{did_you_mean(name, meanings)}"
            )
        return meanings[name]

    def _ropes(self, written: Json, positions: int, window: int | None) -> dict[str, Any]:
        rope = read_rope(written, self.theta)
        if self.scalings is not None and rope.scaling not in self.scalings:
            raise UserError(f"{self.model_type} models have no RoPE scaling {rope.scaling!r}.")
        if self.fraction is not None:
            rope = dataclasses.replace(rope, fraction=read_fraction(written, self.fraction))
        values: dict[str, Any] = {"rope": rope}
        if self.local_theta is not None and window is not None:
            values["local_rope"] = read_local_rope(written, self.local_theta)
        if rope.scaling in ("dynamic", "yarn") and rope.original_length:
            values["max_length"] = max(positions, round(rope.factor * rope.original_length))
        return values

    def _experts(self, written: Json) -> dict[str, Any]:
        assert self.experts is not None
        number, width = self.experts
        # The two names of the number of experts, of which a file has one.
        experts = written.get(number, written.get("num_experts", written.get("num_local_experts")))
        if experts is None or width not in written:
            raise UserError(f"config.json lacks {number!r} or {width!r}: add it.")
        settings = {
            "num_experts": experts,
            "experts_per_token": written["num_experts_per_tok"],
            "normalize_weights": written.get("norm_topk_prob", True),
        }
        return {
            "moe": build(MoeConfig, settings, _READ_AS.format("model.moe")),
            "mlp_dim": written[width],
        }


def _windows(kinds: list[LayerKind], written: Json) -> dict[str, Any]:
    """The fields of `ModelConfig` for layers of these kinds, as the shortest pattern."""
    window = written.get("sliding_window")
    if window is None or "local" not in kinds:
        return {}
    if "global" not in kinds:
        return {"window": window}
    period = next(
        size
        for size in range(1, len(kinds) + 1)
        if all(kind == kinds[i % size] for i, kind in enumerate(kinds))
    )
    return {"window": window, "attention_pattern": tuple(kinds[:period])}


def _written_windows(model: ModelConfig) -> dict[str, Any]:
    names = {kind: name for name, kind in LAYER_TYPES.items()}
    local = [model.layer_window(i) is not None for i in range(model.num_layers)]
    return {
        "sliding_window": model.window,
        "use_sliding_window": model.window is not None,
        "layer_types": [names["local" if is_local else "global"] for is_local in local],
        # Older readers know these keys alone, where they say the same.
        "max_window_layers": next((i for i, is_local in enumerate(local) if is_local), len(local)),
        "sliding_window_pattern": len(model.attention_pattern or "-"),
    }
