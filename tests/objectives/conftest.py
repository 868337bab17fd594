"""Fixtures: sampled completions, and a policy that compiles in no time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.models import LanguageModel, ModelConfig
from llm_jax.types import Batch, RolloutBatch

PROMPT, TIME, VOCABULARY = 2, 8, 32


class Bigram(LanguageModel):
    """A language model without layers."""

    def apply_with_routing(
        self, params, tokens, positions=None, segment_ids=None, *, rng=None, cache=None
    ):
        return jnp.tanh(params["embedding"][tokens]), cache, None


@pytest.fixture(scope="session")
def bigram():
    """The model and its parameters."""
    table = jax.random.normal(jax.random.key(0), (VOCABULARY, 16))
    return Bigram(ModelConfig(vocab_size=VOCABULARY, embed_dim=16)), {"embedding": table}


@pytest.fixture(scope="session")
def make_rollouts():
    """`make_rollouts(lengths, seed, **fields)`: completions of so many tokens after prompts of two.

    Everything that a policy and a critic need is drawn at random; outside the completions stands
    what makes an infinity of an exponential that it gets into.
    """

    def make(lengths, seed=0, **fields):
        draw = np.random.default_rng(seed)
        lengths, place = np.array(lengths)[:, None], np.arange(TIME)
        shape = (len(lengths), TIME)
        mask = (place >= PROMPT - 1) & (place < PROMPT - 1 + lengths)
        segments = (place < PROMPT + lengths).astype(np.int32)
        tokens = draw.integers(0, VOCABULARY, (len(lengths), TIME + 1)).astype(np.int32)
        sequences = Batch(
            tokens[:, :-1], tokens[:, 1:], mask.astype(np.float32), segments, place * segments
        )

        def inside(values, outside):
            return jnp.asarray(np.where(mask, values, outside), jnp.float32)

        logprobs = -draw.gamma(2, 0.7, shape)
        values = draw.normal(size=shape)
        drawn = {
            "old_logprobs": inside(logprobs, -1e4),
            "advantages": inside(draw.normal(size=shape), 1e4),
            "reference_logprobs": inside(logprobs + draw.normal(0, 0.5, shape), 1e4),
            "values": inside(values, 1e4),
            "returns": inside(values + draw.normal(0, 0.5, shape), 1e4),
        }
        return RolloutBatch(sequences=sequences, **{**drawn, **fields})

    return make
