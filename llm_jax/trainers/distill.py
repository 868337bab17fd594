"""Distillation on given data: fine-tuning on conversations or texts, towards a teacher as well."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from llm_jax.data.chat_corpus import ChatCorpus, ChatDataConfig
from llm_jax.data.phases import Phase
from llm_jax.errors import UserError
from llm_jax.evals.batching import BatchRows
from llm_jax.evals.objective import evaluate_objective, jit_objective
from llm_jax.models import LanguageModel, ModelConfig
from llm_jax.objectives import distill
from llm_jax.step import Objective
from llm_jax.trainers import foundation, language, sft
from llm_jax.trainers.base import Evaluation, RunConfig, Trainer
from llm_jax.trainers.teacher import TeacherConfig, beside, lay
from llm_jax.trainers.teacher_cache import TaughtCorpus, TeacherCache


@dataclasses.dataclass(frozen=True)
class DistillConfig(RunConfig):
    """The config of `trainer = "distill"`; a student without a run to start from has the
    architecture `model` and the tokenizer of its teacher."""

    trainer: str = "distill"
    model: ModelConfig = ModelConfig()
    teacher: TeacherConfig = TeacherConfig()
    # How many of the teacher's likeliest tokens are kept on disk, which are computed once; the
    # others count as one event. None: all tokens, by a forward pass of the teacher in every step.
    top_k: int | None = None
    data: ChatDataConfig = ChatDataConfig()
    loss: distill.LossConfig = distill.LossConfig()
    evaluation: sft.SFTEvaluationConfig = sft.SFTEvaluationConfig()

    def __post_init__(self) -> None:
        if self.top_k is not None and self.top_k < 1:
            raise UserError(
                f"config.top_k={self.top_k} must be positive; leave it out for all tokens."
            )


def build(config: DistillConfig, mesh: Mesh, workdir: Path, log: Callable[[str], None]) -> Trainer:
    """Renders the data, asks the teacher where it is to be asked once, and wires the stage.

    Raises:
      UserError: whatever in the config or the data does not fit, before anything is written to
        `workdir`.
    """
    ground, teacher = lay(config, mesh, workdir, log)
    template = ground.template
    assert template is not None
    corpus: ChatCorpus
    make_objective: Callable[[LanguageModel], Objective]
    validation: Callable[[int], BatchRows | None]
    if config.top_k is None:
        ground = beside(ground, teacher)
        corpus = ChatCorpus(config.data, template, ground.tokenizer)
        make_objective = functools.partial(_whole_objective, config, teacher.model)
        validation = functools.partial(_held_out, corpus)
    else:
        cache = TeacherCache(config, ground, teacher)
        corpus = taught = TaughtCorpus(config, ground, cache)
        make_objective = functools.partial(_cached_objective, config, cache.vocabulary)
        validation = taught.taught_validation
    log(corpus.describe())

    def evaluations(phase: Phase, model: LanguageModel) -> tuple[Evaluation, ...]:
        answers = sft.answers(config, ground, corpus, phase, model)
        rows = validation(phase.length)
        if rows is None:
            return answers
        objective = jit_objective(make_objective(model), mesh)
        batch = config.evaluation.batch or phase.batch

        def run(params: Any) -> dict[str, float]:
            return evaluate_objective(objective, params, rows, batch, config.evaluation.rows)

        return (Evaluation("distillation", run), *answers)

    trainer = language.build(
        ground, corpus, make_objective, evaluations, foundation.chat_sample(ground)
    )
    teacher.release()
    return trainer


def _whole_objective(
    config: DistillConfig, teacher: LanguageModel, model: LanguageModel
) -> Objective:
    return distill.make_objective(model, teacher, config.loss, config.loss.alpha)


def _cached_objective(config: DistillConfig, vocabulary: int, model: LanguageModel) -> Objective:
    return distill.make_cached_objective(model, config.loss, config.loss.alpha, vocabulary)


def _held_out(corpus: ChatCorpus, length: int) -> BatchRows | None:
    return corpus.validation_rows(length).get(corpus.main)
