"""A frozen base in few bits: kernels as codes and scales, dequantised where they are multiplied.

int8: one scale per output channel. nf4: the 16 levels of NormalFloat (QLoRA, arXiv:2305.14314),
one scale per block of 64 values; the scales stay float32 (no double quantisation). Embeddings,
norms, biases and the output head are left alone.

Legend: C contracted dimensions of a kernel, F those of its product, N blocks.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import typing
from collections.abc import Mapping
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.errors import UserError, did_you_mean
from llm_jax.models.kernels import Layout, map_projections
from llm_jax.models.product import product
from llm_jax.sharding import Named

Kind = Literal["int8", "nf4"]

BLOCK = 64  # values that share a scale in nf4

# Quantiles of the normal distribution, of equal probability on either side of an exact zero and
# scaled into [-1, 1] (the table in appendix E of the paper).
NF4_LEVELS = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip


@flax.struct.dataclass
class Quantized:
    """A kernel as codes and scales, each with a leading axis where layers are stacked.

    int8: codes int8 in the kernel's shape, scales float32 [F...].
    nf4: codes uint8 [N, 32], two to a byte (the even one in the high bits), of the kernel flattened
      row by row and filled up with zeros to whole blocks; scales float32 [N].
    shape: of one layer's kernel. contracted: which of its dimensions are C.
    """

    codes: Any
    scales: Any
    kind: Kind = flax.struct.field(pytree_node=False)
    shape: tuple[int, ...] = flax.struct.field(pytree_node=False)
    contracted: tuple[int, ...] = flax.struct.field(pytree_node=False)

    @property
    def ndim(self) -> int:
        """Dimensions of the kernel, stacked layers included."""
        own = len(self.shape) if self.kind == "int8" else 2
        return self.codes.ndim - own + len(self.shape)


def quantize(base: Any, kind: Kind) -> Any:
    """The base tree with `Quantized` projection kernels, layer by layer where they are stacked.

    The tree may be plain or hold `sharding.Named` boxes. Boxed codes of int8 keep the kernel's
    logical axes; blocks of nf4 take the name of the first dimension that its product sums over, and
    lie whole in all others.

    Raises:
      UserError: an unknown kind.
    """
    if kind not in typing.get_args(Kind):
        raise UserError(
            f"quantization {kind!r} is unknown.{did_you_mean(str(kind), typing.get_args(Kind))}"
        )

    def replaced(where: str, layout: Layout, projection: Mapping[str, Any]) -> Any:
        del where
        return {**projection, "kernel": _quantize_leaf(projection["kernel"], kind, layout)}

    return map_projections(replaced, base)


def dequantise(kernel: Any) -> jax.Array:
    """The float32 kernel of a `Quantized`, behind any stacked layers.

    No gradient passes to codes or scales. Any other array is returned as it is.
    """
    if not isinstance(kernel, Quantized):
        return kernel
    one: Any = functools.partial(_dequantise_int8, contracted=kernel.contracted)
    if kernel.kind == "nf4":
        one = functools.partial(_dequantise_nf4, shape=kernel.shape)
    for _ in range(kernel.ndim - len(kernel.shape)):
        one = jax.vmap(one)
    return one(kernel.codes, jax.lax.stop_gradient(kernel.scales))


def dequantise_all(base: Any) -> Any:
    """The tree with every kernel in float32: the inverse of `quantize`, up to its rounding."""

    def replaced(where: str, layout: Layout, projection: Mapping[str, Any]) -> Any:
        del where, layout
        return {**projection, "kernel": dequantise(projection["kernel"])}

    return map_projections(replaced, base)


def kernel_product(x: jax.Array, kernel: Any, dtype: Any, contracted: tuple[int, ...]) -> jax.Array:
    """`product` with a kernel that may be `Quantized`: float32 [..., F...].

    The backward pass dequantises once more instead of keeping the float32 kernel.
    """
    if not isinstance(kernel, Quantized):
        return product(x, kernel, dtype, contracted)

    @jax.checkpoint
    def dequantised_product(x: jax.Array, kernel: Quantized) -> jax.Array:
        return product(x, dequantise(kernel), dtype, contracted)

    return dequantised_product(x, kernel)


def _quantize_leaf(kernel: Any, kind: Kind, layout: Layout) -> Quantized:
    if isinstance(kernel, Named):
        quantized = _quantize_leaf(kernel.value, kind, layout)
        stacked = kernel.names[: layout.stacked(kernel.value)]
        if kind == "int8":
            names, scale_names = kernel.names, (*stacked, *layout.outputs)
        else:
            # The codes of a block lie whole, as the dimensions of a head do.
            scale_names = (*stacked, layout.inputs[0])
            names = (*scale_names, "head_dim")
        return dataclasses.replace(
            quantized,
            codes=Named(quantized.codes, names),
            scales=Named(quantized.scales, scale_names),
        )
    one: Any = _quantize_nf4
    if kind == "int8":
        one = functools.partial(_quantize_int8, contracted=layout.contracted)
    for _ in range(layout.stacked(kernel)):
        one = jax.vmap(one)
    codes, scales = one(kernel)
    shape = tuple(kernel.shape[layout.stacked(kernel) :])
    return Quantized(codes, scales, kind, shape, layout.contracted)


def _quantize_int8(kernel: jax.Array, contracted: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    largest = jnp.max(jnp.abs(kernel), axis=contracted)
    scales = jnp.where(largest > 0, largest, 1) / 127
    return jnp.round(kernel / jnp.expand_dims(scales, contracted)).astype(jnp.int8), scales


def _dequantise_int8(codes: jax.Array, scales: jax.Array, contracted: tuple[int, ...]) -> jax.Array:
    return codes.astype(jnp.float32) * jnp.expand_dims(scales, contracted)


def _quantize_nf4(kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    blocks = jnp.pad(kernel.ravel(), (0, -kernel.size % BLOCK)).reshape(-1, BLOCK)
    largest = jnp.max(jnp.abs(blocks), axis=1)
    scales = jnp.where(largest > 0, largest, 1)
    middles = (NF4_LEVELS[1:] + NF4_LEVELS[:-1]) / 2
    codes = jnp.searchsorted(middles, blocks / scales[:, None]).astype(jnp.uint8)
    return codes[:, ::2] << 4 | codes[:, 1::2], scales


def _dequantise_nf4(codes: jax.Array, scales: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    pairs = jnp.stack([codes >> 4, codes & 15], axis=-1)
    blocks = jnp.asarray(NF4_LEVELS)[pairs.reshape(-1, BLOCK)] * scales[:, None]
    return blocks.ravel()[: math.prod(shape)].reshape(shape)
