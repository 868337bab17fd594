"""The stages by name. A trainer wires model, objective, source and evaluations; it never loops."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

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

__all__ = ["TRAINERS", "Stage"]
