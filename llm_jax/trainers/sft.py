"""Supervised fine-tuning: next-token prediction of answers, on packed conversations."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from llm_jax.data.chat_corpus import ChatCorpus, ChatDataConfig
from llm_jax.data.phases import Phase
from llm_jax.data.tokenizers import TokenizerConfig
from llm_jax.evals.answers import answer_examples, evaluate_answers
from llm_jax.generation.decoding import Generation
from llm_jax.generation.generate import generate
from llm_jax.generation.sampler import SamplerConfig
from llm_jax.models import LanguageModel, ModelConfig
from llm_jax.objectives import lm
from llm_jax.trainers import foundation, language
from llm_jax.trainers.base import Evaluation, EvaluationConfig, RunConfig, Trainer


@dataclasses.dataclass(frozen=True)
class SFTEvaluationConfig(EvaluationConfig):
    """The loss of held-out answers, and answers generated to held-out prompts."""

    at_start: bool = True
    answers: int = 64  # prompts to answer; 0: none
    max_new_tokens: int = 64  # of an answer
    answer_after: str | None = None  # only what follows the last of these counts, such as "####"


@dataclasses.dataclass(frozen=True)
class SFTConfig(RunConfig):
    """The config of `trainer = "sft"`; architecture and tokenizer are inherited."""

    trainer: str = "sft"
    model: ModelConfig = ModelConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()  # where none is inherited
    data: ChatDataConfig = ChatDataConfig()
    loss: lm.LossConfig = lm.LossConfig()
    evaluation: SFTEvaluationConfig = SFTEvaluationConfig()


def build(config: SFTConfig, mesh: Mesh, workdir: Path, log: Callable[[str], None]) -> Trainer:
    """Renders the conversations and wires the stage.

    Raises:
      UserError: whatever in the config or the data does not fit, before anything is written to
        `workdir`.
    """
    ground = foundation.lay_for_chats(config, mesh, workdir, log)
    assert ground.template is not None
    corpus = ChatCorpus(config.data, ground.template, ground.tokenizer)
    log(corpus.describe())
    return language.build(
        ground,
        corpus,
        functools.partial(lm.make_objective, config=config.loss),
        functools.partial(answers, config, ground, corpus),
        foundation.chat_sample(ground),
    )


def answers(
    config: Any,
    ground: foundation.Foundation,
    corpus: ChatCorpus,
    phase: Phase,
    model: LanguageModel,
) -> tuple[Evaluation, ...]:
    """Greedy answers to held-out prompts, as an `SFTEvaluationConfig` asks for them."""
    settings = config.evaluation
    store = corpus.stores[corpus.main]["validation"]
    if not settings.answers or store.trained is None:
        return ()
    assert ground.template is not None
    longest = min(phase.length, model.config.max_length - settings.max_new_tokens)
    examples = answer_examples(store, ground.tokenizer, settings.answers, longest)
    if not examples.prompts:
        return ()
    nats = ground.jit(functools.partial(lm.token_nats, model, chunk=config.loss.chunk))
    stop_ids = ground.template.stop_ids(ground.tokenizer)
    batch = settings.batch or phase.batch

    def answer(params: Any, prompts: Sequence[Sequence[int]]) -> Generation:
        return generate(
            model,
            params,
            prompts,
            max_new_tokens=settings.max_new_tokens,
            sampler=SamplerConfig(temperature=0),
            rng=jax.random.key(config.seed),
            stop_ids=stop_ids,
            pad_id=ground.tokenizer.pad_id,
        )

    def run(params: Any) -> dict[str, float]:
        return evaluate_answers(
            answer, nats, params, ground.tokenizer, examples, batch, settings.answer_after
        )

    return (Evaluation("answers", run),)
