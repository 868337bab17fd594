"""What the training step of a stage is made of, from shapes alone.

Neither data nor weights are read; of a run or a published folder that a config starts from, the
architecture is.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llm_jax import checkpoint, sharding, weights
from llm_jax.data.phases import Phase, plan
from llm_jax.errors import UserError
from llm_jax.interop.folder import open_folder
from llm_jax.mesh import resolve
from llm_jax.models import LanguageModel, ModelConfig
from llm_jax.models.config import check_length
from llm_jax.models.context import check_context
from llm_jax.models.heads import REWARD
from llm_jax.objectives import dpo as preference_losses
from llm_jax.objectives import lm, reward
from llm_jax.scaling.divisibility import check_mesh
from llm_jax.step import Objective
from llm_jax.stored import at
from llm_jax.trainers import dpo
from llm_jax.trainers.foundation import asked_model, inherited_model
from llm_jax.types import Batch, PreferenceBatch

LANGUAGE = ("pretrain", "sft")
PREFERENCE = ("reward", "dpo")
PAIR = 2  # answers to a prompt; of ranked ones the data decide, which are not read here


@dataclasses.dataclass(frozen=True)
class Shapes:
    """The parts of a training step of one phase.

    trained, frozen: shapes of the weights in boxes; nothing frozen is None. batch: shapes with
    shardings. whole_batch: whether its rows are compared with each other, so that it is not cut
    into micro-batches.
    """

    model: LanguageModel
    objective: Objective
    trained: Any
    frozen: Any
    batch: Batch | PreferenceBatch
    whole_batch: bool


def phases_of(config: Any) -> tuple[Phase, ...]:
    """The phases of a config, whose mixture does not matter here.

    Raises:
      UserError: the step of this stage is not known here; see `model_of`.
    """
    known = (*LANGUAGE, *PREFERENCE)
    if config.trainer not in known:
        raise UserError(
            f"the step of stage {config.trainer!r} is not compiled ahead of time; those of "
            f"{', '.join(known)} are."
        )
    sequences = PAIR if config.trainer in PREFERENCE else 1
    return plan(config.phases, config.optimizer, model_of(config).rope, {}, sequences)


def model_of(config: Any) -> ModelConfig:
    """The architecture: of what the config starts from, else the config's own.

    Raises:
      UserError: the run or folder that it starts from is not there.
    """
    if config.init_from_hf is not None:
        start = open_folder(config.init_from_hf, config.model.scan_layers).model
    elif config.init_from is not None:
        start = at(*checkpoint.locate(config.init_from)).model
    else:
        return asked_model(config)
    return inherited_model(config.model, start)


def weights_of(config: Any, model: ModelConfig) -> tuple[Any, Any]:
    """(trained, frozen) shapes of the weights in boxes; nothing frozen is None."""
    heads = (REWARD,) if config.trainer == "reward" else ()
    return weights.trained_and_frozen_shapes(model, heads, config.quantize_base)


def of_phase(config: Any, phase: Phase, mesh: Mesh) -> Shapes:
    """The parts of the step of one of `phases_of(config)`.

    Raises:
      UserError: a mesh that does not divide the model or the batch.
    """
    model_config = dataclasses.replace(model_of(config), rope=phase.rope)
    check_length(model_config, phase.length)
    check_mesh(model_config, resolve(config.mesh, mesh.size), phase.length, phase.batch)
    model = LanguageModel(model_config, mesh.devices.flat[0].platform)
    check_context(model_config, model.backend, mesh, phase.length)
    trained, frozen = weights_of(config, model_config)
    return Shapes(
        model=model,
        objective=_objective(config, model),
        trained=trained,
        frozen=frozen,
        batch=_batch(config, phase, mesh),
        whole_batch=config.trainer == "dpo" and _variant(config).whole_batch,
    )


def _variant(config: Any) -> preference_losses.Variant:
    return preference_losses.VARIANTS[config.loss.variant]


def _objective(config: Any, model: LanguageModel) -> Objective:
    if config.trainer == "dpo":
        return dpo.objective_of(config, model)
    make = reward.make_objective if config.trainer == "reward" else lm.make_objective
    return make(model, config.loss)


def _batch(config: Any, phase: Phase, mesh: Mesh) -> Batch | PreferenceBatch:
    rows = sharding.batch_sharding(mesh)

    def of(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((phase.batch, *shape), dtype, sharding=rows)

    shape = (phase.length,) if phase.sequences == 1 else (phase.sequences, phase.length)
    tokens, loss_weights = of(jnp.int32, *shape), of(jnp.float32, *shape)
    batch = Batch(tokens, tokens, loss_weights, tokens, tokens)
    if config.trainer in LANGUAGE:
        return batch
    of_answers = of(jnp.float32, phase.sequences)
    precomputed = (
        config.trainer == "dpo"
        and _variant(config).needs_reference
        and config.loss.reference == "precomputed"
    )
    return PreferenceBatch(
        responses=batch,
        scores=of_answers,
        margins=of(jnp.float32),
        reference_logprobs=of_answers if precomputed else None,
    )
