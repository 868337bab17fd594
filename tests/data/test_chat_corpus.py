"""What the data section of fine-tuning means: components, their weights, and what is told."""

import dataclasses
import json

import numpy as np
import pytest

from llm_jax.data.chat_corpus import ChatCorpus, ChatDataConfig, NamedExampleConfig
from llm_jax.data.documents import split_hash
from llm_jax.data.templates import make_template
from llm_jax.data.tokenizer_base import ByteTokenizer
from llm_jax.errors import UserError

BYTES = ByteTokenizer()
CHATML = make_template("chatml")
TEXTS = [f"Text {i} goes on and on." for i in range(12)]


@pytest.fixture
def folder(tmp_path):
    """Files of conversations and of texts."""
    for name in ("chats", "others"):
        rows = [{"prompt": f"{name} {i}", "completion": f"yes {i}"} for i in range(12)]
        write(tmp_path / f"{name}.jsonl", rows)
    write(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS])
    write(tmp_path / "bodies.jsonl", [{"body": text} for text in TEXTS])
    (tmp_path / "texts.txt").write_text("<|endoftext|>".join(TEXTS))
    return tmp_path


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def corpus(folder):
    """`corpus(**settings)`: the ChatCorpus of the conversations, unless the settings say other."""

    def make(source="chats.jsonl", template=CHATML, **settings):
        settings = {"validation_fraction": 0.2, "cache_dir": str(folder / "cache")} | settings
        return ChatCorpus(ChatDataConfig(source=str(folder / source), **settings), template, BYTES)

    return make


def named(folder, name, source="others.jsonl", **settings):
    return NamedExampleConfig(source=str(folder / source), name=name, **settings)


# --- components and weights -----------------------------------------------------------------------


def test_conversations_alone_are_the_component_chat(corpus):
    chats = corpus()
    assert list(chats.stores) == ["chat"] == [chats.main]
    assert chats.weights == {"chat": 1.0}
    rows, held_out = chats.rows(64, chats.weights), chats.validation_rows(64)
    assert list(rows) == list(held_out) == ["chat"]
    assert sum(map(len, chats.stores["chat"].values())) == 12
    row = rows["chat"][0]
    assert 0 < row.loss_weights.sum() < np.sum(row.segment_ids > 0)


def test_components_share_alike_and_texts_get_their_share(corpus, folder):
    mixture = (named(folder, "others"), named(folder, "more", "texts.txt"))
    assert corpus(mixture=mixture).weights == {name: 1 / 3 for name in ("chat", "others", "more")}
    chats = corpus(mixture=mixture[:1], replay_source=str(folder / "texts.jsonl"), replay_share=0.2)
    assert chats.weights == pytest.approx({"chat": 0.4, "others": 0.4, "replay": 0.2})
    assert list(chats.rows(64, chats.weights)) == ["chat", "others", "replay"]
    assert corpus(weights={"chat": 3.0}).weights == {"chat": 3.0}


def test_texts_that_are_replayed_count_every_token(corpus, folder):
    for source, field in [("texts.jsonl", "text"), ("bodies.jsonl", "body")]:
        chats = corpus(replay_source=str(folder / source), replay_text_field=field)
        row = chats.rows(32, chats.weights)["replay"][0]
        np.testing.assert_array_equal(row.loss_weights, row.segment_ids > 0)
        assert chats.stores["replay"]["train"].trained is None
        assert BYTES.decode(chats.stores["replay"]["train"].document(0)) in TEXTS


@pytest.mark.parametrize(
    ("source", "settings"), [("texts.txt", {}), ("texts.jsonl", {"format": "text"})]
)
def test_plain_texts_are_trained_on_whole(corpus, source, settings):
    chats = corpus(source, **settings)
    store = chats.stores["chat"]["train"]
    assert store.trained is None
    assert store.document(0).tolist()[0] == BYTES.bos_id
    assert BYTES.decode(store.document(0), skip_special=False).endswith("on.<|eos|>")
    # They are cut wherever a row ends, as in pre-training.
    rows = chats.rows(32, chats.weights)["chat"]
    assert all(np.all(rows[i].segment_ids > 0) for i in range(len(rows) - 1))


@pytest.mark.parametrize("name", ["", "chat", "replay", "twice"])
def test_every_component_has_a_name_of_its_own(corpus, folder, name):
    mixture = (named(folder, "twice"), named(folder, name))
    with pytest.raises(UserError, match=rf"mixture has a component named '{name}'"):
        corpus(mixture=mixture)


@pytest.mark.parametrize("share", [0, 1, -0.5])
def test_the_share_of_texts_is_a_share(share):
    with pytest.raises(UserError, match=rf"replay_share={share} must lie between 0 and 1"):
        ChatDataConfig(replay_share=share)


# --- packing --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("packing", "rows"), [("best_fit", 1), ("single", 2)])
def test_conversations_are_packed_as_the_config_says(corpus, folder, packing, rows):
    write(folder / "few.jsonl", [{"prompt": f"p{i}", "completion": "c"} for i in range(3)])
    chats = corpus("few.jsonl", packing=packing, validation_fraction=1e-9)
    assert len(chats.rows(64, chats.weights)["chat"]) == rows


HELD, KEPT = sorted(["one", "two"], key=split_hash)  # of a tiny set, the first is held out


def chat(prompt, completion, split_text=KEPT):
    return {"prompt": prompt, "completion": completion, "split_text": split_text}


@pytest.mark.parametrize(("too_long", "answers", "told"), [
    ("truncate_right", ["a" * 12, "b"], "truncated"),
    ("truncate_left", ["a" * 14 + "z", "b"], "truncated"),
    ("drop", ["b"], "left out"),
])  # fmt: skip
def test_long_conversations_are_cut_or_left_out(corpus, folder, too_long, answers, told):
    write(folder / "long.jsonl", [chat("p", "a" * 40 + "z"), chat("p", "b"), chat("q", "c", HELD)])
    chats = corpus("long.jsonl", too_long=too_long, packing="single", validation_fraction=1e-9)
    assert chats.facts(64) == ()
    assert chats.facts(16) == (f"1 of chat are longer than a row and {told}",)
    rows = chats.rows(16, chats.weights)["chat"]
    found = [BYTES.decode(rows[i].targets[rows[i].loss_weights > 0]) for i in range(len(rows))]
    assert found == answers


def test_conversations_whose_answer_is_cut_off_are_told(corpus, folder):
    rows = [chat("p" * 40, "a"), chat("p" * 40, "b"), chat("p", "c"), chat("q", "d", HELD)]
    write(folder / "long.jsonl", rows)
    assert corpus("long.jsonl", validation_fraction=1e-9).facts(16) == (
        "2 of chat are longer than a row and truncated",
        "2 of chat have no trained token and are left out",
    )


# --- what is told ---------------------------------------------------------------------------------


def test_one_line_says_what_was_read_and_what_was_not(corpus, folder):
    rows = [{"prompt": f"p{i}", "completion": "c", "label": i > 0} for i in range(9)]
    write(folder / "mixed.jsonl", [*rows, {"prompt": "p", "completion": "", "label": True}])
    line = corpus(
        "mixed.jsonl", malformed="skip", validation_fraction=1e-9,
        replay_source=str(folder / "texts.jsonl"),
    ).describe()  # fmt: skip
    tokens = sum(len(text) + 2 for text in TEXTS if text != min(TEXTS, key=split_hash))
    # bos, user, two letters, end of turn, assistant, one letter, end of turn; two are trained.
    assert line == (
        "chat: 7 conversations, 56 tokens (14 of them trained on), 1 held out, 1 malformed rows "
        "skipped, 1 rows with nothing to learn left out; "
        f"replay: 11 documents, {tokens} tokens, 1 held out"
    )


def test_the_fingerprint_is_of_everything_that_is_trained_on(corpus, folder):
    first = corpus()
    variants = [
        corpus(template=make_template("llama2")),
        corpus(mixture=(named(folder, "others"),)),
        corpus(mixture=(named(folder, "another"),)),
        corpus(replay_source=str(folder / "texts.jsonl")),
        corpus(validation_fraction=0.4),
    ]
    assert corpus(cache_dir=str(folder / "elsewhere")).fingerprint == first.fingerprint
    assert len({c.fingerprint for c in [first, *variants]}) == 1 + len(variants)


def test_the_config_of_a_component_is_that_of_the_examples():
    names = {field.name for field in dataclasses.fields(NamedExampleConfig)}
    assert names < {field.name for field in dataclasses.fields(ChatDataConfig)} | {"name"}
