"""On-policy distillation: the student answers, and the teacher tells it what it would have said.

Generalised knowledge distillation on the student's own samples alone (GKD, arXiv:2306.13649,
λ = 1): a student learns where it goes wrong itself, instead of what to do after words that it
would never have said. Rounds of samples that are trained on for several steps are allowed, as in
the other on-policy stages; no gradient flows through sampling.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from llm_jax.data.phases import Phase
from llm_jax.evals.objective import evaluate_objective, jit_objective
from llm_jax.models import LanguageModel
from llm_jax.objectives import distill
from llm_jax.rl.rewards import RewardTerm
from llm_jax.rl.rollouts import Rollouts
from llm_jax.step import Objective
from llm_jax.trainers import on_policy
from llm_jax.trainers.base import Trainer
from llm_jax.trainers.rounds import Measure, Round, Stateless, Wiring
from llm_jax.trainers.teacher import TeacherConfig, beside, lay
from llm_jax.types import Batch, Mean, RolloutBatch


@dataclasses.dataclass(frozen=True)
class OnPolicyDistillConfig(on_policy.OnPolicyConfig):
    """The config of `trainer = "on_policy_distill"`."""

    trainer: str = "on_policy_distill"
    teacher: TeacherConfig = TeacherConfig()
    loss: distill.DivergenceConfig = distill.DivergenceConfig(divergence="reverse_kl")
    rewards: tuple[RewardTerm, ...] = (RewardTerm("finished"),)  # logged, no part of the loss


class Imitation(Stateless):
    """Trains on the samples as they are."""

    def learn(self, params: Any, round: Round) -> tuple[RolloutBatch, dict[str, float]]:
        del params
        rollouts = round.rollouts
        advantages = np.zeros_like(rollouts.logprobs)
        return RolloutBatch(rollouts.sequences, rollouts.logprobs, advantages), {}


@dataclasses.dataclass(frozen=True)
class _Sequences:
    """The sequences of rollouts as rows."""

    batch: Batch

    def __len__(self) -> int:
        return len(self.batch.tokens)

    def __getitem__(self, index: int) -> Batch:
        return jax.tree.map(lambda x: x[index], self.batch)


def build(
    config: OnPolicyDistillConfig, mesh: Mesh, workdir: Path, log: Callable[[str], None]
) -> Trainer:
    """Reads the prompts and wires the stage.

    Raises:
      UserError: whatever in the config or the data does not fit, before anything is written to
        `workdir`.
    """
    ground, teacher = lay(config, mesh, workdir, log)
    ground.require_origin()
    ground = beside(ground, teacher)

    def objective(model: LanguageModel) -> Objective:
        inner = distill.make_objective(model, teacher.model, config.loss)

        def on_samples(params: Any, batch: Batch, rng: Any) -> tuple[Mean, dict[str, Mean]]:
            loss, metrics = inner(params, batch, rng)
            del metrics["cross_entropy"]  # of the student's own words: nothing that it should learn
            return loss, metrics

        return on_samples

    def measure(model: LanguageModel, phase: Phase) -> Measure:
        """The divergence of answers to held-out prompts."""
        jitted = jit_objective(objective(model), mesh)
        batch = config.evaluation.batch or phase.batch

        def run(params: Any, rollouts: Rollouts) -> dict[str, float]:
            rows = _Sequences(rollouts.sequences)
            return evaluate_objective(jitted, params, rows, batch, len(rows))

        return run

    def on_rollouts(model: LanguageModel, phase: Phase) -> Objective:
        del phase
        inner = objective(model)
        return lambda params, batch, rng: inner(params, batch.sequences, rng)

    wiring = Wiring(
        objective=on_rollouts,
        learner=lambda model, phase: Imitation(),
        measure=measure,
    )
    return on_policy.build(ground, wiring, workdir)
