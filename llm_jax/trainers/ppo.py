"""Proximal policy optimisation: a critic expects the reward, and what is better than expected is
made more probable."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from llm_jax.data.phases import Phase
from llm_jax.evals.batching import to_host
from llm_jax.models import LanguageModel
from llm_jax.models.heads import VALUE, values
from llm_jax.objectives import ppo
from llm_jax.rl.advantages import KLConfig, KLController, gae, token_rewards, whiten
from llm_jax.trainers import foundation, on_policy
from llm_jax.trainers.base import Trainer
from llm_jax.trainers.reference import reference_policy
from llm_jax.trainers.rounds import Round, Wiring, masked
from llm_jax.types import Batch, RolloutBatch


@dataclasses.dataclass(frozen=True)
class AdvantageConfig:
    """How rewards become advantages."""

    gamma: float = 1.0
    lambda_: float = 0.95
    whiten: bool = True  # advantages, over the tokens of a round
    missing_end_penalty: float = 0.0  # off the score of a completion that did not end by itself


@dataclasses.dataclass(frozen=True)
class PPOConfig(on_policy.OnPolicyConfig):
    """The config of `trainer = "ppo"`."""

    trainer: str = "ppo"
    loss: ppo.LossConfig = ppo.LossConfig()
    advantage: AdvantageConfig = AdvantageConfig()
    kl: KLConfig = KLConfig()


class CriticLearner:
    """Advantages over what the value head expects; its state is the weight of the divergence."""

    def __init__(self, config: PPOConfig, read_values: Callable[[Any, Batch], np.ndarray]):
        self._config, self._read_values = config, read_values
        self._controller = KLController(config.kl)

    def learn(self, params: Any, round: Round) -> tuple[RolloutBatch, dict[str, float]]:
        config, rollouts = self._config, round.rollouts
        sequences, old_logprobs = masked(rollouts.sequences, rollouts.logprobs, round.scores)
        mask = sequences.loss_weights > 0
        divergence = np.zeros_like(old_logprobs)
        if round.reference_logprobs is not None:
            divergence = np.where(mask, old_logprobs - round.reference_logprobs, 0)
        expected = np.where(mask, self._read_values(params, sequences), 0).astype(np.float32)
        rewards = token_rewards(
            np.nan_to_num(round.scores),
            divergence,
            mask,
            kl_coefficient=self._controller.coefficient,
            finished_B=rollouts.finished,
            missing_end_penalty=config.advantage.missing_end_penalty,
        )
        advantages, returns = gae(
            rewards, expected, mask, config.advantage.gamma, config.advantage.lambda_
        )
        if config.advantage.whiten:
            advantages = whiten(advantages, mask)
        metrics = {}
        if round.reference_logprobs is not None:
            rows = max(int(mask.any(axis=1).sum()), 1)
            kl = float(divergence.sum() / rows)
            metrics = {"kl_sequence": kl, "kl_coefficient": self._controller.coefficient}
            self._controller.update(kl, rows)
        batch = RolloutBatch(
            sequences=sequences,
            old_logprobs=old_logprobs,
            advantages=advantages,
            reference_logprobs=round.reference_logprobs,
            values=expected,
            returns=returns,
        )
        return batch, metrics

    def state(self) -> dict[str, Any]:
        return self._controller.state()

    def restore(self, state: dict[str, Any]) -> None:
        self._controller.restore(state)


def build(config: PPOConfig, mesh: Mesh, workdir: Path, log: Callable[[str], None]) -> Trainer:
    """Reads the prompts and wires the stage.

    Raises:
      UserError: whatever in the config or the data does not fit, before anything is written to
        `workdir`.
    """
    ground = foundation.lay_for_chats(config, mesh, workdir, log, heads=(VALUE,))

    def objective(model: LanguageModel, phase: Phase) -> Any:
        del phase
        return ppo.make_objective(model, config.loss, temperature=config.rollout.temperature)

    def learner(model: LanguageModel, phase: Phase) -> CriticLearner:
        del phase
        jitted = ground.jit(lambda params, batch: values(model, params, batch))
        return CriticLearner(config, lambda params, batch: to_host(jitted(params, batch)))

    ground, reference = reference_policy(ground) if config.kl.coefficient else (ground, None)
    wiring = Wiring(objective, learner, reference)
    return on_policy.build(ground, wiring, workdir)
