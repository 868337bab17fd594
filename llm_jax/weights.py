"""The weights of a model as a tree: random ones, shapes on a mesh, and what identifies them."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llm_jax import sharding
from llm_jax.config import digest
from llm_jax.models import LanguageModel, ModelConfig, lora
from llm_jax.models.heads import HEADS, init_heads
from llm_jax.models.quantize import quantize
from llm_jax.placement import to_host

Quantization = Literal["int8", "nf4"]


def init_weights(config: ModelConfig, heads: Sequence[str], rng: jax.Array) -> Any:
    """Random weights of a model without adapters, and of its heads, in `sharding.Named` boxes."""
    model_rng, head_rng = jax.random.split(rng)
    model = LanguageModel(dataclasses.replace(config, lora=None))
    # A model without heads begins alike whether heads exist or not.
    weights = model.init(model_rng if heads else rng)
    return {**weights, **init_heads(head_rng, heads, config.embed_dim)}


@functools.lru_cache(maxsize=128)
def shapes(config: ModelConfig, heads: tuple[str, ...] = ()) -> Any:
    """What `init_weights` gives, as jax.ShapeDtypeStructs in boxes: no array is made.

    Tracing a deep model takes seconds, and many meshes are planned for one model.
    """
    return jax.eval_shape(lambda: init_weights(config, heads, jax.random.key(0)))


def abstract(mesh: Mesh, boxed: Any) -> Any:
    """Shapes with shardings of a tree of boxes, such as `read_params` wants."""
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        sharding.unbox(boxed),
        sharding.parameter_shardings(mesh, boxed),
    )


def init_trained(config: ModelConfig, heads: Sequence[str], rng: jax.Array, *, base: Any) -> Any:
    """What a stage with adapters trains, in boxes: adapters and heads."""
    adapter_rng, head_rng = jax.random.split(rng)
    adapters = lora.init_adapters(adapter_rng, config, base)
    return {**adapters, **init_heads(head_rng, heads, config.embed_dim)}


def trained_and_frozen_shapes(
    config: ModelConfig, heads: tuple[str, ...], kind: Quantization | None
) -> tuple[Any, Any]:
    """What a stage trains and what it keeps as it is, as jax.ShapeDtypeStructs in boxes.

    Without adapters nothing is frozen: None. With them their base is, held as `kind` says.
    """
    if config.lora is None:
        return shapes(config, heads), None
    base = jax.eval_shape(lambda base: quantized(base, kind), shapes(config))
    trained = jax.eval_shape(
        lambda base: init_trained(config, heads, jax.random.key(0), base=base), base
    )
    return trained, base


def identify(meta: dict[str, Any], weights: Any) -> str:
    """A hash of what a checkpoint stores, heads aside: the same on every mesh and device.

    That is the adapters and the identity of their base, where there are any: what they come to when
    they are merged is a sum, which every device rounds in its own way.
    """
    adapters, base = lora.split(without_heads(weights))
    if not adapters:
        return fingerprint(base)
    base_record = {name: meta["base"][name] for name in ("fingerprint", "quantized")}
    return digest([fingerprint(adapters), meta["model"]["lora"], base_record])


def quantized(weights: Any, kind: Quantization | None) -> Any:
    """The weights with their kernels quantised, or as they are."""
    return weights if kind is None else jax.jit(quantize, static_argnums=1)(weights, kind)


def without_heads(weights: Any) -> Any:
    return {name: value for name, value in weights.items() if name not in HEADS}


def fingerprint(weights: Any) -> str:
    """A hash of all values, names and shapes; the same on every mesh."""
    hash_ = hashlib.sha256()
    sums = jax.tree.map(to_host, jax.jit(lambda tree: jax.tree.map(_checksum, tree))(weights))
    for (path, leaf), checksum in zip(
        jax.tree_util.tree_leaves_with_path(weights), jax.tree.leaves(sums), strict=True
    ):
        hash_.update(f"{jax.tree_util.keystr(path)}{leaf.shape}{leaf.dtype}".encode())
        hash_.update(checksum.tobytes())
    return hash_.hexdigest()[:16]


def _checksum(x: jax.Array) -> jax.Array:
    """Two sums of a leaf's bits, each mixed with its place: uint32 [2]. Whole numbers add up to the
    same in every order, so the sharding does not matter."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    sums = []
    for factor in (0x9E3779B1, 0x85EBCA77):
        mixed = (bits ^ (place * jnp.uint32(factor))) * jnp.uint32(0xC2B2AE3D)
        sums.append(jnp.sum(mixed ^ (mixed >> 15), dtype=jnp.uint32))
    return jnp.stack(sums)
