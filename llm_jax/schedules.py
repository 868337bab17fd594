"""Learning-rate schedules as closed forms over all steps of a run.

A schedule is an array: the loop looks its value up and hands it to the optimiser, so what will be
used can be printed, plotted and compared before the first step.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from llm_jax.errors import UserError
from llm_jax.optim import OptimizerConfig

# Share of the peak over the steps after warm-up: (config, step, total_steps) → share, where `step`
# is a float64 array of steps in [warmup_steps, total_steps).
Decay = Callable[[OptimizerConfig, np.ndarray, int], np.ndarray]


def learning_rates(config: OptimizerConfig, total_steps: int) -> np.ndarray:
    """The learning rate of every step, float32 [total_steps].

    With W = warmup_steps, the first W steps rise linearly: peak × (step + 1) / W, so no step is
    wasted at rate zero. Step W is at the peak and the decay reaches its floor, peak ×
    final_learning_rate_ratio, at `total_steps`, one past the last.

    Raises:
      UserError: no steps, a warm-up longer than the run, a decay that begins inside the warm-up.
    """
    warmup = config.warmup_steps
    if total_steps < 1:
        raise UserError(f"a schedule needs at least one step, and the run has {total_steps}.")
    if warmup > total_steps:
        raise UserError(
            f"config.optimizer.warmup_steps={warmup} is longer than the run of {total_steps} "
            f"steps: lower it or train longer."
        )
    if config.schedule == "wsd" and warmup > _decay_start(config, total_steps):
        raise UserError(
            f"config.optimizer.warmup_steps={warmup} and decay_fraction={config.decay_fraction} "
            f"overlap in a run of {total_steps} steps: lower one of them."
        )
    step = np.arange(total_steps, dtype=np.float64)
    rising = (step[:warmup] + 1) / max(warmup, 1)
    falling = _DECAYS[config.schedule](config, step[warmup:], total_steps)
    return (config.learning_rate * np.concatenate([rising, falling])).astype(np.float32)


def rewarm(rates: np.ndarray, steps: int) -> np.ndarray:
    """`rates` of one phase with its first `steps` multiplied by 1/steps, 2/steps, ..., 1.

    Raises:
      UserError: a negative count, or one longer than the phase.
    """
    if not 0 <= steps <= len(rates):
        raise UserError(
            f"a re-warm of {steps} steps does not fit a phase of {len(rates)} steps: lower it."
        )
    ramp = np.ones(len(rates))
    ramp[:steps] = np.arange(1, steps + 1) / max(steps, 1)
    return (rates * ramp).astype(np.float32)


def _progress(config: OptimizerConfig, step: np.ndarray, total_steps: int) -> np.ndarray:
    """0 at the end of the warm-up, 1 at the end of the run."""
    return (step - config.warmup_steps) / max(total_steps - config.warmup_steps, 1)


def _to_floor(config: OptimizerConfig, share: np.ndarray) -> np.ndarray:
    """Maps a share of [0, 1] onto [floor, 1]."""
    floor = config.final_learning_rate_ratio
    return floor + (1 - floor) * share


def _cosine(config: OptimizerConfig, step: np.ndarray, total_steps: int) -> np.ndarray:
    """Half a cosine (Loshchilov & Hutter 2017, SGDR, equation 5, without restarts)."""
    return _to_floor(config, 0.5 * (1 + np.cos(np.pi * _progress(config, step, total_steps))))


def _linear(config: OptimizerConfig, step: np.ndarray, total_steps: int) -> np.ndarray:
    return _to_floor(config, 1 - _progress(config, step, total_steps))


def _wsd(config: OptimizerConfig, step: np.ndarray, total_steps: int) -> np.ndarray:
    """Warm-up, stable, decay (Hu et al. 2024, MiniCPM; linear decay as in Hägele et al. 2024)."""
    start = _decay_start(config, total_steps)
    return _to_floor(config, 1 - np.maximum(step - start, 0) / max(total_steps - start, 1))


def _constant(config: OptimizerConfig, step: np.ndarray, total_steps: int) -> np.ndarray:
    return np.ones_like(step)


def _inverse_sqrt(config: OptimizerConfig, step: np.ndarray, total_steps: int) -> np.ndarray:
    """√(W / (step + 1)) (Vaswani et al. 2017, section 5.3, relative to its peak)."""
    share = np.sqrt(max(config.warmup_steps, 1) / (step + 1))
    return np.maximum(share, config.final_learning_rate_ratio)


_DECAYS: dict[str, Decay] = {
    "cosine": _cosine,
    "linear": _linear,
    "wsd": _wsd,
    "constant": _constant,
    "inverse_sqrt": _inverse_sqrt,
}


def _decay_start(config: OptimizerConfig, total_steps: int) -> int:
    return total_steps - round(config.decay_fraction * total_steps)
