"""Reward modelling: a scalar head on the language model, trained on comparisons."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from llm_jax.data.preferences import PreferenceRows
from llm_jax.evals.preferences import evaluate_rewards
from llm_jax.models import LanguageModel
from llm_jax.models.heads import REWARD, rewards
from llm_jax.objectives import reward
from llm_jax.step import Objective
from llm_jax.trainers import foundation, preference
from llm_jax.trainers.base import Evaluation, Trainer


@dataclasses.dataclass(frozen=True)
class RewardConfig(preference.PreferenceConfig):
    """The config of `trainer = "reward"`."""

    trainer: str = "reward"
    loss: reward.LossConfig = reward.LossConfig()


def build(config: RewardConfig, mesh: Mesh, workdir: Path, log: Callable[[str], None]) -> Trainer:
    """Reads the comparisons and wires the stage; all answers to a prompt stand in one row.

    Raises:
      UserError: whatever in the config or the data does not fit, before anything is written to
        `workdir`.
    """
    ground = foundation.lay_for_chats(config, mesh, workdir, log, heads=(REWARD,))

    def evaluations(
        model: LanguageModel, objective: Objective, rows: PreferenceRows, batch: int
    ) -> tuple[Evaluation, ...]:
        def read(params: Any, comparisons: Any) -> Any:
            return rewards(model, params, comparisons.responses)

        jitted = ground.jit(read)

        def run(params: Any) -> dict[str, float]:
            return evaluate_rewards(jitted, params, rows, batch, config.evaluation.rows)

        return (Evaluation("validation", run),)

    wiring = preference.Wiring(
        attach=lambda rows: None,
        objective=functools.partial(reward.make_objective, config=config.loss),
        evaluations=evaluations,
    )
    return preference.build(ground, "groups", wiring, config.loss.margin_levels)
