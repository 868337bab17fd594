"""What is scored, and how functions that others wrote are called: whatever they do, a row has an
outcome."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import inspect
import math
import signal
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from jax.sharding import Mesh

from llm_jax.data.template_base import ChatTemplate
from llm_jax.data.tokenizer_base import Tokenizer

# (prompt, completion, row) → a number, or what gives one when it is awaited.
RewardFunction = Callable[[str, str, Mapping[str, Any]], Any]

# The score of a sample, or why it has none.
Outcome = float | Exception

CONCURRENT = 64  # awaited at once


@dataclasses.dataclass(frozen=True)
class Sample:
    """A prompt and a completion that a policy gave to it.

    number: the row's place among the prompts. prompt_text, completion_text: without special tokens.
    prompt_ids, completion_ids: as the policy read and wrote them, its end included. finished:
    whether the completion ended by itself. row: the fields of the prompt's row.
    """

    number: int
    prompt_text: str
    completion_text: str
    prompt_ids: Sequence[int]
    completion_ids: Sequence[int]
    finished: bool
    row: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Policy:
    """What a reward may know of the policy, and where it runs.

    log: takes lines for the user. template: by which its prompts are rendered; None where no chat
    template has a part.
    """

    tokenizer: Tokenizer
    mesh: Mesh
    log: Callable[[str], None]
    template: ChatTemplate | None = None


@dataclasses.dataclass(frozen=True)
class Reward:
    """A reward, ready to score.

    score: gives the outcome of each sample, in order. on_mesh: whether it computes on the mesh, so
    that all processes have to call it; of any other, one process's numbers serve all. whitened:
    whether a sum takes it with mean 0 and variance 1 over the samples that are scored together.
    """

    score: Callable[[Sequence[Sample]], list[Outcome]]
    on_mesh: bool = False
    whitened: bool = False


def from_function(function: RewardFunction, seconds: float) -> Reward:
    """The reward that calls a function on the texts of one sample after the other.

    What is to be awaited runs side by side. A call that raises, takes longer than `seconds` or
    gives something else than a finite number has failed. The limit holds for what is awaited, and
    for plain functions in the main thread, where a signal can end them.
    """

    def score(samples: Sequence[Sample]) -> list[Outcome]:
        called = [_call(function, sample, seconds) for sample in samples]
        waiting = [place for place, value in enumerate(called) if inspect.isawaitable(value)]
        if waiting:
            # A thread of its own, since the caller's may have a running loop, as in a notebook.
            with ThreadPoolExecutor(1) as thread:
                gathered = _gather([called[place] for place in waiting], seconds)
                values = thread.submit(asyncio.run, gathered).result()
            for place, value in zip(waiting, values, strict=True):
                called[place] = value
        return [as_outcome(value) for value in called]

    return Reward(score)


def from_sample(function: Callable[[Sample], float]) -> Reward:
    """The reward that a function of the whole sample gives."""
    return Reward(lambda samples: [float(function(sample)) for sample in samples])


def as_outcome(value: Any) -> Outcome:
    """The value as a finite float32; why it is none where it is an exception or anything else."""
    if isinstance(value, Exception):
        return value
    try:
        if value is None or isinstance(value, str | bytes):  # of which numpy makes numbers
            raise TypeError
        with np.errstate(over="ignore"):
            number = float(np.float32(value))
    except (TypeError, ValueError, OverflowError):
        return TypeError(f"it gave {type(value).__name__}, a number is wanted")
    return number if math.isfinite(number) else ValueError(f"it gave {value}")


def _call(function: RewardFunction, sample: Sample, seconds: float) -> Any:
    try:
        with _time_limit(seconds):
            return function(sample.prompt_text, sample.completion_text, sample.row)
    except Exception as error:
        return error


async def _gather(values: Sequence[Awaitable[Any]], seconds: float) -> list[Any]:
    slots = asyncio.Semaphore(CONCURRENT)

    async def finish(value: Awaitable[Any]) -> Any:
        async with slots:
            try:
                return await asyncio.wait_for(value, seconds)
            except TimeoutError as error:
                return error if str(error) else _too_long(seconds)
            except asyncio.CancelledError:
                return RuntimeError("it was cancelled")
            except Exception as error:
                return error

    return await asyncio.gather(*map(finish, values))


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in the block where it takes longer; only the main thread can be told."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def expire(*_: Any) -> None:
        raise _too_long(seconds)

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _too_long(seconds: float) -> TimeoutError:
    return TimeoutError(f"it took longer than {seconds:g} s")
