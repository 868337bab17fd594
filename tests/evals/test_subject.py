"""The two things that tasks ask of a model: likelihoods against a plain forward pass, and text."""

import dataclasses

import numpy as np
import pytest

from llm_jax.errors import UserError
from llm_jax.evals.subject import GREEDY
from llm_jax.generation.sampler import SamplerConfig

RNG = np.random.default_rng(0)


def ids(count):
    return RNG.integers(0, 256, count).tolist()


PAIRS = [
    (ids(1), ids(3)),
    (ids(70), ids(1)),
    (ids(20), ids(12)),
    (ids(5), ids(200)),
    (ids(2), ids(2)),
]


@pytest.fixture(scope="module")
def found(plain_subject, params):
    return dataclasses.replace(plain_subject, batch=3).loglikelihoods(params, PAIRS)


def test_likelihoods_are_those_of_all_logits(found, all_logprobs):
    for (context, continuation), likelihood in zip(PAIRS, found, strict=True):
        rows = all_logprobs([*context, *continuation])[len(context) - 1 : -1]
        expected = [row[token] for row, token in zip(rows, continuation, strict=True)]
        np.testing.assert_allclose(likelihood.logprobs, expected, atol=2e-5)
        assert likelihood.total == pytest.approx(sum(expected), abs=1e-3)
        np.testing.assert_array_equal(likelihood.greedy, rows.argmax(-1) == continuation)


def test_the_batch_changes_nothing(found, plain_subject, params):
    for batch in (1, 16):
        again = dataclasses.replace(plain_subject, batch=batch).loglikelihoods(params, PAIRS)
        for first, second in zip(found, again, strict=True):
            np.testing.assert_allclose(first.logprobs, second.logprobs, atol=1e-5)


def test_what_greedy_decoding_writes_is_greedy(plain_subject, params):
    prompts = [ids(3), ids(40), ids(9)]
    made = plain_subject.generate(params, prompts, max_new_tokens=6)
    pairs = [(prompt, list(c.ids)) for prompt, c in zip(prompts, made, strict=True)]
    assert all(x.is_greedy for x in plain_subject.loglikelihoods(params, pairs))
    pairs[1][1][3] ^= 1
    verdicts = [x.is_greedy for x in plain_subject.loglikelihoods(params, pairs)]
    assert verdicts == [True, False, True]


def test_a_context_that_is_too_long_loses_its_beginning(plain_subject, params):
    context, continuation = ids(300), ids(7)
    whole, cut = plain_subject.loglikelihoods(
        params, [(context, continuation), (context[-250:], continuation)]
    )
    np.testing.assert_allclose(whole.logprobs, cut.logprobs, atol=1e-5)


def test_places_may_stand_anywhere(plain_subject, params, all_logprobs):
    sequence, places = ids(50), [1, 7, 30, 49]
    (found,) = plain_subject.read(params, [(sequence, places)])
    expected = [all_logprobs(sequence)[place - 1, sequence[place]] for place in places]
    np.testing.assert_allclose(found.logprobs, expected, atol=2e-5)


def test_completions_do_not_depend_on_their_batch_and_end_at_a_stop_string(plain_subject, params):
    prompts = [ids(3), ids(40), ids(9), ids(17)]
    hot = SamplerConfig(temperature=1.0)
    narrow, wide = dataclasses.replace(plain_subject, batch=1), plain_subject
    settings = {"max_new_tokens": 12, "sampler": hot, "seed": 3}
    made = wide.generate(params, prompts, **settings)
    assert made == narrow.generate(params, prompts, **settings)
    assert made != wide.generate(params, prompts, **{**settings, "seed": 4})
    stop = next(c.text[2] for c in made if len(c.text) > 3 and c.text[2] not in c.text[:2])
    for whole, cut in zip(
        made, wide.generate(params, prompts, stop_strings=[stop], **settings), strict=True
    ):
        assert cut.text == whole.text.partition(stop)[0]
        assert cut.finished or stop not in whole.text


def test_bad_questions_are_refused(plain_subject, params):
    with pytest.raises(UserError, match="a token each"):
        plain_subject.loglikelihoods(params, [([], [1])])
    with pytest.raises(UserError, match="256 that the model reads"):
        plain_subject.loglikelihoods(params, [([1], ids(257))])
    with pytest.raises(UserError, match="outside the vocabulary of 320"):
        plain_subject.loglikelihoods(params, [([1], [320])])
    with pytest.raises(UserError, match="longer than the model reads"):
        plain_subject.read(params, [(ids(258), [1])])
    with pytest.raises(UserError, match="leave no room"):
        plain_subject.generate(params, [[1]], max_new_tokens=256, sampler=GREEDY)
    with pytest.raises(UserError, match="batch=0"):
        dataclasses.replace(plain_subject, batch=0)
