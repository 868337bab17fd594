"""Meshes for clusters: they divide, fit, keep to the rules, and are the known good ones."""

import dataclasses
import functools
import math
from unittest import mock

import jax
import pytest

from llm_jax import sharding
from llm_jax.config import build
from llm_jax.errors import UserError
from llm_jax.interop.plan import plan
from llm_jax.main import parse
from llm_jax.mesh import MESH_AXES, make_abstract_mesh
from llm_jax.models import LanguageModel
from llm_jax.models.presets import PUBLISHED
from llm_jax.scaling import planner
from llm_jax.scaling.divisibility import check_mesh, divides
from llm_jax.scaling.planner import MEMORY_SHARE, Job, MeshPlan, meshes, plan_mesh
from llm_jax.scaling.presets import find_cluster
from llm_jax.scaling.step_time import crosses_slices, step_time
from llm_jax.trainers.pretrain import PretrainConfig

# Heads, experts, patterns that do not repeat, a vocabulary that does not split.
SAMPLE = ("gpt2", "llama2-7b", "qwen3-30b-a3b", "gemma3-4b")
CLUSTERS = ("v5e-16", "v5e-256", "v5p-128", "tpu7x-32", "2xv6e-64", "h100x8", "h100x64")


def job_of(name, length=None, batch=None):
    model = PUBLISHED[name]
    model = dataclasses.replace(
        model, dtype="bfloat16", remat="full",
        scan_layers=model.num_layers % len(model.windows) == 0,
    )  # fmt: skip
    length = length or min(4096, model.max_length)
    return Job(model, length, batch or 2**20 // length, chunk=512)


def sizes(mesh):
    return {axis: getattr(mesh, axis) for axis in MESH_AXES if getattr(mesh, axis) > 1}


@functools.cache
def boxed_of(model):
    return jax.eval_shape(LanguageModel(model).init, jax.random.key(0))


def check(job, cluster, found):
    """What any plan promises."""
    mesh = found.mesh
    assert math.prod(getattr(mesh, axis) for axis in MESH_AXES) == cluster.devices
    check_mesh(job.model, mesh, job.length, job.batch)
    abstract_mesh = make_abstract_mesh(mesh)
    sharding.parameter_shardings(abstract_mesh, boxed_of(job.model))
    rows, rest = divmod(job.batch, sharding.batch_shards(abstract_mesh))
    assert not rest and rows % found.micro_batches == 0
    assert found.memory.peak <= MEMORY_SHARE * cluster.chip.device_usable
    assert found.memory.state["parameters"] == plan(job.model, mesh).float32_bytes
    for axis in ("expert", "context", "tensor"):
        assert not crosses_slices(axis, mesh, cluster)
    if cluster.chip.torus:
        assert not crosses_slices("fsdp", mesh, cluster)
    for axis in sizes(mesh):
        assert any(line.startswith(f"{axis} ") for line in found.reasons())


def try_plan(job, cluster):
    """The plan, or None where the planner says clearly that there is none."""
    try:
        found = plan_mesh(job, cluster)
    except UserError as error:
        assert any(w in str(error) for w in ("smallest that does", "no larger one", "no mesh of"))
        return None
    check(job, cluster, found)
    return found


@pytest.mark.parametrize("name", SAMPLE)
def test_plans_divide_and_fit(name):
    found = [try_plan(job_of(name), find_cluster(cluster)) for cluster in ("v5e-16", "h100x64")]
    assert any(found)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(PUBLISHED)[::8])
def test_plans_of_published_models_divide_and_fit(name):
    found = [try_plan(job_of(name), find_cluster(cluster)) for cluster in CLUSTERS]
    assert any(found), name


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_model_has_meshes_that_divide(name):
    job = job_of(name)
    for cluster in map(find_cluster, ("v5e-16", "h100x8")):
        found = list(meshes(job, cluster))
        assert found
        for mesh in found[:: max(1, len(found) // 5)]:
            assert divides(job.model, mesh, job.length, job.batch)


# --- known good choices ---------------------------------------------------------------------------


def test_seven_billion_on_sixteen_chips_is_fsdp_alone():
    found = plan_mesh(job_of("llama2-7b", 4096, 128), find_cluster("v5e-16"))
    assert sizes(found.mesh) == {"fsdp": 16}
    assert found.micro_batches == 4 and found.micro_batch_tokens == 8192
    text = "\n".join(found.reasons())
    assert "less than the arithmetic" in text and "micro_batch_tokens=8,192" in text


def test_405_billion_with_few_tokens_a_chip_is_fsdp_and_tensor():
    """Rows alone do not fill the chips, and parameters are gathered for too few tokens."""
    found = plan_mesh(job_of("llama3.1-405b", 8192, 256), find_cluster("v5p-2048"))
    assert set(sizes(found.mesh)) <= {"fsdp", "tensor", "context"}
    assert found.mesh.fsdp >= 128 and found.mesh.tensor * found.mesh.context >= 4


def test_long_rows_are_cut():
    found = plan_mesh(job_of("llama3.1-8b", 131_072, 8), find_cluster("v5p-128"))
    assert found.mesh.context > 1 and found.mesh.fsdp == 8
    assert "131,072 tokens are cut" in "\n".join(found.reasons())


def test_slices_have_copies_and_nodes_too_where_they_fit():
    found = plan_mesh(job_of("llama2-7b", 4096, 512), find_cluster("2xv5e-64"))
    assert found.mesh.data % 2 == 0 and found.mesh.fsdp <= 64
    assert "between slices" in "\n".join(found.reasons())


def test_parameters_are_gathered_inside_a_slice_and_across_nodes():
    def crossing(axis, cluster):
        job = job_of("llama2-7b", 4096, 64)
        return any(crosses_slices(axis, mesh, cluster) for mesh in meshes(job, cluster))

    slices, nodes = find_cluster("2xv5e-16"), find_cluster("h100x16")
    assert not crossing("fsdp", slices) and crossing("fsdp", nodes)
    for cluster in (slices, nodes):
        assert crossing("data", cluster) and crossing("stage", cluster)
        assert not crossing("tensor", cluster) and not crossing("context", cluster)


def test_a_model_past_the_memory_is_told_how_many_chips_do():
    with pytest.raises(UserError, match=r"does not fit v5e-4 .*; v5e-16 \(16 chips\) is the small"):
        plan_mesh(job_of("llama2-7b", 4096, 128), find_cluster("v5e-4"))
    with pytest.raises(UserError, match="no larger one does either"):
        plan_mesh(job_of("llama3.1-405b", 4096, 4), find_cluster("v5e-4"))
    with pytest.raises(UserError, match=r"no mesh of v5e-16 divides .* a batch of 3 rows"):
        plan_mesh(job_of("gpt2", 1001, 3), find_cluster("v5e-16"))


def test_meshes_that_split_too_little_are_passed_over():
    """Stages alone leave an embedding whole that is most of the model: the rules refuse that."""
    job, cluster = job_of("gemma3-1b", 1024, 64), find_cluster("h100x16")
    model = dataclasses.replace(job.model, num_layers=24, scan_layers=True)
    job = dataclasses.replace(job, model=model)
    stages = [m for m in meshes(job, cluster) if sizes(m).keys() == {"stage", "data"}]
    assert stages
    with pytest.raises(UserError, match="replicated"):
        plan(model, stages[0])
    ranked = sorted(planner._ranked(job, cluster), key=lambda candidate: candidate[0] != stages[0])
    with mock.patch.object(planner, "_ranked", lambda *_: ranked):
        check(job, cluster, plan_mesh(job, cluster))


# --- the time of a step ---------------------------------------------------------------------------


def test_arithmetic_and_links_by_hand():
    """7B on 16 v5e: FLOPs over the peak; parameters gathered twice in 2 bytes and reduced once in
    4, 15/16 of them from the others, over both axes of the torus, each both ways."""
    job, cluster = job_of("llama2-7b", 4096, 128), find_cluster("v5e-16")
    found = plan_mesh(job, cluster)
    time = step_time(job.model, found.mesh, cluster, length=4096, batch=128, micro_batches=1)
    assert time.links["fsdp"] == pytest.approx(8 * 6_738_415_616 * 15 / 16 / (2 * 2 * 50e9))
    assert time.arithmetic == pytest.approx(6 * 6.74e9 * 128 * 4096 / (16 * 197e12), rel=0.1)
    assert time.total == time.arithmetic and not time.bubble
    again = step_time(job.model, found.mesh, cluster, length=4096, batch=128, micro_batches=4)
    assert again.links["fsdp"] == 4 * time.links["fsdp"]


def test_fsdp_hides_above_the_rule_of_the_book():
    """Compute-bound while a device has more tokens than FLOPs in the time of a byte, over the axes
    of the torus (2,550 / 3 for v5p with the book's links), for gathers and gradients in 2 bytes;
    here gradients travel in 4, which asks for a third more."""
    cluster = find_cluster("v5p-128")
    rule = 4 / 3 * cluster.chip.intensity / 3
    hidden = {}
    for tokens in (int(0.8 * rule) // 64 * 64, int(1.3 * rule) // 64 * 64):
        job = job_of("llama2-70b", tokens, 64)
        mesh = next(m for m in meshes(job, cluster) if m.fsdp == 64)
        time = step_time(job.model, mesh, cluster, length=tokens, batch=64)
        hidden[tokens] = time.hidden < time.arithmetic
    assert list(hidden.values()) == [False, True]


def test_stages_wait():
    job, cluster = job_of("llama2-7b", 4096, 128), find_cluster("h100x16")
    mesh = next(m for m in meshes(job, cluster) if sizes(m) == {"stage": 4, "fsdp": 4})
    time = step_time(job.model, mesh, cluster, length=4096, batch=128, micro_batches=2)
    assert time.bubble == pytest.approx(3 / (2 * 4 + 3))


def test_a_second_forward_pass_sends_its_activations_again():
    job, cluster = job_of("llama2-7b", 4096, 128), find_cluster("v5e-16")
    mesh = next(m for m in meshes(job, cluster) if sizes(m) == {"fsdp": 8, "tensor": 2})
    links = {}
    for remat in ("none", "save_qkv_attention", "full", "offload"):
        model = dataclasses.replace(job.model, remat=remat)
        links[remat] = step_time(model, mesh, cluster, length=4096, batch=128).links["tensor"]
    assert links["full"] == links["offload"] == pytest.approx(4 / 3 * links["none"])
    assert links["save_qkv_attention"] == links["none"]


# --- in configs -----------------------------------------------------------------------------------


def test_a_config_takes_its_mesh_from_a_cluster(capsys):
    config, _ = parse(["main", "--config=configs/pretrain.py:size=llama2-7b,mesh=v5e-16"])
    settings = build(PretrainConfig, config)
    assert sizes(settings.mesh) == {"fsdp": 16} and settings.mesh.data == 1
    assert settings.step.micro_batch_tokens == 8192
    told = capsys.readouterr().out
    assert told.count("v5e-16: 16 devices of v5e, fsdp 16") == 1
    with pytest.raises(UserError, match=r"there is no cluster 'v5e-15'\. Known: v5e-1, v5e-4"):
        parse(["main", "--config=configs/pretrain.py:size=llama2-7b,mesh=v5e-15"])


def test_a_plan_is_a_value():
    assert isinstance(plan_mesh(job_of("gpt2"), find_cluster("v5e-16")), MeshPlan)
