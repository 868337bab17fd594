"""The best of several answers: what is chosen, with what it competes, and what is written of it."""

import itertools
import json

import numpy as np
import pytest

from llm_jax.data.chat_corpus import ChatDataConfig
from llm_jax.data.examples import Message
from llm_jax.data.formats import read_examples
from llm_jax.data.preferences import PreferenceDataConfig
from llm_jax.data.prompts import Prompt
from llm_jax.data.templates import make_template
from llm_jax.data.tokenizer_base import ByteTokenizer
from llm_jax.errors import UserError
from llm_jax.rl.scoring import Sample
from llm_jax.rl.selection import SelectionConfig, Selector, best_of

BYTES, CHATML = ByteTokenizer(), make_template("chatml")
NAN = float("nan")


def prompt(text, tools=()):
    messages = (Message("user", text),)
    ids = tuple(CHATML.render_prompt(messages, tools, BYTES))
    return Prompt(ids, text, messages, None, {"level": len(text)}, tools)


class Rounds:
    """Rounds of one selector; answers are given as {question: {answer: score}}."""

    def __init__(self, folder, run, **settings):
        self.folder, self.run = folder, run
        self.selector = Selector(SelectionConfig(**settings), folder, CHATML, BYTES, {"seed": 7})
        self.further = []

    def select(self, number, answers, finished=True, score=None, length=100):
        """`score`: of answers that were chosen before; the same for all of them."""
        prompts = [prompt(text) for text in answers]
        samples = [
            Sample(0, p.text, answer, p.ids, BYTES.encode(answer), finished, p.row)
            for p, some in zip(prompts, answers.values(), strict=True)
            for answer in some
        ]
        values = [value for some in answers.values() for value in some.values()]

        def scores(further):
            self.further = list(further)
            return np.array([*values, *[score] * len(further)], np.float32)

        return self.selector.select(
            number, prompts, samples, scores, run=self.run, step=number, length=length
        )

    def rows(self, name, number):
        lines = (self.folder / name / f"{number:08}.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]


@pytest.fixture
def rounds(tmp_path):
    """`rounds(name="run", **settings)`: of a run in that folder, which may have been there."""

    def make(name="run", **settings):
        return Rounds(tmp_path / name, name, **settings)

    return make


def texts(selection):
    return [sample and sample.completion_text for sample in selection.samples]


# --- what is chosen -------------------------------------------------------------------------------


def test_the_best_answers_of_different_texts_are_chosen(rounds):
    made = rounds(keep=2).select(
        0, {"a?": {"x": 1, "y": 3, "z": 2}, "b?": {"x": 2, "y": 0, "z": 1}}
    )
    assert texts(made) == ["y", "z", "x", "z"] and (made.chosen, made.earlier) == (4, 0)
    same = rounds("other", keep=2)
    samples = [Sample(0, "a?", text, (1,), (2,), True, {}) for text in "yyz"]
    scores = np.array([2, 2, 1], np.float32)
    made = same.selector.select(
        0, [prompt("a?")], samples, lambda further: scores, run="r", step=0, length=9
    )
    assert texts(made) == ["y", "z"]


def test_too_low_scores_no_scores_and_no_words_are_no_answers(rounds):
    some = rounds(keep=3, threshold=1.0)
    made = some.select(0, {"a?": {"x": 0.5, "y": 1.0, " ": 5, "z": NAN}})
    assert texts(made) == ["y", None, None] and made.chosen == 1
    assert [row["messages"][-1]["content"] for row in some.rows("selected", 0)] == ["y"]
    none = some.select(1, {"b?": {"x": NAN, " ": 1}})
    assert none.chosen == none.pairs == 0 and some.rows("selected", 1) == []


def test_the_expected_best_of_n_is_that_of_all_ways_to_draw():
    scores = np.random.default_rng(0).normal(size=(5, 6))
    found = best_of(np.vstack([scores, [np.nan] * 6]))
    assert found.keys() == {"best_of/1", "best_of/2", "best_of/4"}
    for n in (1, 2, 4):
        drawn = [np.max(scores[:, list(c)], axis=1) for c in itertools.combinations(range(6), n)]
        assert found[f"best_of/{n}"] == pytest.approx(np.mean(drawn))


# --- answers of earlier rounds --------------------------------------------------------------------


def test_an_answer_that_was_chosen_competes_with_the_new_ones(rounds):
    run = rounds()
    run.select(0, {"a?": {"good": 5, "bad": 0}})
    made = run.select(1, {"a?": {"x": 1, "y": 2}, "b?": {"x": 1, "y": 0}}, score=5)
    assert texts(made) == ["good", "x"] and made.earlier == 1
    (further,) = run.further
    assert further.completion_text == "good" and further.row == {"level": 2}
    assert list(further.completion_ids) == [*BYTES.encode("good"), BYTES.special_ids["end_of_turn"]]
    row = run.rows("selected", 1)[0]
    assert (row["run"], row["step"], row["score"]) == ("run", 0, 5)
    # It is scored anew, and may lose; then it is gone.
    assert texts(run.select(2, {"a?": {"x": 1, "y": 2}}, score=0)) == ["y"]
    run.select(3, {"a?": {"x": 1, "z": 0}}, score=0)
    assert [sample.completion_text for sample in run.further] == ["y"]


def test_of_equal_answers_the_new_one_is_taken(rounds):
    run = rounds()
    run.select(0, {"a?": {"old": 1, "x": 0}})
    assert texts(run.select(1, {"a?": {"new": 1, "x": 0}}, score=1)) == ["new"]


def test_what_was_cut_off_or_does_not_fit_does_not_come_back(rounds):
    run = rounds()
    run.select(0, {"a?": {"whole": 1}})
    run.select(1, {"a?": {"cut off": 2}, "b?": {"cut off": 2}}, finished=False, score=1)
    assert run.rows("selected", 1)[0]["finished"] is False
    for some in (run, rounds()):
        some.select(2, {"a?": {"x": 1}, "b?": {"x": 1}}, score=1)
        assert [sample.completion_text for sample in some.further] == ["whole"]
    end = len(run.further[0].prompt_ids) + len(run.further[0].completion_ids)
    for length, count in ((end, 1), (end - 1, 0)):
        other = rounds()
        other.select(2, {"a?": {"x": 1}}, score=0, length=length)
        assert len(other.further) == count


def test_a_resumed_run_knows_earlier_rounds_and_not_those_that_it_repeats(rounds):
    run = rounds(keep=2)
    run.select(0, {"a?": {"first": 3, "x": 1}, "b?": {"other": 1, "x": 0}})
    run.select(4, {"a?": {"second": 4, "y": 2}}, score=3)
    run.select(8, {"a?": {"third": 9, "y": 2}}, score=3)  # as a killed run leaves it
    answers = {"a?": {"z": 1}, "b?": {"z": 1}}
    resumed = rounds(keep=2)
    made = resumed.select(8, answers, score=3)
    assert {s.completion_text for s in resumed.further} == {"first", "second", "other", "x"}
    again = rounds("again", keep=2)
    again.select(0, {"a?": {"first": 3, "x": 1}, "b?": {"other": 1, "x": 0}})
    again.select(4, {"a?": {"second": 4, "y": 2}}, score=3)
    assert again.select(8, answers, score=3) == made
    assert len(resumed.rows("selected", 8)) == 4


def test_answers_of_other_runs_compete(rounds, tmp_path):
    rounds("one").select(0, {"a?": {"one": 1}})
    rounds("two").select(0, {"a?": {"two": 2}})
    earlier = (str(tmp_path / "one"), str(tmp_path / "two"))
    run = rounds("three", earlier=earlier)
    assert texts(run.select(0, {"a?": {"three": 0}}, score=7)) == ["one"]
    assert {sample.completion_text for sample in run.further} == {"one", "two"}
    assert run.rows("selected", 0)[0]["run"] == "one"
    with pytest.raises(UserError, match="nowhere has no folder 'selected'"):
        rounds(earlier=("nowhere",))


def test_a_prompt_is_known_by_all_that_was_said_and_its_tools(rounds):
    run = rounds()
    run.select(0, {"a?": {"x": 1}})
    tool = ({"name": "weather"},)
    sample = Sample(0, "a?", "y", (1,), (2,), True, {})
    further = []

    def score(more):
        further.extend(more)
        return np.zeros(1 + len(more), np.float32)

    run.selector.select(1, [prompt("a?", tool)], [sample], score, run="r", step=1, length=500)
    assert not further and run.rows("selected", 1)[0]["tools"] == list(tool)
    resumed = rounds()
    resumed.selector.select(2, [prompt("a?", tool)], [sample], score, run="r", step=2, length=500)
    assert [more.completion_text for more in further] == ["y"]


# --- pairs ----------------------------------------------------------------------------------------


def test_the_best_and_the_worst_answer_are_a_pair_where_they_differ(rounds):
    run = rounds(threshold=9.0)
    answers = {
        "a?": {"x": 1, "y": 3, "z": 2},
        "b?": {"x": 1, "y": 1, "z": 1},
        "c?": {"x": NAN, "y": 1, " ": 0},
    }
    assert run.select(0, answers).pairs == 1
    (row,) = run.rows("pairs", 0)
    assert (row["chosen"], row["rejected"]) == ("y", "x")
    assert (row["chosen_score"], row["rejected_score"]) == (3, 1)
    assert row["prompt"] == [{"role": "user", "content": "a?"}]


@pytest.mark.parametrize("margin, pairs", [(2.0, 1), (2.5, 0)])
def test_a_pair_differs_by_the_margin(rounds, margin, pairs):
    assert rounds(margin=margin).select(0, {"a?": {"x": 1, "y": 3}}).pairs == pairs


def test_an_earlier_answer_is_paired_with_the_worst_new_one(rounds):
    run = rounds()
    run.select(0, {"a?": {"good": 5, "bad": 0}})
    run.select(1, {"a?": {"x": 1, "y": 1}}, score=5)
    (row,) = run.rows("pairs", 1)
    assert (row["chosen"], row["rejected"], row["step"]) == ("good", "y", 1)


# --- the data sets --------------------------------------------------------------------------------


def test_other_stages_read_what_was_written(rounds):
    run = rounds()
    run.select(0, {"a?": {"x": 1, "y": 3}, "b?": {"x": 1, "y": 1}})
    run.select(1, {"a?": {"x": NAN, "y": NAN}})
    chats = list(read_examples(ChatDataConfig(source=str(run.folder / "selected"))))
    assert [[turn.content for turn in c.messages] for c in chats] == [["a?", "y"], ["b?", "x"]]
    assert [chat.row["score"] for chat in chats] == [3, 1]
    (pair,) = read_examples(PreferenceDataConfig(source=str(run.folder / "pairs")))
    assert [answer[0].content for answer in pair.responses] == ["y", "x"]
    for name in ("selected", "pairs"):
        lineage = json.loads((run.folder / f"{name}.lineage.json").read_text())
        assert lineage["seed"] == 7 and lineage["selection"]["keep"] == 1


@pytest.mark.parametrize(
    "settings, message", [({"keep": 0}, "keep=0 must be at"), ({"margin": -1}, "margin=-1 must")]
)
def test_senseless_settings_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        SelectionConfig(**settings)
