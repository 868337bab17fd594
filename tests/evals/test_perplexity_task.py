"""The perplexity of whole documents: every token once, by windows, by tag, and in closed form."""

import dataclasses

import numpy as np
import pytest

from llm_jax.data.corpus import ComponentConfig
from llm_jax.errors import UserError
from llm_jax.evals.perplexity import PerplexityConfig, perplexity_task

TEXTS = ("It was a bright cold day in April, and the clocks struck. " * 3, "Wörter, 世界", "no")


@pytest.fixture(scope="module")
def told(plain_subject, texts_of):
    held_out = {"text": texts_of(*TEXTS), "other": texts_of("a second component")}
    return dataclasses.replace(plain_subject, held_out=lambda: held_out)


def test_a_uniform_model_has_closed_forms(told, uniform):
    result = perplexity_task(PerplexityConfig(length=32), told)(uniform)
    sizes = [len(text.encode()) for text in (*TEXTS, "a second component")]
    assert [row["bytes"] for row in result.examples] == sizes
    assert [row["tokens"] for row in result.examples] == sizes
    nats = np.log(320)
    assert result.metrics["loss"] == pytest.approx(nats, rel=1e-5)
    assert result.metrics["loss_stderr"] == pytest.approx(0, abs=1e-5)
    assert result.metrics["byte_perplexity"] == pytest.approx(320, rel=1e-4)
    assert result.metrics["other/bits_per_byte"] == pytest.approx(np.log2(320), rel=1e-5)
    words = sum(len(text.split()) for text in (*TEXTS, "a second component"))
    expected = np.exp(nats * sum(sizes) / words)
    assert result.metrics["word_perplexity"] == pytest.approx(expected, rel=1e-3)
    assert {row["tag"] for row in result.examples} == {"text", "other"}
    assert len({row["id"] for row in result.examples}) == 4


def test_each_token_is_read_once_with_as_much_context_as_the_stride_leaves(
    told, params, texts_of, all_logprobs
):
    tokens = texts_of(TEXTS[0]).tokens
    for length, stride in ((32, None), (32, 8), (250, None)):
        config = PerplexityConfig(length=length, stride=stride)
        row = perplexity_task(config, told)(params).examples[0]
        begin, known, total = 0, 1, 0.0
        while known < len(tokens):
            window = tokens[begin : begin + length + 1]
            logprobs = all_logprobs(window)
            for place in range(known, begin + len(window)):
                if tokens[place] < 256:
                    total -= logprobs[place - begin - 1, tokens[place]]
            known, begin = begin + len(window), begin + (stride or length)
        assert row["tokens"] == len(tokens) - 2
        assert row["nats"] == pytest.approx(total, rel=1e-5)


def test_only_what_is_trained_on_counts(told, params, texts_of):
    whole = texts_of("question: answer", "b: c")
    trained = np.zeros(len(whole.tokens), np.uint8)
    trained[11:17] = 1
    store = dataclasses.replace(whole, trained=trained)
    subject = dataclasses.replace(told, held_out=lambda: {"chat": store})
    (row,) = perplexity_task(PerplexityConfig(), subject)(params).examples
    assert (row["tokens"], row["bytes"]) == (6, 6)


def test_a_document_has_one_id_in_every_source(told, uniform, tmp_path):
    (tmp_path / "a.txt").write_text("one<|endoftext|>two")
    (tmp_path / "b.txt").write_text("two<|endoftext|>three<|endoftext|>two")
    ids = []
    for name in "ab":
        source = ComponentConfig(source=str(tmp_path / f"{name}.txt"), name="text")
        made = perplexity_task(PerplexityConfig(sources=(source,)), told)
        ids.append([row["id"] for row in made(uniform).examples])
    assert ids[0][1] == ids[1][0] and ids[1][2] == f"{ids[1][0]}-2"
    assert len({*ids[0], *ids[1]}) == 4


def test_runs_that_held_out_some_of_the_same_documents_read_the_same_ones(told, uniform, texts_of):
    words = [f"document {number}" for number in range(40)]
    ids = []
    for texts, most in ((words, 40), (words, 8), (words[5:30], 8)):
        subject = dataclasses.replace(told, held_out=lambda texts=texts: {"text": texts_of(*texts)})
        made = perplexity_task(PerplexityConfig(documents=most), subject)
        ids.append([row["id"] for row in made(uniform).examples])
    every, more, fewer = ids
    assert len(more) == len(fewer) == 8 and more == [id for id in every if id in more]
    # Whatever the larger collection reads of the smaller one, the smaller one reads, too.
    assert {*more} & {*every[5:30]} == {*more} & {*fewer} and len({*more} & {*fewer}) > 2


def test_bad_input_is_told(told, plain_subject, tmp_path):
    with pytest.raises(UserError, match="name a source in the settings"):
        perplexity_task(PerplexityConfig(), plain_subject)
    with pytest.raises(UserError, match="length=500 with stride=500"):
        perplexity_task(PerplexityConfig(length=500), told)
    with pytest.raises(UserError, match="documents=0"):
        PerplexityConfig(documents=0)
    missing = ComponentConfig(source=str(tmp_path / "nowhere.txt"))
    with pytest.raises(UserError, match="does not exist"):
        perplexity_task(PerplexityConfig(sources=(missing,)), told)
    (tmp_path / "a.txt").write_text("some text")
    twice = (ComponentConfig(source=str(tmp_path / "a.txt")),) * 2
    with pytest.raises(UserError, match="two sources are called 'a'"):
        perplexity_task(PerplexityConfig(sources=twice, documents=1), told)
