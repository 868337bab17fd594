"""Stores of rendered examples: tokens, masks and columns; the split; and when a cache holds."""

import dataclasses
import json

import numpy as np
import pytest

from llm_jax.data import store as store_module
from llm_jax.data.example_store import (
    STRENGTHS,
    ExampleConfig,
    comparison_stores,
    conversation_stores,
    texts_of,
)
from llm_jax.data.templates import make_template
from llm_jax.data.tokenizer_base import ByteTokenizer
from llm_jax.errors import UserError

BYTES = ByteTokenizer()
CHATML, LLAMA2 = make_template("chatml"), make_template("llama2")
FRACTION = 0.3


def turn(role, content):
    return {"role": role, "content": content}


def question(number):
    return {"prompt": f"question {number}?", "completion": f"answer {number}."}


def pair(number, **fields):
    return {
        "prompt": f"question {number}?", "chosen": f"good {number}", "rejected": f"bad {number}",
        **fields,
    }  # fmt: skip


@pytest.fixture
def write(tmp_path):
    """`write(rows, **settings)`: an ExampleConfig of a file with these rows."""

    def make(rows, name="rows.jsonl", **settings):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return ExampleConfig(source=str(path), **settings)

    return make


@pytest.fixture
def build(tmp_path):
    """`build(function, config)`: the stores, in a cache of this test."""

    def make(function, config, template=CHATML, tokenizer=BYTES, fraction=FRACTION):
        return function(
            config, template, tokenizer, validation_fraction=fraction, cache_dir=str(tmp_path / "c")
        )

    return make


def shown(store, index, trained_only=False):
    """The text of a document with its special tokens, or of its trained tokens alone."""
    span = slice(store.offsets[index], store.offsets[index + 1])
    tokens = store.tokens[span]
    if trained_only:
        tokens = tokens[store.trained[span] == 1]
    return BYTES.decode(tokens, skip_special=False)


def everything(stores, trained_only=False):
    return {shown(s, i, trained_only) for s in stores.values() for i in range(len(s))}


# --- conversations --------------------------------------------------------------------------------


def test_a_conversation_is_a_document_of_which_the_answers_are_trained(write, build):
    rows = [{"messages": [
        turn("system", "Be brief."), turn("user", f"Hi {i}"), turn("assistant", "Yes"),
        turn("user", "Sure?"), turn("assistant", "No"),
    ]} for i in range(4)]  # fmt: skip
    stores = build(conversation_stores, write(rows))
    assert everything(stores) == {
        f"<|bos|><|system|>Be brief.<|end_of_turn|><|user|>Hi {i}<|end_of_turn|>"
        "<|assistant|>Yes<|end_of_turn|><|user|>Sure?<|end_of_turn|><|assistant|>No<|end_of_turn|>"
        for i in range(4)
    }
    assert everything(stores, trained_only=True) == {"Yes<|end_of_turn|>No<|end_of_turn|>"}
    store = stores["train"]
    assert store.trained.dtype == np.uint8 and store.trained.shape == store.tokens.shape
    assert store.meta.bytes == len(store) * len("Be brief.Hi 0YesSure?No")
    assert store.columns == {}


def test_a_comparison_counts_as_its_best_answer_and_a_bad_one_as_nothing(write, build):
    rows = [{"prompt": f"p{i}", "completion": f"c{i}", "label": i % 2 == 0} for i in range(6)]
    stores = build(conversation_stores, write(rows))
    answers = everything(stores, trained_only=True)
    assert answers == {f"c{i}<|end_of_turn|>" for i in (0, 2, 4)}
    assert stores["train"].meta.empty == 3
    ranked = [{"prompt": f"p{i}", "responses": ["x", "y", "z"], "ranks": [2, 1, 3]}
              for i in range(3)]  # fmt: skip
    stores = build(conversation_stores, write(ranked, "ranked.jsonl"))
    assert everything(stores, trained_only=True) == {"y<|end_of_turn|>"}


def test_malformed_rows_end_the_run_or_are_counted(write, build):
    rows = [*map(question, range(4)), {"prompt": "empty", "completion": ""}]
    with pytest.raises(UserError, match=r"rows\.jsonl:5.*data\.malformed=skip"):
        build(conversation_stores, write(rows))
    stores = build(conversation_stores, write(rows, malformed="skip"))
    assert sum(map(len, stores.values())) == 4 and stores["train"].meta.skipped == 1


def test_the_texts_for_a_tokenizer_are_those_of_all_turns(write):
    assert list(texts_of(write([question(1)]))) == ["question 1?", "answer 1."]
    assert list(texts_of(write([pair(1)]))) == ["question 1?", "good 1", "bad 1"]


# --- comparisons ----------------------------------------------------------------------------------


def test_every_answer_is_a_document_with_its_group_score_and_strength(write, build):
    rows = [pair(i, strength="slightly better") if i % 2 else pair(i) for i in range(8)]
    stores = build(comparison_stores, write(rows))
    groups = []
    for store in stores.values():
        assert {name: c.dtype.name for name, c in store.columns.items()} == {
            "group": "int64", "prompt": "int64", "score": "float32", "strength": "int8",
        }  # fmt: skip
        for index in range(0, len(store), 2):
            group = int(store.columns["group"][index])
            groups.append(group)
            np.testing.assert_array_equal(store.columns["group"][index : index + 2], [group] * 2)
            np.testing.assert_array_equal(store.columns["score"][index : index + 2], [1, 0])
            strength = STRENGTHS.index("slightly better") if group % 2 else -1
            assert store.columns["strength"][index] == strength
            assert shown(store, index, trained_only=True) == f"good {group}<|end_of_turn|>"
            assert shown(store, index + 1, trained_only=True) == f"bad {group}<|end_of_turn|>"
            prompt = f"<|bos|><|user|>question {group}?<|end_of_turn|><|assistant|>"
            assert shown(store, index) == f"{prompt}good {group}<|end_of_turn|>"
        prompts = store.columns["prompt"]
        assert len(set(prompts.tolist())) == len(store) // 2  # one for both answers of a pair
        np.testing.assert_array_equal(prompts[::2], prompts[1::2])
    assert sorted(groups) == list(range(8))


def test_batches_change_nothing(write, build, monkeypatch):
    config = write([pair(i) for i in range(12)])
    whole = {f: build(f, config) for f in (conversation_stores, comparison_stores)}
    monkeypatch.setattr(store_module, "_BATCH_CHARACTERS", 50)  # about two comparisons
    again = dataclasses.replace(config, format="preference")  # another cache
    for function, stores in whole.items():
        fingerprints = {split: store.fingerprint for split, store in stores.items()}
        assert {s: store.fingerprint for s, store in build(function, again).items()} == fingerprints


def test_earlier_answers_of_the_prompt_are_not_trained(write, build):
    rows = [{
        "prompt": [turn("user", f"a{i}"), turn("assistant", "earlier"), turn("user", "b")],
        "chosen": "good", "rejected": "bad",
    } for i in range(4)]  # fmt: skip
    stores = build(comparison_stores, write(rows))
    assert everything(stores, trained_only=True) == {"good<|end_of_turn|>", "bad<|end_of_turn|>"}
    assert all("earlier" in text for text in everything(stores))


def test_ranked_answers_keep_their_scores(write, build):
    rows = [{"prompt": f"p{i}", "responses": ["x", "y", "z"], "scores": [2, 4.5, 2]}
            for i in range(4)]  # fmt: skip
    store = build(comparison_stores, write(rows))["train"]
    np.testing.assert_array_equal(store.columns["score"][:3], [2, 4.5, 2])
    assert len(set(store.columns["group"][:3])) == 1
    assert [shown(store, i, trained_only=True)[0] for i in range(3)] == ["x", "y", "z"]


@pytest.mark.parametrize(("name", "index"), [
    ("significantly better", 0), ("Significantly_Better", 0), ("significantly", 0),
    ("better", 1), ("slightly", 2), (" negligibly better ", 3),
])  # fmt: skip
def test_strengths_by_their_names(write, build, name, index):
    stores = build(comparison_stores, write([pair(i, strength=name) for i in range(4)]))
    assert set(stores["train"].columns["strength"]) == {index}


def test_an_unknown_strength_is_one_clear_line(write, build):
    config = write([pair(1), pair(2, strength="tremendously better")])
    with pytest.raises(UserError, match=r"rows\.jsonl:2: strength 'tremendously better' is not"):
        build(comparison_stores, config)


def test_a_conversation_is_nothing_to_compare(write, build):
    with pytest.raises(UserError, match=r"rows\.jsonl:1: the row is a conversation, and this"):
        build(comparison_stores, write([question(1), question(2)]))


@pytest.mark.parametrize("function", [conversation_stores, comparison_stores])
def test_a_prompt_alone_teaches_nothing(write, build, function):
    config = write([{"prompt": "one?"}, {"prompt": "two?"}])
    with pytest.raises(UserError, match=r"rows\.jsonl:1: the row is a prompt without an answer"):
        build(function, config)
    assert list(texts_of(config)) == ["one?", "two?"]


# --- the split ------------------------------------------------------------------------------------


def prompts(stores, split):
    return {text.partition("<|assistant|>")[0] for text in everything({split: stores[split]})}


@pytest.mark.parametrize("function", [conversation_stores, comparison_stores])
def test_no_prompt_stands_on_both_sides(write, build, function):
    rows = [{**pair(i % 15), "chosen": f"good {i}"} for i in range(60)]
    stores = build(function, write(rows))
    assert prompts(stores, "train") and prompts(stores, "validation")
    assert not prompts(stores, "train") & prompts(stores, "validation")
    assert sum(map(len, stores.values())) == 60 * (1 + (function is comparison_stores))


def test_conversations_and_comparisons_hold_out_the_same_prompts(write, build):
    config = write([pair(i) for i in range(30)])
    told, compared = (build(f, config) for f in (conversation_stores, comparison_stores))
    assert prompts(told, "validation") == prompts(compared, "validation")


def test_the_hold_out_of_a_tiny_set_keeps_the_answers_to_a_prompt_together(write, build):
    rows = [pair(1), {**pair(1), "chosen": "better"}, pair(2)]
    stores = build(comparison_stores, write(rows), fraction=1e-9)
    assert sorted(map(len, stores.values())) == [2, 4]
    assert not prompts(stores, "train") & prompts(stores, "validation")
    for store in stores.values():
        assert shown(store, 0, trained_only=True).startswith("good")
        np.testing.assert_array_equal(store.columns["score"], [1, 0] * (len(store) // 2))
        assert set(np.bincount(store.columns["group"])) <= {0, 2}


def test_a_row_may_say_what_decides_its_side(write, build):
    rows = [pair(i, split_text=f"document {i % 2}") for i in range(12)]
    stores = build(comparison_stores, write(rows), fraction=1e-9)
    parities = [{int(g) % 2 for g in s.columns["group"]} for s in stores.values()]
    assert sorted(map(sorted, parities)) == [[0], [1]]


# --- the cache ------------------------------------------------------------------------------------


def test_the_cache_is_used_while_nothing_changes(write, build, monkeypatch):
    config = write([pair(i) for i in range(6)])
    first = {f: build(f, config)["train"] for f in (conversation_stores, comparison_stores)}
    monkeypatch.setattr(store_module, "_write", None)  # calling it would fail
    for function, store in first.items():
        again = build(function, config)["train"]
        assert again.directory == store.directory and again.fingerprint == store.fingerprint
        np.testing.assert_array_equal(again.trained, store.trained)


def test_any_change_renders_anew(write, build):
    config = write([pair(i) for i in range(20)])
    stores = [
        build(comparison_stores, config),
        build(conversation_stores, config),
        build(comparison_stores, config, template=LLAMA2),
        build(comparison_stores, dataclasses.replace(config, format="preference")),
        build(comparison_stores, config, fraction=0.4),
        build(comparison_stores, write([pair(i) for i in range(21)])),
    ]
    assert len({s["train"].directory for s in stores}) == len(stores)
    # The content is the same where only the name of the format is given.
    assert stores[0]["train"].fingerprint == stores[3]["train"].fingerprint
    assert len({s["train"].fingerprint for s in stores}) == len(stores) - 1


def test_the_fingerprint_counts_masks_and_columns(write, build):
    rows = [{"messages": [turn("user", f"u{i}"), turn("assistant", "a"), turn("user", "b"),
                          turn("assistant", "c")]} for i in range(4)]  # fmt: skip
    whole = build(conversation_stores, write(rows))["train"]
    for row in rows:
        row["messages"][1]["weight"] = 0
    part = build(conversation_stores, write(rows))["train"]
    assert whole.tokens.tolist() == part.tokens.tolist()
    assert whole.trained.sum() > part.trained.sum()
    assert whole.fingerprint != part.fingerprint
    strengths = [build(comparison_stores, write([pair(i, strength=s) for i in range(4)]))["train"]
                 for s in ("better", "slightly")]  # fmt: skip
    assert strengths[0].tokens.tolist() == strengths[1].tokens.tolist()
    assert strengths[0].fingerprint != strengths[1].fingerprint
