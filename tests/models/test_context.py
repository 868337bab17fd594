"""Attention and whole models with rows split over the context axis, against one device."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.mesh import MeshConfig, make_mesh
from llm_jax.models.attention import attention
from llm_jax.models.context import lay_out, to_natural, zigzag
from llm_jax.models.ring import context_attention

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
    B, K, G, T, H = shape
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


def compare(mesh, shape, kind, atol=2e-5, backend="einsum", segments=False, **settings):
    q, k, v, ids, probe = inputs(shape)
    ids = ids if segments else None
    if segments:
        probe = probe * (ids > 0)[:, None, None, :, None]
    gradient = functools.partial(jax.value_and_grad, argnums=(0, 1, 2), has_aux=True)
    reference = jax.jit(gradient(functools.partial(whole, **settings)))
    (_, expected), wanted = reference(q, k, v, ids, probe)
    with jax.set_mesh(make_mesh(mesh)):
        function = functools.partial(split, kind=kind, backend=backend, **settings)
        (_, out), gradients = jax.jit(gradient(function))(q, k, v, ids, probe)
    seen = np.broadcast_to(True if ids is None else (ids > 0)[:, None, None, :, None], out.shape)
    np.testing.assert_allclose(np.where(seen, out - expected, 0), 0, atol=atol)
    assert np.all(np.isfinite(out))
    for actual, reference in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(actual, reference, atol=atol)


@pytest.mark.parametrize("kind", ["ring", "all_gather"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mesh", MESHES)
def test_output_and_gradients_equal_those_of_whole_rows(mesh, case, kind):
    compare(MESHES[mesh], (4, 2, 2, 48, 8), kind, **CASES[case])


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
