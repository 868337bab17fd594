"""One adapted product against numbers computed by hand, and the settings that are refused."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.errors import UserError
from llm_jax.models import LoraConfig
from llm_jax.models.kernels import LAYOUTS
from llm_jax.models.lora import adapted

X = jnp.array([[1.0, 2.0]])
KERNEL = jnp.array([[3.0, 1.0], [4.0, 0.0]])  # columns of length 5 and 1
ADAPTER = {"a": jnp.array([[1.0], [0.5]]), "b": jnp.array([[2.0, -1.0]])}  # x·A·B = [4, -2]
ROOT_RANK = {"alpha": 3.0, "rank": 4}  # scale 3/4, rank-stabilised 3/2


@pytest.mark.parametrize(
    "switches, expected",
    [
        # x·W = [11, 1]
        ({}, [11 + 0.75 * 4, 1 - 0.75 * 2]),
        ({"rank_stabilised": True}, [11 + 1.5 * 4, 1 - 1.5 * 2]),
        # W + s·A·B = [[4.5, 0.25], [4.75, -0.375]]
        (
            {"dora": True},
            [10 / math.hypot(4.5, 4.75) * 14, 3 / math.hypot(0.25, 0.375) * -0.5],
        ),
    ],
    ids=["standard", "rank_stabilised", "dora"],
)
def test_a_product_computed_by_hand(switches, expected):
    adapter = {**ADAPTER, "magnitude": jnp.array([10.0, 3.0])}
    config = LoraConfig(**ROOT_RANK, **switches)
    y = adapted(X, KERNEL, {"up": adapter}, config, LAYOUTS["up"], "float32")
    np.testing.assert_allclose(y, [expected], rtol=1e-6)


def test_dora_gradient_takes_norms_for_constants():
    """d y/d B = m/‖W + s·A·B‖ · s·x·A, and d y/d m = y/m."""
    config = LoraConfig(**ROOT_RANK, dora=True)
    adapter = {**ADAPTER, "magnitude": jnp.array([10.0, 3.0])}

    def total(adapter):
        return adapted(X, KERNEL, {"up": adapter}, config, LAYOUTS["up"], "float32").sum()

    gradient = jax.grad(total)(adapter)
    norms = np.hypot([4.5, 0.25], [4.75, 0.375])
    np.testing.assert_allclose(gradient["b"], [[10, 3] / norms * 0.75 * 2], rtol=1e-6)
    np.testing.assert_allclose(gradient["magnitude"], [14, -0.5] / norms, rtol=1e-6)


def test_dora_of_a_zero_column_is_zero_and_finite():
    kernel = KERNEL.at[:, 1].set(0)
    adapter = {
        "a": ADAPTER["a"],
        "b": jnp.zeros((1, 2)),
        "magnitude": jnp.array([5.0, 0.0]),
    }
    config = LoraConfig(dora=True)
    y = adapted(X, kernel, {"up": adapter}, config, LAYOUTS["up"], "float32")
    np.testing.assert_allclose(y, [[11, 0]], rtol=1e-6)


@pytest.mark.parametrize("dora", [False, True])
def test_dropout_acts_on_what_adapters_see(dora):
    """Against the formula with the mask that the key makes; without a key nothing is dropped."""
    config = LoraConfig(rank=4, alpha=3.0, dropout=0.5, dora=dora)
    x = jax.random.normal(jax.random.key(0), (50, 2))
    adapter = {**ADAPTER, "magnitude": jnp.array([10.0, 3.0])}
    rng = jax.random.key(3)

    def run(rng):
        return adapted(x, KERNEL, {"up": adapter}, config, LAYOUTS["up"], "float32", rng)

    dropped = np.where(jax.random.bernoulli(rng, 0.5, x.shape), 2 * x, 0)
    assert 0.3 < np.mean(dropped == 0) < 0.7
    low = 0.75 * ADAPTER["a"] @ ADAPTER["b"]
    gain = [10, 3] / np.linalg.norm(KERNEL + low, axis=0) if dora else np.ones(2)
    expected = x @ KERNEL + (gain - 1) * (dropped @ KERNEL) + gain * (dropped @ low)
    np.testing.assert_allclose(run(rng), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(run(None), gain * (x @ (KERNEL + low)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rank": 0}, "rank=0 must be positive"),
        ({"rank": -4}, "rank=-4 must be positive"),
        ({"alpha": 0.0}, "alpha=0.0 must be positive"),
        ({"dropout": 1.0}, r"dropout=1.0 must lie in \[0, 1\)"),
        ({"dropout": -0.1}, "dropout=-0.1"),
        ({"targets": ()}, "targets is empty"),
        ({"targets": ("(",)}, "no regular expression"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(UserError, match=message):
        LoraConfig(**changes)
