"""Pre-training: next-token prediction on packed documents, through phases of growing context."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from llm_jax import checkpoint, sharding
from llm_jax.config import build as build_dataclass
from llm_jax.config import resolved
from llm_jax.data.corpus import MAIN, Corpus, DataConfig, training_texts
from llm_jax.data.needle import NeedleConfig, needle_examples
from llm_jax.data.offline import OfflineSource
from llm_jax.data.phases import Phase, plan
from llm_jax.data.tokenizers import Tokenizer, TokenizerConfig, load_tokenizer, make_tokenizer
from llm_jax.errors import UserError
from llm_jax.evals.needle import answer_tokens, evaluate_needle
from llm_jax.evals.perplexity import evaluate_perplexity
from llm_jax.generation.generate import sample_text
from llm_jax.generation.sampler import SamplerConfig
from llm_jax.models import LanguageModel, ModelConfig
from llm_jax.models.config import check_length
from llm_jax.models.size import flops_per_token, parameter_count
from llm_jax.objectives import lm
from llm_jax.step import Objective, micro_batches
from llm_jax.trainers.base import Evaluation, RunConfig, Setting, Trainer

# The embedding table is padded to a multiple, so that a tensor axis divides it.
VOCABULARY_MULTIPLE = 64

# What a stage takes from its own config although the parameters come from a stage before it:
# nothing here changes which parameters there are or what they mean.
RUNTIME_FIELDS = (
    "dtype",
    "remat",
    "attention_backend",
    "residual_dropout",
    "attention_dropout",
    "max_length",
)


@dataclasses.dataclass(frozen=True)
class PretrainConfig(RunConfig):
    """The config of `trainer = "pretrain"`."""

    model: ModelConfig = ModelConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig = DataConfig()
    loss: lm.LossConfig = lm.LossConfig()


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
    origin = _Origin.find(config, workdir)
    tokenizer = origin.tokenizer or make_tokenizer(
        config.tokenizer, lambda: training_texts(config.data)
    )
    model_config = _model_config(config.model, origin, tokenizer, log)
    corpus = Corpus(config.data, tokenizer, config.seed)
    log(corpus.describe())
    phases = plan(config.phases, config.optimizer, model_config.rope, corpus.weights)
    for phase in phases:
        check_length(model_config, phase.length)
        micro_batches(config.step, phase.batch, phase.length, mesh)
    if make_objective is None:
        make_objective = functools.partial(lm.make_objective, config=config.loss)
    wiring = _Wiring(
        config, mesh, model_config, make_objective, tokenizer, corpus, phases, origin.lineage
    )
    # All of them now: what does not fit the last phase should not come to light after the first.
    settings = [wiring.setting(phase) for phase in phases]
    log(
        f"{parameter_count(model_config):,} parameters, "
        f"{flops_per_token(model_config, phases[0].length):,.0f} FLOPs a token at length "
        f"{phases[0].length}, attention by {LanguageModel(model_config).backend}"
    )
    return Trainer(
        phases=phases,
        init_params=LanguageModel(model_config).init,
        load_params=origin.load_params,
        source=OfflineSource(
            phases, lambda phase: corpus.rows(phase.length, phase.weights), config.seed, mesh
        ),
        setting=lambda phase: settings[phase.index],
        tokenizer=tokenizer,
        data_fingerprint=corpus.fingerprint,
    )


@dataclasses.dataclass(frozen=True)
class _Origin:
    """What is inherited from the run's own past or from the stage before it."""

    name: str | None = None
    model: ModelConfig | None = None
    tokenizer: Tokenizer | None = None
    load_params: Callable[[Any], Any] | None = None
    lineage: tuple[dict[str, Any], ...] = ()

    @staticmethod
    def find(config: PretrainConfig, workdir: Path) -> _Origin:
        own = checkpoint.newest_meta(workdir)
        is_own = own is not None
        if own is not None:
            run, (step, meta) = workdir, own
        elif config.init_from is not None:
            run, step = checkpoint.locate(config.init_from)
            meta = checkpoint.read_meta(run, step)
        else:
            return _Origin()
        lineage = tuple(meta["lineage"])
        if not is_own:
            lineage += ({"stage": meta["stage"], "run": str(run), "step": step},)
        return _Origin(
            name=f"{run}@{step}",
            model=build_dataclass(ModelConfig, meta["model"], "meta.model"),
            tokenizer=load_tokenizer(run / "tokenizer"),
            load_params=None if is_own else functools.partial(checkpoint.read_params, run, step),
            lineage=lineage,
        )


def _model_config(
    asked: ModelConfig, origin: _Origin, tokenizer: Tokenizer, log: Callable[[str], None]
) -> ModelConfig:
    """The architecture: inherited where there is an origin, else as the config says."""
    if origin.model is not None:
        model = dataclasses.replace(
            origin.model, **{name: getattr(asked, name) for name in RUNTIME_FIELDS}
        )
        if origin.load_params is not None:
            before, now = resolved(asked), resolved(model)
            ignored = [key for key in now if now[key] != before[key] and before[key] is not None]
            note = f"; config.model gives way in {', '.join(ignored)}" if ignored else ""
            log(f"parameters, architecture and tokenizer come from {origin.name}{note}")
        return model
    if asked.vocab_size is None:
        padded = -(-tokenizer.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
        return dataclasses.replace(asked, vocab_size=padded)
    if asked.vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and config.model.vocab_size is "
            f"{asked.vocab_size}: raise it, or leave it out to take the tokenizer's."
        )
    return asked


@dataclasses.dataclass(frozen=True)
class _Wiring:
    """Makes the setting of each phase."""

    config: PretrainConfig
    mesh: Mesh
    model_config: ModelConfig
    make_objective: Callable[[LanguageModel], Objective]
    tokenizer: Tokenizer
    corpus: Corpus
    phases: tuple[Phase, ...]
    lineage: tuple[dict[str, Any], ...]

    def setting(self, phase: Phase) -> Setting:
        model_config = dataclasses.replace(self.model_config, rope=phase.rope)
        model = LanguageModel(model_config)
        sample = self.config.sample
        return Setting(
            objective=self.make_objective(model),
            evaluations=self._evaluations(phase, model),
            sample=functools.partial(self._sample, model) if sample.max_new_tokens else None,
            meta={
                "stage": self.config.trainer,
                "model": resolved(model_config),
                "length": phase.length,
                "lineage": list(self.lineage),
            },
            flops_per_token=flops_per_token(model_config, phase.length),
            facts=self._facts(phase),
        )

    def _facts(self, phase: Phase) -> tuple[str, ...]:
        rope = phase.rope
        scaling = "" if rope.scaling == "none" else f", {rope.scaling} scaling by {rope.factor:g}"
        facts = [f"RoPE base {rope.theta:g}{scaling}"]
        if len(phase.weights) > 1:
            facts.append("mixture " + ", ".join(f"{k} {v:g}" for k, v in phase.weights.items()))
        return tuple(facts)

    def _evaluations(self, phase: Phase, model: LanguageModel) -> tuple[Evaluation, ...]:
        nats = self._jit(functools.partial(lm.token_nats, model, chunk=self.config.loss.chunk))
        token_bytes = self.tokenizer.token_bytes()
        settings = self.config.evaluation

        def perplexity(rows: Any, batch: int) -> Callable[[Any], dict[str, float]]:
            return lambda params: evaluate_perplexity(
                nats, params, rows, token_bytes, settings.batch or batch, settings.rows
            )

        evaluations = []
        for name, rows in self.corpus.validation_rows(phase.length).items():
            label = "validation" if name == MAIN else f"validation_{name}"
            evaluations.append(Evaluation(label, perplexity(rows, phase.batch)))
        if phase.gate is not None:
            first = self.phases[0]
            rows = self.corpus.validation_rows(first.length)[MAIN]
            evaluations.append(Evaluation("short", perplexity(rows, first.batch)))
        if settings.needle or (phase.gate is not None and phase.gate.needle_accuracy is not None):
            evaluations.append(Evaluation("needle", self._needle(phase, model)))
        return tuple(evaluations)

    def _needle(self, phase: Phase, model: LanguageModel) -> Callable[[Any], dict[str, float]]:
        settings = self.config.evaluation
        examples = needle_examples(
            self.tokenizer,
            self.corpus.stores[MAIN]["validation"],
            phase.length,
            depths=np.linspace(0, 1, settings.needle_depths).tolist(),
            per_depth=settings.needles_per_depth,
            seed=self.config.seed + 1,
            config=self.config.data.needle or NeedleConfig(),
        )
        answer = self._jit(functools.partial(answer_tokens, model, count=examples.answer_tokens))
        batch = settings.batch or phase.batch
        return lambda params: evaluate_needle(answer, params, examples, batch)

    def _jit(self, function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        """Jits an evaluation's `(params, batch)`; host batches are split over the mesh."""
        rows = sharding.batch_sharding(self.mesh)
        jitted = jax.jit(function, out_shardings=rows)
        return lambda params, batch: jitted(params, jax.device_put(batch, rows))

    def _sample(self, model: LanguageModel, params: Any) -> str:
        sample = self.config.sample
        return sample_text(
            model,
            params,
            self.tokenizer,
            sample.prompt,
            max_new_tokens=sample.max_new_tokens,
            sampler=SamplerConfig(temperature=sample.temperature, top_p=sample.top_p),
            seed=self.config.seed,
        )
