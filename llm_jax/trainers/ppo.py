"""Proximal policy optimisation: a critic expects the reward, and what is better than expected is
made more probable."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from llm_jax.config import digest
from llm_jax.data.corpus import Corpus, DataConfig
from llm_jax.data.offline import OfflineSource
from llm_jax.data.phases import Phase, plan
from llm_jax.errors import UserError
from llm_jax.models import LanguageModel
from llm_jax.models.heads import CRITIC, VALUE, values
from llm_jax.models.size import flops_per_token
from llm_jax.objectives import ppo
from llm_jax.placement import to_host
from llm_jax.rl.advantages import KLConfig, KLController, gae, token_rewards, whiten
from llm_jax.step import Objective
from llm_jax.trainers import foundation, on_policy
from llm_jax.trainers.base import Setting, Trainer
from llm_jax.trainers.critic import CriticConfig, add_critic, of_phases
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
class PretrainingConfig(DataConfig):
    """Text to go on with while the policy learns (PPO-ptx), in rows of the phase's length.

    rows: of text in a step, for each completion. InstructGPT (arXiv:2203.02155, appendix C.4) has 8
    of them, and a `loss.ptx_coefficient` of 27.8.
    """

    rows: int = 1

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise UserError(
                f"config.pretraining.rows={self.rows} must be at least 1; for no text, leave "
                "config.loss.ptx_coefficient at 0."
            )


@dataclasses.dataclass(frozen=True)
class PPOConfig(on_policy.OnPolicyConfig):
    """The config of `trainer = "ppo"`."""

    trainer: str = "ppo"
    critic: CriticConfig | None = None  # None: a value head on the policy
    pretraining: PretrainingConfig = PretrainingConfig()  # read if loss.ptx_coefficient is not 0
    loss: ppo.LossConfig = ppo.LossConfig()
    advantage: AdvantageConfig = AdvantageConfig()
    kl: KLConfig = KLConfig()

    @property
    def has_reference(self) -> bool:
        """Whether samples are compared with the model that the stage starts from."""
        return bool(self.kl.coefficient)

    @property
    def text_rows(self) -> int:
        """Rows of pre-training text in a step, for each completion."""
        return self.pretraining.rows if self.loss.ptx_coefficient else 0


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
    heads = () if config.critic is not None else (VALUE,)
    ground = foundation.lay_for_chats(config, mesh, workdir, log, heads)
    ground, reference = reference_policy(ground) if config.has_reference else (ground, None)
    critics: list[LanguageModel | None] = [None] * len(config.phases)
    if config.critic is not None:
        ground, architecture = add_critic(ground, config.critic)
        critics = [LanguageModel(model) for model in of_phases(config, architecture)]

    def objective(model: LanguageModel, phase: Phase) -> Objective:
        return objective_of(config, model, critics[phase.index])

    def learner(model: LanguageModel, phase: Phase) -> CriticLearner:
        critic = critics[phase.index]

        def read(params: Any, batch: Batch) -> jax.Array:
            if critic is None:
                return values(model, params, batch)
            return values(critic, params[CRITIC], batch)

        jitted = ground.jit(read)
        return CriticLearner(config, lambda params, batch: to_host(jitted(params, batch)))

    text = _text(ground, config) if config.text_rows else None
    wiring = Wiring(objective, learner, reference, text=None if text is None else text.source)
    trainer = on_policy.build(ground, wiring, workdir)
    rows = config.text_rows

    def setting(phase: Phase) -> Setting:
        """The stage's, with what critic and text cost."""
        made, critic = trainer.setting(phase), critics[phase.index]
        flops = made.flops_per_token * (1 + rows)
        if critic is not None:
            flops += flops_per_token(critic.config, phase.length)
        micro_batches = ground.micro_batches(dataclasses.replace(phase, sequences=1 + rows))
        return dataclasses.replace(made, flops_per_token=flops, micro_batches=micro_batches)

    if text is not None:
        both = digest([trainer.data_fingerprint, text.fingerprint])
        trainer = dataclasses.replace(trainer, data_fingerprint=both)
    return dataclasses.replace(trainer, setting=setting)


def objective_of(
    config: PPOConfig, model: LanguageModel, critic: LanguageModel | None
) -> Objective:
    """The objective of a config for a policy, and for a critic of its own if there is one."""
    return ppo.make_objective(
        model,
        config.loss,
        temperature=config.rollout.temperature,
        max_completion_length=config.rollout.max_new_tokens,
        critic=critic,
    )


@dataclasses.dataclass(frozen=True)
class _Text:
    """Batches of pre-training text, and a hash of all of it."""

    source: OfflineSource
    fingerprint: str


def _text(ground: foundation.Foundation, config: PPOConfig) -> _Text:
    """The text that `loss.ptx_coefficient` weighs, a function of phase and step.

    Raises:
      UserError: it cannot be read, or is too little for a row.
    """
    corpus = Corpus(config.pretraining, ground.tokenizer, config.seed)
    ground.log(f"mixed in: {corpus.describe()}")
    phases = plan(config.phases, config.optimizer, ground.model.rope, corpus.weights)
    rows = config.pretraining.rows
    source = OfflineSource(
        [dataclasses.replace(phase, batch=phase.batch * rows) for phase in phases],
        lambda phase: corpus.rows(phase.length, phase.weights),
        config.seed,
        ground.mesh,
    )
    return _Text(source, corpus.fingerprint)
