"""What the objectives of sampled completions share: ratios, clipping, divergences, entropy.

Legend: B batch, T time, N positions of the longest completion, C positions of a chunk of these,
D embed, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from llm_jax.models import LanguageModel
from llm_jax.objectives.lm import over_time, pick
from llm_jax.sharding import constrain
from llm_jax.types import Batch, Mean, RolloutBatch

# Estimators of KL(p ‖ q) from k1 = log p(x) − log q(x) of samples x ~ p; k1 and k3 are unbiased, k2
# and k3 never negative (Schulman 2020, http://joschu.net/blog/kl-approx.html). In a loss k1 is of
# no use: the expectation of its gradient is 0.
KL_ESTIMATORS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "k1": lambda k1: k1,
    "k2": lambda k1: jnp.square(k1) / 2,
    "k3": lambda k1: jnp.expm1(-k1) + k1,
}


@flax.struct.dataclass
class PolicyOutputs:
    """What a policy says of each target.

    logprobs: float32 [batch, time], log-probabilities of the targets. entropies: float32
    [batch, time], of the distributions that they are drawn from, in nats, exact. Where no target
    is counted both mean nothing. hidden: [batch, time, embed], the states after the final norm.
    """

    logprobs: jax.Array
    entropies: jax.Array
    hidden: jax.Array


def policy_outputs(
    model: LanguageModel,
    params: Any,
    batch: Batch,
    *,
    longest: int,
    temperature: float = 1.0,
    chunk: int | None = None,
    rng: jax.Array | None = None,
) -> PolicyOutputs:
    """The policy's distributions over targets at the temperature at which they were sampled.

    Logits are made where completions stand and nowhere else: prompts and padding need none. As in
    the sampler's log-probabilities, filters such as top-p are left out, and temperature 0 reads as
    1. Differentiable; the backward pass computes each chunk's logits again.

    Args:
      batch: a Batch of [batch, time], the counted targets of a row side by side.
      longest: how many targets of a row are counted at most.
      chunk: positions of each row whose logits are held at once; None = all.
      rng: switches dropout on.
    """
    hidden_BTD, _ = model.apply(params, batch.tokens, batch.positions, batch.segment_ids, rng=rng)
    kernel_DV = model.output_kernel(params)
    longest = min(longest, batch.tokens.shape[1])
    first_B = _first_counted(batch.loss_weights, longest)
    places_BN = first_B[:, None] + jnp.arange(longest)

    def read(hidden_BCD: jax.Array, targets_BC: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits_BCV = model.project(hidden_BCD, kernel_DV) / (temperature or 1.0)
        logits_BCV = constrain(logits_BCV, "activation_rows", "activation_time", "activation_vocab")
        normaliser_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
        expected_BC = jnp.sum(jax.nn.softmax(logits_BCV, axis=-1) * logits_BCV, axis=-1)
        return pick(logits_BCV, targets_BC) - normaliser_BC, normaliser_BC - expected_BC

    hidden_BND = jnp.take_along_axis(hidden_BTD, places_BN[..., None], axis=1)
    targets_BN = jnp.take_along_axis(batch.targets, places_BN, axis=1)
    logprobs_BN, entropies_BN = over_time(read, chunk, hidden_BND, targets_BN)
    inside_BT = jnp.clip(jnp.arange(batch.tokens.shape[1]) - first_B[:, None], 0, longest - 1)
    logprobs_BT, entropies_BT = (
        jnp.take_along_axis(values_BN, inside_BT, axis=1)
        for values_BN in (logprobs_BN, entropies_BN)
    )
    return PolicyOutputs(logprobs_BT, entropies_BT, hidden_BTD)


def _first_counted(weights_BT: jax.Array, longest: int) -> jax.Array:
    """Where each row's first counted target stands, or before: `longest` positions follow it."""
    return jnp.minimum(jnp.argmax(weights_BT > 0, axis=1), weights_BT.shape[1] - longest)


@flax.struct.dataclass
class Surrogate:
    """The clipped policy loss of each token; everything is [batch, time].

    loss: float32, −min(ρA, clip(ρ, 1 − low, 1 + high) A) for the ratio ρ and the advantage A.
    ratio: float32, ρ. clipped_low, clipped_high: bool, where the clipping takes the gradient away,
    below and above.
    """

    loss: jax.Array
    ratio: jax.Array
    clipped_low: jax.Array
    clipped_high: jax.Array


def clipped_surrogate(
    log_ratio_BT: jax.Array, advantages_BT: jax.Array, low: float, high: float
) -> Surrogate:
    """PPO's objective as a loss (arXiv:1707.06347, eq. 7), with a bound for either side."""
    ratio_BT = jnp.exp(log_ratio_BT)
    clipped_BT = jnp.clip(ratio_BT, 1 - low, 1 + high)
    return Surrogate(
        loss=-jnp.minimum(ratio_BT * advantages_BT, clipped_BT * advantages_BT),
        ratio=ratio_BT,
        clipped_low=(ratio_BT < 1 - low) & (advantages_BT < 0),
        clipped_high=(ratio_BT > 1 + high) & (advantages_BT > 0),
    )


def log_ratios(logprobs_BT: jax.Array, before_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """logprobs − before, float32 [batch, time], and 0 outside the mask.

    What stands outside must not reach an exponential: an infinity there would make the gradients
    of everything NaN.
    """
    return jnp.where(mask_BT, logprobs_BT - before_BT, 0.0)


def masked_mean(values_BT: jax.Array, mask_BT: jax.Array) -> Mean:
    """The sum of the values inside the mask, and their number."""
    total = jnp.sum(jnp.where(mask_BT, values_BT, 0.0))
    return Mean(total, jnp.sum(mask_BT).astype(jnp.float32))


def policy_metrics(
    batch: RolloutBatch,
    surrogate: Surrogate,
    logprobs_BT: jax.Array,
    entropies_BT: jax.Array,
    mask_BT: jax.Array,
) -> dict[str, Mean]:
    """Means over the tokens of completions, without gradient.

    "ratio"; "clip_fraction", the share of tokens whose gradient is clipped away, which is the sum
    of "clip_fraction_low" and "clip_fraction_high"; "entropy"; "approx_kl" from the policy that
    sampled to this one; with a reference "kl" from this policy to it. Both are k3, in nats per
    token.
    """
    k3 = KL_ESTIMATORS["k3"]
    sampled_k1_BT = -log_ratios(logprobs_BT, batch.old_logprobs, mask_BT)
    by_token = {
        "ratio": surrogate.ratio,
        "clip_fraction": surrogate.clipped_low | surrogate.clipped_high,
        "clip_fraction_low": surrogate.clipped_low,
        "clip_fraction_high": surrogate.clipped_high,
        "entropy": entropies_BT,
        "approx_kl": k3(sampled_k1_BT),
    }
    if batch.reference_logprobs is not None:
        by_token["kl"] = k3(log_ratios(logprobs_BT, batch.reference_logprobs, mask_BT))
    means = {name: masked_mean(x, mask_BT) for name, x in by_token.items()}
    return jax.lax.stop_gradient(means)
