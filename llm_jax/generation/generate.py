"""Continuations of prompts: as token ids with log-probabilities, as texts, as pieces of a text."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.data.tokenizers import Tokenizer
from llm_jax.generation.decoding import (
    Decodable,
    Generation,
    Request,
    Terms,
    advance,
    bucket,
    decode_whole,
    keep_counted,
    make_request,
    make_terms,
    start,
)
from llm_jax.generation.sampler import SamplerConfig
from llm_jax.generation.text import (
    before_stop,
    check_stop_strings,
    lead,
    pieces,
    stop_length,
    whole_text,
)

__all__ = [
    "Generation",
    "document_prompt",
    "document_stop_ids",
    "generate",
    "generate_texts",
    "sample_text",
    "stream",
]

# Tokens between two looks at the text: few make a stop string end a row sooner, or a text appear
# sooner, and cost more round trips to the device.
STOP_CHUNK = 32
STREAM_CHUNK = 8


def generate(
    model: Decodable,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampler: SamplerConfig,
    rng: jax.Array,
    stop_ids: Sequence[int] = (),
    pad_id: int = 0,
    stop_strings: Sequence[str] = (),
    tokenizer: Tokenizer | None = None,
) -> Generation:
    """Continues each prompt until a stop id, a stop string, or `max_new_tokens`.

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
      stop_strings: a row ends with the first token at which the text of its continuation contains
        one of these. They change nothing of the tokens before.
      tokenizer: makes that text; needed for stop strings alone.

    Returns:
      The tokens and what belongs to them; arrays on the host.

    Raises:
      UserError: no or empty prompts, a token past the vocabulary, an empty stop string, or prompt
        and new tokens together longer than the model's max_length.
    """
    request = make_request(model, prompts, max_new_tokens)
    terms = make_terms(rng, len(prompts), stop_ids)
    check_stop_strings(stop_strings)
    if not stop_strings:
        room = bucket(max_new_tokens)
        made = decode_whole(model, params, request, terms, sampler=sampler, room=room)
        made = jax.device_get(made)
    elif tokenizer is None:
        raise ValueError("stop strings need the tokenizer that makes the text")
    else:
        *_, made = _stages(
            model, params, request, terms, sampler, tokenizer, stop_strings, STOP_CHUNK
        )
    return keep_counted(made, max_new_tokens, pad_id)


def generate_texts(
    model: Decodable,
    params: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampler: SamplerConfig,
    rng: jax.Array,
    stop_ids: Sequence[int] = (),
    stop_strings: Sequence[str] = (),
    echo: bool = False,
) -> list[str]:
    """The text of each continuation, up to its stop; special tokens are not shown.

    Args:
      echo: show the prompt before its continuation. The rest is as in `generate`.

    Raises:
      UserError: see `generate`.
    """
    made = generate(
        model,
        params,
        prompts,
        max_new_tokens=max_new_tokens,
        sampler=sampler,
        rng=rng,
        stop_ids=stop_ids,
        stop_strings=stop_strings,
        tokenizer=tokenizer,
    )
    texts = []
    for prompt, row, length in zip(prompts, made.tokens, made.lengths, strict=True):
        tokens = row[:length].tolist()
        text = before_stop(tokenizer.decode(tokens), stop_strings)
        texts.append(lead(tokenizer, prompt, tokens) + text if echo else text)
    return texts


def stream(
    model: Decodable,
    params: Any,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    sampler: SamplerConfig,
    rng: jax.Array,
    stop_ids: Sequence[int] = (),
    stop_strings: Sequence[str] = (),
    echo: bool = False,
) -> Iterator[str]:
    """`generate_texts` of one prompt in pieces, as they come; joined they are the same text.

    A piece ends with a whole character, and what may be the beginning of a stop string is held
    back until that is decided.

    Raises:
      UserError: see `generate`; at the call, before the first piece is asked for.
    """
    request = make_request(model, [prompt], max_new_tokens)
    terms = make_terms(rng, 1, stop_ids)
    check_stop_strings(stop_strings)

    stages = _stages(model, params, request, terms, sampler, tokenizer, stop_strings, STREAM_CHUNK)
    continuations = (made.tokens[0, : made.lengths[0]].tolist() for made in stages)
    return _pieces(tokenizer, prompt, continuations, stop_strings, echo)


def document_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """The tokens of a text to continue, as a document of the training corpus begins.

    An empty text where documents begin with nothing is continued after bos, or after eos where the
    tokenizer has no bos: something must stand before the first token.
    """
    return [*tokenizer.document_start, *tokenizer.encode(text)] or [tokenizer.bos_id]


def document_stop_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens with which a text or a turn ends."""
    end_of_turn = tokenizer.special_ids.get("end_of_turn", tokenizer.eos_id)
    return tuple(dict.fromkeys((*tokenizer.eos_ids, end_of_turn)))


def sample_text(
    model: Decodable,
    params: Any,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int,
    sampler: SamplerConfig,
    seed: int = 0,
) -> str:
    """A text with its continuation, as a document of the training corpus.

    Raises:
      UserError: see `generate`.
    """
    return generate_texts(
        model,
        params,
        tokenizer,
        [document_prompt(tokenizer, prompt)],
        max_new_tokens=max_new_tokens,
        sampler=sampler,
        rng=jax.random.key(seed),
        stop_ids=document_stop_ids(tokenizer),
        echo=True,
    )[0]


def _stages(
    model: Decodable,
    params: Any,
    request: Request,
    terms: Terms,
    sampler: SamplerConfig,
    tokenizer: Tokenizer,
    stop_strings: Sequence[str],
    chunk: int,
) -> Iterator[Generation]:
    """What is there after every `chunk` steps, on the host, until all rows have ended.

    `tokens` and `logprobs` may go on past the `lengths`, up to the end of the chunk.
    """
    limit, rows = int(request.limit), np.int32(len(request.last_B))
    state = start(model, params, request, sampler=sampler, room=bucket(limit))
    for known in range(0, limit, chunk):
        state = advance(model, params, state, terms, np.int32(chunk), rows, sampler=sampler)
        made = Generation(state.tokens_BN, state.lengths_B, state.logprobs_BN, state.stopped_B)
        made = _end_rows(jax.device_get(made), tokenizer, stop_strings, known)
        yield made
        if made.stopped.all():
            return
        # Operations on the state's own arrays leave these where they are on the devices.
        lengths_B = jnp.minimum(state.lengths_B, made.lengths)
        stopped_B = state.stopped_B | made.stopped
        state = dataclasses.replace(state, lengths_B=lengths_B, stopped_B=stopped_B)


def _end_rows(
    made: Generation, tokenizer: Tokenizer, stop_strings: Sequence[str], known: int
) -> Generation:
    """Ends the rows whose text contains a stop string; the first `known` tokens make none."""
    lengths_B, stopped_B = made.lengths.copy(), made.stopped.copy()
    for row in np.flatnonzero(made.lengths > known) if stop_strings else ():
        tokens = made.tokens[row, : made.lengths[row]].tolist()
        length = stop_length(tokenizer, tokens, stop_strings, known)
        if length is not None:
            lengths_B[row], stopped_B[row] = length, True
    return dataclasses.replace(made, lengths=lengths_B, stopped=stopped_B)


def _pieces(
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    continuations: Iterator[list[int]],
    stop_strings: Sequence[str],
    echo: bool,
) -> Iterator[str]:
    tokens = next(continuations)
    if echo:
        yield lead(tokenizer, prompt, tokens)

    def texts() -> Iterator[str]:
        latest = tokens
        yield whole_text(tokenizer, latest)
        for latest in continuations:
            yield whole_text(tokenizer, latest)
        yield tokenizer.decode(latest)

    yield from pieces(texts(), stop_strings)
