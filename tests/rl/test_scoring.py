"""Functions that others wrote: an outcome for every sample, whatever they do."""

import asyncio
import re
import signal
import threading
import time

import numpy as np
import pytest

from llm_jax.rl.scoring import CONCURRENT, as_outcome, from_function, from_sample


def test_a_function_gets_prompt_completion_and_row(sample):
    seen = []

    def reward(prompt, completion, row):
        seen.append((prompt, completion, dict(row)))
        return 0.75

    scored = from_function(reward, 1.0).score([sample("a", prompt="b?", c=1), sample("d")])
    assert scored == [0.75, 0.75]
    assert seen == [("b?", "a", {"c": 1}), ("What?", "d", {})]


def test_a_call_that_raises_costs_its_own_sample_only(sample):
    scored = from_function(lambda p, c, row: 1 / len(c), 1.0).score([sample(c) for c in ("a", "")])
    assert scored[0] == 1.0 and isinstance(scored[1], ZeroDivisionError)


def test_functions_that_are_awaited_run_side_by_side(sample):
    async def reward(prompt, completion, row):
        await asyncio.sleep(0.2)
        return float(completion)

    samples = [sample(text) for text in ("1", "2", "x", "4")] * 4
    begin = time.monotonic()
    scored = from_function(reward, 5.0).score(samples)
    assert time.monotonic() - begin < 1.5
    assert [s for s in scored if not isinstance(s, ValueError)] == [1.0, 2.0, 4.0] * 4
    assert all(isinstance(scored[i], ValueError) for i in range(2, 16, 4))


def test_functions_that_are_awaited_may_be_scored_inside_a_running_loop(sample):
    async def reward(prompt, completion, row):
        return 1.0

    async def notebook():
        return from_function(reward, 5.0).score([sample("a")])

    assert asyncio.run(notebook()) == [1.0]


def test_not_all_are_awaited_at_once(sample):
    running, most = 0, 0

    async def reward(prompt, completion, row):
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.01)
        running -= 1
        return 0.0

    from_function(reward, 5.0).score([sample("a")] * (2 * CONCURRENT))
    assert most == CONCURRENT


def test_a_call_that_hangs_fails_in_time(sample):
    def pattern(prompt, completion, row):
        return re.fullmatch("(a+)+b", completion) is not None

    async def sleep(prompt, completion, row):
        await asyncio.sleep(60 if completion == "slow" else 0)
        return 1.0

    async def cancelled(prompt, completion, row):
        raise asyncio.CancelledError

    begin = time.monotonic()
    plain = from_function(pattern, 0.2).score([sample("a" * 40), sample("ab")])
    awaited = from_function(sleep, 0.2).score([sample("slow"), sample("fast")])
    assert time.monotonic() - begin < 5
    for hung, fine in (plain, awaited):
        assert isinstance(hung, TimeoutError) and str(hung) == "it took longer than 0.2 s"
        assert fine == 1.0
    (ended,) = from_function(cancelled, 0.2).score([sample("a")])
    assert isinstance(ended, RuntimeError)


def test_the_alarm_of_others_is_left_as_it_was(sample):
    def mine(*_):
        raise AssertionError

    before = signal.signal(signal.SIGALRM, mine)
    try:
        from_function(lambda p, c, row: 1.0, 0.1).score([sample("a")])
        time.sleep(0.2)
        assert signal.getsignal(signal.SIGALRM) is mine
    finally:
        signal.signal(signal.SIGALRM, before)


def test_outside_the_main_thread_functions_run_without_a_limit(sample):
    scored = []
    reward = from_function(lambda p, c, row: time.sleep(0.2) or 1.0, 0.1)
    thread = threading.Thread(target=lambda: scored.extend(reward.score([sample("a")])))
    thread.start()
    thread.join()
    assert scored == [1.0]


@pytest.mark.parametrize(
    ("value", "number"),
    [(0.75, 0.75), (1, 1.0), (True, 1.0), (np.float64(0.1), np.float32(0.1)), (np.ones(()), 1.0)],
)
def test_numbers_of_every_kind_are_rewards(value, number):
    assert as_outcome(value) == number and isinstance(as_outcome(value), float)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300, np.nan])
def test_what_is_not_finite_is_no_reward(value):
    assert isinstance(as_outcome(value), ValueError)
    assert f"it gave {value}" in str(as_outcome(value))


@pytest.mark.parametrize("value", [None, "0.5", b"1", [1.0, 2.0], np.ones(2), object()])
def test_what_is_no_number_is_no_reward(value):
    assert isinstance(as_outcome(value), TypeError)
    assert f"it gave {type(value).__name__}, a number is wanted" in str(as_outcome(value))


def test_a_whole_sample_may_be_scored(sample):
    reward = from_sample(lambda s: len(s.prompt_ids))
    assert reward.score([sample("a", prompt="b"), sample("a", prompt="bcd")]) == [2.0, 4.0]
