"""What every stage has in common: the fields of its config, and what it hands to the loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal, Protocol

import jax

from llm_jax.checkpoint import CheckpointConfig
from llm_jax.data.phases import Phase, PhaseConfig
from llm_jax.data.tokenizers import Tokenizer
from llm_jax.errors import UserError
from llm_jax.evals.task import TaskTerm
from llm_jax.mesh import MeshConfig
from llm_jax.metrics import MetricsConfig
from llm_jax.optim import OptimizerConfig
from llm_jax.step import Objective, StepConfig


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """When the evaluations run and how much they read; every phase ends with one, too."""

    every: int = 200  # steps
    at_start: bool = False  # once before the first step, too: what the stage starts from
    rows: int = 64  # at most this many validation rows
    batch: int | None = None  # rows at once; None: as many as a training batch
    # Further ones, as tools.evaluate has them, after those of the stage: see evals.tasks.
    tasks: tuple[TaskTerm, ...] = ()

    positive: ClassVar[tuple[str, ...]] = ("every", "rows")

    def __post_init__(self) -> None:
        for name in self.positive:
            if getattr(self, name) < 1:
                value = getattr(self, name)
                raise UserError(f"config.evaluation.{name}={value} must be at least 1.")


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """The text sampled at every checkpoint and at the end of the run."""

    prompt: str = ""
    max_new_tokens: int = 64  # 0: no sample
    temperature: float = 0.8
    top_p: float = 0.95


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    """A window of steps traced by the JAX profiler into RUN/profile; off while `steps` is 0."""

    start: int = 10
    steps: int = 0


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """The fields that every stage's config has."""

    trainer: str = "pretrain"
    seed: int = 0
    init_from: str | None = None  # DIR or DIR@STEP of an earlier stage: parameters and meta only
    init_from_hf: str | None = None  # a Hugging Face folder; it goes before init_from
    # How the base of LoRA adapters is held (QLoRA, arXiv:2305.14314); None: in float32.
    quantize_base: Literal["int8", "nf4"] | None = None
    # Compiled programs are kept here between runs; None: $JAX_COMPILATION_CACHE_DIR or
    # the cache folder of llm_jax. "off" keeps none.
    compilation_cache: str | None = None
    phases: tuple[PhaseConfig, ...] = (PhaseConfig(),)
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    step: StepConfig = StepConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    metrics: MetricsConfig = MetricsConfig()
    sample: SampleConfig = SampleConfig()
    profile: ProfileConfig = ProfileConfig()


class Source(Protocol):
    """Where batches come from. An offline source ignores `params`; an on-policy one samples."""

    def start(self, phase: Phase, first_step: int) -> None:
        """Turns to the batches of `phase`, whose step 0 is the global step `first_step`."""

    def next(self, params: Any, step: int) -> Any:
        """The batch of the global step `step`, as global jax.Arrays on the mesh.

        `params` are all parameters, frozen ones too; the step that follows uses up their buffers.
        """

    def progress(self, step: int) -> dict[str, float]:
        """What to log about how far the source has been read, such as `epoch`."""

    def state(self) -> dict[str, Any]:
        """JSON-able; what `restore` needs beside the step and the phase."""

    def restore(self, state: dict[str, Any]) -> None: ...


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """`run(params)` returns scalars; they are logged as eval/NAME/KEY."""

    name: str
    run: Callable[[Any], dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a phase decides: everything that depends on its length, RoPE or mixture.

    sample: `(params) → text`, or None. meta: JSON-able, stored with each checkpoint of the phase.
    micro_batches: into how many parts a batch is cut inside the step. facts: lines logged when
    the phase starts.
    """

    objective: Objective
    evaluations: tuple[Evaluation, ...]
    sample: Callable[[Any], str] | None
    meta: dict[str, Any]
    flops_per_token: float
    micro_batches: int
    facts: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Trainer:
    """A stage, wired: the loop asks for nothing else.

    init_params: `(rng) → tree of sharding.Named`, of what is trained. load_params: the same from
    the stage before in the given shardings, or None for a start from scratch. frozen: what the
    model needs beside it, on the mesh; None = nothing. data_fingerprint: a hash of all documents.
    heads: the heads that the model has. width_multiplier: that of the model, by which muP scales
    learning rates. lineage: of each stage before this one, oldest first, its
    stage, run, step, and the hash of its config.
    """

    phases: tuple[Phase, ...]
    init_params: Callable[[jax.Array], Any]
    load_params: Callable[[Any], Any] | None
    source: Source
    setting: Callable[[Phase], Setting]
    tokenizer: Tokenizer
    data_fingerprint: str
    frozen: Any = None
    heads: tuple[str, ...] = ()
    width_multiplier: float = 1.0
    lineage: tuple[dict[str, Any], ...] = ()
