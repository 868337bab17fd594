"""Rows with several facts, chains and pairs: a reader with eyes finds every answer, in the row."""

import re

import numpy as np
import pytest

from llm_jax.data import ruler
from llm_jax.data.haystack import WORDS
from llm_jax.data.tokenizer_base import ByteTokenizer
from llm_jax.data.tokenizers import TokenizerConfig, make_tokenizer
from llm_jax.errors import UserError

TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. " * 40
FACT = re.compile(r" Note: (\w+) (\w+)")
LET = re.compile(r" Let: (\w+) = (\w+)\.")


class OneDocument:
    """A token store in memory."""

    def __init__(self, tokens):
        self.tokens = np.array(tokens, np.int32)

    def __len__(self):
        return 1

    def document(self, index):
        return self.tokens


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def tokenizer(request):
    if request.param == "bytes":
        return ByteTokenizer()
    texts = [TEXT, " ".join(WORDS), " Note: Let: Value: = ."]
    return make_tokenizer(TokenizerConfig(vocab_size=400), lambda: texts)


@pytest.fixture(scope="module")
def texts(tokenizer):
    return OneDocument(tokenizer.encode(TEXT))


def split(tokenizer, row):
    """The text up to each answer, and the answers; a gap in the places begins another one."""
    begins = [row.answers[0], *row.answers[1:][np.diff(row.answers) > 1]]
    ends = [*row.answers[:-1][np.diff(row.answers) > 1], row.answers[-1]]
    decode = tokenizer.decode
    return [
        (decode(row.tokens[:begin]), decode(row.tokens[begin : end + 1]).strip())
        for begin, end in zip(begins, ends, strict=True)
    ]


def test_several_facts_are_asked_for_in_turn(tokenizer, texts):
    rows = ruler.multi_needle(tokenizer, texts, 400, 5, 0, needles=3, distractors=2)
    for row in rows:
        assert len(row.tokens) == 401 and row.answers[-1] == 400 and row.depth is None
        pairs = split(tokenizer, row)
        assert len(pairs) == 3
        stated = FACT.findall(pairs[0][0])
        assert len({name for name, _ in stated}) == 5
        for before, answer in pairs:
            name = before.rpartition(" Note: ")[2]
            assert dict(stated)[name] == answer
    assert len({row.tokens.tobytes() for row in rows}) == 5


@pytest.mark.parametrize("hops", [1, 3])
def test_a_chain_leads_to_its_value(tokenizer, texts, hops):
    for row in ruler.variable_tracking(tokenizer, texts, 500, 6, 1, hops=hops, chains=2):
        ((before, answer),) = split(tokenizer, row)
        assignments = LET.findall(before)
        assert len(assignments) == 2 * (hops + 1) and len(row.tokens) == 501
        names = before.rpartition(" Value: ")[2]
        example, asked = re.findall(r" Value: (\w+) =", before)
        assert names == f"{asked} ="
        for name, value in ((example, before), (asked, answer)):
            for _ in range(hops + 1):
                name = dict(assignments)[name]
            assert name == value or f" = {name}. Value:" in value
        order = [name for name, _ in assignments]
        for name, source in assignments:  # a variable is known before it is copied
            assert source not in order or order.index(source) < order.index(name)


def test_a_row_of_pairs_holds_nothing_else_and_the_key_once(tokenizer):
    for length in (120, 700):
        depths = [0.0, 0.5, 1.0]
        rows = ruler.key_value(tokenizer, length, depths, 2, seed=3)
        assert [row.depth for row in rows] == [0.0, 0.0, 0.5, 0.5, 1.0, 1.0]
        for row in rows:
            assert len(row.tokens) <= length + 1 and row.answers[-1] == len(row.tokens) - 1
            ((before, answer),) = split(tokenizer, row)
            *pairs, question = before.split(".")
            stated = [pair.split(" = ") for pair in pairs]
            keys = [key.strip() for key, _ in stated]
            assert len(set(keys)) == len(keys) >= 2
            place = keys.index(question.removesuffix(" =").strip())
            assert stated[place][1] == answer
            assert place == round(row.depth * (len(keys) - 1))
        # Almost as many as fit.
        assert len(rows[0].tokens) > 0.6 * length


def test_rows_depend_on_the_seed_alone(tokenizer, texts):
    make = lambda count, seed: ruler.multi_needle(tokenizer, texts, 300, count, seed, 1, 1)  # noqa: E731
    np.testing.assert_array_equal(make(3, 7)[2].tokens, make(5, 7)[2].tokens)
    assert not np.array_equal(make(1, 7)[0].tokens, make(1, 8)[0].tokens)


def test_what_does_not_fit_is_refused(texts):
    tokenizer = ByteTokenizer()
    store = OneDocument(tokenizer.encode(TEXT))
    with pytest.raises(UserError, match="length=40 are too short"):
        ruler.multi_needle(tokenizer, store, 40, 1, 0, 2, 2)
    with pytest.raises(UserError, match="70 needles and distractors are more than the 64 names"):
        ruler.multi_needle(tokenizer, store, 4000, 1, 0, 35, 35)
    with pytest.raises(UserError, match="90 variables are more"):
        ruler.variable_tracking(tokenizer, store, 4000, 1, 0, 2, 30)
    with pytest.raises(UserError, match="too short for two pairs"):
        ruler.key_value(tokenizer, 20, [0.5], 1, 0)
    with pytest.raises(UserError, match="between 0 and 1"):
        ruler.key_value(tokenizer, 200, [1.5], 1, 0)
