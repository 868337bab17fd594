"""What every stage stands on: tokenizer, architecture, template and weights, inherited or new."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from llm_jax import sharding
from llm_jax.config import resolved
from llm_jax.data.example_store import texts_of
from llm_jax.data.examples import Message
from llm_jax.data.phases import Phase, plan
from llm_jax.data.store import TokenStore
from llm_jax.data.template_base import ChatTemplate
from llm_jax.data.templates import DEFAULT_TEMPLATE, make_template
from llm_jax.data.tokenizers import Tokenizer, make_tokenizer
from llm_jax.errors import UserError
from llm_jax.evals.subject import BATCH, Subject
from llm_jax.evals.task import Task
from llm_jax.evals.tasks import make_tasks
from llm_jax.generation.generate import generate_texts
from llm_jax.generation.sampler import SamplerConfig
from llm_jax.mesh import require_host_memory
from llm_jax.models import LanguageModel, ModelConfig
from llm_jax.models.config import RUNTIME_FIELDS, check_length
from llm_jax.models.context import check_context
from llm_jax.models.heads import REWARD
from llm_jax.models.pipeline import bubble_share, micro_batches_per_stage
from llm_jax.models.size import (
    active_parameter_count,
    adapter_count,
    flops_per_token,
    parameter_count,
)
from llm_jax.placement import to_devices
from llm_jax.step import micro_batches
from llm_jax.trainers.base import Evaluation, RunConfig, Setting, Source, Trainer
from llm_jax.trainers.origin import Origin, Weights, decide_weights

# The embedding table is padded to a multiple, so that a tensor axis divides it.
VOCABULARY_MULTIPLE = 64


@dataclasses.dataclass(frozen=True)
class Foundation:
    """A stage's ground: everything that does not depend on its data or its loss.

    more_meta: what the stage adds to the meta of its checkpoints.
    """

    config: RunConfig
    mesh: Mesh
    log: Callable[[str], None]
    origin: Origin | None
    tokenizer: Tokenizer
    model: ModelConfig
    template: ChatTemplate | None
    heads: tuple[str, ...]
    weights: Weights
    more_meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def lineage(self) -> tuple[dict[str, Any], ...]:
        return () if self.origin is None else self.origin.lineage

    def require_origin(self) -> Origin:
        """The origin, of a stage that has no use for a model that knows nothing.

        Raises:
          UserError: there is none.
        """
        if self.origin is None:
            raise UserError(
                f"config.trainer={self.config.trainer!r} improves a model that answers already: "
                "name its run by config.init_from."
            )
        return self.origin

    def phases(self, weights: Mapping[str, float], sequences: int = 1) -> tuple[Phase, ...]:
        """The phases of the config, checked against the model and the mesh, and described."""
        phases = plan(
            self.config.phases, self.config.optimizer, self.model.rope, weights, sequences
        )
        backend = LanguageModel(self.model).backend
        for phase in phases:
            check_length(self.model, phase.length)
            check_context(self.model, backend, self.mesh, phase.length)
            self.micro_batches(phase)
        batch, shards = self.config.evaluation.batch, sharding.batch_shards(self.mesh)
        if batch is not None and (batch < 1 or batch % shards):
            raise UserError(
                f"config.evaluation.batch={batch} must be a positive multiple of the mesh's "
                f"{shards} batch shards (stage x data x fsdp x expert)."
            )
        trained = f"{parameter_count(self.model):,} parameters"
        if self.model.moe is not None:
            trained += f" ({active_parameter_count(self.model):,} of them active)"
        if self.model.lora is not None:
            trained = f"{adapter_count(self.model):,} parameters in adapters of {trained}"
        self.log(
            f"{trained}, {flops_per_token(self.model, phases[0].length):,.0f} FLOPs a token at "
            f"length {phases[0].length}, attention by {backend}"
        )
        self._log_pipeline()
        return phases

    def _log_pipeline(self) -> None:
        stages, repeats = self.mesh.shape["stage"], self.model.pipeline.repeats
        if stages == 1:
            return
        parts = stages * micro_batches_per_stage(self.model, self.mesh)
        groups = "" if repeats == 1 else f" with {repeats} groups of layers each"
        bubble = bubble_share(stages, parts, repeats)
        self.log(f"pipeline of {stages} stages{groups}, {parts} micro-batches, {bubble:.0%} bubble")

    def micro_batches(self, phase: Phase) -> int:
        length = phase.length * phase.sequences
        pieces = micro_batches_per_stage(self.model, self.mesh)
        return micro_batches(self.config.step, phase.batch, length, self.mesh, pieces)

    def meta(self, model: ModelConfig, phase: Phase) -> dict[str, Any]:
        """What the checkpoints of a phase say of themselves."""
        meta: dict[str, Any] = {
            "stage": self.config.trainer,
            "model": resolved(model),
            "length": phase.length,
            "lineage": list(self.lineage),
            "heads": list(self.heads),
        }
        meta |= self.more_meta
        if self.origin is not None and "published" in self.origin.meta:
            meta["published"] = self.origin.meta["published"]
        if self.template is not None:
            meta["template"] = self.template.describe()
        if self.weights.base is not None:
            meta["base"] = resolved(self.weights.base)
        return meta

    def check_sample(self, prompt_tokens: int) -> None:
        """Refuses a sample past the model's positions, which would end the run at a checkpoint."""
        whole, limit = prompt_tokens + self.config.sample.max_new_tokens, self.model.max_length
        if whole > limit:
            raise UserError(
                f"config.sample: prompt and max_new_tokens are {whole} tokens together, and "
                f"model.max_length is {limit}: lower config.sample.max_new_tokens."
            )

    def jit(self, function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        """Jits an evaluation's `(params, batch)`; host batches are split over the mesh."""
        rows = sharding.batch_sharding(self.mesh)
        jitted = jax.jit(function, out_shardings=rows)
        return lambda params, batch: jitted(params, to_devices(batch, rows))

    def subject(
        self,
        model: LanguageModel,
        length: int,
        held_out: Callable[[], Mapping[str, TokenStore]] | None = None,
    ) -> Subject:
        """The model of a phase as tasks see it.

        Args:
          length: of the phase.
          held_out: gives the documents that are not trained on, of a stage that has texts.
        """
        return Subject(
            name="the model",
            model=model,
            tokenizer=self.tokenizer,
            template=self.template,
            mesh=self.mesh,
            length=length,
            log=self.log,
            held_out=held_out,
            batch=self.config.evaluation.batch or BATCH,
        )

    def tasks(self, subject: Subject) -> tuple[Evaluation, ...]:
        """The tasks of `config.evaluation.tasks`.

        Raises:
          UserError: see `make_tasks`; a reward model, of which they ask what it cannot do.
        """
        terms = self.config.evaluation.tasks
        if terms and REWARD in self.heads:
            raise UserError("config.evaluation.tasks measure what a reward model does not do.")
        return tuple(
            Evaluation(task.term.known_as, functools.partial(_metrics_of, task))
            for task in make_tasks(terms, subject)
        )

    def trainer(
        self,
        phases: Sequence[Phase],
        source: Source,
        settings: Sequence[Setting],
        data_fingerprint: str,
    ) -> Trainer:
        """The stage, wired; `settings` has one for each phase.

        Raises:
          UserError: two evaluations of one name.
        """
        for setting in settings:
            names = [evaluation.name for evaluation in setting.evaluations]
            for name in names:
                if names.count(name) > 1:
                    raise UserError(
                        f"config.evaluation.tasks: there is an evaluation {name!r} already: give "
                        "the task another label."
                    )
        return Trainer(
            phases=tuple(phases),
            init_params=self.weights.init,
            load_params=self.weights.load,
            frozen=self.weights.frozen,
            source=source,
            setting=lambda phase: settings[phase.index],
            tokenizer=self.tokenizer,
            data_fingerprint=data_fingerprint,
            heads=self.heads,
            width_multiplier=self.model.width_multiplier,
            lineage=self.lineage,
        )


def _metrics_of(task: Task, params: Any) -> dict[str, float]:
    return task.run(params).metrics


def chat_sample(ground: Foundation) -> Callable[[LanguageModel, Any], str] | None:
    """`(model, params) → text`: question and answer, as `config.sample` says; None for none."""
    settings = ground.config.sample
    if not settings.max_new_tokens:
        return None
    assert ground.template is not None
    question = (Message("user", settings.prompt),)
    prompt = ground.template.render_prompt(question, (), ground.tokenizer)
    stop_ids = ground.template.stop_ids(ground.tokenizer)
    ground.check_sample(len(prompt))

    def sample(model: LanguageModel, params: Any) -> str:
        (answer,) = generate_texts(
            model,
            params,
            ground.tokenizer,
            [prompt],
            max_new_tokens=settings.max_new_tokens,
            sampler=SamplerConfig(temperature=settings.temperature, top_p=settings.top_p),
            rng=jax.random.key(ground.config.seed),
            stop_ids=stop_ids,
        )
        return f"{settings.prompt}\n{answer}"

    return sample


def lay(
    config: Any,
    mesh: Mesh,
    workdir: Path,
    log: Callable[[str], None],
    new_tokenizer: Callable[[], Tokenizer],
    *,
    template: str | None = None,
    chats: bool = False,
    heads: tuple[str, ...] = (),
) -> Foundation:
    """Finds what the stage inherits and makes what it does not.

    Args:
      config: a RunConfig with the section `model`.
      new_tokenizer: called where no tokenizer is inherited.
      template: the chat template that the config names; None = the inherited one or the default.
      chats: whether the stage has a template at all.
      heads: heads that the stage adds to the model; one that its origin has is kept.

    Raises:
      UserError: an origin that cannot be read, or that does not fit.
    """
    origin = Origin.find(config, workdir, heads)
    tokenizer = new_tokenizer() if origin is None else origin.stored.tokenizer()
    model = _model(config.model, origin, tokenizer, log)
    _check_memory(config, model, mesh)
    micro_batches_per_stage(model, mesh)  # what does not fit is refused before weights are read
    return Foundation(
        config=config,
        mesh=mesh,
        log=log,
        origin=origin,
        tokenizer=tokenizer,
        model=model,
        template=_template(template, origin) if chats else None,
        heads=heads,
        weights=decide_weights(config, mesh, origin, model, heads),
    )


def lay_for_chats(
    config: Any,
    mesh: Mesh,
    workdir: Path,
    log: Callable[[str], None],
    heads: tuple[str, ...] = (),
) -> Foundation:
    """`lay` for a stage that learns from examples: with a chat template and, where none is
    inherited, a tokenizer trained on the examples' texts.

    Raises:
      UserError: see `lay`.
    """
    return lay(
        config,
        mesh,
        workdir,
        log,
        lambda: make_tokenizer(config.tokenizer, lambda: texts_of(config.data)),
        template=config.data.template,
        chats=True,
        heads=heads,
    )


def inherited_model(asked: ModelConfig, found: ModelConfig) -> ModelConfig:
    """The architecture `found`, with what a stage takes from its own config in any case."""
    own = {name: getattr(asked, name) for name in RUNTIME_FIELDS}
    # And max_length and the capacity of experts, where they are given.
    if asked.max_length != ModelConfig().max_length:
        own["max_length"] = asked.max_length
    if found.moe is not None and asked.moe is not None:
        own["moe"] = dataclasses.replace(found.moe, capacity_factor=asked.moe.capacity_factor)
    return dataclasses.replace(found, **own)


def _model(
    asked: ModelConfig, origin: Origin | None, tokenizer: Tokenizer, log: Callable[[str], None]
) -> ModelConfig:
    """The architecture: inherited where there is an origin, else as the config says."""
    if origin is not None:
        model = inherited_model(asked, origin.stored.model)
        if not origin.is_own:
            default, wanted, taken = (resolved(m) for m in (ModelConfig(), asked, model))
            ignored = [key for key in taken if wanted[key] not in (taken[key], default[key], None)]
            note = f"; config.model gives way in {', '.join(ignored)}" if ignored else ""
            log(f"parameters, architecture and tokenizer come from {origin.stored.name}{note}")
        return model
    if asked.vocab_size is None:
        return _with_vocabulary(asked, tokenizer.vocab_size)
    if asked.vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and config.model.vocab_size is "
            f"{asked.vocab_size}: raise it, or leave it out to take the tokenizer's."
        )
    return asked


def asked_model(config: Any) -> ModelConfig:
    """The model of a stage that inherits none, with the vocabulary that the tokenizer is asked for.
    Making the tokenizer takes a corpus; for shapes this is as good."""
    if config.model.vocab_size is not None:
        return config.model
    return _with_vocabulary(config.model, config.tokenizer.vocab_size)


def _with_vocabulary(model: ModelConfig, tokens: int) -> ModelConfig:
    padded = -(-tokens // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    return dataclasses.replace(model, vocab_size=padded)


def _check_memory(config: Any, model: ModelConfig, mesh: Mesh) -> None:
    if config.optimizer.offload:
        require_host_memory(mesh, "config.optimizer.offload")
    if model.remat == "offload":
        require_host_memory(mesh, "config.model.remat='offload'")
    if config.step.parameter_dtype != "float32" and model.dtype != config.step.parameter_dtype:
        raise UserError(
            f"config.step.parameter_dtype={config.step.parameter_dtype!r} rounds what products of "
            f"model.dtype={model.dtype!r} read exactly: set config.model.dtype to it, too."
        )


def _template(asked: str | None, origin: Origin | None) -> ChatTemplate:
    inherited = None if origin is None else origin.stored.template
    if inherited is not None and (asked is None or (origin is not None and origin.is_own)):
        return inherited
    return make_template(asked or DEFAULT_TEMPLATE)
