"""Noise on embeddings: its reach by document, and that only training has it."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.errors import UserError
from llm_jax.models import LanguageModel, ModelConfig
from llm_jax.sharding import unbox

# So large an epsilon divides by its root alone: the final norm, too, passes on what it sees.
EPSILON = 1e8
CONFIG = ModelConfig(
    vocab_size=8, embed_dim=32, num_layers=2, num_heads=2, mlp_dim=16, norm_epsilon=EPSILON
)


def noise(alpha, segment_ids=None, rng=None, **changes):
    """What is added to embeddings of zeros, float32 [64, 16, 32]: no layer adds anything to it."""
    model = LanguageModel(dataclasses.replace(CONFIG, neftune_alpha=alpha, **changes))
    shapes = unbox(jax.eval_shape(model.init, jax.random.key(0)))
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.full(x.shape, float(path[-1].key == "scale")), shapes
    )
    hidden, _ = jax.jit(model.apply)(
        params, jnp.zeros((64, 16), jnp.int32), segment_ids=segment_ids, rng=rng
    )
    return np.asarray(hidden) * math.sqrt(EPSILON)


@pytest.mark.parametrize("scan", [False, True])
def test_its_reach_is_that_of_the_document_and_padding_has_none(scan):
    segment_ids = jnp.tile(jnp.array([1] * 4 + [2] * 9 + [0] * 3), (64, 1))
    added = noise(5.0, segment_ids, jax.random.key(0), scan_layers=scan)
    for part, length in ((added[:, :4], 4), (added[:, 4:13], 9)):
        reach = 5 / math.sqrt(length * 32)
        assert 0.99 * reach < np.abs(part).max() <= 1.0001 * reach
        assert np.std(part) == pytest.approx(reach / math.sqrt(3), rel=0.02)
        assert abs(np.mean(part)) < 0.02 * reach
    assert not np.any(added[:, 13:])


def test_without_segments_the_row_is_the_document():
    added = noise(5.0, None, jax.random.key(0))
    assert np.std(added) == pytest.approx(5 / math.sqrt(3 * 16 * 32), rel=0.02)
    assert np.any(added != noise(5.0, None, jax.random.key(1)))


def test_only_training_has_it():
    assert not np.any(noise(5.0))
    assert not np.any(noise(0.0, None, jax.random.key(0)))


def test_a_negative_alpha_is_refused():
    with pytest.raises(UserError, match=r"neftune_alpha=-1\.0 must not be negative"):
        ModelConfig(neftune_alpha=-1.0)
