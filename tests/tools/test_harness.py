"""tools.harness: what is printed and written, and what bad input gets."""

import json
import sys

import pytest

from tools import harness
from tools.cli import run_tool

TASK = """
task: {name}
output_type: multiple_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/rows.jsonl}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""


@pytest.fixture
def tool(tmp_path, capsys, save_run):
    """`tool(*arguments)`: exit status, and what stdout and stderr say."""
    rows = [{"question": f"{i}?", "choices": ["b", "c"], "answer": i % 2} for i in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks").mkdir()
    for name in ("first", "second"):
        text = TASK.format(name=name, folder=tmp_path)
        (tmp_path / "tasks" / f"{name}.yaml").write_text(text)
    save_run(tmp_path / "run", [3])

    def call(*arguments):
        argv = ["harness", f"--workdir={tmp_path / 'run'}", *arguments]
        return run_tool(harness.main, harness.define_flags(), "", argv), capsys.readouterr()

    return call


def test_bad_flags_are_told_in_one_line(tool, tmp_path, monkeypatch):
    for arguments, message in [
        ((), "--tasks is required"),
        (("--tasks=a", "--include_path=nowhere"), "--include_path=nowhere is no folder"),
        (("--tasks=a", "--limit=0"), "--limit=0 must be above 0"),
        (("--tasks=a", "--num_fewshot=-1"), "--num_fewshot=-1"),
    ]:
        status, said = tool(*arguments)
        assert status == 2 and message in said.err and said.err.count("\n") == 1
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    status, said = tool("--tasks=a")
    assert status == 2 and "pip install 'llm_jax[eval]'" in said.err


@pytest.fixture
def evaluation_extra(monkeypatch, tmp_path):
    pytest.importorskip("lm_eval")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))


def test_a_table_is_printed_and_results_are_written(evaluation_extra, tool, tmp_path):
    status, said = tool("--tasks=first,second", f"--include_path={tmp_path / 'tasks'}")
    assert status == 0, said.err
    assert "|first |" in said.out and "|second|" in said.out and "|acc" in said.out
    [file] = (tmp_path / "run").glob("harness_*.json")
    record = json.loads(file.read_text())
    assert said.out.splitlines()[-1] == str(file)
    assert (record["run"], record["step"]) == (str(tmp_path / "run"), 3)
    assert record["config"]["fewshot_seed"] == 1234 and "samples" not in record
    assert 0 <= record["results"]["first"]["acc,none"] <= 1


def test_samples_limits_and_shots_are_taken(evaluation_extra, tool, tmp_path):
    output = tmp_path / "some.json"
    arguments = (f"--tasks={tmp_path}/tasks/first.yaml", f"--output={output}", "--samples")
    status, said = tool(*arguments, "--limit=3", "--num_fewshot=1")
    assert status == 0, said.err
    record = json.loads(output.read_text())
    samples = record["samples"]["first"]
    assert len(samples) == 3 and record["n-shot"]["first"] == 1
    assert samples[0]["arguments"][0][0].endswith("\n\n0?")
    output.write_text("[]")
    status, said = tool(*arguments)
    assert status == 2 and "no record of this tool" in said.err and output.read_text() == "[]"


@pytest.mark.slow  # reads the harness's thousands of task files
def test_an_unknown_task_gets_a_suggestion(evaluation_extra, tool):
    status, said = tool("--tasks=arc_eazy")
    assert status == 2 and "no task 'arc_eazy'. Did you mean 'arc_easy'?" in said.err
