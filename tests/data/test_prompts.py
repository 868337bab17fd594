"""Prompts: what becomes one, which are held out, and which of them each round takes."""

import datetime
import json

import pytest

from llm_jax.data import prompts as prompts_module
from llm_jax.data.documents import split_hash
from llm_jax.data.example_store import conversation_stores
from llm_jax.data.examples import Message
from llm_jax.data.prompts import ANSWER, PromptData, PromptDataConfig
from llm_jax.data.templates import make_template
from llm_jax.data.tokenizer_base import ByteTokenizer
from llm_jax.errors import UserError

BYTES = ByteTokenizer()
CHATML, LLAMA2 = make_template("chatml"), make_template("llama2")


def said(role, content):
    return {"role": role, "content": content}


@pytest.fixture
def read(tmp_path):
    """`read(rows, ...)`: the prompts of a file with these rows."""

    def make(rows, *, template=CHATML, longest=1000, seed=0, fraction=1e-9, **settings):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = PromptDataConfig(source=str(path), validation_fraction=fraction, **settings)
        return PromptData(config, template, BYTES, longest=longest, seed=seed)

    return make


def questions(count):
    return [{"prompt": f"question {i}?", "completion": f"answer {i}."} for i in range(count)]


def everything(data):
    return [*data.train, *data.validation]


def only(data, text):
    (prompt,) = (prompt for prompt in everything(data) if prompt.text == text)
    return prompt


# --- what becomes a prompt ------------------------------------------------------------------------


def test_a_prompt_is_all_before_the_last_answer(read):
    turns = [said("system", "Be brief."), said("user", "One?"), said("assistant", "1")]
    row = {"messages": [*turns, said("user", "Two?"), said("assistant", "2")], "level": 3}
    prompt = only(read([row, {"messages": turns[1:]}]), text := "Be brief.\n\nOne?\n\n1\n\nTwo?")
    messages = [*(Message(**turn) for turn in turns), Message("user", "Two?")]
    assert prompt.ids == tuple(CHATML.render_prompt(messages, (), BYTES))
    assert prompt.text == text and prompt.answer == "2"
    assert prompt.row == {**row, ANSWER: "2"}


def test_the_template_decides_the_tokens(read):
    prompt = only(read(questions(2), template=LLAMA2), "question 1?")
    assert BYTES.decode(prompt.ids) == "[INST] question 1? [/INST]"


def test_tools_stand_in_the_prompt(read):
    rows = [{**row, "tools": [{"name": "weather"}]} for row in questions(2)]
    prompt = only(read(rows), "question 0?")
    assert '{"name": "weather"}' in BYTES.decode(prompt.ids)
    assert prompt.tools == ({"name": "weather"},)


def test_a_comparison_asks_for_its_best_answer_and_may_have_none(read):
    pair = {"prompt": "Pair?", "chosen": "good", "rejected": "bad", "safe": True}
    other = {**pair, "prompt": "Other?"}
    prompt = only(read([pair, other]), "Pair?")
    assert (prompt.answer, prompt.row) == ("good", {**pair, ANSWER: "good"})
    unpaired = [{"prompt": p, "completion": "x", "label": p == "Good?"} for p in ("Good?", "Bad?")]
    data = read(unpaired)
    assert (only(data, "Good?").answer, only(data, "Bad?").answer) == ("x", None)
    assert only(data, "Bad?").row == unpaired[1]


def test_prompts_alone_bring_the_field_of_the_answer_themselves(read):
    rows = [{"prompt": f"{i}?", "answer": i} for i in range(3)]
    data = read(rows)
    assert {prompt.answer for prompt in everything(data)} == {None}
    assert sorted(prompt.row["answer"] for prompt in everything(data)) == [0, 1, 2]


def test_the_row_keeps_its_own_answer_field_unless_it_is_null(read):
    rows = [{**row, ANSWER: own} for row, own in zip(questions(2), ("own", None), strict=True)]
    data = read(rows)
    assert only(data, "question 0?").row[ANSWER] == "own"
    assert only(data, "question 1?").row[ANSWER] == "answer 1."


def test_the_prompts_of_one_row_have_answers_of_their_own(read):
    instances = [{"input": "1 2", "output": "3"}, {"input": "2 2", "output": "4"}]
    data = read(
        [
            {"instruction": "Add.", "instances": instances},
            {"instruction": "Go.", "instances": instances},
        ]
    )
    assert only(data, "Add.\n\n1 2").row[ANSWER] == "3"
    assert only(data, "Add.\n\n2 2").row[ANSWER] == "4"


def test_a_call_of_a_tool_is_part_of_the_answer(read):
    call = {"function": {"name": "f", "arguments": {"x": 1}}}
    answer = {**said("assistant", "So:"), "tool_calls": [call]}
    rows = [{"messages": [said("user", name), answer]} for name in "ab"]
    wanted = 'So:\n<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>'
    assert only(read(rows), "a").answer == wanted


# --- what is left out -----------------------------------------------------------------------------


def test_what_is_too_long_is_dropped_and_counted(read):
    rows = [*questions(3), {"prompt": "x" * 50, "completion": "1"}]
    whole = read(rows)
    longest = len(only(whole, "question 0?").ids)
    data = read(rows, longest=longest)
    assert whole.too_long == 0 and data.too_long == 1
    assert sorted(p.text for p in everything(data)) == [f"question {i}?" for i in range(3)]
    assert "1 longer than the limit left out" in data.describe()
    with pytest.raises(UserError, match=rf"all 4 prompts are longer than the {longest - 1} tokens"):
        read(rows, longest=longest - 1)


def test_a_text_that_asks_nothing_is_no_prompt(read):
    answer = {"messages": [said("assistant", "Once upon a time.")]}
    ask = [{"messages": [said("user", f"{i}?"), said("assistant", "1")]} for i in range(2)]
    data = read([answer, *ask])
    assert len(everything(data)) == 2 and data.counts.empty == 1
    assert "1 rows of no use left out" in data.describe()
    with pytest.raises(UserError, match="holds no prompt: 1 rows were empty and 0 malformed"):
        read([answer])


def test_malformed_rows_end_the_run_or_are_counted(read):
    rows = [*questions(2), {"prompt": "x"}]
    with pytest.raises(UserError, match=r"rows\.jsonl:3: "):
        read(rows)
    assert "1 malformed rows skipped" in read(rows, malformed="skip").describe()


# --- the split ------------------------------------------------------------------------------------


def test_the_prompts_of_fine_tuning_are_held_out(read, tmp_path):
    data = read(questions(60), fraction=0.3)
    config = PromptDataConfig(source=str(tmp_path / "rows.jsonl"))
    stores = conversation_stores(
        config, CHATML, BYTES, validation_fraction=0.3, cache_dir=str(tmp_path / "cache")
    )
    for split, prompts in (("train", data.train), ("validation", data.validation)):
        store = stores[split]
        assert len(prompts) == len(store) > 5
        for prompt, begin in zip(prompts, store.offsets[:-1], strict=True):
            assert prompt.ids == tuple(store.tokens[begin:][: len(prompt.ids)].tolist())


def test_a_tiny_set_has_a_prompt_to_hold_out(read):
    data = read(questions(4))
    assert (len(data.train), len(data.validation)) == (3, 1)
    with pytest.raises(
        UserError, match=r"leaves no prompt to train on beside those held out \(1\)"
    ):
        read(questions(1))
    with pytest.raises(UserError, match=r"or lower validation_fraction=0\.999"):
        read(questions(4), fraction=0.999999)
    with pytest.raises(UserError, match=r"validation_fraction=1\.5 is not between 0 and 1"):
        read(questions(4), fraction=1.5)


# --- the order ------------------------------------------------------------------------------------


def texts(prompts):
    return [prompt.text for prompt in prompts]


def test_every_prompt_comes_once_an_epoch_in_another_order(read):
    data = read(questions(13))
    count = len(data.train)
    assert count == 12
    taken = [text for round in range(24) for text in texts(data.take(5 * round, 5))]
    epochs = [tuple(taken[begin : begin + count]) for begin in range(0, len(taken), count)]
    assert len(epochs) == 10
    assert all(sorted(epoch) == sorted(texts(data.train)) for epoch in epochs)
    assert len(set(epochs)) == 10


def test_the_order_is_a_function_of_the_seed_whatever_the_sizes(read):
    data, again, other = read(questions(50)), read(questions(50)), read(questions(50), seed=1)
    assert data.take(112, 16) == again.take(112, 16)
    assert data.take(112, 16) == [*data.take(112, 3), *data.take(115, 13)]
    assert data.take(112, 16) != other.take(112, 16)
    # No prompt is fixed to a place.
    assert len({data.take(49 * epoch, 1)[0].text for epoch in range(40)}) > 15


def test_more_prompts_than_there_are_can_be_taken(read):
    data = read(questions(4))
    assert sorted(texts(data.take(6, 6))) == sorted(2 * texts(data.train))


# --- the fingerprint ------------------------------------------------------------------------------


def test_the_fingerprint_tells_prompts_rows_and_splits_apart(read):
    rows = questions(30)
    changed = [
        rows,
        rows[::-1],
        [{**rows[0], "level": 1}, *rows[1:]],
        [{**rows[0], "completion": "another"}, *rows[1:]],
    ]
    fingerprints = [read(r).fingerprint for r in changed]
    fingerprints += [read(rows, template=LLAMA2).fingerprint, read(rows, fraction=0.3).fingerprint]
    assert len(set(fingerprints)) == len(fingerprints)
    assert read(rows).fingerprint == read(rows, seed=5).fingerprint == fingerprints[0]


def test_the_fingerprint_tells_splits_of_one_order_apart(read):
    rows = sorted(questions(3), key=lambda row: -split_hash(row["prompt"]))
    between = split_hash(rows[0]["prompt"]) - 1e-9
    one, two = read(rows), read(rows, fraction=between)
    assert everything(one) == everything(two) and len(one.validation) < len(two.validation)
    assert one.fingerprint != two.fingerprint


def test_the_fingerprint_takes_any_value_of_a_row(read, monkeypatch):
    values = {"when": datetime.date(2000, 1, 1), "object": object(), "bytes": b"x"}
    real = prompts_module.read_examples

    def with_values(*args):
        for example in real(*args):
            example.row.update(values)
            yield example

    monkeypatch.setattr(prompts_module, "read_examples", with_values)
    first = read(questions(3)).fingerprint
    values["object"] = object()  # elsewhere in memory
    assert read(questions(3)).fingerprint == first


def test_the_default_task_is_ready(tmp_path):
    data = PromptData(PromptDataConfig(), CHATML, BYTES, longest=64, seed=0)
    assert data.too_long == 0 and len(data.validation) > 200
    assert not {p.text for p in data.train} & {p.text for p in data.validation}
    assert all(prompt.row[ANSWER] == prompt.answer for prompt in data.validation)
