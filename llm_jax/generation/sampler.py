"""Token choice: repetition penalty, temperature, top-k, top-p, min-p, in this order.

Legend: B batch, V vocabulary, C candidates.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from llm_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """How the next token is chosen; the defaults sample from the model's own distribution."""

    temperature: float = 1.0  # logits are divided by it; 0 = the most probable token (greedy)
    top_k: int | None = None  # keep the k most probable tokens; None = all
    # Keep the fewest most probable tokens whose probabilities reach top_p together, among those
    # that top_k kept (nucleus sampling, arXiv:1904.09751); None or 1 = all.
    top_p: float | None = None
    # Keep the tokens whose probability is at least min_p times the highest, at the temperature
    # (arXiv:2407.01082). The ratio is the same before and after the other filters. None or 0 = all.
    min_p: float | None = None
    # Logits of tokens that the prompt or the continuation holds are divided by it where positive,
    # multiplied by it where negative (CTRL, arXiv:1909.05858); 1 = off.
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise UserError(f"sampler.temperature={self.temperature} must be 0 (greedy) or above.")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"sampler.top_k={self.top_k} must be at least 1; leave it out for all.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"sampler.top_p={self.top_p} must lie in (0, 1].")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise UserError(f"sampler.min_p={self.min_p} must lie in [0, 1].")
        penalty = self.repetition_penalty
        if not (penalty > 0 and math.isfinite(penalty)):
            raise UserError(f"sampler.repetition_penalty={penalty} must be above 0; 1 = none.")

    @property
    def nucleus(self) -> float:
        """top_p as a number; 1 = all."""
        return 1.0 if self.top_p is None else self.top_p

    @property
    def penalizes(self) -> bool:
        """Whether the choice depends on which tokens were there before."""
        return self.repetition_penalty != 1


def sample(
    logits_BV: jax.Array,
    rng_B: jax.Array,
    config: SamplerConfig,
    seen_BV: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """One token a row, and its log-probability under the model.

    Args:
      logits_BV: float32 [batch, vocab].
      rng_B: typed PRNG keys [batch], one a row: a row's token depends on nothing else in the batch.
      config: the sampler.
      seen_BV: bool [batch, vocab], the tokens that the row holds; None = none of them.

    Returns:
      tokens: int32 [batch].
      logprobs: float32 [batch], `logprob` of the tokens.
    """
    penalized_BV = logits_BV if seen_BV is None else penalize(logits_BV, seen_BV, config)
    if config.temperature == 0:
        tokens_B = jnp.argmax(penalized_BV, axis=-1)
    else:
        scaled_BC, ids_BC = candidates(penalized_BV, config)
        places_B = jax.vmap(jax.random.categorical)(rng_B, scaled_BC)
        tokens_B = jnp.take_along_axis(ids_BC, places_B[:, None], axis=1)[:, 0]
    tokens_B = tokens_B.astype(jnp.int32)
    return tokens_B, logprob(logits_BV, tokens_B, config)


def logprob(logits_BV: jax.Array, tokens_B: jax.Array, config: SamplerConfig) -> jax.Array:
    """log-softmax(logits / temperature)[token], float32 [batch]: what a trainer recomputes.

    Penalty and filters are left out on purpose: a policy is trained on the whole distribution at
    its temperature, and a trainer has no way to know which tokens were kept. At temperature 0 the
    logits are taken as they are, as at temperature 1.
    """
    scaled_BV = logits_BV / (config.temperature or 1.0)
    logprobs_BV = jax.nn.log_softmax(scaled_BV, axis=-1)
    return jnp.take_along_axis(logprobs_BV, tokens_B[:, None], axis=1)[:, 0]


def penalize(logits_BV: jax.Array, seen_BV: jax.Array, config: SamplerConfig) -> jax.Array:
    """The logits, float32 [batch, vocab], with those of seen tokens made less probable."""
    penalty = config.repetition_penalty
    lower_BV = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return jnp.where(seen_BV, lower_BV, logits_BV)


def candidates(logits_BV: jax.Array, config: SamplerConfig) -> tuple[jax.Array, jax.Array]:
    """The tokens among which a sampler of some temperature chooses.

    Exactly min(top_k, V) tokens pass top-k; equal logits rank by token id. A token passes top-p if
    the probabilities before it, renormalised over those that passed top-k, sum to less than top_p:
    so the first one always does, and so it does under min-p.

    Returns:
      scaled_BC: float32 [batch, candidates], logits over temperature; -inf where top-p or min-p
        left the token out. Their softmax is the sampling distribution.
      ids_BC: int32 [batch, candidates], their tokens: the most probable first where top-k or top-p
        rank them, else in the vocabulary's order.
    """
    scaled_BC, ids_BC = _ranked(logits_BV / config.temperature, config)
    kept_BC = jnp.ones(scaled_BC.shape, bool)
    if config.nucleus < 1:
        probabilities_BC = jax.nn.softmax(scaled_BC, axis=-1)
        before_BC = jnp.cumsum(probabilities_BC, axis=-1) - probabilities_BC
        # The subtraction rounds; rank 0 has nothing before it, whatever the arithmetic says.
        kept_BC = (before_BC < config.nucleus) | (jnp.arange(scaled_BC.shape[1]) == 0)
    if config.min_p:
        highest_B1 = jnp.max(scaled_BC, axis=-1, keepdims=True)
        kept_BC &= scaled_BC >= highest_B1 + math.log(config.min_p)
    return jnp.where(kept_BC, scaled_BC, -jnp.inf), ids_BC


def _ranked(scaled_BV: jax.Array, config: SamplerConfig) -> tuple[jax.Array, jax.Array]:
    """The top_k tokens in order of probability; all of them unsorted where no filter ranks."""
    vocab = scaled_BV.shape[-1]
    if config.top_k is None and config.nucleus == 1:
        return scaled_BV, jnp.broadcast_to(jnp.arange(vocab), scaled_BV.shape)
    scaled_BC, ids_BC = jax.lax.top_k(scaled_BV, min(config.top_k or vocab, vocab))
    return scaled_BC, ids_BC
