"""What is GRPO's own as a stage: the variants' settings, and rounds that draw again."""

import jax
import numpy as np
import pytest

from llm_jax.data.phases import PhaseConfig
from llm_jax.errors import UserError
from llm_jax.objectives.grpo import LossConfig
from llm_jax.rl.rollouts import RolloutConfig
from llm_jax.trainers.grpo import AdvantageConfig, GroupLearner, GRPOConfig
from llm_jax.trainers.rounds import OnPolicySource

# --- variants -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "variant, scale, low, high",
    [
        ("grpo", "std", 0.2, 0.2),
        ("bnpo", "std", 0.2, 0.2),
        ("dapo", "std", 0.2, 0.28),
        ("dr_grpo", "none", 0.2, 0.2),
        ("gspo", "std", 3e-4, 4e-4),
    ],
)
def test_a_variant_has_the_settings_of_its_paper_unless_others_are_given(variant, scale, low, high):
    config = GRPOConfig(loss=LossConfig(variant))
    assert (config.advantage_scale, config.loss.clipping) == (scale, (low, high))
    own = GRPOConfig(
        loss=LossConfig(variant, epsilon_high=0.5), advantage=AdvantageConfig(scale="batch")
    )
    assert (own.advantage_scale, own.loss.clipping) == ("batch", (low, 0.5))


def test_the_settings_are_told_and_used(on_policy, capsys):
    plain = on_policy("grpo", loss=LossConfig("dr_grpo"))
    told = "dr_grpo: ratios clipped to [0.8, 1.2], advantages divided by nothing"
    assert told in capsys.readouterr().out
    divided = on_policy("grpo", loss=LossConfig("dr_grpo"), advantage=AdvantageConfig(scale="std"))
    assert divided.logged("grad_norm")[0] > 2 * plain.logged("grad_norm")[0] > 0


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"overlong_buffer": 7}, "overlong_buffer=7 must lie between 1 and .*max_new_tokens=6"),
        ({"overlong_buffer": 0}, "overlong_buffer=0 must lie between 1 and"),
        ({"redraws": -1}, "redraws=-1 must not be negative"),
    ],
)
def test_senseless_settings_are_refused(changes, message, on_policy, tmp_path):
    with pytest.raises(UserError, match=message):
        on_policy("grpo", workdir=tmp_path / "run", advantage=AdvantageConfig(**changes))
    assert not (tmp_path / "run" / "config.json").exists()


# --- dynamic sampling -----------------------------------------------------------------------------

# Answers to prompts with an odd number score alike.
ODD_ALIKE = """
def reward(prompt, completion, row):
    number = int(prompt.split()[-1].rstrip("?"))
    return 0.5 if number % 2 else sum(letter in "aeiou" for letter in completion) + len(completion)
"""
CONSTANT = "def reward(prompt, completion, row):\n    return 0.25\n"


@pytest.fixture
def seen(monkeypatch):
    """The rounds that learners were given."""
    rounds = []
    original = GroupLearner.learn

    def learn(self, params, round):
        rounds.append(round)
        return original(self, params, round)

    monkeypatch.setattr(GroupLearner, "learn", learn)
    return rounds


def spreads(round):
    return np.ptp(round.scores.reshape(len(round.prompts), -1), axis=1)


def test_prompts_whose_answers_score_alike_are_replaced(on_policy, reward_of, seen):
    sections = {
        "rewards": reward_of(ODD_ALIKE),
        "rollout": RolloutConfig(samples=8, max_new_tokens=6),
        "phases": (PhaseConfig(length=32, batch=64, steps=3),),
    }
    alike = on_policy("grpo", **sections)
    assert min(alike.logged("constant_groups")) > 0 and not alike.logged("draws")
    assert all((spreads(round) == 0).any() for round in seen)
    seen.clear()
    run = on_policy("grpo", advantage=AdvantageConfig(redraws=9), **sections)
    assert all((spreads(round) > 0).all() for round in seen)
    assert run.logged("constant_groups")[0] == alike.logged("constant_groups")[0], "as first drawn"
    assert run.logged("reward")[0] == alike.logged("reward")[0], "of what was first drawn"
    assert all(1 < draws < 9 for draws in run.logged("draws"))
    assert run.logged("epoch")[0] > alike.logged("epoch")[0], "more prompts were taken"
    for round in seen:
        prompts = [prompt for prompt in round.prompts for _ in range(8)]
        rows = round.rollouts.sequences.tokens
        for prompt, sample, row in zip(prompts, round.rollouts.samples, rows, strict=True):
            whole = [*prompt.ids, *sample.completion_ids]
            assert row[: len(whole)].tolist() == whole


def test_each_draw_has_prompts_and_randomness_of_its_own(on_policy, reward_of, monkeypatch):
    drawn, keys = [], []
    original = OnPolicySource._draw

    def draw(self, params, size, rng):
        keys.append(tuple(jax.random.key_data(rng).tolist()))
        drawn.append(original(self, params, size, rng))
        return drawn[-1]

    monkeypatch.setattr(OnPolicySource, "_draw", draw)
    on_policy(
        "grpo",
        rewards=reward_of(CONSTANT),
        advantage=AdvantageConfig(redraws=2),
        phases=(PhaseConfig(length=32, batch=16, steps=2),),
    )
    assert len(keys) == len(set(keys)) == 6
    taken = [prompt.text for some in drawn for prompt in some.prompts]
    assert len(taken) == len(set(taken)) == 24


def test_what_is_missing_is_made_up_by_what_was_drawn_first(on_policy, reward_of, seen):
    phases = (PhaseConfig(length=32, batch=16, steps=2),)
    rewards = reward_of(CONSTANT)
    run = on_policy("grpo", rewards=rewards, phases=phases, advantage=AdvantageConfig(redraws=2))
    assert run.logged("draws") == [3, 3] and run.logged("constant_groups") == [1, 1]
    again = [[p.text for p in round.prompts] for round in seen]
    seen.clear()
    on_policy("grpo", rewards=rewards, phases=phases)
    once = [[p.text for p in round.prompts] for round in seen]
    assert again[0] == once[0] and again[1] != once[1]


def test_few_sizes_of_draws_compile(on_policy, reward_of):
    run = on_policy(
        "grpo",
        rewards=reward_of(ODD_ALIKE),
        phases=(PhaseConfig(length=32, batch=64, steps=8),),
        advantage=AdvantageConfig(redraws=9),
    )
    sizes = {1, 2, 4, 8, 16}  # prompts, rounded up
    assert run.logged("compilations")[-1] <= 4 * len(sizes)


@pytest.mark.parametrize("stop_at", [3, 4])
def test_a_run_that_draws_again_goes_on_bit_for_bit(stop_at, check_resumes, reward_of):
    check_resumes(
        "grpo",
        stop_at,
        rewards=reward_of(ODD_ALIKE),
        rollout=RolloutConfig(samples=4, max_new_tokens=6, updates=2),
        phases=(PhaseConfig(length=32, batch=8, steps=6),),
        advantage=AdvantageConfig(redraws=3),
    )
