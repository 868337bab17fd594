"""Prefill and decoding with the KV cache equal one pass over the whole text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.models import LanguageModel, ModelConfig, init_cache
from llm_jax.sharding import unbox

LENGTHS = (9, 4, 6)  # of the ragged prompts
NEW = 5  # tokens decoded after them
SLOTS = 16


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize(
    "attention", [{}, {"window": 3}, {"window": 3, "attention_pattern": ("local", "global")}]
)
def test_ragged_prefill_then_decoding_equals_one_pass(scan, attention):
    config = ModelConfig(
        vocab_size=31, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, mlp_dim=32,
        scan_layers=scan, **attention,
    )  # fmt: skip
    model = LanguageModel(config)
    params = unbox(jax.jit(model.init)(jax.random.key(0)))
    texts = jax.random.randint(jax.random.key(1), (3, max(LENGTHS) + NEW), 0, 31)
    with jax.default_matmul_precision("highest"):
        whole, _ = jax.jit(model.apply)(params, texts)

        lengths = np.array(LENGTHS)
        valid = np.arange(max(LENGTHS)) < lengths[:, None]
        prompts = jnp.where(valid, texts[:, : max(LENGTHS)], 7)  # 7 is junk where padding stands
        step = jax.jit(model.apply)
        cache = init_cache(config, 3, SLOTS)
        hidden, cache = step(params, prompts, None, valid.astype(np.int32), cache=cache)
        np.testing.assert_allclose(
            np.where(valid[..., None], hidden - whole[:, : max(LENGTHS)], 0), 0, atol=1e-5
        )
        for i in range(NEW):
            np.testing.assert_array_equal(cache.lengths, lengths + i)
            token = texts[jnp.arange(3), lengths + i][:, None]
            hidden, cache = step(params, token, cache=cache)
            np.testing.assert_allclose(hidden[:, 0], whole[jnp.arange(3), lengths + i], atol=1e-5)


def test_a_finished_row_stays_as_it_is():
    config = ModelConfig(vocab_size=31, embed_dim=16, num_layers=1, num_heads=2, mlp_dim=16)
    model = LanguageModel(config)
    params = unbox(jax.jit(model.init)(jax.random.key(0)))
    step = jax.jit(model.apply)
    tokens = jnp.array([[1, 2, 3], [4, 5, 6]])
    _, cache = step(params, tokens, cache=init_cache(config, 2, 8))
    done = jnp.array([[1], [0]])
    hidden, later = step(params, jnp.array([[7], [7]]), None, done, cache=cache)
    np.testing.assert_array_equal(later.lengths, [4, 3])
    assert np.all(np.isfinite(hidden))
    # The second row goes on as if the padding had never been fed.
    expected, _ = step(params, jnp.array([[8], [8]]), cache=cache)
    actual, _ = step(params, jnp.array([[8], [8]]), cache=later)
    np.testing.assert_allclose(actual[1], expected[1], atol=1e-6)
