"""Pre-training: next-token prediction on packed documents, through phases of growing context."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from llm_jax.data.corpus import MAIN, Corpus, DataConfig, training_texts
from llm_jax.data.needle import NeedleConfig, needle_examples
from llm_jax.data.phases import Phase
from llm_jax.data.tokenizers import TokenizerConfig, make_tokenizer
from llm_jax.evals.needle import answer_tokens, evaluate_needle
from llm_jax.models import LanguageModel, ModelConfig
from llm_jax.objectives import lm
from llm_jax.step import Objective
from llm_jax.trainers import foundation, language
from llm_jax.trainers.base import Evaluation, EvaluationConfig, RunConfig, Trainer


@dataclasses.dataclass(frozen=True)
class PretrainEvaluationConfig(EvaluationConfig):
    """Perplexity on held-out rows, and needles."""

    needle: bool = False  # needle retrieval at the phase's length
    needle_depths: int = 5  # evenly spaced from the start to the end of the context
    needles_per_depth: int = 8

    positive = (*EvaluationConfig.positive, "needle_depths", "needles_per_depth")


@dataclasses.dataclass(frozen=True)
class PretrainConfig(RunConfig):
    """The config of `trainer = "pretrain"`."""

    model: ModelConfig = ModelConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig = DataConfig()
    loss: lm.LossConfig = lm.LossConfig()
    evaluation: PretrainEvaluationConfig = PretrainEvaluationConfig()


def build(
    config: PretrainConfig,
    mesh: Mesh,
    workdir: Path,
    log: Callable[[str], None],
    make_objective: Callable[[LanguageModel], Objective] | None = None,
) -> Trainer:
    """Reads or makes tokenizer and token stores, and wires the stage.

    A stage that differs in nothing but its loss passes its own `make_objective`.

    Raises:
      UserError: whatever in the config or the data does not fit, before anything is written to
        `workdir`.
    """
    ground = foundation.lay(
        config,
        mesh,
        workdir,
        log,
        lambda: make_tokenizer(config.tokenizer, lambda: training_texts(config.data)),
    )
    corpus = Corpus(config.data, ground.tokenizer, config.seed)
    log(corpus.describe())
    return language.build(
        ground,
        corpus,
        make_objective or functools.partial(lm.make_objective, config=config.loss),
        functools.partial(_needles, config, ground, corpus),
        language.sample_of_prompt(ground, config.sample.prompt),
    )


def _needles(
    config: PretrainConfig,
    ground: foundation.Foundation,
    corpus: Corpus,
    phase: Phase,
    model: LanguageModel,
) -> tuple[Evaluation, ...]:
    """Needle retrieval at the phase's length, where the config or the phase's gate asks for it."""
    settings = config.evaluation
    if not settings.needle and (phase.gate is None or phase.gate.needle_accuracy is None):
        return ()
    examples = needle_examples(
        ground.tokenizer,
        corpus.stores[MAIN]["validation"],
        phase.length,
        depths=np.linspace(0, 1, settings.needle_depths).tolist(),
        per_depth=settings.needles_per_depth,
        seed=config.seed + 1,
        config=config.data.needle or NeedleConfig(),
    )
    answer = ground.jit(functools.partial(answer_tokens, model, count=examples.answer_tokens))
    batch = settings.batch or phase.batch

    def run(params: Any) -> dict[str, float]:
        return evaluate_needle(answer, params, examples, batch)

    return (Evaluation("needle", run),)
