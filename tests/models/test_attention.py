"""Every attention backend against a loop over queries written in numpy, and against einsum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.errors import UserError
from llm_jax.mesh import MeshConfig, make_mesh
from llm_jax.models import ModelConfig
from llm_jax.models.attention import attention, choose_backend

# batch, kv heads, group, time, head dim; the splash kernel pads the odd length to its block
SHAPE = (2, 2, 2, 37, 8)
CASES = {
    "plain": {},
    "segments": {"segments": True},
    "window": {"window": 5},
    "window_of_one": {"window": 1},
    "segments_and_window": {"segments": True, "window": 4},
    "soft_cap": {"soft_cap": 2.0, "segments": True},
}


@pytest.fixture(autouse=True)
def _exact_products():
    with jax.default_matmul_precision("highest"):
        yield


def inputs(shape=SHAPE):
    rng = np.random.default_rng(0)
    B, K, G, T, H = shape
    q = rng.normal(size=(B, K, G, T, H)).astype(np.float32)
    k, v = (rng.normal(size=(B, K, T, H)).astype(np.float32) for _ in range(2))
    # Two documents and padding in the first row, one and padding of another length in the second.
    segments = np.zeros((B, T), np.int32)
    segments[0, :11], segments[0, 11:30], segments[1:, :25] = 1, 2, 1
    return q, k, v, segments


def by_hand(q, k, v, segments=None, window=None, soft_cap=None):
    """One query at a time, with only the keys that it may see."""
    B, K, G, T, H = q.shape
    out = np.zeros_like(q)
    for b, h, g, t in np.ndindex(B, K, G, T):
        seen = [
            s
            for s in range(t + 1)
            if (segments is None or segments[b, s] == segments[b, t])
            and (window is None or t - s < window)
        ]
        scores = k[b, h, seen] @ q[b, h, g, t] / np.sqrt(H)
        if soft_cap is not None:
            scores = soft_cap * np.tanh(scores / soft_cap)
        weights = np.exp(scores - scores.max())
        out[b, h, g, t] = weights @ v[b, h, seen] / weights.sum()
    return out


def run(backend, q, k, v, segments, window=None, soft_cap=None):
    return attention(
        q, k, v, backend=backend, window=window, soft_cap=soft_cap,
        query_segment_ids_BT=segments, key_segment_ids_BS=segments, interpret=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("backend", "case"),
    [
        *(("einsum", case) for case in CASES),
        *(("xla", case) for case in CASES if case != "soft_cap"),
        # the interpreter is slow, so these take several settings at once
        *(("splash", case) for case in ("plain", "segments_and_window", "soft_cap")),
    ],
)
def test_output_and_gradient(backend, case):
    case = dict(CASES[case])
    q, k, v, segments = inputs()
    segments = segments if case.pop("segments", False) else None
    real = np.ones(SHAPE[:1] + SHAPE[3:4], bool) if segments is None else segments > 0
    probe = np.random.default_rng(1).normal(size=SHAPE).astype(np.float32)
    probe = probe * real[:, None, None, :, None]  # padding's output counts for nothing

    def loss(backend):
        def total(q, k, v):
            out = run(backend, q, k, v, segments, **case)
            return jnp.sum(out * probe), out

        return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))

    (_, out), gradients = loss(backend)(q, k, v)
    expected = by_hand(q, k, v, segments, **case)
    np.testing.assert_allclose(
        np.where(real[:, None, None, :, None], out - expected, 0), 0, atol=2e-6
    )
    assert np.all(np.isfinite(out))
    _, reference = loss("einsum")(q, k, v)
    for gradient, wanted in zip(gradients, reference, strict=True):
        assert np.all(np.isfinite(gradient))
        np.testing.assert_allclose(gradient, wanted, atol=2e-5)


@pytest.mark.parametrize("window", [None, 40, 200])
@pytest.mark.parametrize("time", [300, 513])
def test_rows_long_enough_for_blocks_of_queries(time, window):
    """The xla backend knows no blocks; neither length is a multiple of its blocks' number."""
    q, k, v, _ = inputs((1, 1, 2, time, 8))
    segments = (1 + (np.arange(time) >= 170))[None].astype(np.int32)
    probe = np.random.default_rng(1).normal(size=q.shape).astype(np.float32)

    def loss(backend):
        def total(q, k, v):
            out = run(backend, q, k, v, segments, window)
            return jnp.sum(out * probe), out

        return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))

    (_, out), gradients = loss("einsum")(q, k, v)
    (_, expected), wanted = loss("xla")(q, k, v)
    np.testing.assert_allclose(out, by_hand(q, k, v, segments, window), atol=2e-6)
    np.testing.assert_allclose(out, expected, atol=2e-6)
    for gradient, reference in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(gradient, reference, atol=2e-5)


@pytest.mark.parametrize("backend", ["einsum", "xla", "splash"])
def test_no_gradient_flows_from_a_query_to_a_later_key_another_segment_or_past_the_window(backend):
    q, k, v, segments = inputs()
    query, window = 20, 6

    def one_query(k, v):
        return jnp.sum(run(backend, q, k, v, segments, window=window)[0, :, :, query])

    for gradient in jax.jit(jax.grad(one_query, argnums=(0, 1)))(k, v):
        touched = np.abs(gradient).sum(axis=(1, 3)) > 0
        expected = np.zeros_like(touched)
        expected[0, query - window + 1 : query + 1] = True
        np.testing.assert_array_equal(touched, expected)


def test_a_row_of_padding_alone_gives_no_nan():
    q, k, v, segments = inputs()
    segments[1] = 0
    for backend in ("einsum", "xla", "splash"):
        out, gradient = jax.jit(
            jax.value_and_grad(lambda q, b=backend: jnp.sum(run(b, q, k, v, segments)[0]))
        )(q)
        assert np.isfinite(out) and np.all(np.isfinite(gradient))


def test_splash_on_a_mesh_equals_einsum():
    q, k, v, segments = inputs((4, 2, 1, 16, 8))
    expected = run("einsum", q, k, v, segments)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices()[:8])
    with jax.set_mesh(mesh):
        actual = jax.jit(lambda *x: run("splash", *x, segments))(q, k, v)
    np.testing.assert_allclose(actual, expected, atol=2e-6)


def test_dropout_keeps_the_mean_and_is_a_function_of_the_key():
    q, k, v, _ = inputs()
    plain = attention(q, k, v, backend="einsum")

    @jax.jit
    def dropped(rng):
        return attention(q, k, v, backend="einsum", dropout=0.3, dropout_rng=rng)

    np.testing.assert_array_equal(dropped(jax.random.key(0)), dropped(jax.random.key(0)))
    mean = jnp.mean(jax.vmap(dropped)(jax.random.split(jax.random.key(1), 400)), axis=0)
    assert np.abs(dropped(jax.random.key(0)) - plain).max() > 0.1
    np.testing.assert_allclose(mean, plain, atol=0.25)


def test_what_a_backend_cannot_do_is_refused():
    q, k, v, _ = inputs()
    for backend, settings in [
        ("xla", {"soft_cap": 1.0}),
        ("xla", {"dropout": 0.1}),
        ("splash", {"dropout": 0.1}),
        ("cudnn", {"soft_cap": 1.0}),
        ("cudnn", {}),  # float32
        ("flash", {}),
    ]:
        with pytest.raises(UserError, match="attention"):
            attention(q, k, v, backend=backend, **settings)


def test_choice_of_backend():
    def choose(platform, **settings):
        return choose_backend(ModelConfig(head_dim=64, **settings), platform)

    assert choose("cpu") == "einsum"
    assert choose("tpu") == "splash"
    assert choose("tpu", attention_dropout=0.1) == "einsum"
    assert choose("cuda", dtype="bfloat16") == "cudnn"
    assert choose("gpu") == "xla"
    assert choose("gpu", dtype="bfloat16", attention_soft_cap=30.0) == "einsum"
    assert choose("cpu", attention_backend="xla") == "xla"
    with pytest.raises(UserError, match="runs on tpu"):
        choose("cpu", attention_backend="splash")
    with pytest.raises(UserError, match="soft cap"):
        choose("gpu", attention_backend="xla", attention_soft_cap=30.0)
