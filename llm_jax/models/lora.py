"""Low-rank adapters beside frozen kernels: LoRA (arXiv:2106.09685), rank-stabilised LoRA
(arXiv:2312.03732) and DoRA (arXiv:2402.09353).

The adapters of a projection lie in the parameter tree next to its kernel, one for each adapted part
of the product, as published adapters have them:

    {"kernel": W, "lora": {"query": {"a": A, "b": B}, "value": {"a": A, "b": B}}}

With x·A·B weighed by `LoraConfig.scale`, a part becomes x·W + scale · x·A·B. DoRA has a third leaf,
"magnitude" m, and makes that sum's weight, W + scale·A·B, a direction: each of its columns is
brought to the length that m gives it. A tree without "lora" is the base alone, and is applied as
if there were no adapters.

Legend: C contracted dimensions of a kernel, F those of its product or of a part of it, r the rank.
"""

from __future__ import annotations

import dataclasses
import math
import re
import zlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.errors import UserError
from llm_jax.models.kernels import Layout, map_projections
from llm_jax.models.product import product
from llm_jax.models.quantize import dequantise, kernel_product
from llm_jax.sharding import Named, unbox
from llm_jax.types import join

if TYPE_CHECKING:
    from llm_jax.models.config import ModelConfig

ADAPTERS = "lora"  # the key beside "kernel"


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which parts of the model get adapters, and of what kind."""

    rank: int = 8
    alpha: float = 16.0
    # Regular expressions, searched in names such as "layer_0/attention/query" (also key, value,
    # output) and "layer_0/mlp/gate" (also up, down); "layers/block_0/..." in scanned layers.
    targets: tuple[str, ...] = (".*",)
    dropout: float = 0.0  # on what the adapters see of x; one mask for the parts of a product
    rank_stabilised: bool = False  # scale by alpha / √rank instead of alpha / rank
    dora: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"model.lora.rank={self.rank} must be positive.")
        if not self.alpha > 0:
            raise UserError(f"model.lora.alpha={self.alpha} must be positive.")
        if not 0 <= self.dropout < 1:
            raise UserError(f"model.lora.dropout={self.dropout} must lie in [0, 1).")
        if not self.targets:
            raise UserError("model.lora.targets is empty: name a part, or set model.lora to None.")
        for target in self.targets:
            try:
                re.compile(target)
            except re.error as error:
                raise UserError(
                    f"model.lora.targets: {target!r} is no regular expression ({error}): mend it."
                ) from error

    @property
    def scale(self) -> float:
        """What multiplies A·B."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)


def adapted(
    x: jax.Array,
    kernel: Any,
    adapters: Mapping[str, Any],
    config: LoraConfig,
    layout: Layout,
    dtype: Any,
    dropout_rng: jax.Array | None = None,
) -> jax.Array:
    """The product of x with a kernel and its adapters, float32 [..., F...].

    Dropout acts on what the adapters see only. DoRA's norms carry no gradient (section 4.3 of the
    paper), and under dropout what it adds to the base product, (m/norm − 1)·x·W included, is made
    of the dropped x throughout.

    Args:
      x: [..., C...].
      kernel: float32 or `Quantized`, with the dimensions that the layout names.
      adapters: by part: "a" float32 [C..., r], "b" [r, F...], with DoRA "magnitude" [F...].
      dtype: of the products' operands.
      dropout_rng: switches dropout on.
    """
    y = kernel_product(x, kernel, dtype, layout.contracted)
    base = y
    if config.dropout and dropout_rng is not None:
        kept = jax.random.bernoulli(dropout_rng, 1 - config.dropout, x.shape)
        x = jnp.where(kept, x / (1 - config.dropout), 0)
        if config.dora:
            base = kernel_product(x, kernel, dtype, layout.contracted)
    # One product makes the low-rank inputs of all parts.
    a = jnp.concatenate([adapter["a"] for adapter in adapters.values()], axis=-1)
    inputs = tuple(range(a.ndim - 1))
    hidden = jnp.split(product(x, a, dtype, inputs), len(adapters), axis=-1)
    parts, base_parts = (layout.split(made, layout.outputs) for made in (y, base))
    weights = layout.split(dequantise(kernel), layout.axes) if config.dora else {}
    for h, (name, adapter) in zip(hidden, adapters.items(), strict=True):
        added = config.scale * product(h, adapter["b"], dtype)
        if config.dora:
            gain = _gain(_sum(weights[name], adapter, config, layout), adapter, layout)
            added = (gain - 1) * base_parts[name] + gain * added
        parts[name] += added
    return layout.join(parts, layout.outputs)


def init_adapters(rng: jax.Array, config: ModelConfig, base: Any) -> Any:
    """Fresh adapters of `config.lora` in `sharding.Named` boxes: a tree of them alone.

    A is Gaussian and B zero, so that the model begins as the base. A's deviation is 1/√(3·fan in),
    that of the uniform start in ±1/√(fan in) which published adapters have, so that their learning
    rates hold here. DoRA's magnitudes begin as the lengths of the kernel's columns.

    Args:
      base: the parameters of the model without adapters, boxed or plain, quantised or not; shapes
        (`jax.ShapeDtypeStruct`) do unless `config.lora.dora` is set.

    Raises:
      UserError: `config.lora` is None, or a target matches no part of the model.
    """
    lora = _lora(config)
    base = unbox(base)
    chosen = _chosen(base, lora.targets)

    def replaced(where: str, layout: Layout, projection: Mapping[str, Any]) -> Any:
        kernel = projection["kernel"]
        stacked = ("layers",) * layout.stacked(kernel)
        shapes = jax.eval_shape(
            lambda kernel: layout.split(dequantise(kernel), layout.axes), kernel
        )
        weights = layout.split(dequantise(kernel), layout.axes) if lora.dora else {}
        adapters = {}
        for part in layout.parts:
            name = f"{where}/{part}"
            if name not in chosen:
                continue
            # By name, so that a part begins alike whatever else is chosen.
            own = jax.random.fold_in(rng, zlib.crc32(name.encode()))
            adapters[part] = _init_part(own, lora.rank, layout, stacked, shapes[part].shape)
            if lora.dora:
                lengths = _lengths(weights[part], layout)
                adapters[part]["magnitude"] = Named(lengths, (*stacked, *layout.outputs))
        return {ADAPTERS: adapters} if adapters else {}

    return split(map_projections(replaced, base))[0]


def split(params: Any) -> tuple[Any, Any]:
    """The tree of adapters alone, and the tree without them; both without empty branches."""
    adapters: dict[str, Any] = {}
    base: dict[str, Any] = {}
    for name, value in params.items():
        if name == ADAPTERS:
            adapters[name] = value
        elif isinstance(value, Mapping):
            inner = split(value)
            for tree, branch in zip((adapters, base), inner, strict=True):
                if branch:
                    tree[name] = branch
        else:
            base[name] = value
    return adapters, base


def merge(params: Any, config: ModelConfig) -> Any:
    """The base with every adapter folded into its kernel, in float32; quantised kernels with
    adapters are dequantised first. A tree without adapters comes back equal.

    Raises:
      UserError: there are adapters, but `config.lora` is None.
    """

    def folded(weight: jax.Array, adapter: Mapping[str, Any], layout: Layout) -> jax.Array:
        lora = _lora(config)
        weight = _sum(weight, adapter, lora, layout)
        if lora.dora:
            weight *= jnp.expand_dims(_gain(weight, adapter, layout), layout.contracted_axes)
        return weight

    return split(_map_adapted(folded, params))[1]


def unmerge(merged: Any, adapters: Any, config: ModelConfig) -> Any:
    """What `merge` was given: base and adapters in one tree, up to float32 rounding (a quantised
    kernel comes back dequantised).

    Raises:
      UserError: `config.lora` is None or has DoRA, whose merge replaces the lengths of the kernel's
        columns and keeps no record of them.
    """
    lora = _lora(config)
    if lora.dora:
        raise UserError(
            "adapters with model.lora.dora cannot be unmerged, because merging forgets the lengths "
            "of the kernels' columns: keep the base, and join the adapters to it."
        )

    def restored(weight: jax.Array, adapter: Mapping[str, Any], layout: Layout) -> jax.Array:
        return weight - lora.scale * _low_rank(adapter, layout)

    return _map_adapted(restored, join(merged, adapters))


def _map_adapted(
    function: Callable[[jax.Array, Mapping[str, Any], Layout], jax.Array], params: Any
) -> Any:
    """The tree with each adapted part's weight replaced by `function(weight, adapter, layout)`."""

    def replaced(where: str, layout: Layout, projection: Mapping[str, Any]) -> Any:
        del where
        if ADAPTERS not in projection:
            return projection
        parts = layout.split(dequantise(projection["kernel"]), layout.axes)
        for name, adapter in projection[ADAPTERS].items():
            parts[name] = function(parts[name], adapter, layout)
        return {**projection, "kernel": layout.join(parts, layout.axes)}

    return map_projections(replaced, params)


def _lora(config: ModelConfig) -> LoraConfig:
    if config.lora is None:
        raise UserError("model.lora is None, but there are adapters: give their settings.")
    return config.lora


def _chosen(base: Any, targets: tuple[str, ...]) -> set[str]:
    """Names of all parts that a target matches."""
    names = _part_names(base)
    for target in targets:
        if not any(re.search(target, name) for name in names):
            # One layer stands for all: the others differ in their numbers only.
            distinct = {re.sub(r"\d+", "", name): name for name in reversed(names)}
            raise UserError(
                f"model.lora.targets: {target!r} matches no part of the model, which has "
                f"{', '.join(sorted(distinct.values()))} and the same in further layers: mend it."
            )
    return {name for name in names if any(re.search(target, name) for target in targets)}


def _part_names(base: Any) -> list[str]:
    found: list[str] = []

    def note(where: str, layout: Layout, projection: Mapping[str, Any]) -> Any:
        found.extend(f"{where}/{part}" for part in layout.parts)
        return projection

    map_projections(note, base)
    return found


def _init_part(
    rng: jax.Array, rank: int, layout: Layout, stacked: tuple[str, ...], shape: tuple[int, ...]
) -> dict[str, Named]:
    """A and B of a part whose kernel has this shape."""
    lead, own = shape[: len(stacked)], shape[len(stacked) :]
    inputs, outputs = ([own[i] for i in places] for places in (layout.contracted, layout.kept))
    a = jax.random.normal(rng, (*lead, *inputs, rank)) / math.sqrt(3 * math.prod(inputs))
    return {
        "a": Named(a, (*stacked, *layout.inputs, "rank")),
        "b": Named(jnp.zeros((*lead, rank, *outputs)), (*stacked, "rank", *layout.outputs)),
    }


def _low_rank(adapter: Mapping[str, Any], layout: Layout) -> jax.Array:
    """A·B, float32 with the dimensions of the kernel, in full precision on any device."""

    def one(a: jax.Array, b: jax.Array) -> jax.Array:
        added = jnp.tensordot(a, b, axes=1, precision=jax.lax.Precision.HIGHEST)
        return jnp.moveaxis(added, range(a.ndim - 1), layout.contracted)

    stacked = adapter["a"].ndim > len(layout.contracted) + 1
    return (jax.vmap(one) if stacked else one)(adapter["a"], adapter["b"])


def _sum(
    weight: jax.Array, adapter: Mapping[str, Any], config: LoraConfig, layout: Layout
) -> jax.Array:
    """W + scale·A·B of one part."""
    return weight + config.scale * _low_rank(adapter, layout)


def _gain(direction: jax.Array, adapter: Mapping[str, Any], layout: Layout) -> jax.Array:
    """DoRA's factor of each output feature, [F...] behind any stacked layers."""
    # A column of zeros has no direction; it stays zero instead of becoming NaN.
    lengths = jnp.maximum(_lengths(direction, layout), np.finfo(np.float32).tiny)
    return adapter["magnitude"] / jax.lax.stop_gradient(lengths)


def _lengths(weight: jax.Array, layout: Layout) -> jax.Array:
    """The length of each column: one for each output feature."""
    return jnp.sqrt(jnp.sum(jnp.square(weight), axis=layout.contracted_axes))
