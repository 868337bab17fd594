"""tools.feedback: its files, its lineage, and what bad input gets."""

import dataclasses
import json

import pytest

from llm_jax.config import resolved
from llm_jax.data.formats import read_examples
from llm_jax.data.sources import SourceConfig
from llm_jax.data.templates import TEMPLATES
from llm_jax.synthesis.constitution import DEFAULT, load_constitution
from tools import feedback
from tools.cli import run_tool

CONSTITUTION = """
[[principles]]
name = "kind"
critique = "Kind?"
revision = "Be kind."
choice = "Choose the kinder."
"""


@pytest.fixture(scope="module")
def chat_run(save_run, tiny_model, tmp_path_factory):
    """A run that reads 1,024 tokens."""
    model = resolved(dataclasses.replace(tiny_model.config, max_length=1024))
    folder = tmp_path_factory.mktemp("runs") / "chat"
    template = TEMPLATES["chatml"].describe()
    return save_run(folder, (5,), stage="sft", template=template, model=model)


@pytest.fixture
def tool(tmp_path, capsys, chat_run):
    """`tool(*arguments, prompts=...)`: exit status, the rows, the lineage, and stderr. The policy
    is hot enough to end some answers."""

    def call(*arguments, prompts=12, output="out.jsonl"):
        rows = [{"prompt": f"What is {i}?"} for i in range(prompts)]
        (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / "c.toml").write_text(CONSTITUTION)
        (tmp_path / "made").mkdir(exist_ok=True)
        output = tmp_path / "made" / output
        argv = ["feedback", f"--policy={chat_run}", f"--prompts={tmp_path / 'in.jsonl'}",
                f"--output={output}", f"--constitution={tmp_path / 'c.toml'}", "--temperature=50",
                "--max_new_tokens=200", *arguments]  # fmt: skip
        status = run_tool(feedback.main, feedback.define_flags(), "", argv)
        lines = output.read_text().splitlines() if output.exists() else []
        record = output.with_name(f"{output.name}.lineage")
        lineage = json.loads(record.read_text()) if record.exists() else None
        return status, [json.loads(line) for line in lines], lineage, capsys.readouterr().err

    return call


def test_a_run_compares_its_own_answers(tool, tmp_path, chat_run):
    status, rows, lineage, err = tool("--mode=compare", "--seed=3")
    assert status == 0 and rows, err
    assert len(rows) + sum(lineage["dropped"].values()) == 12
    assert all(0.5 < row["probability"] <= 1 and row["principle"] == "kind" for row in rows)
    (pair, *_) = read_examples(SourceConfig(source=str(tmp_path / "made" / "out.jsonl")))
    assert pair.responses[0][0].content == rows[0]["chosen"]
    assert lineage["policy"]["run"] == lineage["judge"]["run"] == f"{chat_run}@5"
    assert lineage["policy"]["stages"][-1]["stage"] == "sft"
    digest = load_constitution(tmp_path / "c.toml").digest
    assert lineage["constitution"]["digest"] == digest != load_constitution(DEFAULT).digest
    assert lineage["settings"]["seed"] == 3 and lineage["rows"] == len(rows)
    assert "the same letter in both orders" in err and f"{len(rows)} rows" in err
    again = tool("--mode=compare", "--seed=3", "--batch=5", output="again.jsonl")[1]
    # In other batches probabilities are rounded otherwise.
    odds = [[row.pop("probability") for row in made] for made in (rows, again)]
    assert again == rows and odds[0] == pytest.approx(odds[1], abs=1e-5)
    other = tool("--mode=compare", "--seed=4", output="other.jsonl")[1]
    assert [row["chosen"] for row in rows] != [row["chosen"] for row in other]


def test_a_run_revises_its_own_answers(tool, tmp_path):
    status, rows, _, err = tool("--mode=revise", "--judge_temperature=50", "--rounds=2")
    assert status == 0 and rows, err
    assert all(len(row["revisions"]) == 2 for row in rows)
    examples = list(
        read_examples(SourceConfig(source=str(tmp_path / "made")))
    )  # without the lineage
    assert len(examples) == len(rows)


def test_an_endpoint_judges(tool, endpoint):
    endpoint.says = lambda body: "A"  # whatever stands there
    arguments = [f"--judge={endpoint.url}", "--judge_model=m"]
    status, rows, lineage, err = tool("--mode=revise", *arguments)
    assert status == 0 and rows, err
    assert {row["messages"][-1]["content"] for row in rows} == {"A"}
    assert lineage["judge"] == {"endpoint": endpoint.url, "model": "m"}
    status, rows, lineage, err = tool("--mode=compare", *arguments, output="pairs.jsonl")
    assert status == 2 and lineage is None and not rows
    assert "no row is left" in err and "tie" in err


def test_rows_are_the_first_so_many_prompts(tool):
    _, rows, lineage, _ = tool("--mode=compare", "--rows=5")
    assert len(rows) + sum(lineage["dropped"].values()) == 5


def test_texts_to_continue_and_tools_are_left_out(tool, tmp_path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [
        {"messages": turns},
        {"messages": turns[1:]},
        {"messages": turns, "tools": [{"name": "t"}]},
    ]
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 6))
    _, _, lineage, err = tool("--mode=compare", f"--prompts={tmp_path / 'mixed.jsonl'}")
    assert lineage["dropped"]["without a prompt"] == 6 == lineage["dropped"]["with tools"], err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policy="], "--policy is required"),
        (["--mode=judge"], "mode"),
        (["--rounds=0"], "--rounds=0 must be at least 1"),
        (["--seed=-1"], "--seed=-1 must not be negative"),
        (["--timeout=0"], "--timeout=0.0 must be above 0"),
        (["--policy=nowhere"], "nowhere"),
        (["--prompts=nowhere.jsonl"], "does not exist"),
        (["--constitution=nowhere.toml"], "nowhere.toml cannot be read"),
        (["--judge=http://127.0.0.1:1/v1"], "say which one"),
        (["--output=nowhere/out.jsonl"], "there is no folder 'nowhere'"),
        (["--max_new_tokens=1024"], "choose another --max_new_tokens"),
        (["--max_failures=0", "--max_new_tokens=1010"], "1 prompts have failed"),
    ],
)
def test_bad_input_is_one_line(tool, arguments, message):
    status, rows, lineage, err = tool("--mode=compare", *arguments)
    assert status == 2 and not rows and lineage is None
    assert message in err and "Traceback" not in err


def test_no_file_is_overwritten(tool, tmp_path):
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "out.jsonl").write_text('{"precious": 1}\n')
    status, rows, _, err = tool("--mode=compare")
    assert status == 2 and rows == [{"precious": 1}] and "is there already" in err


def test_a_pretrained_run_has_no_answers(tool, save_run, tmp_path):
    run = save_run(tmp_path / "plain", (3,))
    status, _, _, err = tool("--mode=compare", f"--policy={run}")
    assert status == 2 and "without a chat template" in err
