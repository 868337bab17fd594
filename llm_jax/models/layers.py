"""The parts a block is made of: norm, projection by einsum, MLP. Float32 parameters throughout.

Legend: B batch, T time, D embed, M mlp, F fused parts of one product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from llm_jax.models.product import product
from llm_jax.sharding import Named, constrain

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "swiglu": jax.nn.silu,
    "geglu": jax.nn.gelu,  # the tanh form, as the published models with it use
    "gelu": jax.nn.gelu,
}


def parameter(
    module: nn.Module, name: str, init: Any, axes: tuple[str, ...], shape: tuple[int, ...]
) -> jax.Array:
    """A float32 parameter of the module, boxed with its logical axes at init."""
    value: Any = module.param(name, lambda rng: Named(init(rng, shape), axes))
    return value


class Norm(nn.Module):
    """RMSNorm (arXiv:1910.07467) or LayerNorm over the last axis, computed in float32."""

    kind: str
    epsilon: float
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        size = (x.shape[-1],)
        scale = parameter(self, "scale", nn.initializers.ones, ("norm",), size)
        x = x.astype(jnp.float32)
        if self.kind == "layernorm":
            bias = parameter(self, "bias", nn.initializers.zeros, ("norm",), size)
            x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        x = x * scale
        if self.kind == "layernorm":
            x = x + bias
        return x.astype(self.dtype)


class Projection(nn.Module):
    """One matrix product, [..., C...] by a kernel [C..., F...].

    The kernel starts as a truncated normal of deviation `scale` / sqrt(fan in); the bias as 0.
    """

    shape: tuple[int, ...]  # of the kernel
    axes: tuple[str, ...]  # logical names of the kernel's dimensions
    dtype: str
    use_bias: bool = False
    scale: float = 1.0
    contracted: int = 1  # leading dimensions of the kernel that the product sums over

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dimensions = range(len(self.shape))
        init = nn.initializers.variance_scaling(
            self.scale**2,
            "fan_in",
            "truncated_normal",
            in_axis=dimensions[: self.contracted],
            out_axis=dimensions[self.contracted :],
        )
        kernel = parameter(self, "kernel", init, self.axes, self.shape)
        y = product(x, kernel, self.dtype, self.contracted).astype(self.dtype)
        if self.use_bias:
            axes, shape = self.axes[self.contracted :], self.shape[self.contracted :]
            bias = parameter(self, "bias", nn.initializers.zeros, axes, shape)
            y += bias.astype(self.dtype)
        return y


def unstack(x: jax.Array, axis: int) -> list[jax.Array]:
    """The slices of x along an axis. The gradient is one concatenation, where that of indexing
    would be a sum of padded slices."""
    return [part.squeeze(axis) for part in jnp.split(x, x.shape[axis], axis)]


class MLP(nn.Module):
    """Gated (SwiGLU, GeGLU; arXiv:2002.05202; gate and up are one product) or plain GELU."""

    kind: str
    embed_dim: int
    mlp_dim: int
    dtype: str
    use_bias: bool
    output_scale: float

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        activation = ACTIVATIONS[self.kind]
        D, M = self.embed_dim, self.mlp_dim
        if self.kind == "gelu":
            up = Projection((D, M), ("embed", "mlp"), self.dtype, self.use_bias,
                            name="up")  # fmt: skip
            h_BTM = activation(up(x_BTD))
        else:
            gate_up = Projection((D, 2, M), ("embed", "fused", "mlp"),
                                 self.dtype, self.use_bias, name="gate_up")  # fmt: skip
            gate_BTM, up_BTM = unstack(gate_up(x_BTD), axis=-2)
            h_BTM = activation(gate_BTM) * up_BTM
        h_BTM = constrain(h_BTM, "activation_batch", "activation_time", "activation_mlp")
        down = Projection((M, D), ("mlp", "embed"), self.dtype, self.use_bias,
                          self.output_scale, name="down")  # fmt: skip
        return down(h_BTM)
