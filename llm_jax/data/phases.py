"""Progressive context lengthening: phases, the gate between them, and the clock that counts them.

A gate follows the rule of the Llama 3 report (section 3.4.2): the context is lengthened further
once short-context quality has recovered completely and the needle is found at the current length.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llm_jax import schedules
from llm_jax.errors import UserError
from llm_jax.models.rope import RopeConfig, Scaling
from llm_jax.optim import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class GateConfig:
    """What must hold before the next phase starts; measured by the evaluations of the phase."""

    # Short-context loss may exceed its best value at earlier gates by this many nats a token.
    short_loss_tolerance: float = 0.02
    # Needle retrieval at the phase's own length. None: no needle evaluation, no condition.
    needle_accuracy: float | None = 0.9
    check_every: int = 50  # extra steps between two looks at a gate that held
    max_extra_steps: int = 500  # then the next phase starts whatever the gate says


@dataclasses.dataclass(frozen=True)
class PhaseConfig:
    """A stretch of training at one context length. Give `steps` or `tokens`, not both."""

    length: int = 256  # tokens a row
    batch: int = 16  # rows in the global batch
    steps: int | None = None
    tokens: int | None = None  # rounded up to whole steps
    # RoPE of this phase; None keeps what the model's config says.
    rope_theta: float | None = None
    rope_scaling: Scaling | None = None
    rope_factor: float | None = None
    # Mixture weights by component name from this phase on; empty keeps the phase's before.
    weights: dict[str, float] = dataclasses.field(default_factory=dict)
    rewarm_steps: int = 0  # the learning rate ramps up from 0 over the first steps of the phase
    gate: GateConfig | None = None


@dataclasses.dataclass(frozen=True)
class Phase:
    """A resolved phase.

    learning_rates: float32 [steps], one for each planned step. sequences: how many sequences of
    `length` tokens a row of the batch holds: 1, or the responses of a comparison.
    """

    index: int
    length: int
    batch: int
    steps: int
    rope: RopeConfig
    weights: dict[str, float]
    gate: GateConfig | None
    learning_rates: np.ndarray
    sequences: int = 1

    def learning_rate(self, step: int) -> np.float32:
        """The rate of the phase's step `step`; steps beyond the plan keep the last rate."""
        return self.learning_rates[min(step, self.steps - 1)]

    @property
    def tokens_per_step(self) -> int:
        return self.length * self.sequences * self.batch


def plan(
    configs: Sequence[PhaseConfig],
    optimizer: OptimizerConfig,
    rope: RopeConfig,
    weights: Mapping[str, float],
    sequences: int = 1,
) -> tuple[Phase, ...]:
    """Resolves the phases: whole steps, RoPE, inherited mixture weights and learning rates.

    One schedule spans the planned steps of all phases; a gate's extra steps don't move it.

    Raises:
      UserError: no phase, neither or both of steps and tokens, or a number that is not positive.
    """
    if not configs:
        raise UserError("config.phases is empty: give at least one phase.")
    steps = [_steps(config, index, sequences) for index, config in enumerate(configs)]
    rates = np.split(schedules.learning_rates(optimizer, sum(steps)), np.cumsum(steps)[:-1])
    phases = []
    for index, config in enumerate(configs):
        changes: dict[str, Any] = {
            "theta": config.rope_theta,
            "scaling": config.rope_scaling,
            "factor": config.rope_factor,
        }
        rope = dataclasses.replace(rope, **{k: v for k, v in changes.items() if v is not None})
        weights = config.weights or weights
        phases.append(
            Phase(
                index=index,
                length=config.length,
                batch=config.batch,
                steps=steps[index],
                rope=rope,
                weights=dict(weights),
                gate=config.gate,
                learning_rates=schedules.rewarm(rates[index], config.rewarm_steps),
                sequences=sequences,
            )
        )
    return tuple(phases)


def _steps(config: PhaseConfig, index: int, sequences: int) -> int:
    where = f"config.phases[{index}]"
    for name in ("length", "batch"):
        if getattr(config, name) < 1:
            raise UserError(f"{where}.{name}={getattr(config, name)} must be at least 1.")
    if (config.steps is None) == (config.tokens is None):
        raise UserError(f"{where} needs exactly one of steps and tokens.")
    if config.steps is not None:
        steps = config.steps
    else:
        steps = -(-(config.tokens or 0) // (config.length * sequences * config.batch))
    if steps < 1:
        raise UserError(f"{where} has {steps} steps: it needs at least 1.")
    if not 0 <= config.rewarm_steps <= steps:
        raise UserError(f"{where}.rewarm_steps={config.rewarm_steps} must be within 0 and {steps}.")
    return steps


@dataclasses.dataclass
class Clock:
    """Where the run is: phase, first global step of the phase, extra steps the gate asked for.

    Part of the checkpoint. `best_short_loss` is the gate's memory: the lowest short-context loss
    seen at a gate so far.
    """

    index: int = 0
    start: int = 0
    extra: int = 0
    best_short_loss: float | None = None

    def phase_end(self, phases: Sequence[Phase]) -> int:
        """The global step at which the current phase ends, as far as is known now."""
        return self.start + phases[self.index].steps + self.extra

    def last_step(self, phases: Sequence[Phase]) -> int:
        """The global step at which the run ends if no gate holds from now on."""
        return self.phase_end(phases) + sum(phase.steps for phase in phases[self.index + 1 :])

    def tokens(self, phases: Sequence[Phase], step: int) -> int:
        """Tokens trained on until `step`; earlier phases are counted with their extra steps."""
        return self._earlier_tokens + (step - self.start) * phases[self.index].tokens_per_step

    _earlier_tokens: int = 0

    def advance(self, phases: Sequence[Phase], step: int) -> None:
        """Starts the next phase at global step `step`."""
        self._earlier_tokens = self.tokens(phases, step)
        self.index += 1
        self.start = step
        self.extra = 0

    def hold(self, gate: GateConfig) -> None:
        """Keeps the current phase for another `check_every` steps, within the gate's bound."""
        self.extra = min(self.extra + gate.check_every, gate.max_extra_steps)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a gate decided and why, in one line for the log."""

    opened: bool
    forced: bool
    reason: str


def judge(gate: GateConfig, clock: Clock, metrics: Mapping[str, float]) -> Verdict:
    """Decides from the phase's evaluations whether the next phase may start.

    `metrics` holds `eval/short/loss` and, where the gate asks for it, `eval/needle/accuracy`; one
    that is missing, because its evaluation failed, does not hold.
    """
    conditions = []
    short = metrics.get("eval/short/loss", math.nan)
    if clock.best_short_loss is not None:
        bound = clock.best_short_loss + gate.short_loss_tolerance
        conditions.append((short <= bound, f"short-context loss {short:.3f}, bound {bound:.3f}"))
    if gate.needle_accuracy is not None:
        found = metrics.get("eval/needle/accuracy", math.nan)
        wanted = gate.needle_accuracy
        conditions.append((found >= wanted, f"needle {found:.2f}, wanted {wanted:.2f}"))
    passed = all(holds for holds, _ in conditions)
    forced = not passed and clock.extra >= gate.max_extra_steps
    reason = "; ".join(text for _, text in conditions) or "nothing to recover from"
    return Verdict(opened=passed or forced, forced=forced, reason=reason)
