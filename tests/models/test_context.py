"""Attention and whole models with rows split over the context axis, against one device."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import sharding
from llm_jax.errors import UserError
from llm_jax.generation.generate import generate
from llm_jax.generation.sampler import SamplerConfig
from llm_jax.mesh import MeshConfig, make_abstract_mesh, make_mesh
from llm_jax.models import LanguageModel, ModelConfig, MoeConfig, RopeConfig, ring
from llm_jax.models.attention import attention
from llm_jax.models.context import check_context, lay_out, to_natural, zigzag
from llm_jax.models.ring import context_attention
from llm_jax.objectives.lm import LossConfig, make_objective
from llm_jax.types import Batch

CASES = {
    "plain": {},
    "segments": {"segments": True},
    "window_within_a_chunk": {"window": 3},
    "window_over_chunks": {"window": 19},
    "everything": {"segments": True, "window": 11, "soft_cap": 2.0},
}
MESHES = {
    "context": MeshConfig(data=1, context=8),
    "two": MeshConfig(data=2, fsdp=2, context=2),
    "products": MeshConfig(data=1, fsdp=2, context=2, tensor=2),
}


@pytest.fixture(autouse=True)
def _exact_products():
    with jax.default_matmul_precision("highest"):
        yield


def inputs(shape):
    rng = np.random.default_rng(0)
    B, K, _, T, H = shape
    q = rng.normal(size=shape).astype(np.float32)
    k, v = (rng.normal(size=(B, K, T, H)).astype(np.float32) for _ in range(2))
    probe = rng.normal(size=shape).astype(np.float32)
    # Two documents and padding in the first row, one and padding in the others.
    segments = np.zeros((B, T), np.int32)
    segments[0, : T // 3], segments[0, T // 3 : T - 5], segments[1:, : T // 2 + 3] = 1, 2, 1
    return q, k, v, segments, probe


def whole(q, k, v, segments, probe, **settings):
    out = attention(
        q, k, v, query_segment_ids_BT=segments, key_segment_ids_BS=segments, backend="einsum",
        **settings,
    )  # fmt: skip
    return jnp.sum(out * probe), out


def split(q, k, v, segments, probe, *, kind, backend="einsum", **settings):
    """The same from natural order to natural order."""
    ways = jax.sharding.get_abstract_mesh().shape["context"]
    order = zigzag(q.shape[3], ways)
    out = context_attention(
        q[:, :, :, order], k[:, :, order], v[:, :, order],
        None if segments is None else segments[:, order],
        kind=kind, backend=backend, scale=q.shape[-1] ** -0.5, interpret=True, **settings,
    )[:, :, :, np.argsort(order)]  # fmt: skip
    return jnp.sum(out * probe), out


def compare(
    mesh, shape, kind, atol=2e-5, backend="einsum", segments=False, dtype="float32", **settings
):
    q, k, v, ids, probe = inputs(shape)
    q, k, v = (jnp.asarray(x, dtype) for x in (q, k, v))
    ids = ids if segments else None
    if segments:
        probe = probe * (ids > 0)[:, None, None, :, None]
    gradient = functools.partial(jax.value_and_grad, argnums=(0, 1, 2), has_aux=True)
    reference = jax.jit(gradient(functools.partial(whole, **settings)))
    (_, expected), wanted = reference(q, k, v, ids, probe)
    devices = jax.devices()[: mesh.data * mesh.fsdp * mesh.context * mesh.tensor]
    with jax.set_mesh(make_mesh(mesh, devices)):
        function = functools.partial(split, kind=kind, backend=backend, **settings)
        (_, out), gradients = jax.jit(gradient(function))(q, k, v, ids, probe)
    seen = np.broadcast_to(True if ids is None else (ids > 0)[:, None, None, :, None], out.shape)
    np.testing.assert_allclose(np.where(seen, out - expected, 0), 0, atol=atol)
    assert np.all(np.isfinite(out))
    for actual, reference in zip(gradients, wanted, strict=True):
        assert actual.dtype == dtype
        actual, reference = (np.asarray(x, np.float32) for x in (actual, reference))
        np.testing.assert_allclose(actual, reference, atol=atol)


@pytest.mark.parametrize("kind", ["ring", "all_gather"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mesh", MESHES)
def test_output_and_gradients_equal_those_of_whole_rows(mesh, case, kind):
    compare(MESHES[mesh], (4, 2, 2, 48, 8), kind, **CASES[case])


@pytest.mark.parametrize("kind", ["ring", "all_gather"])
def test_sixteen_bits(kind):
    """Gradients of up to 4, whose last of 8 bits is 2⁻⁵."""
    settings = {"dtype": "bfloat16", "atol": 0.05, "segments": True, "window": 11}
    compare(MeshConfig(data=1, context=4), (2, 2, 2, 48, 8), kind, **settings)


@pytest.mark.parametrize("kind", ["ring", "all_gather"])
@pytest.mark.parametrize("settings", [{}, {"segments": True, "window": 150, "soft_cap": 2.0}])
def test_kernels_of_splash_equal_products(kind, settings):
    """At the smallest chunks that the kernels take, two a device."""
    mesh = MeshConfig(data=1, context=2)
    compare(mesh, (1, 1, 2, 512, 8), kind, backend="splash", **settings)


@pytest.mark.parametrize("kind", ["ring", "all_gather"])
def test_groups_of_layers_run_side_by_side(kind):
    """A dimension of stages over the rows, as a pipeline has it."""
    q, k, v, ids, probe = inputs((4, 2, 1, 16, 8))
    (_, expected), wanted = jax.value_and_grad(whole, (0, 1, 2), has_aux=True)(q, k, v, ids, probe)
    staged = [jnp.asarray(x).reshape(2, 2, *x.shape[1:]) for x in (q, k, v, ids, probe)]

    def total(*operands):
        sums, out = jax.vmap(functools.partial(split, kind=kind), spmd_axis_name="stage")(*operands)
        return jnp.sum(sums), out

    with jax.set_mesh(make_mesh(MeshConfig(stage=2, data=2, context=2))):
        gradient = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))
        (_, out), gradients = gradient(*staged)
    for one, other in zip((out, *gradients), (expected, *wanted), strict=True):
        np.testing.assert_allclose(one.reshape(other.shape), other, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ring", "all_gather"])
@pytest.mark.parametrize("window", [None, 100, 300, 700])
def test_kernels_of_splash_with_several_blocks_a_chunk(kind, window):
    mesh = MeshConfig(data=1, context=2, tensor=2)
    compare(mesh, (1, 2, 2, 4 * 384, 8), kind, backend="splash", segments=True, window=window)


@pytest.mark.parametrize("time", [8, 48])
@pytest.mark.parametrize("ways", [2, 4])
def test_hidden_states_come_back_to_where_their_tokens_were(time, ways):
    tokens = jnp.arange(3 * time).reshape(3, time)
    with jax.set_mesh(make_mesh(MeshConfig(context=ways, tensor=8 // ways, data=1))):
        laid, positions, segments = lay_out(tokens, None, tokens + 1, ways)
        natural = jax.jit(functools.partial(to_natural, ways=ways))(laid[..., None])[..., 0]
    np.testing.assert_array_equal(natural, tokens)
    np.testing.assert_array_equal(laid, segments - 1)
    np.testing.assert_array_equal(laid[0], positions[0])
    # The first device has the first chunk and the last one.
    shard, chunk = time // ways, time // (2 * ways)
    assert laid[0, :chunk].tolist() == list(range(chunk))
    assert laid[0, chunk:shard].tolist() == list(range(time - chunk, time))


# --- whole models ---------------------------------------------------------------------------------

EXPERTS = MoeConfig(num_experts=4, experts_per_token=2)
MODELS = {
    "dense": {"num_kv_heads": 2, "rope": RopeConfig(scaling="dynamic", factor=2.0,
                                                    original_length=8)},
    "pattern": {"window": 5, "attention_pattern": ("local", "global"), "remat": "full",
                "scan_layers": True, "position": "learned", "max_length": 64},
    "dropless": {"moe": EXPERTS},
    "dropping": {"moe": dataclasses.replace(EXPERTS, capacity_factor=0.7)},
}  # fmt: skip


def tiny(**settings):
    return LanguageModel(
        ModelConfig(vocab_size=64, embed_dim=16, num_layers=2, num_heads=4, mlp_dim=32, **settings)
    )


def rows(batch, time):
    rng = np.random.default_rng(2)
    tokens = rng.integers(1, 64, (batch, time), dtype=np.int32)
    segments = np.ones((batch, time), np.int32)
    segments[:, time // 3 :] = 2
    segments[0, -3:] = 0
    positions = np.concatenate([np.arange(time // 3), np.arange(time - time // 3)])
    positions = np.broadcast_to(positions, tokens.shape).astype(np.int32)
    weights = (segments > 0).astype(np.float32) * rng.uniform(0.5, 1, tokens.shape)
    return Batch(
        tokens=tokens,
        targets=np.roll(tokens, -1, axis=1),
        loss_weights=weights.astype(np.float32),
        positions=positions,
        segment_ids=segments,
    )


def loss_and_gradients(model, batch, params):
    objective = make_objective(model, LossConfig(chunk=8, router_z=0.1 if model.config.moe else 0))

    def total(params):
        loss, metrics = objective(params, batch, None)
        return loss.total, metrics

    (loss, metrics), gradients = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
    return loss, metrics, gradients


@pytest.mark.parametrize("kind", ["ring", "all_gather"])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_of_a_model_are_those_on_one_device(name, kind):
    model = tiny(**MODELS[name], context_attention=kind)
    batch, boxed = rows(4, 32), model.init(jax.random.key(0))
    params = sharding.unbox(boxed)
    expected = loss_and_gradients(model, batch, params)
    experts = 2 if model.config.moe else 1
    mesh = make_mesh(MeshConfig(data=1, expert=experts, fsdp=2 // experts, context=2, tensor=2))
    with jax.set_mesh(mesh):
        laid = jax.device_put(params, sharding.parameter_shardings(mesh, boxed))
        batch = jax.device_put(batch, sharding.batch_sharding(mesh))
        actual = loss_and_gradients(model, batch, laid)
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)


def test_rows_that_have_no_equal_chunks_stay_whole():
    """And neither do three rows fill the four shards of the batch."""
    model = tiny()
    params = sharding.unbox(model.init(jax.random.key(0)))
    with jax.set_mesh(make_mesh(MeshConfig(data=4, context=2))):
        for time in (1, 7, 10, 16):
            batch = rows(3, time)
            operands = (params, batch.tokens, batch.positions, batch.segment_ids)
            actual, _ = jax.jit(model.apply)(*operands)
            with jax.set_mesh(make_mesh(MeshConfig(data=1), jax.devices()[:1])):
                expected, _ = jax.jit(model.apply)(*jax.device_get(operands))
            np.testing.assert_allclose(actual, expected, atol=2e-5)


def test_the_same_tokens_are_generated():
    model = tiny()
    boxed = model.init(jax.random.key(0))
    prompts = [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1]]
    settings = {"max_new_tokens": 8, "sampler": SamplerConfig(temperature=0.0), "stop_ids": ()}
    expected = generate(model, sharding.unbox(boxed), prompts, rng=jax.random.key(1), **settings)
    mesh = make_mesh(MeshConfig(data=2, context=4))
    with jax.set_mesh(mesh):
        params = jax.device_put(sharding.unbox(boxed), sharding.parameter_shardings(mesh, boxed))
        actual = generate(model, params, prompts, rng=jax.random.key(1), **settings)
    np.testing.assert_array_equal(actual.tokens, expected.tokens)


# --- what it costs --------------------------------------------------------------------------------


def compiled(kind, time, ways=4):
    """The gradient of attention alone, for rows of `time` tokens."""
    shape, keys = (1, 2, 2, time, 8), (1, 2, time, 8)
    mesh = make_mesh(MeshConfig(data=1, context=ways), jax.devices()[:ways])

    def total(q, k, v):
        out = context_attention(q, k, v, None, kind=kind, backend="einsum", scale=1.0)
        return jnp.sum(jnp.square(out))

    def placed(shape):
        axes = (None,) * (len(shape) - 2) + ("activation_time", None)
        layout = jax.sharding.NamedSharding(mesh, sharding.spec(axes))
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=layout)

    with jax.set_mesh(mesh):
        gradient = jax.jit(jax.grad(total, argnums=(0, 1, 2)))
        return gradient.lower(placed(shape), placed(keys), placed(keys)).compile()


def test_a_ring_gathers_nothing_and_its_memory_is_that_of_a_shard():
    """Past the scores of one block of queries the memory grows with the shard and not the row."""
    text = compiled("ring", 64).as_text()
    assert "all-gather" not in text and "collective-permute" in text
    assert "all-gather" in compiled("all_gather", 64).as_text()
    # Twice the row on twice the devices is the same shard.
    small, large = (compiled("ring", 64 * n, n).memory_analysis() for n in (2, 8))
    assert large.temp_size_in_bytes < 1.1 * small.temp_size_in_bytes
    gathered = [compiled("all_gather", 64 * n, n).memory_analysis() for n in (2, 8)]
    assert gathered[1].temp_size_in_bytes > 2 * gathered[0].temp_size_in_bytes


@pytest.mark.parametrize("ways", [2, 4, 8])
def test_every_device_meets_as_many_pairs_at_every_step_and_all_that_are_seen(ways):
    """By `_pairs` itself, evaluated on each device: early is chunk i, late 2n - 1 - i."""
    layer = ring.Layer("einsum", None, None, False)

    def met(owners):
        """[steps, pairs, 2] of this device: chunks of queries and of keys."""
        me = jax.lax.axis_index("context")
        rows = []
        for owner in (None, *owners[0]):
            pairs = ring._pairs(layer, owner, 1)
            rows.append(
                [
                    (
                        ring._chunk(me, mine, ways),
                        ring._chunk(me if owner is None else owner, theirs, ways),
                    )
                    for mine, theirs, _ in pairs
                ]
            )
        return jnp.asarray(rows[0])[None], jnp.asarray(rows[1:])[None]

    mesh = make_mesh(MeshConfig(data=1, context=ways), jax.devices()[:ways])
    owners = np.asarray([[(i - step) % ways for step in range(1, ways)] for i in range(ways)])
    part = jax.sharding.PartitionSpec("context")
    with jax.set_mesh(mesh):
        own, others = jax.jit(
            jax.shard_map(met, in_specs=part, out_specs=(part, part), check_vma=False)
        )(owners)
    assert own.shape == (ways, 3, 2) and others.shape == (ways, ways - 1, 2, 2)
    seen = sorted(map(tuple, np.concatenate([own.reshape(-1, 2), others.reshape(-1, 2)]).tolist()))
    assert seen == [(q, k) for q in range(2 * ways) for k in range(q + 1)]


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "backend", "length", "message"),
    [
        ({}, "einsum", 30, "length 30 .* make it 24 or 32"),
        ({}, "einsum", 3, "make it 8"),
        ({}, "splash", 1100, "make it 1024 or 2048"),
        ({"attention_dropout": 0.1}, "einsum", 32, "attention_dropout"),
        ({"attention_backend": "xla"}, "xla", 32, "takes whole rows only"),
    ],
)
def test_what_rows_in_parts_cannot_do_is_refused(settings, backend, length, message):
    mesh = make_abstract_mesh(MeshConfig(context=4, tensor=2))
    config = ModelConfig(**settings)
    with pytest.raises(UserError, match=message):
        check_context(config, backend, mesh, length)
    check_context(config, backend, make_abstract_mesh(MeshConfig(tensor=2)), length)
    check_context(ModelConfig(), backend, mesh, 2048)
