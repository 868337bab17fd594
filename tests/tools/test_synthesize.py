"""tools.synthesize: its files, its lineage, and what bad input gets."""

import dataclasses
import json

import pytest

from llm_jax.config import resolved
from llm_jax.data.formats import read_examples
from llm_jax.data.sources import SourceConfig
from llm_jax.data.templates import TEMPLATES
from llm_jax.models.heads import REWARD
from llm_jax.synthesis import magpie
from tools import synthesize
from tools.cli import run_tool


@pytest.fixture(scope="module")
def save_chat(save_run, tiny_model, tmp_path_factory):
    """`save_chat(**meta)`: a run that reads 256 tokens."""

    def save(**meta):
        model = resolved(dataclasses.replace(tiny_model.config, max_length=256))
        folder = tmp_path_factory.mktemp("runs") / "run"
        return save_run(folder, (5,), template=TEMPLATES["chatml"].describe(), model=model, **meta)

    return save


@pytest.fixture(scope="module")
def chat_run(save_chat):
    return save_chat(stage="sft")


@pytest.fixture(scope="module")
def reward_run(save_chat):
    return save_chat(stage="reward", heads=[REWARD], head=True)


@pytest.fixture
def tool(tmp_path, capsys, chat_run, monkeypatch):
    """`tool(*arguments)`: exit status, the rows, the lineage, and stderr. The random bytes of the
    model, hot enough to end some turns, pass for text."""
    monkeypatch.setattr(magpie, "is_garbled", lambda text: False)

    def call(*arguments, output="out.jsonl"):
        output = tmp_path / output
        argv = ["synthesize", f"--workdir={chat_run}", f"--output={output}", "--rows=6",
                "--temperature=50", "--answer_temperature=50", "--max_instruction_tokens=100",
                "--max_new_tokens=100", *arguments]  # fmt: skip
        status = run_tool(synthesize.main, synthesize.define_flags(), "", argv)
        lines = output.read_text().splitlines() if output.exists() else []
        record = output.with_name(f"{output.name}.lineage")
        lineage = json.loads(record.read_text()) if record.exists() else None
        return status, [json.loads(line) for line in lines], lineage, capsys.readouterr().err

    return call


def test_a_run_talks_to_itself(tool, tmp_path, chat_run):
    status, rows, lineage, err = tool("--seed=2")
    assert status == 0 and len(rows) == 6, err
    examples = list(read_examples(SourceConfig(source=str(tmp_path))))  # without the lineage
    assert [example.messages[1].content for example in examples] == [
        row["messages"][1]["content"] for row in rows
    ]
    assert lineage["policy"]["run"] == f"{chat_run}@5" and lineage["rows"] == 6
    assert lineage["settings"]["seed"] == 2 and "reward" not in lineage["settings"]
    assert "6 rows; dropped: " in err and "instruction unfinished" in err
    assert tool("--seed=2", "--batch=3", output="again.jsonl")[1] == rows


def test_answers_with_a_low_reward_are_dropped(tool, reward_run):
    status, rows, lineage, err = tool(f"--reward={reward_run}")
    assert status == 0 and len(rows) == 6, err
    assert lineage["settings"]["reward"] == str(reward_run)
    lowest, *_, middle, _, _ = sorted(row["reward"] for row in rows)
    assert lowest < middle
    arguments = [f"--reward={reward_run}", f"--min_reward={middle}"]
    _, kept, lineage, _ = tool(*arguments, output="best.jsonl")
    assert all(row["reward"] >= middle for row in kept)
    assert lineage["dropped"]["reward low"] >= 1


def test_fewer_rows_where_attempts_end(tool):
    status, rows, lineage, err = tool("--attempts=1")
    assert status == 0 and 0 < len(rows) < 6
    assert len(rows) + sum(lineage["dropped"].values()) == 6
    assert "6 instructions were sampled" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workdir="], "--workdir is required"),
        (["--rows=0"], "--rows=0 must be at least 1"),
        (["--min_reward=1"], "--min_reward needs a model"),
        (["--top_p=2"], "top_p=2.0"),
        (["--similarity=2"], "similarity=2.0"),
        (["--max_new_tokens=256"], "choose another --max_new_tokens"),
        (["--max_instruction_tokens=255"], "256"),
        (["--min_answer_tokens=1000"], "no row is left"),
        (["--output=/proc/nowhere/x"], "there is no folder"),
    ],
)
def test_bad_input_is_one_line(tool, arguments, message):
    status, rows, lineage, err = tool(*arguments)
    assert status == 2 and not rows and lineage is None
    assert message in err and "Traceback" not in err


def test_a_reward_needs_a_reward_model(tool, chat_run):
    status, _, _, err = tool(f"--reward={chat_run}")
    assert status == 2 and "is no reward model" in err
