"""Formulas against numbers worked out by hand."""

import math

import pytest

from llm_jax.models import ModelConfig
from llm_jax.models.presets import PUBLISHED
from llm_jax.models.size import flops_per_token, parameter_count
from llm_jax.scaling import paper


def test_seven_billion_parameters_on_a_trillion_tokens():
    """At 1e13 FLOP/s: 4.2e9 seconds, which are 1.17 million hours and not 4,200."""
    flops = paper.training_flops(7e9, 1e12)
    assert flops == 4.2e22
    assert paper.training_seconds(flops, 1e13) == pytest.approx(4.2e9)
    assert paper.chip_hours(flops, peak=1e13, utilisation=1) == pytest.approx(1_166_667, abs=1)
    assert paper.chip_hours(flops, peak=2e13, utilisation=0.5) == pytest.approx(4.2e9 / 3600)


def test_llama_3_took_as_long_as_was_reported():
    """405B parameters, 15.6T tokens, 3.8e25 FLOPs; 30.84M hours of H100 (arXiv:2407.21783, and the
    model card), of which training at 38 to 43 % of the peak is a part."""
    model = PUBLISHED["llama3.1-405b"]
    flops = flops_per_token(model, 8192) * 15.6e12
    assert paper.training_flops(parameter_count(model), 15.6e12) == pytest.approx(3.8e25, rel=0.01)
    assert 24e6 < paper.chip_hours(flops, 989e12, 0.41) < 30.84e6


def test_attention_costs_half_of_its_square():
    """Two products of a query with the (T + 1) / 2 keys that it sees, forward and twice back."""
    model = ModelConfig(vocab_size=64, embed_dim=32, num_layers=3, num_heads=4, mlp_dim=48)
    grown = flops_per_token(model, 65) - flops_per_token(model, 1)
    assert grown == 3 * 2 * 2 * 3 * 32 * (66 / 2 - 1)


def test_tokens():
    assert paper.optimal_tokens(70e9) == 1.4e12  # Chinchilla
    words = 75 * 365.25 * 8 * 60 * 238
    assert paper.reading_lifetimes(4 / 3 * words) == pytest.approx(1)
    assert 3000 < paper.reading_lifetimes(15e12) < 4000


def test_failures_are_those_of_llama_3():
    """419 in 54 days on 16,384 chips: one in about three hours."""
    assert paper.seconds_between_failures(16_384) == pytest.approx(54 * 86_400 / 419)
    assert paper.seconds_between_failures(1, hours_a_chip=100) == 360_000


@pytest.mark.parametrize("write, failures", [(10, 20_000), (120, 11_000), (1, 1e7)])
def test_the_save_interval_loses_the_least(write, failures):
    best = paper.save_interval(write, failures)
    assert best == math.sqrt(2 * write * failures)
    least = paper.lost_share(best, write, failures, restart_seconds=60)
    assert least == pytest.approx(math.sqrt(2 * write / failures) + 60 / failures)
    for other in (0.9 * best, 1.1 * best):
        assert paper.lost_share(other, write, failures, restart_seconds=60) > least


def test_the_lost_share_is_what_a_simulation_loses():
    """Failures at random moments, training from the last save on."""
    import numpy as np

    write, failures = 30.0, 20_000.0
    interval = paper.save_interval(write, failures)
    random = np.random.default_rng(0)
    spent = kept = 0.0
    for until in random.exponential(failures, 20_000):
        spent += until
        kept += until // (interval + write) * interval
    assert 1 - kept / spent == pytest.approx(paper.lost_share(interval, write, failures), rel=0.05)
