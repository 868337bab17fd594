"""Comparing runs: closed forms of examples in pairs, tokenizers, seeds, and what is refused."""

import json

import numpy as np
import pytest

from llm_jax.config import resolved
from llm_jax.data.tokenizers import TokenizerConfig, make_tokenizer
from tools.cli import run_tool
from tools.compare.__main__ import define_flags, main

LN_2 = np.log(2)


def compare(*arguments):
    return run_tool(main, define_flags(), "", ["compare", *map(str, arguments)], True)


@pytest.fixture
def write_run(tmp_path):
    """`write_run(name, tasks, tokenizer, **config)`: a run that was evaluated."""

    def write(name, tasks, tokenizer="t", **config):
        folder = tmp_path / name
        (folder / "checkpoints" / "4" / "meta").mkdir(parents=True)
        (folder / "checkpoints" / "4" / "meta" / "metadata").write_text('{"lineage": []}')
        (folder / "config.json").write_text(json.dumps({"trainer": "dpo", "seed": 0, **config}))
        tasks = {
            label: {"task": label, "settings": {}, "metrics": {}, "examples": examples}
            for label, examples in tasks.items()
        }
        record = {
            "run": str(folder), "step": 4, "config": "c", "tokenizer": tokenizer, "seconds": 1.0,
            "tasks": tasks,
        }  # fmt: skip
        (folder / "evaluation.json").write_text(json.dumps(record))
        losses = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in losses))
        return folder

    return write


def documents(bits, sizes=None):
    sizes = np.full(len(bits), 100) if sizes is None else sizes
    return [
        {"id": f"d{i}", "nats": float(b * n * LN_2), "bytes": int(n), "tokens": 30}
        for i, (b, n) in enumerate(zip(bits, sizes, strict=True))
    ]


def found_by(output, task, key):
    record = json.loads(output.read_text())
    (one,) = [c for c in record["comparisons"] if (c["task"], c["key"]) == (task, key)]
    return one, record


def test_examples_are_paired_by_their_ids(write_run, tmp_path, capsys):
    rng = np.random.default_rng(0)
    difficulty = rng.normal(2, 0.5, 300)
    a, b = difficulty + rng.normal(-0.02, 0.1, 300), difficulty + rng.normal(0, 0.1, 300)
    right = rng.random((2, 300)) < [[0.6], [0.5]]
    first, second = (
        {"text": documents(x), "sums": [{"id": i, "correct": bool(r)} for i, r in enumerate(rs)]}
        for x, rs in zip((a, b), right, strict=True)
    )
    second["text"].reverse()  # their order is of no matter
    second["other"] = documents(b)  # a task of one run alone
    runs = write_run("a", first, beta=0.1), write_run("b", second, beta=0.2)
    output, plot = tmp_path / "c.json", tmp_path / "c.png"
    assert compare(*runs, f"--output={output}", f"--plot={plot}") == 0
    one, record = found_by(output, "text", "bits_per_byte")
    stderr = np.std(a - b, ddof=1) / np.sqrt(300)
    assert one["difference"] == pytest.approx(np.mean(a - b))
    assert one["high"] - one["low"] == pytest.approx(2 * 1.96 * stderr, rel=0.06)
    assert one["value_a"] == pytest.approx(a.mean()) and one["units"] == 300
    accuracy, _ = found_by(output, "sums", "accuracy")
    assert accuracy["difference"] == pytest.approx(right[0].mean() - right[1].mean())
    # More is better of an accuracy, less of bits per byte.
    assert one["probability_a_better"] > 0.9 and accuracy["probability_a_better"] > 0.9
    assert record["differences"] == {"beta": {"a": 0.1, "b": 0.2}}
    assert {c["task"] for c in record["comparisons"]} == {"text", "sums"}
    assert plot.read_bytes()[:4] == b"\x89PNG"
    printed = capsys.readouterr().out
    assert "text bits_per_byte" in printed and f"{one['units']}" in printed
    assert "note: a is one seed: the noise of seeds is unknown" in printed


def test_runs_of_different_tokenizers_are_compared_in_bits_per_byte_alone(
    write_run, tmp_path, capsys
):
    rows = {"text": documents([2.0, 2.1, 1.9]), "sums": [{"id": 0, "correct": True}]}
    runs = write_run("a", rows), write_run("b", rows, tokenizer="other", seed=1, x=1)
    output = tmp_path / "c.json"
    assert compare(*runs, f"--output={output}") == 0
    assert "different tokenizers: only bits per byte can be compared" in capsys.readouterr().out
    record = json.loads(output.read_text())
    assert [c["key"] for c in record["comparisons"]] == ["bits_per_byte"]


def test_documents_that_only_some_have_are_left_out_and_counted(write_run, tmp_path, capsys):
    sizes = np.array([100, 100, 100, 100])
    first, second = documents([2.0, 2.0, 2.0, 9.0], sizes), documents([1.0, 2.0, 3.0, 5.0], sizes)
    second[3]["id"] = "another"
    second[2]["bytes"] = 90  # the same text, but not all of it was read
    runs = write_run("a", {"text": first}), write_run("b", {"text": second}, x=1)
    output = tmp_path / "c.json"
    assert compare(*runs, f"--output={output}") == 0
    one, _ = found_by(output, "text", "bits_per_byte")
    assert (one["units"], one["difference"]) == (2, pytest.approx(0.5))
    assert "text bits_per_byte: 2 of 4 units are the same for all runs" in capsys.readouterr().out


def test_parts_of_a_task_are_compared_apart(write_run, tmp_path):
    first, second = documents([2.0, 2.0, 4.0]), documents([1.0, 3.0, 1.0])
    for rows in (first, second):
        for row, tag in zip(rows, ("web", "web", "code"), strict=True):
            row["tag"] = tag
    runs = write_run("a", {"text": first}), write_run("b", {"text": second}, x=1)
    output = tmp_path / "c.json"
    assert compare(*runs, f"--output={output}") == 0
    for key, difference in (("", 1.0), ("web/", 0.0), ("code/", 3.0)):
        one, _ = found_by(output, "text", f"{key}bits_per_byte")
        assert one["difference"] == pytest.approx(difference) and one["lower_is_better"]


def test_what_is_hidden_in_other_texts_is_another_example(write_run, capsys):
    rows = {"text": documents([1.0, 2.0]), "needle": [{"id": "64/0", "correct": True}]}
    runs = write_run("a", rows), write_run("b", rows, x=1)
    for run in runs:
        record = json.loads((run / "evaluation.json").read_text())
        record["tasks"]["needle"]["settings"] = {"source": None}
        (run / "evaluation.json").write_text(json.dumps(record))
    assert compare(*runs) == 0
    printed = capsys.readouterr().out
    assert "the task needle reads what each run held out" in printed and "accuracy" not in printed
    for run in runs:
        (run / "result.json").write_text('{"hashes": {"data": "the same"}}')
    assert compare(*runs) == 0
    assert "needle accuracy" in capsys.readouterr().out


def test_runs_that_differ_in_their_seeds_are_one_model(write_run, tmp_path, capsys):
    runs = [
        write_run(f"{name}_{seed}", {"text": documents(np.full(20, level + 0.1 * seed))},
                  seed=seed, model=name)
        for name, level in (("low", 1.0), ("high", 2.0))
        for seed in range(3)
    ]  # fmt: skip
    output = tmp_path / "c.json"
    assert compare(*runs, f"--output={output}") == 0
    one, record = found_by(output, "text", "bits_per_byte")
    assert list(record["models"]) == ["low_{0,1,2}", "high_{0,1,2}"]
    assert record["differences"] == {"model": {"low_{0,1,2}": "low", "high_{0,1,2}": "high"}}
    assert one["difference"] == pytest.approx(-1.0)
    # Of two models with the standard error 0.1 / √3 each; Welch gives 4 degrees of freedom.
    assert one["stderr"] == pytest.approx(0.1 * np.sqrt(2 / 3), rel=0.05)
    assert one["high"] == pytest.approx(-1 + 2.776 * one["stderr"], rel=0.01)
    assert "one seed" not in capsys.readouterr().out

    assert compare(*runs[:2]) == 0  # nothing but noise
    printed = capsys.readouterr().out
    assert "differ in their seeds alone: what differs is noise of seeds" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["A"], "two runs or more"),
        (["A", "A"], "named twice"),
        (["A", "nowhere"], "nowhere is no run directory"),
        (["A", "A@7"], "has no checkpoint '7'"),
        (["A", "B", "--output=missing/c.json"], "cannot be written"),
        (["A", "BAD"], "is no record of tools.evaluate"),
    ],
)
def test_bad_input_is_one_line(write_run, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    rows = {"text": documents([1.0, 2.0])}
    for name in ("A", "B", "BAD"):
        write_run(name, rows, x=name)
    (tmp_path / "BAD" / "evaluation.json").write_text("{}")
    assert compare(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


# --- held-out documents ---------------------------------------------------------------------------


@pytest.fixture
def untrained(save_run, tiny_config, corpus, tmp_path):
    """`untrained(name, tokenizer, source)`: a run with random weights that held documents out."""

    def make(name, step, tokenizer="bytes", source=None):
        run = save_run(tmp_path / name, [step], length=32)
        config = resolved(tiny_config())
        config["data"]["source"] = str(source or corpus)
        config["name"] = name
        (run / "config.json").write_text(
            json.dumps({k: v for k, v in config.items() if k != "name"})
        )
        if tokenizer != "bytes":
            texts = [corpus.read_text()]
            made = make_tokenizer(TokenizerConfig(vocab_size=300), lambda: texts)
            made.save(run / "tokenizer")
        return run

    return make


def test_runs_without_evaluations_are_measured_on_what_they_held_out(
    untrained, other_corpus, tmp_path, capsys
):
    first, second = untrained("a", 1), untrained("b", 2)
    # of another checkpoint
    other = dict.fromkeys(("run", "config", "tokenizer", "seconds"), "") | {"step": 9, "tasks": {}}
    (first / "evaluation.json").write_text(json.dumps(other))
    output = tmp_path / "c.json"
    assert compare(first, second, f"--output={output}", "--documents=4") == 0
    one, record = found_by(output, "perplexity", "bits_per_byte")
    assert one["units"] == 4 and one["low"] < one["difference"] < one["high"]
    assert {c["key"] for c in record["comparisons"]} == {"bits_per_byte", "loss"}
    printed = capsys.readouterr().out
    assert "held-out documents are read in windows of at most 32 tokens" in printed
    assert "evaluation.json is of checkpoint 9, not 1: it is left out" in printed
    # The same documents in other tokens.
    third = untrained("c", 3, "bpe")
    assert compare(first, third, f"--output={output}", "--documents=4") == 0
    one, record = found_by(output, "perplexity", "bits_per_byte")
    assert one["units"] == 4 and [c["key"] for c in record["comparisons"]] == ["bits_per_byte"]
    assert "different tokenizers" in capsys.readouterr().out
    sums = untrained("e", 4)
    (sums / "config.json").write_text('{"trainer": "grpo", "seed": 0}')
    assert compare(first, sums) == 2
    error = capsys.readouterr().err
    assert "has no held-out texts" in error and "measure all of them by tools.evaluate" in error
    assert compare(first, untrained("d", 4, source=other_corpus)) == 2
    assert "the runs have no document or example in common" in capsys.readouterr().err
