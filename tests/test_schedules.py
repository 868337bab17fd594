import math

import numpy as np
import optax
import pytest

from llm_jax.errors import UserError
from llm_jax.optim import OptimizerConfig
from llm_jax.schedules import learning_rates, rewarm

PEAK, WARMUP, TOTAL = 2e-3, 7, 50
FLOOR = 0.4  # high enough for the inverse square root to reach it


def make_config(schedule: str, **changes) -> OptimizerConfig:
    settings = {
        "learning_rate": PEAK,
        "warmup_steps": WARMUP,
        "final_learning_rate_ratio": FLOOR,
        "decay_fraction": 0.3,
    }
    return OptimizerConfig(schedule=schedule, **(settings | changes))


def formula(schedule: str, step: int) -> float:
    if step < WARMUP:
        return PEAK * (step + 1) / WARMUP
    progress = (step - WARMUP) / (TOTAL - WARMUP)
    return (
        PEAK
        * {
            "cosine": FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * progress)) / 2,
            "linear": 1 - (1 - FLOOR) * progress,
            "wsd": 1.0 if step <= 35 else 1 - (1 - FLOOR) * (step - 35) / 15,
            "constant": 1.0,
            "inverse_sqrt": max(math.sqrt(WARMUP / (step + 1)), FLOOR),
        }[schedule]
    )


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant", "inverse_sqrt"])
def test_values_are_the_formulas(schedule):
    rates = learning_rates(make_config(schedule), TOTAL)
    assert rates.dtype == np.float32 and rates.shape == (TOTAL,)
    expected = [formula(schedule, step) for step in range(TOTAL)]
    np.testing.assert_allclose(rates, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("schedule", "decay"),
    [
        ("cosine", optax.cosine_decay_schedule(PEAK, TOTAL - WARMUP, alpha=FLOOR)),
        ("linear", optax.linear_schedule(PEAK, FLOOR * PEAK, TOTAL - WARMUP)),
        ("wsd", optax.linear_schedule(PEAK, FLOOR * PEAK, 15, transition_begin=35 - WARMUP)),
        ("constant", optax.constant_schedule(PEAK)),
    ],
)
def test_values_are_those_of_optax(schedule, decay):
    warmup = optax.linear_schedule(PEAK / WARMUP, PEAK, WARMUP - 1)
    joined = optax.join_schedules([warmup, decay], [WARMUP])
    expected = [float(joined(step)) for step in range(TOTAL)]
    np.testing.assert_allclose(learning_rates(make_config(schedule), TOTAL), expected, rtol=1e-5)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant", "inverse_sqrt"])
@pytest.mark.parametrize("warmup", [0, 1, 35, 50])
def test_no_step_is_wasted_and_the_peak_is_reached(schedule, warmup):
    if schedule == "wsd" and warmup == 50:
        warmup = 34
    rates = learning_rates(make_config(schedule, warmup_steps=warmup), TOTAL)
    assert rates.min() > 0 and rates.max() == np.float32(PEAK)
    assert np.all(np.diff(rates[:warmup]) > 0) and np.all(np.diff(rates[max(warmup - 1, 0) :]) <= 0)


def test_wsd_without_decay_stays_at_the_peak():
    rates = learning_rates(make_config("wsd", decay_fraction=0.0), TOTAL)
    assert np.all(rates[WARMUP:] == np.float32(PEAK))


def test_rewarm_ramps_the_first_steps_only():
    rates = np.linspace(1.0, 0.5, 6, dtype=np.float32)
    expected = rates * np.float32([0.25, 0.5, 0.75, 1, 1, 1])
    np.testing.assert_allclose(rewarm(rates, 4), expected, rtol=1e-6)
    np.testing.assert_array_equal(rewarm(rates, 0), rates)
    assert rewarm(rates, 4).dtype == np.float32


@pytest.mark.parametrize(
    ("changes", "total_steps", "message"),
    [
        ({"warmup_steps": 51}, 50, "warmup_steps=51 is longer than the run of 50"),
        ({"warmup_steps": 36}, 50, "overlap"),
        ({}, 0, "at least one step"),
    ],
)
def test_impossible_schedules_are_refused(changes, total_steps, message):
    with pytest.raises(UserError, match=message):
        learning_rates(make_config("wsd", **changes), total_steps)


@pytest.mark.parametrize("steps", [-1, 7])
def test_rewarm_outside_the_phase_is_refused(steps):
    with pytest.raises(UserError, match="re-warm"):
        rewarm(np.ones(6, np.float32), steps)
