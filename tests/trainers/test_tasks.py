"""Tasks in the training loop, and the same figures after it."""

import dataclasses
import json

import jax
import pytest

from llm_jax.data.corpus import DataConfig
from llm_jax.data.prompts import PromptDataConfig
from llm_jax.errors import UserError
from llm_jax.evals.run_subject import run_subject
from llm_jax.evals.task import TaskTerm
from llm_jax.evals.tasks import make_task, task_config
from llm_jax.runs import load_run
from llm_jax.trainers.on_policy import OnPolicyEvaluationConfig
from llm_jax.trainers.preference import PreferenceEvaluationConfig
from llm_jax.trainers.pretrain import PretrainEvaluationConfig
from llm_jax.trainers.sft import SFTEvaluationConfig

DOCUMENTS = TaskTerm("perplexity", "documents", {"documents": 3})
PAIRS = TaskTerm("key_value", settings={"lengths": (60,), "depths": 2, "per_cell": 1})


def evaluations_of(trainer):
    return {e.name: e.run for e in trainer.setting(trainer.phases[0]).evaluations}


@pytest.fixture(scope="module")
def grpo(on_policy, examples, vowels_reward):
    """A GRPO run that answers its held-out prompts as a task, too."""
    data = PromptDataConfig(source=str(examples / "chats.jsonl"), validation_fraction=0.2)
    settings = {"data": data, "rewards": vowels_reward, "rows": 4, "max_new_tokens": 6, "slots": 2}
    terms = (TaskTerm("generation", "asked", dict(task_config("generation", **settings).settings)),)
    evaluation = OnPolicyEvaluationConfig(every=1000, rows=4, at_start=False, tasks=terms)
    return on_policy("grpo", evaluation=evaluation), terms[0]


def test_a_task_and_the_stage_measure_the_same(grpo):
    run, _ = grpo
    for key in ("reward", "rewards/reward", "completion_length", "finished", "reward_stderr"):
        assert run.logged(f"eval/asked/{key}") == run.logged(f"eval/validation/{key}") != []
    assert run.logged("eval/asked/accuracy") and not run.logged("eval/validation/accuracy")


def test_a_run_on_disk_gives_what_the_loop_gave(grpo):
    run, term = grpo
    loaded = load_run(str(run.workdir))
    with jax.set_mesh(loaded.mesh):
        result = make_task(term, run_subject(loaded, print)).run(loaded.params)
    for key in ("reward", "completion_length", "accuracy"):
        assert result.metrics[key] == pytest.approx(run.logged(f"eval/asked/{key}")[-1])


def test_texts_that_a_stage_held_out_are_its_tasks(build, beginning, tiny_config, corpus, examples):
    tasks = (DOCUMENTS, PAIRS)
    chats = evaluations_of(
        build("sft", evaluation=SFTEvaluationConfig(answers=0, rows=8, tasks=tasks))[0]
    )
    assert list(chats) == ["validation", "documents", "key_value"]
    texts = build(
        "pretrain", model=tiny_config().model, tokenizer=tiny_config().tokenizer, init_from=None,
        data=DataConfig(source=str(corpus), validation_fraction=0.1),
        evaluation=PretrainEvaluationConfig(rows=8, tasks=tasks),
    )[0]  # fmt: skip
    params, _ = beginning(texts)
    found = evaluations_of(texts)
    with jax.set_mesh(jax.tree.leaves(params)[0].sharding.mesh):
        whole, by_row = found["documents"](params), found["validation"](params)
    assert whole["loss"] == pytest.approx(by_row["loss"], abs=0.3)
    assert whole["bits_per_byte_stderr"] > 0


def test_what_does_not_fit_is_refused_before_the_run_begins(build):
    def refused(trainer, config, *tasks):
        with pytest.raises(UserError) as caught:
            build(trainer, evaluation=dataclasses.replace(config, tasks=tasks))
        return str(caught.value)

    comparing = PreferenceEvaluationConfig(rows=8)
    assert "what a reward model does not do" in refused("reward", comparing, PAIRS)
    unknown = TaskTerm("neddle")
    assert "'neddle' is no task. Did you mean 'needle'?" in refused("dpo", comparing, unknown)
    assert "no held-out texts of its own" in refused("dpo", comparing, DOCUMENTS)
    named = dataclasses.replace(PAIRS, label="validation")
    assert "an evaluation 'validation' already" in refused("dpo", comparing, named)
    assert "two tasks are called 'key_value'" in refused("dpo", comparing, PAIRS, PAIRS)
    typed = TaskTerm("key_value", settings={"depth": 3})
    assert "no key 'depth'. Did you mean 'depths'?" in refused("dpo", comparing, typed)
    with pytest.raises(UserError, match="must not be empty, nor hold a slash"):
        TaskTerm("needle", "a/b")


def test_a_failing_task_is_in_the_result(on_policy, reward_of):
    rewards = reward_of("def reward(prompt, completion, row):\n    raise KeyError('x')\n")
    settings = {"rewards": rewards, "max_new_tokens": 2, "max_reward_failures": 0, "rows": 2}
    term = TaskTerm("generation", "asked", dict(task_config("generation", **settings).settings))
    evaluation = OnPolicyEvaluationConfig(every=1000, rows=4, at_start=False, tasks=(term,))
    run = on_policy("grpo", evaluation=evaluation)
    assert run.logged("eval/asked/failed") == [1.0]
    result = json.loads((run.workdir / "result.json").read_text())
    assert result["status"] == "finished" and result["failed_evaluations"] == 1
