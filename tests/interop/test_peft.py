"""PEFT adapters: against the golden folders of tests/golden/peft, and there and back."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict

from llm_jax.errors import UserError
from llm_jax.interop.folder import open_folder
from llm_jax.interop.modules import target_modules, targets
from llm_jax.interop.peft import read_adapters, write_adapters
from llm_jax.mesh import MeshConfig, make_mesh
from llm_jax.models import LanguageModel, LoraConfig
from llm_jax.models.lora import init_adapters
from llm_jax.sharding import unbox
from llm_jax.types import join

GOLDEN = Path(__file__).parents[1] / "golden"
FOLDERS = GOLDEN / "peft"
NAMES = sorted(folder.name for folder in FOLDERS.iterdir() if folder.is_dir())
# With layers stacked or not.
CASES = [*((name, False) for name in NAMES), ("llama_dora", True), ("phi3_lora", True)]
STANDARD = LoraConfig(rank=4, alpha=12.0)
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"


def open_base(name, scan=False):
    """The base of a golden adapter, or a golden base."""
    name = name.rpartition("_")[0] if (FOLDERS / name).exists() else name
    return open_folder(GOLDEN / "families" / name, scan_layers=scan)


def read(folder, base):
    return read_adapters(folder, base.model, base.family)


def write(folder, adapters, lora, base, **settings):
    write_adapters(adapters, lora, base.model, base.family, folder, "some/base", **settings)
    return folder


def tensors_of(folder):
    return safetensors.numpy.load_file(folder / "adapter_model.safetensors")


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def changed(folder, name="llama_lora", config=None, tensors=None):
    """A copy of a golden adapter with other settings, and with its tensors as a function has it."""
    shutil.copytree(FOLDERS / name, folder, dirs_exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config_of(folder) | (config or {})))
    if tensors is not None:
        made = {name: np.ascontiguousarray(x) for name, x in tensors(tensors_of(folder)).items()}
        safetensors.numpy.save_file(made, folder / "adapter_model.safetensors")
    return folder


def make_adapters(base, lora):
    """Adapters as training leaves them: no leaf as it began, and every part with its own A."""
    rng = np.random.default_rng(0)
    config = dataclasses.replace(base.model, lora=dataclasses.replace(lora, dora=False))
    weights = jax.eval_shape(LanguageModel(base.model).init, jax.random.key(0))
    shapes = jax.eval_shape(lambda rng: init_adapters(rng, config, weights), jax.random.key(0))
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), unbox(shapes))


def with_magnitudes(adapters):
    """The same with a magnitude [F...] beside every b [r, F...] of unstacked layers."""
    if "b" in adapters:
        return {**adapters, "magnitude": 1 + np.abs(adapters["b"][0])}
    return {name: with_magnitudes(branch) for name, branch in adapters.items()}


def assert_same_bits(actual, expected):
    actual, expected = flatten_dict(actual), flatten_dict(expected)
    assert actual.keys() == expected.keys()
    for path, array in expected.items():
        assert actual[path].dtype == array.dtype, path
        np.testing.assert_array_equal(
            actual[path].view(np.uint32), array.view(np.uint32), err_msg=str(path)
        )


# --- against peft ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "scan"), CASES)
def test_agrees_with_peft(name, scan):
    base, golden = open_base(name, scan), np.load(FOLDERS / name / "expected.npz")
    lora, adapters = read(FOLDERS / name, base)
    model = LanguageModel(dataclasses.replace(base.model, lora=lora))
    weights = base.load(make_mesh(MeshConfig(), jax.devices()[:1]))
    real = golden["attention_mask"] > 0

    @jax.jit
    def logits(params):
        rows = (golden[key] for key in ("input_ids", "position_ids", "attention_mask"))
        hidden, _ = model.apply(params, *(jnp.asarray(row, jnp.int32) for row in rows))
        return model.logits(params, hidden)

    with jax.default_matmul_precision("highest"):
        adapted = logits(join(jax.tree.map(jnp.asarray, adapters), weights))
        np.testing.assert_allclose(adapted[real], golden["logits"][real], atol=1e-4, rtol=0)
        assert np.abs(logits(weights)[real] - golden["logits"][real]).max() > 1


@pytest.mark.parametrize(
    ("name", "targets", "kind"),
    [
        ("gpt2_lora", ("attention/", "mlp/down$"), {}),
        ("llama_lora", ("attention/(output|query|value)$", "mlp/(down|gate)$"), {}),
        ("llama_dora", ("attention/(output|query|value)$", "mlp/(down|gate)$"), {"dora": True}),
        (
            "llama_rslora",
            ("attention/(output|query|value)$", "mlp/(down|gate)$"),
            {"rank_stabilised": True},
        ),
        ("phi3_lora", ("attention/",), {}),
        ("qwen2_lora", (".*",), {}),
    ],
)
def test_settings(name, targets, kind):
    lora, _ = read(FOLDERS / name, open_base(name))
    assert lora == LoraConfig(rank=4, alpha=12.0, targets=targets, **kind)


def test_dropout_is_read_and_written(tmp_path):
    base = open_base("llama")
    lora, adapters = read(changed(tmp_path / "in", config={"lora_dropout": 0.25}), base)
    assert lora.dropout == 0.25
    assert config_of(write(tmp_path / "out", adapters, lora, base))["lora_dropout"] == 0.25


# --- there and back -------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "scan"), CASES)
def test_what_was_read_is_written_bit_for_bit(name, scan, tmp_path):
    base = open_base(name, scan)
    lora, adapters = read(FOLDERS / name, base)
    write(tmp_path, adapters, lora, base)
    assert_same_bits(tensors_of(tmp_path), tensors_of(FOLDERS / name))
    written, published = config_of(tmp_path), config_of(FOLDERS / name)
    for key in ("r", "lora_alpha", "use_dora", "use_rslora", "fan_in_fan_out", "task_type", "bias"):
        assert written[key] == published[key], key
    assert written["base_model_name_or_path"] == "some/base"
    again, tree = read(tmp_path, base)
    assert again == lora
    assert_same_bits(tree, adapters)


@pytest.mark.parametrize("name", ["llama_dora", "gpt2_lora"])
def test_stacked_layers_are_the_layers_stacked(name):
    lora, layers = read(FOLDERS / name, open_base(name))
    assert read(FOLDERS / name, open_base(name, scan=True))[0] == lora
    _, stacked = read(FOLDERS / name, open_base(name, scan=True))
    expected = jax.tree.map(lambda *x: np.stack(x), layers["layer_0"], layers["layer_1"])
    assert_same_bits(stacked, {"layers": {"block_0": expected}})


# How a module of each family holds the rows of queries [K, G, H], keys and values [K, 1, H].
FUSED = {
    "gpt2": ("transformer.h.1.attn.c_attn", lambda q, k, v: np.stack([q, k, v])),
    "gpt_neox": (
        "gpt_neox.layers.1.attention.query_key_value",
        lambda q, k, v: np.concatenate([q, k, v], axis=1),
    ),
    "phi3": (
        "model.layers.1.self_attn.qkv_proj",
        lambda q, k, v: np.concatenate([x.reshape(-1, x.shape[-1]) for x in (q, k, v)]),
    ),
}


@pytest.mark.parametrize(
    ("name", "parts", "rank_stabilised"),
    [
        *((name, ("query", "key", "value"), False) for name in FUSED),
        ("gpt2", ("query", "value"), True),
        ("gpt_neox", ("key",), False),
        ("phi3", ("key", "value"), False),
    ],
)
def test_a_module_of_several_parts_adds_what_they_add(name, parts, rank_stabilised, tmp_path):
    base = open_base(name)
    choice = (f"attention/({'|'.join(parts)})$", "output$")
    lora = dataclasses.replace(STANDARD, targets=choice, rank_stabilised=rank_stabilised)
    adapters = make_adapters(base, lora)
    config = config_of(write(tmp_path, adapters, lora, base))
    rank = 4 * len(parts)
    assert config["r"] == rank
    assert "rank_pattern" not in config
    scale = config["lora_alpha"] / (rank**0.5 if rank_stabilised else rank)
    assert scale == pytest.approx(lora.scale)

    def added(part):
        """[F..., D], zeros where there is no adapter."""
        held = adapters["layer_1"]["attention"]["qkv"]["lora"]
        group = base.model.group if part == "query" else 1
        shape = (base.model.kv_heads, group, base.model.resolved_head_dim, base.model.embed_dim)
        if part not in held:
            return np.zeros(shape)
        return lora.scale * np.einsum("DR,RKFH->KFHD", held[part]["a"], held[part]["b"])

    module, rows = FUSED[name]
    expected = rows(added("query"), added("key"), added("value"))
    tensors = tensors_of(tmp_path)
    a, b = (tensors[f"base_model.model.{module}.lora_{factor}.weight"] for factor in "AB")
    assert a.shape == (rank, base.model.embed_dim)
    np.testing.assert_allclose(
        scale * b @ a, expected.reshape(-1, base.model.embed_dim), rtol=1e-4, atol=1e-4
    )


def test_padded_adapters_come_back_as_the_same_sum(tmp_path):
    base = open_base("phi3", scan=True)
    adapters = make_adapters(base, STANDARD)
    lora, again = read(write(tmp_path, adapters, STANDARD, base), base)
    assert (lora.rank, lora.alpha) == (12, 36.0)
    for tree in (adapters, again):
        down = tree["layers"]["block_0"]["mlp"]["down"]["lora"]["down"]
        tree["sum"] = down["a"] @ down["b"]
    np.testing.assert_allclose(again["sum"], adapters["sum"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox"])
def test_magnitudes_of_a_fused_module(name, tmp_path):
    base, lora = open_base(name), dataclasses.replace(STANDARD, dora=True)
    adapters = with_magnitudes(make_adapters(base, lora))
    write(tmp_path, adapters, lora, base)
    held = adapters["layer_1"]["attention"]["qkv"]["lora"]
    q, k, v = (held[part]["magnitude"][..., None] for part in ("query", "key", "value"))
    module, rows = FUSED[name]
    stored = tensors_of(tmp_path)[f"base_model.model.{module}.lora_magnitude_vector"]
    np.testing.assert_array_equal(stored, rows(q, k, v).reshape(-1))
    again = read(tmp_path, base)[1]["layer_1"]["attention"]["qkv"]["lora"]
    for part, adapter in held.items():
        np.testing.assert_array_equal(again[part]["magnitude"], adapter["magnitude"])


def test_a_dora_module_is_adapted_whole(tmp_path):
    base = open_base("gpt2")
    lora = dataclasses.replace(STANDARD, dora=True, targets=("query$",))
    with pytest.raises(UserError, match=r"layer_0/attention/query has a DoRA adapter.*c_attn"):
        write(tmp_path, with_magnitudes(make_adapters(base, lora)), lora, base)


@pytest.mark.parametrize("name", ["llama_classifier", "gpt2_classifier"])
def test_a_reward_head_goes_along(name, tmp_path):
    base = open_base(name)
    adapters = make_adapters(base, STANDARD)
    kernel = np.random.default_rng(1).normal(size=(base.model.embed_dim, 1)).astype(np.float32)
    write(tmp_path, {**adapters, "reward_head": {"kernel": kernel}}, STANDARD, base)
    config, tensors = config_of(tmp_path), tensors_of(tmp_path)
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["score"])
    np.testing.assert_array_equal(tensors["base_model.model.score.weight"], kernel.T)
    again = read(tmp_path, base)[1]
    np.testing.assert_array_equal(again["reward_head"]["kernel"], kernel)


def test_an_export_in_bfloat16(tmp_path):
    base = open_base("llama")
    lora, adapters = read(FOLDERS / "llama_lora", base)
    write(tmp_path, adapters, lora, base, dtype=jnp.bfloat16)
    for name, tensor in tensors_of(FOLDERS / "llama_lora").items():
        stored = tensors_of(tmp_path)[name]
        assert stored.dtype == jnp.bfloat16
        np.testing.assert_array_equal(stored, tensor.astype(jnp.bfloat16))
    assert jax.tree.all(jax.tree.map(lambda x: x.dtype == np.float32, read(tmp_path, base)[1]))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (lambda tree: {}, "no adapters to export"),
        (lambda tree: jax.tree.map(lambda x: x * 1e6, tree), "too large for float16"),
    ],
)
def test_refused_exports(values, message, tmp_path):
    base = open_base("llama")
    adapters = values(make_adapters(base, STANDARD))
    with pytest.raises(UserError, match=message):
        write(tmp_path, adapters, STANDARD, base, dtype=np.float16)


def test_no_export_over_another(tmp_path):
    base = open_base("llama")
    write(tmp_path, make_adapters(base, STANDARD), STANDARD, base)
    with pytest.raises(UserError, match="exists: give a folder without weights"):
        write(tmp_path, make_adapters(base, STANDARD), STANDARD, base)


# --- which parts ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class NamedPart:
    full_name: str


PARTS = [
    NamedPart(f"layer_{layer}/{kind}")
    for layer in (0, 1, 10, 11)
    for kind in ("attention/query", "attention/key", "attention/output", "mlp/gate", "mlp/up")
]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (".*", (".*",)),
        ("attention", ("attention/",)),
        ("gate|query", ("attention/query$", "mlp/gate$")),
        ("query|output", ("attention/(query|output)$",)),
        ("layer_1/", ("layer_1/",)),
        ("_(1|10)/.*up", ("(layer_1|layer_10)/mlp/up$",)),
        ("_0/.*up|_11/", ("layer_0/mlp/up$", "layer_11/")),
    ],
)
def test_targets_select_these_parts_alone(pattern, expected):
    chosen = {part.full_name for part in PARTS if re.search(pattern, part.full_name)}
    found = targets(chosen, PARTS)
    assert found == expected
    names = (part.full_name for part in PARTS)
    assert {name for name in names if any(re.search(t, name) for t in found)} == chosen


def test_target_modules():
    every = [f"h.{layer}.{end}" for layer in range(2) for end in ("attn.c_proj", "mlp.c_proj")]
    assert target_modules(every, every, "transformer.") == ["attn.c_proj", "mlp.c_proj"]
    found = target_modules(["h.0.mlp.c_proj", *every[::2]], every, "transformer.")
    assert found == ["attn.c_proj", "transformer.h.0.mlp.c_proj"]


def test_layers_may_differ_unless_they_are_stacked(tmp_path):
    def without_second_query(tensors):
        return {name: x for name, x in tensors.items() if "layers.1.self_attn.q_proj" not in name}

    folder = changed(tmp_path / "in", tensors=without_second_query)
    base = open_base("llama")
    lora, adapters = read(folder, base)
    assert lora.targets == (
        "layer_0/attention/(output|query|value)$", "layer_0/mlp/(down|gate)$",
        "layer_1/attention/(output|value)$", "layer_1/mlp/(down|gate)$",
    )  # fmt: skip
    write(tmp_path / "out", adapters, lora, base)
    assert_same_bits(tensors_of(tmp_path / "out"), tensors_of(folder))
    assert config_of(tmp_path / "out")["target_modules"] == [
        "mlp.down_proj", "mlp.gate_proj", "model.layers.0.self_attn.q_proj", "self_attn.o_proj",
        "self_attn.v_proj",
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"query in 1 of 2 layers.*model\.scan_layers=False"):
        read(folder, open_base("llama", scan=True))


# --- settings of single modules -------------------------------------------------------------------


@pytest.mark.parametrize("rank_stabilised", [False, True])
@pytest.mark.parametrize("key", ["q_proj", r"^model.layers.\d.self_attn.q_proj"])
def test_rank_and_alpha_patterns(key, rank_stabilised, tmp_path):
    def two_ranks(tensors):
        cut = {"lora_A": np.s_[:2], "lora_B": np.s_[:, :2]}
        return {
            name: x[cut[name.split(".")[-2]]] if ".q_proj." in name else x
            for name, x in tensors.items()
        }

    config = {"rank_pattern": {key: 2}, "alpha_pattern": {key: 7, ".*q_proj": 1, "v_proj": 3}}
    config["use_rslora"] = rank_stabilised
    folder = changed(tmp_path, config=config, tensors=two_ranks)
    lora, adapters = read(folder, open_base("llama"))
    assert (lora.rank, lora.alpha) == (4, 12.0)
    tensors = tensors_of(folder)
    for part, letter, rank, alpha in (("query", "q", 2, 7), ("value", "v", 4, 3)):
        name = Q_PROJ.replace("q_proj", f"{letter}_proj")
        a, b = (tensors[f"{name}.lora_{factor}.weight"] for factor in "AB")
        expected = alpha / (rank**0.5 if rank_stabilised else rank) * (b @ a).T
        held = adapters["layer_0"]["attention"]["qkv"]["lora"][part]
        added = lora.scale * np.einsum("DR,RKGH->DKGH", held["a"], held["b"])
        np.testing.assert_allclose(added.reshape(expected.shape), expected, rtol=1e-4, atol=1e-5)


def test_a_pattern_may_raise_the_rank(tmp_path):
    lora, adapters = read(FOLDERS / "llama_lora", open_base("llama"))
    folder = changed(tmp_path, config={"r": 3, "lora_alpha": 9, "rank_pattern": {".*": 4}})
    again, same = read(folder, open_base("llama"))
    assert (again.rank, again.alpha, again.scale) == (4, 12.0, lora.scale)
    b, found = (tree["layer_0"]["mlp"]["down"]["lora"]["down"]["b"] for tree in (adapters, same))
    np.testing.assert_allclose(found, b * (9 / 4) / 3, rtol=1e-6)


# --- other spellings ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (r"lora_(A|B)\.", r"lora_\1.default."),
        (r"lora_magnitude_vector", r"lora_magnitude_vector.weight"),
        (r"lora_magnitude_vector", r"lora_magnitude_vector.default"),
        (r"lora_magnitude_vector", r"lora_magnitude_vector.default.weight"),
        (r"base_model\.model\.model\.", "base_model.model."),
        (r"base_model\.model\.model\.", "model."),
    ],
)
def test_other_names_of_tensors(old, new, tmp_path):
    base = open_base("llama")

    def renamed(tensors):
        return {re.sub(old, new, name): x for name, x in tensors.items()}

    folder = changed(tmp_path, "llama_dora", tensors=renamed)
    assert tensors_of(folder).keys() != tensors_of(FOLDERS / "llama_dora").keys()
    lora, adapters = read(folder, base)
    expected_lora, expected = read(FOLDERS / "llama_dora", base)
    assert lora == expected_lora
    assert_same_bits(adapters, expected)


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
def test_the_prefix_of_a_model_with_several_parts(prefix, tmp_path):
    base = open_base("gemma3_text")
    adapters = make_adapters(base, STANDARD)
    write(tmp_path, adapters, STANDARD, base)
    tensors = {
        name.replace("base_model.model.model.", f"base_model.model.{prefix}"): x
        for name, x in tensors_of(tmp_path).items()
    }
    safetensors.numpy.save_file(tensors, tmp_path / "adapter_model.safetensors")
    assert_same_bits(read(tmp_path, base)[1], adapters)


def test_settings_without_effect_are_ignored(tmp_path):
    config = {"init_lora_weights": "gaussian", "revision": "main", "layers_to_transform": [0, 1],
              "target_modules": "all-linear", "eva_config": {"rho": 2.0}}  # fmt: skip
    base = open_base("llama")
    lora, adapters = read(changed(tmp_path, config=config), base)
    expected_lora, expected = read(FOLDERS / "llama_lora", base)
    assert lora == expected_lora
    assert_same_bits(adapters, expected)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("peft_type", "ADALORA"), ("bias", "lora_only"), ("modules_to_save", ["lm_head"]),
        ("init_lora_weights", "pissa_niter_4"), ("init_lora_weights", "olora"), ("r", 0),
        ("lora_alpha", "12"), ("use_qalora", True), ("lora_bias", True),
        ("trainable_token_indices", [1]), ("megatron_config", {"x": 1}),
        ("alora_invocation_tokens", [1]), ("layer_replication", [[0, 2], [0, 2]]),
        ("target_parameters", ["mlp.experts.down_proj"]), ("kasa_config", {"beta": 1}),
        ("a_setting_of_tomorrow", True),
    ],
)  # fmt: skip
def test_refused_settings(key, value, tmp_path):
    folder = changed(tmp_path, config={key: value})
    with pytest.raises(UserError, match=rf"{key}={re.escape(repr(value))}"):
        read(folder, open_base("llama"))


def test_settings_that_are_missing(tmp_path):
    folder = changed(tmp_path)
    config = config_of(folder)
    del config["r"]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="lacks 'r'"):
        read(folder, open_base("llama"))
    for text in ("[]", "{"):
        (folder / "adapter_config.json").write_text(text)
        with pytest.raises(UserError, match=r"adapter_config\.json cannot be read"):
            read(folder, open_base("llama"))


def without(end):
    return lambda tensors: {name: x for name, x in tensors.items() if not name.endswith(end)}


def adding(name, shape):
    return lambda tensors: tensors | {name: np.zeros(shape, np.float32)}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (without("0.self_attn.q_proj.lora_A.weight"), "lacks layers.0.self_attn.q_proj.lora_A"),
        (without("0.self_attn.q_proj.lora_B.weight"), "lacks layers.0.self_attn.q_proj.lora_B"),
        (adding(f"{Q_PROJ}.lora_A.weight", (4, 31)), r"q_proj.lora_A.weight.*\[4, 31\].*\[4, 32\]"),
        (adding(f"{Q_PROJ}.lora_B.weight", (16, 4)), r"q_proj.lora_B.weight.*\[16, 4\].*\[32, 4\]"),
        (adding(f"{Q_PROJ}.lora_A.weight", (5, 32)), r"q_proj.lora_A.weight.*\[5, 32\].*\[4, 32\]"),
        (adding(f"{Q_PROJ}.bias", (32,)), "q_proj.bias, which has no place"),
        (adding(f"{Q_PROJ}.lora_magnitude_vector", (32,)), "q_proj.lora_magnitude_vector, which"),
        (adding(Q_PROJ.replace("0", "2") + ".lora_A.weight", (4, 32)), "layers.2.*no place"),
        (adding("base_model.model.model.embed_tokens.lora_embedding_A", (4, 97)), "embedding_A.*"),
        (adding("base_model.model.lm_head.lora_A.weight", (4, 32)), "lm_head.lora_A.*no place"),
        (adding("base_model.model.score.weight", (1, 32)), "score.weight, which has no place"),
        (adding(f"{Q_PROJ}.lora_A.default.weight", (4, 32)), "holds both .*default.*leave one"),
        (lambda tensors: {}, "holds no adapters"),
    ],
)
def test_refused_tensors(tensors, message, tmp_path):
    folder = changed(tmp_path, tensors=tensors)
    with pytest.raises(UserError, match=message):
        read(folder, open_base("llama"))


@pytest.mark.parametrize("module", ["mlp.gate", "mlp.experts.0.down_proj", "mlp.experts"])
def test_no_adapters_on_experts_and_routers(module, tmp_path):
    base = open_base("qwen3_moe")
    write(tmp_path, make_adapters(base, STANDARD), STANDARD, base)
    name = f"base_model.model.model.layers.0.{module}.lora_A.weight"
    tensors = tensors_of(tmp_path) | {name: np.zeros((4, 32), np.float32)}
    safetensors.numpy.save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match=f"{name}.*experts and routers"):
        read(tmp_path, base)


def test_a_missing_magnitude_and_a_missing_head(tmp_path):
    end = "0.self_attn.q_proj.lora_magnitude_vector"
    folder = changed(tmp_path / "dora", "llama_dora", tensors=without(end))
    with pytest.raises(UserError, match=f"lacks layers.{end}"):
        read(folder, open_base("llama"))
    config = {"modules_to_save": ["classifier", "score"]}
    with pytest.raises(UserError, match=r"lacks score\.weight"):
        read(changed(tmp_path / "head", config=config), open_base("llama"))


def test_no_such_folder(tmp_path):
    with pytest.raises(UserError, match=r"adapter_config\.json cannot be read"):
        read(tmp_path / "nowhere", open_base("llama"))
    folder = changed(tmp_path / "bin")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(UserError, match=r"adapter_model\.safetensors is not there"):
        read(folder, open_base("llama"))
