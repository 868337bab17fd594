"""Token choice: temperature, then top-k, then top-p.

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

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise UserError(f"sampler.temperature={self.temperature} must be 0 (greedy) or above.")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"sampler.top_k={self.top_k} must be at least 1; leave it out for all.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"sampler.top_p={self.top_p} must lie in (0, 1].")

    @property
    def filters(self) -> bool:
        """Whether some tokens are left out."""
        return self.top_k is not None or (self.top_p is not None and self.top_p < 1)


def sample(
    logits_BV: jax.Array, rng_B: jax.Array, config: SamplerConfig
) -> tuple[jax.Array, jax.Array]:
    """One token a row, and its log-probability under the model.

    Args:
      logits_BV: float32 [batch, vocab].
      rng_B: typed PRNG keys [batch], one a row: a row's token depends on nothing else in the batch.
      config: the sampler.

    Returns:
      tokens: int32 [batch].
      logprobs: float32 [batch], `logprob` of the tokens.
    """
    if config.temperature == 0:
        tokens_B = jnp.argmax(logits_BV, axis=-1)
    elif not config.filters:
        tokens_B = jax.vmap(jax.random.categorical)(rng_B, logits_BV / config.temperature)
    else:
        scaled_BC, ids_BC = candidates(logits_BV, config)
        places_B = jax.vmap(jax.random.categorical)(rng_B, scaled_BC)
        tokens_B = jnp.take_along_axis(ids_BC, places_B[:, None], axis=1)[:, 0]
    tokens_B = tokens_B.astype(jnp.int32)
    return tokens_B, logprob(logits_BV, tokens_B, config)


def logprob(logits_BV: jax.Array, tokens_B: jax.Array, config: SamplerConfig) -> jax.Array:
    """log-softmax(logits / temperature)[token], float32 [batch]: what a trainer recomputes.

    The filters are left out on purpose: a policy is trained on the whole distribution at its
    temperature, and a trainer has no way to know which tokens were kept. At temperature 0 the
    logits are taken as they are, as at temperature 1.
    """
    scaled_BV = logits_BV / (config.temperature or 1.0)
    logprobs_BV = jax.nn.log_softmax(scaled_BV, axis=-1)
    return jnp.take_along_axis(logprobs_BV, tokens_B[:, None], axis=1)[:, 0]


def candidates(logits_BV: jax.Array, config: SamplerConfig) -> tuple[jax.Array, jax.Array]:
    """The tokens among which a filtering sampler chooses, the most probable first.

    Exactly min(top_k, V) tokens pass top-k; equal logits rank by token id. A token passes top-p if
    the probabilities before it, renormalised over those that passed top-k, sum to less than top_p:
    so the first one always does.

    Returns:
      scaled_BC: float32 [batch, candidates], logits over temperature; -inf where top-p left the
        token out. Their softmax is the sampling distribution.
      ids_BC: int32 [batch, candidates], their tokens.
    """
    vocab = logits_BV.shape[-1]
    count = vocab if config.top_k is None else min(config.top_k, vocab)
    scaled_BC, ids_BC = jax.lax.top_k(logits_BV / config.temperature, count)
    if config.top_p is not None and config.top_p < 1:
        probabilities_BC = jax.nn.softmax(scaled_BC, axis=-1)
        before_BC = jnp.cumsum(probabilities_BC, axis=-1) - probabilities_BC
        # The subtraction rounds; rank 0 has nothing before it, whatever the arithmetic says.
        kept_BC = (before_BC < config.top_p) | (jnp.arange(count) == 0)
        scaled_BC = jnp.where(kept_BC, scaled_BC, -jnp.inf)
    return scaled_BC, ids_BC
