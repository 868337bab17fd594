"""Phases resolved, the clock that counts them, and what a gate decides."""

import dataclasses

import numpy as np
import pytest

from llm_jax import schedules
from llm_jax.data.phases import Clock, GateConfig, PhaseConfig, judge, plan
from llm_jax.errors import UserError
from llm_jax.models.rope import RopeConfig
from llm_jax.optim import OptimizerConfig

OPTIMIZER = OptimizerConfig(learning_rate=0.1, warmup_steps=3, schedule="cosine")
WEIGHTS = {"text": 1.0}


def planned(*configs, rope=RopeConfig(), weights=WEIGHTS):  # noqa: B008 (frozen)
    return plan(configs, OPTIMIZER, rope, weights)


# --- plan -----------------------------------------------------------------------------------------


def test_one_schedule_spans_all_phases():
    phases = planned(PhaseConfig(steps=5), PhaseConfig(steps=7), PhaseConfig(steps=2))
    rates = np.concatenate([phase.learning_rates for phase in phases])
    np.testing.assert_array_equal(rates, schedules.learning_rates(OPTIMIZER, 14))
    assert [len(phase.learning_rates) for phase in phases] == [5, 7, 2]
    assert rates.dtype == np.float32
    assert [phase.index for phase in phases] == [0, 1, 2]


def test_a_rewarm_ramps_up_within_its_own_phase():
    phases = planned(PhaseConfig(steps=5), PhaseConfig(steps=6, rewarm_steps=4))
    expected = schedules.learning_rates(OPTIMIZER, 11)
    np.testing.assert_array_equal(phases[0].learning_rates, expected[:5])
    ramp = np.array([0.25, 0.5, 0.75, 1, 1, 1])
    np.testing.assert_allclose(phases[1].learning_rates, expected[5:] * ramp, rtol=1e-6)


def test_steps_past_the_plan_keep_the_last_rate():
    (phase,) = planned(PhaseConfig(steps=5))
    assert phase.learning_rate(0) == phase.learning_rates[0]
    assert phase.learning_rate(4) == phase.learning_rate(5) == phase.learning_rate(99)
    assert phase.learning_rate(4) == phase.learning_rates[-1]


@pytest.mark.parametrize("tokens, steps", [(1, 1), (64, 1), (65, 2), (640, 10)])
def test_tokens_are_rounded_up_to_whole_steps(tokens, steps):
    (phase,) = plan(
        [PhaseConfig(length=16, batch=4, tokens=tokens)],
        dataclasses.replace(OPTIMIZER, warmup_steps=0), RopeConfig(), WEIGHTS,
    )  # fmt: skip
    assert phase.steps == steps and phase.tokens_per_step == 64


def test_rope_changes_stay_for_the_phases_after():
    rope = RopeConfig(theta=500.0, fraction=0.5)
    phases = planned(
        PhaseConfig(steps=3),
        PhaseConfig(steps=1, rope_theta=1000.0),
        PhaseConfig(steps=1, rope_scaling="linear", rope_factor=4.0),
        PhaseConfig(steps=1, rope_scaling="none", rope_factor=1.0),
        rope=rope,
    )
    assert [phase.rope for phase in phases] == [
        rope,
        dataclasses.replace(rope, theta=1000.0),
        dataclasses.replace(rope, theta=1000.0, scaling="linear", factor=4.0),
        dataclasses.replace(rope, theta=1000.0),
    ]


def test_weights_stay_for_the_phases_after():
    phases = planned(
        PhaseConfig(steps=3),
        PhaseConfig(steps=1, weights={"text": 1.0, "needle": 3.0}),
        PhaseConfig(steps=1),
        weights={"text": 2.0},
    )
    changed = {"text": 1.0, "needle": 3.0}
    assert [phase.weights for phase in phases] == [{"text": 2.0}, changed, changed]


@pytest.mark.parametrize("config, message", [
    (PhaseConfig(), r"config\.phases\[1\] needs exactly one of steps and tokens"),
    (PhaseConfig(steps=1, tokens=1), "needs exactly one of steps and tokens"),
    (PhaseConfig(steps=0), r"config\.phases\[1\] has 0 steps"),
    (PhaseConfig(tokens=0), "has 0 steps"),
    (PhaseConfig(steps=1, length=0), r"config\.phases\[1\]\.length=0"),
    (PhaseConfig(steps=1, batch=-2), r"config\.phases\[1\]\.batch=-2"),
    (PhaseConfig(steps=2, rewarm_steps=3), r"rewarm_steps=3 must be within 0 and 2"),
    (PhaseConfig(steps=2, rewarm_steps=-1), "rewarm_steps=-1"),
])  # fmt: skip
def test_a_phase_that_makes_no_sense_is_refused(config, message):
    with pytest.raises(UserError, match=message):
        planned(PhaseConfig(steps=5), config)


def test_a_run_has_phases():
    with pytest.raises(UserError, match=r"config\.phases is empty"):
        planned()


# --- the clock ------------------------------------------------------------------------------------


def test_the_clock_counts_phases_with_their_extra_steps():
    phases = planned(
        PhaseConfig(steps=4, length=8, batch=2),
        PhaseConfig(steps=3, length=16, batch=2),
        PhaseConfig(steps=2, length=32, batch=2),
    )
    gate = GateConfig(check_every=5, max_extra_steps=7)
    clock = Clock()
    assert (clock.phase_end(phases), clock.last_step(phases)) == (4, 9)
    assert clock.tokens(phases, 3) == 3 * 16

    clock.hold(gate)
    assert (clock.extra, clock.phase_end(phases), clock.last_step(phases)) == (5, 9, 14)
    clock.hold(gate)
    assert (clock.extra, clock.phase_end(phases), clock.last_step(phases)) == (7, 11, 16)
    assert clock.tokens(phases, 11) == 11 * 16

    clock.advance(phases, 11)
    assert (clock.index, clock.start, clock.extra) == (1, 11, 0)
    assert (clock.phase_end(phases), clock.last_step(phases)) == (14, 16)
    assert clock.tokens(phases, 11) == 11 * 16
    assert clock.tokens(phases, 13) == 11 * 16 + 2 * 32

    clock.advance(phases, 14)
    assert clock.tokens(phases, 16) == 11 * 16 + 3 * 32 + 2 * 64
    assert clock.phase_end(phases) == clock.last_step(phases) == 16
    assert Clock(**dataclasses.asdict(clock)) == clock  # as the checkpoint keeps it


# --- the gate -------------------------------------------------------------------------------------

GATE = GateConfig(short_loss_tolerance=0.1, needle_accuracy=0.9, max_extra_steps=10)


def verdict(short, needle=None, *, best=2.0, extra=0, gate=GATE):
    metrics = {"eval/short/loss": short}
    if needle is not None:
        metrics["eval/needle/accuracy"] = needle
    return judge(gate, Clock(best_short_loss=best, extra=extra), metrics)


@pytest.mark.parametrize("short, needle, opened", [
    (2.0, 0.95, True),
    (2.1, 0.9, True),  # the bounds themselves pass
    (2.11, 0.95, False),
    (2.0, 0.89, False),
    (3.0, 0.0, False),
    (1.0, 1.0, True),
    (float("nan"), 1.0, False),
])  # fmt: skip
def test_a_gate_opens_when_short_context_recovered_and_the_needle_is_found(short, needle, opened):
    assert verdict(short, needle).opened is opened
    assert not verdict(short, needle).forced


def test_the_first_gate_has_nothing_to_recover_from():
    assert verdict(99.0, 0.9, best=None).opened
    assert not verdict(99.0, 0.8, best=None).opened
    gate = dataclasses.replace(GATE, needle_accuracy=None)
    assert verdict(99.0, best=None, gate=gate).reason == "nothing to recover from"


def test_a_gate_without_a_needle_looks_at_the_loss_alone():
    gate = dataclasses.replace(GATE, needle_accuracy=None)
    assert verdict(2.05, gate=gate).opened and not verdict(2.2, gate=gate).opened


def test_a_gate_is_forced_at_its_bound_and_not_before():
    assert not verdict(3.0, 0.0, extra=9).opened
    at_bound = verdict(3.0, 0.0, extra=10)
    assert at_bound.opened and at_bound.forced
    passed = verdict(2.0, 1.0, extra=10)
    assert passed.opened and not passed.forced


def test_the_reason_gives_both_figures_with_their_bounds():
    assert (
        verdict(2.2, 0.5).reason
        == "short-context loss 2.200, bound 2.100; needle 0.50, wanted 0.90"
    )
