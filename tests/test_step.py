"""The step: meshes and micro-batches change nothing, against hand-computed and golden values."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llm_jax import optim, sharding, step
from llm_jax.errors import UserError
from llm_jax.mesh import MeshConfig, make_mesh
from llm_jax.models import LanguageModel, ModelConfig
from llm_jax.models.moe import MoeConfig
from llm_jax.objectives.lm import LossConfig, make_objective
from llm_jax.optim import OptimizerConfig
from llm_jax.sharding import Named
from llm_jax.step import Pooled, StepConfig
from llm_jax.types import Batch, Mean

GOLDEN = Path(__file__).parent / "golden" / "losses.json"
BATCH, LENGTH, VOCABULARY, STEPS = 16, 12, 64, 5

SHAPE = {
    "vocab_size": VOCABULARY, "embed_dim": 16, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2,
    "mlp_dim": 32, "max_length": 32, "qk_norm": "head",
}  # fmt: skip
MODELS = {
    "tied": ModelConfig(**SHAPE),
    "untied_scanned": ModelConfig(**SHAPE, tie_embeddings=False, scan_layers=True),
}
MESHES = {
    "1": MeshConfig(1, 1, 1),
    "8": MeshConfig(8, 1, 1),
    "4x2": MeshConfig(4, 2, 1),
    "2x2x2": MeshConfig(2, 2, 2),
}


def mesh_of(config):
    devices = config.data * config.fsdp * config.tensor * config.expert * config.stage
    return make_mesh(config, jax.devices()[:devices])


def ragged_batch(seed):
    """Two documents a row, padding behind them, targets that do not count; every fourth row from
    the second on counts nothing at all."""
    random = np.random.default_rng(seed)
    first = random.integers(1, LENGTH // 2, (BATCH, 1))
    end = random.integers(LENGTH // 2, LENGTH + 1, (BATCH, 1))
    time = np.arange(LENGTH)
    segments = np.where(time < first, 1, np.where(time < end, 2, 0))
    weights = (segments > 0) * (random.random((BATCH, LENGTH)) < 0.7)
    weights[1::4] = 0
    return Batch(
        tokens=random.integers(0, VOCABULARY, (BATCH, LENGTH)).astype(np.int32),
        targets=random.integers(0, VOCABULARY, (BATCH, LENGTH)).astype(np.int32),
        loss_weights=weights.astype(np.float32),
        segment_ids=segments.astype(np.int32),
        positions=np.where(time < first, time, np.maximum(time - first, 0)).astype(np.int32),
    )


def five_steps(model_config, mesh_config, micro_batches=1, parameter_dtype="float32", **optimizer):
    """Losses, gradient norms and final parameters on the host."""
    mesh = mesh_of(mesh_config)
    model = LanguageModel(model_config)
    boxed = jax.eval_shape(model.init, jax.random.key(0))
    # Adam's epsilon keeps updates smooth in the gradients: with the usual 1e-8 a gradient that is
    # nothing but rounding is scaled to a full step, and meshes drift apart by luck.
    config = OptimizerConfig(clip_norm=1.0, epsilon=1e-3, **optimizer)
    optimizer = optim.make_optimizer(config, sharding.unbox(boxed))

    def init_params(rng):
        return sharding.unbox(model.init(rng))

    with jax.set_mesh(mesh):
        _, shardings = step.init_state(
            init_params, optimizer, 0, mesh, sharding.parameter_shardings(mesh, boxed)
        )
        state = step.materialise(init_params, optimizer, 0, shardings)
        train_step = step.make_train_step(
            make_objective(model, LossConfig(chunk=8, z_loss=1e-3)), optimizer,
            mesh=mesh, shardings=shardings, micro_batches=micro_batches,
            parameter_dtype=parameter_dtype,
        )  # fmt: skip
        metrics = []
        for number in range(STEPS):
            batch = jax.device_put(ragged_batch(number), sharding.batch_sharding(mesh))
            state, measured = train_step(state, batch, np.float32(0.01))
            metrics.append(jax.device_get(measured))
        assert jax.tree.map(lambda x: x.sharding, state) == shardings
    losses = [float(m["loss"].total / m["loss"].count) for m in metrics]
    norms = [float(m["grad_norm"]) for m in metrics]
    assert [int(m["loss"].count) for m in metrics] == [
        int(ragged_batch(number).loss_weights.sum()) for number in range(STEPS)
    ]
    return losses, norms, jax.device_get(state.params)


@pytest.fixture(scope="module", params=list(MODELS))
def reference(request):
    """A model's name and its five steps on one device, in one piece."""
    return request.param, five_steps(MODELS[request.param], MESHES["1"])


def assert_same_steps(steps, expected):
    np.testing.assert_allclose(steps[0], expected[0], rtol=2e-5)
    np.testing.assert_allclose(steps[1], expected[1], rtol=1e-4)
    for leaf, wanted in zip(jax.tree.leaves(steps[2]), jax.tree.leaves(expected[2]), strict=True):
        np.testing.assert_allclose(leaf, wanted, atol=5e-5)


def test_five_steps_give_the_golden_losses(reference):
    name, (losses, norms, _) = reference
    golden = json.loads(GOLDEN.read_text())[name]
    np.testing.assert_allclose(losses, golden["loss"], rtol=1e-4)
    np.testing.assert_allclose(norms, golden["grad_norm"], rtol=1e-3)


@pytest.mark.parametrize("mesh", ["8", "4x2", "2x2x2"])
def test_five_steps_are_equal_on_every_mesh(reference, mesh):
    name, expected = reference
    assert_same_steps(five_steps(MODELS[name], MESHES[mesh]), expected)


@pytest.mark.parametrize("mesh, micro_batches", [("1", 4), ("2x2x2", 2), ("4x2", 2)])
def test_accumulation_is_the_large_batch(reference, mesh, micro_batches):
    """With 4 micro-batches on one device the second of them counts nothing at all."""
    name, expected = reference
    assert_same_steps(five_steps(MODELS[name], MESHES[mesh], micro_batches), expected)


# --- memory ---------------------------------------------------------------------------------------


def test_moments_on_the_host_change_no_bit():
    small = dataclasses.replace(MODELS["untied_scanned"], num_layers=1)
    plain = five_steps(small, MESHES["2x2x2"])
    offloaded = five_steps(small, MESHES["2x2x2"], offload=True)
    assert plain[:2] == offloaded[:2]
    jax.tree.map(np.testing.assert_array_equal, plain[2], offloaded[2])


def test_moments_live_on_the_host_and_nothing_else_does():
    mesh = mesh_of(MESHES["4x2"])
    params = {"kernel": Named(jax.ShapeDtypeStruct((8, 4), jnp.float32), ("embed", "mlp"))}

    def kinds(**changes):
        config = OptimizerConfig(**changes)
        _, shardings = step.init_state(
            lambda rng: {"kernel": jnp.zeros((8, 4))},
            optim.make_optimizer(config, sharding.unbox(params)),
            0,
            mesh,
            sharding.parameter_shardings(mesh, params),
        )
        leaves = jax.tree_util.tree_leaves_with_path(shardings)
        return {jax.tree_util.keystr(p) for p, s in leaves if s.memory_kind == "pinned_host"}

    assert kinds() == set()
    hosted = kinds(offload=True, ema_decay=0.9)  # the average is what evaluations read
    assert len(hosted) == 2 and all("mu" in name or "nu" in name for name in hosted)


HALF = dataclasses.replace(MODELS["untied_scanned"], dtype="bfloat16")


@pytest.fixture(scope="module")
def half_reference():
    return five_steps(HALF, MESHES["1"])


@pytest.mark.parametrize("mesh, micro_batches", [("1", 1), ("4x2", 2)])
def test_rounded_parameters_give_the_same_loss_and_close_steps(half_reference, mesh, micro_batches):
    losses, norms, params = five_steps(HALF, MESHES[mesh], micro_batches, "bfloat16")
    if (mesh, micro_batches) == ("1", 1):
        assert losses[0] == half_reference[0][0]  # products round their operands in any case
        assert norms[0] != half_reference[1][0]  # gradients are not
    np.testing.assert_allclose(losses, half_reference[0], rtol=1e-2)
    np.testing.assert_allclose(norms[0], half_reference[1][0], rtol=6e-3)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}


def test_what_is_computed_in_float32_is_not_rounded():
    moe = dataclasses.replace(HALF, moe=MoeConfig(4), attention_bias="all")
    shapes = sharding.unbox(jax.eval_shape(LanguageModel(moe).init, jax.random.key(0)))
    rounded = jax.eval_shape(lambda params: step.rounded(params, "bfloat16"), shapes)
    kept = {
        path[-1].key
        for path, leaf in jax.tree_util.tree_leaves_with_path(rounded)
        if leaf.dtype == jnp.float32
    }
    assert kept == {"scale", "bias", "router"}


def test_gradients_of_micro_batches_add_up_in_float32():
    """300 · 1 is no bfloat16 sum: from 256 on, 1 is half of what the last bit means."""

    def objective(params, batch, rng):
        weights = batch[1]
        return Mean(jnp.sum(params["w"].astype(jnp.float32) * weights), jnp.sum(weights) / 300), {}

    _, (metrics,) = some_steps(
        np.ones(300), np.ones(300), 300, objective, parameter_dtype="bfloat16"
    )
    assert metrics["grad_norm"] == pytest.approx(300)


# --- against numbers computed by hand -------------------------------------------------------------


def weighted_square(params, batch, rng):
    """Σ weight · (w − x)², for Points (x, weight)."""
    values, weights = batch
    total = jnp.sum(weights * jnp.square(params["w"] - values))
    return Mean(total, jnp.sum(weights)), {
        "values": Mean(jnp.sum(values), jnp.float32(values.size))
    }


def some_steps(
    values, weights, micro_batches=1, objective=weighted_square, mesh=MESHES["1"], steps=1,
    **settings,
):  # fmt: skip
    """The last parameter, and the metrics of every step."""
    mesh = mesh_of(mesh)
    optimizer = optim.make_optimizer(OptimizerConfig(weight_decay=0.0, clip_norm=None), {"w": 0.0})

    def init_params(rng):
        return {"w": jnp.full((1,), 3.0)}

    with jax.set_mesh(mesh):
        boxed = {"w": Named(jax.ShapeDtypeStruct((1,), jnp.float32), ("norm",))}
        _, shardings = step.init_state(
            init_params, optimizer, 0, mesh, sharding.parameter_shardings(mesh, boxed)
        )
        state = step.materialise(init_params, optimizer, 0, shardings)
        train_step = step.make_train_step(
            objective, optimizer, mesh=mesh, shardings=shardings, micro_batches=micro_batches,
            **settings,
        )  # fmt: skip
        batch = tuple(np.float32(x)[:, None] for x in (values, weights))
        metrics = []
        for _ in range(steps):
            state, measured = train_step(state, batch, np.float32(0.1))
            metrics.append(jax.device_get(measured))
        assert int(state.step) == steps
        return jax.device_get(state.params["w"]), metrics


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_the_gradient_is_the_sum_over_all_divided_once_by_the_global_count(micro_batches):
    values, weights = np.array([1.0, 2.0, 4.0, 8.0]), np.array([1.0, 0.0, 1.0, 0.5])
    w, (metrics,) = some_steps(values, weights, micro_batches)
    gradient = 2 * np.sum(weights * (3 - values)) / weights.sum()
    assert metrics["grad_norm"] == pytest.approx(abs(gradient))
    assert metrics["loss"].count == 2.5
    assert metrics["loss"].total == pytest.approx(np.sum(weights * (3 - values) ** 2))
    assert metrics["values"].total == 15 and metrics["values"].count == 4
    assert w == pytest.approx(3 - 0.1 * np.sign(gradient), rel=1e-5)  # Adam's first step


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_batch_that_counts_nothing_is_a_finite_step(micro_batches):
    w, (metrics,) = some_steps(np.ones(4), np.zeros(4), micro_batches)
    assert w == 3 and metrics["grad_norm"] == 0 and metrics["skipped_steps"] == 0


def test_every_micro_batch_and_every_step_has_randomness_of_its_own():
    def noise(params, batch, rng):
        draw = jax.random.uniform(rng)
        zero = 0 * jnp.sum(params["w"])
        return Mean(zero + draw, jnp.float32(1)), {"square": Mean(draw**2, jnp.float32(1))}

    _, metrics = some_steps(np.ones(4), np.ones(4), 2, noise, steps=3)
    sums = [float(m["loss"].total) for m in metrics]
    squares = [float(m["square"].total) for m in metrics]
    assert len(set(sums)) == 3
    for total, of_squares in zip(sums, squares, strict=True):
        assert of_squares != pytest.approx(total**2 / 2, rel=1e-4)  # equal if both draws were


# --- losses of the whole batch --------------------------------------------------------------------


def squared_sum(noise=0.0):
    """(Σ w·x + noise)²: no sum over rows, but linear in each row's part once the sum is known."""

    def part(params, batch, rng):
        values, weights = batch
        return jnp.sum(params["w"] * weights * values) + noise * jax.random.uniform(rng)

    def pool(params, batch, rng):
        return part(params, batch, rng), jnp.sum(batch[1])

    def objective(params, batch, rng, sums):
        own = part(params, batch, rng)
        whole, _ = pool(params, batch, rng) if sums is None else sums
        whole = jax.lax.stop_gradient(whole)
        # Value whole · own and gradient 2 · whole · own′.
        total = whole * (2 * own - jax.lax.stop_gradient(own))
        metrics = {"own": Mean(own, jnp.float32(1)), "whole": Mean(whole, jnp.float32(1))}
        return Mean(total, jnp.sum(batch[1])), metrics

    return Pooled(pool, objective)


@pytest.mark.parametrize("mesh, micro_batches", [("1", 1), ("1", 2), ("1", 4), ("8", 2)])
def test_an_objective_may_know_the_sums_of_the_whole_batch(mesh, micro_batches):
    values, weights = np.arange(16.0), np.ones(16)
    _, (metrics,) = some_steps(values, weights, micro_batches, squared_sum(), MESHES[mesh])
    assert float(metrics["loss"].value()) == pytest.approx((3 * 120) ** 2 / 16)
    assert float(metrics["grad_norm"]) == pytest.approx(2 * (3 * 120) * 120 / 16)


def test_the_sums_are_made_with_the_randomness_of_the_micro_batches():
    _, (metrics,) = some_steps(np.ones(4), np.ones(4), 2, squared_sum(noise=10.0))
    own, whole = metrics["own"], metrics["whole"]
    assert float(whole.value()) == pytest.approx(float(own.total), rel=1e-6)
    assert float(own.total) > 12.1  # of which the noise is at least a little


def loss_and_gradients(model_config, mesh_config, micro_batches):
    """Of one step, in float32 throughout, and its metrics."""
    mesh = mesh_of(mesh_config)
    model = LanguageModel(model_config)
    boxed = jax.eval_shape(model.init, jax.random.key(0))
    keep = optax.GradientTransformationExtraArgs(
        lambda params: jax.tree.map(jnp.zeros_like, params), lambda g, *_, **__: (g, g)
    )
    optimizer = optim.skip_bad_steps(keep, None, 1, 1)

    def init_params(rng):
        return sharding.unbox(model.init(rng))

    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        _, shardings = step.init_state(
            init_params, optimizer, 0, mesh, sharding.parameter_shardings(mesh, boxed)
        )
        state = step.materialise(init_params, optimizer, 0, shardings)
        train_step = step.make_train_step(
            make_objective(model, LossConfig(load_balance=1.0, router_z=0.1)), optimizer,
            mesh=mesh, shardings=shardings, micro_batches=micro_batches,
        )  # fmt: skip
        batch = jax.device_put(ragged_batch(0), sharding.batch_sharding(mesh))
        state, metrics = train_step(state, batch, np.float32(0))
    return jax.device_get((metrics, state.opt_state.inner))


EXPERTS = ModelConfig(**SHAPE, scan_layers=True, moe=MoeConfig(4, capacity_factor=1.0))


@pytest.fixture(scope="module")
def one_pass():
    return loss_and_gradients(EXPERTS, MESHES["1"], 1)


@pytest.mark.parametrize("mesh, micro_batches", [
    (MESHES["1"], 2), (MESHES["1"], 4), (MESHES["8"], 2), (MeshConfig(2, 1, 1, 4), 1),
])  # fmt: skip
def test_the_load_balance_of_experts_is_that_of_the_whole_batch(one_pass, mesh, micro_batches):
    """A product of two means over all tokens: micro-batches alone would give another one."""
    expected, wanted = one_pass
    metrics, gradients = loss_and_gradients(EXPERTS, mesh, micro_batches)
    for name in ("loss", "cross_entropy", "load_balance", "router_z", "dropped"):
        value = metrics[name].value()
        assert float(value) == pytest.approx(float(expected[name].value()), rel=1e-6), name
    assert float(metrics["dropped"].value()) > 0
    flat, wanted_flat = (
        np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])
        for tree in (gradients, wanted)
    )
    assert np.linalg.norm(flat - wanted_flat) < 2e-6 * np.linalg.norm(wanted_flat)
    routers = (tree["layers"]["block_0"]["moe"]["router"] for tree in (gradients, wanted))
    np.testing.assert_allclose(*routers, atol=2e-6)


# --- cutting the batch ----------------------------------------------------------------------------


@pytest.mark.parametrize("mesh, batch, length, tokens, expected", [
    ("1", 16, 64, None, 2),  # 512 tokens on a CPU
    ("1", 16, 64, 1024, 1),
    ("1", 16, 64, 1, 16),  # a row is never cut
    ("1", 12, 100, 300, 4),
    ("1", 7, 100, 300, 7),  # only divisors: 7 rows fit no 3 and 4
    ("8", 16, 64, 64, 2),  # tokens of one shard
    ("2x2x2", 16, 64, 64, 4),
])  # fmt: skip
def test_micro_batches_are_the_fewest_that_fit(mesh, batch, length, tokens, expected):
    config = StepConfig(micro_batch_tokens=tokens)
    assert step.micro_batches(config, batch, length, mesh_of(MESHES[mesh])) == expected


def test_a_parameter_dtype_that_is_none_is_refused():
    with pytest.raises(UserError, match=r"config\.step\.parameter_dtype='fp8' must be"):
        StepConfig(parameter_dtype="fp8")


@pytest.mark.parametrize("batch, hint", [(12, "such as 16"), (3, "such as 8"), (19, "such as 16")])
def test_a_batch_that_the_mesh_does_not_divide_is_refused(batch, hint):
    with pytest.raises(UserError, match=rf"a batch of {batch} sequences .* {hint}"):
        step.micro_batches(StepConfig(), batch, 64, mesh_of(MESHES["4x2"]))


@pytest.mark.parametrize("length, expected", [(4, 1), (128, 2), (512, 4), (4096, 4)])
def test_a_micro_batch_has_rows_for_every_piece_of_a_shard(length, expected):
    """4 stages x 1 shard, 8 micro-batches of the pipeline: 2 rows of a shard are never parted."""
    mesh = mesh_of(MeshConfig(1, stage=4))
    assert step.micro_batches(StepConfig(), 32, length, mesh, 2) == expected
    with pytest.raises(UserError, match=r"12 sequences .*pipeline's 8 micro-batches x 1 .*such as"):
        step.micro_batches(StepConfig(), 12, length, mesh, 2)


if __name__ == "__main__":  # `python -m tests.test_step` writes the golden values anew
    golden = {}
    for name, model_config in MODELS.items():
        losses, norms, _ = five_steps(model_config, MESHES["1"])
        golden[name] = {"loss": losses, "grad_norm": norms}
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")
