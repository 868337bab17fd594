"""Verifiable instruction following (IFEval, Zhou et al. 2023, arXiv:2311.07911)."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from llm_jax.data.examples import MalformedExample
from llm_jax.data.prompts import Prompt, PromptDataConfig
from llm_jax.errors import UserError
from llm_jax.evals.generation import GenerationConfig, GenerationTask, make_generation
from llm_jax.evals.statistics import mean, ratio
from llm_jax.evals.subject import Subject
from llm_jax.evals.task import TaskResult
from llm_jax.rl.instructions import IDS, followed, followed_loosely, instructions_of
from llm_jax.rl.rewards import RewardTerm
from llm_jax.rl.rollouts import Rollouts


@dataclasses.dataclass(frozen=True)
class InstructionFollowingConfig:
    """data: prompts whose rows have instructions as `rl.instructions` describes them; all of them
    are asked unless `held_out`. The rest is as in `GenerationConfig`."""

    data: PromptDataConfig = PromptDataConfig(source="hf:google/IFEval")
    held_out: bool = False
    rows: int = 1000
    max_new_tokens: int = 512
    temperature: float = 0.0
    slots: int | None = 64
    seed: int = 0

    @property
    def generation(self) -> GenerationConfig:
        names = [field.name for field in dataclasses.fields(self)]
        return GenerationConfig(
            rewards=(RewardTerm("instructions"),), **{name: getattr(self, name) for name in names}
        )


class _InstructionTask(GenerationTask):
    def result(self, rollouts: Rollouts) -> TaskResult:
        made = super().result(rollouts)
        strict: list[list[bool]] = []
        loose: list[list[bool]] = []
        for sample, row in zip(rollouts.samples, made.examples, strict=True):
            wanted = instructions_of(sample.row, sample.prompt_text)
            strict.append(followed(sample.completion_text, wanted))
            loose.append(followed_loosely(sample.completion_text, wanted))
            row["instructions"] = [one.name for one in wanted]
            row["strict"], row["loose"] = strict[-1], loose[-1]
        metrics = {**_accuracies("strict", strict), **_accuracies("loose", loose)}
        told = {key: made.metrics[key] for key in ("completion_length", "finished")}
        return TaskResult({**metrics, **told}, made.examples)


def instruction_following_task(
    config: InstructionFollowingConfig, subject: Subject
) -> Callable[[Any], TaskResult]:
    """
    Returns:
      What gives strict/prompt_accuracy, the share of prompts of which all instructions are
      followed, strict/instruction_accuracy, the share of instructions, prompts being the sampled
      units, and loose/..., of the responses in their best of eight forms.

    Raises:
      UserError: prompts that cannot be read, or none with instructions that are known. Those with
        others are left out and told of.
    """
    return make_generation(config.generation, subject, _InstructionTask, _checkable).run


def _checkable(prompts: Sequence[Prompt], log: Callable[[str], None]) -> list[Prompt]:
    """
    Raises:
      UserError: there are none.
    """
    kept, reasons = [], Counter[str]()
    for prompt in prompts:
        try:
            _ = instructions_of(prompt.row, prompt.text)
            kept.append(prompt)
        except MalformedExample as error:
            reasons[str(error)] += 1
    for reason, count in reasons.most_common():
        log(f"{count:,} prompts are left out: {reason}")
    if not kept:
        raise UserError(f"no prompt has instructions that can be checked, under {IDS!r}.")
    return kept


def _accuracies(name: str, verdicts: Sequence[Sequence[bool]]) -> dict[str, float]:
    followed_of = np.array([sum(each) for each in verdicts], float)
    counts = np.array([len(each) for each in verdicts], float)
    return {
        **mean(f"{name}/prompt_accuracy", [all(each) for each in verdicts]),
        **ratio(f"{name}/instruction_accuracy", followed_of, counts),
    }
