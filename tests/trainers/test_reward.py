"""Reward modelling: whose head it is, what it learns, and that its settings are heeded."""

import numpy as np
import pytest

from llm_jax.data.phases import PhaseConfig
from llm_jax.data.preferences import PreferenceDataConfig
from llm_jax.errors import UserError
from llm_jax.models.config import ModelConfig
from llm_jax.models.lora import LoraConfig
from llm_jax.objectives.reward import LossConfig
from llm_jax.optim import OptimizerConfig
from llm_jax.runs import load_run
from llm_jax.trainers.preference import PreferenceEvaluationConfig

HEAD = "['reward_head']['kernel']"
ONE_STEP = (PhaseConfig(length=32, batch=8, steps=1),)
FROZEN = OptimizerConfig(learning_rate=0.0, warmup_steps=0)
QUICK = OptimizerConfig(learning_rate=0.02, warmup_steps=0, schedule="constant")


@pytest.fixture(scope="module")
def trained(start, opened):
    """A run that learns to prefer."""
    return opened(
        start("reward", phases=(PhaseConfig(length=32, batch=8, steps=12),), optimizer=QUICK)
    )


@pytest.fixture(scope="module")
def untrained(start, opened):
    """What a reward model is before its first step."""
    return opened(start("reward", phases=ONE_STEP, optimizer=FROZEN))


def test_the_head_is_new_and_the_rest_inherited(untrained, pretrained, opened):
    before, found = opened(pretrained).params, untrained.params
    assert found.keys() - before.keys() == {HEAD} and found[HEAD].shape == (16, 1)
    assert 0.5 < np.std(found[HEAD]) * np.sqrt(17) < 2
    for name, value in before.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_the_seed_decides_the_head(build, beginning, untrained):
    heads = [
        beginning(build("reward", seed=seed)[0])[0]["reward_head"]["kernel"] for seed in (0, 1)
    ]
    np.testing.assert_array_equal(heads[0], untrained.params[HEAD])
    assert not np.array_equal(*heads)


def test_it_learns_which_answer_is_better(trained):
    losses = trained.logged("loss")
    assert losses[-1] < 0.5 * losses[0] and trained.logged("eval/validation/accuracy")[-1] > 0.8
    assert trained.logged("rewards/margins")[-1] > trained.logged("rewards/margins")[0]


def test_the_evaluation_is_told_by_strength_and_calibration(trained):
    metrics = trained.result["metrics"]
    assert {"accuracy", "accuracy_stderr", "calibration_error", "reward_mean", "reward_std"} <= {
        key.removeprefix("eval/validation/") for key in metrics
    }
    assert any(key.startswith("eval/validation/accuracy/") for key in metrics)
    assert len(trained.logged("eval/validation/accuracy")) == 2  # at the start and at the end


def test_the_head_of_a_reward_run_is_kept(build, beginning, trained):
    trainer, _ = build("reward", init_from=str(trained.workdir))
    params, _ = beginning(trainer)
    np.testing.assert_array_equal(params["reward_head"]["kernel"], trained.params[HEAD])
    trainer, _ = build(
        "reward", init_from=str(trained.workdir), model=ModelConfig(lora=LoraConfig(rank=2))
    )
    params, _ = beginning(trainer)
    np.testing.assert_array_equal(params["reward_head"]["kernel"], trained.params[HEAD])
    assert "reward_head" not in trainer.frozen


def test_a_loaded_run_has_its_head(trained):
    run = load_run(str(trained.workdir))
    assert run.meta["heads"] == ["reward_head"] and run.meta["stage"] == "reward"
    np.testing.assert_array_equal(run.params["reward_head"]["kernel"], trained.params[HEAD])


def test_with_adapters_head_and_adapters_are_trained(start, opened, pretrained):
    run = opened(start("reward", model=ModelConfig(lora=LoraConfig(rank=2)), optimizer=QUICK))
    params = run.params
    assert HEAD in params and all("lora" in name for name in params if name != HEAD)
    loaded = load_run(str(run.workdir))
    np.testing.assert_array_equal(
        loaded.params["embedding"], opened(pretrained).params["['embedding']"]
    )
    np.testing.assert_array_equal(loaded.params["reward_head"]["kernel"], params[HEAD])


def data(examples, name):
    return PreferenceDataConfig(source=str(examples / name), validation_fraction=0.2)


def test_ranked_answers_stand_in_one_row(build, beginning, examples):
    trainer, _ = build("reward", data=data(examples, "ranked.jsonl"))
    _, batch = beginning(trainer)
    assert batch.responses.tokens.shape == (8, 3, 32)
    assert trainer.phases[0].tokens_per_step == 8 * 3 * 32
    facts = trainer.setting(trainer.phases[0]).facts
    assert any("comparisons of 3 answers" in fact for fact in facts)


def test_margins_and_centring_add_to_the_loss(build, first_loss):
    usual, _ = first_loss(build("reward")[0])
    large, _ = first_loss(build("reward", loss=LossConfig(margins="large"))[0])
    same, _ = first_loss(build("reward", loss=LossConfig(margins="3,2,1,0"))[0])
    centred, _ = first_loss(build("reward", loss=LossConfig(centring=0.1))[0])
    assert large > usual and same == large and centred > usual


def test_the_number_of_rows_that_are_evaluated_is_heeded(build, beginning):
    for rows, wanted in ((1, False), (6, True)):
        evaluation = PreferenceEvaluationConfig(every=1000, rows=rows)
        trainer, _ = build("reward", evaluation=evaluation)
        (validation,) = trainer.setting(trainer.phases[0]).evaluations
        assert validation.name == "validation"
        result = validation.run(beginning(trainer)[0])
        assert ("accuracy_stderr" in result) == wanted  # of a single prompt there is none


def test_answers_that_do_not_fit_are_a_fact(build):
    trainer, _ = build("reward", phases=(PhaseConfig(length=22, batch=8, steps=1),))
    facts = trainer.setting(trainer.phases[0]).facts
    assert "answers are longer than a row with their prompt" in facts[0]
    assert facts[1].endswith("held out")
    with pytest.raises(UserError, match="holds nothing to compare"):
        build("reward", phases=(PhaseConfig(length=1, batch=8, steps=1),))


def test_conversations_are_nothing_to_compare(build, examples):
    with pytest.raises(UserError, match="the row is a conversation"):
        build("reward", data=data(examples, "chats.jsonl"))
