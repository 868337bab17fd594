"""The embedded questions and comparisons: what they ask, and which of them are held out."""

import functools
import subprocess
import sys
from collections import Counter
from unittest import mock

import pytest

from llm_jax.data import stdlib_examples
from llm_jax.data.documents import is_validation
from llm_jax.data.example_store import STRENGTHS
from llm_jax.data.formats import read_examples
from llm_jax.data.sources import SourceConfig
from llm_jax.data.stdlib import stdlib_documents
from llm_jax.data.stdlib_examples import (
    instruction_rows,
    preference_rows,
    ranked_rows,
    request_rows,
    safety_rows,
)

BIRDS = '''
"""Tells the module of the birds."""


class Parrot(Bird):
    """Tells what a parrot is and does.

    And more that no answer repeats.
    """

    def speak(self, words, *, loud=False):
        """Repeats the words,
        in one paragraph of two lines."""

    @classmethod
    def from_egg(cls, egg):
        """Hatches a parrot from an egg."""

    def silent(self):
        pass


async def fly(a, b, c, d, e, *more, **most):
    """Flies as far as the wings can carry."""


def nest():
    """Builds a nest out of nothing at all."""
'''
FISH = '''
def swim():
    """Builds a nest out of nothing at all."""


def short():
    """Too short."""


def long():
    """{}"""


def dive(depth):
    """Dives down to the given depth and up again."""
'''.format("Tells a summary that never ends. " * 6)


@pytest.fixture
def library(tmp_path):
    """A folder that looks like a small standard library."""
    filler = "VALUE = 1  # long enough to be kept\n" * 10
    (tmp_path / "birds.py").write_text(BIRDS + filler)
    (tmp_path / "fish.py").write_text(FISH + filler)
    return tmp_path


SUMMARIES = {
    "birds.Parrot(Bird)": "Tells what a parrot is and does.",
    "birds.Parrot.speak(self, words, *, loud=False)":
        "Repeats the words, in one paragraph of two lines.",
    "birds.Parrot.from_egg(cls, egg)": "Hatches a parrot from an egg.",
    "birds.fly(a, b, c, d, e, *more, **most)": "Flies as far as the wings can carry.",
    "birds.nest()": "Builds a nest out of nothing at all.",
    "fish.dive(depth)": "Dives down to the given depth and up again.",
}  # fmt: skip
KINDS = {
    "birds.Parrot": "class", "birds.Parrot.speak": "method", "birds.Parrot.from_egg": "method",
    "birds.fly": "function", "birds.nest": "function", "fish.dive": "function",
}  # fmt: skip
COUNTS = {
    "birds.Parrot.speak(self, words, *, loud=False)": "two arguments",
    "birds.Parrot.from_egg(cls, egg)": "one argument",
    "birds.fly(a, b, c, d, e, *more, **most)": "more than four arguments",
    "birds.nest()": "no arguments", "fish.dive(depth)": "one argument",
}  # fmt: skip


def test_every_documented_object_is_asked_about_twice(library):
    rows = list(instruction_rows(library))
    asked = {row["prompt"]: row["completion"] for row in rows}
    assert len(rows) == len(asked) == 2 * len(SUMMARIES)
    what = {f"What does {name} do?": summary for name, summary in SUMMARIES.items()}
    kinds = {
        f"Is {name} a function, a method or a class?": f"It is a {kind}."
        for name, kind in KINDS.items()
    }
    counts = {
        f"How many arguments does {name} take?": f"It takes {count}."
        for name, count in COUNTS.items()
    }
    assert what.items() <= asked.items()
    assert asked.items() <= (what | kinds | counts).items()
    assert len(asked.keys() & (kinds.keys() | counts.keys())) == len(SUMMARIES)


def test_a_comparison_sets_the_summary_against_a_worse_one(library):
    rows = list(preference_rows(library))
    assert rows
    for row in rows:
        assert set(row) == {"prompt", "chosen", "rejected", "strength", "split_text"}
        name = row["prompt"].removeprefix("What does ").removesuffix(" do?")
        assert row["chosen"] == SUMMARIES[name] != row["rejected"]
        check_worse(row)


def check_worse(row):
    chosen, rejected = row["chosen"].split(), row["rejected"].split()
    if row["strength"] == "significantly better":
        assert sorted(chosen) == sorted(rejected)
    elif row["strength"] == "better":
        assert 2 <= len(rejected) - len(chosen) <= 4 and set(chosen) == set(rejected)
    elif row["strength"] == "slightly better":
        assert chosen[: len(rejected)] == rejected and len(rejected) < len(chosen)
    else:
        assert row["strength"] == "negligibly better"


def test_a_question_stands_on_the_side_of_the_document_that_answers_it(library):
    texts = {document.text for document in stdlib_documents(library)}
    for row in (*instruction_rows(library), *preference_rows(library)):
        assert row["split_text"] in texts
        if row["prompt"].startswith("What does"):
            summary = row.get("chosen") or row["completion"]
            assert summary in " ".join(row["split_text"].split())


# --- this installation ----------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def parsed_once():
    """Parsing the library takes seconds, so this module does it once."""
    objects = functools.cache(lambda folder: list(find(folder)))
    find = stdlib_examples._objects
    with mock.patch.object(stdlib_examples, "_objects", lambda folder=None: objects(folder)):
        yield


@pytest.fixture(scope="module")
def instructions():
    return list(instruction_rows())


@pytest.fixture(scope="module")
def preferences():
    return list(preference_rows())


def test_the_rows_of_this_installation_are_well_formed(instructions, preferences):
    assert len(instructions) > 1000 and len(preferences) > 500
    for row in (*instructions, *preferences):
        assert all(row[name].strip() for name in row if name != "split_text")
    # A function that is defined twice, for two platforms, may be asked about twice.
    assert len({row["prompt"] for row in preferences}) > 0.99 * len(preferences)
    for row in preferences:
        assert row["chosen"] != row["rejected"]
        check_worse(row)


def test_every_strength_occurs_as_often_as_it_should(preferences):
    counts = Counter(row["strength"] for row in preferences)
    assert set(counts) == set(STRENGTHS)
    shares = [counts[name] / len(preferences) for name in STRENGTHS]
    assert shares == pytest.approx([0.35, 0.3, 0.25, 0.1], abs=0.05)


def test_the_held_out_questions_are_on_held_out_documents(instructions, preferences):
    fraction = 0.05
    held_out = {d.text for d in stdlib_documents() if is_validation(d.text, fraction)}
    for rows in (instructions, preferences):
        asked = {row["split_text"] for row in rows if is_validation(row["split_text"], fraction)}
        assert asked and asked <= held_out


def test_the_sources_name_them(instructions, preferences):
    told = list(read_examples(SourceConfig("stdlib:instructions")))
    compared = list(read_examples(SourceConfig("stdlib:preferences")))
    assert [e.messages[1].content for e in told] == [row["completion"] for row in instructions]
    assert [e.responses[1][0].content for e in compared] == [r["rejected"] for r in preferences]
    assert told[0].split_text == instructions[0]["split_text"]
    assert {e.strength for e in compared} == set(STRENGTHS)


def test_the_rows_are_the_same_in_every_process(library):
    program = (
        "import sys, pathlib; from llm_jax.data.stdlib_examples import *;"
        "folder = pathlib.Path(sys.argv[1]);"
        "print([*instruction_rows(folder), *preference_rows(folder)])"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program, str(library)],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


def test_safety_pairs_decline_what_is_harmful_and_answer_what_is_not(library):
    rows = [*safety_rows(library), *safety_rows()]
    harmful = [row for row in rows if not row["prompt"].startswith("What does")]
    harmless = [row for row in rows if row["prompt"].startswith("What does")]
    assert 0.4 < len(harmful) / len(rows) < 0.6
    assert all(row["chosen"].startswith("I will not do that: ") for row in harmful)
    assert all(row["rejected"].startswith("Sure. ") for row in harmful)
    assert all(row["rejected"].startswith("I will not do that: ") for row in harmless)
    answers = {row["completion"] for row in instruction_rows()} | set(SUMMARIES.values())
    assert {row["chosen"] for row in harmless} <= answers
    assert {row["strength"] for row in harmful} == {"significantly better"}
    assert list(safety_rows(library)) == rows[: len(SUMMARIES)]


def test_rankings_order_the_answers_from_the_summary_to_its_shuffled_words(library):
    rows = list(ranked_rows(library))
    assert len(rows) == len(SUMMARIES)
    for row in rows:
        name = row["prompt"].removeprefix("What does ").removesuffix(" do?")
        best, *worse = row["responses"]
        assert best == SUMMARIES[name] and len(set(worse)) == len(worse) >= 3
        assert row["ranks"] == list(range(1, len(worse) + 2))
        assert sorted(worse[-1].split()) == sorted(best.split())  # shuffled
    (example, *_) = read_examples(SourceConfig("stdlib:ranked"))
    assert len(example.responses) >= 4 and list(example.scores) == sorted(example.scores)[::-1]


def test_requests_are_the_safety_prompts_with_the_better_answer(library):
    requests, pairs = list(request_rows(library)), list(safety_rows(library))
    for request, pair in zip(requests, pairs, strict=True):
        assert request["prompt"] == pair["prompt"] and request["completion"] == pair["chosen"]
        assert request["safety"] == pair["chosen"].startswith("I will not do that: ")
    told = next(read_examples(SourceConfig("stdlib:requests")))
    assert told.messages[1].content and isinstance(told.row["safety"], bool)
