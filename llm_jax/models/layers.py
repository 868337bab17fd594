"""The parts a block is made of: norm, projection by einsum, MLP. Float32 parameters throughout.

Legend: B batch, T time, D embed, M mlp, F fused parts of one product.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from llm_jax.errors import UserError
from llm_jax.models.eight_bit_product import Matmul, eight_bit_product
from llm_jax.models.kernels import LAYOUTS, Layout
from llm_jax.models.lora import ADAPTERS, LoraConfig, adapted
from llm_jax.models.quantize import Quantized, kernel_product
from llm_jax.models.remat import named
from llm_jax.sharding import Named, constrain

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "swiglu": jax.nn.silu,
    "geglu": jax.nn.gelu,  # the tanh form
    "gelu": jax.nn.gelu,
    "gelu_erf": functools.partial(jax.nn.gelu, approximate=False),
}
GATED = ("swiglu", "geglu")


def parameter(
    module: nn.Module, name: str, init: Any, axes: tuple[str, ...], shape: tuple[int, ...]
) -> jax.Array:
    """A float32 parameter of the module, boxed with its logical axes at init."""
    value: Any = module.param(name, lambda rng: Named(init(rng, shape), axes))
    return value


class Norm(nn.Module):
    """RMSNorm (arXiv:1910.07467) or LayerNorm over the last `dimensions` axes, in float32."""

    kind: str
    epsilon: float
    plus_one: bool
    dtype: str
    dimensions: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        size, names = x.shape[-self.dimensions :], ("norm",) * self.dimensions
        axes = tuple(range(-self.dimensions, 0))
        init = nn.initializers.zeros if self.plus_one else nn.initializers.ones
        scale = parameter(self, "scale", init, names, size)
        x = x.astype(jnp.float32)
        if self.kind == "layernorm":
            bias = parameter(self, "bias", nn.initializers.zeros, names, size)
            x = x - jnp.mean(x, axis=axes, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=axes, keepdims=True) + self.epsilon)
        x = x * (1 + scale if self.plus_one else scale)
        if self.kind == "layernorm":
            x = x + bias
        return x.astype(self.dtype)


class Projection(nn.Module):
    """One matrix product, [..., C...] by a kernel, with its adapters if the parameters hold some.
    Its name says which of `kernels.LAYOUTS` the kernel has.

    The kernel starts as a truncated normal of deviation `scale` / sqrt(fan in); the bias as 0.
    """

    shape: tuple[int, ...]  # of the kernel
    dtype: str
    use_bias: bool = False
    scale: float = 1.0
    lora: LoraConfig | None = None
    matmul: Matmul = "default"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        layout = LAYOUTS[str(self.name)]
        kernel = self._kernel(layout)
        if self.has_variable("params", ADAPTERS):
            y = self._adapted(x, kernel, layout)
        elif self.matmul != "default":
            y = eight_bit_product(x, kernel, self.dtype, layout.contracted, self.matmul)
        else:
            y = kernel_product(x, kernel, self.dtype, layout.contracted)
        y = y.astype(self.dtype)
        if self.use_bias:
            shape = tuple(self.shape[place] for place in layout.kept)
            bias = parameter(self, "bias", nn.initializers.zeros, layout.outputs, shape)
            y += bias.astype(self.dtype)
        return y

    def _kernel(self, layout: Layout) -> Any:
        given: Any = self.get_variable("params", "kernel")
        if isinstance(given, Quantized):  # flax would compare the codes with the kernel's shape
            return given
        init = nn.initializers.variance_scaling(
            self.scale**2,
            "fan_in",
            "truncated_normal",
            in_axis=layout.contracted,
            out_axis=layout.kept,
        )
        return parameter(self, "kernel", init, layout.axes, self.shape)

    def _adapted(self, x: jax.Array, kernel: Any, layout: Layout) -> jax.Array:
        if self.lora is None:
            raise UserError(
                "the parameters hold adapters, but model.lora is None: give their settings, or "
                "apply the base alone."
            )
        drop = self.lora.dropout > 0 and self.has_rng("dropout")
        return adapted(
            x,
            kernel,
            self.get_variable("params", ADAPTERS),
            self.lora,
            layout,
            self.dtype,
            self.make_rng("dropout") if drop else None,
        )


def unstack(x: jax.Array, axis: int) -> list[jax.Array]:
    """The slices of x along an axis. The gradient is one concatenation, where that of indexing
    would be a sum of padded slices."""
    return [part.squeeze(axis) for part in jnp.split(x, x.shape[axis], axis)]


class MLP(nn.Module):
    """Gated (SwiGLU, GeGLU; arXiv:2002.05202; gate and up are one product) or plain."""

    kind: str
    embed_dim: int
    mlp_dim: int
    dtype: str
    use_bias: bool
    output_scale: float
    lora: LoraConfig | None = None
    matmul: Matmul = "default"

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        activation = ACTIVATIONS[self.kind]
        D, M = self.embed_dim, self.mlp_dim
        if self.kind not in GATED:
            up = Projection((D, M), self.dtype, self.use_bias, lora=self.lora, matmul=self.matmul,
                            name="up")  # fmt: skip
            h_BTM = activation(named(up(x_BTD), "gate_up"))
        else:
            gate_up = Projection((2, D, M), self.dtype, self.use_bias, lora=self.lora,
                                 matmul=self.matmul, name="gate_up")  # fmt: skip
            gate_BTM, up_BTM = unstack(named(gate_up(x_BTD), "gate_up"), axis=-2)
            h_BTM = activation(gate_BTM) * up_BTM
        h_BTM = constrain(h_BTM, "activation_batch", "activation_time", "activation_mlp")
        down = Projection((M, D), self.dtype, self.use_bias, self.output_scale, self.lora,
                          self.matmul, name="down")  # fmt: skip
        return down(h_BTM)
