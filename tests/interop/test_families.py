"""Every published family against transformers: the golden folders of tests/golden/families.

`make_families.py` beside them tells how they were made.
"""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.errors import UserError
from llm_jax.generation.generate import generate
from llm_jax.generation.sampler import SamplerConfig
from llm_jax.interop.families import FAMILIES, architecture, family_for
from llm_jax.interop.family import Family
from llm_jax.interop.folder import open_folder
from llm_jax.mesh import MeshConfig, make_mesh
from llm_jax.models import LanguageModel, ModelConfig, RopeConfig
from llm_jax.models.heads import rewards
from llm_jax.types import Batch

FOLDERS = Path(__file__).parents[1] / "golden" / "families"
NAMES = sorted(folder.name for folder in FOLDERS.iterdir() if folder.is_dir())
CLASSIFIERS = [name for name in NAMES if name.endswith("_classifier")]
MODELS = [name for name in NAMES if name not in CLASSIFIERS]
MIXTURES = [name for name in NAMES if name.startswith(("mixtral", "qwen3_moe", "olmoe"))]
OLD_CONFIGS = [name for name in NAMES if (FOLDERS / name / "config_old.json").exists()]
# With these a row read at once and a row read token by token have other angles.
BY_LENGTH = ("llama_dynamic", "phi3_longrope")


@pytest.fixture(scope="module")
def opened():
    """`opened(name)`: model, parameters, and what transformers makes of them."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])

    def load(name):
        folder = open_folder(FOLDERS / name)
        return (
            LanguageModel(folder.model),
            folder.load(mesh),
            np.load(FOLDERS / name / "expected.npz"),
        )

    return load


def logits(model, params, tokens, positions, mask):
    with jax.default_matmul_precision("highest"):
        hidden, _ = model.apply(
            params, *(jnp.asarray(x, jnp.int32) for x in (tokens, positions, mask))
        )
        return np.asarray(model.logits(params, hidden))


def right_padded(expected, x):
    """Rows of [batch, time, ...] with their padding moved from the left to the right."""
    lengths = expected["attention_mask"].sum(axis=1)
    return np.stack([np.roll(row, n, axis=0) for row, n in zip(x, lengths, strict=True)])


@pytest.mark.parametrize("name", MODELS)
def test_logits_of_padded_rows(name, opened):
    model, params, expected = opened(name)
    inputs = [expected[key] for key in ("input_ids", "position_ids", "attention_mask")]
    real = expected["attention_mask"] > 0
    found = logits(model, params, *inputs)
    np.testing.assert_allclose(found[real], expected["logits"][real], atol=1e-4, rtol=0)
    moved = [right_padded(expected, x) for x in inputs]
    found, wanted = logits(model, params, *moved), right_padded(expected, expected["logits"])
    real = moved[2] > 0
    np.testing.assert_allclose(found[real], wanted[real], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", BY_LENGTH)
def test_logits_of_short_rows_where_angles_depend_on_the_length(name, opened):
    model, params, expected = opened(name)
    inputs = [expected[f"short/{k}"] for k in ("input_ids", "position_ids", "attention_mask")]
    real = inputs[2] > 0
    found = logits(model, params, *inputs)
    np.testing.assert_allclose(found[real], expected["short/logits"][real], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in BY_LENGTH])
def test_greedy_continuations(name, opened):
    model, params, expected = opened(name)
    prompts = [
        row[mask > 0].tolist()
        for row, mask in zip(expected["input_ids"], expected["attention_mask"], strict=True)
    ]
    made = generate(
        model, params, prompts, max_new_tokens=8, sampler=SamplerConfig(temperature=0.0),
        rng=jax.random.key(0),
    )  # fmt: skip
    np.testing.assert_array_equal(made.tokens, expected["greedy"])


@pytest.mark.parametrize("name", BY_LENGTH)
def test_greedy_continuations_read_anew_for_every_token(name, opened):
    model, params, expected = opened(name)
    row = 1  # it grows past the original length
    mask = expected["attention_mask"][row] > 0
    tokens = expected["input_ids"][row][mask].tolist()
    for wanted in expected["greedy"][row]:
        shape = (1, len(tokens))
        found = logits(model, params, [tokens], [range(len(tokens))], np.ones(shape, np.int32))
        assert np.argmax(found[0, -1]) == wanted
        tokens.append(int(wanted))


@pytest.mark.parametrize("name", ["gemma3_text", "mixtral", "gpt2", "gpt_neox", "phi3", "olmo2"])
def test_stacked_layers_and_shards_give_the_same(name, opened):
    model, params, expected = opened(name)
    inputs = [expected[key] for key in ("input_ids", "position_ids", "attention_mask")]
    wanted = logits(model, params, *inputs)
    config = open_folder(FOLDERS / name).model
    scan = config.num_layers % len(config.windows) == 0
    folder = open_folder(FOLDERS / name, scan_layers=scan)
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=1), jax.devices()[:2])
    model = LanguageModel(folder.model)
    with jax.set_mesh(mesh):
        params = folder.load(mesh)
        inputs = [np.concatenate([x, x[:1]]) for x in inputs]
        found = logits(model, params, *inputs)[:3]
    real = inputs[2][:3] > 0
    np.testing.assert_allclose(found[real], wanted[real], atol=1e-5, rtol=0)
    whole = jax.tree.leaves(params)
    assert any(x.sharding.shard_shape(x.shape) != x.shape for x in whole)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_scores_of_classifiers(name, opened):
    folder = open_folder(FOLDERS / name)
    model, params, expected = opened(name)
    assert folder.heads == ("reward_head",)
    tokens, positions, mask = (
        right_padded(expected, expected[key])
        for key in ("input_ids", "position_ids", "attention_mask")
    )
    batch = Batch(tokens, tokens, mask.astype(np.float32), mask, positions)
    with jax.default_matmul_precision("highest"):
        found = rewards(model, params, batch)
    np.testing.assert_allclose(found, expected["scores"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", MIXTURES)
def test_load_balance_of_mixtures(name, opened):
    model, params, expected = opened(name)
    _, _, routing = model.apply_with_routing(
        params, *(expected[key] for key in ("input_ids", "position_ids", "attention_mask"))
    )
    experts = model.config.moe.num_experts
    loss = experts * np.sum(routing.counts * routing.probabilities) / routing.tokens**2
    np.testing.assert_allclose(loss, expected["aux_loss"], rtol=1e-5)


@pytest.mark.parametrize("name", OLD_CONFIGS)
def test_older_spellings_of_config_json_mean_the_same(name):
    family = FAMILIES[json.loads((FOLDERS / name / "config.json").read_text())["model_type"]]
    older, newer = (
        family.read(json.loads((FOLDERS / name / file).read_text()))
        for file in ("config_old.json", "config.json")
    )
    assert older == newer


@pytest.mark.parametrize("name", MODELS)
def test_a_family_reads_what_it_writes(name):
    folder = open_folder(FOLDERS / name)
    written = json.loads(json.dumps(folder.family.write(folder.model)))
    # The readers of these files are strict about whole numbers.
    for key, value in folder.config.items():
        if type(value) is int and key in written:
            assert type(written[key]) is int, key
    assert architecture(folder.family.read(written)) == architecture(folder.model)
    assert family_for(folder.model, folder.family.model_type) is folder.family


@pytest.mark.parametrize(
    ("name", "key", "field", "absent", "null"),
    [
        ("gemma2", "attn_logit_softcapping", "attention_soft_cap", 50.0, None),
        ("gemma2", "final_logit_softcapping", "logits_soft_cap", 30.0, None),
        ("mistral", "sliding_window", "window", 4096, None),
        ("llama_bias", "num_key_value_heads", "num_kv_heads", None, None),
        ("gpt2", "n_inner", "mlp_dim", 128, 128),
    ],
)
def test_keys_that_are_absent_or_null_mean_what_they_mean_in_transformers(
    name, key, field, absent, null
):
    config = json.loads((FOLDERS / name / "config.json").read_text())
    family = FAMILIES[config["model_type"]]
    without = {k: v for k, v in config.items() if k != key}
    assert getattr(family.read(without), field) == absent
    assert getattr(family.read({**config, key: None}), field) == null


def test_a_family_is_given_only_what_its_readers_know():
    yarn = RopeConfig(scaling="yarn", factor=2.0, original_length=64)
    assert family_for(ModelConfig(vocab_size=64, rope=yarn), "phi3").model_type == "llama"
    wide = ModelConfig(vocab_size=64, embed_dim=100, num_heads=3, head_dim=32)
    assert family_for(wide).model_type == "mistral"
    capped = ModelConfig(vocab_size=64, qk_norm="head", norm_plus_one=True, scale_embeddings=True,
                         norm_placement="both", mlp="geglu", attention_soft_cap=5.0)  # fmt: skip
    with pytest.raises(UserError, match="no published family"):
        family_for(capped)


def test_how_far_rotary_positions_reach_is_nothing_to_a_family():
    rope = RopeConfig(scaling="dynamic", factor=2.0, original_length=64)
    assert family_for(ModelConfig(vocab_size=64, rope=rope)).model_type == "llama"


def test_a_run_from_scratch_finds_a_family():
    plain = ModelConfig(vocab_size=64)
    assert family_for(plain).model_type == "llama"
    assert family_for(ModelConfig(vocab_size=64, qk_norm="head")).model_type == "qwen3"
    with pytest.raises(UserError, match=r"no published family .*norm_plus_one=True.*qk_norm='all'"):
        family_for(ModelConfig(vocab_size=64, qk_norm="all", norm_plus_one=True))
    with pytest.raises(UserError, match="no published family"):
        family_for(ModelConfig(vocab_size=64, rope=RopeConfig(scaling="ntk", factor=2.0)))


# --- what is refused ------------------------------------------------------------------------------


@pytest.fixture
def changed(tmp_path):
    """`changed(name, **keys)`: a golden folder with other keys in its config.json."""

    def make(name, **keys):
        folder = tmp_path / name
        shutil.copytree(FOLDERS / name, folder)
        config = json.loads((folder / "config.json").read_text()) | keys
        config = {key: value for key, value in config.items() if value != "gone"}
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("llama", {"model_type": "lama"}, "model_type='lama'.*Did you mean 'llama'"),
        ("llama", {"hidden_act": "relu"}, "hidden_act='relu', which is unknown"),
        ("llama", {"hidden_size": "gone"}, "lacks 'hidden_size'"),
        ("llama", {"rope_parameters": {"rope_type": "spiral"}}, "RoPE of type 'spiral'"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantised weights"),
        ("llama", {"hidden_size": "32"}, "model.embed_dim='32' is of the wrong type"),
        ("llama", {"num_hidden_layers": 2.0}, "model.num_layers=2.0 is of the wrong type"),
        ("llama", {"tie_word_embeddings": "no"}, "model.tie_embeddings='no'"),
        ("llama", {"hidden_act": ["silu"]}, "hidden_act=.*is unknown"),
        ("llama", {"rope_parameters": "yarn"}, "rope_parameters='yarn', where an object is wanted"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": "x"}}, "rope.factor='x'"),
        ("llama", {"text_config": "x"}, "a text_config that is no object"),
        ("mixtral", {"num_experts_per_tok": 2.5}, "model.moe.experts_per_token=2.5"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
        ("phi3", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "no RoPE scaling"),
        ("llama", {"model_type": "gone"}, "is no Hugging Face folder"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv=8.0"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, r"mlp_only_layers=\[0\]"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ("llama_classifier", {"id2label": {"0": "a", "1": "b"}}, "a classifier of 2 labels"),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_one_clear_line(name, keys, message, changed):
    with pytest.raises(UserError, match=message) as caught:
        open_folder(changed(name, **keys))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"intermediate_size": 56}, r"down_proj\.weight .* is \[32, 48\].* makes it \[32, 56\]"),
        ({"num_hidden_layers": 1}, r"the tensor model\.layers\.1\..* no place \(and 8 more\)"),
        ({"num_hidden_layers": 3}, r"lacks the tensor model\.layers\.2\."),
        ({"attention_bias": True}, r"lacks the tensor model\.layers\.0\.self_attn\.\w+\.bias"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_named(keys, message, changed):
    with pytest.raises(UserError, match=message):
        _ = open_folder(changed("llama", **keys)).leaves


def test_folders_that_are_none(tmp_path):
    with pytest.raises(UserError, match="is no folder"):
        open_folder(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"config\.json is not there"):
        open_folder(tmp_path)


def test_every_family_has_a_golden_folder():
    seen = {open_folder(FOLDERS / name).family.model_type for name in NAMES}
    assert seen == set(FAMILIES)
    assert all(isinstance(family, Family) for family in FAMILIES.values())
