import dataclasses
import functools
import json

import pytest

from llm_jax.data import stdlib_examples
from llm_jax.data.examples import Comparison, Conversation, Message, as_conversation, split_text
from llm_jax.data.formats import FORMATS, detect, parse, read_examples
from llm_jax.data.sources import (
    ReadCounts,
    SourceConfig,
    read_documents,
    read_records,
    source_identity,
)
from llm_jax.errors import UserError

Q, A, B = "Why?", "Because.", "No idea."


def user(text):
    return Message("user", text)


def assistant(text):
    return Message("assistant", text)


QA = (user(Q), assistant(A))
MESSAGES = [{"role": "user", "content": Q}, {"role": "assistant", "content": A}]


def jsonl(folder, rows, name="rows.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def examples(path, format=None, counts=None, **options):
    return list(read_examples(SourceConfig(source=str(path), **options), format, counts))


def error_of(path, format=None, **options):
    with pytest.raises(UserError) as caught:
        examples(path, format, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_place_and_split_text_go_into_every_example():
    fields = {"prompt": Q, "completion": A, "split_text": "own"}
    (example,) = parse(fields, "prompt_completion", "a.jsonl:7")
    assert example.where == "a.jsonl:7" and split_text(example) == "own"
    fields = {"instruction": Q, "instances": [{"output": A}, {"output": B}], "split_text": "own"}
    assert [split_text(e) for e in parse(fields, "self_instruct", "")] == ["own", "own"]


def test_an_example_carries_its_row_and_is_the_same_without_it():
    fields = {"instruction": Q, "instances": [{"output": A}, {"output": B}], "level": 3}
    first, second = parse(fields, "self_instruct", "")
    assert first.row == second.row == fields
    assert first == dataclasses.replace(first, row={}) and "level" not in repr(first)
    (pair,) = parse({"prompt": Q, "chosen": A, "rejected": B, "safe": True}, "preference", "")
    assert as_conversation(pair).row["safe"] is True
    assert pair == dataclasses.replace(pair, row={})


def test_only_formats_that_describe_tools_read_them():
    tools = [{"name": "weather"}]
    rows = {
        "messages": {"messages": MESSAGES},
        "sharegpt": {"conversations": MESSAGES},
        "prompt_completion": {"prompt": Q, "completion": A},
        "preference": {"prompt": Q, "chosen": A, "rejected": B},
        "ranked": {"prompt": Q, "responses": [A, B], "ranks": [1, 2]},
        "unpaired": {"prompt": Q, "completion": A, "label": 1},
    }
    for name, fields in rows.items():
        (example,) = parse({**fields, "tools": json.dumps(tools)}, name, "")
        assert example.tools == tuple(tools)
    (example,) = parse({"instruction": Q, "output": A, "tools": "hammer"}, "alpaca", "")
    assert example.tools == ()


# --- detection


@pytest.mark.parametrize(
    "fields, name",
    [
        ("instruction output", "alpaca"),
        ("instruction input output response", "alpaca"),
        ("instruction response", "dolly"),
        ("instruction instances output", "self_instruct"),
        ("prompt response", "prompt_completion"),
        ("prompt completion text", "prompt_completion"),
        ("prompt completion label", "unpaired"),
        ("prompt completion messages", "messages"),
        ("prompt chosen rejected messages", "preference"),
        ("chosen rejected conversations", "preference"),
        ("prompt responses ranks", "ranked"),
        ("prompt answers scores text", "ranked"),
        ("prompt responses completion", "prompt_completion"),
        ("question answer text", "gsm8k"),
        ("question answer response", "gsm8k"),
        ("question answer ground_truth", "gsm8k"),
        ("system_prompt question response", "openorca"),
        ("inputs targets text", "flan"),
        ("label text", "text"),
        ("prompt text", "text"),
        ("prompt answer ground_truth", "prompt"),
        ("question ground_truth", "prompt"),
        ("problem solution", "prompt"),
    ],
)
def test_rows_that_share_fields_are_told_apart(fields, name):
    assert detect(dict.fromkeys(fields.split(), "x"), "here") == name


def test_values_tell_formats_of_the_same_fields_apart():
    talk = f"\n\nHuman: {Q}\n\nAssistant: {A}"
    assert detect({"chosen": talk, "rejected": talk}, "") == "hh_rlhf"
    assert detect({"chosen": talk, "rejected": talk, "prompt": None}, "") == "hh_rlhf"
    assert detect({"chosen": talk, "rejected": talk, "prompt": Q}, "") == "preference"
    for other in (f"So: {talk}", f"Human: {Q}", None):
        assert detect({"chosen": other, "rejected": talk}, "") == "preference"
    assert detect({"prompt": {"text": Q}, "completion": A}, "") == "openassistant"
    scored = [{"response": A, "overall_score": 1.0}]
    assert detect({"prompt": Q, "completions": scored, "response": A}, "") == "ranked"
    for unscored in (["overall_score"], [{"response": A}], [*scored, A]):
        fields = {"prompt": Q, "completions": unscored, "response": A}
        assert detect(fields, "") == "prompt_completion"
    judged = {"solution": A, "is_correct": True}
    fields = {"question": Q, "answer": A, "ground_truth": A}
    assert detect({**fields, "small": judged}, "") == "gsm8k_solutions"
    for unjudged in ({"solution": A}, {"is_correct": True}, "solution"):
        assert detect({**fields, "small": unjudged}, "") == "gsm8k"


def test_a_row_of_no_format_shows_itself_on_one_short_line():
    fields = {"body": "é\n" + "long " * 1000, "bad": "\ud83d"}
    with pytest.raises(UserError) as caught:
        detect(fields, "a.jsonl:3")
    message = str(caught.value)
    assert message.startswith("a.jsonl:3: ") and "\n" not in message and len(message) < 1200
    assert '{"body": "é\\nlong long' in message
    assert all(name in message for name in FORMATS)
    message.encode("utf-8")


def test_an_unknown_format_gets_a_suggestion(tmp_path):
    path = jsonl(tmp_path, [{"instruction": Q, "output": A}])
    with pytest.raises(UserError, match="Did you mean 'alpaca'"):
        examples(path, "alpacca")
    with pytest.raises(UserError, match="Did you mean 'alpaca'"):
        parse({}, "alpacca", "here")


# --- reading


def test_a_comparison_without_an_order_teaches_nothing_but_is_not_malformed(tmp_path):
    rows = [
        {"prompt": Q, "responses": [A, B], "scores": [1, 1]},
        {"prompt": Q, "responses": [A, B], "scores": [1, 2]},
    ]
    counts = ReadCounts()
    assert len(examples(jsonl(tmp_path, rows), counts=counts)) == 1
    assert (counts.documents, counts.empty, counts.skipped) == (1, 1, 0)


def test_records_keep_all_fields(tmp_path):
    (tmp_path / "a.txt").write_text("plain")
    jsonl(tmp_path, [{"x": 1, "y": [2]}])
    rows = list(read_records(SourceConfig(source=str(tmp_path), text_field="body")))
    assert [row.fields for row in rows] == [{"text": "plain"}, {"x": 1, "y": [2]}]
    assert [row.where for row in rows] == [f"{tmp_path}/a.txt", f"{tmp_path}/rows.jsonl:1"]
    # Text is read for its own field, which plain files have under any name.
    (document,) = read_documents(SourceConfig(source=str(tmp_path / "a.txt"), text_field="body"))
    assert document.text == "plain"


def test_the_first_good_row_decides_the_format_for_all(tmp_path):
    alpaca, dolly = {"instruction": Q, "output": A}, {"instruction": Q, "response": A}
    path = jsonl(tmp_path, [alpaca, alpaca, dolly, alpaca])
    message = error_of(path)
    assert message.startswith(f"{path}:3: the row has no field 'output', it has 'instruction'")
    assert '"response": "Because."' in message and message.endswith("data.malformed=skip.")
    counts = ReadCounts()
    assert len(examples(path, counts=counts, malformed="skip")) == 3
    assert (counts.documents, counts.skipped) == (3, 1)
    assert counts.first_skipped.startswith(f"{path}:3: the row has no field 'output'")
    assert len(examples(path, "dolly", malformed="skip")) == 1


def test_a_bad_first_row_decides_nothing(tmp_path):
    bad = {"instruction": Q, "output": None}
    path = jsonl(tmp_path, [{"body": Q}, bad, {"instruction": Q, "response": A}])
    counts = ReadCounts()
    assert [e.messages for e in examples(path, counts=counts, malformed="skip")] == [QA]
    assert counts.skipped == 2 and counts.first_skipped.startswith(f"{path}:1: ")
    message = error_of(path)
    assert f"{path}:1: the fields are those of no known format" in message and '{"body"' in message


def test_lines_that_are_no_rows_are_malformed_as_well(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"\n{"text": "b"}\n')
    assert f"{path}:1: the line is not JSON" in error_of(path)
    assert len(examples(path, malformed="skip")) == 1


def test_a_source_without_an_example_says_why(tmp_path):
    path = jsonl(tmp_path, [{"text": " "}, {"text": 3}])
    message = error_of(path, malformed="skip")
    assert "holds no example: 1 rows were empty and 1 malformed" in message
    assert "'text' is int" in message


def test_plain_text_is_dialogues_of_one_turn(tmp_path):
    (tmp_path / "a.txt").write_text("one<|endoftext|>two")
    assert [e.messages for e in examples(tmp_path)] == [(assistant("one"),), (assistant("two"),)]


def test_the_embedded_rows(monkeypatch):
    instruction = {"prompt": Q, "completion": A, "split_text": "module"}
    preference = {"prompt": Q, "chosen": A, "rejected": B, "strength": "much"}
    rows = {"instructions": [instruction], "preferences": [preference]}
    for name, made in rows.items():
        monkeypatch.setitem(stdlib_examples.EXAMPLES, name, functools.partial(iter, made))
    assert examples("stdlib:instructions") == [
        Conversation(QA, where="stdlib:instructions:1", split_text="module")
    ]
    (pair,) = examples("stdlib:preferences")
    assert (pair.responses, pair.strength) == (((assistant(A),), (assistant(B),)), "much")


def test_the_identity_of_the_embedded_rows_is_that_of_what_makes_them(monkeypatch):
    config = SourceConfig(source="stdlib:instructions")
    first = source_identity(config)
    assert first["stdlib"] == source_identity(SourceConfig())["stdlib"]
    monkeypatch.setattr(stdlib_examples, "EXAMPLES_VERSION", "another")
    assert source_identity(config) != first


def test_an_unknown_embedded_source_gets_a_suggestion():
    assert "Did you mean 'stdlib:instructions'?" in error_of("stdlib:instruction")


# --- imitation of comparisons


def test_the_best_answer_is_imitated_on_the_same_side_of_the_split():
    answers = tuple((assistant(text),) for text in "abc")
    prompt = (user("1"), assistant("2"), user("3"))
    ranking = Comparison(prompt, answers, (0.0, 2.0, 2.0), tools=({"name": "f"},), where="here")
    best = as_conversation(ranking)
    assert best.messages == (*prompt, assistant("b"))
    assert (best.tools, best.where) == (ranking.tools, "here")
    assert split_text(best) == split_text(ranking)
    own = Comparison(prompt, answers, (0.0, 1.0, 2.0), split_text="own")
    assert split_text(as_conversation(own)) == "own"


def test_only_a_good_unpaired_answer_is_imitated():
    good, bad = (Comparison((user(Q),), ((assistant(A),),), (score,)) for score in (1.0, 0.0))
    assert as_conversation(good).messages == QA
    assert as_conversation(bad) is None
    assert as_conversation(Comparison((user(Q),), (), ())) is None
    dialogue = Conversation(QA)
    assert as_conversation(dialogue) is dialogue
