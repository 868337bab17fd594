"""Next-token cross-entropy that never holds the logits of a whole batch.

Legend: B batch, T time, C time positions of a chunk, D embed, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from llm_jax import sharding
from llm_jax.errors import UserError
from llm_jax.models import LanguageModel
from llm_jax.models.moe import Routing
from llm_jax.sharding import constrain
from llm_jax.step import Objective, Pooled
from llm_jax.types import Batch, Mean

Sums = dict[str, jax.Array]  # float32 [] each
Project = Callable[[jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """How the loss is computed."""

    # Positions of each row whose logits are held at once: [batch, chunk, vocab]. None = all.
    chunk: int | None = None
    z_loss: float = 0.0  # weight of logsumexp(logits)², which keeps logits from drifting
    # Only with model.moe. The weight of the load-balance loss, and that of the mean of the routers'
    # logsumexp². The former costs one more forward pass if there are several micro-batches.
    load_balance: float = 0.01
    router_z: float = 0.0

    def __post_init__(self) -> None:
        if self.chunk is not None and self.chunk < 1:
            raise UserError(
                f"loss.chunk={self.chunk} must be positive; leave it out for no chunks."
            )
        for name in ("z_loss", "load_balance", "router_z"):
            if not getattr(self, name) >= 0:
                raise UserError(f"loss.{name}={getattr(self, name)} must not be negative.")


@flax.struct.dataclass
class Whole:
    """Sums over the whole batch, of which the loss of a mixture of experts is made; float32.

    count: [], the loss weights. tokens: [], real tokens, once for every layer. choices: [E], tokens
    that choose each expert in any layer; None where nothing asks for them.
    """

    count: jax.Array
    tokens: jax.Array
    choices: jax.Array | None


def make_objective(model: LanguageModel, config: LossConfig) -> Objective:
    """The pre-training objective, (params, batch, rng) → (loss, metrics).

    loss is −log p(target) plus z_loss · logsumexp², summed with the batch's loss weights, in nats;
    its count is the sum of the weights. Metrics are "accuracy" (the target has the highest logit)
    and, where the loss has other parts, "cross_entropy" and "z_loss", those two of it. `rng` is
    dropout's.

    With a mixture of experts the loss has two more parts, which are metrics too: load_balance ·
    E Σ_e (C_e / N) (P_e / N) and router_z · mean of logsumexp(router logits)² (ST-MoE,
    arXiv:2202.08906, equation 5). C_e counts the choices of expert e, P_e sums the probabilities
    of it, and N counts real tokens, all of them pooled over the whole batch and all layers: the
    Switch Transformers' loss (arXiv:2101.03961, equation 4) for several choices a token, as
    `load_balancing_loss_func` of transformers generalises it. The objective then is `Pooled`.
    "dropped" is the share of choices past an expert's capacity, where there is one.

    Raises:
      UserError: a router_z for a model without experts.
    """
    moe = model.config.moe
    if moe is None and config.router_z:
        raise UserError(
            f"loss.router_z={config.router_z} is for a mixture of experts: leave it out, or set "
            "model.moe."
        )

    def objective(
        params: Any, batch: Batch, rng: jax.Array | None, whole: Whole | None = None
    ) -> tuple[Mean, dict[str, Mean]]:
        hidden_BTD, _, routing = model.apply_with_routing(
            params, batch.tokens, batch.positions, batch.segment_ids, rng=rng
        )
        weights_BT = batch.loss_weights.astype(jnp.float32)
        total, sums = _cross_entropy(
            model.project, config, hidden_BTD, model.output_kernel(params), batch.targets,
            weights_BT,
        )  # fmt: skip
        count = jnp.sum(weights_BT)
        metrics = {name: Mean(value, count) for name, value in sums.items()}
        if routing is not None:
            assert moe is not None
            metrics.setdefault("cross_entropy", Mean(total, count))
            added, more = _router_losses(config, routing, whole or _whole(config, count, routing))
            total += added
            metrics |= more
            if moe.capacity_factor is not None:
                metrics["dropped"] = Mean(routing.dropped, routing.tokens * moe.experts_per_token)
        return Mean(total, count), jax.lax.stop_gradient(metrics)

    def pool(params: Any, batch: Batch, rng: jax.Array | None) -> Whole:
        _, _, routing = model.apply_with_routing(
            params, batch.tokens, batch.positions, batch.segment_ids, rng=rng
        )
        assert routing is not None
        return _whole(config, jnp.sum(batch.loss_weights.astype(jnp.float32)), routing)

    return objective if moe is None else Pooled(pool, objective)


def _whole(config: LossConfig, count: jax.Array, routing: Routing) -> Whole:
    return Whole(count, routing.tokens, routing.counts if config.load_balance else None)


def _router_losses(
    config: LossConfig, routing: Routing, whole: Whole
) -> tuple[jax.Array, dict[str, Mean]]:
    """The rows' part of what the routers add to the loss, and the metrics of it.

    Only the probabilities and z depend on the parameters, and they enter linearly: with the rest
    taken from the whole batch, the parts of its rows add up.
    """
    tokens = jnp.maximum(whole.tokens, 1)
    means = {"router_z": Mean(routing.z, routing.tokens)}
    added = config.router_z * routing.z
    if whole.choices is not None:
        shares_E = jax.lax.stop_gradient(whole.choices / tokens)
        balance = shares_E.size * jnp.sum(shares_E * routing.probabilities)
        means["load_balance"] = Mean(balance, routing.tokens)
        added += config.load_balance * balance
    return added * whole.count / tokens, means


def token_nats(
    model: LanguageModel,
    params: Any,
    batch: Batch,
    chunk: int | None = None,
    rng: jax.Array | None = None,
) -> jax.Array:
    """−log p(target) of every position, float32 [batch, time], in nats, whatever its weight.

    Differentiable; the backward pass computes each chunk's logits again. Padding's values mean
    nothing. `rng` switches dropout on.
    """
    hidden_BTD, _ = model.apply(params, batch.tokens, batch.positions, batch.segment_ids, rng=rng)
    kernel_DV = model.output_kernel(params)

    def nats(hidden_BCD: jax.Array, targets_BC: jax.Array) -> jax.Array:
        logits_BCV = model.project(hidden_BCD, kernel_DV)
        return _log_normaliser(logits_BCV) - pick(logits_BCV, targets_BC)

    return over_time(nats, chunk, hidden_BTD, batch.targets)


def over_time(function: Callable[..., Any], chunk: int | None, *operands: jax.Array) -> Any:
    """`function(*operands)`, a tree of [batch, time, ...] as its operands are, by pieces of time.

    Differentiable; the backward pass computes each piece again. `chunk` is the length of a piece;
    None = one for all. Padding at the end of the last piece is zeros.
    """
    recomputed = jax.checkpoint(function)
    length = operands[0].shape[1]
    if chunk is None or chunk >= length:
        return recomputed(*operands)
    pieces = tuple(_split(x, chunk) for x in operands)
    results = jax.lax.map(lambda piece: recomputed(*piece), pieces)
    return jax.tree.map(lambda x: _join(x, length), results)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _cross_entropy(
    project: Project,
    config: LossConfig,
    hidden_BTD: jax.Array,
    kernel_DV: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
) -> tuple[jax.Array, Sums]:
    """The weighted sum over all tokens, and what the metrics need.

    Its gradient is made on the way forward, chunk by chunk, while the chunk's logits are at
    hand: they are neither kept nor computed again. No gradient flows to the weights, nor from
    the metrics' sums.
    """
    chunk = functools.partial(_chunk_sums, project, config.z_loss)
    return _over_chunks(
        config.chunk, lambda h, t, w: (chunk(h, kernel_DV, t, w), None),
        hidden_BTD, targets_BT, weights_BT,
    )[0]  # fmt: skip


def _cross_entropy_forward(project, config, hidden_BTD, kernel_DV, targets_BT, weights_BT):
    chunk = jax.value_and_grad(
        functools.partial(_chunk_sums, project, config.z_loss), argnums=(0, 1), has_aux=True
    )

    def sums_and_gradients(h, t, w):
        value, (hidden_gradient, kernel_gradient) = chunk(h, kernel_DV, t, w)
        return (value, kernel_gradient), hidden_gradient

    (value, kernel_gradient), hidden_gradient = _over_chunks(
        config.chunk, sums_and_gradients, hidden_BTD, targets_BT, weights_BT
    )
    return value, (hidden_gradient, kernel_gradient)


def _cross_entropy_backward(project, config, gradients, cotangents):
    total = cotangents[0]
    hidden_gradient, kernel_gradient = (
        (total * gradient).astype(gradient.dtype) for gradient in gradients
    )
    return hidden_gradient, kernel_gradient, None, None


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def _chunk_sums(
    project: Project,
    z_loss: float,
    hidden_BCD: jax.Array,
    kernel_DV: jax.Array,
    targets_BC: jax.Array,
    weights_BC: jax.Array,
) -> tuple[jax.Array, Sums]:
    """Total and metrics' sums of one chunk."""
    logits_BCV = project(hidden_BCD, kernel_DV)
    logits_BCV = constrain(logits_BCV, "activation_rows", "activation_time", "activation_vocab")
    normaliser_BC = _log_normaliser(logits_BCV)
    picked_BC = pick(logits_BCV, targets_BC)
    total = jnp.sum(weights_BC * (normaliser_BC - picked_BC))
    highest_BC = picked_BC >= jnp.max(logits_BCV, axis=-1)
    sums = {"accuracy": jnp.sum(weights_BC * highest_BC)}
    if z_loss:
        z_total = z_loss * jnp.sum(weights_BC * jnp.square(normaliser_BC))
        sums |= {"cross_entropy": total, "z_loss": z_total}
        total = total + z_total
    return total, sums


def _log_normaliser(logits: jax.Array) -> jax.Array:
    return jax.nn.logsumexp(logits, axis=-1)


def pick(logits_BCV: jax.Array, targets_BC: jax.Array) -> jax.Array:
    """Each target's logit. A comparison, not a gather: it fuses, and splits over the vocabulary."""
    vocabulary_V = jnp.arange(logits_BCV.shape[-1], dtype=targets_BC.dtype)
    return jnp.sum(jnp.where(vocabulary_V == targets_BC[..., None], logits_BCV, 0), axis=-1)


def _over_chunks(chunk, function, hidden_BTD, targets_BT, weights_BT):
    """Runs `function` over chunks of time: sums its first result, joins its second."""
    length = hidden_BTD.shape[1]
    if chunk is None or chunk >= length:
        return function(hidden_BTD, targets_BT, weights_BT)
    chunks = tuple(_split(x, chunk) for x in (hidden_BTD, targets_BT, weights_BT))
    shapes = jax.eval_shape(function, *(x[0] for x in chunks))[0]
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def body(sums, operands):
        added, kept = function(*operands)
        return jax.tree.map(jnp.add, sums, added), kept

    sums, kept = jax.lax.scan(body, zeros, chunks)
    return sums, jax.tree.map(lambda x: _join(x, length), kept)


def _split(x_BT: jax.Array, chunk: int) -> jax.Array:
    """[batch, time, ...] → [chunks, batch, chunk, ...], padded with zeros (weight 0).

    Every chunk has a part from each shard of time (S of them), so that all devices work on it.
    """
    batch, time = x_BT.shape[:2]
    shards = sharding.time_shards(time)
    piece = max(1, chunk // shards)
    x_BSR = x_BT.reshape(batch, shards, time // shards, *x_BT.shape[2:])
    padding = -(time // shards) % piece
    x_BSR = jnp.pad(x_BSR, [(0, 0), (0, 0), (0, padding)] + [(0, 0)] * (x_BT.ndim - 2))
    x_BSNC = x_BSR.reshape(batch, shards, -1, piece, *x_BT.shape[2:])
    x_NBC = jnp.moveaxis(x_BSNC, 2, 0).reshape(-1, batch, shards * piece, *x_BT.shape[2:])
    return constrain(
        x_NBC, None, "activation_rows", "activation_residual_time", *[None] * (x_BT.ndim - 2)
    )


def _join(x_NBC: jax.Array, time: int) -> jax.Array:
    """The inverse of `_split`."""
    chunks, batch, chunk = x_NBC.shape[:3]
    shards = sharding.time_shards(time)
    x_NBSC = x_NBC.reshape(chunks, batch, shards, chunk // shards, *x_NBC.shape[3:])
    x_BSNC = jnp.moveaxis(x_NBSC, 0, 2)
    x_BSR = x_BSNC.reshape(batch, shards, chunks * (chunk // shards), *x_NBC.shape[3:])
    return x_BSR[:, :, : time // shards].reshape(batch, time, *x_NBC.shape[3:])
