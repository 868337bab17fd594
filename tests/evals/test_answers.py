"""Generated answers against the true ones: the measures by hand, the cut, and the sampler check."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import sharding
from llm_jax.data.tokenizer_base import ByteTokenizer
from llm_jax.evals.answers import (
    AnswerExamples,
    answer_examples,
    evaluate_answers,
    normalise,
    token_f1,
)
from llm_jax.generation.decoding import Generation
from llm_jax.generation.generate import generate
from llm_jax.generation.sampler import SamplerConfig
from llm_jax.models import LanguageModel, ModelConfig
from llm_jax.objectives import lm

BYTES = ByteTokenizer()
END = BYTES.special_ids["end_of_turn"]

# --- the measures ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "wanted"), [
    ("The  Parrot, a bird!", "parrot bird"), ("theory\nanalysis", "theory analysis"),
    ("AN answer.", "answer"), ("the", ""), ("don't", "dont"),
])  # fmt: skip
def test_texts_are_compared_without_case_punctuation_and_articles(text, wanted):
    assert normalise(text) == wanted


@pytest.mark.parametrize(("found", "wanted", "score"), [
    ("the cat sat", "A cat sat.", 1.0),
    ("cat sat down", "cat lay", 2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2)),
    ("cat cat cat", "cat dog", 2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2)),  # counted once
    ("dog", "cat", 0.0), ("", "cat", 0.0), ("cat", "the", 0.0), ("the", "an", 1.0),
])  # fmt: skip
def test_f1_of_words_by_hand(found, wanted, score):
    assert token_f1(found, wanted) == pytest.approx(score)
    assert token_f1(wanted, found) == pytest.approx(score)


def said(*texts, stopped=True):
    """What a generation of these texts looks like; its log-probabilities are −1 a token."""
    rows = [[*text.encode(), END] for text in texts]
    width = max(map(len, rows))
    tokens = np.array([row + [BYTES.pad_id] * (width - len(row)) for row in rows], np.int32)
    lengths = np.array(list(map(len, rows)), np.int32)
    logprobs = np.where(np.arange(width) < lengths[:, None], -1.0, 0.0).astype(np.float32)
    return Generation(tokens, lengths, logprobs, np.array([stopped] * len(rows)))


def ones(params, batch):
    return np.ones(batch.tokens.shape, np.float32)


def measure(found, wanted, answer_after=None, nats=ones, **settings):
    examples = AnswerExamples([[1, 2]] * len(wanted), wanted)
    return evaluate_answers(
        lambda params, prompts: said(*found, **settings), nats, None, BYTES, examples, len(wanted),
        answer_after,
    )  # fmt: skip


def test_the_measures_are_means_over_the_answers():
    result = measure(["The cat.", "a dog sat", "no"], ["cat", "dog", "yes"])
    assert result == {
        "exact_match": pytest.approx(1 / 3),
        "token_f1": pytest.approx((1 + 2 / 3) / 3),
        "finished": 1.0,
        "sampling_logprob_difference": 0.0,
    }
    assert measure(["x"], ["x"], stopped=False)["finished"] == 0.0


def test_only_what_follows_the_marker_counts():
    found = ["2 + 2 #### 5 #### 4", "four", "#### 4 5"]
    assert measure(found, ["it is #### 4"] * 3, "####")["exact_match"] == pytest.approx(1 / 3)
    assert measure(found, ["it is #### 4"] * 3)["exact_match"] == 0.0
    # Without the marker there is no answer, so it equals no true one.
    assert measure(["4"], ["#### 4"], "####")["token_f1"] == 0.0


# --- the sampler against a forward pass -----------------------------------------------------------


def test_the_difference_is_read_at_the_tokens_that_were_sampled():
    prompts, seen = [[1, 2, 3], [4]], {}

    def nats(params, batch):
        seen["batch"] = batch
        values = np.full(batch.tokens.shape, 99.0, np.float32)
        values[0, 2:5], values[1, :2] = 1.0, 1.0  # "ab" and its end after 3 tokens; "c" after 1
        values[1, 1] = 1.25
        return values

    examples = AnswerExamples(prompts, ["ab", "c"])
    result = evaluate_answers(lambda *_: said("ab", "c"), nats, None, BYTES, examples, 2)
    assert result["sampling_logprob_difference"] == pytest.approx(0.25)
    batch = seen["batch"]
    assert batch.tokens.shape == (2, 32)
    assert batch.tokens[0, :6].tolist() == [1, 2, 3, *b"ab", END]
    assert batch.targets[0, :6].tolist() == [2, 3, *b"ab", END, 0]
    assert batch.segment_ids.sum(axis=1).tolist() == [6, 3]
    assert batch.positions[1, :4].tolist() == [0, 1, 2, 3]


@pytest.fixture(scope="module")
def tiny():
    model = LanguageModel(
        ModelConfig(
            vocab_size=264, embed_dim=16, num_layers=1, num_heads=2, mlp_dim=16, max_length=96
        )
    )
    rng = np.random.default_rng(0)
    shapes = sharding.unbox(jax.eval_shape(model.init, jax.random.key(0)))
    params = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), shapes)
    return model, params


def answer(tiny, examples, other=None, batch_size=2):
    model, params = tiny
    nats = jax.jit(functools.partial(lm.token_nats, model))

    def make(params, prompts):
        return generate(
            model, params, prompts, max_new_tokens=6, sampler=SamplerConfig(temperature=0),
            rng=jax.random.key(0), stop_ids=(END,), pad_id=BYTES.pad_id,
        )  # fmt: skip

    read = nats if other is None else lambda _, batch: nats(other, batch)
    return evaluate_answers(make, read, params, BYTES, examples, batch_size)


def test_the_sampler_agrees_with_the_model_and_not_with_another(tiny):
    examples = AnswerExamples([[BYTES.bos_id, *b"hello"], [BYTES.bos_id]], ["x", "y"])
    assert answer(tiny, examples)["sampling_logprob_difference"] < 1e-4
    other = jax.tree.map(lambda x: jnp.asarray(x) * 0.5, tiny[1])
    assert answer(tiny, examples, other)["sampling_logprob_difference"] > 0.1


def test_the_batch_size_changes_nothing(tiny):
    prompts = [[BYTES.bos_id, *word] for word in (b"one", b"twenty", b"three")]
    examples = AnswerExamples(prompts, ["x", "y", "z"])
    one, two, three = (answer(tiny, examples, batch_size=size) for size in (1, 2, 3))
    for key in ("exact_match", "token_f1", "finished"):
        assert one[key] == two[key] == three[key]
    assert max(r["sampling_logprob_difference"] for r in (one, two, three)) < 1e-4


# --- which prompts --------------------------------------------------------------------------------


def make_store(*conversations):
    """A store of conversations: lists of (text, whether it is trained)."""
    documents = [[(byte, mark) for text, mark in parts for byte in text.encode()]
                 for parts in conversations]  # fmt: skip
    offsets = np.concatenate([[0], np.cumsum(list(map(len, documents)))])
    flat = [pair for document in documents for pair in document]
    return types.SimpleNamespace(
        tokens=np.array([byte for byte, _ in flat], np.uint16),
        trained=np.array([mark for _, mark in flat], np.uint8),
        offsets=offsets,
    )


def asked(store, count=10, longest=100):
    examples = answer_examples(store, BYTES, count, longest)
    return [(bytes(p).decode(), a) for p, a in zip(examples.prompts, examples.answers, strict=True)]


def test_the_last_answer_is_asked_for_with_all_that_stands_before_it():
    store = make_store(
        [("ask", 0), ("one", 1)],
        [("ask", 0), ("one", 1), ("more", 0), ("two", 1), ("last", 0), ("three", 1), ("tail", 0)],
        [("answer throughout", 1)],
        [("never trained", 0)],
    )
    assert asked(store) == [("ask", "one"), ("askonemoretwolast", "three")]


def test_prompts_are_spread_over_the_store_and_long_ones_passed_over():
    store = make_store(*[[(f"ask {i}" + "!" * i, 0), (f"{i}", 1)] for i in range(8)])
    assert [a for _, a in asked(store, count=4)] == ["0", "2", "4", "6"]
    assert [a for _, a in asked(store, longest=7)] == ["0", "1", "2"]
    assert asked(store, longest=2) == []
