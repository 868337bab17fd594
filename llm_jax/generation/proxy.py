"""Several models as one: at each step of decoding a weighted sum of their logits.

Proxy tuning (arXiv:2401.08565) steers a large model by what training has changed in a small one,
base + strength * (expert - anti_expert), where no weight of the large one is touched; so does
DExperts (arXiv:2105.03023). A single model of negative weight is contrastive decoding
(arXiv:2210.15097) without its filter, which is the sampler's min_p here.

Legend: B batch, T time, D embed, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import numpy as np

from llm_jax.models import LanguageModel
from llm_jax.types import Array


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """A model with its parameters."""

    model: LanguageModel
    params: Any


@flax.struct.dataclass
class WeightedParams:
    """parts: the parameters of each model. weights: float32 [models], traced, so that another
    strength compiles nothing anew."""

    parts: tuple[Any, ...]
    weights: Array


@dataclasses.dataclass(frozen=True)
class WeightedModels:
    """Stands where a `LanguageModel` stands in decoding; its parameters are `WeightedParams`.

    Each model reads the tokens by itself, with its own cache: their architectures may differ, what
    a token means may not. Where some embeddings are padded to a rounder size than others, the
    smallest vocabulary holds all tokens.
    """

    models: tuple[LanguageModel, ...]

    @property
    def vocab_size(self) -> int:
        return min(model.vocab_size for model in self.models)

    @property
    def max_length(self) -> int:
        return min(model.max_length for model in self.models)

    def init_cache(self, batch: int, length: int) -> tuple[Any, ...]:
        return tuple(model.init_cache(batch, length) for model in self.models)

    def apply(
        self,
        params: WeightedParams,
        tokens: jax.Array,
        *,
        segment_ids: jax.Array,
        cache: tuple[Any, ...],
    ) -> tuple[tuple[jax.Array, ...], tuple[Any, ...]]:
        """Hidden states [batch, time, embed] and the grown cache of each model."""
        applied = [
            model.apply(part, tokens, segment_ids=segment_ids, cache=own)
            for model, part, own in zip(self.models, params.parts, cache, strict=True)
        ]
        hidden, caches = zip(*applied, strict=True)
        return hidden, caches

    def logits(self, params: WeightedParams, hidden: tuple[jax.Array, ...]) -> jax.Array:
        """The weighted sum, float32 [batch, time, vocab]."""
        weighted_BTV = [
            weight * model.logits(part, hidden_BTD)[..., : self.vocab_size]
            for model, part, weight, hidden_BTD in zip(
                self.models, params.parts, params.weights, hidden, strict=True
            )
        ]
        return sum(weighted_BTV[1:], start=weighted_BTV[0])


def weighted(terms: Sequence[tuple[float, Part]]) -> tuple[WeightedModels, WeightedParams]:
    """The model whose logits are sum_i weight_i * logits_i, and its parameters.

    A part that occurs several times is run once, with the sum of its weights.

    Args:
      terms: at least one; all of one tokenizer.
    """
    weight_of: dict[Part, float] = {}
    for weight, part in terms:
        weight_of[part] = weight_of.get(part, 0.0) + weight
    model = WeightedModels(tuple(part.model for part in weight_of))
    weights = np.fromiter(weight_of.values(), np.float32)
    return model, WeightedParams(tuple(part.params for part in weight_of), weights)


def proxy_tuned(
    base: Part, expert: Part | None, anti_expert: Part | None, strength: float = 1.0
) -> tuple[WeightedModels, WeightedParams]:
    """base + strength * (expert - anti_expert), in logits; None stands for logits of 0."""
    terms = [(1.0, base)]
    if expert is not None:
        terms.append((strength, expert))
    if anti_expert is not None:
        terms.append((-strength, anti_expert))
    return weighted(terms)
