"""tools.evaluate: what is written, what stays of earlier calls, and what bad input gets."""

import functools
import json
import shutil

import pytest

from llm_jax.config import build
from llm_jax.data.tokenizer_base import ByteTokenizer
from llm_jax.evals.tasks import TASKS
from llm_jax.mesh import MeshConfig, describe_hardware, make_mesh
from llm_jax.trainers.grpo import GRPOConfig
from tools import evaluate
from tools.cli import run_tool
from tools.needle_map import accuracies

CONFIG = """
import ml_collections
from llm_jax.data.corpus import ComponentConfig
from llm_jax.evals.tasks import task_config

def get_config():
    return ml_collections.ConfigDict({"tasks": {
        "text": task_config(
            "perplexity", sources=(ComponentConfig(source="%(folder)s/text.txt"),), length=32
        ),
        "pairs": task_config("key_value", lengths=(60,), depths=2, per_cell=2),
        "choice": task_config("multiple_choice", source="%(folder)s/choice.jsonl"),
        "held_out": task_config("perplexity"),
    }})
"""


@pytest.fixture
def tool(tmp_path, capsys, save_run):
    """`tool(*arguments)`: exit status, the record, what stdout and stderr say."""
    (tmp_path / "text.txt").write_text("some text<|endoftext|>another one, a little longer")
    rows = [{"question": "a?", "choices": ["b", "c"], "answer": 0}] * 2
    (tmp_path / "choice.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "config.py").write_text(CONFIG % {"folder": tmp_path})
    save_run(tmp_path / "run", [3, 5])

    def call(*arguments, run="run"):
        overrides = [a for a in arguments if a.startswith("--config.")]
        rest = [a for a in arguments if a not in overrides]
        argv = ["evaluate", f"--workdir={tmp_path / run}", f"--config={tmp_path}/config.py", *rest]
        main = functools.partial(evaluate.main, overrides=overrides)
        status = run_tool(main, evaluate.define_flags(), "", argv)
        file = tmp_path / run.partition("@")[0] / evaluate.FILE
        record = json.loads(file.read_text()) if file.exists() else None
        return status, record, capsys.readouterr()

    return call


def test_a_record_has_figures_settings_and_rows(tool, tmp_path):
    status, record, said = tool("--tasks=text,pairs", "--config.tasks.pairs.settings.per_cell=3")
    assert status == 0, said.err
    assert (record["run"], record["step"], record["stage"]) == (
        str(tmp_path / "run"), 5, "pretrain",
    )  # fmt: skip
    assert record["tokenizer"] == ByteTokenizer().fingerprint and record["parameters"] > 5000
    assert record["hardware"] == describe_hardware(make_mesh(MeshConfig()))
    text, pairs = record["tasks"]["text"], record["tasks"]["pairs"]
    assert text["task"] == "perplexity" and text["settings"]["length"] == 32
    assert text["count"] == len(text["examples"]) == 2
    assert set(text["examples"][0]) == {"id", "tag", "nats", "tokens", "bytes"}
    assert text["metrics"]["bits_per_byte_stderr"] > 0 and text["seconds"] > 0
    assert pairs["count"] == 6 and set(accuracies(pairs)) == {(0.0, 60), (1.0, 60)}
    assert "bits_per_byte" in said.out and " ± " in said.out
    assert "accuracy_by_depth                  0.00: " in said.out


def test_tasks_of_the_same_checkpoint_stay_and_others_go(tool):
    tool("--tasks=text")
    _, record, _ = tool("--tasks=choice")
    assert list(record["tasks"]) == ["text", "choice"]
    _, record, _ = tool("--tasks=choice", "--config.tasks.choice.settings.rows=1")
    assert record["tasks"]["choice"]["count"] == 1 and "text" in record["tasks"]
    _, record, _ = tool("--tasks=choice", run="run@3")
    assert list(record["tasks"]) == ["choice"] and record["step"] == 3


def test_figures_of_a_run_that_was_made_anew_go(tool, tmp_path):
    tool("--tasks=text")
    (tmp_path / "run" / "config.json").write_text('{"seed": 1}')
    _, record, _ = tool("--tasks=choice")
    assert list(record["tasks"]) == ["choice"]


def test_a_task_that_fails_is_recorded_and_the_others_are_run(tool, monkeypatch):
    def make(settings, subject):
        def run(params):
            raise RuntimeError("the disk\nis gone")

        return run

    kind = TASKS["key_value"]
    monkeypatch.setitem(TASKS, "key_value", type(kind)(kind.settings, make))
    status, record, said = tool("--tasks=pairs,text")
    assert status == 1
    assert record["tasks"]["pairs"]["error"] == "RuntimeError: the disk is gone"
    assert record["tasks"]["pairs"]["task"] == "key_value"
    assert record["tasks"]["text"]["count"] == 2
    assert "pairs: failed: RuntimeError" in said.out


def test_bad_input_is_one_line_and_harms_nothing(tool, tmp_path):
    def refused(*arguments, **more):
        status, _, said = tool(*arguments, **more)
        assert status == 2 and said.err.count("\n") == 1
        return said.err

    assert "no task 'txt'. Did you mean 'text'?" in refused("--tasks=txt")
    assert "--tasks is required: one or more of choice, held_out, pairs, text" in refused()
    assert "has no held-out texts of its own" in refused("--tasks=text,held_out")
    assert "no key 'tasks.text.settings.lengt'. Did you mean" in refused(
        "--tasks=text", "--config.tasks.text.settings.lengt=3"
    )
    (tmp_path / "choice.jsonl").write_text('{"question": "a?", "choices": ["b", "c"]}\n')
    assert "choice.jsonl:1" in refused("--tasks=choice")
    assert "two tasks are called 'text'" in refused("--tasks=text,text")
    assert not (tmp_path / "run" / evaluate.FILE).exists()
    (tmp_path / "run" / evaluate.FILE).write_text("{}")
    assert "is no record of tools.evaluate" in refused("--tasks=text")
    assert "is no file in a folder" in refused("--tasks=text", "--output=nowhere/x.json")


def test_half_a_run_is_refused(tool, tmp_path):
    for name, missing in (("a", "config.json"), ("b", "checkpoints"), ("c", "tokenizer")):
        shutil.copytree(tmp_path / "run", tmp_path / name)
        path = tmp_path / name / missing
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        status, _, said = tool("--tasks=text", run=name)
        assert status == 2 and said.err.count("\n") == 1, said.err
    status, _, said = tool("--tasks=text", run="run@4")
    assert status == 2 and "has no checkpoint '4'; it has 3, 5" in said.err


def test_the_tasks_of_the_repository_can_be_read():
    terms = evaluate.read_tasks(evaluate.CONFIG, ["--config.tasks.gsm8k.settings.rows=5"])
    assert {"perplexity", "needle", "gsm8k", "mmlu", "ifeval", "win_rate"} <= set(terms)
    assert terms["gsm8k"].settings["rows"] == 5
    assert all(term.known_as == name for name, term in terms.items())
    settings = {
        name: build(TASKS[term.name].settings, term.settings) for name, term in terms.items()
    }
    # What GRPO trains on is what is measured.
    assert settings["addition"].data == GRPOConfig().data
    assert settings["addition"].rewards == GRPOConfig().rewards
