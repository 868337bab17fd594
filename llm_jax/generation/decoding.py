"""Prefill and decode with a KV cache: the part that is compiled.

`decode_whole` is one compiled function from prompts to continuations. `start` and `advance` are the
same in pieces, for callers that look at the tokens before they are all there.

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
class Request:
    """What is to be continued, and until when.

    The last token of a prompt stands apart: reading it is the first decode step.

    tokens_BP: int32, all tokens but the last, then padding. lengths_B: int32, how many those are.
    last_B: int32. rng: a typed key, or one a row. stop_ids: int32 [any number].
    pad_id, limit: int32 scalars, what stands after a row's end, and the most new tokens of a row.
    """

    tokens_BP: Array
    lengths_B: Array
    last_B: Array
    rng: jax.Array
    stop_ids: Array
    pad_id: Array
    limit: Array


@flax.struct.dataclass
class Decoding:
    """The state between two decode steps.

    step: int32 scalar, steps taken. tokens_B: int32, chosen last and not in the cache yet.
    ended_B: bool, rows that need no more. lengths_B: int32, tokens chosen that count.
    tokens_BN: int32, `pad_id` where nothing is chosen. logprobs_BN: float32, 0 there.
    seen_BV: bool, tokens that the row holds; None where the sampler does not ask for them.
    """

    step: jax.Array
    cache: KVCache
    tokens_B: jax.Array
    ended_B: jax.Array
    lengths_B: jax.Array
    tokens_BN: jax.Array
    logprobs_BN: jax.Array
    seen_BV: jax.Array | None


@flax.struct.dataclass
class Generation:
    """The continuations.

    tokens: int32 [batch, new], the stop token included; `pad_id` after it.
    lengths: int32 [batch], tokens that count, the stop token included.
    logprobs: float32 [batch, new], log-softmax(logits / temperature) of each token under the model,
      before penalty and filters (at temperature 0: of the logits as they are); 0 after the stop. A
      forward pass over prompt and tokens at the same temperature gives the same numbers.
    stopped: bool [batch], whether the row met a stop; False where max_new_tokens cut it off.
    """

    tokens: Array
    lengths: Array
    logprobs: Array
    stopped: Array


def make_request(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    rng: jax.Array,
    stop_ids: Sequence[int],
    pad_id: int,
) -> Request:
    """Checks and pads prompts; their length is rounded up to a bucket. See `generate`."""
    _check(model, prompts, max_new_tokens)
    if rng.ndim and rng.shape != (len(prompts),):
        raise ValueError(f"rng has shape {rng.shape}: give one key, or one for each prompt")
    lengths_B = np.array([len(prompt) - 1 for prompt in prompts], np.int32)
    tokens_BP = np.zeros((len(prompts), bucket(int(lengths_B.max()))), np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BP[row, : len(prompt) - 1] = prompt[:-1]
    return Request(
        tokens_BP=tokens_BP,
        lengths_B=lengths_B,
        last_B=np.array([prompt[-1] for prompt in prompts], np.int32),
        rng=rng,
        stop_ids=np.asarray(stop_ids, np.int32),
        pad_id=np.int32(pad_id),
        limit=np.int32(max_new_tokens),
    )


def bucket(length: int) -> int:
    """The next power of two, from PREFILL_CHUNK on the next multiple of it."""
    if length > PREFILL_CHUNK:
        return -(-length // PREFILL_CHUNK) * PREFILL_CHUNK
    return max(SMALLEST_BUCKET, 1 << max(length - 1, 0).bit_length())


@functools.partial(jax.jit, static_argnames=("model", "sampler", "slots"))
def decode_whole(
    model: LanguageModel, params: Any, request: Request, *, sampler: SamplerConfig, slots: int
) -> Generation:
    """At most `limit` tokens a row, in buffers of `slots`."""
    state = _start(model, params, request, sampler, slots)
    state = _advance(model, params, request, state, request.limit, sampler)
    return Generation(state.tokens_BN, state.lengths_B, state.logprobs_BN, state.ended_B)


@functools.partial(jax.jit, static_argnames=("model", "sampler", "slots"))
def start(
    model: LanguageModel, params: Any, request: Request, *, sampler: SamplerConfig, slots: int
) -> Decoding:
    """The state after the prompts are read, with room for `slots` new tokens."""
    return _start(model, params, request, sampler, slots)


@functools.partial(jax.jit, static_argnames=("model", "sampler"), donate_argnames="state")
def advance(
    model: LanguageModel,
    params: Any,
    request: Request,
    state: Decoding,
    count: Array,
    *,
    sampler: SamplerConfig,
) -> Decoding:
    """The state after at most `count` (int32 scalar) more steps; `state` itself is used up."""
    return _advance(model, params, request, state, count, sampler)


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


def _start(
    model: LanguageModel, params: Any, request: Request, sampler: SamplerConfig, slots: int
) -> Decoding:
    rows, time = request.tokens_BP.shape
    state = Decoding(
        step=jnp.int32(0),
        cache=_prefill(model, params, request, init_cache(model.config, rows, time + slots)),
        tokens_B=jnp.asarray(request.last_B),
        ended_B=jnp.zeros(rows, bool),
        lengths_B=jnp.zeros(rows, jnp.int32),
        tokens_BN=jnp.full((rows, slots), request.pad_id),
        logprobs_BN=jnp.zeros((rows, slots), jnp.float32),
        seen_BV=_prompt_tokens(request, model.config.vocab_size) if sampler.penalizes else None,
    )
    return _lay_out(state)


def _advance(
    model: LanguageModel,
    params: Any,
    request: Request,
    state: Decoding,
    count: Array,
    sampler: SamplerConfig,
) -> Decoding:
    rows, rng = len(request.last_B), request.rng
    rng_B = rng if rng.ndim else jax.vmap(jax.random.fold_in, (None, 0))(rng, jnp.arange(rows))
    until = jnp.minimum(state.step + count, request.limit)

    def unfinished(state: Decoding) -> jax.Array:
        return (state.step < until) & ~jnp.all(state.ended_B)

    def decode(state: Decoding) -> Decoding:
        # Rows that have ended go on reading padding, which no other row sees.
        hidden_B1D, cache = model.apply(params, state.tokens_B[:, None], cache=state.cache)
        assert cache is not None
        logits_BV = model.logits(params, hidden_B1D)[:, 0]
        step_rng_B = jax.vmap(jax.random.fold_in, (0, None))(rng_B, state.step)
        tokens_B, logprobs_B = sample(logits_BV, step_rng_B, sampler, state.seen_BV)
        tokens_B = jnp.where(state.ended_B, request.pad_id, tokens_B)
        logprobs_B = jnp.where(state.ended_B, 0.0, logprobs_B)
        seen_BV = state.seen_BV
        return Decoding(
            step=state.step + 1,
            cache=cache,
            tokens_B=tokens_B,
            ended_B=state.ended_B | jnp.isin(tokens_B, request.stop_ids),
            lengths_B=state.lengths_B + ~state.ended_B,
            tokens_BN=state.tokens_BN.at[:, state.step].set(tokens_B),
            logprobs_BN=state.logprobs_BN.at[:, state.step].set(logprobs_B),
            seen_BV=None if seen_BV is None else seen_BV.at[jnp.arange(rows), tokens_B].set(True),
        )

    return _lay_out(jax.lax.while_loop(unfinished, decode, state))


def _prefill(model: LanguageModel, params: Any, request: Request, cache: KVCache) -> KVCache:
    """Reads the prompts, all but their last tokens, chunk by chunk.

    A chunk wholly past the end of a row is padding there, which the cache does not count: what it
    writes is overwritten by the tokens that follow.
    """
    time = request.tokens_BP.shape[1]
    chunk = min(time, PREFILL_CHUNK)

    def read(cache: KVCache, start: jax.Array) -> tuple[KVCache, None]:
        tokens_BC = jax.lax.dynamic_slice_in_dim(request.tokens_BP, start, chunk, axis=1)
        segment_ids_BC = start + jnp.arange(chunk) < request.lengths_B[:, None]
        segment_ids_BC = segment_ids_BC.astype(jnp.int32)
        _, grown = model.apply(params, tokens_BC, segment_ids=segment_ids_BC, cache=cache)
        assert grown is not None
        return grown, None

    return jax.lax.scan(read, _lay_out_cache(cache), jnp.arange(0, time, chunk))[0]


def _prompt_tokens(request: Request, vocab_size: int | None) -> jax.Array:
    """Which tokens each prompt holds, bool [batch, vocab]."""
    assert vocab_size is not None
    rows, time = request.tokens_BP.shape
    row_B = jnp.arange(rows)
    inside_BP = jnp.arange(time) < request.lengths_B[:, None]
    seen_BV = jnp.zeros((rows, vocab_size), bool)
    seen_BV = seen_BV.at[row_B[:, None], request.tokens_BP].max(inside_BP)
    return seen_BV.at[row_B, request.last_B].set(True)


def _lay_out(state: Decoding) -> Decoding:
    """Cuts the cache as the layers do that write it; every process holds the whole of the rest."""
    rest = dict(vars(state))
    cache = _lay_out_cache(rest.pop("cache"))
    whole = jax.tree.map(lambda x: constrain(x, *(None,) * x.ndim), rest)
    return Decoding(cache=cache, **whole)


def _lay_out_cache(cache: KVCache) -> KVCache:
    def lay_out(x: jax.Array) -> jax.Array:
        stacked = (None,) * (x.ndim - 4)
        return constrain(x, *stacked, "activation_batch", "activation_heads", None, None)

    return dataclasses.replace(cache, layers=jax.tree.map(lay_out, cache.layers))
