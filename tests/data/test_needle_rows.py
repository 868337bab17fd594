"""Needle rows: what they say can be read back, fills the row, and is answered by retrieval only."""

import re
import types

import numpy as np
import pytest

from llm_jax.data import haystack, mixture, needle
from llm_jax.data.needle import NeedleConfig, NeedleRows, needle_examples
from llm_jax.data.tokenizer_base import ByteTokenizer
from llm_jax.data.tokenizers import TokenizerConfig, make_tokenizer
from llm_jax.errors import UserError

TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. " * 40
# SentencePiece puts a space before every part that is encoded on its own.
NEEDLE = re.compile(
    rf"\s*{needle.BEFORE_NAME.strip()}\s+(\w+)\s+(\w+)(?:{re.escape(needle.AFTER_VALUE)})?"
)


class Store:
    """A token store in memory."""

    def __init__(self, tokenizer, texts):
        documents = [[tokenizer.bos_id, *tokenizer.encode(t), tokenizer.eos_id] for t in texts]
        self.tokens = np.concatenate(documents).astype(np.uint16)
        self.offsets = np.concatenate([[0], np.cumsum([len(d) for d in documents])])

    def __len__(self):
        return len(self.offsets) - 1

    def document(self, index):
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]


@pytest.fixture(scope="module", params=["bytes", "bpe", "sentencepiece"])
def setting(request, tmp_path_factory):
    """A tokenizer and a store of its text."""
    if request.param == "bytes":
        tokenizer = ByteTokenizer()
    elif request.param == "bpe":
        texts = [TEXT, " ".join(haystack.WORDS) + needle.BEFORE_NAME]
        tokenizer = make_tokenizer(TokenizerConfig(vocab_size=400), lambda: texts)
    else:
        sentencepiece = pytest.importorskip("sentencepiece")
        folder = tmp_path_factory.mktemp("sentencepiece")
        (folder / "text.txt").write_text(TEXT.replace(". ", ".\n") + "0123456789 " + TEXT)
        sentencepiece.SentencePieceTrainer.train(
            input=str(folder / "text.txt"), model_prefix=str(folder / "m"), vocab_size=320,
            model_type="bpe", byte_fallback=True, minloglevel=2,
        )  # fmt: skip
        tokenizer = make_tokenizer(TokenizerConfig(path=str(folder / "m.model")), lambda: [])
    texts = [TEXT[i * 300 : (i + 1) * 300] for i in range(8)]
    return types.SimpleNamespace(tokenizer=tokenizer, store=Store(tokenizer, texts))


def decoded(tokenizer, row):
    return tokenizer.decode(np.append(row.tokens, row.targets[-1]))


def facts_in(text):
    return NEEDLE.findall(text)


def test_a_row_begins_as_a_document_does():
    tokenizer = ByteTokenizer()
    store = Store(tokenizer, [TEXT])
    tokenizer.document_start = ()
    for length in (64, 65, 128):
        row = NeedleRows(tokenizer, store, length, 0, 10)[3]
        assert row.tokens.shape == row.loss_weights.shape == (length,)
        assert row.tokens[0] < 256 and row.loss_weights.sum() > 0
        assert len(facts_in(decoded(tokenizer, row))) >= 2
    shortest = _shortest(tokenizer, store)
    tokenizer.document_start = (tokenizer.bos_id,)
    assert _shortest(tokenizer, store) == shortest + 1


def _shortest(tokenizer, store):
    """The least length of a row."""
    with pytest.raises(UserError, match=r"need length \d+") as caught:
        NeedleRows(tokenizer, store, 2, 0, 10)
    return int(re.search(r"need length (\d+)", str(caught.value))[1])


def test_a_row_has_exactly_its_length_and_nothing_but_real_pairs(setting):
    for length in (128, 200, 513):
        row = NeedleRows(setting.tokenizer, setting.store, length, 0, 10)[3]
        for name in ("tokens", "targets", "loss_weights", "segment_ids", "positions"):
            assert getattr(row, name).shape == (length,)
        assert row.tokens.dtype == row.targets.dtype == row.positions.dtype == np.int32
        assert row.loss_weights.dtype == np.float32
        np.testing.assert_array_equal(row.tokens[1:], row.targets[:-1])
        np.testing.assert_array_equal(row.positions, np.arange(length))
        assert np.all(row.segment_ids == 1)
        assert row.tokens[0] == setting.tokenizer.bos_id
        specials = setting.tokenizer.special_ids.values()
        assert not np.isin(row.targets, list(specials)).any()


def test_every_question_is_answered_by_what_its_needle_says_before(setting):
    rows = NeedleRows(setting.tokenizer, setting.store, 512, 0, 30)
    assert rows.questions > 1
    for i in range(len(rows)):
        facts = facts_in(decoded(setting.tokenizer, rows[i]))
        assert len(facts) == rows.needles + rows.questions
        stated = dict(facts)
        assert len(stated) == rows.needles
        assert all(stated[name] == value for name, value in facts)
        assert facts[-1] in facts[:-1]


def test_a_question_stands_behind_its_needle(setting):
    config = NeedleConfig(answer_weight=4.0, text_weight=0.25)
    rows = NeedleRows(setting.tokenizer, setting.store, 512, 0, 30, config)
    for i in range(len(rows)):
        row = rows[i]
        value_weights = row.loss_weights[row.loss_weights != 0.25][:: rows.answer_tokens]
        stated = set()
        facts = facts_in(decoded(setting.tokenizer, row))
        for (name, _), weight in zip(facts, value_weights, strict=True):
            assert weight == (4 if name in stated else 0)
            stated.add(name)


def test_weights_mark_answers_text_and_leave_out_values_stated_first(setting):
    config = NeedleConfig(answer_weight=4.0, text_weight=0.25)
    rows = NeedleRows(setting.tokenizer, setting.store, 512, 0, 30, config)
    for i in range(5):
        row = rows[i]
        weights, counts = np.unique(row.loss_weights, return_counts=True)
        np.testing.assert_array_equal(weights, [0, 0.25, 4])
        assert counts[0] == rows.needles * rows.answer_tokens
        assert counts[2] == rows.questions * rows.answer_tokens
        assert np.all(row.loss_weights[-rows.answer_tokens :] == 4)
        asked = row.targets[row.loss_weights == 4].reshape(-1, rows.answer_tokens)
        values = [setting.tokenizer.decode(ids).strip() for ids in asked]
        facts = facts_in(decoded(setting.tokenizer, row))
        assert values[-1] == facts[-1][1]
        assert set(values) <= {value for _, value in facts}


def test_an_example_holds_its_needle_at_its_depth_and_one_question_at_the_end(setting):
    length, depths = 400, [0.0, 0.25, 0.5, 1.0]
    examples = needle_examples(setting.tokenizer, setting.store, length, depths, 6, seed=1)
    assert examples.depths.tolist() == np.repeat(depths, 6).tolist()
    for row, depth in zip(examples.rows, examples.depths, strict=True):
        marked = np.flatnonzero(row.loss_weights)
        np.testing.assert_array_equal(marked, np.arange(length - examples.answer_tokens, length))
        text = decoded(setting.tokenizer, row)
        facts = facts_in(text)
        name, value = facts[-1]
        assert len(facts) == NeedleConfig().distractors + 2
        assert dict(facts[:-1])[name] == value
        begin = next(match.start() for match in NEEDLE.finditer(text) if match[1] == name)
        between = len(NEEDLE.sub("", text[:begin])) / len(NEEDLE.sub("", text))
        assert between == pytest.approx(depth, abs=0.08)


def test_examples_without_distractors_have_one_needle(setting):
    config = NeedleConfig(distractors=0)
    examples = needle_examples(setting.tokenizer, setting.store, 256, [0.5], 4, 0, config)
    for row in examples.rows:
        facts = facts_in(decoded(setting.tokenizer, row))
        assert len(facts) == 2
        assert facts[0] == facts[1]


def test_training_rows_hold_distractors_even_where_one_question_fits(setting):
    rows = NeedleRows(setting.tokenizer, setting.store, 128, 0, 5, NeedleConfig(share=0.01))
    assert rows.questions == 1
    assert rows.needles == 1 + NeedleConfig().distractors


@pytest.mark.parametrize("share", [0.01, 0.5, 1.0])
def test_every_length_from_the_minimal_one_on_works_and_one_less_says_so(setting, share):
    config = NeedleConfig(share=share)

    def rows(length):
        return NeedleRows(setting.tokenizer, setting.store, length, 0, 5, config)

    with pytest.raises(UserError, match=r"need length (\d+)") as error:
        rows(8)
    minimal = int(re.search(r"need length (\d+)", str(error.value))[1])
    with pytest.raises(UserError, match=f"need length {minimal}"):
        rows(minimal - 1)
    for length in range(minimal, minimal + 130, 5):
        assert [rows(length)[i].tokens.shape for i in range(2)] == [(length,)] * 2
        examples = needle_examples(setting.tokenizer, setting.store, length, [0, 1], 1, 0, config)
        assert examples.rows[0].tokens.shape == (length,)


def test_rows_are_a_function_of_seed_and_index(setting):
    def rows(seed):
        return NeedleRows(setting.tokenizer, setting.store, 128, seed, 100)

    first, again, other = rows(0), rows(0), rows(1)
    np.testing.assert_array_equal(first[7].tokens, again[7].tokens)
    different = {
        row.tokens.tobytes()
        for rows_ in (first, other)
        for row in map(rows_.__getitem__, range(100))
    }
    assert len(different) == 200
    np.testing.assert_array_equal(first.documents(7), np.full(128, 7))
    with pytest.raises(IndexError):
        first[100]


def test_values_are_uniform_whatever_the_name():
    tokenizer = ByteTokenizer()
    rows = NeedleRows(tokenizer, Store(tokenizer, [TEXT]), 256, 0, 800)
    facts = {fact for i in range(800) for fact in set(facts_in(decoded(tokenizer, rows[i])))}
    values, counts = np.unique([value for _, value in facts], return_counts=True)
    config = NeedleConfig()
    # Facts are collected once each, so the counts are more even than the draws were.
    assert len(values) == config.answers and counts.min() > 0.5 * counts.mean()
    assert len({name for name, _ in facts}) == config.names
    assert len(facts) > 0.5 * config.names * config.answers  # no name has a few values only
    assert not {name for name, _ in facts} & set(values)


def test_training_and_evaluation_with_other_seeds_share_few_facts():
    tokenizer = ByteTokenizer()
    store = Store(tokenizer, [TEXT])
    rows = NeedleRows(tokenizer, store, 256, 0, 300)
    seen = {fact for i in range(300) for fact in facts_in(decoded(tokenizer, rows[i]))}
    examples = needle_examples(tokenizer, store, 256, [0.5], 100, seed=1)
    asked = [facts_in(decoded(tokenizer, row))[-1] for row in examples.rows]
    chance = len(seen) / (NeedleConfig().names * NeedleConfig().answers)
    assert np.mean([fact in seen for fact in asked]) < chance + 0.08


def test_the_haystack_is_text_of_the_store_without_its_special_tokens():
    tokenizer = ByteTokenizer()
    store = Store(tokenizer, ["abcdefghij", "klmnopqrst"])  # shorter than a row: round and round
    row = NeedleRows(tokenizer, store, 300, 0, 5, NeedleConfig(max_needles=1, distractors=0))[0]
    text = decoded(tokenizer, row)
    hay = NEEDLE.sub("", text)
    assert hay in "abcdefghijklmnopqrst" * 20


def test_needle_rows_mix_with_others(setting):
    rows = NeedleRows(setting.tokenizer, setting.store, 128, 0, 1 << 20)
    batch = mixture.batches({"needle": rows}, {"needle": 1.0}, 4, seed=0)[10]
    assert batch.tokens.shape == (4, 128)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answers": 0}, "needle.answers=0"),
        ({"answers": 160}, "needle.answers=160"),
        ({"names": 1000}, "needle.names=1000"),
        ({"names": 4, "max_needles": 5}, "needle.max_needles=5"),
        ({"distractors": 64}, "needle.distractors=64"),
        ({"share": 0.0}, "needle.share=0.0"),
    ],
)
def test_bad_settings_are_one_clear_line(changes, message):
    tokenizer = ByteTokenizer()
    with pytest.raises(UserError, match=message):
        NeedleRows(tokenizer, Store(tokenizer, [TEXT]), 256, 0, 1, NeedleConfig(**changes))


def test_a_depth_outside_the_row_and_a_store_without_text_are_refused():
    tokenizer = ByteTokenizer()
    with pytest.raises(UserError, match="between 0 and 1"):
        needle_examples(tokenizer, Store(tokenizer, [TEXT]), 256, [1.5], 1, 0)
    with pytest.raises(UserError, match="no text"):
        NeedleRows(tokenizer, Store(tokenizer, ["", ""]), 256, 0, 1)
