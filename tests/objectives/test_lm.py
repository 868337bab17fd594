"""The language-model loss against closed forms and an unchunked version written out."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.errors import UserError
from llm_jax.models import LanguageModel, ModelConfig
from llm_jax.objectives.lm import LossConfig, make_objective, token_nats
from llm_jax.sharding import unbox
from llm_jax.types import Batch

V = 53
CHUNKS = (None, 1, 4, 64)  # time is 11


@pytest.fixture(autouse=True)
def _exact_products():
    with jax.default_matmul_precision("highest"):
        yield


class Bigram(LanguageModel):
    """A language model without layers: it compiles in no time and has every part of the loss."""

    def init(self, rng):
        table, output = (jax.random.normal(key, (V, 16)) for key in jax.random.split(rng))
        return {"embedding": table} | ({} if self.config.tie_embeddings else {"output": output.T})

    def apply(self, params, tokens, positions=None, segment_ids=None, *, rng=None, cache=None):
        return jnp.tanh(params["embedding"][tokens]), cache


def make_model(tied=True):
    config = ModelConfig(vocab_size=V, embed_dim=16, logits_soft_cap=8.0, tie_embeddings=tied)
    model = Bigram(config)
    return model, model.init(jax.random.key(0))


def make_batch(batch=3, time=11):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, V, (batch, time + 1)).astype(np.int32)
    weights = rng.choice([0, 1, 0.5], (batch, time)).astype(np.float32)
    ones = np.ones((batch, time), np.int32)
    return Batch(tokens[:, :-1], tokens[:, 1:], weights, ones, np.cumsum(ones, axis=1) - 1)


def written_out(model, params, batch, z_loss):
    """Total, cross-entropy and z-loss with all logits at once."""
    hidden, _ = model.apply(params, batch.tokens, batch.positions, batch.segment_ids)
    logits = model.logits(params, hidden)
    normaliser = jnp.log(jnp.sum(jnp.exp(logits), axis=-1))
    picked = jnp.take_along_axis(logits, batch.targets[..., None], axis=-1)[..., 0]
    entropy = jnp.sum(batch.loss_weights * (normaliser - picked))
    z = z_loss * jnp.sum(batch.loss_weights * normaliser**2)
    hits = jnp.sum(batch.loss_weights * (jnp.argmax(logits, axis=-1) == batch.targets))
    return entropy + z, (entropy, z, hits)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize(("tied", "z_loss"), [(True, 0.01), (False, 0.0)])
def test_loss_metrics_and_gradients_equal_the_written_out_ones(tied, chunk, z_loss):
    model, params = make_model(tied)
    batch = make_batch()
    objective = make_objective(model, LossConfig(chunk, z_loss))

    def total(params):
        loss, metrics = objective(params, batch, None)
        return 3 * loss.total, (loss, metrics)  # 3: the upstream gradient is honoured

    def expected_total(params):
        value, parts = written_out(model, params, batch, z_loss)
        return 3 * value, parts

    (_, (loss, metrics)), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
    (value, (entropy, z, hits)), wanted = jax.jit(jax.value_and_grad(expected_total, has_aux=True))(
        params
    )
    count = batch.loss_weights.sum()
    assert float(loss.total) == pytest.approx(float(value) / 3, rel=1e-5)
    assert float(loss.count) == count
    assert float(metrics["accuracy"].value()) == pytest.approx(float(hits) / count)
    assert ("z_loss" in metrics) == bool(z_loss)
    if z_loss:
        assert float(metrics["z_loss"].total) == pytest.approx(float(z), rel=1e-5)
        assert float(metrics["cross_entropy"].total) == pytest.approx(float(entropy), rel=1e-5)
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, atol=1e-4, rtol=1e-4), gradient, wanted
    )


@pytest.mark.parametrize("chunk", CHUNKS)
def test_token_nats_and_their_gradient(chunk):
    model, params = make_model()
    batch = make_batch()

    def weighted(params):
        nats = token_nats(model, params, batch, chunk)
        return jnp.sum(nats * batch.loss_weights), nats

    (total, nats), gradient = jax.jit(jax.value_and_grad(weighted, has_aux=True))(params)
    (expected, _), wanted = jax.jit(
        jax.value_and_grad(lambda p: written_out(model, p, batch, 0.0), has_aux=True)
    )(params)
    assert nats.shape == (3, 11) and nats.dtype == jnp.float32
    assert float(total) == pytest.approx(float(expected), rel=1e-5)
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, atol=1e-4, rtol=1e-4), gradient, wanted
    )


@pytest.mark.parametrize("chunk", [None, 4])
def test_uniform_logits_give_log_v_and_the_z_loss_its_square(chunk):
    model, params = make_model(tied=False)
    params = {**params, "output": jnp.zeros((16, V))}
    objective = make_objective(model, LossConfig(chunk, z_loss=0.1))
    _, metrics = jax.jit(objective)(params, make_batch(), None)
    assert float(metrics["cross_entropy"].value()) == pytest.approx(math.log(V), rel=1e-6)
    assert float(metrics["z_loss"].value()) == pytest.approx(0.1 * math.log(V) ** 2, rel=1e-6)


@pytest.mark.parametrize("chunk", [None, 4])
def test_nothing_counted_gives_zero_and_no_nan(chunk):
    model, params = make_model()
    batch = make_batch()
    batch = dataclasses.replace(
        batch,
        loss_weights=np.zeros_like(batch.loss_weights),
        segment_ids=np.zeros_like(batch.segment_ids),
    )
    objective = make_objective(model, LossConfig(chunk, z_loss=0.1))
    value, gradient = jax.jit(jax.value_and_grad(lambda p: objective(p, batch, None)[0].total))(
        params
    )
    loss, _ = objective(params, batch, None)
    assert value == 0 and float(loss.value()) == 0
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(gradient))


def test_uncounted_targets_have_no_influence():
    model, params = make_model()
    batch = make_batch()
    changed = dataclasses.replace(
        batch, targets=np.where(batch.loss_weights > 0, batch.targets, V - 1)
    )
    assert np.any(changed.targets != batch.targets)
    gradient = jax.jit(
        jax.grad(lambda p, b: make_objective(model, LossConfig(4))(p, b, None)[0].total)
    )
    jax.tree.map(np.testing.assert_array_equal, gradient(params, batch), gradient(params, changed))


def test_no_array_of_all_logits_is_made():
    """Neither on the way forward nor back does anything hold [batch × time, vocabulary]."""
    vocabulary = 4096
    config = ModelConfig(vocab_size=vocabulary, embed_dim=16, num_layers=1, num_heads=2, mlp_dim=16)
    model = LanguageModel(config)
    params = unbox(jax.eval_shape(model.init, jax.random.key(0)))
    batch = make_batch(2, 64)

    def largest(chunk):
        objective = make_objective(model, LossConfig(chunk))
        step = jax.jit(jax.grad(lambda p: objective(p, batch, None)[0].total))
        return step.lower(params).compile().memory_analysis().temp_size_in_bytes

    logits = 2 * 64 * vocabulary * 4
    assert largest(None) > logits
    assert largest(8) < logits


def test_bad_settings():
    with pytest.raises(UserError, match="chunk"):
        LossConfig(chunk=0)
    with pytest.raises(UserError, match="z_loss"):
        LossConfig(z_loss=-1.0)
