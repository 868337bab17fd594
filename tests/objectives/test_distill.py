"""Distillation: divergences by hand and against TRL, merged tails, chunks, and what is counted."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.errors import UserError
from llm_jax.models import LanguageModel, ModelConfig
from llm_jax.objectives import lm
from llm_jax.objectives.distill import (
    TEACHER,
    DivergenceConfig,
    LossConfig,
    divergence,
    likeliest_tokens,
    make_cached_objective,
    make_objective,
    shared_vocabulary,
)
from llm_jax.sharding import unbox
from llm_jax.types import Batch, DistillationBatch

GOLDEN = dict(np.load(Path(__file__).parents[1] / "golden" / "distill.npz"))
LIMITS = {0.0: "forward_kl", 1.0: "reverse_kl"}
TIME, LARGER = 7, 40

KINDS = ["forward_kl", "reverse_kl", "jsd"]


def kl(p, q):
    return sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


@pytest.fixture(autouse=True)
def _exact_products():
    with jax.default_matmul_precision("highest"):
        yield


# --- the divergences ------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.8])
def test_the_divergences_of_small_distributions(beta):
    p, q = np.array([0.5, 0.25, 0.125, 0.125]), np.array([0.1, 0.2, 0.3, 0.4])
    mixture = beta * p + (1 - beta) * q
    expected = {
        "forward_kl": kl(p, q),
        "reverse_kl": kl(q, p),
        "jsd": beta * kl(p, mixture) + (1 - beta) * kl(q, mixture),
    }
    for name, value in expected.items():
        found = divergence(DivergenceConfig(name, beta), jnp.log(p), jnp.log(q))
        assert float(found) == pytest.approx(value, rel=1e-5)
        assert float(divergence(DivergenceConfig(name, beta), jnp.log(p), jnp.log(p))) == (
            pytest.approx(0, abs=1e-6)
        )


def test_the_limits_of_the_mixture_are_the_two_divergences():
    p, q = jnp.log(jnp.array([0.9, 0.09, 0.01])), jnp.log(jnp.array([0.2, 0.3, 0.5]))
    near_0 = divergence(DivergenceConfig("jsd", 1e-3), p, q) / 1e-3
    near_1 = divergence(DivergenceConfig("jsd", 1 - 1e-3), p, q) / 1e-3
    assert float(near_0) == pytest.approx(float(divergence(DivergenceConfig(), p, q)), rel=0.01)
    reverse = divergence(DivergenceConfig("reverse_kl"), p, q)
    assert float(near_1) == pytest.approx(float(reverse), rel=0.01)
    assert abs(float(near_0) - float(near_1)) > 0.1


@pytest.mark.parametrize("setting", range(len(GOLDEN["beta"])))
def test_losses_and_gradients_are_those_of_trl(setting):
    """TRL's loss lacks the square of the temperature."""
    beta, temperature = (float(GOLDEN[name][setting]) for name in ("beta", "temperature"))
    config = DivergenceConfig(LIMITS.get(beta, "jsd"), beta if 0 < beta < 1 else 0.5)
    teacher = jax.nn.log_softmax(GOLDEN["teacher"] / temperature)

    def loss(student):
        apart = divergence(config, teacher, jax.nn.log_softmax(student / temperature))
        return jnp.sum(GOLDEN["mask"] * apart) / GOLDEN["mask"].sum()

    value, gradient = jax.value_and_grad(loss)(GOLDEN["student"])
    assert float(value) == pytest.approx(float(GOLDEN["loss"][setting]), abs=1e-5)
    np.testing.assert_allclose(gradient, GOLDEN["gradient"][setting], atol=1e-5)


# --- the objective --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def student(bigram):
    return bigram


@pytest.fixture(scope="module")
def teacher(bigram):
    """A model of another width."""
    model = type(bigram[0])(ModelConfig(vocab_size=32, embed_dim=24))
    return model, {"embedding": jax.random.normal(jax.random.key(1), (32, 24))}


@pytest.fixture(scope="module")
def batch():
    """Three rows, the targets of which count in part, and with weights that differ."""
    draw = np.random.default_rng(2)
    tokens = draw.integers(0, 32, (3, TIME + 1)).astype(np.int32)
    weights = draw.choice([0.0, 0.5, 1.0], (3, TIME)).astype(np.float32)
    segments = np.ones((3, TIME), np.int32)
    return Batch(tokens[:, :-1], tokens[:, 1:], weights, segments, np.tile(np.arange(TIME), (3, 1)))


def whole(student, teacher, config, alpha=0.0):
    objective = make_objective(student[0], teacher[0], config, alpha)
    return lambda params, batch: objective({**params, TEACHER: teacher[1]}, batch, None)


def cached(student, teacher, batch, config, k, alpha=0.0):
    """The objective and its batch."""
    vocabulary = shared_vocabulary(student[0], teacher[0])
    said = likeliest_tokens(
        teacher[0], teacher[1], batch, k=k, vocabulary=vocabulary, temperature=config.temperature
    )
    objective = make_cached_objective(student[0], config, alpha, vocabulary)
    return lambda params, batch: objective(params, batch, None), DistillationBatch(batch, *said)


def loss_and_gradient(objective, params, batch):
    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def measure(params, batch):
        loss, metrics = objective(params, batch)
        return loss.total, (loss, metrics)

    (_, (loss, metrics)), gradient = measure(params, batch)
    return float(loss.value()), {n: float(m.value()) for n, m in metrics.items()}, gradient


def logits_of(side, batch):
    return np.asarray(jnp.tanh(side[1]["embedding"][batch.tokens]) @ side[1]["embedding"].T)


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_costs_its_share_of_both_losses(kind, student, teacher, batch):
    temperature, alpha = 2.0, 0.3
    config = DivergenceConfig(kind, 0.3, temperature)
    loss, metrics, _ = loss_and_gradient(whole(student, teacher, config, alpha), student[1], batch)
    ours, theirs = logits_of(student, batch), logits_of(teacher, batch)
    p, q = (np.asarray(jax.nn.softmax(x / temperature)) for x in (theirs, ours))
    m = 0.3 * p + 0.7 * q
    apart = {
        "forward_kl": np.sum(p * np.log(p / q), -1),
        "reverse_kl": np.sum(q * np.log(q / p), -1),
        "jsd": np.sum(0.3 * p * np.log(p / m) + 0.7 * q * np.log(q / m), -1),
    }[kind]
    nats = -np.take_along_axis(np.asarray(jax.nn.log_softmax(ours)), batch.targets[..., None], -1)
    agrees = ours.argmax(-1) == theirs.argmax(-1)
    weights = batch.loss_weights
    expected = {
        "distill_loss": np.sum(weights * apart) * temperature**2 / weights.sum(),
        "cross_entropy": np.sum(weights * nats[..., 0]) / weights.sum(),
        "token_agreement": np.sum(weights * agrees) / weights.sum(),
    }
    assert metrics == {name: pytest.approx(value, rel=1e-4) for name, value in expected.items()}
    mixed = alpha * expected["cross_entropy"] + (1 - alpha) * expected["distill_loss"]
    assert loss == pytest.approx(mixed, rel=1e-4)


def test_all_cross_entropy_is_the_loss_of_fine_tuning(student, teacher, batch):
    loss, _, gradient = loss_and_gradient(
        whole(student, teacher, DivergenceConfig(), 1.0), student[1], batch
    )
    plain = lm.make_objective(student[0], lm.LossConfig())
    expected, _, expected_gradient = loss_and_gradient(
        lambda params, batch: plain(params, batch, None), student[1], batch
    )
    assert loss == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(
        gradient["embedding"], expected_gradient["embedding"], rtol=1e-4, atol=1e-5
    )


def test_the_size_of_the_gradient_is_that_of_any_temperature(student, teacher, batch):
    """At high temperatures T² KL tends to half the variance of the difference of the logits."""
    losses = [
        loss_and_gradient(
            whole(student, teacher, DivergenceConfig(temperature=t)), student[1], batch
        )[0]
        for t in (100.0, 200.0)
    ]
    apart = logits_of(student, batch) - logits_of(teacher, batch)
    weights = batch.loss_weights
    expected = np.sum(weights * apart.var(-1) / 2) / weights.sum()
    assert losses == [pytest.approx(expected, rel=0.1), pytest.approx(expected, rel=0.05)]


def test_a_teacher_is_not_moved(student, teacher, batch):
    objective = make_objective(student[0], teacher[0], DivergenceConfig("jsd"))

    def total(params):
        return objective(params, batch, None)[0].total

    gradient = jax.grad(total)({**student[1], TEACHER: teacher[1]})
    assert float(jnp.abs(gradient["embedding"]).max()) > 0
    assert float(jnp.abs(gradient[TEACHER]["embedding"]).max()) == 0


@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize("k", [None, 5])
def test_chunks_change_nothing(chunk, k, student, teacher, batch):
    def measure(config):
        if k is None:
            return loss_and_gradient(whole(student, teacher, config, 0.4), student[1], batch)
        objective, taught = cached(student, teacher, batch, config, k, 0.4)
        return loss_and_gradient(objective, student[1], taught)

    config = DivergenceConfig("jsd", temperature=1.5)
    loss, metrics, gradient = measure(config)
    found = measure(dataclasses.replace(config, chunk=chunk))
    assert found[0] == pytest.approx(loss, rel=1e-5)
    assert found[1] == pytest.approx(metrics, rel=1e-5)
    np.testing.assert_allclose(found[2]["embedding"], gradient["embedding"], rtol=1e-4, atol=1e-5)


# --- the teacher's likeliest tokens ---------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_all_tokens_are_the_whole_distribution(kind, student, teacher, batch):
    config = DivergenceConfig(kind, temperature=2.0)
    expected = loss_and_gradient(whole(student, teacher, config, 0.2), student[1], batch)
    objective, taught = cached(student, teacher, batch, config, 32, 0.2)
    assert taught.logprobs.shape == taught.likeliest.shape == (3, TIME, 32)
    found = loss_and_gradient(objective, student[1], taught)
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found[1] == pytest.approx(expected[1], rel=1e-5)
    np.testing.assert_allclose(
        found[2]["embedding"], expected[2]["embedding"], rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("kind", KINDS)
def test_few_tokens_are_a_lower_bound_that_more_of_them_raise(kind, student, teacher, batch):
    config = DivergenceConfig(kind, temperature=4.0)

    def measure(k):
        objective, taught = cached(student, teacher, batch, config, k)
        return loss_and_gradient(objective, student[1], taught)[0]

    bounds = [measure(k) for k in (1, 4, 16, 31, 32)]
    assert bounds == sorted(bounds)
    assert bounds[0] > 0.01 and bounds[-1] > bounds[0] + 0.01
    assert bounds[-2] < bounds[-1] * (1 + 1e-5)


def test_the_last_event_is_all_other_tokens(teacher, batch):
    tokens, logprobs = likeliest_tokens(
        teacher[0], teacher[1], batch, k=3, vocabulary=32, temperature=2.0
    )
    assert logprobs.shape == (3, TIME, 4) and tokens.dtype == jnp.int32
    p = np.asarray(jax.nn.softmax(logits_of(teacher, batch) / 2.0))
    order = np.argsort(-p, axis=-1)
    np.testing.assert_array_equal(tokens, order[..., :3])
    np.testing.assert_allclose(
        np.exp(logprobs[..., :3]), np.take_along_axis(p, order[..., :3], -1), rtol=1e-4
    )
    np.testing.assert_allclose(
        np.exp(logprobs[..., 3]), 1 - np.exp(logprobs[..., :3]).sum(-1), atol=1e-5
    )


def test_a_student_that_says_what_its_teacher_says_is_there(teacher, batch):
    objective, taught = cached(teacher, teacher, batch, DivergenceConfig(), 4)
    loss, metrics, gradient = loss_and_gradient(objective, teacher[1], taught)
    assert loss == pytest.approx(0, abs=1e-5) and metrics["token_agreement"] == 1
    assert float(jnp.abs(gradient["embedding"]).max()) < 1e-4


def test_a_sure_teacher_leaves_a_tail_that_is_not_lost_in_rounding(teacher, batch):
    """1 - the other probabilities would be 0."""
    sharp = {"embedding": 3 * teacher[1]["embedding"]}
    _, logprobs = likeliest_tokens(teacher[0], sharp, batch, k=8, vocabulary=32, temperature=0.2)
    tail = np.asarray(logprobs[..., -1])
    assert np.isfinite(tail).all() and tail.min() < np.log(1e-12)


# --- tables of other sizes ------------------------------------------------------------------------


@pytest.mark.parametrize("larger", ["student", "teacher"])
def test_a_table_padded_further_is_compared_where_both_have_tokens(larger, student, teacher, batch):
    sides = {"student": student, "teacher": teacher}
    model, params = sides[larger]
    padding = jnp.full((LARGER - 32, params["embedding"].shape[1]), 0.7)
    table = jnp.concatenate([params["embedding"], padding])
    config = dataclasses.replace(model.config, vocab_size=LARGER)
    padded = {**sides, larger: (type(model)(config), {"embedding": table})}
    settings = DivergenceConfig("jsd")
    expected = loss_and_gradient(whole(**sides, config=settings), student[1], batch)[0]
    measure = functools.partial(whole, **padded, config=settings)
    loss = loss_and_gradient(measure(), padded["student"][1], batch)[0]
    assert loss == pytest.approx(expected, rel=1e-5)


def test_a_token_that_the_teacher_lacks_does_no_harm(student, batch):
    """A lookup past the end of an embedding table gives NaN."""
    model = LanguageModel(
        ModelConfig(vocab_size=32, embed_dim=8, num_layers=1, num_heads=2, mlp_dim=8)
    )
    teacher = (model, unbox(model.init(jax.random.key(0))))
    config = dataclasses.replace(student[0].config, vocab_size=LARGER)
    table = jnp.pad(student[1]["embedding"], [(0, LARGER - 32), (0, 0)])
    padded = (type(student[0])(config), {"embedding": table})
    tokens = batch.tokens.copy()
    tokens[0, 0] = LARGER - 1
    odd = dataclasses.replace(batch, tokens=tokens)
    loss, _, gradient = loss_and_gradient(
        whole(padded, teacher, DivergenceConfig("reverse_kl")), padded[1], odd
    )
    assert np.isfinite(loss) and np.isfinite(gradient["embedding"]).all()


# --- counting -------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [None, 4])
def test_nothing_counted_is_a_loss_of_nothing(k, student, teacher, batch):
    empty = dataclasses.replace(batch, loss_weights=np.zeros_like(batch.loss_weights))
    if k is None:
        objective, given = whole(student, teacher, DivergenceConfig()), empty
    else:
        objective, given = cached(student, teacher, empty, DivergenceConfig(), k)
        zeros = jax.tree.map(jnp.zeros_like, (given.likeliest, given.logprobs))
        given = DistillationBatch(empty, *zeros)
    loss, metrics, gradient = loss_and_gradient(objective, student[1], given)
    assert loss == 0 and set(metrics.values()) == {0.0}
    np.testing.assert_array_equal(gradient["embedding"], 0)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (lambda: DivergenceConfig(beta=0.0), "beta"),
        (lambda: DivergenceConfig(beta=1.0), "beta"),
        (lambda: DivergenceConfig(temperature=0.0), "temperature"),
        (lambda: DivergenceConfig(temperature=float("inf")), "temperature"),
        (lambda: DivergenceConfig(chunk=0), "chunk"),
        (lambda: LossConfig(alpha=1.5), "alpha"),
    ],
)
def test_settings_that_mean_nothing_are_refused(config, name):
    with pytest.raises(UserError, match=f"config.loss.{name}="):
        config()
