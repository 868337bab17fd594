"""Direct preference optimisation and its variants, on comparisons, offline."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from llm_jax.data.preferences import PreferenceRows
from llm_jax.errors import UserError
from llm_jax.evals.objective import evaluate_objective, jit_objective
from llm_jax.models import LanguageModel, lora
from llm_jax.objectives import dpo
from llm_jax.step import Objective
from llm_jax.trainers import foundation, preference
from llm_jax.trainers.base import Evaluation, Trainer
from llm_jax.trainers.reference import Reference


@dataclasses.dataclass(frozen=True)
class DPOConfig(preference.PreferenceConfig):
    """The config of `trainer = "dpo"`."""

    trainer: str = "dpo"
    loss: dpo.LossConfig = dpo.LossConfig()


def build(config: DPOConfig, mesh: Mesh, workdir: Path, log: Callable[[str], None]) -> Trainer:
    """Reads the comparisons, makes the reference's log-probabilities, and wires the stage.

    Raises:
      UserError: whatever in the config or the data does not fit, before anything is written to
        `workdir`.
    """
    variant = dpo.VARIANTS[config.loss.variant]
    _check(config, variant)
    ground = foundation.lay_for_chats(config, mesh, workdir, log)
    reference: Reference | None = None
    if variant.needs_reference and config.loss.reference == "precomputed":
        reference = Reference(config, ground)
        ground = dataclasses.replace(ground, more_meta=reference.meta)

    def evaluations(
        model: LanguageModel, objective: Objective, rows: PreferenceRows, batch: int
    ) -> tuple[Evaluation, ...]:
        jitted = jit_objective(objective, mesh)

        def run(params: Any) -> dict[str, float]:
            return evaluate_objective(jitted, params, rows, batch, config.evaluation.rows)

        return (Evaluation("validation", run),)

    wiring = preference.Wiring(
        attach=(lambda rows: None) if reference is None else reference.attach,
        objective=functools.partial(objective_of, config),
        evaluations=evaluations,
        sample=foundation.chat_sample(ground),
        whole_batch=variant.whole_batch,
    )
    return preference.build(ground, "unpaired" if variant.unpaired else "pairs", wiring)


def _check(config: DPOConfig, variant: dpo.Variant) -> None:
    if variant.needs_reference and config.init_from is None and config.init_from_hf is None:
        raise UserError(
            f"config.loss.variant={config.loss.variant!r} compares with the model that it starts "
            "from: name its run by config.init_from, or its folder by config.init_from_hf."
        )
    if config.loss.reference == "adapter_off" and not variant.needs_reference:
        raise UserError(
            f"config.loss.reference='adapter_off' has no meaning for variant "
            f"{config.loss.variant!r}, which has no reference: leave it out."
        )
    if config.loss.reference == "adapter_off" and config.model.lora is None:
        raise UserError(
            "config.loss.reference='adapter_off' needs config.model.lora: without adapters there "
            "is nothing to switch off."
        )
    if variant.whole_batch and config.step.micro_batch_tokens is not None:
        raise UserError(
            f"config.loss.variant={config.loss.variant!r} compares the rows of a batch with one "
            "another, so config.step.micro_batch_tokens must be left out."
        )


def objective_of(config: DPOConfig, model: LanguageModel) -> Objective:
    """The objective of a config for a model; the base of its adapters may be the reference."""

    def base(params: Any) -> Any:
        return lora.split(params)[1]

    return dpo.make_objective(
        model, config.loss, base if config.loss.reference == "adapter_off" else None
    )
