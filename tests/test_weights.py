"""Weights of runs: their fingerprint, and finding the base that adapters belong to."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import checkpoint, config, weights
from llm_jax.checkpoint import CheckpointConfig
from llm_jax.data.chat_corpus import ChatDataConfig
from llm_jax.data.phases import PhaseConfig
from llm_jax.errors import UserError
from llm_jax.mesh import MeshConfig, make_mesh
from llm_jax.metrics import MetricsConfig
from llm_jax.models import lora
from llm_jax.models.config import ModelConfig
from llm_jax.models.lora import LoraConfig
from llm_jax.optim import OptimizerConfig
from llm_jax.sharding import unbox
from llm_jax.stored import at
from llm_jax.trainers.base import SampleConfig
from llm_jax.trainers.sft import SFTConfig, SFTEvaluationConfig

TINY = ModelConfig(
    vocab_size=64, embed_dim=16, num_layers=1, num_heads=2, mlp_dim=24, max_length=64
)


def make(heads=(), seed=0, model=TINY):
    return unbox(weights.init_weights(model, heads, jax.random.key(seed)))


# --- the fingerprint ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tree():
    return jax.device_get(make())


def test_the_fingerprint_is_the_same_on_every_mesh(tree):
    single = weights.fingerprint(tree)
    boxed = jax.eval_shape(lambda rng: weights.init_weights(TINY, (), rng), jax.random.key(0))
    for mesh_config in (MeshConfig(), MeshConfig(data=1, fsdp=4, tensor=2)):
        mesh = make_mesh(mesh_config)
        where = jax.tree.map(lambda x: x.sharding, weights.abstract(mesh, boxed))
        assert weights.fingerprint(jax.device_put(tree, where)) == single


def changed(tree, function):
    """The tree with one leaf changed."""
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, [function(leaves[0].copy()), *leaves[1:]])


def with_bit(leaf, bit, place=5):
    leaf.reshape(-1)[place : place + 1].view(np.uint32)[...] ^= np.uint32(1) << np.uint32(bit)
    return leaf


@pytest.mark.parametrize("bit", [0, 1, 15, 22, 31])
def test_one_bit_of_one_weight_changes_the_fingerprint(tree, bit):
    other = changed(tree, lambda leaf: with_bit(leaf, bit))
    assert weights.fingerprint(other) != weights.fingerprint(tree)


def test_order_names_and_shapes_change_the_fingerprint(tree):
    def swapped(leaf):
        leaf[[3, 4]] = leaf[[4, 3]]
        return leaf

    prints = [
        weights.fingerprint(t)
        for t in (
            tree,
            changed(tree, swapped),
            changed(tree, lambda leaf: leaf.reshape(-1, 2)),
            changed(tree, lambda leaf: leaf.astype(jnp.bfloat16)),
            {"embeddings" if k == "embedding" else k: v for k, v in tree.items()},
            {**tree, "more": np.zeros(1, np.float32)},
        )
    ]
    assert len(set(prints)) == len(prints)


# --- fresh weights --------------------------------------------------------------------------------


def test_a_head_is_one_more_kernel():
    whole = make(("reward_head",))
    assert whole.keys() - make().keys() == {"reward_head"}
    assert weights.without_heads(whole).keys() == make().keys()


def test_the_rest_does_not_see_whether_the_model_will_have_adapters(tree):
    config = ModelConfig(**{**vars(TINY), "lora": LoraConfig(rank=2)})
    jax.tree.map(np.testing.assert_array_equal, tree, jax.device_get(make(model=config)))


# --- adapters and their base ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tiny_config, run_on, tmp_path_factory):
    """A pre-training run of two steps in a folder of its own."""
    workdir = tmp_path_factory.mktemp("runs") / "base"
    run_config = tiny_config(
        model=ModelConfig(embed_dim=16, num_layers=1, num_heads=2, mlp_dim=24, max_length=64),
        phases=(PhaseConfig(length=32, batch=8, steps=2),),
    )
    assert run_on(1, run_config, workdir) == 0
    return workdir


def adapt(base, run_on, chats, workdir):
    settings = config.defaults(
        SFTConfig,
        init_from=str(base),
        model=ModelConfig(lora=LoraConfig(rank=2, alpha=4.0)),
        data=ChatDataConfig(source=str(chats), validation_fraction=0.2),
        phases=(PhaseConfig(length=32, batch=8, steps=2),),
        optimizer=OptimizerConfig(learning_rate=0.02, warmup_steps=0, schedule="constant"),
        evaluation=SFTEvaluationConfig(every=1000, rows=8, answers=0, at_start=False),
        checkpoint=CheckpointConfig(every=1000),
        metrics=MetricsConfig(every=1, tensorboard=False),
        sample=SampleConfig(max_new_tokens=0),
    )
    assert run_on(1, settings, workdir) == 0
    return workdir


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    rows = [{"prompt": f"ask {i}", "completion": f"say {i % 3}"} for i in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def adapted(base, run_on, chats):
    """A run with adapters beside its base."""
    return adapt(base, run_on, chats, base.parent / "adapted")


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(), jax.devices()[:1])


def test_all_weights_of_a_run_with_adapters(base, adapted, mesh):
    whole, read = (at(run, 2).read(mesh) for run in (base, adapted))
    assert at(base, 2).model.lora is None and at(adapted, 2).model.lora.rank == 2
    adapters, frozen = lora.split(read)
    jax.tree.map(np.testing.assert_array_equal, frozen, whole)
    assert jax.tree.leaves(adapters)
    with pytest.raises(UserError, match="cannot be read"):
        at(base, 1).read(mesh)


def test_merged_weights_have_the_adapters_in_their_kernels(base, adapted, mesh):
    read, whole = at(adapted, 2).read(mesh), at(base, 2).read(mesh)
    merged, _ = at(adapted, 2).read_merged(mesh)
    assert jax.tree.structure(merged) == jax.tree.structure(whole)
    up, adapter = whole["layer_0"]["mlp"]["down"], read["layer_0"]["mlp"]["down"]["lora"]
    (parts,) = adapter.values()
    delta = at(adapted, 2).model.lora.scale * np.asarray(parts["a"]) @ np.asarray(parts["b"])
    np.testing.assert_allclose(
        merged["layer_0"]["mlp"]["down"]["kernel"], np.asarray(up["kernel"]) + delta, atol=1e-6
    )
    # Without adapters there is nothing to merge.
    jax.tree.map(np.testing.assert_array_equal, at(base, 2).read_merged(mesh)[0], whole)


def test_the_identity_of_adapted_weights_is_the_same_on_every_mesh(base, adapted):
    meta = {run: checkpoint.read_meta(run, 2) for run in (base, adapted)}
    for run in (base, adapted):
        identities = set()
        for mesh_config, count in (
            (MeshConfig(), 1),
            (MeshConfig(1, 4, 1), 4),
            (MeshConfig(1, 1, 2), 2),
        ):
            there = make_mesh(mesh_config, jax.devices()[:count])
            read = at(run, 2).read(there)
            identities.add(weights.identify(meta[run], read))
            assert at(run, 2).read_merged(there)[1] in identities
        assert len(identities) == 1
    assert weights.identify(meta[base], at(base, 2).read(there)) not in identities


@pytest.fixture
def moved(base, adapted, tmp_path):
    """`moved(*names)`: copies of the runs in another folder, the originals out of the way."""
    away = base.parent.with_name("away")

    def make(*names):
        for name in names:
            shutil.copytree(base.parent / name, tmp_path / name)
        base.parent.rename(away)
        return tmp_path / "adapted"

    yield make
    if away.exists():
        away.rename(base.parent)


def test_a_base_that_moved_along_is_found(moved, mesh, adapted):
    expected = at(adapted, 2).read(mesh)
    run = moved("base", "adapted")
    jax.tree.map(np.testing.assert_array_equal, at(run, 2).read(mesh), expected)


def test_a_base_that_is_gone_is_one_clear_line(moved, mesh, base):
    with pytest.raises(UserError) as caught:
        at(moved("adapted"), 2).read(mesh)
    message = str(caught.value)
    assert f"belong to {base}, which is not there: put it back, or beside" in message
    assert "\n" not in message


def test_a_base_that_has_changed_is_refused(moved, mesh, run_on, tiny_config, tmp_path):
    run = moved("adapted")
    other = tiny_config(
        model=ModelConfig(embed_dim=16, num_layers=1, num_heads=2, mlp_dim=24, max_length=64),
        phases=(PhaseConfig(length=32, batch=8, steps=2),),
        seed=1,
    )
    assert run_on(1, other, tmp_path / "base") == 0
    with pytest.raises(UserError, match=r"belong to another base than .*: its weights have chang"):
        at(run, 2).read(mesh)


def test_a_folder_may_have_an_at_sign_in_its_name(base, adapted, run_on, chats, tmp_path, mesh):
    folder = tmp_path / "me@home"
    shutil.copytree(base, folder / "base")
    run = adapt(folder / "base", run_on, chats, folder / "adapted")
    assert checkpoint.locate(f"{folder / 'base'}@2") == (folder / "base", 2)
    assert jax.tree.leaves(at(run, 2).read(mesh))
