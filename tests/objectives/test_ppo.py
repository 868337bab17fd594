"""PPO's losses against loops written out, its gradients where they are known, and its text."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import optim, sharding, step
from llm_jax.errors import UserError
from llm_jax.mesh import MeshConfig, make_mesh
from llm_jax.models.heads import CRITIC, VALUE, init_value_head, values
from llm_jax.objectives.lm import token_nats
from llm_jax.objectives.policy import PolicyOutputs, policy_outputs
from llm_jax.objectives.ppo import LossConfig, make_objective, ppo_loss, whole_of
from llm_jax.optim import OptimizerConfig
from llm_jax.sharding import unbox
from llm_jax.types import Mean

CONFIG = LossConfig(clip=0.15, value_clip=0.1, value_coefficient=0.3, entropy_coefficient=0.02)


def says(batch, seed=1):
    """What a policy and its critic say after they have moved a little: outputs and values."""
    draw, shape = np.random.default_rng(seed), batch.old_logprobs.shape
    logprobs = jnp.asarray(batch.old_logprobs + draw.normal(0, 0.4, shape), jnp.float32)
    entropies = jnp.asarray(draw.gamma(2, 1, shape), jnp.float32)
    moved = jnp.asarray(batch.values + draw.normal(0, 0.4, shape), jnp.float32)
    return PolicyOutputs(logprobs, entropies, jnp.zeros(())), moved


def in_pieces(batch, policy, predicted, pieces, config=CONFIG):
    """Loss and metrics, summed over micro-batches of these rows."""
    whole = jax.tree.map(lambda *sums: sum(sums), *[whole_of(cut(batch, rows)) for rows in pieces])
    parts = [
        ppo_loss(
            config,
            PolicyOutputs(policy.logprobs[rows], policy.entropies[rows], policy.hidden),
            predicted[rows],
            cut(batch, rows),
            whole,
        )
        for rows in pieces
    ]
    return jax.tree.map(lambda *sums: sum(sums), *parts)


def cut(batch, rows):
    return jax.tree.map(lambda x: x[rows], batch)


# --- values ---------------------------------------------------------------------------------------

TIME, LONGEST = 8, 6  # of the rows of `make_rollouts`, and of their completions


@pytest.mark.parametrize("pieces", [[slice(None)], [slice(0, 1), slice(1, 2), slice(2, 4)]])
def test_micro_batches_add_up_to_the_means_written_out(make_rollouts, pieces):
    batch = make_rollouts([6, 0, 3, 5])
    policy, predicted = says(batch)
    loss, metrics = in_pieces(batch, policy, predicted, pieces)
    policy_losses, value_losses, entropies, clipped = [], [], [], []
    for place in np.argwhere(batch.sequences.loss_weights):
        at = tuple(place)
        advantage, returned = float(batch.advantages[at]), float(batch.returns[at])
        ratio = np.exp(float(policy.logprobs[at] - batch.old_logprobs[at]))
        policy_losses.append(
            max(-advantage * ratio, -advantage * min(max(ratio, 1 - 0.15), 1 + 0.15))
        )
        old, new = float(batch.values[at]), float(predicted[at])
        near = min(max(new, old - 0.1), old + 0.1)
        value_losses.append(0.5 * max((new - returned) ** 2, (near - returned) ** 2))
        clipped.append((near - returned) ** 2 > (new - returned) ** 2)
        entropies.append(float(policy.entropies[at]))
    expected = np.mean(policy_losses) + 0.3 * np.mean(value_losses) - 0.02 * np.mean(entropies)
    assert float(loss.count) == 14
    assert float(loss.value()) == pytest.approx(expected, rel=1e-4)
    inside = batch.sequences.loss_weights > 0
    errors = np.float64(batch.returns - batch.values)[inside]
    own = {
        "policy_loss": np.mean(policy_losses),
        "value_loss": np.mean(value_losses),
        "entropy": np.mean(entropies),
        "value_clip_fraction": np.mean(clipped),
        "explained_variance": 1 - errors.var() / np.float64(batch.returns)[inside].var(),
    }
    assert 0 < own["value_clip_fraction"] < 1 and own["explained_variance"] > 0
    measured = {name: float(metrics[name].value()) for name in own}
    assert measured == pytest.approx(own, rel=1e-4)
    assert float(metrics["kl"].value()) > 0 and "clip_fraction" in metrics


def test_a_constant_shift_of_all_values_is_no_unexplained_variance(make_rollouts):
    batch = make_rollouts([6, 3])
    shifted = batch.replace(values=batch.returns - 3)
    _, metrics = in_pieces(shifted, *says(shifted), [slice(0, 1), slice(1, 2)])
    assert float(metrics["explained_variance"].value()) == pytest.approx(1, abs=1e-5)


def test_returns_without_variance_leave_it_unmeasured(make_rollouts):
    batch = make_rollouts([6, 3], returns=jnp.ones((2, 8)))
    _, metrics = in_pieces(batch, *says(batch), [slice(None)])
    assert float(metrics["explained_variance"].count) == 0


# --- gradients ------------------------------------------------------------------------------------


def gradients(batch, config=CONFIG, moved=True):
    """Of the mean loss by log-probabilities, entropies and values."""
    policy, predicted = says(batch)
    if not moved:
        policy = policy.replace(logprobs=batch.old_logprobs)
        predicted = batch.values

    def value(logprobs, entropies, predicted):
        policy = PolicyOutputs(logprobs, entropies, jnp.zeros(()))
        return ppo_loss(config, policy, predicted, batch, whole_of(batch))[0].value()

    return jax.grad(value, (0, 1, 2))(policy.logprobs, policy.entropies, predicted)


def test_right_after_sampling_gradients_are_policy_gradient_and_regression(make_rollouts):
    batch = make_rollouts([6, 0, 3])
    inside = batch.sequences.loss_weights > 0
    by_logprobs, by_entropies, by_values = gradients(batch, moved=False)
    expected = np.where(inside, -batch.advantages / 9, 0)
    np.testing.assert_allclose(by_logprobs, expected, rtol=1e-5)
    np.testing.assert_allclose(by_entropies, np.where(inside, -0.02 / 9, 0), rtol=1e-5)
    errors = np.where(inside, 0.3 * (batch.values - batch.returns) / 9, 0)
    np.testing.assert_allclose(by_values, errors, rtol=1e-4, atol=1e-7)


def test_a_value_that_moved_too_far_towards_its_return_is_held(make_rollouts):
    batch = make_rollouts([2])
    batch = batch.replace(values=jnp.zeros((1, 8)), returns=jnp.ones((1, 8)))

    def by_value(predicted):
        policy, _ = says(batch)
        total = ppo_loss(CONFIG, policy, predicted, batch, whole_of(batch))[0].total
        return total

    gradient = jax.grad(by_value)(jnp.array([[0, 0.08, 0.4] + [0.0] * 5]))
    np.testing.assert_allclose(gradient, [[0, 0.3 * (0.08 - 1), 0] + [0] * 5], rtol=1e-5)


def test_what_is_not_trained_on_has_no_gradient(make_rollouts):
    batch = make_rollouts([6, 0, 3])
    outside = batch.sequences.loss_weights == 0
    for gradient in gradients(batch):
        assert np.any(gradient) and not np.any(gradient[outside])  # NaN would be "any"
    nothing = make_rollouts([0, 0])
    assert not any(np.any(gradient) for gradient in gradients(nothing))


# --- the objective on a model ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_head(bigram):
    """With a value head."""
    model, params = bigram
    return model, params | jax.tree.map(lambda x: x + 0.1, unbox(init_value_head(16)))


def test_policy_and_values_come_from_one_model(with_head, make_rollouts):
    model, params = with_head
    batch = make_rollouts([6, 0, 3])
    objective = make_objective(
        model, dataclasses.replace(CONFIG, chunk=3), temperature=0.5, max_completion_length=LONGEST
    )

    def expected(params):
        policy = policy_outputs(model, params, batch.sequences, longest=TIME, temperature=0.5)
        predicted = values(model, params, batch.sequences)
        return ppo_loss(CONFIG, policy, predicted, batch, whole_of(batch))[0].value()

    actual = jax.jit(jax.value_and_grad(lambda p: objective(p, batch, None)[0].value()))(params)
    wanted = jax.jit(jax.value_and_grad(expected))(params)
    assert_close(actual, wanted)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(actual[1]))


def test_a_critic_may_be_a_model_of_its_own(with_head, make_rollouts):
    model, params = with_head
    batch = make_rollouts([6, 0, 3])
    body = {name: leaf for name, leaf in params.items() if name != VALUE}
    critic = jax.tree.map(lambda x: 1.5 * x, params)
    objective = make_objective(
        model, CONFIG, temperature=1.0, max_completion_length=LONGEST, critic=model
    )

    def expected(params):
        policy = policy_outputs(model, params, batch.sequences, longest=TIME)
        predicted = values(model, params[CRITIC], batch.sequences)
        return ppo_loss(CONFIG, policy, predicted, batch, whole_of(batch))[0].value()

    both = body | {CRITIC: critic}
    actual = jax.jit(jax.value_and_grad(lambda p: objective(p, batch, None)[0].value()))(both)
    assert_close(actual, jax.jit(jax.value_and_grad(expected))(both))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(actual[1]))


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_text_weighs_by_its_own_tokens(with_head, make_rollouts, micro_batches):
    """Pieces that differ in tokens of completions and of text give the mean of each."""
    model, params = with_head
    batch = make_rollouts([6, 1, 3, 0])
    text = make_rollouts([1, 6, 0, 2], seed=9).sequences
    batch = batch.replace(pretraining=text)
    config = dataclasses.replace(CONFIG, ptx_coefficient=2.5)
    objective = make_objective(model, config, temperature=1.0, max_completion_length=LONGEST)
    without = make_objective(model, CONFIG, temperature=1.0, max_completion_length=LONGEST)

    def summed(params):
        if micro_batches == 1:
            return objective(params, batch, None)
        pieces = [cut(batch, rows) for rows in (slice(0, 2), slice(2, 4))]
        sums = jax.tree.map(jnp.add, *[objective.pool(params, piece, None) for piece in pieces])
        return jax.tree.map(jnp.add, *[objective(params, p, None, sums) for p in pieces])

    def expected(params):
        nats = token_nats(model, params, text)
        mean = Mean(jnp.sum(text.loss_weights * nats), jnp.sum(text.loss_weights)).value()
        return without(params, batch, None)[0].value() + 2.5 * mean, mean

    def actual(params):
        loss, metrics = summed(params)
        return loss.value(), metrics["ptx_loss"].value()

    found, wanted = (
        jax.jit(jax.value_and_grad(function, has_aux=True))(params)
        for function in (actual, expected)
    )
    assert_close(found, wanted)


def test_a_step_in_pieces_on_many_devices_is_the_step_in_one(with_head, make_rollouts):
    model, params = with_head
    text = make_rollouts([2, 6, 1, 1, 0, 3, 2, 5], seed=9).sequences
    batch = make_rollouts([6, 1, 3, 0, 2, 6, 5, 4], pretraining=text)
    objective = make_objective(
        model,
        dataclasses.replace(CONFIG, ptx_coefficient=0.5),
        temperature=1.0,
        max_completion_length=LONGEST,
    )
    optimizer = optim.make_optimizer(OptimizerConfig(weight_decay=0.0, epsilon=1e-3), params)
    axes = {"embedding": ("vocab", "embed"), VALUE: {"kernel": ("embed", "head_output")}}

    def one_step(devices, micro_batches):
        mesh = make_mesh(MeshConfig(), jax.devices()[:devices])
        boxed = jax.tree.map(sharding.Named, params, axes)
        with jax.set_mesh(mesh):
            _, shardings = step.init_state(
                lambda rng: params, optimizer, 0, mesh, sharding.parameter_shardings(mesh, boxed)
            )
            train_step = step.make_train_step(
                objective, optimizer, mesh=mesh, shardings=shardings, micro_batches=micro_batches
            )
            state = step.materialise(lambda rng: params, optimizer, 0, shardings)
            state, metrics = train_step(state, batch, np.float32(0.1))
            return jax.device_get((state.params, metrics))

    whole, pieces = one_step(1, 1), one_step(2, 4)
    assert_close(pieces, whole)
    assert np.abs(whole[0]["embedding"] - params["embedding"]).max() > 1e-3


def assert_close(actual, expected):
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)


# --- configs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"clip": 0}, r"clip=0 must lie in \(0, 1\]"),
        ({"clip": 1.5}, r"clip=1.5 must lie in \(0, 1\]"),
        ({"value_clip": 0}, "value_clip=0 must be positive"),
        ({"value_coefficient": -1}, "value_coefficient=-1 must not be negative"),
        ({"entropy_coefficient": -1}, "entropy_coefficient=-1 must not be negative"),
        ({"ptx_coefficient": -1}, "ptx_coefficient=-1 must not be negative"),
        ({"chunk": 0}, "chunk=0 must be positive"),
    ],
)
def test_senseless_configs_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        LossConfig(**changes)
