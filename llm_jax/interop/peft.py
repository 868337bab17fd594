"""LoRA adapters as peft publishes them, in and out.

A folder of peft's holds adapter_config.json and adapter_model.safetensors, with two factors for
each adapted module: lora_A [r, inputs] and lora_B [outputs, r], whichever way round the module
keeps its own weight; DoRA adds a magnitude [outputs]. Which modules make which parts of our
products is read off the tables in `names`. A module may make several parts at once (c_attn of
GPT-2: queries, keys and values) and has one A for all of them, while here each part has its own.

Legend: C contracted dimensions of a kernel, F those of its product or of a part of it, r the rank.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from llm_jax.errors import UserError
from llm_jax.interop import tensors
from llm_jax.interop.family import Family
from llm_jax.interop.floats import widen
from llm_jax.interop.mapping import leaves_of
from llm_jax.interop.modules import Part, by_module, parts_of, target_modules, targets, widths
from llm_jax.interop.pieces import Leaf, Piece
from llm_jax.interop.safetensors_files import TensorFolder
from llm_jax.json_files import write_json
from llm_jax.models.config import ModelConfig
from llm_jax.models.heads import REWARD
from llm_jax.models.lora import LoraConfig

CONFIG_FILE = "adapter_config.json"
STEM = "adapter_model"  # of the tensors' file
_PREFIX = "base_model.model."  # before the tensors' names
_TENSORS = {"a": "lora_A.weight", "b": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
_HEAD = (REWARD, "kernel")

_READ = {"r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern",
         "alpha_pattern", "peft_type", "bias", "init_lora_weights", "modules_to_save"}  # fmt: skip
# Which modules are adapted, the tensors say. The rest is how training began, which way round a
# module's own weight lies, or where the files come from.
_WITHOUT_EFFECT = {
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config",
    "ensure_weight_tying", "runtime_config", "megatron_core", "qalora_group_size", "task_type",
    "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
}  # fmt: skip
# Starts that subtract the adapters' first product from the base, which is then another.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

_Held = Sequence[tuple[Part, Mapping[str, np.ndarray]]]  # parts of a module, and their adapters


# --- reading --------------------------------------------------------------------------------------


def read_adapters(
    folder: str | Path, model: ModelConfig, family: Family
) -> tuple[LoraConfig, dict[str, Any]]:
    """The settings of published adapters, and the tree of the adapters alone.

    Parts made by one module get its A each, and their rows of its B. `rank_pattern` pads lower
    ranks with zeros, which training leaves as they are, and `alpha_pattern` goes into B.

    Args:
      model: the base, with layers stacked or not.
      family: that of the base.

    Returns:
      The settings, whose targets select what has adapters; and, as `models.lora` wants them,
      float32 arrays "a" [C..., r], "b" [r, F...] and with DoRA "magnitude" [F...], all behind an
      axis of layers where these are stacked. A classifier's head stands beside them, under
      "reward_head" the "kernel" [embed, 1].

    Raises:
      UserError: no such folder; a setting that changes what the adapters do and is not supported; a
        tensor is missing, left over or of the wrong shape; stacked layers that differ in what they
        adapt.
    """
    file = Path(folder) / f"{STEM}.safetensors"
    config = _read_config(Path(folder) / CONFIG_FILE)
    if not file.exists():
        raise UserError(f"{file} is not there: give the folder of an adapter saved by peft.")
    stored = TensorFolder(file)
    names = _plain_names(stored, family)
    parts, head = _places(model, family)
    modules = {
        module: made
        for module, made in by_module(parts).items()
        if any(f"{module}.{tensor}" in names for tensor in _TENSORS.values())
    }
    own = {module: _settings(config, _module_name(module, names)) for module in modules}
    shapes = _shapes(modules, own)
    has_head = "score" in (config.get("modules_to_save") or ())
    if has_head:
        shapes[head.tensor] = head.source_shape
    _check(stored, names, shapes)
    if not modules:
        raise UserError(f"{file} holds no adapters: give the folder of an adapter saved by peft.")

    lora = _with_rank(_settings(config), max(settings.rank for settings in own.values()))
    chosen = {part.full_name for made in modules.values() for part in made}
    lora = dataclasses.replace(lora, targets=targets(chosen, parts))
    arrays: dict[tuple[str, ...], dict[int | None, np.ndarray]] = {}
    for module, made in modules.items():
        values = {
            leaf: widen(stored.rows(names[name], 0, shapes[name][0]))
            for leaf, name in _tensor_names(module, lora.dora).items()
        }
        for part in made:
            for leaf, array in _adapter_of(part, values, own[module], lora).items():
                arrays.setdefault(part.leaf(leaf), {})[part.layer] = array
    tree = {path: _stacked(path, layers, parts) for path, layers in arrays.items()}
    if has_head:
        kernel = np.empty(head.shape, np.float32)
        head.turned(kernel)[...] = widen(stored.rows(names[head.tensor], 0, 1))
        tree[_HEAD] = kernel
    return lora, unflatten_dict(tree)


def _adapter_of(
    part: Part, values: Mapping[str, np.ndarray], own: LoraConfig, lora: LoraConfig
) -> dict[str, np.ndarray]:
    """The leaves of one part of a module with these tensors; `own` are the module's settings."""
    missing = ((0, lora.rank - own.rank), (0, 0))
    a, b = np.pad(values["a"], missing), np.pad(values["b"].T, missing)
    adapter = {
        "a": np.moveaxis(a[:, part.inputs], 0, -1),
        "b": b[:, part.outputs] * np.float32(own.scale / lora.scale),
    }
    if lora.dora:
        adapter["magnitude"] = values["magnitude"][part.outputs]
    return {name: np.ascontiguousarray(array) for name, array in adapter.items()}


def _stacked(
    path: tuple[str, ...], layers: Mapping[int | None, np.ndarray], parts: Sequence[Part]
) -> np.ndarray:
    """One array of all layers."""
    if None in layers:
        return layers[None]
    wanted = [part.layer for part in parts if part.leaf(path[-1]) == path]
    if len(layers) < len(wanted):
        raise UserError(
            f"{'/'.join(path[:-3])} has adapters on {path[-2]} in {len(layers)} of {len(wanted)} "
            "layers, and stacked layers are alike: set model.scan_layers=False."
        )
    return np.stack([layers[layer] for layer in wanted])


def _read_config(path: Path) -> dict[str, Any]:
    """adapter_config.json, with nothing in it that is not understood."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({error}): give the folder of an adapter saved by peft."
        ) from error

    def refuse(key: str, mend: str) -> None:
        raise UserError(f"{path} has {key}={config[key]!r}, which is not supported: {mend}.")

    for key in ("peft_type", "r", "lora_alpha"):
        if key not in config:
            raise UserError(f"{path} lacks {key!r}: give the folder of an adapter saved by peft.")
    for key in ("r", "lora_alpha"):
        if not isinstance(config[key], int | float) or config[key] <= 0:
            refuse(key, "it must be a positive number")
    if config["peft_type"] != "LORA":
        refuse("peft_type", "only 'LORA' is")
    if config.get("bias", "none") != "none":
        refuse("bias", "merge the adapters with peft, and import the merged model")
    if str(config.get("init_lora_weights")).lower().startswith(_CHANGES_BASE):
        refuse(
            "init_lora_weights",
            "it has changed the base; save the adapters anew with save_pretrained(DIR, "
            "path_initial_model_for_weight_conversion=START)",
        )
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in config.get(key) or ():
            try:
                re.compile(pattern)
            except re.error:
                refuse(key, f"{pattern!r} is no regular expression")
    if set(config.get("modules_to_save") or ()) - {"score", "classifier"}:
        refuse("modules_to_save", "only 'score' is; import the merged model")
    for key in sorted(config.keys() - _READ - _WITHOUT_EFFECT):
        if config[key]:
            refuse(key, "merge the adapters with peft, and import the merged model")
    return config


def _settings(config: Mapping[str, Any], module: str | None = None) -> LoraConfig:
    """Those of one module, or those without the patterns for single modules.

    A key of a pattern is a regular expression for the end of a module's name.
    """

    def of(pattern: str, default: str) -> Any:
        for key, value in (config.get(pattern) or {}).items():
            if module is not None and re.match(rf"(.*\.)?({key})$", module):
                return value
        return config[default]

    return LoraConfig(
        rank=of("rank_pattern", "r"),
        alpha=float(of("alpha_pattern", "lora_alpha")),
        dropout=config.get("lora_dropout") or 0.0,
        rank_stabilised=bool(config.get("use_rslora")),
        dora=bool(config.get("use_dora")),
    )


def _with_rank(lora: LoraConfig, rank: int) -> LoraConfig:
    """The same scale at another rank."""
    if rank == lora.rank:
        return lora
    alpha = lora.scale * (math.sqrt(rank) if lora.rank_stabilised else rank)
    return dataclasses.replace(lora, rank=rank, alpha=alpha)


def _plain_names(stored: TensorFolder, family: Family) -> dict[str, str]:
    """Names without prefixes and the name of the adapter, and what they are in the file."""
    plain: dict[str, str] = {}
    for name in stored.tensors:
        short = re.sub(r"(\.modules_to_save)?\.default(?=\.|$)", "", name)
        short = re.sub(r"(lora_magnitude_vector)\.weight$", r"\1", short).removeprefix(_PREFIX)
        longest_first = sorted(family.prefixes, key=len, reverse=True)
        prefix = next((prefix for prefix in longest_first if short.startswith(prefix)), "")
        short = short.removeprefix(prefix)
        if short in plain:
            raise UserError(f"{stored.path} holds both {plain[short]} and {name}: leave one.")
        plain[short] = name
    return plain


def _module_name(module: str, names: Mapping[str, str]) -> str:
    """As peft matches patterns with: with the model's prefix, where the file has it."""
    stored = next(names[f"{module}.{t}"] for t in _TENSORS.values() if f"{module}.{t}" in names)
    return stored.removeprefix(_PREFIX).partition(".lora_")[0]


def _shapes(
    modules: Mapping[str, Sequence[Part]], own: Mapping[str, LoraConfig]
) -> dict[str, tuple[int, ...]]:
    """The shape that every tensor of the modules must have."""
    shapes: dict[str, tuple[int, ...]] = {}
    for module, made in modules.items():
        inputs, outputs = widths(made)
        rank = own[module].rank
        expected = {"a": (rank, inputs), "b": (outputs, rank), "magnitude": (outputs,)}
        for leaf, name in _tensor_names(module, own[module].dora).items():
            shapes[name] = expected[leaf]
    return shapes


def _check(
    stored: TensorFolder, names: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Refuses tensors other than these."""
    for name, shape in shapes.items():
        if name not in names:
            raise UserError(
                f"{stored.path} lacks {name} {list(shape)}, and holds other tensors of the same "
                "adapter: save it again."
            )
        found = stored.tensors[names[name]].shape
        if found != shape:
            raise UserError(
                f"tensor {names[name]} in {stored.path} is {list(found)}, and must be "
                f"{list(shape)} by {CONFIG_FILE} and the base: is it the adapter of another model?"
            )
    for name in names:
        if name not in shapes:
            raise UserError(
                f"{stored.path} holds the tensor {names[name]}, which has no place here: adapters "
                "are read on the projections of attention and dense MLPs of the base (embeddings, "
                "output projection, experts and routers have none), magnitudes with use_dora."
            )


# --- writing --------------------------------------------------------------------------------------


def write_adapters(
    adapters: Mapping[str, Any],
    lora: LoraConfig,
    model: ModelConfig,
    family: Family,
    folder: str | Path,
    base_name: str,
    dtype: Any = np.float32,
) -> None:
    """Writes a folder that peft loads on the exported base.

    A module that makes several parts gets the A that they share, as they do after `read_adapters`.
    Where they have their own, its A holds all of them one below the other and its B is block
    diagonal. Then the rank is r times the most parts that a module has; all modules are padded to
    it with zeros, since many readers know one rank alone, and alpha keeps the scale as it was. A
    part without an adapter gets zeros in its rows of B.

    Args:
      adapters: the tree of adapters alone, or with a reward head; float32.
      lora: the settings that they were trained with.
      model: the base.
      family: that of the base as exported.
      folder: made where it is not there.
      base_name: where peft finds the base: its folder, or its name on the hub.
      dtype: of all tensors: float32, bfloat16 or float16.

    Raises:
      UserError: the folder holds adapters already, a value is too large for the dtype, there are no
        adapters, or DoRA adapts some of the parts that one module makes (magnitudes of the others
        are lengths of the base's columns).
    """
    arrays = {path: np.asarray(leaf) for path, leaf in flatten_dict(adapters).items()}
    parts, head = _places(model, family)
    modules, adapted = by_module(parts), {}
    for module, made in modules.items():
        held = [(part, _leaves_of(part, arrays)) for part in made if part.leaf("a") in arrays]
        if held and lora.dora and len(held) < len(made):
            raise UserError(
                f"{held[0][0].full_name} has a DoRA adapter, and other parts that {module} makes "
                "with it have none: merge the adapters, and export the merged model."
            )
        if held:
            adapted[module] = held
    if not adapted:
        raise UserError("there are no adapters to export: export the model itself.")
    blocks = max(1 if _share_a(held) else len(held) for held in adapted.values())
    written = _with_rank(lora, blocks * lora.rank)

    found: dict[str, np.ndarray] = {}
    for module, held in adapted.items():
        values = _joined(held, written.rank, widths(modules[module]))
        for leaf, name in _tensor_names(module, lora.dora).items():
            found[f"{_PREFIX}{family.prefixes[0]}{name}"] = values[leaf]
    if _HEAD in arrays:
        found[f"{_PREFIX}{head.tensor}"] = head.turned(arrays[_HEAD])
    _write_tensors(folder, found, np.dtype(dtype))
    config = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if _HEAD in arrays else "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": written.rank,
        "lora_alpha": written.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rank_stabilised,
        "use_dora": lora.dora,
        "bias": "none",
        "fan_in_fan_out": all(part.inputs_first for part in parts),
        "target_modules": target_modules(adapted.keys(), modules.keys(), family.prefixes[0]),
        "modules_to_save": ["score"] if _HEAD in arrays else None,
    }
    write_json(Path(folder) / CONFIG_FILE, config)


def _leaves_of(part: Part, arrays: Mapping[tuple[str, ...], np.ndarray]) -> dict[str, np.ndarray]:
    """The adapter of a part in its layer, by leaf."""
    paths = {leaf: part.leaf(leaf) for leaf in _TENSORS}
    layer = () if part.layer is None else part.layer
    return {leaf: arrays[path][layer] for leaf, path in paths.items() if path in arrays}


def _share_a(held: _Held) -> bool:
    return all(np.array_equal(adapter["a"], held[0][1]["a"]) for _, adapter in held)


def _joined(held: _Held, rank: int, widths: tuple[int, int]) -> dict[str, np.ndarray]:
    """The tensors of a module that makes these parts, by leaf: "a" [rank, inputs], "b" [outputs,
    rank], "magnitude" [outputs]."""
    inputs, outputs = widths
    a, b = np.zeros((rank, inputs), np.float32), np.zeros((outputs, rank), np.float32)
    magnitude = np.zeros(outputs, np.float32)
    shared = _share_a(held)
    for i, (part, adapter) in enumerate(held):
        own = adapter["a"].shape[-1]
        block = slice(0, own) if shared else slice(i * own, (i + 1) * own)
        a[block, part.inputs] = np.moveaxis(adapter["a"], -1, 0)
        b[part.outputs, block] = np.moveaxis(adapter["b"], 0, -1)
        if "magnitude" in adapter:
            magnitude[part.outputs] = adapter["magnitude"]
    return {"a": a, "b": b, "magnitude": magnitude}


def _write_tensors(folder: str | Path, found: Mapping[str, np.ndarray], dtype: np.dtype) -> None:
    """Arrays as they are, in one file, which peft's readers expect."""
    leaves = []
    for name, array in found.items():
        axes = ("row", "column")[: array.ndim]
        sizes = dict(zip(axes, array.shape, strict=True))
        piece = Piece(name, tuple((axis,) for axis in axes), axes, sizes, (0,) * array.ndim)
        leaves.append(Leaf((name,), array.shape, (piece,)))
    params = {name: jnp.asarray(array) for name, array in found.items()}
    tensors.write(folder, leaves, params, dtype, max_shard_bytes=sys.maxsize, stem=STEM)


# --- both -----------------------------------------------------------------------------------------


def _places(model: ModelConfig, family: Family) -> tuple[list[Part], Piece]:
    """Every part that may have an adapter, and the piece of a reward head."""
    leaves = leaves_of(model, (REWARD,), family, prefix="")
    (head,) = (piece for leaf in leaves if leaf.path == _HEAD for piece in leaf.pieces)
    return parts_of(leaves), head


def _tensor_names(module: str, dora: bool) -> dict[str, str]:
    """The tensors of a module's adapter, by leaf."""
    return {
        leaf: f"{module}.{tensor}"
        for leaf, tensor in _TENSORS.items()
        if dora or leaf != "magnitude"
    }
