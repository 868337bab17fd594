"""The whole model: who sees whom, and that layout, looping and remat change no value."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.errors import UserError
from llm_jax.mesh import MeshConfig, make_mesh
from llm_jax.models import (
    LanguageModel,
    ModelConfig,
    RopeConfig,
    check_length,
    flops_per_token,
    parameter_count,
)
from llm_jax.sharding import parameter_shardings, unbox

CONFIG = ModelConfig(
    vocab_size=61,
    embed_dim=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    mlp_dim=48,
    qk_norm="head",
)


@pytest.fixture(autouse=True)
def _exact_products():
    with jax.default_matmul_precision("highest"):
        yield


def make(**changes):
    """A model and parameters in which nothing is zero or one by initialisation."""
    model = LanguageModel(dataclasses.replace(CONFIG, **changes))
    rng = np.random.default_rng(0)
    shapes = unbox(jax.eval_shape(model.init, jax.random.key(0)))
    normal = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
    return model, jax.tree.map(
        lambda x: jnp.asarray(1 + 0.1 * x if x.ndim == 1 else 0.2 * x), normal
    )


def make_tokens(batch=2, time=12):
    return jax.random.randint(jax.random.key(1), (batch, time), 0, CONFIG.vocab_size)


def stack(params, layers, repeat):
    """Parameters of the unrolled model in the layout of `scan_layers`."""
    rest = {name: value for name, value in params.items() if not name.startswith("layer_")}
    blocks = {
        f"block_{place}": jax.tree.map(
            lambda *x: jnp.stack(x), *(params[f"layer_{i}"] for i in range(place, layers, repeat))
        )
        for place in range(repeat)
    }
    return {**rest, "layers": blocks}


EVERYTHING = {
    "norm": "layernorm",
    "mlp": "geglu",
    "tie_embeddings": False,
    "attention_bias": "all",
    "mlp_bias": True,
    "attention_soft_cap": 5.0,
    "logits_soft_cap": 3.0,
    "rope": RopeConfig(fraction=0.5),
}


@pytest.mark.parametrize(
    "changes",
    [{}, EVERYTHING, {"mlp": "gelu", "qk_norm": "none", "attention_backend": "xla"}],
    ids=["default", "every_switch", "gelu_xla"],
)
def test_causality_by_gradient(changes):
    model, params = make(**changes)
    table = params["embedding"]
    tokens = jnp.arange(12)[None]  # all different, so that a row of the table is a place

    def one_place(table):
        # Untied on purpose: only the lookup may carry a gradient here.
        hidden, _ = model.apply({**params, "embedding": table}, tokens)
        return jnp.sum(hidden[0, 7] * jnp.arange(32))

    touched = jnp.any(jax.jit(jax.grad(one_place))(table)[:12] != 0, axis=-1)
    np.testing.assert_array_equal(touched, np.arange(12) <= 7)


@pytest.mark.parametrize("window", [None, 3])
def test_packed_equals_unpacked(window):
    model, params = make(window=window)
    apply = jax.jit(model.apply)
    first, second = make_tokens(1, 5), make_tokens(1, 12)[:, 5:]
    packed = jnp.concatenate([first, second, jnp.zeros((1, 3), jnp.int32)], axis=1)
    segment_ids = jnp.array([[1] * 5 + [2] * 7 + [0] * 3])
    positions = jnp.array([[*range(5), *range(7), *range(3)]])
    hidden, _ = apply(params, packed, positions, segment_ids)
    np.testing.assert_allclose(hidden[:, :5], apply(params, first)[0], atol=1e-5)
    np.testing.assert_allclose(hidden[:, 5:12], apply(params, second)[0], atol=1e-5)
    assert np.all(np.isfinite(hidden))


def test_padding_and_the_order_of_the_batch_change_nothing():
    model, params = make()
    apply = jax.jit(model.apply)
    tokens = make_tokens(3)
    hidden, _ = apply(params, tokens)

    order = jnp.array([2, 0, 1])
    np.testing.assert_allclose(apply(params, tokens[order])[0], hidden[order], atol=1e-6)

    padded = jnp.pad(tokens, [(0, 0), (0, 4)], constant_values=5)
    segment_ids = jnp.pad(jnp.ones_like(tokens), [(0, 0), (0, 4)])
    actual, _ = apply(params, padded, None, segment_ids)
    np.testing.assert_allclose(actual[:, :12], hidden, atol=1e-5)


def test_zero_output_kernel_gives_uniform_logits_and_caps_hold():
    model, params = make(tie_embeddings=False, logits_soft_cap=3.0)
    hidden, _ = jax.jit(model.apply)(params, make_tokens())
    zero = {**params, "output": jnp.zeros_like(params["output"])}
    probabilities = jax.nn.softmax(model.logits(zero, hidden))
    np.testing.assert_allclose(probabilities, 1 / CONFIG.vocab_size, rtol=1e-6)
    plain = hidden @ params["output"] * 10
    capped = model.logits({**params, "output": params["output"] * 10}, hidden)
    np.testing.assert_allclose(capped, 3 * np.tanh(plain / 3), atol=1e-4)


def loss_and_gradient(model, params):
    tokens = make_tokens()

    def total(params):
        hidden, _ = model.apply(params, tokens)
        return jnp.mean(jax.nn.logsumexp(model.logits(params, hidden), axis=-1) ** 2)

    return jax.jit(jax.value_and_grad(total))(params)


def assert_trees_close(actual, expected, **tolerance):
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, **tolerance), actual, expected)


@pytest.mark.parametrize("pattern", [None, ("local", "global")])
def test_scanned_equals_unrolled(pattern):
    layers = 4 if pattern else 2
    changes = {"num_layers": layers, "attention_pattern": pattern}
    changes["window"] = 3 if pattern else None
    model, params = make(**changes)
    scanned, own = make(**changes, scan_layers=True)
    mapped = stack(params, layers, len(pattern or [None]))
    assert jax.tree.map(jnp.shape, mapped) == jax.tree.map(jnp.shape, own)

    value, gradient = loss_and_gradient(model, params)
    scanned_value, scanned_gradient = loss_and_gradient(scanned, mapped)
    assert float(scanned_value) == pytest.approx(float(value), rel=1e-5)
    assert_trees_close(
        scanned_gradient, stack(gradient, layers, len(pattern or [None])), atol=2e-5, rtol=2e-4
    )


@pytest.mark.parametrize("scan", [False, True])
def test_remat_changes_what_is_saved_and_no_gradient(scan):
    plain, params = make(scan_layers=scan, num_layers=1)
    expected = loss_and_gradient(plain, params)
    saved = {"none": residual_size(plain, params)}
    for policy in ("full", "dots", "dots_no_batch"):
        model = LanguageModel(dataclasses.replace(plain.config, remat=policy))
        saved[policy] = residual_size(model, params)
        if policy == "full" or not scan:
            assert_trees_close(loss_and_gradient(model, params), expected, atol=1e-5, rtol=1e-4)
    assert saved["full"] < saved["dots_no_batch"] < saved["dots"] < saved["none"]


def residual_size(model, params):
    """Values that the forward pass hands to the backward pass."""
    _, pull_back = jax.eval_shape(
        lambda p: jax.vjp(lambda p: model.apply(p, make_tokens())[0], p), params
    )
    return sum(leaf.size for leaf in jax.tree.leaves(pull_back))


def test_dropout_acts_only_with_a_key():
    model, params = make(residual_dropout=0.5, attention_dropout=0.5, num_layers=1)
    plain, _ = make(num_layers=1)
    tokens = make_tokens()
    apply = jax.jit(lambda rng: model.apply(params, tokens, rng=rng)[0])
    np.testing.assert_allclose(apply(None), jax.jit(plain.apply)(params, tokens)[0], atol=1e-5)
    first, same, other = (apply(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, same)
    assert np.abs(first - other).max() > 0.1


def test_bfloat16_keeps_float32_parameters_and_agrees_roughly():
    model, params = make(dtype="bfloat16")
    exact, _ = make()
    hidden, _ = jax.jit(model.apply)(params, make_tokens())
    assert hidden.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert model.logits(params, hidden).dtype == jnp.float32
    expected, _ = jax.jit(exact.apply)(params, make_tokens())
    np.testing.assert_allclose(hidden.astype(jnp.float32), expected, atol=0.1)


def test_a_model_for_other_devices_is_initialised_on_any_mesh():
    """The TPU's kernel wants rows for every shard; a model is made of one token."""
    model = LanguageModel(dataclasses.replace(CONFIG, scan_layers=True), "tpu")
    assert model.backend == "splash"
    with jax.set_mesh(make_mesh(MeshConfig(data=1, fsdp=-1))):
        boxed = jax.eval_shape(model.init, jax.random.key(0))
    assert unbox(boxed)["embedding"].shape == (CONFIG.vocab_size, CONFIG.embed_dim)


def test_init_scales():
    config = dataclasses.replace(CONFIG, embed_dim=64, mlp_dim=256, scan_layers=True)
    params = unbox(jax.jit(LanguageModel(config).init)(jax.random.key(0)))
    block = params["layers"]["block_0"]
    assert np.std(params["embedding"]) == pytest.approx(0.02, rel=0.05)
    assert np.std(block["attention"]["qkv"]["kernel"]) == pytest.approx(64**-0.5, rel=0.05)
    assert np.std(block["mlp"]["down"]["kernel"]) == pytest.approx(256**-0.5 / 2, rel=0.05)
    output = block["attention"]["output"]["kernel"]
    assert np.std(output) == pytest.approx(64**-0.5 / 2, rel=0.05)


def test_mesh_changes_no_value():
    model, params = make(vocab_size=64)
    tokens = make_tokens(8)
    expected = jax.jit(model.apply)(params, tokens)[0]
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices()[:8])
    shardings = parameter_shardings(mesh, jax.eval_shape(model.init, jax.random.key(0)))
    with jax.set_mesh(mesh):
        split = jax.device_put(params, shardings)
        actual = jax.jit(model.apply)(split, tokens)[0]
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_parameters_and_flops_of_a_model_counted_by_hand():
    # qkv 32·(4+2·2)·8, output 32·32, gated MLP 3·32·48, two norms and the two of q and k
    layer = 32 * 8 * 8 + 32 * 32 + 3 * 32 * 48 + 2 * 32 + 2 * 8
    assert parameter_count(CONFIG) == 61 * 32 + 2 * layer + 32
    matrices = 2 * (layer - 2 * 32 - 2 * 8) + 61 * 32
    # a row of 9: queries meet 1..9 keys, 5 on average, in each of q·k and weights·v
    attention = 2 * (2 * 2 * 4 * 8 * 5)
    assert flops_per_token(CONFIG, 9) == 6 * matrices + 3 * attention
    windowed = dataclasses.replace(CONFIG, window=2)  # 1, 2, 2, ... keys: 17 / 9 on average
    expected = 6 * matrices + 3 * attention / 5 * 17 / 9
    assert flops_per_token(windowed, 9) == pytest.approx(expected)
    untied = dataclasses.replace(CONFIG, tie_embeddings=False)
    assert parameter_count(untied) == parameter_count(CONFIG) + 61 * 32
    assert flops_per_token(untied, 9) == flops_per_token(CONFIG, 9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 3, "num_kv_heads": 2, "embed_dim": 30}, "num_kv_heads=2"),
        ({"embed_dim": 30}, "embed_dim=30"),
        ({"head_dim": 7}, "odd"),
        ({"num_layers": 0}, "num_layers=0 must be positive"),
        ({"attention_dropout": 1.0}, "attention_dropout"),
        ({"logits_soft_cap": -1.0}, "logits_soft_cap"),
        ({"window": 4, "attention_pattern": ("global",)}, "do not fit"),
        ({"attention_pattern": ("local", "global")}, "do not fit"),
        ({"window": 4, "attention_pattern": ("local", "wide")}, "must be a tuple"),
        (
            {"window": 4, "attention_pattern": ("local", "global"), "num_layers": 3,
             "scan_layers": True},
            "multiple of",
        ),
    ],
)  # fmt: skip
def test_bad_settings(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(CONFIG, **changes)


def test_vocabulary_and_length_are_checked():
    with pytest.raises(UserError, match="vocab_size"):
        LanguageModel(dataclasses.replace(CONFIG, vocab_size=None))
    config = dataclasses.replace(CONFIG, max_length=64)
    check_length(config, 64)
    with pytest.raises(UserError, match="length 65 is past the positions"):
        check_length(config, 65)


def test_padding_past_the_table_of_positions_reaches_no_token():
    config = dataclasses.replace(CONFIG, position="learned", max_length=6)
    model = LanguageModel(config)
    params = unbox(model.init(jax.random.key(0)))
    tokens = jnp.arange(10)[None] % 61
    segment_ids = (jnp.arange(10) < 5).astype(jnp.int32)[None]
    padded, _ = model.apply(params, tokens, segment_ids=segment_ids)
    alone, _ = model.apply(params, tokens[:, :5])
    np.testing.assert_allclose(padded[:, :5], alone, atol=1e-5)
    assert np.isfinite(padded).all()
