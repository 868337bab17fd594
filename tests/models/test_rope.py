"""RoPE against complex rotation, and its scalings against values of another implementation."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.errors import UserError
from llm_jax.models.rope import RopeConfig, amplitude, apply_rotary, frequencies, rotary_tables


def test_rotation_is_multiplication_by_a_unit_complex_number():
    rng = np.random.default_rng(0)
    x_BTH = rng.normal(size=(2, 7, 16))
    positions_BT = rng.integers(0, 5000, size=(2, 7))
    angles = positions_BT[..., None] * 10_000.0 ** -(np.arange(8) / 8)
    turned = (x_BTH[..., :8] + 1j * x_BTH[..., 8:]) * np.exp(1j * angles)
    expected = np.concatenate([turned.real, turned.imag], axis=-1)

    sin, cos = rotary_tables(RopeConfig(), 16, jnp.asarray(positions_BT), 1)
    actual = apply_rotary(jnp.asarray(x_BTH, jnp.float32), sin, cos)

    # float32 holds an angle of thousands of radians to about 2⁻¹¹
    np.testing.assert_allclose(actual, expected, atol=2e-3)


def test_scores_depend_on_distance_only():
    rng = np.random.default_rng(1)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 32)), jnp.float32) for _ in range(2))

    def score(query_position, key_position):
        turned = [
            apply_rotary(x, *rotary_tables(RopeConfig(), 32, jnp.array([[position]]), 1))
            for x, position in ((q, query_position), (k, key_position))
        ]
        return float(jnp.vdot(*turned))

    assert score(9, 4) == pytest.approx(score(105, 100), abs=1e-4)
    assert abs(score(9, 4) - score(9, 5)) > 1e-2


def test_tables_are_float32_at_long_positions_whatever_the_activations_are():
    sin, _ = rotary_tables(RopeConfig(), 4, jnp.array([[100_001]]), 1)
    assert sin.dtype == jnp.float32
    assert float(sin[0, 0, 0]) == pytest.approx(math.sin(100_001), abs=1e-3)
    x = jnp.ones((1, 1, 4), jnp.bfloat16)
    assert apply_rotary(x, sin, sin).dtype == jnp.bfloat16


def test_a_fraction_leaves_the_last_dimensions_alone():
    config = RopeConfig(fraction=0.5)
    x = jnp.arange(16.0)[None, None]
    actual = apply_rotary(x, *rotary_tables(config, 16, jnp.array([[3]]), 1))
    first = apply_rotary(x[..., :8], *rotary_tables(RopeConfig(), 8, jnp.array([[3]]), 1))
    np.testing.assert_array_equal(actual[..., 8:], x[..., 8:])
    np.testing.assert_array_equal(actual[..., :8], first)


# LlamaRotaryEmbedding of transformers 5.x, head_dim 16, printed with 8 digits.
GOLDEN = {
    "linear": (
        RopeConfig(scaling="linear", factor=4.0),
        [0.25, 0.079056941, 0.025, 0.0079056947, 0.0025, 0.00079056947, 0.00025, 7.9056947e-05],
        1.0,
    ),
    "yarn": (
        RopeConfig(scaling="yarn", factor=4.0, original_length=2048),
        [1.0, 0.31622776, 0.1, 0.025693506, 0.0062499996, 0.0013834966, 0.00025, 7.9056941e-05],
        1.1386294,
    ),
    "llama3": (
        RopeConfig(theta=500_000.0, scaling="llama3", factor=8.0, original_length=8192),
        [1.0, 0.19392276, 0.037606031, 0.0072926651, 0.00052484602, 3.4281024e-05, 6.6478697e-06,
         1.2891732e-06],
        1.0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GOLDEN)
def test_scaled_frequencies_match_another_implementation(name):
    config, expected, expected_amplitude = GOLDEN[name]
    np.testing.assert_allclose(frequencies(config, 16, 1)[0], expected, rtol=1e-6)
    assert amplitude(config) == pytest.approx(expected_amplitude, rel=1e-6)


def test_ntk_stretches_the_slowest_pair_by_the_factor_and_the_fastest_not_at_all():
    plain = frequencies(RopeConfig(), 64, 1)[0]
    scaled = frequencies(RopeConfig(scaling="ntk", factor=8.0), 64, 1)[0]
    assert scaled[0] == plain[0]
    assert scaled[-1] == pytest.approx(plain[-1] / 8)
    assert np.all(np.diff(scaled / plain) < 0)


def test_a_factor_of_one_changes_no_frequency():
    plain = frequencies(RopeConfig(), 32, 1)[0]
    for scaling in ("linear", "ntk", "yarn", "llama3"):
        config = RopeConfig(scaling=scaling, factor=1.0, original_length=64)
        np.testing.assert_allclose(frequencies(config, 32, 1)[0], plain, rtol=1e-12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scaling": "yarn", "factor": 2.0}, "original_length"),
        ({"scaling": "llama3", "factor": 2.0}, "original_length"),
        ({"factor": 2.0}, "no effect"),
        ({"scaling": "linear", "factor": 0.5}, "at least 1"),
        ({"fraction": 0.0}, "fraction"),
        ({"theta": 0.0}, "theta"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(UserError, match=message):
        RopeConfig(**settings)
