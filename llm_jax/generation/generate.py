"""Prefill and decode with a KV cache, compiled as one function.

Legend: B batch, T time, P padded prompt, C prefill chunk, N new tokens, D embed, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.data.tokenizers import Tokenizer
from llm_jax.errors import UserError
from llm_jax.generation.sampler import SamplerConfig, sample
from llm_jax.models import KVCache, LanguageModel, init_cache
from llm_jax.sharding import constrain
from llm_jax.types import Array

# Prompts are read this many tokens at a time, so that the scores of a long prompt take memory
# in proportion to its length and not to its square.
PREFILL_CHUNK = 1024
SMALLEST_BUCKET = 32


@flax.struct.dataclass
class Generation:
    """What `generate` made; arrays on the host.

    tokens: int32 [batch, new], the stop token included; `pad_id` after it.
    lengths: int32 [batch], tokens that count, the stop token included.
    logprobs: float32 [batch, new], log-softmax(logits / temperature) of each token under the model,
      before top-k and top-p (at temperature 0: of the logits as they are); 0 after the stop. A
      forward pass over prompt and tokens at the same temperature gives the same numbers.
    stopped: bool [batch], whether the row met a stop id; False where max_new_tokens cut it off.
    """

    tokens: Array
    lengths: Array
    logprobs: Array
    stopped: Array


def generate(
    model: LanguageModel,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampler: SamplerConfig,
    rng: jax.Array,
    stop_ids: Sequence[int] = (),
    pad_id: int = 0,
) -> Generation:
    """Continues each prompt until a stop id or `max_new_tokens`.

    Prompt lengths and `max_new_tokens` are rounded up to buckets, so that calls of many lengths
    share few compilations.

    Args:
      model: the model. params: its parameters, on whichever mesh is set.
      prompts: token ids of each row, of any lengths; none empty (start with bos).
      max_new_tokens: the most tokens that a row gets.
      sampler: how tokens are chosen.
      rng: a typed PRNG key, from which row i gets fold_in(rng, i); or one key a row, [batch], for
        rows that keep their randomness whatever batch they stand in.
      stop_ids: a row ends with the first of these that it samples.
      pad_id: fills `tokens` after the stop.

    Raises:
      UserError: no or empty prompts, a token past the vocabulary, or prompt and new tokens together
        longer than the model's max_length.
    """
    _check(model, prompts, max_new_tokens)
    if rng.ndim and rng.shape != (len(prompts),):
        raise ValueError(f"rng has shape {rng.shape}: give one key, or one for each prompt")
    made = _generate(
        model,
        params,
        _pad(prompts),
        rng,
        np.asarray(stop_ids, np.int32),
        np.int32(pad_id),
        np.int32(max_new_tokens),
        sampler=sampler,
        slots=_bucket(max_new_tokens),
    )
    made = jax.device_get(made)
    return Generation(
        tokens=made.tokens[:, :max_new_tokens],
        lengths=made.lengths,
        logprobs=made.logprobs[:, :max_new_tokens],
        stopped=made.stopped,
    )


def sample_texts(
    model: LanguageModel,
    params: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    sampler: SamplerConfig,
    seed: int = 0,
) -> list[str]:
    """Each prompt with its continuation, as text; special tokens are not shown.

    A row starts with bos and ends with the tokenizer's eos or end_of_turn.

    Raises:
      UserError: see `generate`.
    """
    ids = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in prompts]
    made = generate(
        model,
        params,
        ids,
        max_new_tokens=max_new_tokens,
        rng=jax.random.key(seed),
        sampler=sampler,
        stop_ids=(tokenizer.eos_id, tokenizer.special_ids["end_of_turn"]),
        pad_id=tokenizer.pad_id,
    )
    return [
        tokenizer.decode([*prompt, *tokens[:length].tolist()])
        for prompt, tokens, length in zip(ids, made.tokens, made.lengths, strict=True)
    ]


def sample_text(
    model: LanguageModel,
    params: Any,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int,
    sampler: SamplerConfig,
    seed: int = 0,
) -> str:
    """`sample_texts` of one prompt; an empty one is the start of a document."""
    return sample_texts(
        model,
        params,
        tokenizer,
        [prompt],
        max_new_tokens=max_new_tokens,
        sampler=sampler,
        seed=seed,
    )[0]


def _check(model: LanguageModel, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens={max_new_tokens} must be at least 1.")
    if not prompts:
        raise UserError("there is no prompt to continue: give at least one.")
    vocab_size, max_length = model.config.vocab_size or 0, model.config.max_length
    for row, prompt in enumerate(prompts):
        if not len(prompt):
            raise UserError(f"prompt {row} is empty: start it with the bos token.")
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            raise UserError(
                f"prompt {row} holds a token outside the model's vocabulary of {vocab_size}: "
                "was it made with another tokenizer?"
            )
        if len(prompt) + max_new_tokens > max_length:
            raise UserError(
                f"prompt {row} of {len(prompt)} tokens and max_new_tokens={max_new_tokens} pass "
                f"model.max_length={max_length}: shorten the prompt, or ask for fewer new tokens."
            )


def _bucket(length: int) -> int:
    """The next power of two, from PREFILL_CHUNK on the next multiple of it."""
    if length > PREFILL_CHUNK:
        return -(-length // PREFILL_CHUNK) * PREFILL_CHUNK
    return max(SMALLEST_BUCKET, 1 << max(length - 1, 0).bit_length())


@flax.struct.dataclass
class _Prompts:
    """Padded rows. The last token of each stands apart: reading it is the first decode step.

    tokens_BP: int32, all tokens but the last, then padding. lengths_B: int32, how many those are.
    last_B: int32.
    """

    tokens_BP: Array
    lengths_B: Array
    last_B: Array


def _pad(prompts: Sequence[Sequence[int]]) -> _Prompts:
    lengths_B = np.array([len(prompt) - 1 for prompt in prompts], np.int32)
    tokens_BP = np.zeros((len(prompts), _bucket(int(lengths_B.max()))), np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BP[row, : len(prompt) - 1] = prompt[:-1]
    return _Prompts(tokens_BP, lengths_B, np.array([prompt[-1] for prompt in prompts], np.int32))


@flax.struct.dataclass
class _Decoding:
    """The state between two decode steps.

    tokens_B: int32, chosen last and not in the cache yet. ended_B: bool, rows that need no more.
    The rest grows into `Generation`.
    """

    step: jax.Array
    cache: KVCache
    tokens_B: jax.Array
    ended_B: jax.Array
    lengths_B: jax.Array
    tokens_BN: jax.Array
    logprobs_BN: jax.Array


@functools.partial(jax.jit, static_argnames=("model", "sampler", "slots"))
def _generate(
    model: LanguageModel,
    params: Any,
    prompts: _Prompts,
    rng: jax.Array,
    stop_ids: jax.Array,
    pad_id: jax.Array,
    limit: jax.Array,
    *,
    sampler: SamplerConfig,
    slots: int,
) -> Generation:
    """At most `limit` tokens a row, in buffers of `slots`."""
    rows, time = prompts.tokens_BP.shape
    rng_B = rng if rng.ndim else jax.vmap(jax.random.fold_in, (None, 0))(rng, jnp.arange(rows))

    def unfinished(state: _Decoding) -> jax.Array:
        return (state.step < limit) & ~jnp.all(state.ended_B)

    def decode(state: _Decoding) -> _Decoding:
        # Rows that have ended go on reading padding, which no other row sees.
        hidden_B1D, cache = model.apply(params, state.tokens_B[:, None], cache=state.cache)
        assert cache is not None
        logits_BV = model.logits(params, hidden_B1D)[:, 0]
        step_rng_B = jax.vmap(jax.random.fold_in, (0, None))(rng_B, state.step)
        tokens_B, logprobs_B = sample(logits_BV, step_rng_B, sampler)
        tokens_B = jnp.where(state.ended_B, pad_id, tokens_B)
        logprobs_B = jnp.where(state.ended_B, 0.0, logprobs_B)
        return _Decoding(
            step=state.step + 1,
            cache=cache,
            tokens_B=tokens_B,
            ended_B=state.ended_B | jnp.isin(tokens_B, stop_ids),
            lengths_B=state.lengths_B + ~state.ended_B,
            tokens_BN=state.tokens_BN.at[:, state.step].set(tokens_B),
            logprobs_BN=state.logprobs_BN.at[:, state.step].set(logprobs_B),
        )

    cache = _constrain_cache(init_cache(model.config, rows, time + slots))
    state = _Decoding(
        step=jnp.int32(0),
        cache=_prefill(model, params, prompts, cache),
        tokens_B=prompts.last_B,
        ended_B=jnp.zeros(rows, bool),
        lengths_B=jnp.zeros(rows, jnp.int32),
        tokens_BN=jnp.full((rows, slots), pad_id),
        logprobs_BN=jnp.zeros((rows, slots), jnp.float32),
    )
    state = jax.lax.while_loop(unfinished, decode, state)
    made = Generation(state.tokens_BN, state.lengths_B, state.logprobs_BN, state.ended_B)
    # Every process reads the whole batch.
    return jax.tree.map(lambda x: constrain(x, *(None,) * x.ndim), made)


def _prefill(model: LanguageModel, params: Any, prompts: _Prompts, cache: KVCache) -> KVCache:
    """Reads the prompts, all but their last tokens, chunk by chunk.

    A chunk wholly past the end of a row is padding there, which the cache does not count: what it
    writes is overwritten by the tokens that follow.
    """
    time = prompts.tokens_BP.shape[1]
    chunk = min(time, PREFILL_CHUNK)

    def read(cache: KVCache, start: jax.Array) -> tuple[KVCache, None]:
        tokens_BC = jax.lax.dynamic_slice_in_dim(prompts.tokens_BP, start, chunk, axis=1)
        segment_ids_BC = start + jnp.arange(chunk) < prompts.lengths_B[:, None]
        segment_ids_BC = segment_ids_BC.astype(jnp.int32)
        _, grown = model.apply(params, tokens_BC, segment_ids=segment_ids_BC, cache=cache)
        assert grown is not None
        return grown, None

    return jax.lax.scan(read, cache, jnp.arange(0, time, chunk))[0]


def _constrain_cache(cache: KVCache) -> KVCache:
    """Lays keys and values out as the layers that write them do."""

    def lay_out(x: jax.Array) -> jax.Array:
        stacked = (None,) * (x.ndim - 4)
        return constrain(x, *stacked, "activation_batch", "activation_heads", None, None)

    return dataclasses.replace(cache, layers=jax.tree.map(lay_out, cache.layers))
