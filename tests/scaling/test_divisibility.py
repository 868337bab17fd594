"""Meshes that do not divide a model are told before anything is compiled."""

import dataclasses

import jax
import pytest

from llm_jax import sharding
from llm_jax.errors import UserError
from llm_jax.mesh import MeshConfig, make_abstract_mesh
from llm_jax.models import LanguageModel, ModelConfig
from llm_jax.models.moe import MoeConfig
from llm_jax.scaling.divisibility import check_mesh, divides

MODEL = ModelConfig(
    vocab_size=192, embed_dim=48, num_layers=6, num_heads=6, num_kv_heads=6, mlp_dim=96,
    scan_layers=True,
)  # fmt: skip
EXPERTS = dataclasses.replace(MODEL, moe=MoeConfig(num_experts=12))


def mesh(**sizes):
    return MeshConfig(**{"data": 1, **sizes})


@pytest.mark.parametrize("model, sizes, message", [
    (MODEL, {"tensor": 4}, r"tensor=4 does not divide model.num_kv_heads=6; 3 or 6 would"),
    (dataclasses.replace(MODEL, mlp_dim=100), {"tensor": 3}, "model.mlp_dim=100; 2 or 4 would"),
    (dataclasses.replace(MODEL, vocab_size=200), {"tensor": 3}, "vocab_size=200; 2 or 4 would"),
    (MODEL, {"fsdp": 5}, "fsdp x context=5 does not divide model.embed_dim=48; 4 or 6 would"),
    (MODEL, {"stage": 4}, "stage=4 does not divide model.num_layers=6; 3 or 6 would"),
    (dataclasses.replace(MODEL, scan_layers=False), {"stage": 2}, "not stacked.*=1; 1 would"),
    (dataclasses.replace(MODEL, window=8, attention_pattern=("local", "global")), {"stage": 6},
     "over the length of model.attention_pattern=3; 3 would"),
    (EXPERTS, {"expert": 8}, "expert=8 does not divide model.moe.num_experts=12; 6 or 12 would"),
    (MODEL, {"expert": 2}, "model.moe.num_experts=1; 1 would"),
    (MODEL, {"context": 5}, "the length=64 2 times over; 4 or 8 would"),
    (MODEL, {"data": 3, "fsdp": 3}, "stage x data x fsdp x expert=9 .* the batch=24; 8 or 12"),
])  # fmt: skip
def test_the_axis_the_dimension_and_the_nearest_sizes_are_named(model, sizes, message):
    assert not divides(model, mesh(**sizes), 64, 24)
    with pytest.raises(UserError, match=message):
        check_mesh(model, mesh(**sizes), 64, 24)


@pytest.mark.parametrize("model", [MODEL, EXPERTS], ids=["dense", "experts"])
def test_what_passes_has_shardings_and_what_does_not_has_none(model):
    """Agreement with the sharding rules over all small meshes; a batch that everything divides."""
    boxed = jax.eval_shape(LanguageModel(model).init, jax.random.key(0))

    def shards(sizes):
        try:
            sharding.parameter_shardings(make_abstract_mesh(mesh(**sizes)), boxed)
        except UserError as error:
            return "replicated" in str(error)  # it divides, and is refused for another reason
        return True

    for axis in ("tensor", "fsdp", "expert", "stage"):
        for size in range(1, 13):
            sizes = {axis: size}
            assert divides(model, mesh(**sizes), 64, 27_720) == shards(sizes), sizes


def test_a_mesh_that_divides_passes():
    check_mesh(EXPERTS, mesh(stage=2, fsdp=4, expert=3, context=2, tensor=2), 64, 24)
    check_mesh(MODEL, mesh(), 63, 1)  # an odd row is whole on one context shard
