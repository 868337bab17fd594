"""The language-model loss against closed forms and an unchunked version written out."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.errors import UserError
from llm_jax.models import LanguageModel, ModelConfig
from llm_jax.models.moe import MoeConfig, Routing
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

    def apply_with_routing(
        self, params, tokens, positions=None, segment_ids=None, *, rng=None, cache=None
    ):
        return jnp.tanh(params["embedding"][tokens]), cache, None


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


# --- the losses of routers ------------------------------------------------------------------------

E, K, LAYERS = 4, 2, 3


class RoutedBigram(Bigram):
    """Routers that look at the token alone: their logits are tables, [layers, V, E]."""

    def init(self, rng):
        routers = 3 * jax.random.normal(rng, (LAYERS, V, E))
        return super().init(rng) | {"routers": routers}

    def apply_with_routing(self, params, tokens, positions=None, segment_ids=None, **_):
        hidden, cache, _ = super().apply_with_routing(params, tokens)
        routing = []
        for logits in params["routers"][:, tokens]:
            real = (segment_ids != 0).astype(jnp.float32)
            chosen = logits >= jnp.sort(logits, axis=-1)[..., -K, None]
            routing.append(Routing(
                jnp.einsum("bt,bte->e", real, chosen.astype(jnp.float32)),
                jnp.einsum("bt,bte->e", real, jax.nn.softmax(logits)),
                jnp.sum(real * jax.nn.logsumexp(logits, axis=-1) ** 2),
                jnp.sum(real),
                jnp.sum(real * (tokens % 2)),
            ))  # fmt: skip
        return hidden, cache, routing[0] + routing[1] + routing[2]


def make_routed(capacity_factor=None):
    config = ModelConfig(
        vocab_size=V, embed_dim=16, num_layers=LAYERS, moe=MoeConfig(E, K, True, capacity_factor)
    )
    model = RoutedBigram(config)
    return model, model.init(jax.random.key(0))


def make_padded_batch():
    batch = make_batch()
    segments = batch.segment_ids.copy()
    segments[0, 7:] = segments[2, 4:] = 0
    weights = np.where(segments > 0, batch.loss_weights, 0)
    return dataclasses.replace(batch, segment_ids=segments, loss_weights=weights)


def published(params, batch):
    """Load balance as published code has it, of all layers' real tokens in one list; and z."""
    tokens = batch.tokens[batch.segment_ids > 0]
    logits = jnp.concatenate(list(params["routers"][:, tokens]))
    probabilities = jax.nn.softmax(logits)
    chosen = jax.nn.one_hot(jax.lax.top_k(probabilities, K)[1], E)  # [tokens, K, E]
    share_KE, mean_E = jnp.mean(chosen, axis=0), jnp.mean(probabilities, axis=0)
    return E * jnp.sum(share_KE * mean_E), jnp.mean(jax.nn.logsumexp(logits, axis=-1) ** 2)


@pytest.mark.parametrize("load_balance, router_z", [(0.5, 0.0), (0.0, 0.2), (0.5, 0.2)])
def test_router_losses_are_the_published_ones_whatever_the_loss_counts(load_balance, router_z):
    model, params = make_routed()
    batch = make_padded_batch()
    objective = make_objective(model, LossConfig(load_balance=load_balance, router_z=router_z))

    def mean(params):
        loss, metrics = objective(params, batch, None)
        return loss.value(), metrics

    def expected_mean(params):
        balance, z = published(params, batch)
        total, _ = written_out(model, params, batch, 0.0)
        entropy = total / batch.loss_weights.sum()
        return entropy + load_balance * balance + router_z * z, (entropy, balance, z)

    (value, metrics), gradient = jax.jit(jax.value_and_grad(mean, has_aux=True))(params)
    (expected, parts), wanted = jax.jit(jax.value_and_grad(expected_mean, has_aux=True))(params)
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, atol=1e-5), gradient, wanted)
    assert np.max(np.abs(gradient["routers"])) > 1e-3
    assert ("load_balance" in metrics) == bool(load_balance) and "dropped" not in metrics
    for name, part in zip(("cross_entropy", "load_balance", "router_z"), parts, strict=True):
        if name in metrics:
            assert float(metrics[name].value()) == pytest.approx(float(part), rel=1e-5), name


def test_parts_that_know_the_whole_add_up_to_it():
    model, params = make_routed()
    objective = make_objective(model, LossConfig(load_balance=0.5, router_z=0.2))
    batch = make_padded_batch()
    rows = [jax.tree.map(lambda x: x[i : i + 1], batch) for i in range(3)]  # noqa: B023

    def parts(params):
        pooled = [objective.pool(params, row, None) for row in rows]
        sums = jax.tree.map(lambda *x: sum(x), *pooled)
        losses = [objective(params, row, None, sums) for row in rows]
        return sum(loss.total for loss, _ in losses), [metrics for _, metrics in losses]

    (total, metrics), gradient = jax.value_and_grad(parts, has_aux=True)(params)
    expected, wanted = jax.value_and_grad(lambda p: objective(p, batch, None)[0].total)(params)
    assert float(total) == pytest.approx(float(expected), rel=1e-6)
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, atol=1e-5), gradient, wanted)
    for name, mean in objective(params, batch, None)[1].items():
        joined = metrics[0][name] + metrics[1][name] + metrics[2][name]
        assert float(joined.value()) == pytest.approx(float(mean.value()), rel=1e-5), name


def test_the_share_of_dropped_choices_is_a_metric_where_there_is_a_capacity():
    model, params = make_routed(capacity_factor=1.0)
    batch = make_padded_batch()
    _, metrics = make_objective(model, LossConfig())(params, batch, None)
    odd = np.mean(batch.tokens[batch.segment_ids > 0] % 2)
    assert float(metrics["dropped"].value()) == pytest.approx(odd / K)


def test_padding_alone_gives_zero_router_losses_and_no_nan():
    model, params = make_routed()
    batch = make_batch()
    batch = dataclasses.replace(
        batch,
        loss_weights=np.zeros_like(batch.loss_weights),
        segment_ids=np.zeros_like(batch.segment_ids),
    )
    objective = make_objective(model, LossConfig(router_z=0.1))
    value, gradient = jax.value_and_grad(lambda p: objective(p, batch, None)[0].total)(params)
    assert value == 0
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(gradient))


def test_bad_settings():
    with pytest.raises(UserError, match="chunk"):
        LossConfig(chunk=0)
    for name in ("z_loss", "load_balance", "router_z"):
        with pytest.raises(UserError, match=rf"{name}=-1.0 must not be negative"):
            LossConfig(**{name: -1.0})
    model, _ = make_model()
    with pytest.raises(UserError, match=r"router_z=0.1 is for a mixture of experts"):
        make_objective(model, LossConfig(router_z=0.1))
