"""What stages that train on their own samples share: their config, and how they are wired."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llm_jax.data.phases import Phase
from llm_jax.data.prompts import Prompt, PromptData, PromptDataConfig
from llm_jax.data.tokenizers import TokenizerConfig
from llm_jax.errors import UserError
from llm_jax.evals.generation import GenerationConfig, GenerationTask
from llm_jax.evals.subject import Subject
from llm_jax.models import LanguageModel, ModelConfig
from llm_jax.models.size import flops_per_token
from llm_jax.rl.rewards import RewardTerm, Scorer
from llm_jax.rl.rollouts import RolloutConfig
from llm_jax.rl.scoring import Policy
from llm_jax.trainers.base import Evaluation, EvaluationConfig, RunConfig, Setting, Trainer
from llm_jax.trainers.foundation import Foundation, chat_sample
from llm_jax.trainers.rounds import OnPolicySource, Wiring

PROMPTS = "prompts"  # the one component of the mixture


@dataclasses.dataclass(frozen=True)
class OnPolicyEvaluationConfig(EvaluationConfig):
    """Answers to held-out prompts, scored."""

    at_start: bool = True
    every: int = 20
    rows: int = 128  # prompts
    temperature: float = 0.0  # 0: greedy


@dataclasses.dataclass(frozen=True)
class OnPolicyConfig(RunConfig):
    """What the configs of these stages have; architecture and tokenizer are inherited."""

    model: ModelConfig = ModelConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()  # where none is inherited
    data: PromptDataConfig = PromptDataConfig()
    rollout: RolloutConfig = RolloutConfig()
    rewards: tuple[RewardTerm, ...] = (RewardTerm("exact_match"),)
    max_reward_failures: int = 100  # samples without a score, in the whole run
    evaluation: OnPolicyEvaluationConfig = OnPolicyEvaluationConfig()


def build(ground: Foundation, wiring: Wiring, workdir: Path) -> Trainer:
    """Reads the prompts and wires the stage.

    Raises:
      UserError: data, rewards or sizes that do not fit.
    """
    config: Any = ground.config
    assert ground.template is not None
    ground.require_origin()
    phases = ground.phases({PROMPTS: 1.0})
    shortest = min(phase.length for phase in phases)
    longest = shortest - config.rollout.max_new_tokens
    if longest < 1:
        raise UserError(
            f"config.rollout.max_new_tokens={config.rollout.max_new_tokens} leaves no room for a "
            f"prompt in rows of {shortest} tokens: lower it, or give the phase a greater length."
        )
    for phase in phases:
        wiring.prompts(config.rollout, phase)
    prompts = PromptData(
        config.data, ground.template, ground.tokenizer, longest=longest, seed=config.seed
    )
    ground.log(prompts.describe())
    policy = Policy(ground.tokenizer, ground.mesh, ground.log, ground.template)
    scorer = Scorer(config.rewards, config.max_reward_failures, policy)
    source = OnPolicySource(ground, wiring, prompts, scorer, workdir)

    def setting(phase: Phase) -> Setting:
        model = LanguageModel(dataclasses.replace(ground.model, rope=phase.rope))
        subject = ground.subject(model, phase.length)
        sample = chat_sample(ground)
        return Setting(
            objective=wiring.objective(model, phase),
            evaluations=(
                _evaluation(ground, wiring, subject, phase, prompts.validation, scorer),
                *ground.tasks(subject),
            ),
            sample=None if sample is None else functools.partial(sample, model),
            meta=ground.meta(model.config, phase),
            flops_per_token=flops_per_token(model.config, phase.length),
            micro_batches=ground.micro_batches(phase),
            facts=(_describe(wiring, config.rollout, phase),),
        )

    settings = [setting(phase) for phase in phases]
    return ground.trainer(phases, source, settings, prompts.fingerprint)


def _evaluation(
    ground: Foundation,
    wiring: Wiring,
    subject: Subject,
    phase: Phase,
    prompts: Sequence[Prompt],
    scorer: Scorer,
) -> Evaluation:
    """Mean rewards of answers to held-out prompts."""
    config: Any = ground.config
    rollout = config.rollout
    settings = GenerationConfig(
        data=config.data,
        rewards=config.rewards,
        passes=None,
        rows=config.evaluation.rows,
        max_new_tokens=rollout.max_new_tokens,
        temperature=config.evaluation.temperature,
        top_k=rollout.top_k,
        top_p=rollout.top_p,
        slots=rollout.slots,
        seed=config.seed,
    )
    assert ground.template is not None
    stop_ids = ground.template.stop_ids(ground.tokenizer)
    task = GenerationTask(settings, subject, prompts, scorer, stop_ids)
    measure = None if wiring.measure is None else wiring.measure(subject.model, phase)

    def run(params: Any) -> dict[str, float]:
        rollouts = task.sample(params, phase.length)
        measured = {} if measure is None else measure(params, rollouts)
        return {**task.result(rollouts).metrics, **measured}

    return Evaluation("validation", run)


def _describe(wiring: Wiring, rollout: RolloutConfig, phase: Phase) -> str:
    prompts = wiring.prompts(rollout, phase)
    text = f"rounds of {prompts} prompts with {rollout.samples} completions each"
    if wiring.redraws:
        text += f", drawn again up to {wiring.redraws} times"
    return text if rollout.steps == 1 else f"{text}, for {rollout.steps} steps"
