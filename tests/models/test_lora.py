"""Adapters in the model: against peft, and that looping, merging and meshes change no value."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llm_jax import optim
from llm_jax.errors import UserError
from llm_jax.mesh import MeshConfig, make_mesh
from llm_jax.models import (
    LanguageModel,
    LoraConfig,
    ModelConfig,
    adapter_count,
    flops_per_token,
    init_cache,
    parameter_count,
)
from llm_jax.models.lora import init_adapters, merge, split, unmerge
from llm_jax.models.quantize import quantize
from llm_jax.sharding import parameter_shardings, unbox
from llm_jax.types import join
from tests.golden.llama import llama_adapters, llama_params

GOLDEN = Path(__file__).parents[1] / "golden" / "lora.npz"
KINDS = {
    "standard": LoraConfig(rank=4, alpha=12.0),
    "rank_stabilised": LoraConfig(rank=4, alpha=12.0, rank_stabilised=True),
    "dora": LoraConfig(rank=4, alpha=12.0, dora=True),
}
CONFIG = ModelConfig(
    vocab_size=64, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, mlp_dim=48,
    lora=KINDS["standard"],
)  # fmt: skip


@pytest.fixture(autouse=True)
def _exact_products():
    with jax.default_matmul_precision("highest"):
        yield


def make(lora=KINDS["standard"], **changes):
    """A model and its base."""
    model = LanguageModel(dataclasses.replace(CONFIG, lora=lora, **changes))
    return model, unbox(jax.jit(model.init)(jax.random.key(0)))


def start(model, base):
    """Adapters as training begins with them."""
    return unbox(jax.jit(lambda base: init_adapters(jax.random.key(1), model.config, base))(base))


def perturb(adapters):
    """Adapters in which no leaf is as it began."""
    rng = np.random.default_rng(0)

    def moved(path, x):
        noise = jnp.asarray(rng.normal(size=x.shape), jnp.float32)
        return x * (1 + 0.2 * noise) if path[-1].key == "magnitude" else 0.1 * noise

    return jax.tree_util.tree_map_with_path(moved, adapters)


def make_tokens(batch=2, time=12):
    return jax.random.randint(jax.random.key(2), (batch, time), 0, CONFIG.vocab_size)


def hidden_of(model, params, tokens=None):
    tokens = make_tokens() if tokens is None else tokens
    return jax.jit(model.apply)(params, tokens)[0]


def assert_trees_close(actual, expected, **tolerance):
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, **tolerance), actual, expected)


def leaf_names(tree):
    return {
        "/".join(key.key for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)
    }


# --- against peft ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_peft(kind):
    golden = dict(np.load(GOLDEN))

    def under(folder):
        return {n.removeprefix(folder): x for n, x in golden.items() if n.startswith(folder)}

    model = LanguageModel(dataclasses.replace(CONFIG, tie_embeddings=False, lora=KINDS[kind]))
    base = llama_params(under("base/"), model.config)
    params = join(base, llama_adapters(under(f"{kind}/"), model.config))
    tokens = jnp.asarray(golden["input_ids"])
    for tree, name in ((base, "base"), (params, kind), (merge(params, model.config), kind)):
        logits = model.logits(tree, hidden_of(model, tree, tokens))
        np.testing.assert_allclose(logits, golden[f"{name}_logits"], atol=1e-4)
    assert np.abs(golden[f"{kind}_logits"] - golden["base_logits"]).max() > 1


# --- the tree -------------------------------------------------------------------------------------


@pytest.mark.parametrize("scan", [False, True])
def test_fresh_adapters_change_no_bit(scan):
    model, base = make(scan_layers=scan, attention_bias="all")
    params = join(base, start(model, base))
    np.testing.assert_array_equal(hidden_of(model, params), hidden_of(model, base))


def test_fresh_dora_changes_nothing():
    model, base = make(KINDS["dora"])
    adapters = start(model, base)
    np.testing.assert_allclose(
        hidden_of(model, join(base, adapters)), hidden_of(model, base), atol=1e-5
    )
    kernel = base["layer_1"]["attention"]["qkv"]["kernel"]
    magnitude = adapters["layer_1"]["attention"]["qkv"]["lora"]["value"]["magnitude"]
    np.testing.assert_allclose(magnitude, np.linalg.norm(kernel[:, 3:], axis=2), rtol=1e-5)


def test_shapes_and_deviation():
    model, base = make(LoraConfig(rank=3), scan_layers=True, embed_dim=64)
    block = start(model, base)["layers"]["block_0"]
    shapes = jax.tree.map(jnp.shape, block)
    # K = 2 heads that G = 2 query heads of dimension 16 share
    assert shapes["attention"]["qkv"]["lora"] == {
        "query": {"a": (2, 64, 3), "b": (2, 3, 2, 2, 16)},
        "key": {"a": (2, 64, 3), "b": (2, 3, 2, 1, 16)},
        "value": {"a": (2, 64, 3), "b": (2, 3, 2, 1, 16)},
    }
    assert shapes["attention"]["output"]["lora"] == {
        "output": {"a": (2, 4, 16, 3), "b": (2, 3, 64)}
    }
    assert shapes["mlp"]["gate_up"]["lora"]["up"] == {"a": (2, 64, 3), "b": (2, 3, 1, 48)}
    assert shapes["mlp"]["down"]["lora"] == {"down": {"a": (2, 48, 3), "b": (2, 3, 64)}}
    lows = [x for x in jax.tree.leaves(block["attention"]) if np.any(x != 0)]
    assert np.std(np.concatenate([x.ravel() for x in lows])) == pytest.approx(192**-0.5, rel=0.05)
    queries = block["attention"]["qkv"]["lora"]
    assert np.all(queries["query"]["a"] != queries["key"]["a"])


def test_shapes_do_for_a_base_and_other_targets_change_no_start():
    model, base = make()
    shapes = jax.eval_shape(lambda: base)
    some = dataclasses.replace(CONFIG, lora=dataclasses.replace(CONFIG.lora, targets=("value",)))
    narrow = unbox(init_adapters(jax.random.key(1), some, shapes))
    wide = start(model, base)
    assert leaf_names(narrow) == {
        f"layer_{i}/attention/qkv/lora/value/{leaf}" for i in range(2) for leaf in "ab"
    }
    for layer in narrow:
        a, same = (tree[layer]["attention"]["qkv"]["lora"]["value"]["a"] for tree in (narrow, wide))
        np.testing.assert_allclose(a, same, rtol=1e-6)


@pytest.mark.parametrize(
    "targets, scan, expected",
    [
        (("layer_1/attention/(query|output)",), False,
         {"layer_1/attention/qkv/lora/query", "layer_1/attention/output/lora/output"}),
        (("layer_0/mlp/gate", "down$"), False,
         {"layer_0/mlp/gate_up/lora/gate", "layer_0/mlp/down/lora/down",
          "layer_1/mlp/down/lora/down"}),
        (("layers/block_0/mlp/up",), True, {"layers/block_0/mlp/gate_up/lora/up"}),
    ],
)  # fmt: skip
def test_targets(targets, scan, expected):
    model, base = make(LoraConfig(targets=targets), scan_layers=scan)
    names = leaf_names(start(model, base))
    assert names == {f"{name}/{leaf}" for name in expected for leaf in "ab"}


def test_a_plain_mlp_has_up_and_down():
    model, base = make(LoraConfig(targets=("mlp",)), mlp="gelu", num_layers=1)
    params = join(base, perturb(start(model, base)))
    assert set(params["layer_0"]["mlp"]["up"]["lora"]) == {"up"}
    merged = merge(params, model.config)
    np.testing.assert_allclose(hidden_of(model, merged), hidden_of(model, params), atol=1e-5)


def test_split_and_join_are_inverse_and_the_base_is_the_model_without_adapters():
    model, base = make()
    adapters = start(model, base)
    params = join(base, adapters)
    assert jax.tree.structure(split(params)) == jax.tree.structure((adapters, base))
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (split(params)[1], base)), strict=True))
    off, _ = make(lora=None)
    np.testing.assert_array_equal(hidden_of(off, base), hidden_of(model, base))
    with pytest.raises(ValueError, match="'a' is in both trees"):
        join(params, adapters)
    with pytest.raises(UserError, match=r"model\.lora is None"):
        off.apply(params, make_tokens())
    with pytest.raises(UserError, match=r"model\.lora is None"):
        merge(params, off.config)


@pytest.mark.parametrize(
    "kind, scan",
    [("standard", False), ("standard", True), ("rank_stabilised", True), ("dora", True)],
)
def test_merged_is_applied_and_unmerged_is_what_it_was(kind, scan):
    model, base = make(KINDS[kind], scan_layers=scan)
    adapters = perturb(start(model, base))
    params = join(base, adapters)
    merged = jax.jit(lambda params: merge(params, model.config))(params)
    assert jax.tree.structure(merged) == jax.tree.structure(base)
    expected = hidden_of(model, params)
    np.testing.assert_allclose(hidden_of(model, merged), expected, atol=1e-5)
    assert np.abs(hidden_of(model, base) - expected).max() > 0.1
    if kind == "dora":
        with pytest.raises(UserError, match="cannot be unmerged"):
            unmerge(merged, adapters, model.config)
    else:
        assert_trees_close(unmerge(merged, adapters, model.config), params, atol=1e-6)


# --- gradients ------------------------------------------------------------------------------------


def total_of(model, params):
    hidden, _ = model.apply(params, make_tokens())
    return jnp.mean(jax.nn.logsumexp(model.logits(params, hidden), axis=-1) ** 2)


def test_gradients_are_those_through_merged_weights():
    """dA = s·dW·Bᵀ and dB = s·Aᵀ·dW."""
    model, base = make(num_layers=1)
    adapters = perturb(start(model, base))
    gradient = jax.jit(jax.grad(lambda a: total_of(model, join(base, a))))(adapters)
    merged = merge(join(base, adapters), model.config)
    through = jax.jit(jax.grad(lambda p: total_of(model, p)))(merged)
    attention, own = adapters["layer_0"]["attention"], gradient["layer_0"]["attention"]
    d_kernels = through["layer_0"]["attention"]
    s = model.config.lora.scale

    part, d_part = attention["qkv"]["lora"]["query"], own["qkv"]["lora"]["query"]
    d_query = d_kernels["qkv"]["kernel"][:, :2]
    expected = s * jnp.einsum("kgdh,rkgh->dr", d_query, part["b"])
    np.testing.assert_allclose(d_part["a"], expected, rtol=1e-3, atol=1e-6)
    expected = s * jnp.einsum("kgdh,dr->rkgh", d_query, part["a"])
    np.testing.assert_allclose(d_part["b"], expected, rtol=1e-3, atol=1e-6)

    part, d_part = attention["output"]["lora"]["output"], own["output"]["lora"]["output"]
    expected = s * jnp.einsum("nhd,rd->nhr", d_kernels["output"]["kernel"], part["b"])
    np.testing.assert_allclose(d_part["a"], expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ["standard", "rank_stabilised"])
def test_gradients_are_finite_differences(kind):
    model, base = make(KINDS[kind], num_layers=1)
    adapters = perturb(start(model, base))
    total = jax.jit(lambda a: total_of(model, join(base, a)))
    gradient = jax.jit(jax.grad(total))(adapters)
    direction = jax.tree.map(lambda g: g / optax.tree.norm(gradient), gradient)
    step = 5e-3
    up, down = (
        total(jax.tree.map(lambda a, d, s=sign: a + s * step * d, adapters, direction))
        for sign in (1, -1)
    )
    measured = float(up - down) / (2 * step)
    assert measured == pytest.approx(float(optax.tree.norm(gradient)), rel=1e-2)


# --- looping, decoding, meshes, sizes, dropout ----------------------------------------------------


def stack(tree, layers=2):
    """The unrolled tree in the layout of `scan_layers`."""
    rest = {name: value for name, value in tree.items() if not name.startswith("layer_")}
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *(tree[f"layer_{i}"] for i in range(layers)))
    return {**rest, "layers": {"block_0": stacked}}


@pytest.mark.parametrize("kind, remat", [("standard", "none"), ("dora", "full")])
def test_scanned_equals_unrolled(kind, remat):
    model, base = make(KINDS[kind])
    adapters = perturb(start(model, base))
    scanned, _ = make(KINDS[kind], scan_layers=True, remat=remat)

    def value_and_gradient(model, base, adapters):
        return jax.jit(jax.value_and_grad(lambda a: total_of(model, join(base, a))))(adapters)

    value, gradient = value_and_gradient(model, base, adapters)
    own, own_gradient = value_and_gradient(scanned, stack(base), stack(adapters))
    assert float(own) == pytest.approx(float(value), rel=1e-5)
    assert_trees_close(own_gradient, stack(gradient), atol=2e-5, rtol=2e-4)
    assert_trees_close(
        merge(stack(join(base, adapters)), scanned.config),
        stack(merge(join(base, adapters), model.config)),
        atol=1e-6,
    )


def test_decoding_with_a_cache_equals_the_whole_row():
    model, base = make(KINDS["dora"])
    params = join(base, perturb(start(model, base)))
    tokens = make_tokens()
    expected = hidden_of(model, params, tokens)
    apply = jax.jit(lambda cache, tokens: model.apply(params, tokens, cache=cache))
    prefill, cache = apply(init_cache(model.config, 2, 12), tokens[:, :9])
    steps = [prefill]
    for place in range(9, 12):
        hidden, cache = apply(cache, tokens[:, place : place + 1])
        steps.append(hidden)
    np.testing.assert_allclose(jnp.concatenate(steps, axis=1), expected, atol=1e-5)


@pytest.mark.parametrize("kind, bits", [("dora", None), ("dora", "int8"), ("standard", "nf4")])
def test_eight_devices_equal_one(kind, bits):
    model, base = make(KINDS[kind], scan_layers=True)
    adapters = perturb(start(model, base))

    def init(rng):
        boxed = model.init(rng)
        fresh = init_adapters(rng, model.config, boxed)
        return join(boxed if bits is None else quantize(boxed, bits), fresh)

    base = base if bits is None else jax.jit(lambda base: quantize(base, bits))(base)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices()[:8])
    shardings = parameter_shardings(mesh, jax.eval_shape(init, jax.random.key(0)))
    a = shardings["layers"]["block_0"]["attention"]["qkv"]["lora"]["query"]["a"]
    b = shardings["layers"]["block_0"]["attention"]["qkv"]["lora"]["query"]["b"]
    assert (tuple(a.spec), tuple(b.spec)) == (
        ("stage", ("fsdp", "context"), None), ("stage", None, "tensor", None, None)
    )  # fmt: skip
    tokens = make_tokens(8)

    def value_and_gradient(adapters, base):
        hidden, _ = model.apply(join(base, adapters), tokens)
        return jnp.mean(jnp.sin(hidden)), hidden

    function = jax.jit(jax.value_and_grad(value_and_gradient, has_aux=True))
    (_, expected), gradient = function(adapters, base)
    adapter_shardings, base_shardings = split(shardings)
    with jax.set_mesh(mesh):
        moved = jax.device_put(adapters, adapter_shardings), jax.device_put(base, base_shardings)
        (_, actual), moved_gradient = function(*moved)
    np.testing.assert_allclose(actual, expected, atol=1e-5)
    assert_trees_close(moved_gradient, gradient, atol=1e-5)


@pytest.mark.parametrize("mesh", [MeshConfig(2, 4, 1), MeshConfig(4, 1, 2)], ids=["fsdp", "tensor"])
def test_adapters_alone_fit_a_mesh_that_splits_half_of_them(mesh):
    model, _ = make(KINDS["dora"], scan_layers=True)
    boxed = jax.eval_shape(
        lambda rng: init_adapters(rng, model.config, model.init(rng)), jax.random.key(0)
    )
    shardings = parameter_shardings(make_mesh(mesh, jax.devices()[:8]), boxed)
    assert {x.is_fully_replicated for x in jax.tree.leaves(shardings)} == {False, True}


def test_adapters_are_counted_by_themselves_and_flops_know_what_is_frozen():
    plain = dataclasses.replace(CONFIG, lora=None)
    config = dataclasses.replace(CONFIG, lora=LoraConfig(rank=4, targets=("query", "down")))
    added = 2 * (4 * (32 + 32) + 4 * (48 + 32))
    assert parameter_count(config) == parameter_count(plain)
    assert (adapter_count(config), adapter_count(plain)) == (added, 0)
    matrices = parameter_count(plain) - 5 * 32  # all but the norms; the tied table counts once
    saved = 2 * matrices - 6 * added
    assert flops_per_token(config, 9) == flops_per_token(plain, 9) - saved


def test_optimiser_leaves_magnitudes_undecayed_and_gives_adapters_to_adam():
    model, base = make(KINDS["dora"], num_layers=1)
    adapters = start(model, base)
    decayed = jax.tree.map(lambda flag: flag or None, optim.decay_mask(adapters))
    assert {name.rsplit("/", 1)[1] for name in leaf_names(decayed)} == {"a", "b"}
    dimensions = optim.muon_dimension_numbers(adapters)
    assert all(leaf is None for leaf in jax.tree.leaves(dimensions, is_leaf=lambda x: x is None))


def test_dropout_in_the_model_needs_a_key_and_differs_by_layer_and_call():
    lora = dataclasses.replace(KINDS["standard"], dropout=0.5)
    model, base = make(lora)
    params = join(base, perturb(start(model, base)))
    apply = jax.jit(lambda rng: model.apply(params, make_tokens(), rng=rng)[0])
    plain = LanguageModel(CONFIG)
    np.testing.assert_array_equal(apply(None), hidden_of(plain, params))
    first, same, other = (apply(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, same)
    assert np.abs(first - other).max() > 0.1


def test_a_target_that_matches_nothing_lists_the_names_of_one_layer():
    model, base = make(LoraConfig(targets=("query", "q_proj")))
    with pytest.raises(UserError, match="'q_proj' matches no part") as caught:
        init_adapters(jax.random.key(0), model.config, base)
    assert "layer_0/attention/query" in str(caught.value)
    assert "layer_1" not in str(caught.value)
    with pytest.raises(UserError, match="matches no part"):
        adapter_count(model.config)
