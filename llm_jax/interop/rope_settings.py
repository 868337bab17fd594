"""RoPE as config.json files write it, the older way and the newer one, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from llm_jax.config import build
from llm_jax.errors import UserError, did_you_mean
from llm_jax.models.rope import RopeConfig

# rope_type → our scaling and the fields that it has, ours by theirs.
_FIELDS: dict[str, tuple[Any, dict[str, str]]] = {
    "default": ("none", {}),
    "linear": ("linear", {"factor": "factor"}),
    "dynamic": ("dynamic", {"factor": "factor"}),
    "yarn": (
        "yarn",
        {
            "factor": "factor",
            "original_max_position_embeddings": "original_length",
            "beta_fast": "beta_fast",
            "beta_slow": "beta_slow",
            "truncate": "truncate",
            "attention_factor": "attention_factor",
        },
    ),
    "llama3": (
        "llama3",
        {
            "factor": "factor",
            "original_max_position_embeddings": "original_length",
            "low_freq_factor": "low_frequency_factor",
            "high_freq_factor": "high_frequency_factor",
        },
    ),
    "longrope": (
        "longrope",
        {
            "factor": "factor",
            "original_max_position_embeddings": "original_length",
            "short_factor": "short_factors",
            "long_factor": "long_factors",
            "attention_factor": "attention_factor",
        },
    ),
}
_TYPE = {scaling: kind for kind, (scaling, _) in _FIELDS.items()}


def read_rope(config: Mapping[str, Any], default_theta: float) -> RopeConfig:
    """The RoPE of all layers of a config.json, or of those without a window.

    Args:
      default_theta: what an absent base means.

    Raises:
      UserError: a scaling that is unknown or lacks a field.
    """
    newer = _mapping(config, "rope_parameters")
    newer = newer.get("full_attention", newer)
    written = {**_mapping(config, "rope_scaling"), **newer}
    theta = written.get("rope_theta", config.get("rope_theta", config.get("rotary_emb_base")))
    return _read(written, config, default_theta if theta is None else theta)


def read_fraction(config: Mapping[str, Any], default: float) -> float:
    """The share of a head's dimensions that is rotated."""
    written = _mapping(config, "rope_parameters")
    key = "partial_rotary_factor"
    return written.get(key, config.get(key, config.get("rotary_pct", default)))


def read_local_rope(config: Mapping[str, Any], default_theta: float) -> RopeConfig:
    """The RoPE of the layers with a window, where they have one of their own (Gemma 3)."""
    written = _mapping(config, "rope_parameters").get("sliding_attention") or {}
    theta = written.get("rope_theta", config.get("rope_local_base_freq"))
    return _read(written, config, default_theta if theta is None else theta)


def _mapping(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = config.get(key) or {}
    if not isinstance(value, Mapping):
        raise UserError(f"config.json has {key}={value!r}, where an object is wanted: mend it.")
    return value


def _read(written: Mapping[str, Any], config: Mapping[str, Any], theta: float) -> RopeConfig:
    kind = str(written.get("rope_type", written.get("type", "default")))
    kind = {"su": "longrope"}.get(kind, kind)  # its name in the first files that have it
    if kind not in _FIELDS:
        raise UserError(
            f"config.json has RoPE of type {kind!r}, which is unknown.{did_you_mean(kind, _FIELDS)}"
        )
    scaling, fields = _FIELDS[kind]
    values: dict[str, Any] = {
        ours: written[theirs] for theirs, ours in fields.items() if written.get(theirs) is not None
    }
    original = config.get("original_max_position_embeddings")
    positions = config.get("max_position_embeddings")
    if kind == "dynamic":
        values["original_length"] = positions
    elif kind in ("yarn", "llama3", "longrope"):
        values.setdefault("original_length", original or positions)
        values.setdefault("factor", (positions or 0) / values["original_length"])
    if kind == "yarn" and written.get("mscale") and written.get("mscale_all_dim"):
        values.setdefault("attention_factor", _mscale_ratio(values["factor"], written))
    missing = [
        theirs for theirs, ours in fields.items() if theirs == "factor" and ours not in values
    ]
    if missing:
        raise UserError(f"config.json: RoPE of type {kind!r} lacks {missing[0]!r}: add it.")
    settings = {"scaling": scaling, "theta": theta, **values}
    return build(RopeConfig, settings, "config.json, read as rope")


def _mscale_ratio(factor: float, written: Mapping[str, Any]) -> float:
    """The attention factor of the models that weigh the paper's two uses of it apart."""
    growth = 0.1 * math.log(factor) if factor > 1 else 0.0
    return (growth * written["mscale"] + 1) / (growth * written["mscale_all_dim"] + 1)


def write_rope(rope: RopeConfig) -> dict[str, Any]:
    """The fields "rope_theta" and "rope_scaling" of a config.json, which every reader knows.

    Raises:
      UserError: a scaling that published files have no name for.
    """
    if rope.scaling == "ntk":
        raise UserError(
            "rope.scaling='ntk' has no name in Hugging Face files: give the raised base as "
            "rope.theta instead, or export a run with another scaling."
        )
    kind = _TYPE[rope.scaling]
    scaling: dict[str, Any] = {"rope_type": kind, "type": kind}
    for theirs, ours in _FIELDS[kind][1].items():
        value = getattr(rope, ours)
        if value is not None:
            scaling[theirs] = list(value) if isinstance(value, tuple) else value
    return {"rope_theta": rope.theta, "rope_scaling": None if kind == "default" else scaling}
