"""Recipes: stages in their order, each in its folder, and what a second start does."""

import json

import pytest

from llm_jax import run
from llm_jax.config import defaults, resolved
from llm_jax.data.chat_corpus import ChatDataConfig
from llm_jax.data.phases import PhaseConfig
from llm_jax.errors import UserError
from llm_jax.metrics import MetricsConfig
from llm_jax.optim import OptimizerConfig
from llm_jax.recipe import recipe, run_recipe
from llm_jax.trainers.base import SampleConfig
from llm_jax.trainers.sft import SFTConfig, SFTEvaluationConfig


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    rows = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def config(tiny_config, chats):
    sft = defaults(
        SFTConfig,
        init_from="first",
        data=ChatDataConfig(source=str(chats), validation_fraction=0.2),
        phases=(PhaseConfig(length=64, batch=8, steps=3),),
        evaluation=SFTEvaluationConfig(rows=8, answers=2, max_new_tokens=4),
        optimizer=OptimizerConfig(warmup_steps=1),
        metrics=MetricsConfig(every=1, tensorboard=False),
        sample=SampleConfig(max_new_tokens=0),
    )
    return recipe(first=tiny_config(), second=sft)


def test_stages_run_in_their_order_and_are_left_alone_afterwards(config, tmp_path, capsys):
    assert run.run(config, tmp_path / "chain") == 0
    output = capsys.readouterr().out
    assert output.index("stage 1 of 2: first") < output.index("stage 2 of 2: second")
    result = json.loads((tmp_path / "chain" / "second" / "result.json").read_text())
    (parent,) = result["lineage"]
    assert parent["run"] == str(tmp_path / "chain" / "first") and parent["stage"] == "pretrain"
    report = (tmp_path / "chain" / "report.md").read_text()
    assert report in output and "| first | 6 |" in report and "| second | 3 |" in report
    assert "answers token_f1" in report and report.count("→") > 3

    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "chain").rglob("result.json")}
    assert run.run(config, tmp_path / "chain") == 0
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert capsys.readouterr().out.count("is finished already") == 2


def test_the_config_is_not_changed_by_running(config, tmp_path):
    before = resolved(config)
    assert run.run(config, tmp_path / "chain") == 0
    assert resolved(config) == before and config.second.init_from == "first"


def test_a_stage_made_from_another_parent_is_refused(config, tmp_path):
    assert run.run(config, tmp_path / "chain") == 0
    path = tmp_path / "chain" / "first" / "config.json"
    changed = json.loads(path.read_text()) | {"seed": 7}
    path.write_text(json.dumps(changed))
    config.first.seed = 7
    with pytest.raises(UserError, match=r"second was made from .*first before that was made anew"):
        run.run(config, tmp_path / "chain")


def test_a_stage_that_is_stopped_stops_the_recipe(config, tmp_path):
    started = []

    def stop(stage, workdir):
        started.append(workdir.name)
        return 143

    assert run_recipe(config, tmp_path, stop) == 143
    assert started == ["first"] and not (tmp_path / "report.md").exists()


def test_bad_input_of_a_later_stage_names_its_problem(config, tmp_path):
    config.second.data.template = "nonsense"
    with pytest.raises(UserError, match="nonsense"):
        run.run(config, tmp_path / "chain")
    assert not (tmp_path / "chain" / "second" / "result.json").exists()
