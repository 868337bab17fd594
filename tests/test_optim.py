import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llm_jax.errors import UserError
from llm_jax.models.config import ModelConfig
from llm_jax.models.language_model import LanguageModel
from llm_jax.optim import (
    MUON_UPDATE_RMS,
    OptimizerConfig,
    decay_mask,
    ema_params,
    make_optimizer,
    muon_dimension_numbers,
    read_metrics,
)
from llm_jax.sharding import unbox

RATE = np.float32(0.01)

# Enough for every rule: a table, a kernel that Muon knows, a scale.
SMALL = {"embedding": (5, 4), "mlp": {"down": {"kernel": (6, 4)}}, "mlp_norm": {"scale": (4,)}}

# Two scanned layers in the names and ranks of the transformer, with tiny sizes.
SCANNED = {
    "embedding": (11, 8),
    "layers": {
        "attention": {
            "qkv": {"kernel": (2, 2, 4, 8, 3), "bias": (2, 2, 4, 3)},
            "output": {"kernel": (2, 4, 3, 8)},
        },
        "mlp": {"gate_up": {"kernel": (2, 2, 8, 12)}, "down": {"kernel": (2, 12, 8)}},
        "mlp_norm": {"scale": (2, 8)},
    },
    "output": (8, 11),
}


def make_params(seed: int = 0, shapes: dict = SMALL) -> dict:
    leaves, structure = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    random = np.random.default_rng(seed)
    return structure.unflatten([random.normal(size=s).astype(np.float32) for s in leaves])


def global_norm(tree) -> float:
    return float(np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(tree))))


def scaled(tree, factor: float):
    return jax.tree.map(lambda x: (x * factor).astype(np.float32), tree)


def unit_gradients(norm: float = 1.0, seed: int = 1, shapes: dict = SMALL) -> dict:
    gradients = make_params(seed, shapes)
    return scaled(gradients, norm / global_norm(gradients))


def train(config, params, gradients, rates=None):
    """Parameters and state after one jitted update for each tree of `gradients`."""
    optimizer = make_optimizer(config, params)

    @jax.jit
    def step(params, state, gradient, rate):
        updates, state = optimizer.update(gradient, state, params, learning_rate=rate)
        return optax.apply_updates(params, updates), state

    state = jax.jit(optimizer.init)(params)
    for i, gradient in enumerate(gradients):
        params, state = step(params, state, gradient, RATE if rates is None else rates[i])
    return params, state


def train_reference(optimizer, params, gradients):
    """The same for an optimiser of optax, which holds its own learning rate."""

    @jax.jit
    def step(params, state, gradient):
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.jit(optimizer.init)(params)
    for gradient in gradients:
        params, state = step(params, state, gradient)
    return params


def assert_bitwise_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "muon"])
def test_each_optimizer_descends_a_quadratic(name):
    params, target = make_params(0), make_params(1)
    config = OptimizerConfig(name=name, weight_decay=0.0)
    optimizer = make_optimizer(config, params)

    def loss(params):
        return optax.tree.norm(optax.tree.sub(params, target), squared=True)

    @jax.jit
    def step(params, state, rate):
        updates, state = optimizer.update(jax.grad(loss)(params), state, params, learning_rate=rate)
        return optax.apply_updates(params, updates), state

    state, start = jax.jit(optimizer.init)(params), loss(params)
    for i in range(300):
        params, state = step(params, state, 0.2 * (1 - i / 300))
    assert loss(params) < 0.01 * start


def test_adamw_is_optax_adamw():
    params = make_params()
    gradients = [make_params(seed) for seed in range(1, 11)]
    rates = jnp.linspace(0.1, 0.01, 10)
    config = OptimizerConfig(clip_norm=None, weight_decay=0.1, b1=0.9, b2=0.95)
    reference = optax.adamw(
        lambda count: rates[count], 0.9, 0.95, eps=1e-8, weight_decay=0.1, mask=decay_mask(params)
    )
    expected = train_reference(reference, params, gradients)
    actual, _ = train(config, params, gradients, rates)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), actual, expected
    )


def test_lion_is_optax_lion():
    params = make_params()
    gradients = [make_params(seed) for seed in range(1, 11)]
    config = OptimizerConfig(name="lion", clip_norm=None, weight_decay=0.1, b1=0.9, b2=0.99)
    reference = optax.lion(0.01, 0.9, 0.99, weight_decay=0.1, mask=decay_mask(params))
    expected = train_reference(reference, params, gradients)
    actual, _ = train(config, params, gradients)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), actual, expected
    )


def test_adafactor_ignores_the_scale_of_parameters_unless_asked():
    gradients = [unit_gradients()]

    def step_of_kernel(factor, parameter_scale):
        config = OptimizerConfig(
            name="adafactor", weight_decay=0.0, parameter_scale=parameter_scale
        )
        params = scaled(make_params(), factor)
        new, _ = train(config, params, gradients)
        return global_norm(new["embedding"] - params["embedding"])

    assert step_of_kernel(10.0, False) == pytest.approx(step_of_kernel(1.0, False), rel=1e-4)
    assert step_of_kernel(10.0, True) == pytest.approx(10 * step_of_kernel(1.0, True), rel=1e-4)


def test_adafactor_factors_the_moments_of_large_kernels():
    params = {"kernel": jnp.zeros((2, 128, 256))}
    optimizer = make_optimizer(OptimizerConfig(name="adafactor"), params)
    sizes = [leaf.size for leaf in jax.tree.leaves(optimizer.init(params))]
    assert max(sizes) <= 2 * 256


def test_decay_mask_goes_by_name():
    mask = decay_mask(make_params(shapes=SCANNED))
    assert mask == {
        "embedding": True,
        "layers": {
            "attention": {
                "qkv": {"kernel": True, "bias": False},
                "output": {"kernel": True},
            },
            "mlp": {"gate_up": {"kernel": True}, "down": {"kernel": True}},
            "mlp_norm": {"scale": False},
        },
        "output": True,
    }


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_weight_decay_is_learning_rate_times_decay_times_parameter(name):
    params = make_params()
    gradients = [unit_gradients()]
    plain, _ = train(OptimizerConfig(name=name, weight_decay=0.0), params, gradients)
    decayed, _ = train(OptimizerConfig(name=name, weight_decay=0.5), params, gradients)
    expected = jax.tree.map(
        lambda p, new, decays: new - 0.01 * 0.5 * p * decays, params, plain, decay_mask(params)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), decayed, expected)


def test_clipping_scales_to_the_global_norm_and_reports_the_norm_before():
    # One Lion-free, Adam-free look at the clipped gradient: Adam's first moment after one step.
    params, gradients = make_params(), unit_gradients(norm=5.0)
    _, state = train(OptimizerConfig(clip_norm=2.0, b1=0.0), params, [gradients])
    moments = optax.tree.get(state, "mu")
    assert global_norm(moments) == pytest.approx(2.0, rel=1e-5)
    jax.tree.map(lambda m, g: np.testing.assert_allclose(m, g * 0.4, rtol=1e-5), moments, gradients)
    assert read_metrics(state)["grad_norm"] == pytest.approx(5.0, rel=1e-5)

    _, state = train(OptimizerConfig(clip_norm=10.0, b1=0.0), params, [gradients])
    assert_bitwise_equal(optax.tree.get(state, "mu"), gradients)


def test_norm_of_bfloat16_gradients_is_taken_in_float32():
    params = {"kernel": jnp.zeros(1_000_003)}
    gradients = {"kernel": jnp.ones(1_000_003, jnp.bfloat16)}
    _, state = train(OptimizerConfig(), params, [gradients])
    assert read_metrics(state)["grad_norm"] == pytest.approx(1_000_003**0.5, rel=1e-6)


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "muon"])
def test_non_finite_step_changes_no_bit_and_is_counted(name):
    config = OptimizerConfig(name=name, ema_decay=0.9, spike_factor=5.0)
    params, state = train(config, make_params(), [unit_gradients(seed=seed) for seed in (1, 2, 3)])
    signed_zeros = jax.tree.map(lambda p: p * -0.0, params)  # adding +0.0 would change half of them
    update = jax.jit(make_optimizer(config, params).update)
    apply_updates = jax.jit(optax.apply_updates)
    assert read_metrics(state)["skipped_steps"] == 0

    for bad in (np.nan, np.inf, -np.inf, 1e30):  # the square of the last one overflows
        gradients = unit_gradients(seed=4)
        gradients["mlp_norm"]["scale"][2] = bad
        updates, after = update(gradients, state, params, learning_rate=RATE)
        for before in (params, signed_zeros):
            assert_bitwise_equal(apply_updates(before, updates), before)
        assert_bitwise_equal(after.inner, state.inner)  # moments, counts and the average
        assert_bitwise_equal(after.norm_mean, state.norm_mean)
        assert after.accepted_steps == state.accepted_steps == 3
        assert read_metrics(after)["skipped_steps"] == 1

    apply = jax.jit(functools.partial(make_optimizer(config, params).update, apply=True))
    for before in (params, signed_zeros):
        assert_bitwise_equal(apply(gradients, state, before, learning_rate=RATE)[0], before)

    updates, after = update(unit_gradients(seed=4), state, params, learning_rate=RATE)
    applied, _ = apply(unit_gradients(seed=4), state, params, learning_rate=RATE)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7)
    jax.tree.map(close, applied, apply_updates(params, updates))
    assert read_metrics(after)["skipped_steps"] == 0
    assert not np.array_equal(ema_params(after)["embedding"], ema_params(state)["embedding"])


SPIKE = OptimizerConfig(spike_factor=4.0, spike_warmup_steps=3, spike_patience=2, ema_decay=0.9)


def test_spike_is_judged_before_clipping():
    # Clipped to 0.5, the spike's norm is that of every other step.
    config = dataclasses.replace(SPIKE, clip_norm=0.5)
    good = [unit_gradients(seed=seed) for seed in range(1, 5)]
    before, state = train(config, make_params(), good)
    after, spiked = train(config, make_params(), [*good, unit_gradients(norm=4.1)])
    assert_bitwise_equal(after, before)
    assert_bitwise_equal(spiked.inner, state.inner)
    assert spiked.norm_mean == state.norm_mean == pytest.approx(1.0)
    assert read_metrics(spiked)["grad_norm"] == pytest.approx(4.1)
    assert read_metrics(spiked)["skipped_steps"] == 1

    _, accepted = train(config, make_params(), [*good, unit_gradients(norm=3.9)])
    assert read_metrics(accepted)["skipped_steps"] == 0


def test_no_spike_is_seen_before_the_warm_up_ends():
    gradients = [unit_gradients(), unit_gradients(), unit_gradients(norm=100.0)]
    _, state = train(SPIKE, make_params(), gradients)
    assert state.skipped_steps == 0
    assert state.norm_mean == pytest.approx(102 / 3)


def test_norm_that_stays_high_is_accepted_after_patience():
    gradients = [unit_gradients()] * 3 + [unit_gradients(norm=10.0)] * 3
    _, state = train(SPIKE, make_params(), gradients)
    assert (state.skipped_steps, state.accepted_steps, state.consecutive_skips) == (2, 4, 0)


def test_running_mean_forgets_after_a_hundred_steps():
    params = {"kernel": jnp.zeros(1)}
    norms = [1.0] * 100 + [2.0]
    _, state = train(OptimizerConfig(), params, [{"kernel": jnp.full(1, n)} for n in norms])
    assert state.norm_mean == pytest.approx(0.99 * 1.0 + 0.01 * 2.0, rel=1e-5)


def test_average_of_parameters_is_its_closed_form():
    params, rate = {"kernel": jnp.float32([3.0])}, jnp.float32(0.5)
    config = OptimizerConfig(name="lion", weight_decay=0.0, ema_decay=0.8)
    new, state = train(config, params, [{"kernel": jnp.ones(1)}] * 4, [rate] * 4)
    # Lion on a constant gradient moves by the rate: 2.5, 2.0, 1.5, 1.0.
    path = [3.0, 2.5, 2.0, 1.5, 1.0]
    assert new["kernel"] == path[-1]
    expected = 0.8**4 * path[0] + sum(0.2 * 0.8 ** (4 - i) * path[i] for i in range(1, 5))
    np.testing.assert_allclose(ema_params(state)["kernel"], expected, rtol=1e-6)


def test_average_is_absent_unless_configured():
    params = make_params()
    assert ema_params(make_optimizer(OptimizerConfig(), params).init(params)) is None


def test_average_starts_as_a_copy_of_the_parameters():
    params = jax.tree.map(jnp.asarray, make_params())
    average = ema_params(make_optimizer(OptimizerConfig(ema_decay=0.9), params).init(params))
    assert_bitwise_equal(average, params)
    # A train step donates both, which needs two buffers.
    for mean, parameter in zip(jax.tree.leaves(average), jax.tree.leaves(params), strict=True):
        assert mean.unsafe_buffer_pointer() != parameter.unsafe_buffer_pointer()


def test_state_and_updates_of_bfloat16_moments():
    params = make_params()
    for name in ("adamw", "lion", "muon"):
        config = OptimizerConfig(name=name, mu_dtype="bfloat16")
        new, state = train(config, params, [unit_gradients()] * 2)
        moments = [
            leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(state)
            if ".mu" in jax.tree_util.keystr(path)
        ]
        assert moments and all(leaf.dtype == jnp.bfloat16 for leaf in moments)
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(new))


# --- Muon -----------------------------------------------------------------------------------------


def matrices(name: str, kernel: np.ndarray) -> list[np.ndarray]:
    """The matrices that a kernel of make_params holds, cut by hand."""
    layers = list(kernel)
    if name == "qkv":
        parts = [layer[:, part] for layer in layers for part in range(4)]
        return [part.swapaxes(0, 1).reshape(8, 6) for part in parts]
    if name == "output":
        return [layer.reshape(12, 8) for layer in layers]
    if name == "gate_up":
        return [layer[part] for layer in layers for part in range(2)]
    return layers


@pytest.fixture(scope="module")
def muon_update():
    """The update of a first step, before it is scaled by a learning rate."""
    return first_update("muon")


def first_update(name: str):
    params = scaled(make_params(shapes=SCANNED), 0.0)  # so nothing decays
    gradients = [unit_gradients(shapes=SCANNED)]
    return train(OptimizerConfig(name=name), params, gradients, [np.float32(1.0)])[0]


def test_muon_orthogonalises_every_matrix_of_every_kernel(muon_update):
    layers = muon_update["layers"]
    for name, module in {**layers["attention"], **layers["mlp"]}.items():
        for matrix in matrices(name, np.asarray(module["kernel"])):
            singular = np.linalg.svd(matrix, compute_uv=False)
            singular /= MUON_UPDATE_RMS * max(matrix.shape) ** 0.5
            # Newton–Schulz with these coefficients stops within about 0.3 of 1.
            assert singular.min() > 0.6 and singular.max() < 1.3, (name, singular)


def test_muon_updates_everything_else_with_adam(muon_update):
    same = jax.tree.map(
        lambda a, b: np.allclose(a, b, rtol=1e-5), muon_update, first_update("adamw")
    )
    expected = jax.tree.map(lambda _: True, muon_update)
    for block, module in [
        ("attention", "qkv"),
        ("attention", "output"),
        ("mlp", "gate_up"),
        ("mlp", "down"),
    ]:
        expected["layers"][block][module]["kernel"] = False
    assert same == expected


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("mlp", ["swiglu", "gelu"])
def test_muon_knows_every_kernel_of_the_transformer(scan_layers, mlp):
    config = ModelConfig(
        vocab_size=13, embed_dim=16, num_layers=2, num_heads=4, num_kv_heads=2, mlp_dim=20,
        mlp=mlp, tie_embeddings=False, scan_layers=scan_layers, mlp_bias=True,
        attention_bias="all", norm="layernorm",
    )  # fmt: skip
    boxed = jax.eval_shape(LanguageModel(config).init, jax.random.key(0))
    params = unbox(boxed)
    axes = jax.tree.map(lambda b: b.names, boxed, is_leaf=lambda b: hasattr(b, "names"))
    dimensions = muon_dimension_numbers(params)
    is_leaf = lambda x: x is None or isinstance(x, tuple)  # noqa: E731
    found = set()
    for (path, names), numbers in zip(
        jax.tree_util.tree_leaves_with_path(axes, is_leaf=is_leaf),
        jax.tree.leaves(dimensions, is_leaf=is_leaf),
        strict=True,
    ):
        assert (numbers is not None) == (path[-1].key == "kernel"), path
        if numbers is not None:
            matrix_axes = [names[axis] for axis in (*numbers.reduction_axis, *numbers.output_axis)]
            assert {*names} - {*matrix_axes} <= {"layers", "fused"}, path
            assert ("embed" in matrix_axes[:1]) != ("embed" in matrix_axes[-1:]), path
            found.add(path[-2].key)
    assert found == {"qkv", "output", "down", "up" if mlp == "gelu" else "gate_up"}


# --- bad settings ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "adamv"}, "Did you mean 'adamw'"),
        ({"schedule": "cosin"}, "Did you mean 'cosine'"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0 must be not negative"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"warmup_steps": -1}, "warmup_steps=-1"),
        ({"final_learning_rate_ratio": 1.5}, "between 0 and 1"),
        ({"b2": 1.0}, "b2=1.0 must be at least 0, below 1"),
        ({"clip_norm": 0.0}, "clip_norm=0.0 must be positive"),
        ({"spike_factor": 0.5}, "spike_factor=0.5 must be at least 1"),
        ({"spike_warmup_steps": 0}, "spike_warmup_steps=0"),
        ({"name": "adafactor", "mu_dtype": "bfloat16"}, "no first moment"),
        ({"name": "lion", "nu_dtype": "bfloat16"}, "no full second moment"),
        ({"nu_dtype": "float16"}, "nu_dtype='float16' is unknown"),
    ],
)
def test_bad_settings_are_one_clear_line(changes, message):
    with pytest.raises(UserError, match=r"config\.optimizer") as error:
        OptimizerConfig(**changes)
    assert message in str(error.value) and "\n" not in str(error.value)
