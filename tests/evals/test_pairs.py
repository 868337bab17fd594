"""Where a context ends and its continuation begins."""

import pytest

from llm_jax.data.tokenizer_json import train_bpe
from llm_jax.errors import UserError
from llm_jax.evals.pairs import encode_pair


@pytest.fixture(scope="module")
def tokenizer():
    """It has a token for the article with the space before it."""
    return train_bpe(["the cat and the dog and the cat\n" * 20], 300)


def test_a_pair_is_cut_out_of_one_text(tokenizer):
    bos, cat, the = [tokenizer.bos_id], tokenizer.encode("cat"), tokenizer.encode(" the")
    assert len(the) == 1
    assert encode_pair(tokenizer, "cat", " the") == ([*bos, *cat], the)
    assert encode_pair(tokenizer, "cat ", "the") == ([*bos, *cat], the)
    assert encode_pair(tokenizer, "cat\n ", "the")[1] == tokenizer.encode("cat\n the")[len(cat) :]
    assert encode_pair(tokenizer, "", " the") == (bos, the)
    assert encode_pair(tokenizer, "cat", " the", [7, 8]) == ([7, 8, *cat], the)
    assert encode_pair(tokenizer, "", " the", []) == (bos, the)


def test_a_continuation_without_a_token_of_its_own_is_refused(tokenizer):
    for context, continuation in (("th", "e"), ("cat", "")):
        with pytest.raises(UserError, match=f"'{continuation}' adds no token"):
            encode_pair(tokenizer, context, continuation)
