"""On-policy distillation: what a student learns from its own answers, and resuming."""

import numpy as np
import pytest

from llm_jax.checkpoint import CheckpointConfig
from llm_jax.data.phases import PhaseConfig
from llm_jax.data.prompts import PromptDataConfig
from llm_jax.errors import UserError
from llm_jax.models.config import ModelConfig
from llm_jax.models.lora import LoraConfig
from llm_jax.objectives.distill import DivergenceConfig
from llm_jax.optim import OptimizerConfig
from llm_jax.rl.rewards import RewardTerm
from llm_jax.rl.rollouts import RolloutConfig
from llm_jax.stored import find
from llm_jax.trainers.on_policy import OnPolicyEvaluationConfig
from llm_jax.trainers.rounds import OnPolicySource
from llm_jax.trainers.teacher import TeacherConfig

FAST = OptimizerConfig(learning_rate=0.02, warmup_steps=0, schedule="constant")


@pytest.fixture(scope="module")
def teacher(start):
    """A run that knows some answers."""
    return start("sft", phases=(PhaseConfig(length=32, batch=8, steps=12),), optimizer=FAST)


@pytest.fixture(scope="module")
def sections(examples, teacher):
    """`sections(**more)`: those of a run that starts from the one before its teacher."""

    def make(**more):
        settings = {
            "data": PromptDataConfig(source=str(examples / "chats.jsonl"), validation_fraction=0.2),
            "rollout": RolloutConfig(samples=2, max_new_tokens=6),
            "teacher": TeacherConfig(run=str(teacher)),
            "phases": (PhaseConfig(length=32, batch=16, steps=2),),
            "evaluation": OnPolicyEvaluationConfig(every=1000, rows=5, temperature=1.0),
        }
        return {**settings, **more}

    return make


@pytest.fixture(scope="module")
def distilled(start, opened, sections):
    """`distilled(**sections)`: a finished run."""

    def make(**more):
        return opened(start("on_policy_distill", **sections(**more)))

    return make


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
def test_a_students_own_answers_come_nearer_to_its_teachers(divergence, distilled):
    run = distilled(
        loss=DivergenceConfig(divergence), optimizer=FAST,
        phases=(PhaseConfig(length=32, batch=16, steps=16),),
    )  # fmt: skip
    before, after = run.logged("eval/validation/distill_loss")
    assert after < 0.5 * before
    losses = run.logged("distill_loss")
    assert np.mean(losses[-3:]) < 0.6 * np.mean(losses[:3])
    assert run.logged("loss") == pytest.approx(losses)
    assert run.result["stage"] == "on_policy_distill"
    assert max(run.logged("sampling_logprob_difference")) < 1e-3
    assert not any("teacher" in name for name in run.params)


def test_the_teacher_has_nothing_to_tell_itself(distilled, teacher):
    run = distilled(init_from=str(teacher))
    assert run.logged("distill_loss")[0] == pytest.approx(0, abs=1e-4)
    assert run.logged("token_agreement")[0] == 1
    assert run.logged("eval/validation/token_agreement")[0] == 1


def test_rewards_are_told_and_no_part_of_the_loss(distilled):
    plain, scored = distilled(), distilled(rewards=(RewardTerm("length", weight=5.0),))
    assert plain.logged("reward") == plain.logged("finished")
    assert scored.logged("reward") != plain.logged("reward")
    assert scored.logged("loss") == plain.logged("loss")


def test_adapters_learn_too(distilled):
    run = distilled(model=ModelConfig(lora=LoraConfig(rank=2)))
    assert find(str(run.workdir)).model.lora.rank == 2


@pytest.mark.slow
def test_a_run_killed_within_a_round_ends_bit_for_bit_as_if_it_had_not_been(
    distilled, sections, configure, run_on, opened, killed_at, tmp_path
):
    more = {
        "rollout": RolloutConfig(samples=2, max_new_tokens=6, updates=2, epochs=2),
        "phases": (PhaseConfig(length=32, batch=8, steps=8),),
        "checkpoint": CheckpointConfig(every=2),
    }
    whole = distilled(**more)
    config = configure("on_policy_distill", **sections(**more))
    with killed_at(7, OnPolicySource):
        run_on(1, config, tmp_path / "run")
    assert run_on(1, config, tmp_path / "run") == 0
    resumed = opened(tmp_path / "run")
    for name, value in whole.params.items():
        assert resumed.params[name].tobytes() == value.tobytes(), name
    assert resumed.logged("loss") == whole.logged("loss")


def test_a_student_must_answer_already(build, sections):
    with pytest.raises(UserError, match="name its run by"):
        build("on_policy_distill", **sections(init_from=None))


def test_a_teacher_must_be_named(build, sections):
    with pytest.raises(UserError, match="run is not given"):
        build("on_policy_distill", **sections(teacher=TeacherConfig()))
