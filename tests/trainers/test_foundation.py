"""What a stage stands on: inherited or new, whole or adapted, and what it refuses."""

import dataclasses
from unittest import mock

import jax
import numpy as np
import pytest

from llm_jax import mesh as mesh_module
from llm_jax.data.phases import PhaseConfig
from llm_jax.errors import UserError
from llm_jax.mesh import MeshConfig, make_mesh
from llm_jax.models import lora
from llm_jax.models.config import ModelConfig
from llm_jax.models.lora import LoraConfig
from llm_jax.models.quantize import Quantized
from llm_jax.optim import OptimizerConfig
from llm_jax.runs import load_run
from llm_jax.step import StepConfig
from llm_jax.trainers import foundation, origin

ONE_STEP = (PhaseConfig(length=32, batch=8, steps=1),)
FROZEN = OptimizerConfig(learning_rate=0.0, warmup_steps=0)
QUICK = OptimizerConfig(learning_rate=0.02, warmup_steps=0, schedule="constant")
ADAPTERS = ModelConfig(lora=LoraConfig(rank=2, alpha=4.0))
PRODUCTS = MeshConfig(data=1, fsdp=2, tensor=2)
ROWS = MeshConfig(data=1, fsdp=2, context=2)


def by_path(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def meta(trainer):
    return trainer.setting(trainer.phases[0]).meta


# --- inheritance ----------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo"])
def test_architecture_tokenizer_and_parameters_come_from_the_parent(
    build, beginning, opened, pretrained, stage
):
    trainer, lines = build(
        stage, model=ModelConfig(embed_dim=64, num_heads=8, residual_dropout=0.1, max_length=90)
    )
    model = meta(trainer)["model"]
    assert (model["embed_dim"], model["num_heads"], model["mlp"]) == (16, 2, "gelu")
    assert (model["residual_dropout"], model["max_length"]) == (0.1, 90)  # what a run decides
    (line,) = [line for line in lines if "architecture and tokenizer come from" in line]
    assert line.endswith("config.model gives way in embed_dim, num_heads")
    assert trainer.tokenizer.kind == "bytes"
    params, _ = beginning(trainer)
    params.pop("reward_head", None)
    assert_equal(by_path(params), opened(pretrained).params)
    assert meta(trainer)["template"] == {"name": "chatml"} and meta(trainer)["stage"] == stage


def test_each_stage_adds_one_to_the_lineage(start, opened, pretrained):
    sft = start("sft", phases=ONE_STEP)
    runs = {
        stage: opened(start(stage, init_from=str(sft), phases=ONE_STEP))
        for stage in ("reward", "dpo")
    }
    for run in runs.values():
        lineage = [(entry["stage"], entry["run"], entry["step"]) for entry in run.result["lineage"]]
        assert lineage == [("pretrain", str(pretrained), 4), ("sft", str(sft), 1)]
        assert load_run(str(run.workdir)).meta["lineage"] == run.result["lineage"]
        assert run.result["parent"] == str(sft)
        hashes = run.result["hashes"], opened(pretrained).result["hashes"]
        assert hashes[0]["tokenizer"] == hashes[1]["tokenizer"]
    heads = {stage: "['reward_head']['kernel']" in run.params for stage, run in runs.items()}
    assert heads == {"reward": True, "dpo": False}


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_head_that_the_stage_has_no_use_for_is_refused(build, start, stage):
    rewards = start("reward", phases=ONE_STEP)
    with pytest.raises(UserError, match=rf"model with reward_head, and stage '{stage}' has no use"):
        build(stage, init_from=str(rewards))


def test_parameters_that_do_not_fit_are_one_clear_line():
    def abstract(**shapes):
        where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return {k: jax.ShapeDtypeStruct(s, np.float32, sharding=where) for k, s in shapes.items()}

    inherited = {"a": np.zeros((2, 3)), "b": np.zeros(4)}
    load = origin.load_inherited
    assert load(lambda: inherited, None, 0, abstract(a=(2, 3), b=(4,))) is inherited
    with pytest.raises(UserError, match=r"\['a'\] is \(2, 3\), and \(3, 2\) is wanted"):
        load(lambda: inherited, None, 0, abstract(a=(3, 2), b=(4,)))
    with pytest.raises(UserError, match=r"\['b'\] is \(4,\), and None is wanted"):
        load(lambda: inherited, None, 0, abstract(a=(2, 3)))


# --- adapters -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapted(start, opened):
    """A run that trained adapters."""
    return opened(start("sft", model=ADAPTERS, optimizer=QUICK))


def test_only_adapters_are_in_the_checkpoint(adapted):
    params = adapted.params
    assert params and all("['lora']" in name for name in params)
    assert any(np.any(value != 0) for name, value in params.items() if name.endswith("['b']"))
    moments = [name for name in adapted.item("train") if "embedding" in name or "kernel" in name]
    assert not moments


def test_a_loaded_run_is_the_base_bit_for_bit_with_its_adapters(adapted, pretrained, opened):
    run = load_run(str(adapted.workdir))
    adapters, base = lora.split(run.params)
    assert_equal(by_path(adapters), adapted.params)
    assert_equal(by_path(base), opened(pretrained).params)
    assert run.model.config.lora == ADAPTERS.lora
    assert run.meta["base"]["run"] == str(pretrained) and run.meta["base"]["step"] == 4


def test_adapters_begin_as_the_base(start, opened):
    whole, adapters = (
        opened(start("sft", model=model, phases=ONE_STEP, optimizer=FROZEN))
        for model in (ModelConfig(), ADAPTERS)
    )
    for key in ("eval/validation/loss", "loss"):
        assert adapters.logged(key) == pytest.approx(whole.logged(key), rel=1e-6)


def test_the_size_of_the_adapters_is_logged(build):
    _, lines = build("sft", model=ADAPTERS)
    assert any("parameters in adapters of 6,960 parameters" in line for line in lines)


@pytest.mark.parametrize("next_model", [ModelConfig(), ADAPTERS], ids=["whole", "adapters again"])
def test_a_stage_after_adapters_starts_from_them_merged(build, beginning, adapted, next_model):
    trainer, _ = build("sft", init_from=str(adapted.workdir), model=next_model)
    params = lora.split(beginning(trainer)[0])[1]
    run = load_run(str(adapted.workdir))
    merged = by_path(lora.merge(run.params, run.model.config))
    found = by_path(params)
    assert found.keys() == merged.keys()
    for name, value in merged.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6, atol=1e-7, err_msg=name)
    assert [entry["stage"] for entry in meta(trainer)["lineage"]] == ["pretrain", "sft"]


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_quantised_base_is_trained_on_and_read_back(start, opened, kind):
    run = opened(start("sft", model=ADAPTERS, quantize_base=kind, phases=ONE_STEP))
    assert all("['lora']" in name for name in run.params)
    loaded = load_run(str(run.workdir))
    assert loaded.meta["base"]["quantized"] == kind
    kernels = jax.tree.leaves(loaded.params, is_leaf=lambda x: isinstance(x, Quantized))
    assert any(isinstance(kernel, Quantized) for kernel in kernels)
    assert np.isfinite(run.logged("eval/validation/loss")).all()


def test_dora_learns_magnitudes_beside_the_rest(start, opened):
    model = ModelConfig(lora=dataclasses.replace(ADAPTERS.lora, dora=True))
    run = opened(start("sft", model=model, phases=ONE_STEP))
    assert any(name.endswith("['magnitude']") for name in run.params)
    assert load_run(str(run.workdir)).model.config.lora.dora


@pytest.mark.parametrize(("stage", "sections", "mesh"), [
    ("sft", {"model": ADAPTERS, "quantize_base": "int8"}, PRODUCTS),
    ("reward", {"model": ADAPTERS}, PRODUCTS),
    ("dpo", {}, PRODUCTS),
    ("sft", {}, ROWS),
], ids=["sft", "reward", "dpo", "sft with rows in parts"])  # fmt: skip
def test_the_mesh_changes_nothing_but_the_rounding(start, opened, stage, sections, mesh):
    sections = {**sections, "optimizer": QUICK}
    single = opened(start(stage, **sections))
    divided = opened(start(stage, devices=4, mesh=mesh, **sections))
    np.testing.assert_allclose(divided.logged("loss"), single.logged("loss"), rtol=1e-4)
    key = "accuracy" if stage == "reward" else "loss"
    found, wanted = (run.logged(f"eval/validation/{key}") for run in (divided, single))
    assert len(found) == 2 and found == pytest.approx(wanted, rel=1e-3)
    assert divided.result["hashes"]["data"] == single.result["hashes"]["data"]


@pytest.mark.parametrize(("sections", "message"), [
    ({"model": ADAPTERS, "init_from": None}, r"model\.lora adapts a trained model: name its run"),
    ({"quantize_base": "int8"}, r"quantize_base needs config\.model\.lora"),
    ({"init_from": "nowhere"}, "nowhere is no run directory"),
    ({"model": ModelConfig(lora=LoraConfig(targets=("nothing",)))}, "nothing"),
    ({"phases": (PhaseConfig(length=999, batch=8, steps=1),), "model": ModelConfig(max_length=64)},
     "length 999 is past the positions"),
    ({"step": StepConfig(parameter_dtype="bfloat16")},
     r"parameter_dtype='bfloat16' .* model\.dtype='float32' .*: set config\.model\.dtype"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_in_one_line(build, sections, message):
    with pytest.raises(UserError, match=message) as caught:
        build("sft", **sections)
    assert "\n" not in str(caught.value)


def test_a_length_that_the_context_axis_does_not_cut_is_refused(build):
    mesh = make_mesh(MeshConfig(data=1, context=4), jax.devices()[:4])
    phases = (PhaseConfig(length=30, batch=8, steps=1),)
    with pytest.raises(UserError, match=r"length 30 is not a multiple of 8, .* make it 24 or 32"):
        build("sft", mesh=mesh, phases=phases)


@pytest.mark.parametrize("sections, setting", [
    ({"optimizer": OptimizerConfig(offload=True)}, r"config\.optimizer\.offload"),
    ({"model": ModelConfig(remat="offload")}, r"config\.model\.remat='offload'"),
])  # fmt: skip
def test_devices_that_reach_no_host_memory_are_told_before_anything_is_compiled(
    build, sections, setting
):
    memories = [mock.Mock(kind="device")]
    device = mock.Mock(addressable_memories=lambda: memories, platform="cpu")
    far = mock.Mock(devices=np.array([device]))
    real = mesh_module.require_host_memory
    with (
        mock.patch.object(foundation, "require_host_memory", lambda _, name: real(far, name)),
        pytest.raises(UserError, match=f"{setting} needs host memory .* cpu devices reach none"),
    ):
        build("sft", **sections)
