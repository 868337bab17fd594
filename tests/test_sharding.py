"""The rule table: what maps where, what is refused, and the shardings of optimiser states."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from llm_jax import optim, sharding, step
from llm_jax.errors import UserError
from llm_jax.mesh import MESH_AXES, MeshConfig, make_mesh
from llm_jax.models import LanguageModel, ModelConfig
from llm_jax.optim import OptimizerConfig
from llm_jax.sharding import Named, spec


def box(shape, *names):
    return Named(jax.ShapeDtypeStruct(shape, jnp.float32), names)


# --- the mesh -------------------------------------------------------------------------------------


@pytest.mark.parametrize("config, shape", [
    (MeshConfig(), (1, 8, 1, 1, 1, 1)),
    (MeshConfig(fsdp=2), (1, 4, 2, 1, 1, 1)),
    (MeshConfig(data=1, fsdp=-1, tensor=2), (1, 1, 4, 1, 1, 2)),
    (MeshConfig(2, 2, 2), (1, 2, 2, 1, 1, 2)),
    (MeshConfig(data=1, tensor=2, expert=-1), (1, 1, 1, 4, 1, 2)),
    (MeshConfig(data=1, context=4, stage=2), (2, 1, 1, 1, 4, 1)),
])  # fmt: skip
def test_one_axis_takes_the_rest_of_the_devices(config, shape):
    mesh = make_mesh(config)
    assert tuple(mesh.shape.values()) == shape
    assert mesh.axis_names == MESH_AXES


@pytest.mark.parametrize("config", [
    MeshConfig(data=3), MeshConfig(data=4), MeshConfig(fsdp=3), MeshConfig(data=8, fsdp=2),
    MeshConfig(data=-1, fsdp=-1), MeshConfig(tensor=0), MeshConfig(tensor=-2), MeshConfig(expert=3),
])  # fmt: skip
def test_a_mesh_that_does_not_fit_is_refused(config):
    with pytest.raises(UserError, match=r"config\.mesh"):
        make_mesh(config)


def test_a_mesh_of_some_devices():
    assert list(make_mesh(MeshConfig(), jax.devices()[2:4]).devices.flat) == jax.devices()[2:4]


# --- the rules ------------------------------------------------------------------------------------


def test_logical_names_map_by_the_table():
    assert spec(("vocab", "embed")) == PartitionSpec("tensor", ("fsdp", "context"))
    assert spec(("layers", None, "heads")) == PartitionSpec("stage", None, "tensor")
    assert spec(("activation_batch", "activation_time")) == PartitionSpec(
        ("data", "fsdp", "expert"), "context"
    )
    assert spec(("experts", "embed", "mlp")) == PartitionSpec(
        "expert", ("fsdp", "context"), "tensor"
    )


def test_two_dimensions_on_one_mesh_axis_are_refused():
    with pytest.raises(ValueError, match=r"\('mlp', 'vocab'\) map to mesh axis \('tensor',\)"):
        spec(("mlp", "vocab"))
    with pytest.raises(ValueError, match="map to mesh axis"):
        spec(("embed", "activation_batch"))


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="unknown logical axis 'hedas'"):
        spec(("embed", "hedas"))


def test_every_rule_names_mesh_axes_that_exist():
    assert {axis for axes in sharding.RULES.values() for axis in axes} <= set(MESH_AXES)


def test_a_dimension_that_its_axis_does_not_divide_names_the_parameter():
    boxed = {"mlp": {"up": box((8, 30), "embed", "mlp")}}
    with pytest.raises(UserError, match="parameter mlp/up has 30 along 'mlp'"):
        sharding.parameter_shardings(make_mesh(MeshConfig(2, 1, 4)), boxed)


def test_a_large_share_without_a_sharded_axis_is_refused_naming_the_largest():
    boxed = {
        "embedding": box((16, 8), "vocab", "embed"),
        "small": box((8, 4), "norm", "norm"),
        "large": box((8, 5), "norm", "norm"),
    }
    mesh = make_mesh(MeshConfig(data=1, fsdp=-1))
    with pytest.raises(UserError, match=r"36% of the parameters .* is large with 40 values"):
        sharding.parameter_shardings(mesh, boxed)
    del boxed["large"]  # 32 of 160 values are no large share
    shardings = sharding.parameter_shardings(mesh, boxed)
    assert shardings["small"] == NamedSharding(mesh, PartitionSpec(None, None))
    assert shardings["embedding"].shard_shape((16, 8)) == (16, 1)


def test_plain_data_parallelism_replicates_by_intent():
    boxed = {"large": box((8, 4), "norm", "norm")}
    shardings = sharding.parameter_shardings(make_mesh(MeshConfig(data=8)), boxed)
    assert shardings["large"].is_fully_replicated


def test_an_expert_axis_needs_experts():
    dense = {"mlp": {"up": box((8, 32), "embed", "mlp")}}
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=4))
    with pytest.raises(UserError, match=r"expert=4, but the model has no experts"):
        sharding.parameter_shardings(mesh, dense)
    adapters = {"a": box((8, 2), "embed", "rank")}  # their base has the experts
    sharding.parameter_shardings(mesh, adapters)
    experts = {"moe": {"up": box((4, 8, 32), "experts", "embed", "mlp")}}
    assert sharding.parameter_shardings(mesh, experts)["moe"]["up"].shard_shape((4, 8, 32)) == (
        1, 4, 32
    )  # fmt: skip
    with pytest.raises(UserError, match="has 6 along 'experts'"):
        sharding.parameter_shardings(mesh, {"up": box((6, 8, 32), "experts", "embed", "mlp")})


# --- arrays ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [
    MeshConfig(2, 2, 2), MeshConfig(2, 1, 2, expert=2), MeshConfig(2, 1, 1, context=2, stage=2),
])  # fmt: skip
def test_batches_are_split_over_all_axes_but_tensor_and_context(config):
    mesh = make_mesh(config)
    assert sharding.batch_shards(mesh) == 4
    assert sharding.batch_sharding(mesh).shard_shape((8, 5)) == (2, 5)


def test_constrain_lays_out_an_activation_where_a_mesh_is_set():
    names = ("activation_batch", "activation_heads")
    x = np.zeros((8, 4), np.float32)
    assert sharding.constrain(x, *names) is x  # no mesh
    mesh = make_mesh(MeshConfig(2, 2, 2))
    with jax.set_mesh(mesh):
        laid_out = jax.jit(lambda x: sharding.constrain(x, *names))(x)
    assert laid_out.sharding.shard_shape(x.shape) == (2, 2)


def test_time_is_cut_as_far_as_the_axes_divide_it():
    """A row of one token, as in decoding, stays whole."""
    mesh = make_mesh(MeshConfig(1, 1, 4, context=2))
    names = ("activation_batch", "activation_residual_time")
    with jax.set_mesh(mesh):
        for time, shard in {16: 2, 6: 3, 1: 1}.items():
            x = jax.jit(lambda x: sharding.constrain(x, *names))(np.zeros((8, time)))
            assert x.sharding.shard_shape(x.shape) == (8, shard)
            assert sharding.time_shards(time) == time // shard
    assert sharding.time_shards(16) == 1  # no mesh


def test_a_box_gains_and_loses_the_axis_of_stacked_layers():
    kernel = Named(0, ("embed", "mlp"))
    stacked = kernel.add_axis(0, {"partition_name": "layers"})
    assert stacked.names == ("layers", "embed", "mlp")
    assert stacked.remove_axis(0, {}).names == kernel.names
    assert sharding.unbox({"a": kernel}) == {"a": 0}


# --- optimiser states -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def boxed():
    model = LanguageModel(ModelConfig(
        vocab_size=64, embed_dim=128, num_layers=2, num_heads=4, mlp_dim=256, scan_layers=True,
    ))  # fmt: skip
    return jax.eval_shape(model.init, jax.random.key(0))


@pytest.mark.parametrize("name, ema_decay, copies", [
    ("adamw", None, 2), ("adamw", 0.9, 3), ("lion", None, 1), ("muon", None, 1),
    ("adafactor", None, 0),
])  # fmt: skip
def test_moments_lie_where_their_parameter_lies(boxed, name, ema_decay, copies):
    mesh = make_mesh(MeshConfig(2, 2, 2))
    params = sharding.unbox(boxed)
    shardings = sharding.parameter_shardings(mesh, boxed)
    optimizer = optim.make_optimizer(OptimizerConfig(name=name, ema_decay=ema_decay), params)
    abstract, state_shardings = step.init_state(
        lambda rng: jax.tree.map(lambda p: jnp.zeros(p.shape), params),
        optimizer,
        0,
        mesh,
        shardings,
    )
    assert state_shardings.params == shardings

    laid_out = jax.tree_util.tree_leaves_with_path(abstract.opt_state)
    for path, where in jax.tree_util.tree_leaves_with_path(shardings):
        suffix = jax.tree_util.keystr(path)
        shape = next(p.shape for q, p in jax.tree_util.tree_leaves_with_path(params) if q == path)
        found = [
            leaf.sharding for q, leaf in laid_out
            if jax.tree_util.keystr(q).endswith(suffix) and leaf.shape == shape
        ]  # fmt: skip
        assert len(found) >= copies or shape == (128,)
        assert all(sharding == where for sharding in found)
    scalars = [leaf for _, leaf in laid_out if leaf.shape == ()]
    assert scalars and all(leaf.sharding.spec == PartitionSpec() for leaf in scalars)


def test_a_shape_alone_does_not_make_a_moment():
    """Only the leaf at the parameter's own path takes its sharding."""
    mesh = make_mesh(MeshConfig(1, 8, 1))
    params = {"a": jnp.zeros((8, 2)), "b": jnp.zeros((8, 2))}
    where = NamedSharding(mesh, PartitionSpec("fsdp"))
    whole = sharding.replicated(mesh)
    tree = {"mu": params, "other": jnp.zeros((8, 2)), "nu": {"a": jnp.zeros(8), "b": jnp.zeros(8)}}
    found = sharding.tree_shardings(mesh, params, {"a": where, "b": whole}, tree)
    assert found == {
        "mu": {"a": where, "b": whole}, "other": whole, "nu": {"a": whole, "b": whole}
    }  # fmt: skip


def test_the_share_that_may_stay_whole_is_one_number(boxed):
    mesh = make_mesh(MeshConfig(1, 8, 1))
    sharding.parameter_shardings(mesh, boxed)
    with mock.patch.object(sharding, "MAX_REPLICATED_SHARE", 0.0), pytest.raises(UserError):
        sharding.parameter_shardings(mesh, boxed)
