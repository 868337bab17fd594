"""The worker of `tools.bench import_memory`: makes a folder, converts it, or loads it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax import checkpoint, weights
from llm_jax.interop.families import FAMILIES
from llm_jax.interop.mapping import leaves_of
from llm_jax.interop.pieces import Leaf
from llm_jax.interop.safetensors_files import TensorFolder, write_folder
from llm_jax.interop.tensors import check, deferred, load, tensor_shapes
from llm_jax.mesh import MeshConfig, make_mesh
from llm_jax.models import ModelConfig
from llm_jax.models.size import parameter_count
from tools.bench.protocol import Note, peak_resident_bytes, reset_peak, resident_bytes, serve

ROWS = 4096  # of a tensor that are made at a time


def make(note: Note, folder: str, megabytes: int, files: int, dtype: str) -> dict[str, Any]:
    """Writes the folder DIR/hf, whose weights have `megabytes` in float32."""
    shapes = tensor_shapes(_leaves(megabytes))
    stored = np.dtype(jnp.dtype(dtype))
    total = sum(math.prod(shape) for shape in shapes.values()) * stored.itemsize
    random = np.random.default_rng(0)

    def blocks(name: str) -> Iterator[np.ndarray]:
        rows, *rest = shapes[name]
        for begin in range(0, rows, ROWS):
            size = (min(ROWS, rows - begin), *rest)
            yield random.standard_normal(size, np.float32).astype(stored)

    write_folder(Path(folder) / "hf", shapes, stored, blocks, math.ceil(total / files), "model")
    return {}


def convert(note: Note, folder: str, megabytes: int, files: int, dtype: str) -> dict[str, Any]:
    """Peak of the conversion to DIR/run."""
    hf, leaves = Path(folder) / "hf", _leaves(megabytes)
    before = _start()
    tensors = TensorFolder(hf)
    check(tensors, leaves)
    checkpoint.write_streamed(Path(folder) / "run", 0, deferred(tensors, leaves), {})
    peak = peak_resident_bytes() - before
    return {"peak_bytes": peak, "unit_bytes": max(f.stat().st_size for f in hf.iterdir())}


def load_sharded(note: Note, folder: str, megabytes: int, files: int, dtype: str) -> dict[str, Any]:
    """Peak of loading, split over all devices, beside the arrays themselves."""
    model, leaves = _model(megabytes), _leaves(megabytes)
    mesh = make_mesh(MeshConfig(data=1, fsdp=-1))
    abstract = weights.abstract(mesh, weights.shapes(model))
    before = _start()
    tensors = TensorFolder(Path(folder) / "hf")
    check(tensors, leaves)
    arrays = jax.tree.leaves(load(tensors, leaves, abstract))
    peak = peak_resident_bytes() - before
    largest = max(array.addressable_shards[0].data.nbytes for array in arrays)
    return {"peak_bytes": peak - sum(a.nbytes for a in arrays), "unit_bytes": largest}


def _start() -> int:
    """Bytes that the process holds with all its libraries and devices."""
    jax.block_until_ready(jnp.zeros(1))
    reset_peak()
    return resident_bytes()


def _model(megabytes: int) -> ModelConfig:
    """A Llama of so many megabytes in float32. All layers stand in the same leaves."""
    model = ModelConfig(
        vocab_size=32_768, embed_dim=1024, num_layers=1, num_heads=16, num_kv_heads=4, mlp_dim=4096,
        tie_embeddings=False, scan_layers=True,
    )  # fmt: skip
    one, two = (parameter_count(dataclasses.replace(model, num_layers=n)) for n in (1, 2))
    layers = 1 + max(0, round((megabytes * 1e6 / 4 - one) / (two - one)))
    return dataclasses.replace(model, num_layers=layers)


def _leaves(megabytes: int) -> tuple[Leaf, ...]:
    return leaves_of(_model(megabytes), (), FAMILIES["llama"], "model.")


def main() -> None:
    serve({"make": make, "convert": convert, "load": load_sharded})
