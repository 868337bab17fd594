"""Runs as responders: their answers are those of the generator, their leanings those of a plain
forward pass."""

import jax
import numpy as np
import pytest

from llm_jax.data.examples import Message
from llm_jax.data.templates import TEMPLATES
from llm_jax.data.tokenizer_base import ByteTokenizer
from llm_jax.errors import UserError
from llm_jax.generation.generate import generate_texts
from llm_jax.generation.sampler import SamplerConfig
from llm_jax.synthesis.responders import Unanswered

BYTES = ByteTokenizer()
END = BYTES.special_ids["end_of_turn"]


def test_answers_are_those_of_the_generator(responder, random_weights, user):
    someone = responder(random_weights, temperature=2.0, max_new_tokens=12)
    dialogues = [user("a"), user("What?"), (*user("b"), Message("assistant", "c"), *user("d"))]
    prompts = [TEMPLATES["chatml"].render_prompt(turns, (), BYTES) for turns in dialogues]
    expected = generate_texts(
        someone.run.model, someone.run.params, BYTES, prompts, max_new_tokens=12,
        sampler=SamplerConfig(temperature=2.0), rng=jax.random.key(3),
        stop_ids=(END, BYTES.eos_id),
    )  # fmt: skip
    replies = someone.answer(dialogues, jax.random.key(3))
    assert [reply.text for reply in replies] == [text.strip() for text in expected]
    narrow = responder(random_weights, temperature=2.0, max_new_tokens=12, batch=1)
    assert narrow.answer(dialogues, jax.random.key(3)) == replies
    assert someone.answer(dialogues, jax.random.key(4)) != replies


def test_an_answer_is_finished_where_its_turn_ends(responder, unigram, user):
    (ending,) = responder(unigram({END: 0.0})).answer([user("a")], jax.random.key(0))
    (endless,) = responder(unigram({97: 0.0})).answer([user("a")], jax.random.key(0))
    assert ending.finished and ending.text == ""
    assert not endless.finished and endless.text == "a" * 40


def test_a_prompt_without_room_has_no_answer_and_the_others_have(responder, unigram, user):
    someone = responder(unigram({97: 0.0, END: 0.0}))
    long, short = someone.answer([user("x" * 475), user("a")], jax.random.key(0))
    assert isinstance(long, Unanswered) and "answers leave 472" in str(long)
    assert not isinstance(short, Unanswered)
    long, short = someone.lean(["x" * 600, "A or B?"])
    assert isinstance(long, Unanswered) and "reads 512" in str(long)
    assert short.log_odds == 0


def test_leanings_are_the_log_probabilities_of_the_letters(responder, random_weights):
    questions = ["A or B?", "Which one, A or B? " * 3, "Which?"]
    leanings = responder(random_weights, batch=4).lean(questions)
    model = responder(random_weights).run.model
    weights = jax.tree.map(jax.numpy.asarray, random_weights)
    for question, leaning in zip(questions, leanings, strict=True):
        prompt = TEMPLATES["chatml"].render_prompt([Message("user", question)], (), BYTES)
        hidden, _ = model.apply(weights, np.array([prompt], np.int32))
        logp = jax.nn.log_softmax(model.logits(weights, hidden))[0, -1]
        first, second = float(logp[ord("A")]), float(logp[ord("B")])
        np.testing.assert_allclose(leaning.log_odds, first - second, atol=1e-4)
        np.testing.assert_allclose(leaning.mass, np.exp(first) + np.exp(second), rtol=1e-4)


def test_what_a_template_cannot_write_has_no_answer(responder, random_weights):
    someone = responder(random_weights)
    bad = TEMPLATES["chatml"].__class__("bad")
    bad._segments = lambda *args, **kwargs: (_ for _ in ()).throw(UserError("no such turn."))
    someone.template = bad
    (reply,) = someone.answer([[Message("system", "a")]], jax.random.key(0))
    (leaning,) = someone.lean(["a"])
    assert str(reply) == str(leaning) == "no such turn"


def test_answers_that_leave_no_room_are_refused(responder, random_weights):
    with pytest.raises(UserError, match="512 tokens do not fit"):
        responder(random_weights, max_new_tokens=512)
