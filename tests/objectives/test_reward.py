"""The loss of reward models against values worked out by hand."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.errors import UserError
from llm_jax.models import LanguageModel, ModelConfig
from llm_jax.models.heads import init_reward_head, rewards
from llm_jax.objectives.reward import LossConfig, bradley_terry, make_objective
from llm_jax.sharding import unbox
from llm_jax.types import Batch, PreferenceBatch

PADDING = None  # a score: there is no response


def make_batch(scores, margins=0.0, time=3):
    """Rows of responses with these scores."""
    real = np.array([[score is not PADDING for score in row] for row in scores])
    segments = np.repeat(real[..., None].astype(np.int32), time, axis=-1)
    tokens = np.random.default_rng(0).integers(1, 32, (*real.shape, time)).astype(np.int32)
    positions = np.arange(time, dtype=np.int32) * segments
    responses = Batch(tokens, tokens, segments.astype(np.float32), segments, positions)
    values = [[0.0 if score is PADDING else score for score in row] for row in scores]
    margins = np.broadcast_to(np.float32(margins), (len(scores),))
    return PreferenceBatch(responses, np.float32(values), margins, None)


def evaluate(values, batch, centring=0.0):
    """The mean loss, its gradient by the rewards, and the metrics' values."""

    def value(values):
        loss, metrics = bradley_terry(values, batch, centring)
        return loss.value(), {name: metric.value() for name, metric in metrics.items()}

    (loss, metrics), gradient = jax.value_and_grad(value, has_aux=True)(jnp.float32(values))
    return float(loss), gradient, {name: float(value) for name, value in metrics.items()}


def nats(gap):
    """−log σ(gap)."""
    return math.log1p(math.exp(-gap))


# --- pairs ----------------------------------------------------------------------------------------


def test_pairs():
    values = [[2.0, 0.5], [-1.0, 1.0], [3.0, 3.0]]
    loss, _, metrics = evaluate(values, make_batch([(1, 0)] * 3))
    assert loss == pytest.approx((nats(1.5) + nats(-2) + math.log(2)) / 3)
    assert metrics == pytest.approx(
        {
            "rewards/chosen": 4 / 3,
            "rewards/rejected": 4.5 / 3,
            "rewards/margins": -0.5 / 3,
            "rewards/accuracies": 1 / 3,  # the third is a tie
        }
    )


def test_the_gradient_is_the_probability_of_the_wrong_order():
    _, gradient, _ = evaluate([[0.75, -0.5]], make_batch([(1, 0)]))
    wrong = 1 / (1 + math.exp(1.25))
    np.testing.assert_allclose(gradient, [[-wrong, wrong]], rtol=1e-5)


def test_only_the_order_of_scores_counts():
    values = [[2.0, 0.5]]
    first, second = (evaluate(values, make_batch([row])) for row in ((1, 0), (-3, -70)))
    assert (first[0], first[2]) == (second[0], second[2])
    turned, _, _ = evaluate([[0.5, 2.0]], make_batch([(0, 1)]))
    assert turned == pytest.approx(first[0])


def test_margins_belong_to_rows():
    loss, _, metrics = evaluate([[2.0, 0.5]] * 3, make_batch([(1, 0)] * 3, [3.0, 0.0, 1 / 3]))
    assert loss == pytest.approx((nats(1.5 - 3) + nats(1.5) + nats(1.5 - 1 / 3)) / 3)
    assert metrics["rewards/margins"] == 1.5, "what the rewards are, not what they should be"


def test_centring_pulls_the_sum_of_both_rewards_to_0():
    values, batch = [[2.0, 0.5], [-1.0, 0.0]], make_batch([(1, 0)] * 2)
    plain, centred = (evaluate(values, batch, centring)[0] for centring in (0.0, 0.01))
    assert centred - plain == pytest.approx(0.01 * (2.5**2 + 1) / 2, rel=1e-4)


# --- groups ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("centring", [0.0, 0.01])
def test_a_group_is_the_mean_of_its_pairs_one_by_one(centring):
    scores, values = [5, 3, 1, -2], [0.3, -1.0, 0.9, 0.4]
    loss, gradient, metrics = evaluate([values], make_batch([scores], margins=0.5), centring)
    pairs = list(itertools.combinations(values, 2))  # values stand by falling scores
    assert len(pairs) == math.comb(4, 2)
    own, own_gradient, own_metrics = evaluate(
        pairs, make_batch([(1, 0)] * len(pairs), margins=0.5), centring
    )
    assert loss == pytest.approx(own, rel=1e-6)
    assert metrics == pytest.approx(own_metrics, rel=1e-6, abs=1e-7)
    summed = np.zeros(4)
    for places, slopes in zip(itertools.combinations(range(4), 2), own_gradient, strict=True):
        summed[list(places)] += slopes
    np.testing.assert_allclose(gradient[0], summed, rtol=1e-4, atol=1e-6)


def test_a_prompt_counts_once_however_many_responses_it_has():
    values = [[0.5, -1.0, 2.0], [1.0, 0.0, 9.0]]
    batch = make_batch([(3, 2, 1), (1, 0, PADDING)])
    many = (nats(1.5) + nats(-1.5) + nats(-3.0)) / 3
    loss, gradient, _ = evaluate(values, batch)
    assert loss == pytest.approx((many + nats(1.0)) / 2)
    assert gradient[1, 2] == 0, "padding is in no pair"


def test_ties_are_no_pair():
    loss, gradient, _ = evaluate([[0.5, -1.0, 2.0]], make_batch([(3, 1, 1)]))
    assert loss == pytest.approx((nats(1.5) + nats(-1.5)) / 2)
    assert np.all(gradient != 0)


@pytest.mark.parametrize("nothing", [(1, 1, 1), (4, PADDING, PADDING), (PADDING,) * 3])
def test_a_group_without_a_pair_counts_nothing(nothing):
    values = [[0.5, -1.0, 2.0], [7.0, 8.0, 9.0]]
    with_it, gradient, metrics = evaluate(values, make_batch([(3, 2, 1), nothing]), 0.01)
    alone, _, own_metrics = evaluate(values[:1], make_batch([(3, 2, 1)]), 0.01)
    assert (with_it, metrics) == (alone, own_metrics)
    assert not np.any(gradient[1])  # NaN would be "any"
    none, gradient, metrics = evaluate(values[1:], make_batch([nothing]), 0.01)
    assert none == 0 and not np.any(gradient) and set(metrics.values()) == {0}


def test_micro_batches_sum_to_the_batch():
    values = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)
    batch = make_batch([(3, 2, 1), (1, 1, 1), (2, 1, PADDING), (5, 5, 0)], [1, 2, 3, 0])
    whole, metrics = bradley_terry(values, batch, 0.01)
    parts = [
        bradley_terry(values[rows], jax.tree.map(lambda x, rows=rows: x[rows], batch), 0.01)
        for rows in (slice(0, 2), slice(2, 4))
    ]
    summed, own_metrics = jax.tree.map(jnp.add, *parts)
    assert float(whole.count) == 3
    for actual, expected in zip(
        jax.tree.leaves((summed, own_metrics)), jax.tree.leaves((whole, metrics)), strict=True
    ):
        assert float(actual) == pytest.approx(float(expected), rel=1e-5)


def test_metrics_pass_no_gradient():
    batch = make_batch([(1, 0)])
    gradient = jax.grad(lambda v: bradley_terry(v, batch)[1]["rewards/margins"].total)(
        jnp.ones((1, 2))
    )
    assert not np.any(gradient)


# --- the objective on a model ---------------------------------------------------------------------


def test_the_objective_reads_rewards_of_the_model_and_padding_gives_no_nan():
    model = LanguageModel(
        ModelConfig(vocab_size=32, embed_dim=16, num_layers=1, num_heads=2, mlp_dim=16)
    )
    params = unbox(jax.jit(model.init)(jax.random.key(0)))
    params |= unbox(init_reward_head(jax.random.key(1), 16))
    batch = make_batch([(3, 2, 1), (1, 0, PADDING), (PADDING,) * 3], margins=1.0)
    objective = make_objective(model, LossConfig(centring=0.01, margins="large"))
    value = jax.jit(jax.value_and_grad(lambda p: objective(p, batch, None)[0].value()))
    loss, gradient = value(params)
    values = jax.jit(functools.partial(rewards, model))(params, batch.responses)
    expected, _ = bradley_terry(values, batch, 0.01)
    assert float(expected.count) == 2
    assert float(loss) == pytest.approx(float(expected.value()), rel=1e-5)
    for leaf in jax.tree.leaves(gradient):
        assert np.all(np.isfinite(leaf)) and np.any(leaf)


# --- configs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "margins, levels",
    [
        ("none", None),
        ("large", (3, 2, 1, 0)),
        ("small", (1, 2 / 3, 1 / 3, 0)),
        ("2, 1.5,0.5,0", (2, 1.5, 0.5, 0)),
    ],
)
def test_levels_of_margins(margins, levels):
    assert LossConfig(margins=margins).margin_levels == levels


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"margins": "big"}, "margins='big' is neither none, large, small nor four numbers"),
        ({"margins": "3,2,1"}, "margins='3,2,1' is neither"),
        ({"margins": "3,2,1,0,0"}, "is neither"),
        ({"margins": ""}, "is neither"),
        ({"centring": -0.01}, "centring=-0.01 must not be negative"),
    ],
)
def test_senseless_configs_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        LossConfig(**changes)
