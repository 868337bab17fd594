"""Group-relative policy optimisation: answers to one prompt, judged against one another."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jax.sharding import Mesh

from llm_jax.errors import UserError
from llm_jax.models import LanguageModel
from llm_jax.objectives import grpo
from llm_jax.rl.advantages import group_advantages, overlong_penalty
from llm_jax.step import Objective
from llm_jax.trainers import foundation, on_policy
from llm_jax.trainers.base import Trainer
from llm_jax.trainers.reference import reference_policy
from llm_jax.trainers.rounds import Round, Stateless, Wiring, masked
from llm_jax.types import RolloutBatch


@dataclasses.dataclass(frozen=True)
class AdvantageConfig:
    """How scores become advantages."""

    # What a group's centred scores are divided by: its deviation, that of the round, or nothing;
    # None: as the paper of the loss's variant does.
    scale: Literal["std", "batch", "none"] | None = None
    # Tokens before the limit over which a completion loses up to one point (DAPO); None: none.
    overlong_buffer: int | None = None
    # How often a round draws further prompts in place of those whose answers all score alike, so
    # that nothing is learnt from them (dynamic sampling, DAPO). What is missing then is made up by
    # such prompts. Scores are compared before `overlong_buffer` changes them.
    redraws: int = 0

    def __post_init__(self) -> None:
        if self.redraws < 0:
            raise UserError(f"config.advantage.redraws={self.redraws} must not be negative.")


@dataclasses.dataclass(frozen=True)
class GRPOConfig(on_policy.OnPolicyConfig):
    """The config of `trainer = "grpo"`."""

    trainer: str = "grpo"
    loss: grpo.LossConfig = grpo.LossConfig()
    advantage: AdvantageConfig = AdvantageConfig()

    @property
    def has_reference(self) -> bool:
        """Whether samples are compared with the model that the stage starts from."""
        return bool(self.loss.beta)

    @property
    def advantage_scale(self) -> Literal["std", "batch", "none"]:
        return self.advantage.scale or grpo.VARIANTS[self.loss.variant].scale


@dataclasses.dataclass(frozen=True)
class GroupLearner(Stateless):
    """Advantages within groups."""

    config: GRPOConfig

    def learn(self, params: Any, round: Round) -> tuple[RolloutBatch, dict[str, float]]:
        del params
        config, scores = self.config, round.scores
        if config.advantage.overlong_buffer is not None:
            scores = scores + overlong_penalty(
                round.rollouts.lengths,
                config.rollout.max_new_tokens,
                config.advantage.overlong_buffer,
            )
        groups = group_advantages(
            scores.reshape(-1, config.rollout.samples), config.advantage_scale
        )
        sequences, old_logprobs = masked(round.rollouts.sequences, round.rollouts.logprobs, scores)
        spread = np.broadcast_to(groups.advantages.reshape(-1, 1), old_logprobs.shape)
        batch = RolloutBatch(
            sequences=sequences,
            old_logprobs=old_logprobs,
            advantages=np.where(sequences.loss_weights > 0, spread, 0).astype(np.float32),
            reference_logprobs=round.reference_logprobs,
        )
        return batch, {"constant_groups": float(groups.constant.mean())}


def build(config: GRPOConfig, mesh: Mesh, workdir: Path, log: Callable[[str], None]) -> Trainer:
    """Reads the prompts and wires the stage.

    Raises:
      UserError: whatever in the config or the data does not fit, before anything is written to
        `workdir`.
    """
    _check(config)
    ground = foundation.lay_for_chats(config, mesh, workdir, log)
    log(_describe(config))

    ground, reference = reference_policy(ground) if config.has_reference else (ground, None)
    wiring = Wiring(
        objective=lambda model, phase: objective_of(config, model),
        learner=lambda model, phase: GroupLearner(config),
        reference=reference,
        redraws=config.advantage.redraws,
    )
    return on_policy.build(ground, wiring, workdir)


def objective_of(config: GRPOConfig, model: LanguageModel) -> Objective:
    """The objective of a config for a model."""
    return grpo.make_objective(
        model,
        config.loss,
        temperature=config.rollout.temperature,
        max_completion_length=config.rollout.max_new_tokens,
    )


def _check(config: GRPOConfig) -> None:
    if config.rollout.samples < 2:
        raise UserError(
            "config.rollout.samples=1 makes groups of one, which say nothing: give at least 2."
        )
    buffer, limit = config.advantage.overlong_buffer, config.rollout.max_new_tokens
    if buffer is not None and not 1 <= buffer <= limit:
        raise UserError(
            f"config.advantage.overlong_buffer={buffer} must lie between 1 and "
            f"config.rollout.max_new_tokens={limit}."
        )


def _describe(config: GRPOConfig) -> str:
    """What the variant stands for, where the config does not say."""
    low, high = config.loss.clipping
    divisor = {"std": "a group's deviation", "batch": "the round's deviation", "none": "nothing"}
    return (
        f"{config.loss.variant}: ratios clipped to [{1 - low:g}, {1 + high:g}], advantages divided "
        f"by {divisor[config.advantage_scale]}"
    )
