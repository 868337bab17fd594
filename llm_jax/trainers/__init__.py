"""The stages by name. A trainer wires model, objective, source and evaluations; it never loops."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from llm_jax.errors import UserError, did_you_mean
from llm_jax.trainers import (
    distill,
    dpo,
    grpo,
    on_policy_distill,
    ppo,
    pretrain,
    rejection_sampling,
    reward,
    sft,
)
from llm_jax.trainers.base import RunConfig, Trainer


@dataclasses.dataclass(frozen=True)
class Stage:
    """config: the stage's fields. build: `(config, mesh, workdir, log) → Trainer`."""

    config: type[RunConfig]
    build: Callable[..., Trainer]


TRAINERS: dict[str, Stage] = {
    "pretrain": Stage(pretrain.PretrainConfig, pretrain.build),
    "sft": Stage(sft.SFTConfig, sft.build),
    "reward": Stage(reward.RewardConfig, reward.build),
    "dpo": Stage(dpo.DPOConfig, dpo.build),
    "rejection_sampling": Stage(
        rejection_sampling.RejectionSamplingConfig, rejection_sampling.build
    ),
    "ppo": Stage(ppo.PPOConfig, ppo.build),
    "grpo": Stage(grpo.GRPOConfig, grpo.build),
    "distill": Stage(distill.DistillConfig, distill.build),
    "on_policy_distill": Stage(on_policy_distill.OnPolicyDistillConfig, on_policy_distill.build),
}


def find_stage(config: Any, others: Sequence[str] = ()) -> Stage:
    """The stage that `config.trainer` names.

    Args:
      config: an ml_collections ConfigDict.
      others: further names to suggest.

    Raises:
      UserError: there is no such stage.
    """
    name = config.get("trainer", None)
    if name not in TRAINERS:
        raise UserError(
            f"config.trainer={name!r} is no trainer.{did_you_mean(str(name), [*TRAINERS, *others])}"
        )
    return TRAINERS[name]


__all__ = ["TRAINERS", "Stage", "find_stage"]
