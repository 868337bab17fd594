"""A bandit whose best arm is known: one token to choose, rewarded by a fraction."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llm_jax.models import LanguageModel, ModelConfig
from llm_jax.models.heads import VALUE, values
from llm_jax.objectives import grpo, ppo
from llm_jax.objectives.policy import policy_outputs
from llm_jax.rl.advantages import gae, group_advantages, token_rewards
from llm_jax.types import Batch, RolloutBatch

REWARDS = np.array([0.1, 0.55, 0.3, 0.75, 0.6, 0.2], np.float32)  # truncated they are all 0
ARMS, SAMPLES, ROUNDS, EPOCHS = len(REWARDS), 64, 40, 2


class Table(LanguageModel):
    """A policy without layers: the logits of the arms are its parameters, whatever was before."""

    def apply_with_routing(
        self, params, tokens, positions=None, segment_ids=None, *, rng=None, cache=None
    ):
        return jnp.broadcast_to(params["embedding"].T[0], (*tokens.shape, ARMS)), cache, None

    def output_kernel(self, params):
        return jnp.eye(ARMS)


def solve(objective, advantages_of):
    """The probabilities of the arms after a few rounds, two epochs each."""
    model = Table(ModelConfig(vocab_size=ARMS, embed_dim=ARMS, num_heads=1))
    params = {"embedding": jnp.zeros((ARMS, 1)), VALUE: {"kernel": jnp.zeros((ARMS, 1))}}
    params["embedding"] = params["embedding"].at[0].set(2.0)  # the worst arm is the favourite
    optimizer = optax.adam(0.1)
    state = optimizer.init(params)
    ones = np.ones((SAMPLES, 1), np.int32)
    sequences = Batch(0 * ones, 0 * ones, np.float32(ones), ones, 0 * ones)
    gradient = jax.jit(jax.grad(lambda p, b: objective(model)(p, b, None)[0].value()))
    read = jax.jit(functools.partial(policy_outputs, model, longest=1))
    for number in range(ROUNDS):
        logits = params["embedding"][:, 0]
        arms = jax.random.categorical(jax.random.key(number), logits, shape=(SAMPLES, 1))
        batch = sequences.replace(targets=arms)
        rollouts = RolloutBatch(
            sequences=batch,
            old_logprobs=read(params, batch).logprobs,
            **advantages_of(model, params, batch, REWARDS[np.asarray(arms)[:, 0]]),
        )
        for _ in range(EPOCHS):
            updates, state = optimizer.update(gradient(params, rollouts), state)
            params = optax.apply_updates(params, updates)
    return jax.nn.softmax(params["embedding"][:, 0])


@pytest.mark.parametrize("variant", ["grpo", "dr_grpo", "gspo"])
def test_grpo_finds_the_best_arm(variant):
    config = grpo.LossConfig(variant, epsilon_high=0.28)

    def objective(model):
        return grpo.make_objective(model, config, temperature=1.0, max_completion_length=1)

    def advantages_of(model, params, batch, scores):
        found = group_advantages(scores.reshape(-1, 8)).advantages
        return {"advantages": found.reshape(-1, 1)}

    probabilities = solve(objective, advantages_of)
    assert int(np.argmax(probabilities)) == 3 and probabilities[3] > 0.7


def test_ppo_finds_the_best_arm():
    config = ppo.LossConfig(value_coefficient=1.0)

    def advantages_of(model, params, batch, scores):
        expected = np.asarray(values(model, params, batch))
        rewards = token_rewards(scores, 0 * expected, batch.loss_weights, kl_coefficient=0.0)
        advantages, returns = gae(rewards, expected, batch.loss_weights)
        # Whitened they would be the same but for scale.
        return {"advantages": 5 * advantages, "values": expected, "returns": returns}

    probabilities = solve(
        lambda model: ppo.make_objective(model, config, temperature=1.0, max_completion_length=1),
        advantages_of,
    )
    assert int(np.argmax(probabilities)) == 3 and probabilities[3] > 0.7
