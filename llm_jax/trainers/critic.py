"""A critic that is a model of its own beside the policy, and where it comes from."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax

from llm_jax.config import resolved
from llm_jax.data.phases import plan
from llm_jax.errors import UserError
from llm_jax.models import ModelConfig
from llm_jax.models.config import check_length
from llm_jax.models.heads import CRITIC, REWARD, VALUE
from llm_jax.models.size import parameter_count
from llm_jax.stored import Stored, find
from llm_jax.trainers.foundation import Foundation, inherited_model
from llm_jax.trainers.origin import load_inherited
from llm_jax.weights import init_weights, without_heads


@dataclasses.dataclass(frozen=True)
class CriticConfig:
    """A critic of its own, which is trained whole even where the policy has adapters.

    init_from: a run or RUN@STEP of any architecture, or a Hugging Face folder, with the policy's
    tokenizer; None = what the policy starts from. The head of a reward model becomes the value
    head: with its weights the critic begins by expecting the reward (arXiv:2009.01325,
    arXiv:2203.02155). A value head stays one, and without either there is a new one of zeros. Of a
    run that has a critic of its own the policy is taken.
    """

    init_from: str | None = None


def add_critic(ground: Foundation, config: CriticConfig) -> tuple[Foundation, ModelConfig]:
    """The ground with the critic among what is trained, and the critic's architecture.

    Raises:
      UserError: the stage starts from no run, or the critic's cannot be read, reads other tokens
        than the policy, has too few positions, or another width by muP.
    """
    origin, asked = ground.require_origin(), ground.config.model  # type: ignore[attr-defined]
    if origin.is_own:
        stored, found = None, origin.stored.critic
        assert found is not None
    else:
        named = config.init_from
        stored = origin.stored if named is None else find(named, asked.scan_layers)
        found = stored.model
        if stored.tokenizer().fingerprint != ground.tokenizer.fingerprint:
            raise UserError(
                f"config.critic.init_from={named} has another tokenizer than the policy: name a "
                "run that comes from the same one."
            )
    model = dataclasses.replace(inherited_model(asked, found), lora=None)
    if model.width_multiplier != ground.model.width_multiplier:
        raise UserError(
            f"the critic is {model.width_multiplier:g} times as wide as its muP base, the policy "
            f"{ground.model.width_multiplier:g} times, and one learning rate is scaled for both: "
            "name a critic that is scaled alike, or leave config.critic out."
        )
    for phase in ground.config.phases:
        check_length(model, phase.length)
    source = "" if stored is None else f" from {stored.name}"
    ground.log(f"{parameter_count(model):,} parameters in a critic of its own{source}")
    init = functools.partial(init_weights, model, (VALUE,))

    def init_both(rng: jax.Array) -> Any:
        return {**ground.weights.init(rng), CRITIC: init(rng)}

    def load_both(abstract: Any) -> Any:
        assert stored is not None and ground.weights.load is not None
        policy = {name: tree for name, tree in abstract.items() if name != CRITIC}
        read = functools.partial(_read, stored, ground)
        critic = load_inherited(read, init, ground.config.seed, abstract[CRITIC])
        return {**ground.weights.load(policy), CRITIC: critic}

    load = None if stored is None else load_both
    weights = dataclasses.replace(ground.weights, init=init_both, load=load)
    meta = {**ground.more_meta, "critic": {"model": resolved(model)}}
    return dataclasses.replace(ground, weights=weights, more_meta=meta), model


def of_phases(config: Any, architecture: ModelConfig) -> list[ModelConfig]:
    """A critic's architecture in each phase of the config, as these change its RoPE."""
    phases = plan(config.phases, config.optimizer, architecture.rope, {})
    return [dataclasses.replace(architecture, rope=phase.rope) for phase in phases]


def _read(stored: Stored, ground: Foundation) -> Any:
    """Weights to start a critic from, with a value head if a head is there."""
    whole, _ = stored.read_merged(ground.mesh)
    heads = [whole[name] for name in (VALUE, REWARD) if name in whole]
    return {**without_heads(whole), **({VALUE: heads[0]} if heads else {})}
