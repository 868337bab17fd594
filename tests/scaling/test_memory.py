"""Bytes of a train step: state against exact shapes under the sharding rules, activations against
what is kept by hand, and everything against what XLA allocates."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import pytest

from llm_jax import optim, sharding, step
from llm_jax.interop.plan import plan
from llm_jax.mesh import MeshConfig, make_abstract_mesh, make_mesh
from llm_jax.models import LanguageModel, ModelConfig
from llm_jax.models.moe import MoeConfig
from llm_jax.models.presets import PUBLISHED
from llm_jax.objectives import lm
from llm_jax.optim import OptimizerConfig
from llm_jax.scaling import memory
from llm_jax.scaling.memory import training_memory
from llm_jax.types import Batch

SMALL = ModelConfig(
    vocab_size=256, embed_dim=160, num_layers=4, num_heads=4, num_kv_heads=2, mlp_dim=384,
    scan_layers=True,
)  # fmt: skip
MODELS = {
    "dense": SMALL,
    "experts": dataclasses.replace(SMALL, moe=MoeConfig(4, 2), mlp_dim=192),
    "biases": dataclasses.replace(
        SMALL, scan_layers=False, attention_bias="all", mlp_bias=True, norm="layernorm", mlp="gelu",
        tie_embeddings=False, position="learned", max_length=128,
    ),
}  # fmt: skip
OPTIMIZERS = {
    "adamw": OptimizerConfig(),
    "half": OptimizerConfig(mu_dtype="bfloat16", ema_decay=0.9),
    "lion": OptimizerConfig(name="lion"),
    "muon": OptimizerConfig(name="muon"),
    "adafactor": OptimizerConfig(name="adafactor"),
}


# --- state ----------------------------------------------------------------------------------------


@functools.cache
def shapes(model, optimizer):
    boxed = jax.eval_shape(LanguageModel(model).init, jax.random.key(0))
    params = sharding.unbox(boxed)
    return boxed, params, jax.eval_shape(optim.make_optimizer(optimizer, params).init, params)


def exact_state_bytes(model, optimizer, mesh):
    """Of every device, by shapes under the sharding rules: parameters, optimiser state."""
    abstract_mesh = make_abstract_mesh(mesh)
    boxed, params, opt_state = shapes(model, optimizer)
    shardings = sharding.parameter_shardings(abstract_mesh, boxed)
    where = sharding.tree_shardings(abstract_mesh, params, shardings, opt_state)

    def held(tree, shardings):
        return sum(
            math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize
            for x, s in zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True)
        )

    return held(params, shardings), held(opt_state, where)


@pytest.mark.parametrize("mesh", [
    MeshConfig(data=1), MeshConfig(data=2, fsdp=4), MeshConfig(data=1, fsdp=2, tensor=2),
])  # fmt: skip
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_state_is_that_of_the_exact_shapes(model, optimizer, mesh):
    model, optimizer = MODELS[model], OPTIMIZERS[optimizer]
    planned = plan(model, mesh)
    parameters, state = exact_state_bytes(model, optimizer, mesh)
    assert planned.float32_bytes == parameters
    found = sum(memory.optimizer_bytes(planned, optimizer).values())
    # Counts and norms of the guard are left out, and optax's placeholders.
    assert found == pytest.approx(state, abs=200)
    assert found <= state


def test_a_checkpoint_is_whole_on_whatever_mesh():
    for mesh in (MeshConfig(data=1), MeshConfig(data=2, fsdp=4)):
        size = memory.checkpoint_bytes(plan(SMALL, mesh), OPTIMIZERS["adamw"])
        assert size == 12 * plan(SMALL, mesh).values


def test_adam_of_a_published_model_by_hand():
    """6,738,415,616 parameters, 12 bytes each, over 16 devices; norms lie whole on each."""
    model = dataclasses.replace(PUBLISHED["llama2-7b"], scan_layers=True, remat="full")
    found = training_memory(
        model, OptimizerConfig(), MeshConfig(data=1, fsdp=16), length=4096, batch=16, platform="tpu"
    )
    norms = 65 * 4096
    assert found.state_bytes == 12 * ((6_738_415_616 - norms) / 16 + norms)


# --- activations ----------------------------------------------------------------------------------


def test_with_full_remat_a_layer_keeps_its_input():
    """The closed form that stands in for the trace is what the trace says."""
    for dtype, width in (("float32", 4), ("bfloat16", 2)):
        model = dataclasses.replace(SMALL, remat="full", dtype=dtype)
        kept = memory._stacked_bytes(model, 2, 64) - memory._stacked_bytes(model, 1, 64)
        assert kept == 64 * 160 * width


def test_without_remat_a_layer_keeps_what_can_be_listed():
    """Float32, a token: of each norm three arrays and the product's operand, with a number for the
    mean; rotated queries, keys and values; the output of attention, before and after the division
    and with two sums of each head; six arrays of the gated MLP. A pair: the weights."""
    D, N, K, H, M = 160, 4, 2, 40, 384
    norms = 2 * (4 * D + 2)
    attention = (N + 2 * K) * H + 2 * N * H + 2 * N
    assert memory._kept_per_token(SMALL) == 4 * (norms + attention + 6 * M)
    row = memory._kept_per_row(SMALL, 64)
    assert row == 64 * memory._kept_per_token(SMALL) + 4 * 2 * N * 64**2


def test_flash_attention_keeps_nothing_that_grows_with_the_square():
    def kept(length, platform):
        model = dataclasses.replace(SMALL, max_length=4096)
        found = training_memory(
            model, OptimizerConfig(), MeshConfig(data=1), length=length, batch=1, platform=platform
        )
        return found.points["loss"]["saved activations"]

    assert kept(1024, "tpu") == 4 * kept(256, "tpu")
    assert kept(1024, "cpu") > 5 * kept(256, "cpu")


@pytest.mark.parametrize("axis, halves", [
    ("data", {"saved activations", "logits and their gradient", "one layer's activations"}),
    ("fsdp", {"saved activations", "logits and their gradient", "one layer's activations"}),
    ("stage", {"saved activations", "logits and their gradient", "one layer's activations"}),
    ("context", {"saved activations", "logits and their gradient", "one layer's activations"}),
    ("tensor", {"saved activations", "logits and their gradient", "one layer's activations"}),
])  # fmt: skip
def test_every_axis_halves_activations(axis, halves):
    def parts(**sizes):
        mesh = MeshConfig(**{"data": 1, **sizes})
        found = training_memory(SMALL, OptimizerConfig(), mesh, length=64, batch=8, platform="tpu")
        return {k: v for point in found.points.values() for k, v in point.items()}

    one, two = parts(), parts(**{axis: 2})
    for name in halves:
        assert two[name] == one[name] / 2


def test_micro_batches_and_chunks_cut_what_is_held():
    def held(**changes):
        found = training_memory(
            SMALL, OptimizerConfig(), MeshConfig(data=1), length=64, batch=8, platform="tpu",
            **changes,
        )  # fmt: skip
        return found.points["loss"]

    assert held(chunk=16)["logits and their gradient"] == 2 * 4 * 8 * 16 * 256
    assert held(chunk=100)["logits and their gradient"] == 2 * 4 * 8 * 64 * 256
    whole, cut = held(), held(micro_batches=4)
    assert cut["saved activations"] == whole["saved activations"] / 4
    assert cut["gradients of earlier micro-batches"] == cut["gradients"]


def test_tokens_that_come_together_for_experts_are_counted():
    model = MODELS["experts"]

    def layer(**sizes):
        found = training_memory(
            model, OptimizerConfig(), MeshConfig(**{"data": 1, **sizes}), length=64, batch=8,
            platform="tpu",
        )  # fmt: skip
        return found.points["backward"]["one layer's activations"]

    assert layer(expert=2) > layer(fsdp=2)
    assert layer(expert=2) < layer()


@pytest.mark.parametrize("remat, dtype, batch, chunk", [
    ("none", "float32", 8, None), ("none", "bfloat16", 8, 16), ("full", "float32", 8, None),
    ("full", "bfloat16", 16, 16), ("dots", "float32", 8, 16),
])  # fmt: skip
def test_xla_allocates_what_the_formula_says(remat, dtype, batch, chunk):
    """Within 10 %; the model is large enough for alignment and scalars not to count."""
    model = ModelConfig(
        vocab_size=2048, embed_dim=128, num_layers=4, num_heads=2, mlp_dim=352, scan_layers=True,
        remat=remat, dtype=dtype,
    )  # fmt: skip
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    language_model, length = LanguageModel(model), 128
    boxed = jax.eval_shape(language_model.init, jax.random.key(0))
    optimizer = optim.make_optimizer(OptimizerConfig(), sharding.unbox(boxed))
    abstract, shardings = step.init_state(
        lambda rng: sharding.unbox(language_model.init(rng)), optimizer, 0, mesh,
        sharding.parameter_shardings(mesh, boxed),
    )  # fmt: skip
    objective = lm.make_objective(language_model, lm.LossConfig(chunk=chunk))
    ids = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    weights = jax.ShapeDtypeStruct((batch, length), jnp.float32)
    with jax.set_mesh(mesh):
        compiled = (
            step.make_train_step(objective, optimizer, mesh=mesh, shardings=shardings)
            .lower(abstract, Batch(ids, ids, weights, ids, ids), jnp.float32(0))
            .compile()
            .memory_analysis()
        )
    measured = compiled.argument_size_in_bytes + compiled.temp_size_in_bytes
    predicted = training_memory(
        model, OptimizerConfig(), MeshConfig(data=1), length=length, batch=batch, chunk=chunk,
        platform="cpu",
    )  # fmt: skip
    assert predicted.peak == pytest.approx(measured, rel=0.1)


# --- generation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("scan_layers", [False, True])
def test_the_cache_is_the_one_that_is_made(scan_layers):
    model = dataclasses.replace(SMALL, scan_layers=scan_layers, dtype="bfloat16")
    made = jax.eval_shape(lambda: LanguageModel(model).init_cache(3, 50))
    slots = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(made.layers))
    assert memory.cache_bytes(model, 3, 50) == slots == 2 * 3 * 50 * 4 * 2 * 40 * 2


def test_windows_need_less_of_a_cache():
    model = dataclasses.replace(SMALL, window=10, attention_pattern=("local", "global"))
    whole = memory.cache_bytes(model, 1, 40)
    assert memory.windowed_cache_bytes(model, 1, 40) == whole * (10 + 40) / 80
    assert memory.windowed_cache_bytes(model, 1, 8) == memory.cache_bytes(model, 1, 8)


def test_weights_in_every_kind():
    count = plan(SMALL, MeshConfig(data=1)).values
    assert memory.weight_bytes(SMALL, "float32") == 4 * count
    assert memory.weight_bytes(SMALL, "bfloat16") == 2 * count
    kernels = 4 * (160 * (4 + 4) * 40 + 160 * 160 + 3 * 160 * 384)
    rest = count - kernels
    scales = 4 * ((4 + 4) * 40 + 160 + 2 * 384 + 160)
    assert memory.weight_bytes(SMALL, "int8") == 4 * rest + kernels + 4 * scales
    assert memory.weight_bytes(SMALL, "nf4") == 4 * rest + kernels / 2 + 4 * kernels / 64
