"""Multiple choice: scores against sums over all logits, shots, and the forms that rows have."""

import json

import numpy as np
import pytest

from llm_jax.data.tokenizer_base import ByteTokenizer
from llm_jax.errors import UserError
from llm_jax.evals.multiple_choice import MultipleChoiceConfig, multiple_choice_task

BYTES = ByteTokenizer()
ROWS = [
    {"question": "Sky?", "choices": ["green", "blue", "a dark red"], "answer": 1},
    {"question": "Sum {choice}?", "choices": ["four", "{letter}"], "answer": "A"},
    {"question": "Fruit?", "choices": {"text": ["chair", "apple"], "label": ["1", "2"]},
     "answer": "2"},
    {"question": "Sea?", "choices": ["wet", "dry"], "answer": "wet"},
]  # fmt: skip
ANSWERS = [1, 0, 1, 0]


@pytest.fixture
def config(tmp_path):
    """`config(data, **settings)`: of rows that are written to a file."""

    def make(data=ROWS, **settings):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
        return MultipleChoiceConfig(source=str(tmp_path / "rows.jsonl"), **settings)

    return make


def total(all_logprobs, context, continuation):
    before, after = [BYTES.bos_id, *context.encode()], list(continuation.encode())
    rows = all_logprobs([*before, *after])[len(before) - 1 :]
    return sum(rows[i, token] for i, token in enumerate(after))


def texts(row):
    choices = row["choices"]
    return choices["text"] if isinstance(choices, dict) else choices


def test_scores_are_sums_over_all_logits(config, plain_subject, params, all_logprobs):
    result = multiple_choice_task(config(), plain_subject)(params)
    picks = []
    for row, answer, found in zip(ROWS, ANSWERS, result.examples, strict=True):
        context = f"Question: {row['question']}\nAnswer:"
        raw = [total(all_logprobs, context, f" {text}") for text in texts(row)]
        bare = [total(all_logprobs, "Answer:", f" {text}") for text in texts(row)]
        sizes = [len(text) for text in texts(row)]
        np.testing.assert_allclose(found["logprobs"], raw, rtol=1e-5)
        np.testing.assert_allclose(found["unconditional_logprobs"], bare, rtol=1e-5)
        assert found["bytes"] == sizes and found["answer"] == answer
        picks.append(
            [np.argmax(raw), np.argmax(np.divide(raw, sizes)), np.argmax(np.subtract(raw, bare))]
        )
    right = (np.array(picks) == np.array(ANSWERS)[:, None]).mean(axis=0)
    names = ("accuracy", "accuracy_by_bytes", "accuracy_unconditional")
    assert [result.metrics[name] for name in names] == right.tolist()
    spread = np.sqrt(right[0] * (1 - right[0]) / 3)
    assert result.metrics["accuracy_stderr"] == pytest.approx(spread)
    assert result.metrics["chance"] == pytest.approx(np.mean([1 / 3, 1 / 2, 1 / 2, 1 / 2]))
    assert result.metrics["truncated"] == 0


def test_letters_stand_for_choices_that_are_shown(config, plain_subject, params, all_logprobs):
    settings = {"context": "{question}\n{choices}\nAnswer:", "continuation": " {letter}"}
    result = multiple_choice_task(config(**settings), plain_subject)(params)
    context = "Sum {choice}?\nA. four\nB. {letter}\nAnswer:"
    raw = [total(all_logprobs, context, f" {letter}") for letter in "AB"]
    np.testing.assert_allclose(result.examples[1]["logprobs"], raw, rtol=1e-5)


class Listener:
    """Keeps the contexts that a task asks about."""

    def __init__(self, subject):
        self.subject, self.contexts = subject, []

    def __getattr__(self, name):
        return getattr(self.subject, name)

    def loglikelihoods(self, params, pairs):
        self.contexts += [BYTES.decode(context) for context, _ in pairs]
        return self.subject.loglikelihoods(params, pairs)


def contexts_of(config, subject, params):
    listener = Listener(subject)
    multiple_choice_task(config, listener)(params)
    return [context for context in dict.fromkeys(listener.contexts) if context != "Answer:"]


def test_shots_are_other_rows_with_their_answers_whatever_else_is_asked(
    config, plain_subject, params
):
    shown = contexts_of(config(shots=2), plain_subject, params)
    blocks = {
        f"Question: {row['question']}\nAnswer: {texts(row)[answer]}": row
        for row, answer in zip(ROWS, ANSWERS, strict=True)
    }
    for row, context in zip(ROWS, shown, strict=True):
        *shots, last = context.split("\n\n")
        assert last == f"Question: {row['question']}\nAnswer:"
        assert len(set(shots)) == 2 and row not in [blocks[shot] for shot in shots]
    assert contexts_of(config(shots=2, rows=1), plain_subject, params) == shown[:1]
    assert contexts_of(config(shots=2, seed=1), plain_subject, params) != shown
    with pytest.raises(UserError, match="shots=4 are more than the 3 other"):
        multiple_choice_task(config(shots=4), plain_subject)


def test_a_context_that_is_cut_is_counted(config, plain_subject, params):
    rows = [*ROWS, {"question": "x" * 300, "choices": ["a", "b"], "answer": 0}]
    result = multiple_choice_task(config(rows), plain_subject)(params)
    assert result.metrics["truncated"] == 0.2 and result.examples[4]["truncated"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "a", "choices": ["b", "c"]}, "no field 'answer'|'answer"),
        ({"question": "a", "choices": ["b", "c"], "answer": 2}, "2 is no place among 2"),
        ({"question": "a", "choices": ["b", "c"], "answer": "d"}, "'d' is none of the choices"),
        ({"question": "a", "choices": ["b"], "answer": 0}, "holds 1 choices; 2 to 26"),
        ({"question": "a", "choices": "b", "answer": 0}, "a list is wanted"),
        ({"choices": ["b", "c"], "answer": 0}, "question"),
    ],
)
def test_a_malformed_row_is_told_or_skipped(config, plain_subject, params, row, message):
    with pytest.raises(UserError, match=message) as caught:
        multiple_choice_task(config([ROWS[0], row]), plain_subject)
    assert "rows.jsonl:2" in str(caught.value)
    skipping = config([ROWS[0], row], malformed="skip")
    assert len(multiple_choice_task(skipping, plain_subject)(params).examples) == 1


def test_bad_settings_are_refused(config):
    for settings, message in [
        ({"rows": 0}, "rows=0"),
        ({"context": "Question:"}, "does not hold"),
        ({"continuation": " x"}, "neither"),
        ({"unconditional": ""}, "unconditional is empty"),
    ]:
        with pytest.raises(UserError, match=message):
            config(**settings)
