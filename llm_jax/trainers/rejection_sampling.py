"""Rejection sampling: fine-tuning on the best of several answers of the model's own.

The answers that were chosen are a data set of their own, RUN/selected, and pairs of a good and a
bad one another, RUN/pairs; see `llm_jax.rl.selection`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from llm_jax.config import resolved
from llm_jax.data.phases import Phase
from llm_jax.errors import UserError
from llm_jax.models import LanguageModel
from llm_jax.objectives import lm
from llm_jax.rl.rollouts import completion_batch
from llm_jax.rl.scoring import Sample
from llm_jax.rl.selection import SelectionConfig, Selector, best_of
from llm_jax.step import Objective, Pooled
from llm_jax.trainers import foundation, on_policy
from llm_jax.trainers.base import Trainer
from llm_jax.trainers.rounds import Round, Stateless, Wiring
from llm_jax.types import RolloutBatch


@dataclasses.dataclass(frozen=True)
class RejectionSamplingConfig(on_policy.OnPolicyConfig):
    """The config of `trainer = "rejection_sampling"`."""

    trainer: str = "rejection_sampling"
    loss: lm.LossConfig = lm.LossConfig()
    selection: SelectionConfig = SelectionConfig()


class BestOfN(Stateless):
    """Trains on chosen answers; what it knows of earlier ones stands in the run's folder."""

    def __init__(self, selector: Selector, run: str):
        self._selector, self._run = selector, run

    def learn(self, params: Any, round: Round) -> tuple[RolloutBatch, dict[str, float]]:
        del params
        length = round.rollouts.sequences.tokens.shape[1]
        selection = self._selector.select(
            round.step,
            round.prompts,
            round.rollouts.samples,
            round.score,
            run=self._run,
            step=round.step,
            length=length,
        )
        sequences = completion_batch([s or _NOTHING for s in selection.samples], length)
        zeros = np.zeros(sequences.tokens.shape, np.float32)  # no ratio is formed of these answers
        prompts = len(round.prompts)
        metrics = {
            "selected": selection.chosen / len(selection.samples),
            "selected_earlier": selection.earlier / max(selection.chosen, 1),
            "pairs": selection.pairs / prompts,
            **best_of(round.scores.reshape(prompts, -1)),
        }
        return RolloutBatch(sequences, old_logprobs=zeros, advantages=zeros), metrics


_NOTHING = Sample(0, "", "", (), (), False, {})  # stands where fewer answers are good enough


def build(
    config: RejectionSamplingConfig, mesh: Mesh, workdir: Path, log: Callable[[str], None]
) -> Trainer:
    """Reads the prompts and wires the stage.

    Raises:
      UserError: whatever in the config or the data does not fit, before anything is written to
        `workdir`.
    """
    if config.selection.keep > config.rollout.samples:
        raise UserError(
            f"config.selection.keep={config.selection.keep} is more than config.rollout.samples="
            f"{config.rollout.samples}: lower it."
        )
    ground = foundation.lay_for_chats(config, mesh, workdir, log)

    def objective(model: LanguageModel, phase: Phase) -> Objective:
        del phase
        inner = lm.make_objective(model, config.loss)
        if not isinstance(inner, Pooled):
            return lambda params, batch, rng: inner(params, batch.sequences, rng)
        pooled: Pooled = inner
        return Pooled(
            lambda params, batch, rng: pooled.pool(params, batch.sequences, rng),
            lambda params, batch, rng, sums: pooled(params, batch.sequences, rng, sums),
        )

    assert ground.template is not None
    lineage = {
        "policy": {"run": str(workdir), "parents": list(ground.lineage)},
        "prompts": resolved(config.data),
        "rewards": [resolved(term) for term in config.rewards],
        "rollout": resolved(config.rollout),
        "seed": config.seed,
    }
    selector = Selector(config.selection, workdir, ground.template, ground.tokenizer, lineage)
    wiring = Wiring(
        objective=objective,
        learner=lambda model, phase: BestOfN(selector, str(workdir)),
        kept=config.selection.keep,
    )
    return on_policy.build(ground, wiring, workdir)
