"""Fine-tuning: what it learns, what it measures, and that every key of its config is heeded."""

import os
import signal
from unittest import mock

import pytest

from llm_jax.checkpoint import CheckpointConfig
from llm_jax.data.chat_corpus import ChatDataConfig, NamedExampleConfig
from llm_jax.data.offline import OfflineSource
from llm_jax.data.phases import PhaseConfig
from llm_jax.data.tokenizers import TokenizerConfig
from llm_jax.models.config import ModelConfig
from llm_jax.models.lora import LoraConfig
from llm_jax.objectives.lm import LossConfig
from llm_jax.optim import OptimizerConfig
from llm_jax.trainers.base import SampleConfig
from llm_jax.trainers.sft import SFTEvaluationConfig

LONGER = (PhaseConfig(length=32, batch=8, steps=16),)


@pytest.fixture(scope="module")
def trained(start, opened):
    """A run that learns to answer."""
    return opened(start(
        "sft", phases=LONGER,
        optimizer=OptimizerConfig(learning_rate=0.02, warmup_steps=0, schedule="constant"),
        evaluation=SFTEvaluationConfig(every=8, rows=8, answers=5, max_new_tokens=6),
    ))  # fmt: skip


def test_the_loss_of_held_out_answers_falls(trained):
    losses = trained.logged("eval/validation/loss")
    assert len(losses) == 3  # before the first step, at the interval, at the end
    assert losses[-1] < losses[0] - 1


def test_answers_are_generated_to_held_out_prompts(trained):
    """Five prompts: no number of devices but one divides them."""
    for key in ("exact_match", "token_f1", "finished"):
        values = trained.logged(f"eval/answers/{key}")
        assert len(values) == 3 and all(0 <= value <= 1 for value in values)
    assert max(trained.logged("eval/answers/sampling_logprob_difference")) < 1e-3


def test_the_result_says_where_it_comes_from(trained, pretrained, opened):
    assert trained.result["stage"] == "sft" and trained.result["parent"] == str(pretrained)
    (before,) = trained.result["lineage"]
    assert (before["stage"], before["run"], before["step"]) == ("pretrain", str(pretrained), 4)
    hashes, of_parent = trained.result["hashes"], opened(pretrained).result["hashes"]
    assert hashes["tokenizer"] == of_parent["tokenizer"] and hashes["data"] != of_parent["data"]


# Compiled for as many devices, answers and all.
@pytest.mark.slow
def test_answers_are_measured_on_many_devices(start, opened):
    run = opened(start(
        "sft", devices=8, phases=(PhaseConfig(length=32, batch=8, steps=1),),
        evaluation=SFTEvaluationConfig(every=1000, rows=8, answers=5, max_new_tokens=2),
    ))  # fmt: skip
    assert len(run.logged("eval/answers/exact_match")) == 2


def test_a_run_without_a_parent_starts_from_scratch(build):
    trainer, lines = build(
        "sft",
        init_from=None,
        model=ModelConfig(embed_dim=16, num_layers=1, num_heads=2, mlp_dim=24, max_length=64),
        tokenizer=TokenizerConfig(path="bytes"),
    )
    assert trainer.lineage == () and trainer.load_params is None
    assert not any("come from" in line for line in lines)


# --- resume ---------------------------------------------------------------------------------------


def stopping_at(step):
    """A source during whose batch the run is asked to stop."""
    real = OfflineSource.next

    def next_batch(source, params, current):
        if current == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(source, params, current)

    return mock.patch.object(OfflineSource, "next", next_batch)


@pytest.mark.slow
def test_a_killed_run_with_adapters_ends_bit_for_bit_as_if_it_had_not_been(
    start, configure, run_on, opened, killed_at, tmp_path
):
    """Dropout of adapters and of activations, noise on embeddings, and an average."""
    sections = {
        "model": ModelConfig(
            lora=LoraConfig(rank=2, dropout=0.2), residual_dropout=0.1, neftune_alpha=1.0
        ),
        "phases": (PhaseConfig(length=32, batch=8, steps=6),),
        "checkpoint": CheckpointConfig(every=2, keep_latest=10),
        "optimizer": OptimizerConfig(learning_rate=0.01, warmup_steps=2, ema_decay=0.5),
    }
    whole = opened(start("sft", **sections))
    config = configure("sft", **sections)
    with killed_at(3):
        run_on(1, config, tmp_path / "run")
    with stopping_at(4):
        assert run_on(1, config, tmp_path / "run") == 128 + signal.SIGTERM
    assert run_on(1, config, tmp_path / "run") == 0
    resumed = opened(tmp_path / "run")
    for item in ("params", "train"):
        found, expected = resumed.item(item), whole.item(item)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name].tobytes() == value.tobytes(), name
    assert resumed.result["hashes"] == whole.result["hashes"]
    assert resumed.result["lineage"] == whole.result["lineage"]
    assert resumed.logged("loss") == whole.logged("loss")


# --- the keys of the config -----------------------------------------------------------------------


def names(trainer):
    return [evaluation.name for evaluation in trainer.setting(trainer.phases[0]).evaluations]


def test_what_is_read_is_logged(build):
    _, lines = build("sft")
    assert any(line.startswith("chat: 3") and "trained on" in line for line in lines)


def test_every_component_has_its_evaluation_and_its_share(build, examples, corpus):
    data = ChatDataConfig(
        source=str(examples / "chats.jsonl"), validation_fraction=0.2,
        mixture=(NamedExampleConfig(source=str(examples / "pairs.jsonl"), name="pairs"),),
        replay_source=str(corpus), replay_share=0.5,
    )  # fmt: skip
    trainer, lines = build("sft", data=data)
    assert names(trainer) == ["validation", "validation_pairs", "validation_replay"]
    facts = trainer.setting(trainer.phases[0]).facts
    assert "mixture chat 0.25, pairs 0.25, replay 0.5" in facts
    assert any("replay: " in line for line in lines)
    assert set(trainer.phases[0].weights) == {"chat", "pairs", "replay"}


def test_answers_are_evaluated_where_there_are_some(build, corpus):
    few = SFTEvaluationConfig(every=1000, answers=2, max_new_tokens=2)
    assert names(build("sft", evaluation=few)[0]) == ["validation", "answers"]
    assert names(build("sft")[0]) == ["validation"]
    texts = ChatDataConfig(source=str(corpus), validation_fraction=0.2)
    assert names(build("sft", evaluation=few, data=texts)[0]) == ["validation"]
    # No prompt is left to answer where new tokens take all the room.
    crowded = SFTEvaluationConfig(every=1000, answers=2, max_new_tokens=155)
    model = ModelConfig(max_length=160)
    assert names(build("sft", evaluation=crowded, model=model)[0]) == ["validation"]


def test_rows_that_do_not_fit_are_a_fact_of_the_phase(build, examples):
    for too_long, told in [("drop", "left out"), ("truncate_left", "truncated")]:
        data = ChatDataConfig(
            source=str(examples / "chats.jsonl"), validation_fraction=0.2, too_long=too_long
        )
        # The answers red, green and blue make the rows unequally long.
        trainer, _ = build("sft", data=data, phases=(PhaseConfig(length=19, batch=8, steps=1),))
        facts = trainer.setting(trainer.phases[0]).facts
        assert any(fact.endswith(f"are longer than a row and {told}") for fact in facts)


def test_the_template_is_named_or_inherited(build, start, trained, examples):
    def of(trainer):
        return trainer.setting(trainer.phases[0]).meta["template"]

    def data(template=None):
        return ChatDataConfig(
            source=str(examples / "chats.jsonl"), validation_fraction=0.2, template=template
        )

    assert of(build("sft")[0]) == {"name": "chatml"}
    assert of(build("sft", data=data("llama2"))[0]) == {"name": "llama2"}
    other = start("sft", data=data("llama2"), phases=(PhaseConfig(length=48, batch=8, steps=1),))
    assert of(build("sft", init_from=str(other))[0]) == {"name": "llama2"}
    assert of(build("dpo", init_from=str(other))[0]) == {"name": "llama2"}
    assert of(build("sft", init_from=str(other), data=data("plain"))[0]) == {"name": "plain"}


def test_the_settings_of_the_loss_and_of_the_packing_decide_the_first_loss(
    build, first_loss, examples
):
    usual, metrics = first_loss(build("sft")[0])
    assert set(metrics) == {"accuracy"}
    chunked, _ = first_loss(build("sft", loss=LossConfig(chunk=16))[0])
    assert chunked == pytest.approx(usual, rel=1e-5)
    _, metrics = first_loss(build("sft", loss=LossConfig(z_loss=0.1))[0])
    assert metrics["cross_entropy"] == pytest.approx(usual, rel=1e-5) and metrics["z_loss"] > 0
    single = ChatDataConfig(
        source=str(examples / "chats.jsonl"), validation_fraction=0.2, packing="single"
    )
    assert first_loss(build("sft", data=single)[0])[0] != usual


def test_the_sample_is_a_question_and_its_answer(build, beginning):
    trainer, _ = build("sft", sample=SampleConfig(prompt="What is 3?", max_new_tokens=2))
    sample = trainer.setting(trainer.phases[0]).sample
    params, _ = beginning(trainer)
    assert sample(params).startswith("What is 3?\n") and sample(params) == sample(params)
    silent, _ = build("sft")
    assert silent.setting(silent.phases[0]).sample is None
