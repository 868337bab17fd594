"""The stages that train on their own samples: rounds, rewards, references, and resuming."""

import json

import numpy as np
import pytest

from llm_jax.data.phases import PhaseConfig
from llm_jax.errors import UserError
from llm_jax.models.config import ModelConfig
from llm_jax.models.lora import LoraConfig
from llm_jax.objectives import grpo
from llm_jax.optim import OptimizerConfig
from llm_jax.rl.advantages import KLConfig
from llm_jax.rl.rewards import RewardTerm
from llm_jax.rl.rollouts import RolloutConfig
from llm_jax.rl.selection import SelectionConfig
from llm_jax.trainers.on_policy import OnPolicyEvaluationConfig

# --- learning -------------------------------------------------------------------------------------


@pytest.mark.parametrize("trainer", ["grpo", "ppo"])
def test_a_reward_that_can_be_had_is_had(trainer, on_policy):
    run = on_policy(
        trainer,
        phases=(PhaseConfig(length=32, batch=32, steps=32),),
        optimizer=OptimizerConfig(learning_rate=0.02, warmup_steps=0, schedule="constant"),
        evaluation=OnPolicyEvaluationConfig(every=1000, rows=8, temperature=1.0),
    )
    rewards = run.logged("reward")
    assert np.mean(rewards[-4:]) > np.mean(rewards[:4]) + 0.15
    held_out = run.logged("eval/validation/reward")
    assert held_out[-1] > held_out[0] + 0.1
    assert max(run.logged("sampling_logprob_difference")) < 1e-4
    assert len(set(run.logged("compilations"))) <= 2  # all of them in the first round
    assert run.result["stage"] == trainer


def test_the_first_update_has_a_ratio_of_one_and_a_gradient(on_policy):
    run = on_policy("grpo")
    assert run.logged("ratio")[0] == pytest.approx(1, abs=1e-5)
    assert run.logged("loss")[0] == pytest.approx(0, abs=1e-4)
    assert run.logged("grad_norm")[0] > 1e-3


def test_constant_groups_change_nothing(on_policy, reward_of, pretrained, opened):
    rewards = reward_of("def reward(prompt, completion, row):\n    return 0.5\n")
    optimizer = OptimizerConfig(
        learning_rate=3e-3, warmup_steps=0, schedule="constant", weight_decay=0.0
    )
    run = on_policy("grpo", rewards=rewards, optimizer=optimizer)
    assert run.logged("constant_groups") == [1.0, 1.0]
    before = opened(pretrained).params
    for name, value in run.params.items():
        np.testing.assert_array_equal(value, before[name])
    assert run.logged("reward") == [0.5, 0.5]


def test_fractional_rewards_reach_the_log(on_policy, reward_of):
    rewards = reward_of("def reward(prompt, completion, row):\n    return 0.75\n", weight=0.5)
    assert on_policy("ppo", rewards=rewards).logged("reward") == [0.375, 0.375]


# --- references -----------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)])
def test_the_policy_begins_as_its_reference(on_policy, lora):
    model = ModelConfig(lora=lora)
    run = on_policy("ppo", model=model, kl=KLConfig(coefficient=0.1, target=0.5))
    assert run.logged("kl_sequence")[0] == pytest.approx(0, abs=1e-4)
    assert run.logged("kl")[1] > 0
    other = on_policy("grpo", model=model, loss=grpo.LossConfig(beta=0.1))
    assert other.logged("kl")[0] == pytest.approx(0, abs=1e-6)


def test_without_a_reference_there_is_no_divergence(on_policy):
    assert on_policy("grpo").logged("kl") == []
    assert on_policy("ppo", kl=KLConfig(coefficient=0.0)).logged("kl") == []


# --- rounds ---------------------------------------------------------------------------------------


def test_a_round_serves_its_updates_and_epochs(on_policy):
    rollout = RolloutConfig(samples=4, max_new_tokens=6, updates=2, epochs=2)
    run = on_policy("ppo", rollout=rollout, phases=(PhaseConfig(length=32, batch=8, steps=8),))
    rewards = run.logged("reward")
    assert len(set(rewards[:4])) == 1 and len(set(rewards[4:])) == 1 and rewards[0] != rewards[4]
    ratios = run.logged("ratio")
    assert ratios[0] == pytest.approx(1, abs=1e-5) and abs(ratios[3] - 1) > 1e-5


def test_what_a_learner_knows_goes_on_into_the_next_phase(on_policy):
    phase = PhaseConfig(length=32, batch=16, steps=2)
    kl = KLConfig(coefficient=0.1, target=0.01, horizon=50)
    run = on_policy("ppo", phases=(phase, phase), kl=kl)
    weights = run.logged("kl_coefficient")
    assert weights[0] == 0.1 and len(set(weights)) == 4


@pytest.mark.usefixtures("optimised")
def test_the_mesh_changes_nothing(on_policy):
    alone, spread = (on_policy("grpo", devices=n) for n in (1, 4))
    assert alone.logged("reward") == spread.logged("reward")
    for name, value in alone.params.items():
        np.testing.assert_allclose(value, spread.params[name], atol=1e-5)


@pytest.mark.parametrize("stop_at", [3, 4])
@pytest.mark.parametrize("trainer", ["grpo", "ppo"])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(trainer, stop_at, check_resumes):
    check_resumes(
        trainer,
        stop_at,
        rollout=RolloutConfig(samples=4, max_new_tokens=6, updates=2),
        phases=(PhaseConfig(length=32, batch=8, steps=6),),
    )


# --- rewards that fail ----------------------------------------------------------------------------

SOMETIMES = """
def reward(prompt, completion, row):
    if "3" in prompt:
        raise KeyError("no such thing")
    return float("nan") if "7" in prompt else len(completion) / 10
"""


@pytest.mark.parametrize("trainer", ["grpo", "ppo"])
def test_rewards_that_fail_are_told_of_and_left_out(trainer, on_policy, reward_of, capsys):
    run = on_policy(
        trainer,
        rewards=reward_of(SOMETIMES),
        phases=(PhaseConfig(length=32, batch=64, steps=2),),
        max_reward_failures=1000,
    )
    failures = run.logged("reward_failures")
    assert 0 < failures[0] < 64 and failures[-1] > failures[0]
    assert np.isfinite(run.logged("loss")).all() and np.isfinite(run.logged("reward")).all()
    shown = capsys.readouterr().out
    assert "KeyError" in shown and "failed on row" in shown


def test_too_many_failures_end_the_run(on_policy, reward_of):
    with pytest.raises(UserError, match=r"rewards have failed \d+ times, and the limit is 3"):
        on_policy("grpo", rewards=reward_of(SOMETIMES), max_reward_failures=3,
                  phases=(PhaseConfig(length=32, batch=64, steps=2),))  # fmt: skip


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trainer", "sections", "message"),
    [
        ("grpo", {"init_from": None}, "improves a model that answers already"),
        ("grpo", {"rollout": RolloutConfig(samples=1)}, "groups of one"),
        ("grpo", {"rollout": RolloutConfig(samples=3, max_new_tokens=6)}, "no multiple of"),
        ("ppo", {"rollout": RolloutConfig(max_new_tokens=32)}, "leaves no room for a prompt"),
        ("ppo", {"rollout": RolloutConfig(samples=4, max_new_tokens=31)}, "longer than the 1 t"),
        ("ppo", {"rewards": (RewardTerm("exact_mach"),)}, "Did you mean 'exact_match'"),
        ("ppo", {"rewards": ()}, "config.rewards is empty"),
        ("rejection_sampling", {"selection": SelectionConfig(keep=5)}, "more than config.rollout"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(trainer, sections, message, on_policy, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        on_policy(trainer, workdir=tmp_path / "run", **sections)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "config.json").exists()


def test_what_the_log_holds_can_be_read_as_json(on_policy):
    run = on_policy("ppo")
    records = [json.loads(line) for line in (run.workdir / "metrics.jsonl").open()]
    keys = {"reward", "rewards/reward", "completion_length", "finished", "value_loss", "entropy",
            "clip_fraction", "explained_variance", "idle_share", "epoch"}  # fmt: skip
    assert any(keys <= record.keys() for record in records)
