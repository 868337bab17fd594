"""Policies keep what their table says, in bytes, and change no number."""

import dataclasses
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.interpreters import partial_eval

from llm_jax.models import LanguageModel, ModelConfig
from llm_jax.models import attention as attention_module
from llm_jax.models.moe import MoeConfig
from llm_jax.models.remat import policy
from llm_jax.sharding import unbox

B, T, D, N, K, H, M, LAYERS = 2, 16, 24, 4, 2, 8, 40, 3
CONFIG = ModelConfig(
    vocab_size=32, embed_dim=D, num_layers=LAYERS, num_heads=N, num_kv_heads=K, head_dim=H,
    mlp_dim=M, dtype="bfloat16", scan_layers=True, max_length=32,
)  # fmt: skip
KEPT = {  # numbers of a token and layer
    "full": D,
    "save_attention": D + N * H,
    "save_qkv_attention": D + N * H + (N + 2 * K) * H,
    "save_products": D + N * H + (N + 2 * K) * H + D + 2 * M,
}
TOKENS = np.random.default_rng(0).integers(0, 32, (B, T)).astype(np.int32)


def make(**changes):
    return LanguageModel(dataclasses.replace(CONFIG, **changes))


def parameters(model):
    return unbox(jax.jit(model.init)(jax.random.key(0)))


def kept(model):
    """How many numbers of the layers' activations the forward pass hands to the backward pass, by
    the memory that they are in."""

    def forward(params):
        return jax.vjp(lambda p: model.apply(p, TOKENS)[0], params)

    params = jax.eval_shape(lambda rng: unbox(model.init(rng)), jax.random.key(0))
    results = jax.make_jaxpr(forward)(params).out_avals
    saved = [a for a in results if a.dtype == jnp.bfloat16 and a.shape[:1] == (LAYERS,)]
    return {
        space: sum(a.size for a in saved if a.memory_space == space)
        for space in (jax.memory.Space.Device, jax.memory.Space.Host)
    }


@pytest.mark.parametrize("remat", KEPT)
def test_each_rung_keeps_what_the_table_says(remat):
    found = kept(make(remat=remat))[jax.memory.Space.Device]
    assert found == LAYERS * B * T * KEPT[remat]


def test_offload_keeps_the_inputs_of_blocks_in_the_hosts_memory_alone():
    found = kept(make(remat="offload"))
    assert found == {jax.memory.Space.Device: 0, jax.memory.Space.Host: LAYERS * B * T * D}


def gradient(model, params):
    def loss(params):
        hidden, _ = model.apply(params, TOKENS)
        return jnp.sum(jnp.sin(hidden.astype(jnp.float32)))

    return jax.jit(jax.grad(loss))(params)


@pytest.fixture
def plain(optimised):
    model = make(dtype="float32")
    params = parameters(model)
    return params, gradient(model, params)


@pytest.mark.parametrize("remat", [*(name for name in KEPT if name != "full"), "offload"])
def test_no_rung_changes_a_gradient(plain, remat):
    params, expected = plain
    found = gradient(make(dtype="float32", remat=remat), params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found, expected)


def test_experts_have_the_same_names():
    moe = MoeConfig(num_experts=4, experts_per_token=2)
    rows = 2 * T * B  # a token has two experts
    per_layer = B * T * (KEPT["save_products"] - 2 * M) + rows * 2 * M
    found = kept(make(moe=moe, remat="save_products"))[jax.memory.Space.Device]
    assert found == LAYERS * per_layer


# --- flash kernels --------------------------------------------------------------------------------


def times_run(backend, remat, kernel):
    """How often an equation with this in its name stands in forward and backward pass together."""
    q, k = (
        jnp.zeros((1, K, N // K, 128, 64), jnp.bfloat16),
        jnp.zeros((1, K, 128, 64), jnp.bfloat16),
    )

    def loss(q, k, v):
        run = jax.checkpoint(
            lambda *qkv: attention_module.attention(*qkv, backend=backend, interpret=True),
            policy=policy(remat),
        )
        return jnp.sum(run(q, k, v).astype(jnp.float32))

    closed = jax.make_jaxpr(jax.value_and_grad(loss, argnums=(0, 1, 2)))(q, k, k)
    needed, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * 4)
    return sum(kernel in f"{e.primitive} {e.params.get('name')}" for e in equations(needed))


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


@pytest.mark.parametrize("remat, times", [("full", 2), ("save_attention", 1)])
def test_splash_runs_again_unless_its_output_is_kept(remat, times):
    assert times_run("splash", remat, "splash_mha_fwd") == times


@pytest.mark.parametrize("remat, times", [("full", 2), ("save_attention", 1)])
def test_cudnn_runs_again_unless_its_output_is_kept(remat, times):
    with (
        mock.patch.object(cudnn, "check_cudnn_version", lambda: 91000),
        mock.patch.object(cudnn, "check_compute_capability", lambda *_: True),
    ):
        assert times_run("cudnn", remat, "dot_product_attention_fwd_wrapper") == times
