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
from llm_jax.models.heads import CRITIC, REWARD, VALUE
from llm_jax.objectives import dpo as preference_losses
from llm_jax.objectives import lm, reward
from llm_jax.scaling.divisibility import check_mesh
from llm_jax.step import Objective
from llm_jax.stored import at, find
from llm_jax.trainers import dpo, grpo, ppo
from llm_jax.trainers.critic import of_phases
from llm_jax.trainers.foundation import asked_model, inherited_model
from llm_jax.types import Batch, PreferenceBatch, RolloutBatch

LANGUAGE = ("pretrain", "sft")
PREFERENCE = ("reward", "dpo")
ON_POLICY = ("ppo", "grpo")
PAIR = 2  # answers to a prompt; of ranked ones the data decide, which are not read here


@dataclasses.dataclass(frozen=True)
class Shapes:
    """The parts of a training step of one phase.

    trained, frozen: shapes of the weights in boxes; nothing frozen is None. batch: shapes with
    shardings. reads: the models that are trained, and how many sequences each reads of every row of
    the batch. whole_batch: whether the rows are compared with each other, so that the batch is not
    cut into micro-batches.
    """

    model: LanguageModel
    objective: Objective
    trained: Any
    frozen: Any
    batch: Batch | PreferenceBatch | RolloutBatch
    reads: tuple[tuple[ModelConfig, int], ...]
    whole_batch: bool


def phases_of(config: Any) -> tuple[Phase, ...]:
    """The phases of a config, whose mixture does not matter here.

    Raises:
      UserError: the step of this stage is not known here; see `model_of`.
    """
    known = (*LANGUAGE, *PREFERENCE, *ON_POLICY)
    if config.trainer not in known:
        raise UserError(
            f"the step of stage {config.trainer!r} is not compiled ahead of time; those of "
            f"{', '.join(known)} are."
        )
    sequences = PAIR if config.trainer in PREFERENCE else 1 + _text_rows(config)
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
    critic = _critic(config)
    heads: tuple[str, ...] = ()
    if config.trainer == "reward":
        heads = (REWARD,)
    elif config.trainer == "ppo" and critic is None:
        heads = (VALUE,)
    trained, frozen = weights.trained_and_frozen_shapes(model, heads, config.quantize_base)
    if critic is not None:
        trained = {**trained, CRITIC: weights.shapes(critic, (VALUE,))}
    return trained, frozen


def reference_of(config: Any, model: ModelConfig) -> Any:
    """Shapes in boxes of the weights that lie beside those of the step, since rounds of samples are
    compared with them; None for none, or where they are the policy's frozen base."""
    compared = config.trainer in ON_POLICY and config.has_reference
    return weights.shapes(model) if compared and model.lora is None else None


def of_phase(config: Any, phase: Phase, mesh: Mesh) -> Shapes:
    """The parts of the step of one of `phases_of(config)`.

    Raises:
      UserError: a mesh that does not divide the model or the batch.
    """
    model_config = dataclasses.replace(model_of(config), rope=phase.rope)
    check_length(model_config, phase.length)
    check_mesh(model_config, resolve(config.mesh, mesh.size), phase.length, phase.batch)
    platform = mesh.devices.flat[0].platform
    model, critic = LanguageModel(model_config, platform), None
    check_context(model_config, model.backend, mesh, phase.length)
    trained, frozen = weights_of(config, model_config)
    architecture = _critic(config)
    if architecture is not None:
        critic = LanguageModel(of_phases(config, architecture)[phase.index], platform)
    return Shapes(
        model=model,
        objective=_objective(config, model, critic),
        trained=trained,
        frozen=frozen,
        batch=_batch(config, phase, mesh),
        reads=((model_config, phase.sequences), *(() if critic is None else ((critic.config, 1),))),
        whole_batch=config.trainer == "dpo" and _variant(config).whole_batch,
    )


def _variant(config: Any) -> preference_losses.Variant:
    return preference_losses.VARIANTS[config.loss.variant]


def _critic(config: Any) -> ModelConfig | None:
    """The architecture of a critic beside the policy."""
    if config.trainer != "ppo" or config.critic is None:
        return None
    named = config.critic.init_from
    if named is None:
        return dataclasses.replace(model_of(config), lora=None)
    found = find(named, config.model.scan_layers).model
    return dataclasses.replace(inherited_model(config.model, found), lora=None)


def _text_rows(config: Any) -> int:
    return config.text_rows if config.trainer == "ppo" else 0


def _objective(config: Any, model: LanguageModel, critic: LanguageModel | None) -> Objective:
    if config.trainer == "dpo":
        return dpo.objective_of(config, model)
    if config.trainer == "grpo":
        return grpo.objective_of(config, model)
    if config.trainer == "ppo":
        return ppo.objective_of(config, model, critic)
    make = reward.make_objective if config.trainer == "reward" else lm.make_objective
    return make(model, config.loss)


def _batch(config: Any, phase: Phase, mesh: Mesh) -> Batch | PreferenceBatch | RolloutBatch:
    sharded = sharding.batch_sharding(mesh)

    def of(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharded)

    def sequences(*shape: int) -> Batch:
        tokens, loss_weights = of(jnp.int32, *shape), of(jnp.float32, *shape)
        return Batch(tokens, tokens, loss_weights, tokens, tokens)

    rows, length = phase.batch, phase.length
    if config.trainer in LANGUAGE:
        return sequences(rows, length)
    if config.trainer in ON_POLICY:
        numbers, text = of(jnp.float32, rows, length), _text_rows(config)
        criticised = numbers if config.trainer == "ppo" else None
        return RolloutBatch(
            sequences=sequences(rows, length),
            old_logprobs=numbers,
            advantages=numbers,
            reference_logprobs=numbers if config.has_reference else None,
            values=criticised,
            returns=criticised,
            pretraining=sequences(rows * text, length) if text else None,
        )
    answers = of(jnp.float32, rows, phase.sequences)
    precomputed = (
        config.trainer == "dpo"
        and _variant(config).needs_reference
        and config.loss.reference == "precomputed"
    )
    return PreferenceBatch(
        responses=sequences(rows, phase.sequences, length),
        scores=answers,
        margins=of(jnp.float32, rows),
        reference_logprobs=answers if precomputed else None,
    )
