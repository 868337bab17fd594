"""The checkers of instructions, each with responses that follow it and that do not."""

import pytest

from llm_jax.data.examples import MalformedExample
from llm_jax.rl.instructions import (
    INSTRUCTIONS,
    InstructionsConfig,
    count_sentences,
    followed,
    followed_loosely,
    instructions,
    instructions_of,
)

AT_LEAST, LESS = "at least", "less than"

# (instruction, arguments, responses that follow it, responses that do not)
CASES = [
    ("keywords:existence", {"keywords": ["sea", "red sky"]},
     ["The Sea and a red sky."], ["The seas and a red sky.", "the sea", ""]),
    ("keywords:frequency", {"keyword": "go", "frequency": 2, "relation": AT_LEAST},
     ["go, Go.", "go go go"], ["go gone", "going to go"]),
    ("keywords:frequency", {"keyword": "go", "frequency": 2, "relation": LESS},
     ["go gone", "x"], ["go go"]),
    ("keywords:forbidden_words", {"forbidden_words": ["sun", "moon"]},
     ["Sunday"], ["the Moon", "sun."]),
    ("keywords:letter_frequency", {"letter": "q", "let_frequency": 2, "let_relation": AT_LEAST},
     ["Quaq"], ["quay"]),
    ("keywords:letter_frequency", {"letter": "#", "let_frequency": 1, "let_relation": LESS},
     ["none"], ["a #tag"]),
    ("length_constraints:number_words", {"num_words": 3, "relation": AT_LEAST},
     ["one two three", "It's a well-known fact"], ["one, two"]),
    ("length_constraints:number_words", {"num_words": 3, "relation": LESS},
     ["one - two"], ["one two three"]),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": AT_LEAST},
     ["One. Two!", "One? Two"], ["Mr. Smith is here.", "It costs 3.50 now"]),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": LESS},
     ["Dr. A. Smith came."], ["Yes. No."]),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2},
     ["a\n***\nb", "a *** b\n***\n"], ["a\n\nb", "a\n***\nb\n***\nc", "a\n***\n***\nb"]),
    ("length_constraints:nth_paragraph_first_word",
     {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "weekend"},
     ["a\n\nWeekend, at last", 'a\n \n"weekend" is'],
     ["weekend\n\na", "a\n\nthe weekend", "a\n\nweekend\n\nb"]),
    ("detectable_content:number_placeholders", {"num_placeholders": 2},
     ["[name] of [the street]"], ["[name]", "[] []"]),
    ("detectable_content:postscript", {"postscript_marker": "P.S."},
     ["Bye.\nP.S. more", "p. s. more"], ["ps more", "Bye"]),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"},
     ["x\nP.P.S more"], ["x\nP.S. more"]),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2},
     ["* a\n* b", "x\n- a\n  - b"], ["* a", "* a\n* b\n* c", "**a**\n**b**", "--\n--"]),
    ("detectable_format:constrained_response", {},
     ["My answer is yes.", "Well. My answer is maybe."], ["My answer is sure.", "yes"]),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2},
     ["*a* and *b c*", "**a** and *b*"], ["*a*", "**a**", "* a\n* b"]),
    ("detectable_format:multiple_sections", {"section_spliter": "Section", "num_sections": 2},
     ["Section 1\na\nSection 2\nb"], ["Section 1", "section 1 section 2"]),
    ("detectable_format:json_format", {},
     ['{"a": [1, null]}', '```json\n{"a": 1}\n```', "```\n[]\n```"], ["{a: 1}", "so: {}", ""]),
    ("detectable_format:title", {}, ["<<My day>>\ntext"], ["<My day>", "<< >>", "<<a\nb>>"]),
    ("combination:two_responses", {},
     ["a\n******\nb"], ["a\n******\na", "a", "a ****** b ****** c", "a\n***\nb"]),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say it."},
     ["Say it. Then this", " say IT.\n"], ["It. Say it."]),
    ("startend:end_checker", {"end_phrase": "Is that all?"},
     ["So. is that all?", '"x Is that all?"\n'], ["Is that all? No"]),
    ("startend:quotation", {}, [' "all of it" '], ['"a" b', "'a'", '"']),
    ("change_case:capital_word_frequency",
     {"capital_frequency": 2, "capital_relation": AT_LEAST}, ["A BIG dog", "NO YES"], ["A dog"]),
    ("change_case:capital_word_frequency",
     {"capital_frequency": 2, "capital_relation": LESS}, ["One BIG dog"], ["ONE BIG dog"]),
    ("change_case:english_capital", {}, ["ALL 3!"], ["ALl", "123"]),
    ("change_case:english_lowercase", {}, ["all 3!"], ["All", "123"]),
    ("punctuation:no_comma", {}, ["a; b"], ["a, b"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "arguments", "good", "bad"), CASES)
def test_a_checker_tells_both(name, arguments, good, bad):
    wanted = instructions_of({"instruction_id_list": [name], "kwargs": [arguments]})
    assert {text: followed(text, wanted) for text in good} == {text: [True] for text in good}
    assert {text: followed(text, wanted) for text in bad} == {text: [False] for text in bad}


def test_every_checker_is_in_the_table():
    assert {name for name, *_ in CASES} == set(INSTRUCTIONS)


@pytest.mark.parametrize(
    ("text", "count"),
    [("", 0), ("One", 1), ("One.", 1), ('He said "No." Then he left.', 2), ("e.g. this one.", 1),
     ("Really?! Yes...", 2), ("你好。再见。", 2), ("At 3.14 it ends", 1), ("Fields, etc.", 1)],
)  # fmt: skip
def test_sentences_are_counted(text, count):
    assert count_sentences(text) == count


ROW = {
    "instruction_id_list": ["punctuation:no_comma", "startend:end_checker"],
    "kwargs": [{"keywords": None}, {"end_phrase": "the end", "num_words": None}],
}


def test_a_loose_verdict_forgives_a_first_line_a_last_one_and_asterisks():
    wanted = instructions_of(ROW)
    for text in ("Sure, here:\nthe end", "the end\nHope, it helps!", "**the end**",
                 "Sure, ok:\n*the end*\nBye, you"):  # fmt: skip
        assert not all(followed(text, wanted)) and all(followed_loosely(text, wanted))
    assert followed_loosely("a, b\nc, d", wanted) == [False, False]
    assert followed_loosely("", wanted) == [False, False]


def test_the_reward_is_of_all_or_of_a_share():
    whole, share = (instructions(InstructionsConfig(share=s)) for s in (False, True))
    loose = instructions(InstructionsConfig(loose=True))
    assert [whole("", text, ROW) for text in ("x the end", "a, b the end")] == [1.0, 0.0]
    assert [share("", text, ROW) for text in ("x the end", "a, the end", "a,")] == [1.0, 0.5, 0.0]
    assert (whole("", "*the end*", ROW), loose("", "*the end*", ROW)) == (0.0, 1.0)


def test_the_prompt_is_what_is_to_be_repeated_where_the_row_does_not_say():
    row = {"instruction_id_list": ["combination:repeat_prompt"], "kwargs": [{}]}
    reward = instructions(InstructionsConfig())
    assert reward("Say this.", "Say this. Done", row) == 1.0
    assert reward("Say this.", "Done", row) == 0.0


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "instruction_id_list"),
        ({"instruction_id_list": []}, "has 0 instructions"),
        ({"instruction_id_list": ["x:y"]}, "'x:y' is none that is checked"),
        ({"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}, {}]}, "1 instructions"),
        ({"instruction_id_list": ["keywords:existence"], "kwargs": [{"keywords": None}]},
         "lacks 'keywords'"),
        ({"instruction_id_list": ["keywords:existence"], "kwargs": "no"}, "not JSON"),
    ],
)  # fmt: skip
def test_a_row_without_instructions_is_malformed(row, message):
    with pytest.raises(MalformedExample, match=message):
        instructions_of(row)


def test_a_relation_must_be_known():
    row = {"instruction_id_list": ["length_constraints:number_words"],
           "kwargs": [{"num_words": 1, "relation": "about"}]}  # fmt: skip
    with pytest.raises(MalformedExample, match="'about'"):
        followed("a", instructions_of(row))
