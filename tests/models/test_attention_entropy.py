"""Entropy of attention weights: against its closed forms, by hand, and through the whole model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.models import LanguageModel, ModelConfig
from llm_jax.models.attention import attention_entropy
from llm_jax.sharding import unbox

CONFIG = ModelConfig(
    vocab_size=31, embed_dim=16, num_layers=4, num_heads=4, num_kv_heads=2, mlp_dim=16, window=3,
    attention_pattern=("local", "global"),
)  # fmt: skip
SEGMENTS = np.array([[1] * 5 + [2] * 6 + [0] * 2, [1] * 13], np.int32)


def visible(segments, window):
    """Which keys each query sees, bool [batch, time, time]."""
    back = np.arange(segments.shape[1])[:, None] - np.arange(segments.shape[1])
    near = (back >= 0) & (back < (window or np.inf))
    return near & (segments[:, :, None] == segments[:, None, :])


@pytest.mark.parametrize("window", [None, 4])
def test_equal_scores_give_the_log_of_the_visible_keys(window):
    q, k = np.zeros((2, 2, 3, 13, 8), np.float32), np.ones((2, 2, 13, 8), np.float32)
    found = attention_entropy(q, k, SEGMENTS, scale=1.0, window=window, soft_cap=None)
    expected = np.log(visible(SEGMENTS, window).sum(axis=2))[:, None, None]
    np.testing.assert_allclose(found, np.broadcast_to(expected, found.shape), atol=1e-6)


def test_one_key_that_outweighs_all_others_gives_zero():
    q, k = np.ones((1, 1, 1, 9, 4), np.float32), np.zeros((1, 1, 9, 4), np.float32)
    k[:, :, 0] = 1000.0
    found = attention_entropy(q, k, None, scale=1.0, window=None, soft_cap=None)
    np.testing.assert_array_equal(found, 0)


@pytest.mark.parametrize(("window", "soft_cap", "time"), [(None, None, 9), (60, 1.5, 300)])
def test_entropy_by_hand(window, soft_cap, time):
    """300 queries are more than one block of them."""
    rng = np.random.default_rng(0)
    q = rng.normal(size=(1, 2, 2, time, 8)).astype(np.float32)
    k = rng.normal(size=(1, 2, time, 8)).astype(np.float32)
    segments = np.where(np.arange(time) < 4, 1, 2)[None]
    scores = 0.7 * np.einsum("bkgth,bksh->bkgts", q, k, dtype=np.float64)
    if soft_cap is not None:
        scores = soft_cap * np.tanh(scores / soft_cap)
    weights = np.where(visible(segments, window)[:, None, None], np.exp(scores), 0)
    weights /= weights.sum(axis=-1, keepdims=True)
    expected = -np.sum(weights * np.log(np.where(weights > 0, weights, 1)), axis=-1)
    found = attention_entropy(q, k, segments, scale=0.7, window=window, soft_cap=soft_cap)
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_every_layer_of_a_model_is_told_apart_scanned_or_not():
    model = LanguageModel(CONFIG)
    rng = np.random.default_rng(0)
    shapes = unbox(jax.eval_shape(model.init, jax.random.key(0)))
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), shapes)
    blind = params["layer_2"]["attention"]["qkv"]["kernel"]
    params["layer_2"]["attention"]["qkv"]["kernel"] = jnp.zeros_like(blind)
    tokens = rng.integers(CONFIG.vocab_size, size=SEGMENTS.shape)
    found = jax.jit(model.attention_entropy)(params, tokens, None, SEGMENTS)
    assert found.shape == (4, 2, 4, 13)
    local, everywhere = (np.log(visible(SEGMENTS, w).sum(axis=2))[:, None] for w in (3, None))
    np.testing.assert_allclose(found[2], np.broadcast_to(local, found[2].shape), atol=1e-5)
    for layer, bound in ((0, local), (1, everywhere), (3, everywhere)):
        assert np.all(found[layer] <= bound + 1e-5) and np.any(found[layer] < bound - 0.1)

    stacked = {name: value for name, value in params.items() if not name.startswith("layer_")}
    stacked["layers"] = {
        f"block_{place}": jax.tree.map(
            lambda *x: jnp.stack(x), *(params[f"layer_{i}"] for i in (place, place + 2))
        )
        for place in (0, 1)
    }
    scanned = LanguageModel(dataclasses.replace(CONFIG, scan_layers=True, remat="full"))
    again = jax.jit(scanned.attention_entropy)(stacked, tokens, None, SEGMENTS)
    np.testing.assert_allclose(again, found, atol=1e-5)


def test_stages_and_rows_in_parts_are_refused():
    mesh = jax.make_mesh((1, 2), ("stage", "context"), devices=jax.devices()[:2])
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="context"):
        LanguageModel(CONFIG).attention_entropy({}, SEGMENTS)
