"""Mixture of experts: top-k routing, and the experts' products without loss or up to a capacity.

Legend: B batch, T time, D embed, M mlp, E experts, K experts that a token chooses, C an expert's
capacity for a row, N tokens of one shard, R = N·K rows of its choices.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from llm_jax.errors import UserError
from llm_jax.models.grouped import grouped_product
from llm_jax.models.layers import ACTIVATIONS, GATED, parameter, unstack
from llm_jax.models.product import product, rounded
from llm_jax.models.remat import named
from llm_jax.sharding import RULES, constrain, fitting_spec, spec

Kernels = dict[str, jax.Array]

KERNEL_AXES = {
    "gate_up": ("experts", "fused", "embed", "mlp"),
    "up": ("experts", "embed", "mlp"),
    "down": ("experts", "mlp", "embed"),
}
# An expert's places for a row are shared out over time's axis, as its tokens were.
EXPERT_AXES = ("activation_experts", "activation_expert_batch", "activation_time", None)


@dataclasses.dataclass(frozen=True)
class MoeConfig:
    """Experts in place of every MLP."""

    num_experts: int = 8
    experts_per_token: int = 2
    # The weights of the chosen experts sum to 1 (Mixtral, Qwen 3 MoE); else they are as the softmax
    # over all experts gives them (OLMoE).
    normalize_weights: bool = True
    # An expert takes at most ceil(capacity_factor · experts_per_token · T / num_experts) tokens of
    # a row of T; the rest skip it. None: no token is dropped.
    capacity_factor: float | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.experts_per_token <= self.num_experts:
            raise UserError(
                f"model.moe.experts_per_token={self.experts_per_token} must lie between 1 and "
                f"model.moe.num_experts={self.num_experts}."
            )
        if self.capacity_factor is not None and not 0 < self.capacity_factor < math.inf:
            raise UserError(
                f"model.moe.capacity_factor={self.capacity_factor} must be positive; leave it out "
                "to drop no token."
            )

    def capacity(self, length: int) -> int | None:
        """Tokens that an expert takes of a row of `length`; None where none is dropped."""
        if self.capacity_factor is None:
            return None
        even = self.experts_per_token * length / self.num_experts
        return min(length, math.ceil(self.capacity_factor * even))


@flax.struct.dataclass
class Routing:
    """Sums over real tokens, float32, not divided yet; those of several layers add up.

    counts: [E], tokens that choose each expert. probabilities: [E], the router's probabilities.
    z: [], logsumexp(router logits)². tokens: []. dropped: [], choices past an expert's capacity.
    """

    counts: jax.Array
    probabilities: jax.Array
    z: jax.Array
    tokens: jax.Array
    dropped: jax.Array

    def __add__(self, other: Routing) -> Routing:
        return jax.tree.map(jnp.add, self, other)


@flax.struct.dataclass
class Choices:
    """experts: int32 [B, T, K], most probable first; E on padding. weights: float32 [B, T, K]."""

    experts: jax.Array
    weights: jax.Array


class MixtureOfExperts(nn.Module):
    """Top-k experts (arXiv:1701.06538, arXiv:2401.04088); kernels and their starts as in `MLP`."""

    config: MoeConfig
    kind: str
    embed_dim: int
    mlp_dim: int
    dtype: str
    output_scale: float
    router_scale: float = 1.0

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        real_BT: jax.Array,
        places_T: np.ndarray | None = None,
        *,
        dropless: bool,
    ) -> tuple[jax.Array, Routing]:
        """The experts' weighted sum [B, T, D] in `dtype`, 0 on padding; and how tokens chose.

        Args:
          x_BTD: the input.
          real_BT: bool; padding goes to no expert and counts nowhere.
          places_T: the place of each token in its row, by which an expert at its capacity takes
            them; None = 0, 1, 2, ...
          dropless: drop no token whatever the capacity factor.
        """
        E, D, M = self.config.num_experts, self.embed_dim, self.mlp_dim
        router_DE = parameter(
            self, "router", _initial(self.router_scale), ("embed", "router_experts"), (D, E)
        )
        first, shape = ("gate_up", (E, 2, D, M)) if self.gated else ("up", (E, D, M))
        kernels = {
            first: parameter(self, first, _initial(1.0), KERNEL_AXES[first], shape),
            "down": parameter(
                self, "down", _initial(self.output_scale), KERNEL_AXES["down"], (E, M, D)
            ),
        }
        choices, routing = route(self.config, x_BTD, router_DE, real_BT)
        capacity = None if dropless else self.config.capacity(x_BTD.shape[1])
        if capacity is None:
            out_BTD = self._dropless(x_BTD, choices, kernels)
        else:
            out_BTD, dropped = self._dropping(x_BTD, choices, kernels, capacity, places_T)
            routing = dataclasses.replace(routing, dropped=dropped)
        return out_BTD.astype(self.dtype), routing

    @property
    def gated(self) -> bool:
        return self.kind in GATED

    def _feed_forward(
        self, multiply: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array, kernels: Kernels
    ) -> jax.Array:
        """The experts' MLPs, float32 [..., D]; `multiply(x, kernel)` knows whose row is whose."""
        activation = ACTIVATIONS[self.kind]
        if self.gated:
            gate, up = (
                named(multiply(x, kernel).astype(self.dtype), "gate_up")
                for kernel in unstack(kernels["gate_up"], axis=1)
            )
            return multiply(activation(gate) * up, kernels["down"])
        up = named(multiply(x, kernels["up"]).astype(self.dtype), "gate_up")
        return multiply(activation(up), kernels["down"])

    # --- no token is dropped ----------------------------------------------------------------------

    def _dropless(self, x_BTD: jax.Array, choices: Choices, kernels: Kernels) -> jax.Array:
        """Every choice is computed. Float32 [B, T, D].

        On a mesh the tokens of all shards of the expert axis come together on each of them, which
        computes what is meant for its own experts; the sums go back to where the tokens are at
        home. Rows whose expert is elsewhere take memory, but no time in the products.
        """
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or mesh.size == 1:
            return self._grouped(x_BTD, choices, kernels)

        def local(x_BTD: jax.Array, choices: Choices, kernels: Kernels) -> jax.Array:
            gather = functools.partial(jax.lax.all_gather, tiled=True)
            kernels = {
                name: _gathered(kernel, KERNEL_AXES[name].index("embed"), self.dtype)
                for name, kernel in kernels.items()
            }
            x_BTD, choices = gather((x_BTD, choices), RULES["experts"])
            begin = jax.lax.axis_index(RULES["experts"]) * kernels["down"].shape[0]
            choices = dataclasses.replace(choices, experts=choices.experts - begin)
            part_BTD = jax.lax.psum(self._grouped(x_BTD, choices, kernels), RULES["mlp"])
            return jax.lax.psum_scatter(part_BTD, RULES["experts"], tiled=True)

        rows = fitting_spec(("activation_batch", "activation_time"), x_BTD.shape[:2])
        # A few prompts need not fill the shards: rows of padding do.
        batch = x_BTD.shape[0]
        padding = -batch % math.prod(mesh.shape[axis] for axis in RULES["activation_batch"])
        E = self.config.num_experts
        x_BTD = _pad_rows(x_BTD, padding, 0)
        choices = Choices(
            _pad_rows(choices.experts, padding, E), _pad_rows(choices.weights, padding, 0)
        )
        out_BTD = jax.shard_map(
            local,
            in_specs=(rows, rows, {name: spec(KERNEL_AXES[name]) for name in kernels}),
            out_specs=rows,
            check_vma=False,
        )(x_BTD, choices, kernels)
        return out_BTD[:batch]

    def _grouped(self, x_BTD: jax.Array, choices: Choices, kernels: Kernels) -> jax.Array:
        """The sum of the experts whose kernels are given; all others' choices count as 0."""
        E, K = kernels["down"].shape[0], self.config.experts_per_token
        experts_R = choices.experts.reshape(-1)
        experts_R = jnp.where((experts_R >= 0) & (experts_R < E), experts_R, E)
        order_R, sizes_E = _queues(experts_R, E)
        # Gathers of rows that are each read once: their gradients are no sums in changing order.
        x_RD = jnp.repeat(x_BTD.reshape(-1, x_BTD.shape[-1]), K, axis=0)
        x_RD = x_RD.at[order_R].get(unique_indices=True)
        y_RD = self._feed_forward(
            lambda x, kernel: grouped_product(x, kernel, sizes_E, self.dtype), x_RD, kernels
        )
        y_RD = y_RD.at[jnp.argsort(order_R)].get(unique_indices=True)
        return _weighted_sum(y_RD.reshape(*choices.weights.shape, -1), choices.weights)

    # --- up to a capacity -------------------------------------------------------------------------

    def _dropping(
        self,
        x_BTD: jax.Array,
        choices: Choices,
        kernels: Kernels,
        capacity: int,
        places_T: np.ndarray | None,
    ) -> tuple[jax.Array, jax.Array]:
        """Every expert takes its first `capacity` tokens of a row: all first choices in the order
        of their places, then all second ones (GShard, arXiv:2006.16668, algorithm 1).

        Returns:
          (float32 [B, T, D], float32 [] choices of real tokens dropped)
        """
        E, C = self.config.num_experts, capacity
        B, T, D = x_BTD.shape
        experts_BR = choices.experts.swapaxes(1, 2).reshape(B, -1)  # R = K·T here
        queues = jax.vmap(functools.partial(_queues, num_experts=E))
        if places_T is None:
            order_BR, sizes_BE = queues(experts_BR)
        else:
            in_turn_KT = np.arange(self.config.experts_per_token)[:, None] * T
            in_turn_R = (in_turn_KT + np.argsort(places_T)).reshape(-1)
            order_BR, sizes_BE = queues(experts_BR[:, in_turn_R])
            order_BR = jnp.asarray(in_turn_R, order_BR.dtype)[order_BR]
        begins_BE = jnp.cumsum(sizes_BE, axis=1) - sizes_BE

        taken_BEC = jnp.arange(C) < sizes_BE[..., None]
        from_BS = jnp.where(taken_BEC, begins_BE[..., None] + jnp.arange(C), 0).reshape(B, E * C)
        token_BS = jnp.take_along_axis(order_BR, from_BS, axis=1) % T
        x_BSD = jnp.take_along_axis(x_BTD, token_BS[..., None], axis=1)
        x_BECD = jnp.where(taken_BEC[..., None], x_BSD.reshape(B, E, C, D), 0)
        x_EBCD = _to_experts(x_BECD)
        multiply = jax.vmap(lambda x, kernel: product(x, kernel, self.dtype))
        y_EBCD = self._feed_forward(multiply, x_EBCD, kernels)
        y_BSD = _to_rows(y_EBCD).reshape(B, E * C, D)

        real_BR = experts_BR < E
        known_BR = jnp.where(real_BR, experts_BR, 0)
        place_BR = jnp.argsort(order_BR, axis=1) - jnp.take_along_axis(begins_BE, known_BR, axis=1)
        kept_BR = real_BR & (place_BR < C)
        slot_BR = jnp.where(kept_BR, known_BR * C + place_BR, 0)
        y_BRD = jnp.take_along_axis(y_BSD, slot_BR[..., None], axis=1)
        y_BRD = jnp.where(kept_BR[..., None], y_BRD, 0)
        y_BTKD = y_BRD.reshape(B, -1, T, D).swapaxes(1, 2)
        dropped = jnp.sum(real_BR & ~kept_BR, dtype=jnp.float32)
        return _weighted_sum(y_BTKD, choices.weights), dropped


def route(
    config: MoeConfig, x_BTD: jax.Array, router_DE: jax.Array, real_BT: jax.Array
) -> tuple[Choices, Routing]:
    """Softmax over all experts in float32, the most probable chosen; `dropped` is 0 yet."""
    logits_BTE = jnp.einsum(
        "btd,de->bte", x_BTD.astype(jnp.float32), router_DE, precision=jax.lax.Precision.HIGHEST
    )
    logits_BTE = constrain(logits_BTE, "activation_batch", "activation_time", None)
    probabilities_BTE = jax.nn.softmax(logits_BTE, axis=-1)
    # A sort and comparisons, which the partitioner leaves on their shards, unlike top_k.
    order_BTE = jnp.argsort(probabilities_BTE, axis=-1, descending=True)
    experts_BTK = order_BTE[..., : config.experts_per_token]
    chosen_BTKE = experts_BTK[..., None] == jnp.arange(config.num_experts)
    weights_BTK = jnp.sum(jnp.where(chosen_BTKE, probabilities_BTE[..., None, :], 0), axis=-1)
    if config.normalize_weights:
        weights_BTK = weights_BTK / jnp.sum(weights_BTK, axis=-1, keepdims=True)
    experts_BTK = jnp.where(real_BT[..., None], experts_BTK, config.num_experts)

    counted_BTKE = chosen_BTKE & real_BT[..., None, None]
    z_BT = jnp.square(jax.nn.logsumexp(logits_BTE, axis=-1))
    routing = Routing(
        counts=jnp.sum(counted_BTKE, axis=(0, 1, 2), dtype=jnp.float32),
        probabilities=jnp.sum(jnp.where(real_BT[..., None], probabilities_BTE, 0), axis=(0, 1)),
        z=jnp.sum(jnp.where(real_BT, z_BT, 0)),
        tokens=jnp.sum(real_BT, dtype=jnp.float32),
        dropped=jnp.zeros((), jnp.float32),
    )
    return Choices(experts_BTK, weights_BTK), routing


def _queues(experts_R: jax.Array, num_experts: int) -> tuple[jax.Array, jax.Array]:
    """Choices in the order of their experts, each expert's in the order given, and how many each
    has: int32 [R], [E]. Those of no expert (E) come last."""
    sizes_E = jnp.sum(experts_R[:, None] == jnp.arange(num_experts), axis=0, dtype=jnp.int32)
    return jnp.argsort(experts_R, stable=True), sizes_E


def _weighted_sum(y_BTKD: jax.Array, weights_BTK: jax.Array) -> jax.Array:
    return jnp.sum(y_BTKD * weights_BTK[..., None], axis=-2)


def _to_experts(x_BECD: jax.Array) -> jax.Array:
    """[E, B, C, D], tokens where their expert is: an all-to-all over the expert axis."""
    x_BECD = constrain(x_BECD, "activation_batch", None, "activation_time", None)
    x_EBCD = x_BECD.swapaxes(0, 1)
    return constrain(x_EBCD, *EXPERT_AXES)


def _to_rows(y_EBCD: jax.Array) -> jax.Array:
    """The inverse of `_to_experts`."""
    y_EBCD = constrain(y_EBCD, *EXPERT_AXES)
    return constrain(y_EBCD.swapaxes(0, 1), "activation_batch", None, "activation_time", None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gathered(kernel: jax.Array, axis: int, dtype: Any) -> jax.Array:
    """The whole of a kernel whose shards lie along an axis, inside a shard_map.

    It travels in `dtype`, to which products round it in any case; its gradient as it comes.
    """
    whole = jax.lax.all_gather(rounded(kernel, dtype), RULES["embed"], axis=axis, tiled=True)
    return whole.astype(kernel.dtype)


def _scattered(axis: int, dtype: Any, _: None, g: jax.Array) -> tuple[jax.Array]:
    del dtype
    return (jax.lax.psum_scatter(g, RULES["embed"], scatter_dimension=axis, tiled=True),)


_gathered.defvjp(lambda kernel, axis, dtype: (_gathered(kernel, axis, dtype), None), _scattered)


def _pad_rows(x: jax.Array, rows: int, value: float) -> jax.Array:
    return jnp.pad(x, [(0, rows)] + [(0, 0)] * (x.ndim - 1), constant_values=value)


def _initial(scale: float) -> Any:
    """As kernels of `layers.Projection` start; leading axes are of matrices side by side."""

    def init(rng: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        make = nn.initializers.variance_scaling(
            scale**2, "fan_in", "truncated_normal", batch_axis=range(len(shape) - 2)
        )
        return make(rng, shape)

    return init
