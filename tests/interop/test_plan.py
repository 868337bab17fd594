"""Plans from shapes alone, on meshes of devices that do not exist."""

import jax
import pytest
from jax.sharding import PartitionSpec

from llm_jax import sharding, weights
from llm_jax.errors import UserError
from llm_jax.interop.plan import plan
from llm_jax.mesh import MeshConfig, make_mesh
from llm_jax.models import ModelConfig
from llm_jax.models.presets import PUBLISHED
from llm_jax.models.size import parameter_count

TINY = ModelConfig(vocab_size=64, embed_dim=32, num_layers=3, num_heads=4, mlp_dim=48)


@pytest.mark.parametrize("mesh", [MeshConfig(fsdp=8, data=1), MeshConfig(2, fsdp=2, tensor=2)])
@pytest.mark.parametrize("scan_layers", [False, True])
def test_a_plan_agrees_with_the_arrays(mesh, scan_layers):
    model = ModelConfig(**{**vars(TINY), "scan_layers": scan_layers})
    planned = plan(model, mesh)
    boxed = jax.eval_shape(lambda rng: weights.init_weights(model, (), rng), jax.random.key(0))
    shardings = sharding.parameter_shardings(make_mesh(mesh), boxed)
    made = jax.jit(
        lambda rng: sharding.unbox(weights.init_weights(model, (), rng)), out_shardings=shardings
    )(jax.random.key(0))
    held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(made))
    assert planned.float32_bytes == held
    assert planned.bfloat16_bytes == held / 2
    assert planned.values == parameter_count(model)
    assert planned.chips == 8


def test_layers_are_told_once():
    parameters = {p.name: p for p in plan(TINY, MeshConfig(fsdp=8)).parameters}
    embedding = parameters["embedding"]
    assert (embedding.count, embedding.shape, embedding.chip_shape) == (1, (64, 32), (64, 4))
    assert embedding.spec == PartitionSpec("tensor", ("fsdp", "context"))
    assert parameters["layer_*/mlp_norm/scale"].count == 3
    assert parameters["layer_*/mlp_norm/scale"].chip_values == 3 * 32


@pytest.mark.parametrize("name, chips, gib", [
    ("llama3.1-8b", 8, 3.74), ("llama3.1-70b", 64, 4.11),
    pytest.param("llama3.1-405b", 512, 2.97, marks=pytest.mark.slow),
])  # fmt: skip
def test_published_models_are_planned_for_pods(name, chips, gib):
    planned = plan(PUBLISHED[name], MeshConfig(fsdp=chips))
    assert planned.values == parameter_count(PUBLISHED[name])
    assert planned.float32_bytes / 2**30 == pytest.approx(gib, abs=0.03)
    table = planned.table().splitlines()
    assert [line.split()[0] for line in table[: table.index("")]] == [
        "parameter", *(p.name for p in planned.parameters),
    ]  # fmt: skip
    assert f"{planned.values:,} parameters on {chips} chips (fsdp {chips})" in planned.table()


def test_a_mesh_that_does_not_divide_the_model_is_refused():
    with pytest.raises(UserError, match="which mesh axes"):
        plan(TINY, MeshConfig(fsdp=5))
    with pytest.raises(UserError, match="sizes are positive"):
        plan(TINY, MeshConfig(fsdp=0))
