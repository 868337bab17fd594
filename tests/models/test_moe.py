"""Mixture of experts against a loop over tokens; paths, meshes, padding and neighbours."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import optim, sharding
from llm_jax.errors import UserError
from llm_jax.mesh import MeshConfig, make_mesh
from llm_jax.models import ModelConfig, flops_per_token, parameter_count
from llm_jax.models.moe import MixtureOfExperts, MoeConfig
from llm_jax.models.size import active_parameter_count
from llm_jax.sharding import unbox

B, T, D, M, E, K = 4, 9, 8, 16, 4, 2
ROOMY = E / K  # a capacity factor with which an expert has room for every token


@pytest.fixture(autouse=True)
def _exact_products():
    with jax.default_matmul_precision("highest"):
        yield


def make(kind="swiglu", dtype="float32", **settings):
    config = MoeConfig(num_experts=E, experts_per_token=K, **settings)
    module = MixtureOfExperts(config, kind, D, M, dtype, 0.5)
    x, real = inputs()
    boxed = module.init(jax.random.key(0), x, real, dropless=False)["params"]
    params = unbox(boxed)
    params["router"] *= 3  # clear preferences, so that some experts overflow
    return module, params


def inputs(batch=B):
    """Rows with padding behind, in front and in between; the last one is padding throughout."""
    x = jax.random.normal(jax.random.key(1), (batch, T, D))
    real = np.ones((batch, T), bool)
    real[0, 6:] = False
    real[1, [0, 3]] = False
    real[-1] = False
    return x, jnp.asarray(real)


def apply(module, params, x, real, dropless=False):
    return jax.jit(lambda p, x, r: module.apply({"params": p}, x, r, dropless=dropless))(
        params, x, real
    )


# --- a loop over tokens ---------------------------------------------------------------------------


def expert(params, kind, e, x):
    """One expert's MLP of one token, in NumPy."""
    if kind == "gelu_erf":
        h = x @ params["up"][e]
        h = h * 0.5 * (1 + np.array([math.erf(value / math.sqrt(2)) for value in h]))
    else:
        gate, up = x @ params["gate_up"][e, 0], x @ params["gate_up"][e, 1]
        h = gate / (1 + np.exp(-gate)) * up
    return h @ params["down"][e]


def loop(config, kind, params, x, real):
    """(out, sums): the same, token by token, in float64."""
    params = {name: np.asarray(value, np.float64) for name, value in params.items()}
    x, out = np.asarray(x, np.float64), np.zeros(x.shape)
    capacity = math.inf
    if config.capacity_factor is not None:
        capacity = math.ceil(config.capacity_factor * K * T / E)
    sums = {"counts": np.zeros(E), "probabilities": np.zeros(E), "z": 0.0, "tokens": 0,
            "dropped": 0}  # fmt: skip
    for b in range(x.shape[0]):
        chosen = {}
        for t in np.flatnonzero(real[b]):
            logits = x[b, t] @ params["router"]
            probabilities = np.exp(logits) / np.exp(logits).sum()
            best = np.argsort(-probabilities)[:K]
            weights = probabilities[best]
            if config.normalize_weights:
                weights = weights / weights.sum()
            chosen[t] = best, weights
            sums["tokens"] += 1
            sums["probabilities"] += probabilities
            sums["z"] += np.log(np.exp(logits).sum()) ** 2
        taken = np.zeros(E)
        for k in range(K):
            for t, (best, weights) in chosen.items():
                sums["counts"][best[k]] += 1
                taken[best[k]] += 1
                if taken[best[k]] > capacity:
                    sums["dropped"] += 1
                else:
                    out[b, t] += weights[k] * expert(params, kind, best[k], x[b, t])
    return out, sums


@pytest.mark.parametrize("kind", ["swiglu", "gelu_erf"])
@pytest.mark.parametrize("settings", [
    {}, {"normalize_weights": False}, {"capacity_factor": ROOMY}, {"capacity_factor": 0.8},
    {"capacity_factor": 0.8, "normalize_weights": False},
])  # fmt: skip
def test_output_and_sums_equal_those_of_a_loop_over_tokens(kind, settings):
    module, params = make(kind, **settings)
    x, real = inputs()
    out, routing = apply(module, params, x, real)
    expected, sums = loop(module.config, kind, params, x, np.asarray(real))
    np.testing.assert_allclose(out, expected, atol=1e-5)
    for name, value in sums.items():
        np.testing.assert_allclose(getattr(routing, name), value, rtol=1e-5, err_msg=name)
    assert bool(sums["dropped"]) == (settings.get("capacity_factor") == 0.8)


def test_decoding_drops_no_token_whatever_the_capacity():
    module, params = make(capacity_factor=0.1)
    free, _ = make()
    x, real = inputs()
    out, routing = apply(module, params, x, real, dropless=True)
    np.testing.assert_array_equal(out, apply(free, params, x, real)[0])
    assert routing.dropped == 0


def test_sums_of_layers_add_up():
    module, params = make()
    _, routing = apply(module, params, *inputs())
    twice = routing + routing
    np.testing.assert_array_equal(twice.counts, 2 * routing.counts)
    assert twice.z == 2 * routing.z and twice.tokens == 2 * routing.tokens


# --- gradients ------------------------------------------------------------------------------------


def total(module, params, x, real):
    """A scalar that every output and every sum enters."""
    out, routing = module.apply({"params": params}, x, real, dropless=False)
    value = jnp.sum(jnp.sin(out.astype(jnp.float32))) + routing.z / 10
    return value + jnp.sum(routing.probabilities * jnp.arange(E)) / 10, (out, routing)


def dense_total(module, params, x, real):
    """The same by every expert for every token, weighted by 0 where it was not chosen."""
    logits = x @ params["router"]
    probabilities = jax.nn.softmax(logits, axis=-1)
    kept = probabilities >= jnp.sort(probabilities, axis=-1)[..., -K, None]
    weights = jnp.where(kept & real[..., None], probabilities, 0)
    weights = weights / jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), 1e-9)
    both = jnp.einsum("btd,efdm->betfm", x, params["gate_up"])
    h = jax.nn.silu(both[..., 0, :]) * both[..., 1, :]
    out = jnp.einsum("betm,emd,bte->btd", h, params["down"], weights)
    z = jnp.sum(jnp.where(real, jax.nn.logsumexp(logits, axis=-1) ** 2, 0))
    summed = jnp.sum(jnp.where(real[..., None], probabilities, 0), axis=(0, 1))
    value = jnp.sum(jnp.sin(out)) + z / 10 + jnp.sum(summed * jnp.arange(E)) / 10
    return value, out


def value_and_gradients(function, module, params, x, real):
    differentiated = jax.value_and_grad(function, argnums=(1, 2), has_aux=True)
    return jax.jit(differentiated, static_argnums=0)(module, params, x, real)


@pytest.mark.parametrize("capacity_factor", [None, ROOMY])
def test_gradients_equal_those_of_every_expert_for_every_token(capacity_factor):
    module, params = make(capacity_factor=capacity_factor)
    (value, _), gradients = value_and_gradients(total, module, params, *inputs())
    (expected, _), wanted = value_and_gradients(dense_total, module, params, *inputs())
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, atol=1e-5), gradients, wanted)
    assert all(float(jnp.max(jnp.abs(leaf))) > 0.01 for leaf in jax.tree.leaves(gradients))


def test_bfloat16_is_near():
    module, params = make()
    rounded, _ = make(dtype="bfloat16")
    x, real = inputs()
    x = x.astype(jnp.bfloat16)
    _, expected = value_and_gradients(total, module, params, x.astype(jnp.float32), real)
    (_, (out, _)), gradients = value_and_gradients(total, rounded, params, x, real)
    assert out.dtype == jnp.bfloat16
    for gradient, wanted in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True):
        error = jnp.linalg.norm(gradient.astype(jnp.float32) - wanted) / jnp.linalg.norm(wanted)
        assert error < 0.03


# --- meshes ---------------------------------------------------------------------------------------

MESHES = [MeshConfig(8), MeshConfig(2, 1, 1, 4), MeshConfig(1, 2, 2, 2)]


@pytest.fixture(scope="module")
def on_one_device():
    with jax.default_matmul_precision("highest"):
        results = {}
        for factor in (None, 0.8):
            module, params = make(capacity_factor=factor)
            results[factor] = value_and_gradients(total, module, params, *inputs(8))
        return results


@pytest.mark.parametrize("capacity_factor", [None, 0.8])
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_no_mesh_changes_values_or_gradients(on_one_device, capacity_factor, mesh):
    module, params = make(capacity_factor=capacity_factor)
    mesh = make_mesh(mesh)
    x, real = inputs(8)
    boxed = jax.eval_shape(
        lambda: module.init(jax.random.key(0), x[:1], real[:1], dropless=True)["params"]
    )
    params = jax.device_put(params, sharding.parameter_shardings(mesh, boxed))
    x, real = jax.device_put((x, real), sharding.batch_sharding(mesh))
    with jax.set_mesh(mesh):
        got = value_and_gradients(total, module, params, x, real)
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, atol=2e-5, rtol=2e-5),
        got,
        on_one_device[capacity_factor],
    )


def test_a_single_row_needs_not_fill_the_mesh():
    module, params = make()
    x, real = (a[:1] for a in inputs())
    expected, _ = apply(module, params, x, real)
    with jax.set_mesh(make_mesh(MeshConfig(2, 1, 1, 4))):
        out, _ = apply(module, params, x, real)
    assert out.shape == x.shape
    np.testing.assert_allclose(out, expected, atol=1e-6)


def test_tokens_go_to_their_experts_by_all_to_all():
    """The partitioner makes it out of two layouts; nothing else of the activations moves."""
    module, params = make(capacity_factor=1.0)
    mesh = make_mesh(MeshConfig(2, 1, 1, 4))
    x, real = inputs(8)
    boxed = jax.eval_shape(
        lambda: module.init(jax.random.key(0), x[:1], real[:1], dropless=True)["params"]
    )
    where, rows = sharding.parameter_shardings(mesh, boxed), sharding.batch_sharding(mesh)
    with jax.set_mesh(mesh):
        forward = jax.jit(
            lambda p, x, r: module.apply({"params": p}, x, r, dropless=False)[0],
            in_shardings=(where, rows, rows),
            out_shardings=rows,
        )
        text = forward.lower(params, x, real).compile().as_text()
    assert "all-to-all" in text
    assert "all-gather" not in text and "all-reduce" not in text


def test_kernels_travel_in_the_dtype_of_the_products_and_gradients_in_float32():
    module, params = make(dtype="bfloat16")
    x, real = inputs(8)

    def total(params):
        out, _ = module.apply({"params": params}, x, real, dropless=True)
        return jnp.sum(out.astype(jnp.float32))

    with jax.set_mesh(make_mesh(MeshConfig(data=1, fsdp=8))):
        text = str(jax.make_jaxpr(jax.grad(total))(params))
    shapes = {name: f"[{','.join(map(str, kernel.shape))}]" for name, kernel in params.items()}
    for name in ("gate_up", "down"):
        assert f":bf16{shapes[name]} = all_gather[" in text
        assert f":f32{shapes[name]} = all_gather[" not in text
    for part in (f"[{E},2,{D // 8},{M}]", f"[{E},{M},{D // 8}]"):
        assert f":f32{part} = reduce_scatter[" in text


# --- what has no influence ------------------------------------------------------------------------


def test_other_documents_of_a_row_have_no_influence_where_nothing_is_dropped():
    module, params = make()
    x, real = inputs()
    changed = x.at[:, 5:].set(0.5)
    out, other = (apply(module, params, rows, real)[0] for rows in (x, changed))
    np.testing.assert_array_equal(out[:, :5], other[:, :5])


@pytest.mark.parametrize("capacity_factor", [None, 0.8])
def test_padding_has_no_influence_and_takes_no_place(capacity_factor):
    module, params = make(capacity_factor=capacity_factor)
    x, real = inputs()
    # As padding, copies of one token would fill its expert.
    changed = jnp.where(real[..., None], x, x[2, 0])
    out, routing = apply(module, params, x, real)
    other, same = apply(module, params, changed, real)
    np.testing.assert_array_equal(out, other)
    jax.tree.map(np.testing.assert_array_equal, routing, same)
    assert np.all(np.asarray(out)[~np.asarray(real)] == 0)


# --- settings and parameters ----------------------------------------------------------------------


@pytest.mark.parametrize("settings, message", [
    ({"experts_per_token": 9}, "experts_per_token=9 must lie between 1 and"),
    ({"experts_per_token": 0}, "experts_per_token=0"),
    ({"capacity_factor": 0.0}, "capacity_factor=0.0 must be positive"),
    ({"capacity_factor": float("nan")}, "capacity_factor"),
])  # fmt: skip
def test_bad_settings(settings, message):
    with pytest.raises(UserError, match=message):
        MoeConfig(**settings)


def test_an_expert_is_an_mlp_of_its_own_for_init_and_for_muon():
    _, real = inputs()
    module = MixtureOfExperts(MoeConfig(num_experts=4), "swiglu", 64, 32, "float32", 0.5)
    boxed = module.init(jax.random.key(0), jnp.zeros((1, 1, 64)), real[:1, :1], dropless=True)
    params = unbox(boxed["params"])
    for e in range(4):
        assert float(jnp.std(params["gate_up"][e])) == pytest.approx(1 / 8, rel=0.1)
        assert float(jnp.std(params["down"][e])) == pytest.approx(0.5 / math.sqrt(32), rel=0.1)
    assert float(jnp.std(params["router"])) == pytest.approx(1 / 8, rel=0.2)
    tree = {"layer_0": {"moe": params}}
    numbers = optim.muon_dimension_numbers(tree)["layer_0"]["moe"]
    assert numbers["router"] is None
    assert numbers["gate_up"] == optim.MuonDimensionNumbers((-2,), (-1,))
    assert numbers["down"] == optim.MuonDimensionNumbers((-2,), (-1,))
    assert all(jax.tree.leaves(optim.decay_mask(tree)))


@pytest.mark.parametrize("mlp, products", [("swiglu", 3), ("gelu_erf", 2)])
def test_only_the_chosen_experts_and_the_router_are_active(mlp, products):
    shape = {"vocab_size": 64, "embed_dim": D, "num_layers": 3, "num_heads": 2, "mlp_dim": M}
    dense = ModelConfig(**shape, mlp=mlp)
    mixed = ModelConfig(**shape, mlp=mlp, moe=MoeConfig(num_experts=E, experts_per_token=K))
    expert, router = products * D * M, D * E
    assert parameter_count(mixed) - parameter_count(dense) == 3 * ((E - 1) * expert + router)
    active = 3 * ((K - 1) * expert + router)
    assert active_parameter_count(mixed) - active_parameter_count(dense) == active
    assert active_parameter_count(dense) == parameter_count(dense)
    assert flops_per_token(mixed, 9) - flops_per_token(dense, 9) == 6 * active
