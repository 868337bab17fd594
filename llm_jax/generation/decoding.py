"""Prefill and decode with a KV cache: the part that is compiled.

`decode_whole` is one compiled function from prompts to continuations. `start` and `advance` are the
same in pieces, for callers that look at the tokens before they are all there, or that put new rows
in the places of those that have ended (`replace_rows`).

Legend: B batch, T time, P padded prompt, C prefill chunk, N new tokens, D embed, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from llm_jax.errors import UserError
from llm_jax.generation.sampler import SamplerConfig, sample
from llm_jax.sharding import constrain, spec
from llm_jax.types import Array

# Prompts are read this many tokens at a time, so that the scores of a long prompt take memory
# in proportion to its length and not to its square.
PREFILL_CHUNK = 1024
SMALLEST_BUCKET = 32


class Decodable(Protocol):
    """What decoding asks of a model: a `LanguageModel`, or several as one (`generation.proxy`).

    vocab_size: tokens that there are logits for. max_length: tokens of a row at most.
    """

    @property
    def vocab_size(self) -> int: ...

    @property
    def max_length(self) -> int: ...

    def init_cache(self, batch: int, length: int) -> Any:
        """An empty cache with room for `length` tokens a row: a tree of arrays as in `KVCache`."""

    def apply(
        self, params: Any, tokens: jax.Array, *, segment_ids: jax.Array, cache: Any
    ) -> tuple[Any, Any]:
        """Hidden states of tokens [batch, time], and the cache with them; see `LanguageModel`."""

    def logits(self, params: Any, hidden: Any) -> jax.Array:
        """Logits float32 [batch, time, vocab] of the hidden states that `apply` returns."""


@flax.struct.dataclass
class Request:
    """Prompts to be continued, and until when.

    The last token of a prompt stands apart: reading it is the first decode step.

    tokens_BP: int32, all tokens but the last, then padding. lengths_B: int32, how many those are.
    last_B: int32. limit: int32 scalar, the most new tokens of a row.
    """

    tokens_BP: Array
    lengths_B: Array
    last_B: Array
    limit: Array


@flax.struct.dataclass
class Terms:
    """What the choice of tokens depends on besides the rows themselves.

    rng: a typed key, or one a row. numbers_B: int32, the number of each row, whose key is
    fold_in(rng, number) where there is one key for all. stop_ids: int32 [any number].
    """

    rng: jax.Array
    numbers_B: Array
    stop_ids: Array


@flax.struct.dataclass
class Decoding:
    """The state between two decode steps. Every row counts for itself.

    cache: what the model's `init_cache` made, grown since.
    last_B: int32, chosen last and not in the cache yet.
    lengths_B: int32, tokens chosen that count. limits_B: int32, the most that there may be.
    stopped_B: bool, rows that have met a stop.
    tokens_BN: int32, and logprobs_BN: float32; what stands there past a row's length means nothing.
    seen_BV: bool, tokens that the row holds; None where the sampler does not ask for them.
    """

    cache: Any
    last_B: jax.Array
    lengths_B: jax.Array
    limits_B: jax.Array
    stopped_B: jax.Array
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
    model: Decodable, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> Request:
    """Checks and pads prompts; their length is rounded up to a bucket. See `generate`."""
    check_prompts(model, prompts, max_new_tokens)
    return pad_prompts(prompts, bucket(max(map(len, prompts)) - 1), max_new_tokens)


def pad_prompts(prompts: Sequence[Sequence[int]], length: int, max_new_tokens: int) -> Request:
    """The request for prompts of at most length + 1 tokens."""
    tokens_BP = np.zeros((len(prompts), length), np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BP[row, : len(prompt) - 1] = prompt[:-1]
    return Request(
        tokens_BP=tokens_BP,
        lengths_B=np.array([len(prompt) - 1 for prompt in prompts], np.int32),
        last_B=np.array([prompt[-1] for prompt in prompts], np.int32),
        limit=np.int32(max_new_tokens),
    )


def make_terms(rng: jax.Array, rows: int, stop_ids: Sequence[int]) -> Terms:
    """The terms for rows that are numbered as they stand."""
    if rng.ndim and rng.shape != (rows,):
        raise ValueError(f"rng has shape {rng.shape}: give one key, or one for each prompt")
    return Terms(rng, np.arange(rows, dtype=np.int32), np.asarray(stop_ids, np.int32))


def keep_counted(made: Generation, length: int, pad_id: int) -> Generation:
    """The first `length` tokens of arrays on the host; `pad_id` where they do not count."""
    counts_BN = np.arange(length) < made.lengths[:, None]
    return dataclasses.replace(
        made,
        tokens=np.where(counts_BN, made.tokens[:, :length], np.int32(pad_id)),
        logprobs=np.where(counts_BN, made.logprobs[:, :length], np.float32(0)),
    )


def bucket(length: int) -> int:
    """The next power of two, from PREFILL_CHUNK on the next multiple of it."""
    if length > PREFILL_CHUNK:
        return -(-length // PREFILL_CHUNK) * PREFILL_CHUNK
    return max(SMALLEST_BUCKET, 1 << max(length - 1, 0).bit_length())


@functools.partial(jax.jit, static_argnames=("model", "sampler", "room"))
def decode_whole(
    model: Decodable,
    params: Any,
    request: Request,
    terms: Terms,
    *,
    sampler: SamplerConfig,
    room: int,
) -> Generation:
    """At most `limit` tokens a row, in buffers of `room`."""
    state = _start(model, params, request, sampler, room)
    rows = len(request.last_B)
    state = _advance(model, params, state, terms, request.limit, jnp.int32(rows), sampler)
    return Generation(state.tokens_BN, state.lengths_B, state.logprobs_BN, state.stopped_B)


@functools.partial(jax.jit, static_argnames=("model", "sampler", "room"))
def start(
    model: Decodable, params: Any, request: Request, *, sampler: SamplerConfig, room: int
) -> Decoding:
    """The state after the prompts are read, with room for so many new tokens."""
    return _start(model, params, request, sampler, room)


@functools.partial(jax.jit, static_argnames=("model", "sampler"), donate_argnames="state")
def advance(
    model: Decodable,
    params: Any,
    state: Decoding,
    terms: Terms,
    count: Array,
    idle: Array,
    *,
    sampler: SamplerConfig,
) -> Decoding:
    """The state after at most `count` more steps, fewer where `idle` rows have ended before (int32
    scalars both); `state` itself is used up."""
    return _advance(model, params, state, terms, count, idle, sampler)


@functools.partial(jax.jit, static_argnames=("model", "sampler", "rows", "length", "room"))
def start_idle(
    model: Decodable, *, sampler: SamplerConfig, rows: int, length: int, room: int
) -> Decoding:
    """The state of rows that have nothing to do: places for prompts of `length` tokens."""
    return _lay_out(_unread(model, sampler, rows, length, room))


@functools.partial(jax.jit, donate_argnames="state")
def replace_rows(state: Decoding, prompts: Decoding, places_B: Array) -> Decoding:
    """Puts copies of prompts that are read (`start` with no room) in the place of rows.

    places_B: int32, which of the prompts each row becomes; -1: the row stays what it is.
    `state` itself is used up.
    """
    enter_B = places_B >= 0

    def replace(old: jax.Array, new: jax.Array) -> jax.Array:
        # The arrays of the prompts are shorter in time. What an old row has left behind their end
        # stands past the length of the new one, where nothing sees it until it is overwritten.
        axis = max(old.ndim - 4, 0)
        new = jnp.take(new, jnp.maximum(places_B, 0), axis)
        enter = enter_B.reshape(-1, *(1,) * (old.ndim - axis - 1))
        part = tuple(slice(size) for size in new.shape)
        return old.at[part].set(jnp.where(enter, new, old[part]))

    return _lay_out(jax.tree.map(replace, state, prompts))


def check_prompts(model: Decodable, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Raises UserError where the model cannot continue the prompts by so many tokens."""
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens={max_new_tokens} must be at least 1.")
    if not prompts:
        raise UserError("there is no prompt to continue: give at least one.")
    vocab_size, max_length = model.vocab_size, model.max_length
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


def _unread(
    model: Decodable, sampler: SamplerConfig, rows: int, length: int, room: int
) -> Decoding:
    """Empty rows, with room for prompts of `length` tokens and for `room` new ones."""
    return Decoding(
        cache=model.init_cache(rows, length + room),
        last_B=jnp.zeros(rows, jnp.int32),
        lengths_B=jnp.zeros(rows, jnp.int32),
        limits_B=jnp.zeros(rows, jnp.int32),
        stopped_B=jnp.zeros(rows, bool),
        tokens_BN=jnp.zeros((rows, room), jnp.int32),
        logprobs_BN=jnp.zeros((rows, room), jnp.float32),
        seen_BV=jnp.zeros((rows, model.vocab_size), bool) if sampler.penalizes else None,
    )


def _start(
    model: Decodable, params: Any, request: Request, sampler: SamplerConfig, room: int
) -> Decoding:
    rows, length = request.tokens_BP.shape
    state = _unread(model, sampler, rows, length, room)
    state = dataclasses.replace(
        state,
        cache=_prefill(model, params, request, state.cache),
        last_B=jnp.asarray(request.last_B),
        limits_B=jnp.full(rows, request.limit),
        seen_BV=None if state.seen_BV is None else _prompt_tokens(request, state.seen_BV),
    )
    return _lay_out(state)


def _advance(
    model: Decodable,
    params: Any,
    state: Decoding,
    terms: Terms,
    count: Array,
    idle: Array,
    sampler: SamplerConfig,
) -> Decoding:
    row_B = jnp.arange(len(terms.numbers_B))
    fold_in = jax.vmap(jax.random.fold_in)
    rng_B = terms.rng
    if not rng_B.ndim:
        rng_B = fold_in(jnp.broadcast_to(rng_B, row_B.shape), terms.numbers_B)

    def unfinished(carry: tuple[jax.Array, Decoding]) -> jax.Array:
        step, state = carry
        return (step < count) & (jnp.sum(~_unended(state)) < idle)

    def decode(carry: tuple[jax.Array, Decoding]) -> tuple[jax.Array, Decoding]:
        step, state = carry
        unended_B = _unended(state)
        # Rows that have ended read padding, which makes nothing grow.
        segment_ids_B1 = unended_B[:, None].astype(jnp.int32)
        hidden_B1D, cache = model.apply(
            params, state.last_B[:, None], segment_ids=segment_ids_B1, cache=state.cache
        )
        logits_BV = model.logits(params, hidden_B1D)[:, 0]
        # By the row's own count, a row draws the same in whatever company it stands.
        draw_rng_B = fold_in(rng_B, state.lengths_B)
        tokens_B, logprobs_B = sample(logits_BV, draw_rng_B, sampler, state.seen_BV)
        place_B = jnp.where(unended_B, state.lengths_B, state.tokens_BN.shape[1])
        seen_BV = state.seen_BV
        state = Decoding(
            cache=cache,
            last_B=tokens_B,
            lengths_B=state.lengths_B + unended_B,
            limits_B=state.limits_B,
            stopped_B=state.stopped_B | (unended_B & jnp.isin(tokens_B, terms.stop_ids)),
            tokens_BN=state.tokens_BN.at[row_B, place_B].set(tokens_B, mode="drop"),
            logprobs_BN=state.logprobs_BN.at[row_B, place_B].set(logprobs_B, mode="drop"),
            seen_BV=None if seen_BV is None else seen_BV.at[row_B, tokens_B].set(True),
        )
        return step + 1, state

    return _lay_out(jax.lax.while_loop(unfinished, decode, (jnp.int32(0), state))[1])


def _unended(state: Decoding) -> jax.Array:
    """Rows that go on, bool [batch]."""
    return ~state.stopped_B & (state.lengths_B < state.limits_B)


def _prefill(model: Decodable, params: Any, request: Request, cache: Any) -> Any:
    """Reads the prompts, all but their last tokens, chunk by chunk.

    A chunk wholly past the end of a row is padding there, which the cache does not count: what it
    writes is overwritten by the tokens that follow.
    """
    time = request.tokens_BP.shape[1]
    chunk = min(time, PREFILL_CHUNK)

    def read(cache: Any, start: jax.Array) -> tuple[Any, None]:
        tokens_BC = jax.lax.dynamic_slice_in_dim(request.tokens_BP, start, chunk, axis=1)
        segment_ids_BC = start + jnp.arange(chunk) < request.lengths_B[:, None]
        segment_ids_BC = segment_ids_BC.astype(jnp.int32)
        _, grown = model.apply(params, tokens_BC, segment_ids=segment_ids_BC, cache=cache)
        return grown, None

    return jax.lax.scan(read, _lay_out_cache(cache), jnp.arange(0, time, chunk))[0]


def _prompt_tokens(request: Request, seen_BV: jax.Array) -> jax.Array:
    """Which tokens each prompt holds, bool [batch, vocab], put into an array without any."""
    rows, time = request.tokens_BP.shape
    row_B = jnp.arange(rows)
    inside_BP = jnp.arange(time) < request.lengths_B[:, None]
    seen_BV = seen_BV.at[row_B[:, None], request.tokens_BP].max(inside_BP)
    return seen_BV.at[row_B, request.last_B].set(True)


def shardings(mesh: Mesh, state: Decoding) -> Decoding:
    """How the state between two steps lies on a mesh; see `_lay_out`."""
    rest = dict(vars(state))
    cache = jax.tree.map(lambda x: NamedSharding(mesh, spec(_cache_axes(x))), rest.pop("cache"))
    whole = jax.tree.map(lambda x: NamedSharding(mesh, spec(())), rest)
    return Decoding(cache=cache, **whole)


def _lay_out(state: Decoding) -> Decoding:
    """Cuts the cache as the layers do that write it; every process holds the whole of the rest."""
    rest = dict(vars(state))
    cache = _lay_out_cache(rest.pop("cache"))
    whole = jax.tree.map(lambda x: constrain(x, *(None,) * x.ndim), rest)
    return Decoding(cache=cache, **whole)


def _lay_out_cache(cache: Any) -> Any:
    return jax.tree.map(lambda x: constrain(x, *_cache_axes(x)), cache)


def _cache_axes(x: Any) -> tuple[str | None, ...]:
    if x.ndim < 4:  # segment ids and lengths
        return ("activation_batch", *(None,) * (x.ndim - 1))
    return (*(None,) * (x.ndim - 4), "activation_batch", "activation_heads", None, None)
