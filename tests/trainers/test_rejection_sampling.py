"""Rejection sampling as a stage: learning from the best answers, and the data sets it leaves."""

import json

import numpy as np
import pytest

from llm_jax.data.chat_corpus import ChatDataConfig
from llm_jax.data.phases import PhaseConfig
from llm_jax.data.preferences import PreferenceDataConfig
from llm_jax.optim import OptimizerConfig
from llm_jax.rl.rollouts import RolloutConfig
from llm_jax.rl.selection import SelectionConfig
from llm_jax.trainers.on_policy import OnPolicyEvaluationConfig

LEARNING = OptimizerConfig(learning_rate=0.02, warmup_steps=0, schedule="constant")


def rows_of(run, name):
    """The rows of a data set by the step of their file."""
    files = sorted((run.workdir / name).iterdir())
    return {int(file.stem): [json.loads(line) for line in file.open()] for file in files}


@pytest.fixture(scope="module")
def again(start):
    """Sections of a run that sees every prompt in every round, from a model that ends answers, and
    that does not know yet which of them is the best."""
    steps = (PhaseConfig(length=32, batch=16, steps=60),)
    return {
        "init_from": str(start("sft", phases=steps, optimizer=LEARNING)),
        "rollout": RolloutConfig(samples=2, max_new_tokens=8),
        "phases": (PhaseConfig(length=32, batch=32, steps=4),),
    }


def test_the_best_answers_are_kept_written_down_and_learnt(on_policy):
    run = on_policy(
        "rejection_sampling",
        rollout=RolloutConfig(samples=8, max_new_tokens=6),
        phases=(PhaseConfig(length=32, batch=16, steps=16),),
        optimizer=LEARNING,
        evaluation=OnPolicyEvaluationConfig(every=1000, rows=8, temperature=1.0),
    )
    for first, second in (("1", "2"), ("2", "4"), ("4", "8")):
        better = zip(run.logged(f"best_of/{first}"), run.logged(f"best_of/{second}"), strict=True)
        assert all(one < other for one, other in better)
    assert run.logged("best_of/1") == pytest.approx(run.logged("reward"))
    rewards = run.logged("eval/validation/reward")
    assert rewards[-1] > rewards[0] + 0.1
    selected = rows_of(run, "selected")
    assert list(selected) == list(rows_of(run, "pairs")) == list(range(16))
    assert len(selected[0]) == 16
    best = np.mean([row["score"] for row in selected[0]])
    assert best == pytest.approx(run.logged("best_of/8")[0])
    assert [turn["role"] for turn in selected[0][0]["messages"]] == ["user", "assistant"]
    lineage = json.loads((run.workdir / "selected.lineage.json").read_text())
    assert lineage["policy"]["run"] == str(run.workdir)
    assert [stage["stage"] for stage in lineage["policy"]["parents"]] == ["pretrain"]
    assert lineage["rewards"][0]["weight"] == 1 and lineage["rollout"]["samples"] == 8


def test_what_was_chosen_is_data_for_other_stages(on_policy, start, opened):
    selection = SelectionConfig(keep=2, threshold=0.1)
    run = on_policy("rejection_sampling", selection=selection)
    assert 0 < np.mean(run.logged("selected")) < 1
    rows = [row for some in rows_of(run, "selected").values() for row in some]
    assert rows and all(row["score"] >= 0.1 for row in rows)
    data = ChatDataConfig(source=str(run.workdir / "selected"), validation_fraction=0.2)
    assert opened(start("sft", data=data)).result["status"] == "finished"
    pairs = [row for some in rows_of(run, "pairs").values() for row in some]
    assert pairs and all(row["chosen_score"] > row["rejected_score"] for row in pairs)
    data = PreferenceDataConfig(source=str(run.workdir / "pairs"), validation_fraction=0.2)
    for stage in ("dpo", "reward"):
        assert opened(start(stage, data=data)).result["status"] == "finished"


def test_answers_of_earlier_rounds_and_runs_stay_in_the_running(on_policy, again):
    first = on_policy("rejection_sampling", **again)
    shares = first.logged("selected_earlier")
    assert shares[0] == 0 and all(share > 0 for share in shares[1:])
    before = {}
    for step, rows in rows_of(first, "selected").items():
        found = {}
        for row in rows:
            question = row["messages"][0]["content"]
            assert row["score"] >= before.get(question, 0) and row["step"] <= step
            if row["finished"]:
                found[question] = max(row["score"], found.get(question, 0))
        before |= found
    selection = SelectionConfig(earlier=(str(first.workdir),))
    second = on_policy("rejection_sampling", selection=selection, **again)
    assert second.logged("selected_earlier")[0] > 0
    runs = {row["run"] for row in rows_of(second, "selected")[0]}
    assert runs == {str(first.workdir), str(second.workdir)}


@pytest.mark.parametrize("stop_at", [1, 3])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(stop_at, check_resumes, again):
    check_resumes("rejection_sampling", stop_at, **again)
