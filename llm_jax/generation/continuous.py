"""Many continuations through few slots: where a row ends, the next one takes its place.

The host keeps the schedule and the device the state of the slots. Rows begin in order; a prompt is
read once, in a block with others, and copied into a slot for each of its samples.

Legend: B slots, N new tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.monitoring
import numpy as np

from llm_jax.errors import UserError
from llm_jax.generation.decoding import (
    Decodable,
    Decoding,
    Generation,
    Terms,
    advance,
    bucket,
    check_prompts,
    keep_counted,
    pad_prompts,
    replace_rows,
    start,
    start_idle,
)
from llm_jax.generation.sampler import SamplerConfig
from llm_jax.sharding import batch_shards

# Slots are filled again when one in so many is idle: more often costs more visits of the host, less
# often more steps in which slots do nothing.
IDLE_FRACTION = 8

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
_NO_LIMIT = np.int32(np.iinfo(np.int32).max)


@dataclasses.dataclass
class DecodingCost:
    """What `generate_many` has cost, added up over the calls that were given this object."""

    tokens: int = 0  # sampled, and returned
    slot_steps: int = 0  # decode steps times slots: the tokens that there could have been
    prompts: int = 0  # read
    compilations: int = 0  # programs compiled, or taken from the cache of compiled programs

    @property
    def idle_share(self) -> float:
        """The share of slots and steps that made no token; 0 before the first step."""
        return 1 - self.tokens / self.slot_steps if self.slot_steps else 0.0


def generate_many(
    model: Decodable,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    samples: int = 1,
    max_new_tokens: int,
    sampler: SamplerConfig,
    rng: jax.Array,
    stop_ids: Sequence[int] = (),
    pad_id: int = 0,
    slots: int,
    cost: DecodingCost | None = None,
) -> Generation:
    """Continues each prompt `samples` times until a stop id or `max_new_tokens`.

    Row r is sample r % samples of prompt r // samples, and has the tokens that `generate` gives to
    row r of as many prompts: they depend neither on the number of slots nor on the other rows. The
    lengths of prompts, `max_new_tokens` and small numbers of rows are rounded up to buckets, and a
    call needs at most four programs, so that calls of many sizes share few compilations.

    Every process of several must make the same call, and gets the whole result.

    Args:
      model: the model. params: its parameters, on whichever mesh is set.
      prompts: token ids, of any lengths; none empty (start with bos).
      samples: continuations of each prompt.
      max_new_tokens: the most tokens that a row gets.
      sampler: how tokens are chosen.
      rng: a typed PRNG key, from which row r gets fold_in(rng, r).
      stop_ids: a row ends with the first of these that it samples.
      pad_id: fills `tokens` after the stop.
      slots: rows that decode at a time, rounded up to what the mesh splits evenly. Their cache is
        what takes the memory.
      cost: is told what the call has cost.

    Returns:
      len(prompts) * samples rows; arrays on the host, `tokens` [rows, max_new_tokens].

    Raises:
      UserError: no slot or sample, no or empty prompts, a token past the vocabulary, or prompt and
        new tokens together longer than the model's max_length.
    """
    check_prompts(model, prompts, max_new_tokens)
    for name, value in (("slots", slots), ("samples", samples)):
        if value < 1:
            raise UserError(f"{name}={value} must be at least 1.")
    cost = DecodingCost() if cost is None else cost
    schedule = _Schedule(len(prompts) * samples, slots)
    blocks = _Blocks(model, params, prompts, samples, max_new_tokens, sampler, schedule.slots)
    made = Generation(
        tokens=np.zeros((schedule.rows, max_new_tokens), np.int32),
        lengths=np.zeros(schedule.rows, np.int32),
        logprobs=np.zeros((schedule.rows, max_new_tokens), np.float32),
        stopped=np.zeros(schedule.rows, bool),
    )
    with _counting_compilations(cost):
        state = start_idle(
            model,
            sampler=sampler,
            rows=schedule.slots,
            length=blocks.length,
            room=bucket(max_new_tokens),
        )
        while not schedule.done:
            for block, places_B in blocks.copies(schedule.fill()):
                state = replace_rows(state, block, places_B)
            terms = Terms(rng, np.maximum(schedule.row_B, 0), np.asarray(stop_ids, np.int32))
            idle = schedule.idle_to_return
            state = advance(model, params, state, terms, _NO_LIMIT, idle, sampler=sampler)
            cost.slot_steps += schedule.slots * _harvest(state, schedule, made)
    cost.tokens += int(made.lengths.sum())
    cost.prompts += len(prompts)
    return keep_counted(made, max_new_tokens, pad_id)


class _Schedule:
    """Which row is in which slot. Slots that are too many for the rows are not there."""

    def __init__(self, rows: int, slots: int):
        slots = min(slots, _power_of_two(rows))
        self.rows, self.slots = rows, _even(slots)
        self.row_B = np.full(self.slots, -1, np.int32)  # -1: the slot is idle
        self.length_B = np.zeros(self.slots, np.int32)  # tokens of the row when last seen
        self._begun = 0

    @property
    def done(self) -> bool:
        return self._begun == self.rows and not (self.row_B >= 0).any()

    @property
    def idle_to_return(self) -> np.int32:
        """How many slots must be idle for the host to look after them."""
        waiting = self._begun < self.rows
        return np.int32(max(1, self.slots // IDLE_FRACTION) if waiting else self.slots)

    def fill(self) -> np.ndarray:
        """Gives idle slots the rows that are next; int32 [slots], the new rows, -1 elsewhere."""
        idle = np.flatnonzero(self.row_B < 0)[: self.rows - self._begun]
        new_B = np.full(self.slots, -1, np.int32)
        new_B[idle] = self._begun + np.arange(len(idle))
        self.row_B[idle], self.length_B[idle] = new_B[idle], 0
        self._begun += len(idle)
        return new_B


class _Blocks:
    """Prompts that are read together, so many as have samples for all slots."""

    def __init__(
        self,
        model: Decodable,
        params: Any,
        prompts: Sequence[Sequence[int]],
        samples: int,
        max_new_tokens: int,
        sampler: SamplerConfig,
        slots: int,
    ):
        self._model, self._params, self._sampler = model, params, sampler
        self._prompts, self._samples, self._limit = prompts, samples, max_new_tokens
        self._size = _even(-(-slots // samples))
        self._held: tuple[int, Decoding] | None = None
        self.length = bucket(max(map(len, prompts)) - 1)

    def copies(self, new_B: np.ndarray) -> Iterator[tuple[Decoding, np.ndarray]]:
        """The blocks that hold the prompts of new rows, and which of its prompts each slot gets."""
        prompt_B = new_B // self._samples
        for number in np.unique(prompt_B[new_B >= 0] // self._size):
            inside_B = (new_B >= 0) & (prompt_B // self._size == number)
            places_B = np.where(inside_B, prompt_B % self._size, -1).astype(np.int32)
            yield self._read(int(number)), places_B

    def _read(self, number: int) -> Decoding:
        if self._held is None or self._held[0] != number:
            self._held = None  # frees its memory before the next block takes some
            begin = number * self._size
            prompts = list(self._prompts[begin : begin + self._size])
            prompts += [[0]] * (self._size - len(prompts))
            request = pad_prompts(prompts, self.length, self._limit)
            block = start(self._model, self._params, request, sampler=self._sampler, room=0)
            self._held = number, block
        return self._held[1]


def _harvest(state: Decoding, schedule: _Schedule, made: Generation) -> int:
    """Takes the rows that have ended out of their slots; returns the steps since the last time."""
    lengths_B, limits_B, stopped_B = jax.device_get(
        (state.lengths_B, state.limits_B, state.stopped_B)
    )
    # While a step is taken, some row is in need of it: the one that has grown most took them all.
    steps = int((lengths_B - schedule.length_B)[schedule.row_B >= 0].max())
    schedule.length_B = lengths_B.copy()
    ended = np.flatnonzero((schedule.row_B >= 0) & (stopped_B | (lengths_B == limits_B)))
    tokens_BN, logprobs_BN = jax.device_get((state.tokens_BN, state.logprobs_BN))
    rows, width = schedule.row_B[ended], made.tokens.shape[1]
    made.tokens[rows] = tokens_BN[ended, :width]
    made.logprobs[rows] = logprobs_BN[ended, :width]
    made.lengths[rows], made.stopped[rows] = lengths_B[ended], stopped_B[ended]
    schedule.row_B[ended] = -1
    return steps


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()


def _even(count: int) -> int:
    """Rounded up to rows of which every device of the mesh's batch axes has as many."""
    mesh = jax.sharding.get_abstract_mesh()
    shards = 1 if mesh.empty else batch_shards(mesh)
    return -(-count // shards) * shards


@contextlib.contextmanager
def _counting_compilations(cost: DecodingCost) -> Iterator[None]:
    """Counts what is compiled in the block."""

    def count(event: str, duration_secs: float, **_: str | int) -> None:
        cost.compilations += event == _COMPILE_EVENT

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
