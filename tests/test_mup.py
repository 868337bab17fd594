"""muP: the ordinary run at the base's width, and its rules at others."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llm_jax import mup
from llm_jax.errors import UserError
from llm_jax.interop.families import family_for
from llm_jax.mesh import MeshConfig
from llm_jax.metrics import read_metrics_file
from llm_jax.models import LanguageModel, LoraConfig, ModelConfig, MoeConfig
from llm_jax.models.heads import CRITIC, init_heads, rewards
from llm_jax.optim import OptimizerConfig, make_optimizer
from llm_jax.sharding import unbox
from llm_jax.types import Batch
from llm_jax.weights import init_trained

CONFIG = ModelConfig(
    vocab_size=61, embed_dim=32, num_layers=1, num_heads=4, mlp_dim=48, tie_embeddings=False
)
EVERYTHING = dataclasses.replace(CONFIG, scale_embeddings=True, moe=MoeConfig(num_experts=4))


def init(config):
    return unbox(jax.jit(LanguageModel(config).init)(jax.random.key(0)))


def shapes(config):
    return unbox(jax.eval_shape(LanguageModel(config).init, jax.random.key(0)))


def logits(config, params):
    model = LanguageModel(config)
    tokens = jnp.arange(12)[None]
    return jax.jit(lambda params: model.logits(params, model.apply(params, tokens)[0]))(params)


def by_name(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(str(key.key) for key in path): leaf for path, leaf in leaves}


def assert_bitwise_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_the_base_is_the_ordinary_model_to_the_bit():
    plain = EVERYTHING
    base = dataclasses.replace(plain, mup_base_width=32, mup_base_head_dim=8)
    params = init(plain)
    assert_bitwise_equal(init(base), params)
    assert_bitwise_equal(logits(base, params), logits(plain, params))
    states = []
    for model in (plain, base):
        optimizer = make_optimizer(OptimizerConfig(), params, model.width_multiplier)
        state = optimizer.init(params)
        update = jax.jit(optimizer.update)
        states.append(update(params, state, params, learning_rate=jnp.float32(0.01)))
    assert_bitwise_equal(*states)


def test_each_parameter_learns_at_the_rate_of_its_kind():
    kernels = ["layer_0/attention/qkv/kernel", "layer_0/attention/output/kernel"]
    dense = [*kernels, "layer_0/mlp/gate_up/kernel", "layer_0/mlp/down/kernel"]
    experts = [*kernels, "layer_0/moe/gate_up", "layer_0/moe/down"]

    def scales(config, optimizer="adamw", more=None):
        params = {**shapes(config), **(more or {})}
        return by_name(mup.learning_rate_scales(params, 4.0, optimizer))

    found = scales(CONFIG)
    assert {name for name, scale in found.items() if scale != 1} == set(dense)
    assert {found[name] for name in dense} == {1 / 4}
    found = scales(dataclasses.replace(EVERYTHING, scan_layers=True), "muon")
    expected = {name.replace("layer_0", "layers/block_0"): 1 / 2 for name in experts}
    expected["layers/block_0/moe/router"] = 1 / 4  # Muon leaves it to Adam
    assert {name: scale for name, scale in found.items() if scale != 1} == expected

    heads = unbox(init_heads(jax.random.key(0), ("reward_head", "value_head"), 32))
    found = scales(CONFIG, more={CRITIC: {**shapes(CONFIG), **heads}})
    critic = {name.removeprefix("critic/") for name in found if name.startswith("critic/")}
    assert found["critic/reward_head/kernel"] == found["critic/value_head/kernel"] == 1 / 4
    assert {name for name in critic if found[f"critic/{name}"] != 1} > set(dense)


def test_adapters_learn_as_what_they_feed():
    config = dataclasses.replace(CONFIG, lora=LoraConfig(rank=2, dora=True))
    adapters = jax.eval_shape(
        lambda base: unbox(init_trained(config, (), jax.random.key(0), base=base)), shapes(CONFIG)
    )
    scales = by_name(mup.learning_rate_scales(adapters, 4.0, "adamw"))
    assert {name.rpartition("/")[2] for name in scales} == {"a", "b", "magnitude"}
    for name, scale in scales.items():
        assert scale == (1 / 4 if name.endswith("/a") else 1), name


def test_updates_shrink_and_decay_does_not():
    params = {
        "mlp": {"down": {"kernel": jnp.full((8, 4), 2.0)}},
        "embedding": jnp.full((3, 4), 2.0),
    }
    gradients = jax.tree.map(jnp.ones_like, params)
    rate, decay = 0.01, 0.1

    def update(width):
        config = OptimizerConfig(clip_norm=None, weight_decay=decay)
        optimizer = make_optimizer(config, params, width)
        return optimizer.update(gradients, optimizer.init(params), params, learning_rate=rate)[0]

    updates = update(4.0)
    kernel, table = updates["mlp"]["down"]["kernel"], updates["embedding"]
    np.testing.assert_allclose(kernel, -rate * (1 / 4 + decay * 2), rtol=1e-5)
    np.testing.assert_allclose(table, -rate * (1 + decay * 2), rtol=1e-5)


def test_a_wide_model_starts_as_the_table_says():
    wide = dataclasses.replace(
        EVERYTHING, embed_dim=512, mlp_dim=64, vocab_size=200, mup_base_width=32,
        moe=MoeConfig(num_experts=16),
    )  # fmt: skip
    params = init(wide)
    deviations = {
        "embedding": 0.02,
        "output": 32**-0.5,  # the base's
        "layer_0/attention/qkv/kernel": 512**-0.5,
        "layer_0/moe/router": 512**-0.5 / 4,
    }
    leaves = by_name(params)
    for name, deviation in deviations.items():
        assert np.std(leaves[name]) == pytest.approx(deviation, rel=0.04), name
    # Embeddings are scaled as the base's, and logits divided by how much wider the model is.
    plain = dataclasses.replace(wide, mup_base_width=None)
    shrunk = {**params, "embedding": params["embedding"] / 4}
    np.testing.assert_allclose(
        logits(wide, params), logits(plain, shrunk) / 16, rtol=1e-3, atol=1e-5
    )
    narrow = {**params, "embedding": params["embedding"] * 1.5}
    assert np.abs(logits(wide, narrow) - logits(wide, params)).max() > 1e-3


@pytest.mark.parametrize(
    ("changes", "scale"),
    [
        ({}, 32**-0.5),  # more heads of one size
        ({"mup_base_head_dim": 8}, 8**0.5 / 32),
        ({"mup_base_head_dim": 8, "query_pre_attention_scalar": 16}, 16**-0.5 / 4),
    ],
)
def test_scores_shrink_with_wider_heads(changes, scale):
    wide = dataclasses.replace(CONFIG, embed_dim=128, mup_base_width=32, **changes)
    assert wide.attention_scale == pytest.approx(scale, rel=1e-12)


@pytest.mark.parametrize("plus_one", [False, True])
def test_folded_parameters_are_the_same_function_without_mup(plus_one):
    wide = dataclasses.replace(
        CONFIG, norm_plus_one=plus_one, tie_embeddings=True, mup_base_width=8, mup_base_head_dim=2,
        logits_soft_cap=0.05,
    )  # fmt: skip
    params = {**init(wide), **unbox(init_heads(jax.random.key(1), ("reward_head",), 32))}
    params = jax.tree.map(lambda x: x + 0.1, params)
    plain, folded = mup.without_mup(wide), jax.jit(lambda params: mup.folded(params, wide))(params)
    assert (plain.mup_base_width, plain.query_pre_attention_scalar) == (None, 32)
    np.testing.assert_allclose(logits(plain, folded), logits(wide, params), rtol=1e-5)
    row = jnp.arange(12)[None]
    batch = Batch(row, row, jnp.ones_like(row), jnp.ones_like(row), row)
    expected = rewards(LanguageModel(wide), params, batch)
    np.testing.assert_allclose(rewards(LanguageModel(plain), folded, batch), expected, rtol=1e-5)


def test_what_folding_leaves_alone():
    wide = dataclasses.replace(CONFIG, mup_base_width=8)
    assert family_for(mup.without_mup(wide)).model_type == "llama"
    assert mup.without_mup(CONFIG) is CONFIG
    params = shapes(CONFIG)
    assert mup.folded(params, CONFIG) is params
    odd = dataclasses.replace(wide, mup_base_head_dim=7)
    with pytest.raises(UserError, match=r"divides scores by the root of 9\.14286"):
        mup.without_mup(odd)


def test_widened_models_have_more_heads_of_one_size():
    config = dataclasses.replace(CONFIG, num_kv_heads=2)
    wide = mup.widened(config, 96)
    sizes = (wide.num_heads, wide.kv_heads, wide.resolved_head_dim, wide.mlp_dim)
    assert sizes == (12, 6, 8, 144)
    assert mup.widened(config, 32) == dataclasses.replace(config, head_dim=8)
    with pytest.raises(UserError, match=r"at width 40 model.num_kv_heads would be 2.5, from 2"):
        mup.widened(config, 40)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_mesh_changes_no_step(name, tiny_config, run_on, tmp_path):
    """Learning rates are those of the whole width, whatever part of it a device holds."""

    def losses(devices, mesh, base):
        model = ModelConfig(embed_dim=64, num_layers=1, num_heads=4, mlp_dim=64, max_length=128,
                            tie_embeddings=False, mup_base_width=base)  # fmt: skip
        # As in tests/test_step.py, so that no gradient that is but rounding makes a full step.
        optimizer = OptimizerConfig(name=name, learning_rate=1e-2, warmup_steps=1, epsilon=1e-3)
        workdir = tmp_path / f"{devices}_{base}"
        config = tiny_config(model=model, optimizer=optimizer, mesh=mesh)
        assert run_on(devices, config, workdir) == 0
        records = read_metrics_file(workdir / "metrics.jsonl")
        return [record["loss"] for record in records if "loss" in record]

    alone = losses(1, MeshConfig(), 16)
    split = losses(8, MeshConfig(data=2, fsdp=2, tensor=2), 16)
    np.testing.assert_allclose(split, alone, rtol=1e-4)
    assert abs(losses(1, MeshConfig(), None)[-1] - alone[-1]) > 1e-2


def test_bad_settings():
    with pytest.raises(UserError, match="mup_base_width=0 must be positive"):
        dataclasses.replace(CONFIG, mup_base_width=0)
    with pytest.raises(UserError, match=r"set model.mup_base_width, too"):
        dataclasses.replace(CONFIG, mup_base_head_dim=8)
    config = OptimizerConfig(name="adafactor", parameter_scale=True)
    with pytest.raises(UserError, match="for which muP has no rule"):
        make_optimizer(config, {"embedding": jnp.ones((3, 4))}, 2.0)
    make_optimizer(config, {"embedding": jnp.ones((3, 4))})
    assert isinstance(
        make_optimizer(OptimizerConfig(name="adafactor"), {"w": 0.0}, 2.0),
        optax.GradientTransformationExtraArgs,
    )
