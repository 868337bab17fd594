"""Codes and scales: levels and rounding by formula, error bounds, and a model on such a base."""

import dataclasses
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.errors import UserError
from llm_jax.models import LanguageModel, LoraConfig, ModelConfig
from llm_jax.models.lora import init_adapters, join, merge, split, unmerge
from llm_jax.models.quantize import NF4_LEVELS, Quantized, dequantise, quantize
from llm_jax.sharding import Named, unbox

CONFIG = ModelConfig(
    vocab_size=64, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, mlp_dim=48,
    lora=LoraConfig(rank=4),
)  # fmt: skip
KINDS = ("int8", "nf4")


@pytest.fixture(autouse=True)
def _exact_products():
    with jax.default_matmul_precision("highest"):
        yield


def make(**changes):
    """A model, its base, and adapters that have moved from their start."""
    model = LanguageModel(dataclasses.replace(CONFIG, **changes))
    base = unbox(jax.jit(model.init)(jax.random.key(0)))
    adapters = unbox(init_adapters(jax.random.key(1), model.config, base))
    rng = np.random.default_rng(0)
    moved = jax.tree.map(
        lambda x: jnp.asarray(0.1 * rng.normal(size=x.shape), jnp.float32), adapters
    )
    return model, base, moved


def make_tokens(batch=2, time=12):
    return jax.random.randint(jax.random.key(2), (batch, time), 0, CONFIG.vocab_size)


def project(kernel, name="up"):
    """A tree with this one projection."""
    return {"mlp": {name: {"kernel": kernel}}}


def compiled(base, kind):
    return jax.jit(quantize, static_argnums=1)(base, kind)


def round_trip(kernel, kind, name="up"):
    quantized = compiled(project(kernel, name), kind)["mlp"][name]["kernel"]
    return quantized, np.asarray(jax.jit(dequantise)(quantized))


def test_levels_are_the_papers_quantiles():
    """Section 3 of arXiv:2305.14314: eight quantiles below zero and nine from it on, each half
    evenly spaced in probability, of a normal distribution brought into [-1, 1]."""
    end = 1 - (1 / 30 + 1 / 32) / 2
    quantile = statistics.NormalDist().inv_cdf
    above = [quantile(p) for p in np.linspace(0.5, end, 9)]
    below = [-quantile(p) for p in np.linspace(0.5, end, 8)]
    levels = np.unique(below + above) / quantile(end)
    assert NF4_LEVELS.shape == (16,)
    np.testing.assert_allclose(NF4_LEVELS, levels, atol=1e-6)


def test_nf4_finds_the_nearest_level_of_each_block():
    kernel = np.random.default_rng(0).normal(size=(6, 50)).astype(np.float32)  # 4 blocks and 44
    quantized, actual = round_trip(jnp.asarray(kernel), "nf4")
    assert quantized.codes.shape == (5, 32) and quantized.codes.dtype == jnp.uint8
    assert quantized.scales.shape == (5,) and quantized.scales.dtype == jnp.float32
    blocks = np.pad(kernel.ravel(), (0, 20)).reshape(5, 64)
    scales = np.abs(blocks).max(axis=1, keepdims=True)
    nearest = np.abs(blocks[..., None] / scales[..., None] - NF4_LEVELS).argmin(axis=-1)
    expected = (NF4_LEVELS[nearest] * scales).ravel()[:300].reshape(6, 50)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)
    # Two codes to a byte, the first in the high bits.
    np.testing.assert_array_equal(quantized.codes, nearest[:, ::2] * 16 + nearest[:, 1::2])
    widest = np.diff(NF4_LEVELS).max() / 2
    assert np.all(np.abs(actual - kernel).ravel() <= (widest * scales).repeat(64)[:300] * 1.0001)


def test_levels_themselves_survive():
    kernel = jnp.asarray(np.tile(NF4_LEVELS, 8).reshape(4, 32)) * 3.0
    np.testing.assert_allclose(round_trip(kernel, "nf4")[1], kernel, rtol=1e-6)


def test_int8_by_formula():
    kernel = np.random.default_rng(0).normal(size=(4, 8, 20)).astype(np.float32)
    kernel[:, :, 3] = 0
    quantized, actual = round_trip(jnp.asarray(kernel), "int8", name="output")
    largest = np.abs(kernel).max(axis=(0, 1))
    scales = np.asarray(quantized.scales)
    np.testing.assert_allclose(scales, np.where(largest > 0, largest, 1) / 127, rtol=1e-6)
    np.testing.assert_array_equal(quantized.codes, np.round(kernel / scales))
    np.testing.assert_array_equal(actual, np.asarray(quantized.codes) * scales)
    assert np.abs(quantized.codes).max() == 127 and quantized.codes.dtype == jnp.int8
    assert np.all(np.abs(actual - kernel) <= scales / 2 * 1.0001)
    assert not np.any(actual[:, :, 3])


@pytest.mark.parametrize("kind", KINDS)
def test_stacked_layers_are_quantised_one_by_one(kind):
    kernel = jax.random.normal(jax.random.key(0), (3, 2, 10, 9))
    stacked, actual = round_trip(kernel, kind, "gate_up")
    assert stacked.ndim == 4 and stacked.shape == (2, 10, 9)
    for layer in range(3):
        alone, expected = round_trip(kernel[layer], kind, "gate_up")
        np.testing.assert_array_equal(stacked.codes[layer], alone.codes)
        np.testing.assert_array_equal(actual[layer], expected)


@pytest.mark.parametrize("kind", KINDS)
def test_only_projection_kernels_change(kind):
    model = LanguageModel(dataclasses.replace(CONFIG, tie_embeddings=False, attention_bias="all"))
    tree = jax.eval_shape(lambda: quantize(unbox(model.init(jax.random.key(0))), kind))
    names = {True: set(), False: set()}
    for path, leaf in jax.tree_util.tree_leaves_with_path(
        tree, is_leaf=lambda x: isinstance(x, Quantized)
    ):
        names[isinstance(leaf, Quantized)].add(path[-1].key)
    assert names == {True: {"kernel"}, False: {"embedding", "output", "bias", "scale"}}
    held = tree["layer_0"]["attention"]["output"]["kernel"]
    held_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(held))
    # 1,024 codes, of 8 bits with 32 scales, or of 4 bits with 16
    assert held_bytes == {"int8": 1024 + 32 * 4, "nf4": 512 + 16 * 4}[kind]


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scan, remat", [(False, "none"), (True, "full")])
def test_a_model_on_codes_is_the_model_on_their_values(kind, scan, remat):
    """Values, and the gradients of adapters and of what lies below the codes."""
    model, base, adapters = make(scan_layers=scan, remat=remat)
    quantized = compiled(base, kind)
    rounded = jax.jit(
        lambda tree: jax.tree.map(dequantise, tree, is_leaf=lambda x: isinstance(x, Quantized))
    )(quantized)

    def value_and_gradient(base):
        def total(adapters, table):
            params = join({**base, "embedding": table}, adapters)
            return jnp.mean(jnp.sin(3 * model.apply(params, make_tokens())[0]))

        return jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(adapters, base["embedding"])

    value, gradient = value_and_gradient(quantized)
    expected, expected_gradient = value_and_gradient(rounded)
    assert float(value) == pytest.approx(float(expected), abs=1e-6)
    assert any(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(gradient))
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, atol=5e-6), gradient, expected_gradient
    )


@pytest.mark.parametrize("kind", KINDS)
def test_codes_and_scales_have_no_gradient(kind):
    model, base, _ = make(num_layers=1)
    quantized = compiled(base, kind)

    def total(base):
        return jnp.mean(jnp.sin(model.apply(base, make_tokens())[0]))

    gradient = jax.jit(jax.grad(total, allow_int=True))(quantized)
    kernel = gradient["layer_0"]["attention"]["qkv"]["kernel"]
    assert kernel.codes.dtype == jax.dtypes.float0
    assert not np.any(kernel.scales)
    assert np.any(gradient["embedding"])


def test_the_backward_pass_keeps_no_dequantised_kernel():
    model, base, adapters = make(num_layers=1)

    def kept(base):
        def pull_back(base, adapters):
            return jax.vjp(lambda a: model.apply(join(base, a), make_tokens())[0], adapters)[1]

        shapes = jax.eval_shape(pull_back, base, adapters)
        return {leaf.shape for leaf in jax.tree.leaves(shapes) if leaf.dtype == jnp.float32}

    kernels = {(4, 8, 32), (2, 32, 48), (48, 32)}  # nothing trained lies below the first product
    assert kernels <= kept(base)
    assert not kernels & kept(jax.eval_shape(lambda: quantize(base, "nf4")))


@pytest.mark.parametrize("kind", KINDS)
def test_merging_dequantises_what_has_adapters(kind):
    model, base, adapters = make(lora=LoraConfig(rank=4, targets=("query", "down")))
    quantized = compiled(base, kind)
    params = join(quantized, adapters)
    merged = merge(params, model.config)
    apply = jax.jit(model.apply)
    np.testing.assert_allclose(
        apply(merged, make_tokens())[0], apply(params, make_tokens())[0], atol=1e-5
    )
    assert isinstance(merged["layer_0"]["mlp"]["gate_up"]["kernel"], Quantized)
    back = split(unmerge(merged, adapters, model.config))[1]
    for module, name in (("attention", "qkv"), ("mlp", "down")):
        np.testing.assert_allclose(
            back["layer_1"][module][name]["kernel"],
            dequantise(quantized["layer_1"][module][name]["kernel"]),
            atol=1e-6,
        )


@pytest.mark.parametrize("kind", KINDS)
def test_dora_starts_at_the_lengths_of_the_dequantised_columns(kind):
    model, base, _ = make(lora=LoraConfig(rank=4, dora=True, targets=("down",)))
    quantized = compiled(base, kind)
    fresh = unbox(init_adapters(jax.random.key(0), model.config, quantized))
    down = dequantise(quantized["layer_0"]["mlp"]["down"]["kernel"])
    np.testing.assert_allclose(
        fresh["layer_0"]["mlp"]["down"]["lora"]["down"]["magnitude"],
        np.linalg.norm(down, axis=0),
        rtol=1e-5,
    )


def test_boxes_name_the_dimensions_of_codes_and_scales():
    model = LanguageModel(dataclasses.replace(CONFIG, scan_layers=True))
    boxed = jax.eval_shape(model.init, jax.random.key(0))

    def names(kind):
        tree = jax.eval_shape(lambda: quantize(model.init(jax.random.key(0)), kind))
        kernel = tree["layers"]["block_0"]["attention"]["qkv"]["kernel"]
        assert isinstance(kernel.codes, Named)
        return kernel.codes.names, kernel.scales.names

    own = boxed["layers"]["block_0"]["attention"]["qkv"]["kernel"].names
    assert names("int8") == (own, ("layers", "heads", "fused", "head_dim"))
    assert names("nf4") == (("layers", "embed", "head_dim"), ("layers", "embed"))


def test_another_kernel_is_left_alone():
    head = {"reward_head": {"kernel": jnp.ones((4, 1))}}
    assert quantize(head, "int8")["reward_head"]["kernel"] is head["reward_head"]["kernel"]


def test_an_unknown_kind_is_refused():
    with pytest.raises(UserError, match="quantization 'int4' is unknown"):
        quantize({}, "int4")
