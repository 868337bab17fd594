"""Preference optimisation: its reference, its variants, its cache, and what it refuses."""

import math
import os
import shutil
import signal
from unittest import mock

import jax
import numpy as np
import pytest

from llm_jax.data.offline import OfflineSource
from llm_jax.data.phases import PhaseConfig
from llm_jax.data.preferences import PreferenceDataConfig
from llm_jax.data.tokenizers import TokenizerConfig
from llm_jax.errors import UserError
from llm_jax.mesh import MeshConfig, make_mesh
from llm_jax.models.config import ModelConfig
from llm_jax.models.lora import LoraConfig
from llm_jax.objectives.dpo import VARIANTS, LossConfig
from llm_jax.optim import OptimizerConfig
from llm_jax.step import StepConfig
from llm_jax.trainers.reference import Reference

QUICK = OptimizerConfig(learning_rate=0.02, warmup_steps=0, schedule="constant")
ADAPTERS = ModelConfig(lora=LoraConfig(rank=2))


@pytest.fixture(scope="module")
def trained(start, opened):
    """A run that learns to prefer."""
    return opened(start("dpo", phases=(PhaseConfig(length=32, batch=8, steps=6),), optimizer=QUICK))


def test_before_the_first_step_policy_and_reference_are_one(trained):
    def first(key):
        return trained.logged(f"eval/validation/{key}")[0]

    assert first("loss") == pytest.approx(math.log(2), abs=1e-5)
    for key in ("rewards/margins", "rewards/chosen", "rewards/rejected"):
        assert first(key) == pytest.approx(0, abs=1e-5)
    assert trained.logged("loss")[0] == pytest.approx(math.log(2), abs=1e-5)


def test_it_learns_which_answer_is_better(trained):
    losses = trained.logged("eval/validation/loss")
    assert losses[-1] < 0.8 * losses[0]
    assert trained.logged("eval/validation/rewards/accuracies")[-1] > 0.8
    assert trained.result["stage"] == "dpo"


def test_a_reference_in_every_step_equals_one_computed_before(start, opened):
    runs = [
        opened(start("dpo", model=ADAPTERS, loss=LossConfig(reference=reference), optimizer=QUICK))
        for reference in ("adapter_off", "precomputed")
    ]
    for key in ("loss", "rewards/margins", "rewards/chosen", "eval/validation/loss"):
        np.testing.assert_allclose(runs[0].logged(key), runs[1].logged(key), atol=2e-5)
    assert runs[0].logged("eval/validation/loss")[0] == pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_the_reference_of_a_quantised_base_is_that_base(build, first_loss, kind):
    """So that the policy begins as its reference, whichever way that is computed."""
    for reference in ("adapter_off", "precomputed"):
        trainer, _ = build(
            "dpo", model=ADAPTERS, quantize_base=kind, loss=LossConfig(reference=reference)
        )
        loss, metrics = first_loss(trainer)
        assert loss == pytest.approx(math.log(2), abs=1e-5), reference
        assert metrics["rewards/margins"] == pytest.approx(0, abs=1e-5)


# --- the cache of the reference -------------------------------------------------------------------


def data(examples, cache, name="pairs.jsonl", **settings):
    return PreferenceDataConfig(
        source=str(examples / name), validation_fraction=0.2, cache_dir=str(cache), **settings
    )


def computed(lines):
    """How many times the reference was asked."""
    return sum("under the reference" in line for line in lines)


def cached(cache):
    return {path.name for path in (cache / "reference").iterdir()}


def test_the_reference_is_asked_once(build, beginning, examples, tmp_path):
    batches, counts = [], []
    for _ in range(2):
        trainer, lines = build("dpo", data=data(examples, tmp_path))
        batches.append(jax.device_get(beginning(trainer)[1]))
        counts.append(computed(lines))
    assert counts == [2, 0]  # of training and validation rows, then of none
    jax.tree.map(np.testing.assert_array_equal, *batches)
    assert all(batches[0].reference_logprobs.ravel() < 0)
    assert len(cached(tmp_path)) == 2
    assert all(name.endswith(".npy") and "partial" not in name for name in cached(tmp_path))


def test_other_weights_or_other_sequences_have_a_reference_of_their_own(
    build, examples, trained, tmp_path
):
    usual = {"data": data(examples, tmp_path)}
    build("dpo", **usual)
    for changed in (
        {"init_from": str(trained.workdir)},
        {"phases": (PhaseConfig(length=24, batch=8, steps=1),)},
        {"data": data(examples, tmp_path, "ranked.jsonl")},
        {"data": data(examples, tmp_path, template="llama2")},
        {"loss": LossConfig(variant="kto")},
    ):
        before = cached(tmp_path)
        _, lines = build("dpo", **usual | changed)
        assert computed(lines) == 2 and len(cached(tmp_path) - before) == 2
    for same in ({"loss": LossConfig(variant="ipo", beta=0.3)}, {"seed": 5}, {"model": ADAPTERS}):
        assert computed(build("dpo", **usual | same)[1]) == 0


class Stopping:
    """Asks the run to stop during the batch of one step."""

    def __init__(self, step):
        real = OfflineSource.next

        def next_batch(source, params, current):
            if current == step:
                os.kill(os.getpid(), signal.SIGTERM)
            return real(source, params, current)

        self.patch = mock.patch.object(OfflineSource, "next", next_batch)


def test_a_resumed_run_needs_its_parent_no_more(
    configure, run_on, start, opened, pretrained, trained, tmp_path
):
    parent = tmp_path / "parent"
    shutil.copytree(pretrained, parent)
    sections = {"init_from": str(parent), "optimizer": QUICK,
                "phases": (PhaseConfig(length=32, batch=8, steps=6),)}  # fmt: skip
    config = configure("dpo", **sections)
    with Stopping(2).patch:
        assert run_on(1, config, tmp_path / "run") == 128 + signal.SIGTERM
    shutil.rmtree(parent)
    with mock.patch.object(Reference, "_read", None):  # calling it would fail
        assert run_on(1, config, tmp_path / "run") == 0
    found, expected = opened(tmp_path / "run").params, trained.params
    for name, value in expected.items():
        assert found[name].tobytes() == value.tobytes(), name


# --- the variants ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_has_a_finite_loss_and_gradient(build, beginning, examples, name):
    """On pairs, or on unpaired answers where the variant wants those."""
    variant = VARIANTS[name]
    source = "unpaired.jsonl" if variant.unpaired else "pairs.jsonl"
    settings = PreferenceDataConfig(source=str(examples / source), validation_fraction=0.2)
    loss = LossConfig(variant=name, label_smoothing=0.1 if name == "exo_pair" else 0.0)
    trainer, _ = build("dpo", data=settings, loss=loss)
    params, batch = beginning(trainer)
    assert (batch.reference_logprobs is not None) == variant.needs_reference
    setting = trainer.setting(trainer.phases[0])

    def total(params, batch):
        loss, metrics = setting.objective(params, batch, jax.random.key(0))
        return loss.total, (loss.count, metrics)

    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        step = jax.jit(jax.value_and_grad(total, has_aux=True))
        (value, (count, metrics)), gradient = step(params, batch)
    assert count == 8 and all(
        np.isfinite(leaf).all() for leaf in jax.tree.leaves((value, metrics, gradient))
    )
    assert any(np.any(np.asarray(leaf) != 0) for leaf in jax.tree.leaves(gradient))


def test_unpaired_answers_are_trained_on(start, opened, examples):
    settings = PreferenceDataConfig(
        source=str(examples / "unpaired.jsonl"), validation_fraction=0.2
    )
    phases = (PhaseConfig(length=32, batch=8, steps=8),)
    run = opened(
        start(
            "dpo",
            data=settings,
            loss=LossConfig(variant="kto"),
            phases=phases,
            optimizer=QUICK,
        )
    )
    losses = run.logged("eval/validation/loss")
    assert losses[0] == pytest.approx(0.5, abs=1e-5) and losses[-1] < losses[0]
    assert run.logged("kl")


def test_a_variant_without_a_reference_asks_for_none(build):
    scratch = {
        "init_from": None,
        "model": ModelConfig(embed_dim=16, num_layers=1, num_heads=2, mlp_dim=24, max_length=64),
        "tokenizer": TokenizerConfig(path="bytes"),
    }
    trainer, lines = build("dpo", loss=LossConfig(variant="simpo"), **scratch)
    assert not computed(lines)
    assert "reference" not in trainer.setting(trainer.phases[0]).meta
    with pytest.raises(UserError, match=r"variant='ipo' compares with the model.*init_from"):
        build("dpo", loss=LossConfig(variant="ipo"), **scratch)


def test_the_constants_of_the_loss_decide_it(build, first_loss):
    def loss(**settings):
        return first_loss(build("dpo", loss=LossConfig(variant="ipo_summed", **settings))[0])[0]

    usual = loss()
    assert loss(beta=0.5) < usual < loss(sft_weight=1.0)
    assert loss(chunk=16) == pytest.approx(usual, rel=1e-4)


def test_variants_that_compare_the_rows_of_a_batch_see_it_whole(build):
    phases = (PhaseConfig(length=32, batch=32, steps=1),)
    parts = {}
    for name in ("sigmoid", "aot", "kto"):
        trainer, _ = build("dpo", loss=LossConfig(variant=name), phases=phases)
        parts[name] = trainer.setting(trainer.phases[0]).micro_batches
    assert parts["sigmoid"] > parts["aot"] == parts["kto"] == 1


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n, variant in VARIANTS.items() if variant.whole_batch])
def test_variants_of_a_whole_batch_refuse_to_cut_it(build, name):
    with pytest.raises(UserError, match=rf"variant='{name}'.*micro_batch_tokens must be left out"):
        build("dpo", loss=LossConfig(variant=name), step=StepConfig(micro_batch_tokens=32))


def test_adapters_cannot_be_off_where_there_are_none(build):
    with pytest.raises(UserError, match=r"reference='adapter_off' needs config\.model\.lora"):
        build("dpo", loss=LossConfig(reference="adapter_off"))


@pytest.mark.parametrize("variant", ["sigmoid", "kto"])
def test_a_reference_needs_a_run_to_start_from(build, variant):
    with pytest.raises(UserError, match=r"name its run by config\.init_from"):
        build("dpo", init_from=None, loss=LossConfig(variant=variant))
