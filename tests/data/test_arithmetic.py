"""Generated problems: their answers, how many there are, and which of them are held out."""

import itertools
import operator
import re
import subprocess
import sys

import pytest

from llm_jax.data import arithmetic
from llm_jax.data.arithmetic import arithmetic_rows
from llm_jax.data.documents import is_validation
from llm_jax.data.formats import read_examples
from llm_jax.data.sources import SourceConfig, source_identity
from llm_jax.errors import UserError

SIGNS = {"addition": ("+", operator.add), "subtraction": ("-", operator.sub)}
SIGNS["multiplication"] = ("*", operator.mul)
QUESTION = re.compile(r"What is (\d+) (.) (\d+)\?")


def numbers(row):
    first, _, second = QUESTION.fullmatch(row["prompt"]).groups()
    return int(first), int(second)


@pytest.mark.parametrize("task", SIGNS)
@pytest.mark.parametrize("digits", [1, 2, 3])
def test_the_answers_are_right_and_the_problems_distinct(task, digits):
    sign, answer = SIGNS[task]
    rows = list(arithmetic_rows(f"{task}-{digits}"))
    assert len(rows) == len({row["prompt"] for row in rows}) == {1: 100}.get(digits, 6000)
    for row in rows:
        assert set(row) == {"prompt", "completion", "text", "split_text"}
        assert row["text"] == f"{row['prompt']} {row['completion']}"
        first, second = numbers(row)
        assert QUESTION.fullmatch(row["prompt"])[2] == sign
        assert row["completion"] == str(answer(first, second))
    drawn = list(itertools.chain.from_iterable(map(numbers, rows)))
    assert min(drawn) >= 0 and 10 ** (digits - 1) <= max(drawn) < 10**digits
    assert sum(drawn) / len(drawn) == pytest.approx((10**digits - 1) / 2, rel=0.02)


def test_two_digits_are_the_default_and_nine_the_most():
    assert list(arithmetic_rows("addition")) == list(arithmetic_rows("addition-2"))
    assert max(map(numbers, arithmetic_rows("addition-9"))) > (10**8, 0)


def test_numbers_that_change_places_stay_on_one_side_of_the_split():
    sides = {}
    for row in arithmetic_rows("addition"):
        sides.setdefault(frozenset(numbers(row)), set()).add(is_validation(row["split_text"], 0.05))
    assert all(len(side) == 1 for side in sides.values())
    held_out = sum(side == {True} for side in sides.values())
    assert 0.03 < held_out / len(sides) < 0.07


@pytest.mark.parametrize(
    "name, message",
    [
        ("adition", "the arithmetic task 'adition' is unknown. Did you mean 'addition'?"),
        ("addition-0", "'addition-0' asks for '0' digits: give 1 to 9."),
        ("addition-10", "asks for '10' digits"),
        ("addition-", "asks for '' digits"),
        ("addition-²", "asks for '²' digits"),
    ],
)
def test_a_name_without_meaning_is_one_clear_line(name, message):
    with pytest.raises(UserError) as caught:
        list(read_examples(SourceConfig(f"arithmetic:{name}")))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_the_source_names_them():
    examples = list(read_examples(SourceConfig("arithmetic:subtraction-1")))
    rows = list(arithmetic_rows("subtraction-1"))
    assert [[m.content for m in e.messages] for e in examples] == [
        [row["prompt"], row["completion"]] for row in rows
    ]
    assert [e.split_text for e in examples] == [row["split_text"] for row in rows]
    assert examples[2].where == "arithmetic:subtraction-1:3"


def test_the_identity_is_that_of_what_makes_them(monkeypatch):
    config = SourceConfig("arithmetic:addition")
    first = source_identity(config)
    assert first != source_identity(SourceConfig("arithmetic:addition-3"))
    monkeypatch.setattr(arithmetic, "ARITHMETIC_VERSION", "another")
    assert source_identity(config) != first


def test_the_rows_are_the_same_in_every_process():
    program = "from llm_jax.data.arithmetic import *; print([*arithmetic_rows('addition')])"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert outputs == {f"{[*arithmetic_rows('addition')]}\n"}
