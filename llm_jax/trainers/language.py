"""What pre-training and fine-tuning share: a language model, packed rows, and their evaluations."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from llm_jax.data.offline import OfflineSource
from llm_jax.data.packing import DocumentRows, Rows
from llm_jax.data.phases import Phase
from llm_jax.data.store import TokenStore
from llm_jax.evals.perplexity import evaluate_perplexity
from llm_jax.generation.generate import document_prompt, sample_text
from llm_jax.generation.sampler import SamplerConfig
from llm_jax.models import LanguageModel
from llm_jax.models.size import flops_per_token
from llm_jax.objectives import lm
from llm_jax.step import Objective
from llm_jax.trainers.base import Evaluation, Setting, Trainer
from llm_jax.trainers.foundation import Foundation


class Texts(Protocol):
    """The token stores of a stage: `corpus.Corpus` or `chat_corpus.ChatCorpus`."""

    main: str
    stores: dict[str, dict[str, TokenStore]]

    @property
    def weights(self) -> dict[str, float]: ...

    @property
    def fingerprint(self) -> str: ...

    def rows(self, length: int, weights: Mapping[str, float]) -> Mapping[str, Rows]: ...

    def validation_rows(self, length: int) -> Mapping[str, DocumentRows]: ...

    def facts(self, length: int) -> tuple[str, ...]: ...


# (phase, model) → evaluations beside the perplexity on what is held out.
MoreEvaluations = Callable[[Phase, LanguageModel], tuple[Evaluation, ...]]


def build(
    foundation: Foundation,
    texts: Texts,
    make_objective: Callable[[LanguageModel], Objective],
    more_evaluations: MoreEvaluations,
    sample: Callable[[LanguageModel, Any], str] | None,
) -> Trainer:
    """Wires a stage that trains on packed rows of tokens.

    Args:
      sample: `(model, params) → text`, for every checkpoint; None = no sample.
    """
    config = foundation.config
    phases = foundation.phases(texts.weights)

    def held_out() -> dict[str, TokenStore]:
        return {name: splits["validation"] for name, splits in texts.stores.items()}

    def setting(phase: Phase) -> Setting:
        model_config = dataclasses.replace(foundation.model, rope=phase.rope)
        model = LanguageModel(model_config)
        return Setting(
            objective=make_objective(model),
            evaluations=(
                *_perplexities(foundation, texts, phases[0], phase, model),
                *more_evaluations(phase, model),
                *foundation.tasks(foundation.subject(model, phase.length, held_out)),
            ),
            sample=None if sample is None else functools.partial(sample, model),
            meta=foundation.meta(model_config, phase),
            flops_per_token=flops_per_token(model_config, phase.length),
            micro_batches=foundation.micro_batches(phase),
            facts=(*_facts(phase), *texts.facts(phase.length)),
        )

    # All of them now: what does not fit the last phase should not come to light after the first.
    settings = [setting(phase) for phase in phases]
    source = OfflineSource(
        phases,
        lambda phase: texts.rows(phase.length, phase.weights),
        config.seed,
        foundation.mesh,
    )
    return foundation.trainer(phases, source, settings, texts.fingerprint)


def sample_of_prompt(foundation: Foundation, prompt: str) -> Any:
    """`(model, params) → text`, as `config.sample` says; None where it asks for none."""
    settings = foundation.config.sample
    if not settings.max_new_tokens:
        return None
    foundation.check_sample(len(document_prompt(foundation.tokenizer, prompt)))

    def sample(model: LanguageModel, params: Any) -> str:
        return sample_text(
            model,
            params,
            foundation.tokenizer,
            prompt,
            max_new_tokens=settings.max_new_tokens,
            sampler=SamplerConfig(temperature=settings.temperature, top_p=settings.top_p),
            seed=foundation.config.seed,
        )

    return sample


def _facts(phase: Phase) -> tuple[str, ...]:
    rope = phase.rope
    scaling = "" if rope.scaling == "none" else f", {rope.scaling} scaling by {rope.factor:g}"
    facts = [f"RoPE base {rope.theta:g}{scaling}"]
    if len(phase.weights) > 1:
        facts.append("mixture " + ", ".join(f"{k} {v:g}" for k, v in phase.weights.items()))
    return tuple(facts)


def _perplexities(
    foundation: Foundation, texts: Texts, first: Phase, phase: Phase, model: LanguageModel
) -> tuple[Evaluation, ...]:
    """On the held-out rows of each component and, for a gate, at the first phase's length."""
    config: Any = foundation.config
    settings = config.evaluation
    nats = foundation.jit(functools.partial(lm.token_nats, model, chunk=config.loss.chunk))
    token_bytes = foundation.tokenizer.token_bytes()

    def perplexity(rows: DocumentRows, batch: int) -> Callable[[Any], dict[str, float]]:
        return lambda params: evaluate_perplexity(
            nats, params, rows, token_bytes, settings.batch or batch, settings.rows
        )

    evaluations = []
    for name, rows in texts.validation_rows(phase.length).items():
        label = "validation" if name == texts.main else f"validation_{name}"
        evaluations.append(Evaluation(label, perplexity(rows, phase.batch)))
    if phase.gate is not None:
        rows = texts.validation_rows(first.length)[texts.main]
        evaluations.append(Evaluation("short", perplexity(rows, first.batch)))
    return tuple(evaluations)
