"""Recipes: stages in their order, each in its folder, and what a second start does."""

import copy
import json

import pytest

from llm_jax import run
from llm_jax.config import defaults, resolved
from llm_jax.data.chat_corpus import ChatDataConfig
from llm_jax.data.phases import PhaseConfig
from llm_jax.data.prompts import PromptDataConfig
from llm_jax.errors import UserError
from llm_jax.metrics import MetricsConfig
from llm_jax.optim import OptimizerConfig
from llm_jax.recipe import recipe, run_recipe
from llm_jax.rl.rewards import RewardTerm
from llm_jax.trainers.base import SampleConfig
from llm_jax.trainers.sft import SFTConfig, SFTEvaluationConfig
from llm_jax.yardstick import YardstickConfig


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
        init_from="{first}",
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
    assert resolved(config) == before and config.second.init_from == "{first}"


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


@pytest.mark.parametrize("name", ["{second}", "{third}", "{best}/pairs"])
def test_a_stage_may_name_only_what_is_finished_before_it(config, tmp_path, name):
    config.second.data.source = name
    stages = {"first": config.first, "second": config.second, "third": config.first}
    with pytest.raises(UserError, match=r"^config.second names \{\w+\}, and no such stage is"):
        run_recipe(recipe(**stages), tmp_path, lambda stage, workdir: pytest.fail("it began"))


def test_texts_that_name_stages_become_their_folders(config, tmp_path):
    config.second.data.source = "{first}/selected"
    config.second.sample.prompt = "{nothing} of {the kind}"
    started = {}

    def start(stage, workdir):
        started[workdir.name] = stage
        return 143 if workdir.name == "second" else 0

    assert run_recipe(config, tmp_path, start) == 143
    assert started["second"].data.source == str(tmp_path / "first" / "selected")
    assert started["second"].init_from == str(tmp_path / "first")
    assert started["second"].sample.prompt == "{nothing} of {the kind}"


# --- the yardstick --------------------------------------------------------------------------------

REWARDS = {}  # of every answer, by the stage that gave it; `scored` is told the stage


def scored(prompt, completion, row, path):
    return REWARDS[len(open(path).read().splitlines())]


@pytest.fixture
def rounds(config, chats, tmp_path):
    """A recipe of a pre-training and three fine-tunings of it, whose answers get REWARDS."""
    third, fourth = (copy.deepcopy(config.second) for _ in range(2))
    third.init_from, fourth.init_from = "{best}", "{best}"
    third.seed, fourth.seed = 1, 2
    begun = tmp_path / "begun"
    yardstick = YardstickConfig(
        stages=("second", "third", "fourth"),
        data=PromptDataConfig(source=str(chats), validation_fraction=0.2),
        rewards=(RewardTerm("tests.test_recipe:scored", settings={"path": str(begun)}),),
        rows=4,
        max_new_tokens=4,
    )
    whole = recipe(
        yardstick=yardstick, first=config.first, second=config.second, third=third, fourth=fourth
    )

    def start(stage, workdir):
        with begun.open("a") as file:
            file.write(f"{workdir.name} from {stage.init_from or ''}\n")
        return run.run(stage, workdir)

    def run_rounds(*rewards):
        REWARDS.update(enumerate(rewards, start=2))
        begun.write_text("")
        assert run_recipe(whole, tmp_path / "rounds", start) == 0
        return begun.read_text().splitlines()

    return run_rounds


@pytest.mark.slow
def test_rounds_log_their_gains_and_start_from_the_best(rounds, tmp_path, capsys):
    begun = rounds(0.5, 0.25, 0.75)
    assert [line.rpartition("/")[2] for line in begun[1:]] == ["first", "second", "second"]
    output = capsys.readouterr().out
    assert "yardstick: second reward 0.500 ± 0.000; best so far: second" in output
    assert "third reward 0.250 ± 0.000 (-0.250 over second); best so far: second" in output
    assert "fourth reward 0.750 ± 0.000 (+0.500 over third); best so far: fourth" in output
    report = (tmp_path / "rounds" / "report.md").read_text()
    assert "| fourth | reward 0.750 ± 0.000 | +0.500 over third |" in report
    lines = (tmp_path / "rounds" / "yardstick.jsonl").read_text().splitlines()
    assert [json.loads(line)["stage"] for line in lines] == ["second", "third", "fourth"]

    # What is measured is not measured again, so the stages start from the same ones as before.
    assert rounds(0.0, 9.0, 9.0) == begun
    again = (tmp_path / "rounds" / "yardstick.jsonl").read_text().splitlines()
    assert again == lines


def test_the_yardstick_waits_for_the_stages_that_it_names(config, tmp_path, capsys, chats):
    """As a reward model that is trained after the first stage that it measures."""
    third = copy.deepcopy(config.second)
    third.seed = 1
    yardstick = YardstickConfig(
        stages=("second",),
        data=PromptDataConfig(source=str(chats), validation_fraction=0.2),
        rewards=(RewardTerm("exact_match", settings={"answer_after": "{third}"}),),
        rows=4,
        max_new_tokens=4,
    )
    whole = recipe(yardstick=yardstick, first=config.first, second=config.second, third=third)
    assert run.run(whole, tmp_path / "chain") == 0
    output = capsys.readouterr().out
    assert output.index("stage 3 of 3") < output.index("yardstick: second reward 0.000")
    whole.third.init_from = "{best}"
    with pytest.raises(UserError, match=r"config.third names \{best\}"):
        run.run(whole, tmp_path / "other")
