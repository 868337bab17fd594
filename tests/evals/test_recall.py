"""Retrieval tasks: whoever finds everything scores 1, whoever reads the end alone less."""

import dataclasses

import numpy as np
import pytest

from llm_jax.errors import UserError
from llm_jax.evals import recall
from llm_jax.evals.subject import LogLikelihood, Subject
from llm_jax.evals.tasks import TASKS

TEXT = "All happy families are alike; each is unhappy in its own way. " * 20


class Reader(Subject):
    """Answers by what `eyes(tokens, places)` says of each row."""

    eyes = staticmethod(lambda tokens, places: True)

    def read(self, params, questions):
        return [
            LogLikelihood(np.zeros(len(places)), np.full(len(places), self.eyes(tokens, places)))
            for tokens, places in questions
        ]


@pytest.fixture
def reader(plain_subject, texts_of):
    fields = {f.name: getattr(plain_subject, f.name) for f in dataclasses.fields(plain_subject)}
    return Reader(**{**fields, "held_out": lambda: {"text": texts_of(TEXT)}, "length": 240})


def test_a_grid_has_a_cell_for_each_depth_and_length(reader):
    config = recall.NeedleTaskConfig(lengths=(240, 120), depths=3, per_cell=4)
    reader.__class__ = type("Near", (Reader,), {"eyes": staticmethod(near)})
    result = recall.needle_task(config, reader)(None)
    assert len(result.examples) == 24
    cells = {
        (length, depth): result.metrics[f"accuracy_by_length_and_depth/{length}/{depth:.2f}"]
        for length in (120, 240)
        for depth in (0, 0.5, 1)
    }
    assert cells == {(n, d): float(d == 1 or (n, d) == (120, 0.5)) for n, d in cells}
    assert result.metrics["accuracy"] == 0.5
    assert result.metrics["accuracy_by_length/240"] == pytest.approx(1 / 3)
    assert result.metrics["accuracy_by_depth/0.50"] == 0.5
    ids = [row["id"] for row in result.examples]
    assert len(set(ids)) == 24 and ids[0] == "120/0"


def test_needles_have_as_many_answers_as_are_asked_for(reader):
    seen = set()

    def eyes(tokens, places):
        return not seen.add(bytes(np.take(tokens, places).astype(np.uint8)))

    reader.__class__ = type("Notes", (Reader,), {"eyes": staticmethod(eyes)})
    config = recall.NeedleTaskConfig(lengths=(240,), per_cell=16, names=4, answers=3)
    recall.needle_task(config, reader)(None)
    assert len(seen) == 3


def near(tokens, places):
    """Whether the value that is asked for is stated in the last 90 tokens before the question."""
    text = bytes(np.where(tokens < 256, tokens, 32).astype(np.uint8))
    question = text[text.rindex(b" Note:") : places[0]]
    return len(text) - text.index(question) < 110


@pytest.mark.parametrize("name", ["needle", "multi_needle", "variable_tracking", "key_value"])
def test_lengths_that_hold_no_row_are_left_out_unless_they_are_asked_for(reader, name):
    kind = TASKS[name]
    result = kind.make(kind.settings(), reader)(None)
    lengths = {row["length"] for row in result.examples}
    assert 240 in lengths and result.metrics["accuracy"] == 1.0
    assert lengths <= {60, 120, 240}
    with pytest.raises(UserError, match="too short"):
        kind.make(kind.settings(lengths=(20,)), reader)
    with pytest.raises(UserError, match="at most the 256 that the model reads"):
        kind.make(kind.settings(lengths=(257,)), reader)


def test_a_real_model_is_read(plain_subject, params):
    config = recall.KeyValueConfig(lengths=(100,), depths=2, per_cell=3)
    result = recall.key_value_task(config, plain_subject)(params)
    assert [row["depth"] for row in result.examples] == [0.0] * 3 + [1.0] * 3


def test_text_comes_from_a_source_or_what_was_held_out(plain_subject, tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    config = recall.MultiNeedleConfig(lengths=(250,), needles=1, distractors=1, per_length=2)
    with pytest.raises(UserError, match="has no held-out texts of its own"):
        recall.multi_needle_task(config, plain_subject)
    named = dataclasses.replace(config, source=str(tmp_path / "a.txt"))
    assert recall.multi_needle_task(named, plain_subject)
    with pytest.raises(UserError, match="per_length=0"):
        dataclasses.replace(config, per_length=0)
