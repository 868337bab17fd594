"""Retrieval accuracy: an oracle scores 1, the blind 0, and the model is read where it should."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import sharding
from llm_jax.data import needle
from llm_jax.data.needle import NeedleExamples, needle_examples
from llm_jax.data.tokenizer_base import ByteTokenizer
from llm_jax.evals.needle import answer_tokens, evaluate_needle
from llm_jax.models import LanguageModel, ModelConfig

LENGTH = 160
DEPTHS = [0.0, 0.5, 1.0]


class OneDocument:
    """A token store in memory."""

    def __init__(self, tokens):
        self.tokens = np.array(tokens, np.uint16)

    def __len__(self):
        return 1

    def document(self, index):
        return self.tokens


@pytest.fixture(scope="module")
def examples() -> NeedleExamples:
    tokenizer = ByteTokenizer()
    text = tokenizer.encode("All happy families are alike. " * 40)
    return needle_examples(tokenizer, OneDocument(text), LENGTH, DEPTHS, 5, seed=0)


def oracle(params, batch):
    """Finds the needle with eyes: the value behind the earlier copy of the question."""
    answers = []
    answer_length = int(np.sum(batch.loss_weights[0] > 0))
    for row, weights in zip(batch.tokens, batch.loss_weights, strict=True):
        marked = np.flatnonzero(weights)
        if not len(marked):
            answers.append([0] * answer_length)
            continue
        text = bytes(np.where(row < 256, row, 0).astype(np.uint8))
        question = text[text.rindex(needle.BEFORE_NAME.encode()) : marked[0] + 1]
        begin = text.index(question + b" ") + len(question)
        answers.append(list(text[begin : begin + len(marked)]))
    return np.array(answers, np.int32)


def test_an_oracle_scores_one_and_a_blind_guess_zero(examples):
    result = evaluate_needle(oracle, None, examples, batch_size=4)
    names = [f"accuracy_by_depth/{depth:.2f}" for depth in DEPTHS]
    assert result == {"accuracy": 1.0, **{name: 1.0 for name in names}}
    blind = evaluate_needle(lambda p, b: oracle(p, b) * 0, None, examples, batch_size=4)
    assert set(blind.values()) == {0.0}


def test_one_wrong_token_makes_an_answer_wrong(examples):
    def last_wrong(params, batch):
        answers = oracle(params, batch)
        answers[:, -1] += 1
        return answers

    assert evaluate_needle(last_wrong, None, examples, batch_size=4)["accuracy"] == 0.0


@pytest.mark.parametrize("batch_size", [1, 4, 15, 40])
def test_each_example_counts_once_at_its_own_depth(examples, batch_size):
    shallow = {row.tokens.tobytes() for row in examples.rows[:5]}

    def only_shallow(params, batch):
        known = np.array([row.tobytes() in shallow for row in batch.tokens])
        return np.where(known[:, None], oracle(params, batch), 0)

    result = evaluate_needle(only_shallow, None, examples, batch_size)
    assert result == {
        "accuracy": pytest.approx(1 / 3),
        "accuracy_by_depth/0.00": 1.0,
        "accuracy_by_depth/0.50": 0.0,
        "accuracy_by_depth/1.00": 0.0,
    }


@pytest.fixture(scope="module")
def model_and_params():
    model = LanguageModel(
        ModelConfig(vocab_size=264, embed_dim=16, num_layers=1, num_heads=2, mlp_dim=16)
    )
    return model, sharding.unbox(model.init(jax.random.key(0)))


def test_answer_tokens_are_the_argmax_of_all_logits_at_the_marked_positions(
    examples, model_and_params
):
    model, params = model_and_params
    batch = jax.tree.map(lambda *rows: np.stack(rows), *examples.rows[:4])
    # Positions apart from one another, so that their order is tested too.
    batch.loss_weights[:] = 0
    batch.loss_weights[:, [5, 60, 100]] = 1
    got = jax.jit(functools.partial(answer_tokens, model, count=3))(params, batch)
    hidden, _ = model.apply(params, batch.tokens, batch.positions, batch.segment_ids)
    everywhere = jnp.argmax(model.logits(params, hidden), axis=-1)
    np.testing.assert_array_equal(got, everywhere[:, [5, 60, 100]])
    assert got.dtype == jnp.int32


def test_teacher_forced_success_is_greedy_success(examples, model_and_params):
    """Targets are rewritten to what greedy decoding gives: then every answer must be right."""
    model, params = model_and_params
    count = examples.answer_tokens

    @jax.jit
    def next_token(tokens):
        hidden, _ = model.apply(params, tokens)
        return jnp.argmax(model.logits(params, hidden), axis=-1)

    rows = []
    for index, row in enumerate(examples.rows[:4]):
        sequence = np.append(row.tokens, row.targets[-1])
        for place in range(LENGTH + 1 - count, LENGTH + 1):
            sequence[place] = next_token(sequence[None, :-1])[0, place - 1]
        if index == 3:  # greedy decoding gives something else here
            sequence[-1] = (sequence[-1] + 1) % 256
        rows.append(row.replace(tokens=sequence[:-1], targets=sequence[1:]))
    greedy = NeedleExamples(tuple(rows), examples.depths[:4], count)
    answer = jax.jit(functools.partial(answer_tokens, model, count=count))
    assert evaluate_needle(answer, params, greedy, batch_size=3)["accuracy"] == 0.75
