"""What reward modelling and preference optimisation share: comparisons, and how they are read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from llm_jax.config import digest
from llm_jax.data.example_store import comparison_stores
from llm_jax.data.offline import OfflineSource
from llm_jax.data.phases import Phase
from llm_jax.data.preferences import (
    Arrangement,
    PreferenceDataConfig,
    PreferenceRows,
    responses_of,
)
from llm_jax.data.tokenizers import TokenizerConfig
from llm_jax.errors import UserError
from llm_jax.models import LanguageModel, ModelConfig
from llm_jax.models.size import flops_per_token
from llm_jax.step import Objective
from llm_jax.trainers import foundation
from llm_jax.trainers.base import Evaluation, EvaluationConfig, RunConfig, Setting, Trainer

PAIRS = "pairs"  # the one component of the mixture


@dataclasses.dataclass(frozen=True)
class PreferenceEvaluationConfig(EvaluationConfig):
    """Held-out comparisons."""

    at_start: bool = True
    rows: int = 512


@dataclasses.dataclass(frozen=True)
class PreferenceConfig(RunConfig):
    """What the configs of both stages have; architecture and tokenizer are inherited."""

    model: ModelConfig = ModelConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()  # where none is inherited
    data: PreferenceDataConfig = PreferenceDataConfig()
    evaluation: PreferenceEvaluationConfig = PreferenceEvaluationConfig()


@dataclasses.dataclass(frozen=True)
class Wiring:
    """What a stage adds to the comparisons.

    attach: completes the rows of a phase (reference log-probabilities). objective: for a model.
    evaluations: `(model, objective, held-out rows, batch) → evaluations`. sample: as in `Setting`,
    with the model before the parameters.
    """

    attach: Callable[[PreferenceRows], None]
    objective: Callable[[LanguageModel], Objective]
    evaluations: Callable[[LanguageModel, Objective, PreferenceRows, int], tuple[Evaluation, ...]]
    sample: Callable[[LanguageModel, Any], str] | None = None
    whole_batch: bool = False


def build(
    ground: foundation.Foundation,
    arrangement: Arrangement,
    wiring: Wiring,
    margins: Sequence[float] | None = None,
) -> Trainer:
    """Reads the comparisons and wires the stage.

    Raises:
      UserError: data that does not fit.
    """
    config: Any = ground.config
    assert ground.template is not None
    stores = comparison_stores(
        config.data,
        ground.template,
        ground.tokenizer,
        validation_fraction=config.data.validation_fraction,
        cache_dir=config.data.cache_dir,
    )
    responses = responses_of(stores.values(), arrangement)
    phases = ground.phases({PAIRS: 1.0}, sequences=responses)

    def make_rows(split: str, phase: Phase) -> PreferenceRows:
        rows = PreferenceRows(
            stores[split],
            phase.length,
            arrangement,
            responses,
            too_long=config.data.too_long,
            margins=margins,
        )
        wiring.attach(rows)
        return rows

    training = [make_rows("train", phase) for phase in phases]

    def setting(phase: Phase) -> Setting:
        model_config = dataclasses.replace(ground.model, rope=phase.rope)
        model = LanguageModel(model_config)
        objective = wiring.objective(model)
        evaluations: tuple[Evaluation, ...] = ()
        facts = [_describe(training[phase.index])]
        try:
            held_out = make_rows("validation", phase)
        except UserError as error:
            facts.append(f"nothing is held out: {error}")
        else:
            batch = config.evaluation.batch or phase.batch
            evaluations = wiring.evaluations(model, objective, held_out, batch)
            facts.append(f"{len(held_out):,} held out")
        evaluations += ground.tasks(ground.subject(model, phase.length))
        sample = wiring.sample
        return Setting(
            objective=objective,
            evaluations=evaluations,
            sample=None if sample is None else lambda params: sample(model, params),
            meta=ground.meta(model_config, phase),
            flops_per_token=flops_per_token(model_config, phase.length),
            micro_batches=1 if wiring.whole_batch else ground.micro_batches(phase),
            facts=tuple(facts),
        )

    settings = [setting(phase) for phase in phases]
    source = OfflineSource(
        phases, lambda phase: {PAIRS: training[phase.index]}, config.seed, ground.mesh
    )
    fingerprint = digest({split: store.fingerprint for split, store in stores.items()})
    return ground.trainer(phases, source, settings, fingerprint)


def _describe(training: PreferenceRows) -> str:
    text = f"{len(training):,} comparisons of {training.responses} answers"
    clipped = training.sequences.clipped
    if clipped.too_long:
        text += f"; {clipped.too_long:,} answers are longer than a row with their prompt"
    if training.left_out:
        text += f"; {training.left_out:,} answers left out, of which nothing is left"
    return text
