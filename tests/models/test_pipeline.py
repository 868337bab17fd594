"""The pipeline computes what one device does; its schedule has tests of its own."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import optim, sharding, step
from llm_jax.errors import UserError
from llm_jax.generation.generate import generate
from llm_jax.generation.sampler import SamplerConfig
from llm_jax.mesh import MESH_AXES, MeshConfig, make_mesh
from llm_jax.models import LanguageModel, ModelConfig
from llm_jax.models.lora import LoraConfig, init_adapters
from llm_jax.models.moe import MoeConfig
from llm_jax.models.pipeline import (
    PipelineConfig,
    Schedule,
    micro_batches_per_stage,
    pipeline,
)
from llm_jax.models.quantize import quantize
from llm_jax.models.transformer import Row
from llm_jax.objectives.lm import LossConfig, make_objective
from llm_jax.optim import OptimizerConfig
from llm_jax.types import Batch, join

BATCH, LENGTH, VOCABULARY = 16, 12, 64
CONFIG = ModelConfig(
    vocab_size=VOCABULARY, embed_dim=16, num_layers=4, num_heads=4, num_kv_heads=2, mlp_dim=32,
    max_length=32, scan_layers=True,
)  # fmt: skip
DROPLESS, DROPPING = MoeConfig(4, 2), MoeConfig(4, 2, capacity_factor=0.8)
ADAPTERS = LoraConfig(rank=2, dora=True)
ONE = MeshConfig(1)


def mesh_of(config):
    sizes = [getattr(config, axis) for axis in MESH_AXES]
    return make_mesh(config, jax.devices()[: math.prod(sizes)])


# --- groups of layers that are one product each ---------------------------------------------------


def toy_group(params, x_BTD, row, rng, repeat):
    """x·w + v, with a v for each row and one for all; sums of x, and what the rng gives."""
    w = params["w"] if repeat is None else params["w"][repeat]
    x_BTD = x_BTD * w + row.query_segment_ids[:, :, None] + row.rotation[0][:, :, None]
    drawn = jnp.zeros(()) if rng is None else jax.random.uniform(rng)
    return x_BTD, (jnp.sum(x_BTD), drawn)


def toy(batch, rng=None, mesh=MeshConfig(1, stage=2), groups=4, **settings):  # noqa: B008
    """x and sums through the pipeline, and x as a loop over the groups makes it."""
    config = dataclasses.replace(CONFIG, num_layers=groups, pipeline=PipelineConfig(**settings))
    random = np.random.default_rng(0)
    w_G = random.uniform(0.5, 1.5, groups).astype(np.float32)
    x_BTD = random.normal(size=(batch, 3, 2)).astype(np.float32)
    rows_BT = random.integers(1, 9, (batch, 3)).astype(np.int32)
    shared_1T = random.normal(size=(1, 3)).astype(np.float32)
    with jax.set_mesh(mesh_of(mesh)):
        x, sums = jax.jit(
            lambda w, x, rows: pipeline(
                toy_group, {"w": w}, x, Row((shared_1T, shared_1T), None, rows, rows, None),
                config, rng,
            )
        )(w_G, x_BTD, rows_BT)  # fmt: skip
    expected, total = x_BTD, 0
    for w in w_G:
        expected = expected * w + rows_BT[:, :, None] + shared_1T[:, :, None]
        total += expected.sum()
    return x, sums, expected, total


@pytest.mark.parametrize("batch, settings", [
    (16, {}), (16, {"micro_batches": 8}), (16, {"micro_batches": 8, "repeats": 2}),
    (12, {"micro_batches": 8, "repeats": 2}), (5, {}), (5, {"repeats": 2}), (1, {}),
])  # fmt: skip
@pytest.mark.parametrize("mesh", [MeshConfig(1, stage=2), MeshConfig(2, stage=2)])
def test_rows_come_out_where_they_went_in(batch, settings, mesh):
    """Rows that the mesh does not divide too; 12 rows make fewer than 8 micro-batches."""
    x, sums, expected, total = toy(batch, mesh=mesh, **settings)
    np.testing.assert_allclose(x, expected, rtol=1e-6)
    if batch in (16, 12):  # no rows of padding, which count in these sums
        np.testing.assert_allclose(sums[0], total, rtol=1e-5)


def test_every_group_draws_anew_for_every_micro_batch():
    """The sum of what all of them draw is that over distinct keys, whatever the schedule."""
    draws = {}
    for repeats in (1, 2):
        sums = toy(16, jax.random.key(3), micro_batches=8, repeats=repeats)[1]
        draws[repeats] = sums[1]
    key = jax.random.key(3)
    expected = sum(
        jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, micro_batch), group))
        for micro_batch in range(8)
        for group in range(4)
    )
    np.testing.assert_allclose(draws[1], expected, rtol=1e-6)
    np.testing.assert_allclose(draws[2], expected, rtol=1e-6)


# --- the model ------------------------------------------------------------------------------------


def ragged_batch(seed, batch=BATCH):
    """Two documents a row, padding behind them, targets that do not count."""
    random = np.random.default_rng(seed)
    first = random.integers(1, LENGTH // 2, (batch, 1))
    end = random.integers(LENGTH // 2, LENGTH + 1, (batch, 1))
    time = np.arange(LENGTH)
    segments = np.where(time < first, 1, np.where(time < end, 2, 0))
    weights = (segments > 0) * (random.random((batch, LENGTH)) < 0.7)
    return Batch(
        tokens=random.integers(0, VOCABULARY, (batch, LENGTH)).astype(np.int32),
        targets=random.integers(0, VOCABULARY, (batch, LENGTH)).astype(np.int32),
        loss_weights=weights.astype(np.float32),
        segment_ids=segments.astype(np.int32),
        positions=np.where(time < first, time, np.maximum(time - first, 0)).astype(np.int32),
    )


@functools.cache
def parameters(config):
    """(trained, frozen), and where they lie: names of their axes. No leaf is as it starts."""
    model = LanguageModel(config)
    boxed = model.init(jax.random.key(1))
    frozen = None
    if config.lora is not None:
        frozen, boxed = boxed, init_adapters(jax.random.key(2), config, boxed)
        frozen = quantize(frozen, "nf4")
    random = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: np.asarray(x + 0.05 * random.normal(size=x.shape), np.float32),
        sharding.unbox(boxed),
    )
    return params, boxed, frozen


def gradients_on(config, mesh_config):
    """Everything that the objective gives on one batch, gradients included, and the program."""
    model, mesh = LanguageModel(config), mesh_of(mesh_config)
    params, boxed, frozen = parameters(dataclasses.replace(config, pipeline=PipelineConfig()))
    router_z = 0.0 if config.moe is None else 1e-2
    objective = make_objective(model, LossConfig(chunk=8, z_loss=1e-3, router_z=router_z))

    def total(params, frozen, batch):
        loss, metrics = objective(join(params, frozen), batch, None)
        return loss.total, {"loss": loss, **metrics}

    with jax.set_mesh(mesh):
        where = sharding.parameter_shardings(mesh, boxed)
        params = jax.device_put(params, where)
        if frozen is not None:
            lie = sharding.parameter_shardings(mesh, frozen)
            frozen = jax.device_put(sharding.unbox(frozen), lie)
        batch = jax.device_put(ragged_batch(0), sharding.batch_sharding(mesh))
        differentiate = jax.jit(jax.grad(total, has_aux=True), out_shardings=(where, None))
        compiled = differentiate.lower(params, frozen, batch).compile()
        return jax.device_get(compiled(params, frozen, batch)), compiled.as_text()


@functools.cache
def alone(config):
    return gradients_on(config, ONE)[0]


def assert_same(found, expected, tolerance=1e-5):
    """Within a share of a leaf's largest value: float32 sums in another order."""
    leaves = zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True)
    for (path, leaf), wanted in leaves:
        scale = max(np.abs(wanted).max(), 1e-3)
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(leaf, wanted, rtol=0, atol=tolerance * scale, err_msg=name)


PATTERN = {"attention_pattern": ("local", "global"), "window": 4}
CASES = {
    "gpipe": ({}, MeshConfig(1, stage=4), PipelineConfig(8)),
    "one_micro_batch_a_stage": ({"remat": "full"}, MeshConfig(2, stage=2), PipelineConfig()),
    "interleaved": ({"qk_norm": "head"}, MeshConfig(1, stage=2), PipelineConfig(4, 2)),
    "interleaved_remat": (
        {"remat": "full", "num_layers": 8, **PATTERN}, MeshConfig(1, stage=2), PipelineConfig(4, 2)
    ),
    "adapters": ({"lora": ADAPTERS}, MeshConfig(1, stage=2), PipelineConfig(4, 2)),
    "tensor_fsdp": (
        {"remat": "dots"}, MeshConfig(1, fsdp=2, tensor=2, stage=2), PipelineConfig(4)
    ),
    "dropless": ({"moe": DROPLESS}, MeshConfig(2, expert=2, stage=2), PipelineConfig(4, 2)),
    "dropping": ({"moe": DROPPING}, MeshConfig(2, expert=2, stage=2), PipelineConfig(4)),
    "experts_alone": (
        {"moe": DROPLESS, "remat": "full"}, MeshConfig(1, stage=2), PipelineConfig(8)
    ),
}  # fmt: skip


@functools.cache
def case(name):
    changes, mesh, settings = CASES[name]
    config = dataclasses.replace(CONFIG, **changes)
    return *gradients_on(dataclasses.replace(config, pipeline=settings), mesh), config


@pytest.mark.parametrize("name", [
    "gpipe", "interleaved", "tensor_fsdp", "dropless",
    *(pytest.param(name, marks=pytest.mark.slow) for name in (
        "one_micro_batch_a_stage", "interleaved_remat", "adapters", "dropping", "experts_alone",
    )),
])  # fmt: skip
def test_loss_metrics_and_gradients_are_those_of_one_device(name):
    found, _, config = case(name)
    # DoRA's gradient is what a projection leaves of a larger one (arXiv:2402.09353).
    assert_same(found, alone(config), tolerance=2e-5 if config.lora else 1e-5)


def collectives(program, kind):
    """Shapes, without dimensions of 1, of the results of all collectives of a kind."""
    shapes = re.findall(rf"= \w+\[([\d,]*)\]\S* {kind}(?:-start)?\(", program)
    return {tuple(int(n) for n in shape.split(",") if n not in ("", "1")) for shape in shapes}


def test_activations_pass_to_the_neighbour_and_parameters_stay():
    """In GPipe's order no device ever sees another stage's layers; interleaved, they change places
    once a step."""
    _, program, config = case("gpipe")
    micro_batch = (BATCH // 8, LENGTH, config.embed_dim)
    assert collectives(program, "collective-permute") == {micro_batch}
    kernels = {x.shape[1:] for x in jax.tree.leaves(parameters(config)[0]["layers"]) if x.ndim > 2}
    gathered = collectives(program, "all-gather")
    assert gathered  # rows for the loss of this CPU, and what says which tokens belong together
    assert not [
        shape for shape in gathered for kernel in kernels if shape[-len(kernel) :] == kernel
    ]
    assert " all-to-all(" not in program
    assert " all-to-all(" in case("interleaved")[1]


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
@pytest.mark.parametrize("repeats", [1, 2])
def test_the_backward_pass_keeps_no_copies_of_the_parameters(remat, repeats):
    """Of what the loop over iterations stacks, nothing has the shape of a kernel; with full remat
    one block input for each layer that a micro-batch meets, and what the rows share."""
    settings = PipelineConfig(8, repeats)
    config = dataclasses.replace(CONFIG, remat=remat, pipeline=settings, mlp_dim=40)
    model = LanguageModel(config)
    shapes = jax.eval_shape(lambda: sharding.unbox(model.init(jax.random.key(0))))
    objective = make_objective(model, LossConfig())
    with jax.set_mesh(mesh_of(MeshConfig(1, stage=2))):
        jaxpr = jax.make_jaxpr(
            jax.grad(lambda params, batch: objective(params, batch, None)[0].total)
        )(shapes, ragged_batch(0))
    iterations = Schedule(2, 8, repeats).iterations
    forward = next(
        equation for equation in jaxpr.eqns
        if equation.primitive.name == "scan" and equation.params["length"] == iterations
    )  # fmt: skip
    kept = [v.aval.shape[1:] for v in forward.outvars if v.aval.shape[:1] == (iterations,)]
    layers = config.num_layers // (2 * repeats)
    kernels = {x.shape[1:] for x in jax.tree.leaves(shapes["layers"]) if x.ndim > 2}
    assert not [shape for shape in kept if shape[2:] in kernels or shape[3:] in kernels]
    if remat == "full":
        block_input = (layers, 2, BATCH // 8, LENGTH, config.embed_dim)
        (largest,) = (shape for shape in kept if len(shape) == 5)
        assert largest == block_input
        rest = sum(math.prod(shape) for shape in kept if shape != block_input)
        tables = 2 * (BATCH // 8) * LENGTH * (2 * config.resolved_head_dim // 2 + 2)
        assert rest <= tables + 10


def test_a_few_rows_without_segments_are_filled_up_and_count_once():
    """3 rows on 2 stages x 2 shards: the row of padding takes no expert."""
    config = dataclasses.replace(CONFIG, moe=DROPPING)
    model = LanguageModel(config)
    params, boxed, _ = parameters(config)
    tokens = ragged_batch(0).tokens[:3]
    apply = jax.jit(lambda params, tokens: model.apply_with_routing(params, tokens)[::2])
    expected = apply(params, tokens)
    mesh = mesh_of(MeshConfig(2, stage=2))
    with jax.set_mesh(mesh):
        found = apply(jax.device_put(params, sharding.parameter_shardings(mesh, boxed)), tokens)
    assert_same(jax.device_get(found), jax.device_get(expected))
    assert float(found[1].tokens) == config.num_layers * tokens.size


def test_dropout_is_switched_on_and_the_same_for_the_same_rng():
    config = dataclasses.replace(CONFIG, residual_dropout=0.5, attention_dropout=0.1)
    config = dataclasses.replace(config, pipeline=PipelineConfig(4, 2))
    model = LanguageModel(config)
    params = parameters(dataclasses.replace(config, pipeline=PipelineConfig()))[0]
    tokens = np.tile(ragged_batch(0).tokens[:1], (BATCH, 1))
    with jax.set_mesh(mesh_of(MeshConfig(1, stage=2))):
        apply = jax.jit(lambda rng: model.apply(params, tokens, rng=rng)[0])
        first, again, other = (np.asarray(apply(jax.random.key(seed))) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.1
    # Equal rows of different micro-batches have different masks, as those of one have.
    assert len({row.tobytes() for row in first}) == BATCH


def test_sampling_with_a_cache_gives_the_tokens_of_one_device():
    config = dataclasses.replace(CONFIG, **PATTERN)
    model = LanguageModel(config)
    params, boxed, _ = parameters(config)
    params = jax.tree.map(lambda x: 3 * x, params)  # logits far from uniform
    prompts = [[3, 14, 15, 9, 26], [7], [27, 18, 28]]

    def sampled(params):
        return generate(
            model, params, prompts, max_new_tokens=6, sampler=SamplerConfig(temperature=0),
            rng=jax.random.key(7),
        ).tokens  # fmt: skip

    expected = sampled(params)
    mesh = mesh_of(MeshConfig(2, stage=2))
    with jax.set_mesh(mesh):
        found = sampled(jax.device_put(params, sharding.parameter_shardings(mesh, boxed)))
    np.testing.assert_array_equal(found, expected)


# --- training -------------------------------------------------------------------------------------


def five_steps(config, mesh_config, micro_batches):
    """Losses, gradient norms and final parameters."""
    model, mesh = LanguageModel(config), mesh_of(mesh_config)
    params, boxed, _ = parameters(dataclasses.replace(config, pipeline=PipelineConfig()))
    # Adam's usual epsilon would scale gradients that are nothing but rounding to full steps.
    optimizer = optim.make_optimizer(OptimizerConfig(clip_norm=1.0, epsilon=1e-3), params)
    with jax.set_mesh(mesh):
        where = sharding.parameter_shardings(mesh, boxed)
        _, shardings = step.init_state(lambda rng: params, optimizer, 0, mesh, where)
        state = step.begin(jax.device_put(params, where), optimizer, 0, shardings)
        train_step = step.make_train_step(
            make_objective(model, LossConfig(chunk=8)), optimizer,
            mesh=mesh, shardings=shardings, micro_batches=micro_batches,
        )  # fmt: skip
        measured = []
        for number in range(5):
            batch = jax.device_put(ragged_batch(number), sharding.batch_sharding(mesh))
            state, metrics = train_step(state, batch, np.float32(0.01))
            measured.append((metrics["loss"].value(), metrics["grad_norm"]))
        assert jax.tree.map(lambda x: x.sharding, state) == shardings
    return jax.device_get((measured, state.params))


@functools.cache
def five_steps_alone(config):
    return five_steps(config, ONE, 1)


@pytest.mark.parametrize("changes, mesh, settings, micro_batches", [
    ({}, MeshConfig(1, stage=2), PipelineConfig(4, 2), 2),
    ({}, MeshConfig(1, stage=4), PipelineConfig(8), 2),
    pytest.param(
        {"moe": DROPPING}, MeshConfig(1, stage=2), PipelineConfig(4), 2, marks=pytest.mark.slow
    ),
])  # fmt: skip
def test_five_steps_train_as_one_device_does(changes, mesh, settings, micro_batches):
    """With accumulation outside of the pipeline, in which the balance of experts is pooled."""
    config = dataclasses.replace(CONFIG, **changes)
    found = five_steps(dataclasses.replace(config, pipeline=settings), mesh, micro_batches)
    expected = five_steps_alone(config)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-4)
    for leaf, wanted in zip(jax.tree.leaves(found[1]), jax.tree.leaves(expected[1]), strict=True):
        np.testing.assert_allclose(leaf, wanted, atol=5e-5)


# --- what does not fit ----------------------------------------------------------------------------


@pytest.mark.parametrize("changes, settings, stages, message", [
    ({"scan_layers": False}, {}, 2, r"config\.mesh\.stage=2 .*set model\.scan_layers=True"),
    ({"num_layers": 6}, {}, 4, r"6 groups .* config\.mesh\.stage=4 .* nearest .* is 3 or 6\."),
    ({"num_layers": 6, **PATTERN}, {}, 2, r"3 groups .* nearest .* is 1 or 3\."),
    ({"num_layers": 6}, {"repeats": 3}, 4, r"stage=4 x model\.pipeline\.repeats=3: .* is 2\."),
    ({"num_layers": 6}, {"repeats": 4}, 2, r"repeats=4: lower it\."),
    ({}, {"micro_batches": 7}, 2, r"micro_batches=7 is not a multiple .*stage=2.* such as 8\."),
    ({}, {"micro_batches": 1}, 4, r"micro_batches=1 is not a multiple .*stage=4.* such as 4\."),
])  # fmt: skip
def test_what_does_not_fit_the_stages_is_refused(changes, settings, stages, message):
    config = dataclasses.replace(CONFIG, **changes, pipeline=PipelineConfig(**settings))
    with pytest.raises(UserError, match=message):
        micro_batches_per_stage(config, mesh_of(MeshConfig(1, stage=stages)))
    assert micro_batches_per_stage(config, mesh_of(ONE)) == 1
