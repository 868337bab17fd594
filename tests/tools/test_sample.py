"""tools.sample: data sets of a run's own answers, and what bad input gets."""

import json

import pytest

from llm_jax.data.formats import read_examples
from llm_jax.data.sources import SourceConfig
from llm_jax.data.templates import TEMPLATES
from tools import sample
from tools.cli import run_tool

LETTERS = "--rewards=letter_reward:letters"


@pytest.fixture(scope="module")
def chat_run(save_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "chat"
    return save_run(folder, (3, 5), stage="sft", template=TEMPLATES["chatml"].describe())


@pytest.fixture(autouse=True)
def rewards(tmp_path, monkeypatch):
    source = (
        "def letters(prompt, completion, row, times=1):\n"
        "    return times * sum(letter.isalpha() for letter in completion)\n"
    )
    (tmp_path / "letter_reward.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.fixture
def tool(chat_run, tmp_path, capsys):
    """`tool(*arguments, output=...)`: exit status, stdout, stderr, folder."""
    data = tmp_path / "questions.jsonl"
    rows = [{"prompt": f"{i}?", "completion": "x", "level": i} for i in range(12)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def call(*arguments, output="made", workdir=chat_run):
        status = run_tool(
            sample.main,
            sample.define_flags(),
            "",
            ["sample", f"--workdir={workdir}", f"--data={data}", "--max_new_tokens=12",
             "--validation_fraction=0.2", "--samples=4", f"--output={tmp_path / output}",
             *arguments],
        )  # fmt: skip
        captured = capsys.readouterr()
        return status, captured.out, captured.err, tmp_path / output

    return call


def rows_of(folder, name):
    return [json.loads(line) for f in sorted((folder / name).iterdir()) for line in f.open()]


def test_the_best_answers_and_pairs_are_written(tool, chat_run, monkeypatch):
    monkeypatch.setattr(sample, "ROUND", 3)
    status, out, err, folder = tool(LETTERS, "--keep=2", "--seed=3", "--temperature=0.9")
    assert status == 0, err
    names, scores = zip(*(line.split("\t") for line in out.splitlines()), strict=True)
    assert names == ("best_of/1", "best_of/2", "best_of/4")
    assert sorted(map(float, scores)) == list(map(float, scores)) and scores[0] < scores[2]
    selected = rows_of(folder, "selected")
    questions = {row["messages"][0]["content"] for row in selected}
    assert 3 < len(questions) < 12 and f"{len(questions)} prompts" in err
    assert len(list((folder / "selected").iterdir())) == -(-len(questions) // 3)
    assert (selected[0]["run"], selected[0]["step"]) == (str(chat_run), 5)
    assert all(
        row["score"] == sum(map(str.isalpha, row["messages"][1]["content"])) for row in selected
    )
    (first, *_) = read_examples(SourceConfig(source=str(folder / "pairs")))
    assert first.scores == (1.0, 0.0) and rows_of(folder, "pairs")[0]["chosen_score"] > 0
    lineage = json.loads((folder / "selected.lineage.json").read_text())
    assert lineage["policy"]["step"] == 5 and lineage["rollout"]["temperature"] == 0.9
    assert not list(folder.parent.glob(".made*"))


def test_a_seed_gives_one_data_set_and_rows_bound_it(tool):
    *_, first = tool(LETTERS, output="one")
    *_, again = tool(LETTERS, output="two")
    *_, other = tool(LETTERS, "--seed=1", output="three")
    *_, short = tool(LETTERS, "--rows=2", output="four")
    assert rows_of(first, "selected") == rows_of(again, "selected")
    assert rows_of(first, "selected") != rows_of(other, "selected")
    assert len(rows_of(short, "selected")) == 2


def test_rewards_may_have_weights_and_settings(tool):
    terms = [{"name": "letter_reward:letters", "weight": 2.0, "settings": {"times": 3}}]
    *_, plain = tool(LETTERS, output="one")
    status, *_, folder = tool(f"--rewards={json.dumps(terms)}", output="two")
    assert status == 0
    pairs = zip(rows_of(plain, "selected"), rows_of(folder, "selected"), strict=True)
    assert all(6 * one["score"] == other["score"] for one, other in pairs)


def test_earlier_answers_compete(tool, tmp_path):
    *_, alone = tool(LETTERS, output="one")
    chosen = {row["messages"][0]["content"]: row for row in rows_of(alone, "selected")}
    question = next(iter(chosen))
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": 20 * "x"}]
    (tmp_path / "earlier" / "selected").mkdir(parents=True)
    (tmp_path / "earlier" / "selected" / "a.jsonl").write_text(json.dumps({"messages": turns}))
    *_, both = tool(LETTERS, f"--earlier={tmp_path / 'earlier'}", output="two")
    rows = {row["messages"][0]["content"]: row for row in rows_of(both, "selected")}
    assert rows[question]["messages"] == turns and rows[question]["score"] == 20
    assert {**rows, question: None} == {**chosen, question: None}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workdir="], "--workdir is required"),
        (["--rewards="], "--rewards is required"),
        (["--samples=0"], "--samples=0 must be at least 1"),
        (["--keep=5"], "--keep=5 is more than --samples=4"),
        (["--rows=0"], "--rows=0 must be at least 1"),
        (["--margin=-1"], "margin=-1.0 must not be negative"),
        (["--max_new_tokens=64"], "--max_new_tokens=64 leaves no room for a prompt"),
        (["--rewards=exact_mach"], "Did you mean 'exact_match'"),
        (["--rewards=[1]"], "--rewards is no JSON list of objects"),
        (['--rewards=[{"nam": "x"}]'], "--rewards has no key 'nam'"),
        (["--earlier=nowhere"], "nowhere has no folder 'selected'"),
        (["--output=."], "--output=. is there already"),
    ],
)
def test_bad_input_gets_one_line_and_writes_nothing(tool, arguments, message):
    status, out, err, folder = tool(LETTERS, *arguments)
    last = err.splitlines()[-1]
    assert (status, out) == (2, "") and not folder.exists()
    assert last.startswith("error: ") and message in last


def test_a_pre_trained_run_has_no_answers(tool, save_run, tmp_path):
    status, _, err, _ = tool(LETTERS, workdir=save_run(tmp_path / "plain", (1,)))
    assert status == 2 and "without a chat template" in err
