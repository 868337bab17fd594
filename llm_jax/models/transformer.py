"""The decoder-only transformer, as flax modules.

Legend: B batch, T time, D embed, V vocabulary, K key/value heads, G query heads per key/value head,
F = G + 2 heads that one product makes together (queries, key, value), N = K·G query heads,
H head dimension, R half of the rotated dimensions.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from flax import linen as nn

from llm_jax.models.attention import attention, attention_entropy
from llm_jax.models.cache import KVCache, LayerCache, write
from llm_jax.models.config import ModelConfig
from llm_jax.models.context import context_ways, zigzag
from llm_jax.models.layers import MLP, Norm, Projection, parameter
from llm_jax.models.moe import MixtureOfExperts, Routing
from llm_jax.models.pipeline import pipeline, stages
from llm_jax.models.remat import named, policy
from llm_jax.models.ring import context_attention
from llm_jax.models.rope import RopeConfig, apply_rotary, rotary_tables
from llm_jax.sharding import constrain

RESIDUAL_AXES = ("activation_batch", "activation_residual_time", "activation_embed")
BRANCH_AXES = ("activation_batch", "activation_time", "activation_embed")
ROWS_AXES = ("activation_rows", "activation_residual_time", "activation_embed")
HEADS_AXES = ("activation_batch", "activation_heads")

# flax's collection of what is looked at: it is there only where `apply` is told to collect it.
INTERMEDIATES = "intermediates"


@flax.struct.dataclass
class Row:
    """What all layers share about the rows they see.

    rotation, local_rotation: sine and cosine of RoPE's angles, float32 [B, T, R] each, the latter
      for layers with a window; None with learned positions.
    query_segment_ids: int32 [B, T]; key_segment_ids: int32 [B, S].
    lengths: int32 [B], tokens in the cache before these; None without a cache.
    """

    rotation: tuple[jax.Array, jax.Array] | None
    local_rotation: tuple[jax.Array, jax.Array] | None
    query_segment_ids: jax.Array | None
    key_segment_ids: jax.Array | None
    lengths: jax.Array | None


class Attention(nn.Module):
    config: ModelConfig
    backend: str
    window: int | None

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, row: Row, cache: LayerCache | None
    ) -> tuple[jax.Array, LayerCache | None]:
        config = self.config
        D, K, G, H = config.embed_dim, config.kv_heads, config.group, config.resolved_head_dim
        qkv_BTKFH = Projection(
            (K, G + 2, D, H), config.dtype, config.attention_bias != "none", lora=config.lora,
            matmul=config.matmul, name="qkv",
        )(x_BTD)  # fmt: skip
        q_BTKGH, k_BTK1H, v_BTK1H = jnp.split(qkv_BTKFH, (G, G + 1), axis=3)
        if config.qk_norm != "none":
            norm = functools.partial(_norm, config, 1 if config.qk_norm == "head" else 3)
            q_BTKGH = norm(name="query_norm")(q_BTKGH)
            k_BTK1H = norm(name="key_norm")(k_BTK1H)
        q_BKGTH, k_BK1TH, v_BK1TH = (
            constrain(part.transpose(0, 2, 3, 1, 4), *HEADS_AXES, None, "activation_time", None)
            for part in (q_BTKGH, k_BTK1H, v_BTK1H)
        )
        rotation = row.rotation if self.window is None else row.local_rotation
        if rotation is not None:
            sin, cos = (table[:, None, None] for table in rotation)
            q_BKGTH = apply_rotary(q_BKGTH, sin, cos)
            k_BK1TH = apply_rotary(k_BK1TH, sin, cos)
        q_BKGTH, k_BKTH, v_BKTH = (
            named(part, "qkv") for part in (q_BKGTH, k_BK1TH[:, :, 0], v_BK1TH[:, :, 0])
        )

        backend, places_BT = self.backend, None
        if cache is not None:
            assert row.lengths is not None
            cache = (
                write(cache[0], k_BKTH, row.lengths, axis=1),
                write(cache[1], v_BKTH, row.lengths, axis=1),
            )
            k_BKTH, v_BKTH = cache
            # Where a row's queries stand is known at run time only, and the flash kernels compile
            # their causal mask in.
            backend = "einsum"
            places_BT = row.lengths[:, None] + jnp.arange(x_BTD.shape[1])
        drop = config.attention_dropout > 0 and self.has_rng("dropout")
        if self.is_mutable_collection(INTERMEDIATES):
            entropy_BKGT = attention_entropy(
                q_BKGTH, k_BKTH, row.query_segment_ids, scale=config.attention_scale,
                window=self.window, soft_cap=config.attention_soft_cap,
            )  # fmt: skip
            entropy_BNT = entropy_BKGT.reshape(entropy_BKGT.shape[0], K * G, -1)
            self.sow(INTERMEDIATES, "entropy", entropy_BNT)
        settings: dict[str, Any] = {
            "backend": backend,
            "scale": config.attention_scale,
            "window": self.window,
            "soft_cap": config.attention_soft_cap,
        }
        if cache is None and context_ways(x_BTD.shape[1], backend) > 1:
            out_BKGTH = context_attention(
                q_BKGTH, k_BKTH, v_BKTH, row.query_segment_ids, kind=config.context_attention,
                **settings,
            )  # fmt: skip
        else:
            out_BKGTH = attention(
                q_BKGTH,
                k_BKTH,
                v_BKTH,
                query_segment_ids_BT=row.query_segment_ids,
                key_segment_ids_BS=row.key_segment_ids,
                query_places_BT=places_BT,
                dropout=config.attention_dropout,
                dropout_rng=self.make_rng("dropout") if drop else None,
                **settings,
            )
        out_BNTH = out_BKGTH.reshape(out_BKGTH.shape[0], K * G, -1, H)
        output = Projection(
            (K * G, H, D), config.dtype, config.attention_bias == "all", _residual_scale(config),
            config.lora, config.matmul, name="output",
        )  # fmt: skip
        return output(out_BNTH.swapaxes(1, 2)), cache


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)); with norms after the branches, x +
    norm(attention(x)); in parallel, x + attention(norm(x)) + MLP(norm'(x))."""

    config: ModelConfig
    backend: str
    window: int | None

    @nn.compact
    def __call__(self, x_BTD: jax.Array, row: Row, cache: LayerCache | None) -> Any:
        config = self.config
        before, after = (config.norm_placement in (place, "both") for place in ("before", "after"))
        dropout = nn.Dropout(config.residual_dropout, deterministic=not self.has_rng("dropout"))

        def enter(x_BTD: jax.Array, branch: str) -> jax.Array:
            x_BTD = _norm(config, name=f"{branch}_norm")(x_BTD) if before else x_BTD
            # Products split heads and MLPs over the tensor axis: what they read is gathered over
            # it, else their kernels would be.
            return constrain(x_BTD, *BRANCH_AXES)

        def leave(added_BTD: jax.Array, branch: str) -> jax.Array:
            added_BTD = constrain(added_BTD, *BRANCH_AXES)  # and so their gradients
            if after:
                added_BTD = _norm(config, name=f"{branch}_post_norm")(added_BTD)
            return dropout(added_BTD)

        x_BTD = named(x_BTD, "block_input")
        attend = Attention(config, self.backend, self.window, name="attention")
        added_BTD, cache = attend(enter(x_BTD, "attention"), row, cache)
        attended_BTD = constrain(x_BTD + leave(added_BTD, "attention"), *RESIDUAL_AXES)
        attended_BTD = named(attended_BTD, "attended")
        read_BTD = enter(x_BTD if config.parallel_residual else attended_BTD, "mlp")
        added_BTD, routing = self._mlp(read_BTD, row)
        x_BTD = constrain(attended_BTD + leave(added_BTD, "mlp"), *RESIDUAL_AXES)
        return x_BTD, cache, routing

    def _mlp(self, x_BTD: jax.Array, row: Row) -> tuple[jax.Array, Routing | None]:
        config, scale = self.config, _residual_scale(self.config)
        if config.moe is None:
            mlp = MLP(config.mlp, config.embed_dim, config.mlp_dim, config.dtype, config.mlp_bias,
                      scale, config.lora, config.matmul, name="mlp")  # fmt: skip
            return mlp(x_BTD), None
        experts = MixtureOfExperts(config.moe, config.mlp, config.embed_dim, config.mlp_dim,
                                   config.dtype, scale, config.width_multiplier**-0.5,
                                   name="moe")  # fmt: skip
        real_BT = jnp.ones(x_BTD.shape[:2], bool)
        if row.query_segment_ids is not None:
            real_BT = row.query_segment_ids != 0
        # Which tokens an expert drops depends on all of the row, and a cached row comes in parts.
        if row.lengths is not None:
            return experts(x_BTD, real_BT, dropless=True)
        ways = context_ways(x_BTD.shape[1], self.backend)
        places_T = zigzag(x_BTD.shape[1], ways) if ways > 1 else None
        return experts(x_BTD, real_BT, places_T, dropless=False)


class Group(nn.Module):
    """One repetition of the attention pattern: the body that `scan_layers` loops over.

    With a `repeat` the parameters have a leading axis, and those at its place there are used.
    """

    config: ModelConfig
    backend: str

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, row: Row, caches: Any, repeat: jax.Array | None = None
    ) -> tuple[jax.Array, Any]:
        block = _remat_block(self.config, repeat)
        kept, routings = [], []
        for place, window in enumerate(self.config.windows):
            cache = None if caches is None else caches[place]
            layer = block(self.config, self.backend, window, name=f"block_{place}")
            x_BTD, cache, routing = layer(x_BTD, row, cache)
            kept.append(cache)
            routings.append(routing)
        return x_BTD, (None if caches is None else tuple(kept), tuple(routings))


class Transformer(nn.Module):
    config: ModelConfig
    backend: str

    @nn.compact
    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array | None,
        segment_ids_BT: jax.Array | None,
        cache: KVCache | None,
    ) -> tuple[jax.Array, KVCache | None, Routing | None]:
        config = self.config
        V, D = config.vocab_size, config.embed_dim
        assert V is not None
        init: Any = nn.initializers.normal(0.02)
        table_VD = parameter(self, "embedding", init, ("vocab", "embed"), (V, D))
        if not config.tie_embeddings:
            # muP: as wide a spread as the base's, whose deviation is 1/√embed_dim.
            init = nn.initializers.variance_scaling(
                config.width_multiplier, "fan_in", "truncated_normal"
            )
            parameter(self, "output", init, ("embed", "vocab"), (D, V))
        row, positions_BT, cache = _row(config, tokens_BT, positions_BT, segment_ids_BT, cache)
        # The rows of the table are gathered whole in the embed dimension, which the batch's mesh
        # axis would otherwise cut, but stay split over the vocabulary.
        table_VD = constrain(table_VD, "vocab", None).astype(config.dtype)
        x_BTD = constrain(jnp.take(table_VD, tokens_BT, axis=0), *ROWS_AXES)
        if config.scale_embeddings:
            factor = math.sqrt(config.mup_base_width or D)
            x_BTD *= jnp.asarray(factor, config.dtype)  # rounded, as published models have it
        if config.position == "learned":
            init = nn.initializers.normal(0.01)
            shape = (config.max_length, D)
            table = parameter(self, "position_embedding", init, ("positions", "embed"), shape)
            # Padding may stand past the table; a row of NaNs there would reach all other rows.
            x_BTD += jnp.take(table.astype(config.dtype), positions_BT, axis=0, mode="clip")
            x_BTD = constrain(x_BTD, *ROWS_AXES)
        if config.neftune_alpha and self.has_rng("dropout"):
            x_BTD += _embedding_noise(
                self.make_rng("dropout"), config.neftune_alpha, x_BTD, segment_ids_BT
            )
        caches: Any = None if cache is None else cache.layers
        routings: Any
        if config.scan_layers and stages() > 1 and cache is None and not self.is_initializing():
            x_BTD, routings = self._pipeline(x_BTD, row)
        elif config.scan_layers:
            x_BTD, (caches, routings) = nn.scan(
                Group,
                variable_axes={"params": 0, INTERMEDIATES: 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(nn.broadcast, 0),
                length=config.num_layers // len(config.windows),
                metadata_params={nn.PARTITION_NAME: "layers"},
            )(config, self.backend, name="layers")(x_BTD, row, caches)
            routings = [jax.tree.map(lambda x: jnp.sum(x, axis=0), part) for part in routings]
        else:
            kept, routings = [], []
            block = _remat_block(config)
            for i in range(config.num_layers):
                layer = block(config, self.backend, config.layer_window(i), name=f"layer_{i}")
                x_BTD, kept_i, routing = layer(x_BTD, row, None if caches is None else caches[i])
                kept.append(kept_i)
                routings.append(routing)
            caches = tuple(kept)
        x_BTD = constrain(_norm(config, name="final_norm")(x_BTD), *ROWS_AXES)
        if cache is not None:
            assert row.query_segment_ids is not None
            grown = jnp.sum(row.query_segment_ids != 0, axis=1, dtype=jnp.int32)
            cache = dataclasses.replace(cache, layers=caches, lengths=cache.lengths + grown)
        routing = None if config.moe is None else functools.reduce(operator.add, routings)
        return x_BTD, cache, routing

    def _pipeline(self, x_BTD: jax.Array, row: Row) -> tuple[jax.Array, Any]:
        """The scanned layers, in the stages of the mesh."""
        group = Group(self.config, self.backend, parent=None)

        def apply(
            params: Any, x_BTD: jax.Array, row: Row, rng: jax.Array | None, repeat: Any
        ) -> tuple[jax.Array, Any]:
            rngs = None if rng is None else {"dropout": rng}
            x_BTD, (_, routings) = group.apply(
                {"params": params}, x_BTD, row, None, repeat, rngs=rngs
            )
            return x_BTD, routings

        rng = self.make_rng("dropout") if self.has_rng("dropout") else None
        params: Any = self.get_variable("params", "layers")
        return pipeline(apply, params, x_BTD, row, self.config, rng)


def _row(
    config: ModelConfig,
    tokens_BT: jax.Array,
    positions_BT: jax.Array | None,
    segment_ids_BT: jax.Array | None,
    cache: KVCache | None,
) -> tuple[Row, jax.Array, Any]:
    """The layers' shared inputs, positions, and the cache with the new tokens' segment ids."""
    before: jax.Array | None = None
    held: jax.Array | int = tokens_BT.shape[1]
    key_segment_ids_BS = segment_ids_BT
    if cache is not None:
        before = cache.lengths
        if segment_ids_BT is None:
            segment_ids_BT = jnp.ones_like(tokens_BT)
        held = before + jnp.sum(segment_ids_BT != 0, axis=1)
        key_segment_ids_BS = write(cache.segment_ids, segment_ids_BT, before, axis=0)
        cache = dataclasses.replace(cache, segment_ids=key_segment_ids_BS)
    if positions_BT is None:
        positions_BT = jnp.arange(tokens_BT.shape[1])[None]
        if before is not None:
            positions_BT = positions_BT + before[:, None]

    def rotation(rope: RopeConfig) -> tuple[jax.Array, jax.Array] | None:
        if config.position == "learned":
            return None
        return rotary_tables(rope, config.resolved_head_dim, positions_BT, held)

    everywhere = rotation(config.rope)
    local = everywhere if config.local_rope is None else rotation(config.local_rope)
    row = Row(everywhere, local, segment_ids_BT, key_segment_ids_BS, before)
    return row, positions_BT, cache


def _norm(config: ModelConfig, dimensions: int = 1, *, name: str) -> Norm:
    return Norm(config.norm, config.norm_epsilon, config.norm_plus_one, config.dtype, dimensions,
                name=name)  # fmt: skip


def _embedding_noise(
    rng: jax.Array, alpha: float, x_BTD: jax.Array, segment_ids_BT: jax.Array | None
) -> jax.Array:
    """NEFTune (arXiv:2310.05914): uniform in ±alpha / √(length·D), like x; none on padding.

    A token's length is that of its own document in the row, so that packing changes no noise.
    """
    B, T, D = x_BTD.shape
    if segment_ids_BT is None:
        reach_BT = jnp.full((B, T), alpha / math.sqrt(T * D))
    else:
        same_BTT = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
        reach_BT = alpha / jnp.sqrt(jnp.sum(same_BTT, axis=-1) * D)
        reach_BT = jnp.where(segment_ids_BT != 0, reach_BT, 0)
    noise_BTD = jax.random.uniform(rng, (B, T, D), minval=-1, maxval=1)
    return (noise_BTD * reach_BT[:, :, None]).astype(x_BTD.dtype)


def _residual_scale(config: ModelConfig) -> float:
    """Keeps the residual stream's variance at init independent of depth (the GPT-2 report)."""
    return 1 / math.sqrt(2 * config.num_layers)


def _remat_block(config: ModelConfig, repeat: jax.Array | None = None) -> Any:
    block: Any = Block
    rule: Any = None if config.remat == "none" else policy(config.remat)
    if repeat is not None:
        # Inside what is computed again, so that the backward pass keeps no copy of the parameters
        # for every repeat and micro-batch; without remat it looks up these (and little else) again.
        block = nn.map_variables(
            Block,
            "params",
            lambda params: jax.tree.map(lambda x: jnp.take(x, repeat, axis=0, mode="clip"), params),
        )
        rule = rule or (lambda primitive, *_, **__: primitive is not jax.lax.gather_p)
    if rule is None:
        return block
    # A scanned body with one block is never merged with its own recomputation, so the barriers
    # that keep the compiler from doing so are left out there.
    alone = config.scan_layers and len(config.windows) == 1
    return nn.remat(block, policy=rule, prevent_cse=not alone)
