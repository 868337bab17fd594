"""Win rates: a judge with eyes decides, one that likes a letter decides nothing."""

import json
import math

import pytest

from llm_jax.data.prompts import PromptDataConfig
from llm_jax.errors import UserError
from llm_jax.evals import win_rate
from llm_jax.evals.win_rate import WinRateConfig, win_rate_task
from llm_jax.synthesis.responders import Leaning, Reply, Unanswered


class Judge:
    """Answers by `prefers(first, second)`: log-odds of the letter A."""

    def __init__(self, prefers):
        self.prefers, self.lineage = prefers, {}

    def lean(self, questions):
        found = []
        for question in questions:
            first = question.partition("Response A: ")[2].partition("\n\n")[0]
            second = question.partition("Response B: ")[2].partition("\n\n")[0]
            found.append(self.prefers(first, second))
        return found


@pytest.fixture
def measure(subject, tmp_path, monkeypatch):
    """`measure(prefers, mine, yours)`: what the task says of answers to as many prompts."""

    def run(prefers, mine, yours, **settings):
        rows = [{"prompt": f"What is {i}?", "completion": "x"} for i in range(len(mine))]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        answers = [yours, mine]

        class Speaker:
            def __init__(self, *_, **__):
                self.texts = answers.pop(0)

            def answer(self, dialogues, rng):
                assert len(dialogues) == len(self.texts)
                return [t if isinstance(t, Unanswered) else Reply(t, True) for t in self.texts]

        monkeypatch.setattr(win_rate, "ModelResponder", Speaker)
        monkeypatch.setattr(win_rate, "load_run", lambda name: type("Run", (), {"params": None}))
        monkeypatch.setattr(win_rate, "run_subject", lambda run, log, batch: subject)
        monkeypatch.setattr(win_rate, "_judge", lambda config, subject: Judge(prefers))
        config = WinRateConfig(
            other_run="other", judge="judge", held_out=False,
            data=PromptDataConfig(source=str(tmp_path / "rows.jsonl")), **settings,
        )  # fmt: skip
        return win_rate_task(config, subject)(None)

    return run


def longer(first, second):
    return Leaning(float(len(first) - len(second)), 1.0)


def test_the_better_answers_win(measure):
    result = measure(longer, ["longest", "a", "equal", "one"], ["long", "abc", "lauqe", "one"])
    assert [row["win"] for row in result.examples] == [1.0, 0.0, 0.5, 0.5]
    assert result.metrics["win_rate"] == 0.5 and result.metrics["ties"] == 0.5
    assert result.metrics["win_rate_stderr"] == pytest.approx(math.sqrt(0.5 / 3 / 4))
    assert result.metrics["swayed"] == 0.0 and result.metrics["letter_mass"] == 1.0
    assert result.examples[0]["text"] == "longest" and result.examples[0]["other_text"] == "long"


@pytest.mark.parametrize("odds", [3.0, math.inf])
def test_a_judge_that_likes_a_letter_sees_ties(measure, odds):
    result = measure(lambda first, second: Leaning(odds, 0.5), ["a", "b"], ["c", "d"])
    assert result.metrics["win_rate"] == 0.5 and result.metrics["ties"] == 1.0
    assert result.metrics["swayed"] == 1.0


def test_what_is_not_answered_counts_nowhere(measure):
    def picky(first, second):
        return Unanswered("no") if "bad" in (first, second) else longer(first, second)

    result = measure(picky, ["aa", "bad", Unanswered("long")], ["b", "c", "d"])
    assert [row["win"] for row in result.examples] == [1.0, None]
    assert result.metrics["win_rate"] == 1.0
    with pytest.raises(UserError, match="have failed"):
        measure(picky, ["bad", "bad"], ["b", "c"], max_failures=1)
    with pytest.raises(UserError, match="compared no pair"):
        measure(picky, [Unanswered("x"), "bad"], ["b", "c"])


def test_both_names_are_needed(subject):
    with pytest.raises(UserError, match="other_run is required"):
        win_rate_task(WinRateConfig(judge="x"), subject)
    with pytest.raises(UserError, match="judge is required"):
        win_rate_task(WinRateConfig(other_run="x"), subject)
