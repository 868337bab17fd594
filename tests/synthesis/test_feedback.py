"""Revisions and comparisons by judges whose opinions are known."""

import math
from pathlib import Path

import jax
import pytest

from llm_jax.data.examples import Comparison, Conversation, Message
from llm_jax.data.formats import read_examples
from llm_jax.data.sources import SourceConfig
from llm_jax.errors import UserError
from llm_jax.json_files import write_json_lines
from llm_jax.synthesis import feedback
from llm_jax.synthesis.constitution import Constitution, Principle
from llm_jax.synthesis.feedback import Comparer, Ledger, Question, revise
from llm_jax.synthesis.responders import Leaning, Reply, Unanswered

PRINCIPLES = tuple(
    Principle(name, f"How {name} is it?", f"Make it {name}.", f"Choose the {name} one.")
    for name in ("short", "kind", "true")
)
CONSTITUTION = Constitution(PRINCIPLES, Path("c.toml"))


class Scripted:
    """A responder: `says(turns, call)` to a dialogue, `leans(question)` at a choice."""

    def __init__(self, says=None, leans=None):
        self.says, self.leans, self.keys = says, leans, []
        self.lineage = {"run": "scripted"}

    def answer(self, dialogues, rng):
        self.keys.append(jax.random.key_data(rng).tolist())
        replies = [self.says(turns, i) for i, turns in enumerate(dialogues)]
        return [Reply(reply, True) if isinstance(reply, str) else reply for reply in replies]

    def lean(self, questions):
        return [self.leans(question) for question in questions]


def echo(turns, call):
    """What the last turn says, and how many turns stood before it."""
    return f"{len(turns)}:{turns[-1].content}"


@pytest.fixture
def told():
    return []


@pytest.fixture
def ledger(told):
    return Ledger(3, told.append)


@pytest.fixture
def asked():
    return [Question(i, (Message("user", f"q{i}"),)) for i in range(10)]


@pytest.fixture
def read(tmp_path):
    """`read(rows)`: the examples that the data readers make of rows."""

    def make(rows):
        write_json_lines(tmp_path / "rows.jsonl", rows)
        return list(read_examples(SourceConfig(source=str(tmp_path / "rows.jsonl"))))

    return make


# --- revisions


def test_an_answer_is_criticised_and_revised_by_the_principle_drawn(ledger, asked, read):
    rows = list(
        revise(Scripted(echo), Scripted(echo), CONSTITUTION, asked, ledger, rounds=2, seed=1)
    )
    assert len(rows) == 10
    for row, question in zip(rows, asked, strict=True):
        first, second = row["revisions"]
        assert row["first_answer"] == f"1:{question.turns[0].content}"
        for revision in (first, second):
            assert revision["critique"] == f"3:How {revision['principle']} is it?"
            assert revision["answer"] == f"5:Make it {revision['principle']}."
        prompt, answer = row["messages"]
        assert prompt == {"role": "user", "content": question.turns[0].content}
        assert answer == {"role": "assistant", "content": second["answer"]}
    drawn = {revision["principle"] for row in rows for revision in row["revisions"]}
    assert drawn == {"short", "kind", "true"}
    examples = read(rows)
    assert all(isinstance(example, Conversation) for example in examples)
    assert examples[3].messages == (
        asked[3].turns[0],
        Message("assistant", rows[3]["messages"][1]["content"]),
    )


def test_the_second_round_criticises_the_first_revision(ledger, asked):
    seen = []

    def judge(turns, call):
        seen.append([turn.content for turn in turns])
        return f"answer {len(seen)}"

    (row,) = revise(
        Scripted(echo), Scripted(judge), CONSTITUTION, asked[:1], ledger, rounds=2, seed=0
    )
    assert [turns[1] for turns in seen] == ["1:q0", "1:q0", "answer 2", "answer 2"]
    assert seen[1][3] == "answer 1" and row["messages"][-1]["content"] == "answer 4"


def test_principles_depend_on_seed_and_row_alone(ledger, asked, monkeypatch):
    def drawn(questions, seed):
        rows = revise(
            Scripted(echo), Scripted(echo), CONSTITUTION, questions, ledger, rounds=1, seed=seed
        )
        return [row["revisions"][0]["principle"] for row in rows]

    first = drawn(asked, 0)
    assert drawn(asked[4:], 0) == first[4:] and drawn(asked, 1) != first
    monkeypatch.setattr(feedback, "_CHUNK", 3)
    assert drawn(asked, 0) == first


def test_no_two_calls_share_their_randomness(ledger, asked, monkeypatch):
    monkeypatch.setattr(feedback, "_CHUNK", 4)
    policy, judge = Scripted(echo), Scripted(echo)
    list(revise(policy, judge, CONSTITUTION, asked, ledger, rounds=2, seed=0))
    keys = [str(key) for key in policy.keys + judge.keys]
    assert len(keys) == 3 + 3 * 4 == len(set(keys))


def test_what_is_not_of_use_is_dropped_by_its_reason(ledger, asked, told):
    bad = {0: Unanswered("too long"), 1: Reply("cut", False), 2: ""}
    policy = Scripted(lambda turns, call: bad.get(call, "fine"))
    judge = Scripted(lambda turns, call: "" if call == 6 and len(turns) == 5 else "good")
    rows = list(revise(policy, judge, CONSTITUTION, asked, ledger, rounds=1, seed=0))
    assert ledger.dropped == {"failed": 1, "unfinished": 1, "empty": 2}
    assert len(rows) == 6
    assert told == ["prompt 1 failed: too long"]


def test_failures_are_told_counted_and_limited(ledger, asked, told):
    policy = Scripted(lambda turns, call: Unanswered(f"no {call}"))
    with pytest.raises(
        UserError, match=r"4 prompts have failed.*max_failures=3.*prompt 4 failed: no 3"
    ):
        list(revise(policy, policy, CONSTITUTION, asked, ledger, rounds=1, seed=0))
    assert told[-1] == "further failures are counted only." and len(told) == 4


# --- comparisons


def merits(question):
    """How good responses A and B of a question are."""
    first, second = question.split("Response A: ")[1].split("Response B: ")
    return float(first), float(second.split()[0])


def opinion(bias):
    """A judge's leaning: by the merits, and `bias` towards whatever is called A."""

    def leans(question):
        first, second = merits(question)
        return Leaning(first - second + bias, 0.5)

    return leans


def letter(bias):
    """`opinion`, where only the letter is known."""

    def leans(question):
        return Leaning(math.copysign(math.inf, opinion(bias)(question).log_odds), 1.0)

    return leans


def numbers(turns, call):
    """Answers of merits -2, 0.5, -1, 1, 0, 1.5, ..."""
    return str((call - 4) / 2 if call % 2 == 0 else call / 2)


@pytest.fixture
def compare(ledger):
    """`compare(policy, judge, questions)`: the comparer, and its rows."""

    def make(policy, judge, questions):
        comparer = Comparer(policy, judge, CONSTITUTION, ledger, 0)
        return comparer, list(comparer.rows(questions))

    return make


@pytest.mark.parametrize("bias", [-100.0, -1.5, 0.0, 1.5, 100.0])
def test_position_bias_cancels(compare, asked, bias):
    comparer, rows = compare(Scripted(numbers), Scripted(leans=opinion(bias)), asked)
    assert len(rows) == comparer.compared == 10 and comparer.mass == 5.0
    for i, row in enumerate(rows):
        first, second = i - 2, i + 0.5
        assert (float(row["chosen"]), float(row["rejected"])) == (second, first)
        assert row["probability"] == pytest.approx(1 / (1 + math.exp(first - second)))
    assert comparer.swayed == (10 if abs(bias) == 100 else 0)


def test_a_letter_that_both_orders_name_is_a_tie(compare, asked, ledger):
    comparer, rows = compare(Scripted(numbers), Scripted(leans=letter(100)), asked)
    assert rows == [] and ledger.dropped["tie"] == comparer.swayed == comparer.compared == 10
    _, rows = compare(Scripted(numbers), Scripted(leans=letter(1.5)), asked)
    assert len(rows) == 10 and {row["probability"] for row in rows} == {1.0}
    assert [float(row["chosen"]) for row in rows] == [i + 0.5 for i in range(10)]


def test_a_judge_of_letters_alone_prefers_nothing(responder, unigram, compare, asked, ledger):
    judge = responder(unigram({ord("A"): 0.0, ord("B"): -3.0}))
    comparer, rows = compare(Scripted(numbers), judge, asked)
    assert rows == [] and ledger.dropped["tie"] == 10 == comparer.swayed
    assert comparer.mass == pytest.approx(10, rel=0.01)


def test_a_run_judges_alike_whichever_answer_comes_first(responder, random_weights, compare, asked):
    judge = responder(random_weights)
    _, rows = compare(Scripted(numbers), judge, asked)
    _, turned = compare(Scripted(lambda turns, call: numbers(turns, call ^ 1)), judge, asked)
    assert len(rows) == 10
    for row, other in zip(rows, turned, strict=True):
        assert row["chosen"] == other["chosen"]
        assert row["probability"] == pytest.approx(other["probability"], abs=1e-4)


def test_rows_are_pairs_to_learn_from(compare, asked, read):
    _, rows = compare(Scripted(numbers), Scripted(leans=opinion(0.3)), asked)
    (example, *_) = read(rows)
    assert isinstance(example, Comparison)
    assert example.prompt == asked[0].turns
    assert [turn.content for (turn,) in example.responses] == ["0.5", "-2.0"]
    assert {row["principle"] for row in rows} == {"short", "kind", "true"}


def test_the_judge_sees_the_dialogue_and_the_principle(compare):
    turns = (Message("system", "Be kind."), Message("user", "Who?"))
    seen = []

    def leans(question):
        seen.append(question)
        return Leaning(1.0, 1.0)

    compare(Scripted(numbers), Scripted(leans=leans), [Question(0, turns)])
    assert len(seen) == 2
    for question, order in zip(seen, [("-2.0", "0.5"), ("0.5", "-2.0")], strict=True):
        assert "System: Be kind.\n\nUser: Who?" in question
        assert f"Response A: {order[0]}\n\nResponse B: {order[1]}\n\nChoose the " in question


def test_pairs_without_two_good_answers_are_dropped(compare, asked, ledger):
    bad = {1: Unanswered("no"), 2: Reply("1", False), 3: Reply("1", False), 4: "7", 5: "7"}
    policy = Scripted(lambda turns, call: bad.get(call) or numbers(turns, call))
    _, rows = compare(policy, Scripted(leans=opinion(0)), asked)
    assert ledger.dropped == {"failed": 1, "unfinished": 1, "alike": 1} and len(rows) == 7


def test_nonsense_of_the_judge_costs_the_pair(compare, asked, ledger, told):
    def leans(question):
        return Unanswered("no letter") if "q2" in question else opinion(0)(question)

    comparer, rows = compare(Scripted(numbers), Scripted(leans=leans), asked)
    assert ledger.dropped == {"failed": 1} and len(rows) == comparer.compared == 9
    assert told == ["prompt 3 failed: no letter"]
    with pytest.raises(UserError, match="no letter"):
        compare(Scripted(numbers), Scripted(leans=lambda question: Unanswered("no letter")), asked)
