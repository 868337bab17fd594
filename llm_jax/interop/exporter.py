"""A Hugging Face folder out of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from llm_jax import mup
from llm_jax.data.tokenizers import Tokenizer
from llm_jax.errors import disk_errors
from llm_jax.interop import tensors
from llm_jax.interop.families import architecture, family_for
from llm_jax.interop.family import Family
from llm_jax.interop.floats import BFLOAT16
from llm_jax.interop.folder import CONFIG_FILE, GENERATION_FILE
from llm_jax.interop.mapping import leaves_of
from llm_jax.interop.tokenizer_files import generation_config, write_tokenizer
from llm_jax.json_files import write_json
from llm_jax.models.config import ModelConfig
from llm_jax.models.heads import REWARD
from llm_jax.models.quantize import dequantise_all
from llm_jax.runs import check_new
from llm_jax.stored import Stored

DType = Literal["float32", "bfloat16", "float16"]
DISK_MEND = "Name another --hf."
# Keys that say what the newer "rope_parameters" and "dtype" say, and the other way round.
_SUPERSEDED = ("rope_parameters", "rope_theta", "rope_scaling", "dtype", "torch_dtype")


def export_run(
    stored: Stored,
    mesh: Mesh,
    folder: str | Path,
    dtype: DType | None = None,
    max_shard_bytes: int = 5 * 1024**3,
) -> None:
    """Writes config.json, safetensors, tokenizer files and generation_config.json.

    Adapters and muP's factors are folded in, a quantised base is dequantised. A reward model
    becomes a classifier of one label.

    Args:
      folder: new or empty.
      dtype: of all tensors; None = what the weights were published in, float32 if they were not.

    Raises:
      UserError: no published family has room for the model, a value that the dtype does not hold,
        or a folder that is not empty.
    """
    folder = Path(folder)
    check_new(folder, "--hf")
    published = stored.meta.get("published", {})
    model = mup.without_mup(dataclasses.replace(stored.model, lora=None))
    family = family_for(model, published.get("config", {}).get("model_type"))
    heads = tuple(name for name in stored.heads if name == REWARD)  # a critic's stays here
    leaves = leaves_of(model, heads, family, family.prefixes[0])
    dtype = dtype or published.get("dtype", "float32")
    with jax.set_mesh(mesh):
        weights = mup.folded(dequantise_all(stored.read_merged(mesh)[0]), stored.model)
    tokenizer = stored.tokenizer() if stored.has_tokenizer else None
    with disk_errors(folder, DISK_MEND):
        numpy_dtype = BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype)
        tensors.write(folder, leaves, weights, numpy_dtype, max_shard_bytes)
        config = _config(model, heads, family, published.get("config", {}), dtype, tokenizer)
        write_json(folder / CONFIG_FILE, config)
        if tokenizer is not None:
            template, before = stored.template, published.get("generation", {})
            write_tokenizer(tokenizer, template, folder, model.max_length)
            generation = generation_config(tokenizer, before, template)
            write_json(folder / GENERATION_FILE, generation)


def _config(
    model: ModelConfig,
    heads: tuple[str, ...],
    family: Family,
    published: Mapping[str, Any],
    dtype: str,
    tokenizer: Tokenizer | None,
) -> dict[str, Any]:
    """config.json: the published one wherever it still says the same of the architecture."""
    config = dict(published) if published.get("model_type") == family.model_type else {}
    before = family.read(config) if config else None
    if before is not None and heads:  # a classifier has no output projection to tie
        before = dataclasses.replace(before, tie_embeddings=model.tie_embeddings)
    if before is None or architecture(before) != architecture(model):
        config = {key: value for key, value in config.items() if key not in _SUPERSEDED}
        config |= family.write(model)
    config |= {"architectures": [family.architecture], "torch_dtype": dtype}
    config.pop("dtype", None)
    if REWARD in heads:
        config["architectures"] = [family.classifier]
        config |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    if tokenizer is not None:
        ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
        for name, id_ in ids.items():
            if config.get(f"{name}_token_id") is None:
                config[f"{name}_token_id"] = id_
    return config
