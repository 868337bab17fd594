"""tools.score: what is scored, in which order, and what bad input gets."""

import json
import types

import jax
import numpy as np
import pytest

from llm_jax.data.tokenizer_base import ByteTokenizer
from llm_jax.errors import UserError
from llm_jax.models.heads import REWARD
from tools import score
from tools.cli import run_tool

BYTES = ByteTokenizer()
BOS, USER, ASSISTANT, END = (
    BYTES.special_ids[name] for name in ("bos", "user", "assistant", "end_of_turn")
)


@pytest.fixture
def tool(tmp_path, capsys):
    """`tool(run, rows, *arguments)`: exit status, what was written, what stderr says."""

    def call(run, rows, *arguments):
        (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        files = [f"--input={tmp_path / 'in.jsonl'}", f"--output={tmp_path / 'out.jsonl'}"]
        argv = ["score", f"--workdir={run}", *files, *arguments]
        status = run_tool(score.main, score.define_flags(), "", argv)
        output = tmp_path / "out.jsonl"
        lines = output.read_text().splitlines() if output.exists() else []
        return status, [json.loads(line) for line in lines], capsys.readouterr().err

    return call


@pytest.fixture
def logprobs(tiny_model, random_params):
    """`logprobs(ids)`: log p of each token but the first, by a plain forward pass."""

    params = jax.tree.map(jax.numpy.asarray, random_params(3))

    def compute(ids):
        hidden, _ = tiny_model.apply(params, np.array([ids], np.int32))
        values = jax.nn.log_softmax(tiny_model.logits(params, hidden))[0]
        return np.array([values[i, t] for i, t in enumerate(ids[1:])])

    return compute


def check(row, tokens, expected):
    assert row["tokens"] == tokens
    np.testing.assert_allclose(row["logprobs"], expected, atol=1e-4)
    assert row["sum"] == pytest.approx(sum(row["logprobs"]))


def test_texts_and_tokens_are_scored_in_their_order(tmp_path, save_run, tool, logprobs):
    run = save_run(tmp_path / "run", [3])
    texts = ["a", "a longer one, of forty-one bytes or more", "b c"]
    rows = [{"text": text} for text in texts] + [{"tokens": [70, 71, 72]}]
    status, found, _ = tool(run, rows, "--batch=2")
    assert status == 0 and len(found) == 4
    for text, row in zip(texts, found[:3], strict=True):
        ids = BYTES.encode(text)
        check(row, ids, logprobs([BOS, *ids]))
    check(found[3], [71, 72], logprobs([70, 71, 72]))


def test_an_exchange_is_plain_text_without_a_template(tmp_path, save_run, tool, logprobs):
    run = save_run(tmp_path / "run", [3])
    _, (row,), _ = tool(run, [{"prompt": "ab", "completion": "cd"}])
    check(row, BYTES.encode("cd"), logprobs([BOS, *BYTES.encode("abcd")])[-2:])
    status, _, error = tool(run, [{"messages": [{"role": "user", "content": "Hi"}]}])
    assert status == 2 and "has no chat template" in error


def test_an_exchange_is_a_turn_of_each_with_one(tmp_path, save_run, tool, logprobs):
    run = save_run(tmp_path / "run", [3], template={"name": "chatml"})
    messages = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]
    _, found, _ = tool(run, [{"prompt": "ab", "completion": "cd"}, {"messages": messages}])
    ids = [BOS, USER, *BYTES.encode("ab"), END, ASSISTANT, *BYTES.encode("cd"), END]
    for row in found:
        check(row, [*BYTES.encode("cd"), END], logprobs(ids)[-3:])


def test_without_bos_the_first_token_of_a_text_is_context():
    tokenizer = ByteTokenizer()
    tokenizer.document_start = ()
    model = types.SimpleNamespace(config=types.SimpleNamespace(vocab_size=320, max_length=64))
    run = types.SimpleNamespace(tokenizer=tokenizer, model=model, meta={})
    whole = score.encode(run, {"text": "abc"}, "here")
    assert (whole.tokens, whole.scored) == ([97, 98, 99], [False, True, True])
    rest = score.encode(run, {"prompt": "a", "completion": "bc"}, "here")
    assert (rest.tokens, rest.scored) == ([97, 98, 99], [False, True, True])
    alone = score.encode(run, {"prompt": "", "completion": "bc"}, "here")
    assert (alone.tokens, alone.scored) == ([BOS, 98, 99], [False, True, True])
    with pytest.raises(UserError, match="here: 1 tokens, and the model reads 2"):
        score.encode(run, {"text": "a"}, "here")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"txt": "a"}, "the row has the fields txt; text, tokens, messages"),
        ({"text": 3}, "'text' is no string"),
        ({"text": "\ud800"}, "'text' is not Unicode text"),
        ({"text": ""}, "1 tokens, and the model reads 2 to 64"),
        ({"text": "x" * 64}, "65 tokens, and the model reads 2 to 64"),
        ({"tokens": [1, "2"]}, "'tokens' is no list of whole numbers"),
        ({"tokens": [1, 320]}, "outside the vocabulary of 320"),
        ([1], "an object with fields is wanted"),
        ({"prompt": "a", "completion": ""}, "empty"),
    ],
)
def test_a_bad_row_is_one_line_with_its_place(tmp_path, save_run, tool, row, message):
    run = save_run(tmp_path / "run", [3], template={"name": "chatml"})
    status, found, error = tool(run, [{"text": "good"}, row])
    assert status == 2 and not found
    assert "in.jsonl:2: " in error and message in error and error.count("\n") == 1


def test_a_reward_model_gives_one_number_a_row(tmp_path, save_run, tool, tiny_model):
    run = save_run(tmp_path / "run", [3], heads=[REWARD], head=True)
    rows = [{"text": "ab"}, {"text": "abc"}, {"tokens": [BOS, 97, 98]}]
    status, found, error = tool(run, rows)
    assert status == 0, error
    assert [set(row) for row in found] == [{"reward"}] * 3
    assert found[0] == found[2] != found[1]


def test_input_that_is_not_utf8_is_one_line(tmp_path, save_run, tool):
    run = save_run(tmp_path / "run", [3])
    (tmp_path / "other.jsonl").write_bytes(b'{"text": "\xff"}\n')
    status, _, error = tool(run, [], f"--input={tmp_path / 'other.jsonl'}")
    assert status == 2 and "other.jsonl:1: the line is not JSON" in error


def test_missing_files_and_flags_are_refused(tmp_path, save_run, tool):
    run = save_run(tmp_path / "run", [3])
    assert "--input=nowhere does not exist" in tool(run, [], "--input=nowhere")[2]
    assert "--output is required" in tool(run, [], "--output=")[2]
    assert "--batch=0 must be" in tool(run, [], "--batch=0")[2]
    assert "cannot be written" in tool(run, [{"text": "a"}], "--output=/proc/nowhere/x")[2]
