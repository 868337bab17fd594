"""GRPO's variants against TRL's, against loops written out, and where they must give nothing."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.errors import UserError
from llm_jax.objectives.grpo import VARIANTS, LossConfig, grpo_loss, make_objective
from llm_jax.types import Batch, RolloutBatch

GOLDEN = Path(__file__).parents[1] / "golden" / "grpo.npz"
LONGEST = 10


def value_and_gradient(config, logprobs, batch, longest=LONGEST):
    """The mean loss, its gradient by the log-probabilities, and the metrics' values."""

    def value(logprobs):
        loss, metrics = grpo_loss(config, logprobs, jnp.ones_like(logprobs), batch, longest)
        return loss.value(), {name: metric.value() for name, metric in metrics.items()}

    (loss, metrics), gradient = jax.value_and_grad(value, has_aux=True)(jnp.asarray(logprobs))
    return float(loss), gradient, {name: float(value) for name, value in metrics.items()}


def moved(batch, seed=1):
    """Log-probabilities some way from those that the completions were sampled with."""
    noise = np.random.default_rng(seed).normal(0, 0.4, batch.old_logprobs.shape)
    return jnp.asarray(batch.old_logprobs + noise, jnp.float32)


def cut(batch, rows):
    return jax.tree.map(lambda x: x[rows], batch)


# --- the variants ---------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_and_gradients_are_those_of_trl(variant):
    golden = np.load(GOLDEN)
    mask = golden["mask"]
    zeros = np.zeros(mask.shape, np.int32)
    batch = RolloutBatch(
        sequences=Batch(zeros, zeros, mask, zeros, zeros),
        old_logprobs=golden["old_logprobs"],
        advantages=np.broadcast_to(golden["advantages"][:, None], mask.shape),
        reference_logprobs=golden["reference_logprobs"],
    )
    low, high = golden["epsilon"].tolist()
    config = LossConfig(variant, low, high, beta=float(golden["beta"]))
    longest = int(golden["max_completion_length"])
    loss, gradient, _ = value_and_gradient(config, golden["logprobs"], batch, longest)
    assert loss == pytest.approx(float(golden[f"loss/{variant}"]), rel=1e-5)
    np.testing.assert_allclose(gradient, golden[f"gradient/{variant}"], rtol=1e-4, atol=1e-7)
    if variant == "grpo":
        _, metrics = grpo_loss(config, golden["logprobs"], golden["entropies"], batch, longest)
        for name, metric in metrics.items():
            if f"metrics/{name}" in golden:
                assert float(metric.value()) == pytest.approx(
                    float(golden[f"metrics/{name}"]), rel=1e-5
                )


def token_losses(config, logprobs, batch, by_sequence):
    """Of each row the losses of its tokens, one by one."""
    rows = []
    for row in range(len(logprobs)):
        places = np.flatnonzero(batch.sequences.loss_weights[row])
        drift = [float(logprobs[row, t] - batch.old_logprobs[row, t]) for t in places]
        if by_sequence:
            drift = [sum(drift) / len(drift) for _ in drift]
        losses = []
        for t, log_ratio in zip(places, drift, strict=True):
            ratio, advantage = np.exp(log_ratio), float(batch.advantages[row, t])
            bounded = min(max(ratio, 1 - config.epsilon_low), 1 + config.epsilon_high)
            k1 = float(logprobs[row, t] - batch.reference_logprobs[row, t])
            k = k1 * k1 / 2 if config.kl_estimator == "k2" else np.exp(-k1) - 1 + k1
            losses.append(-min(ratio * advantage, bounded * advantage) + config.beta * k)
        rows.append(losses)
    return rows


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("beta, estimator", [(0.0, "k3"), (0.3, "k3"), (0.3, "k2")])
def test_micro_batches_add_up_to_the_average_written_out(make_rollouts, variant, beta, estimator):
    config = LossConfig(variant, 0.1, 0.3, beta=beta, kl_estimator=estimator)
    batch = make_rollouts([3, 6, 0, 1, 5, 2])
    logprobs = moved(batch)
    halves = [slice(0, 3), slice(3, 6)]
    parts = [
        grpo_loss(config, logprobs[rows], jnp.ones((3, 8)), cut(batch, rows), LONGEST)
        for rows in halves
    ]
    loss, metrics = jax.tree.map(jnp.add, *parts)
    rows = token_losses(config, logprobs, batch, by_sequence=variant == "gspo")
    filled = [row for row in rows if row]
    halved = [[loss for row in rows[half] for loss in row] for half in halves]
    every = halved[0] + halved[1]
    expected = {
        "grpo": np.mean([np.mean(row) for row in filled]),
        "gspo": np.mean([np.mean(row) for row in filled]),
        "dapo": np.mean(every),
        "bnpo": np.mean([np.mean(tokens) for tokens in halved]),
        "dr_grpo": np.sum(every) / (len(filled) * LONGEST),
    }
    assert len({round(float(value), 4) for value in expected.values()}) == 4, "they differ"
    assert float(loss.value()) == pytest.approx(float(expected[variant]), rel=1e-4)
    assert ("kl" in metrics) and float(metrics["policy_loss"].count) == float(loss.count)
    plain = dataclasses.replace(config, beta=0.0)
    alone, _ = jax.tree.map(
        jnp.add,
        *[
            grpo_loss(plain, logprobs[rows], jnp.ones((3, 8)), cut(batch, rows), LONGEST)
            for rows in halves
        ],
    )
    policy_loss = float(metrics["policy_loss"].value())
    assert policy_loss == pytest.approx(float(alone.value()), rel=1e-5)


def test_a_micro_batch_without_a_token_does_not_count_for_bnpo(make_rollouts):
    batch = make_rollouts([3, 6, 0, 0])
    loss, _ = grpo_loss(
        LossConfig("bnpo"), moved(batch)[2:], jnp.ones((2, 8)), cut(batch, slice(2, 4)), LONGEST
    )
    assert (float(loss.total), float(loss.count)) == (0, 0)


# --- what learning stands on ----------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_right_after_sampling_the_gradient_is_the_policy_gradient(make_rollouts, variant):
    lengths = np.array([3, 6, 1])
    advantages = np.array([[0.75], [-1.5], [2.0]]) * np.ones((3, 8))
    batch = make_rollouts(lengths, advantages=jnp.float32(advantages))
    loss, gradient, metrics = value_and_gradient(LossConfig(variant), batch.old_logprobs, batch)
    divisor = {
        "grpo": 3 * lengths[:, None],
        "gspo": 3 * lengths[:, None],
        "dapo": lengths.sum(),
        "bnpo": lengths.sum(),
        "dr_grpo": 3 * LONGEST,
    }[variant]
    mask = batch.sequences.loss_weights
    np.testing.assert_allclose(gradient, -advantages * mask / divisor, rtol=1e-5)
    assert metrics["ratio"] == 1 and metrics["clip_fraction"] == metrics["approx_kl"] == 0
    assert loss == pytest.approx(-np.sum(advantages * mask / divisor), rel=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_constant_group_gives_no_gradient_at_all(make_rollouts, variant):
    batch = make_rollouts([3, 6, 1], advantages=jnp.zeros((3, 8)))
    _, gradient, _ = value_and_gradient(LossConfig(variant), moved(batch), batch)
    assert not np.any(gradient)


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_not_trained_on_counts_nowhere(make_rollouts, variant):
    """Rows without weight, and whatever stands outside the completions."""
    config = LossConfig(variant, beta=0.1)
    some, all_rows = make_rollouts([3, 6]), make_rollouts([3, 6, 0])
    all_rows = jax.tree.map(lambda x, y: jnp.concatenate([x, y[2:]]), some, all_rows)
    logprobs = moved(all_rows)
    loss, gradient, metrics = value_and_gradient(config, logprobs, all_rows)
    own, own_gradient, own_metrics = value_and_gradient(config, logprobs[:2], some)
    assert loss == pytest.approx(own, rel=1e-4)
    assert metrics == pytest.approx(own_metrics, rel=1e-4)
    np.testing.assert_allclose(gradient[:2], own_gradient, rtol=1e-6)
    outside = np.asarray(all_rows.sequences.loss_weights) == 0
    assert not np.any(np.asarray(gradient)[outside])  # NaN would be "any"


def test_the_divergence_pulls_to_the_reference(make_rollouts):
    batch = make_rollouts([3, 6, 1], advantages=jnp.zeros((3, 8)))
    logprobs = moved(batch)
    for estimator in ("k2", "k3"):
        config = LossConfig(beta=0.1, kl_estimator=estimator)
        _, gradient, _ = value_and_gradient(config, logprobs, batch)
        inside = np.asarray(batch.sequences.loss_weights) > 0
        above = np.asarray(logprobs > batch.reference_logprobs)
        np.testing.assert_array_equal(np.sign(gradient[inside]), np.where(above, 1, -1)[inside])


def test_metrics_pass_no_gradient(make_rollouts):
    batch = make_rollouts([3, 6])

    def total(logprobs):
        metrics = grpo_loss(LossConfig(beta=0.1), logprobs, logprobs, batch, LONGEST)[1]
        return sum(metric.total for metric in metrics.values())

    assert not np.any(jax.grad(total)(moved(batch)))


# --- the objective on a model ---------------------------------------------------------------------


def test_the_objective_reads_the_model_at_the_sampling_temperature(bigram, make_rollouts):
    model, params = bigram
    batch = make_rollouts([3, 6, 0, 5])
    config = LossConfig("dapo", beta=0.1, chunk=3)
    objective = make_objective(model, config, temperature=0.5, max_completion_length=LONGEST)

    @jax.jit
    def both(params):
        (loss, metrics), gradient = jax.value_and_grad(
            lambda p: (lambda m: (m[0].value(), m[1]))(objective(p, batch, None)), has_aux=True
        )(params)
        hidden, _ = model.apply(
            params, batch.sequences.tokens, batch.sequences.positions, batch.sequences.segment_ids
        )
        every = jax.nn.log_softmax(model.logits(params, hidden) / 0.5)
        logprobs = jnp.take_along_axis(every, batch.sequences.targets[..., None], axis=-1)[..., 0]
        entropies = -jnp.sum(jnp.exp(every) * every, axis=-1)
        expected, own_metrics = grpo_loss(config, logprobs, entropies, batch, LONGEST)
        return (loss, metrics), (expected.value(), own_metrics), gradient

    (loss, metrics), (expected, own_metrics), gradient = both(params)
    assert float(loss) == pytest.approx(float(expected), rel=1e-4)
    for name, metric in metrics.items():
        own = float(own_metrics[name].value())
        assert float(metric.value()) == pytest.approx(own, rel=1e-3, abs=1e-5)
    for leaf in jax.tree.leaves(gradient):
        assert np.all(np.isfinite(leaf)) and np.any(leaf)


# --- configs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"variant": "drgrpo"}, "variant='drgrpo' is unknown. Did you mean 'dr_grpo'?"),
        ({"epsilon_low": 0}, r"epsilon_low=0 must lie in \(0, 1\]"),
        ({"epsilon_low": 1.5}, r"epsilon_low=1.5 must lie in \(0, 1\]"),
        ({"epsilon_high": -0.2}, "epsilon_high=-0.2 must be positive"),
        ({"beta": -0.1}, "beta=-0.1 must not be negative"),
        ({"chunk": 0}, "chunk=0 must be positive"),
    ],
)
def test_senseless_configs_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        LossConfig(**changes)
