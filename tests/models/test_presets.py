"""The presets' sizes, layouts and families, from shapes alone."""

import dataclasses
import json
import pathlib

import jax
import pytest

from llm_jax import sharding
from llm_jax.interop.families import architecture, family_for, family_of, text_config
from llm_jax.models import LanguageModel, parameter_count
from llm_jax.models.presets import PRESETS, PUBLISHED, SCRATCH
from llm_jax.recipe import load_config

ROOT = pathlib.Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
SHARDINGS = GOLDEN / "shardings.json"

# From the releases' checkpoints (the sum of the tensors' sizes, tied ones once).
PUBLISHED_COUNTS = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "pythia-70m": 70_426_624,
    "pythia-160m": 162_322_944,
    "pythia-410m": 405_334_016,
    "pythia-1b": 1_011_781_632,
    "pythia-1.4b": 1_414_647_808,
    "pythia-2.8b": 2_775_208_960,
    "pythia-6.9b": 6_857_302_016,
    "pythia-12b": 11_846_072_320,
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-33b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.1-405b": 405_853_388_800,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "mixtral-8x7b": 46_702_792_704,
    "mixtral-8x22b": 140_620_634_112,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "gemma-2b": 2_506_172_416,
    "gemma-7b": 8_537_680_896,
    "gemma2-2b": 2_614_341_888,
    "gemma2-9b": 9_241_705_984,
    "gemma2-27b": 27_227_128_320,
    "gemma3-270m": 268_098_176,
    "gemma3-1b": 999_885_952,
    "gemma3-4b": 3_880_263_168,
    "gemma3-12b": 11_766_034_176,
    "gemma3-27b": 27_009_346_304,
    "olmo2-1b": 1_484_916_736,
    "olmo2-7b": 7_298_617_344,
    "olmo2-13b": 13_716_198_400,
    "olmo2-32b": 32_234_279_936,
    "olmoe-1b-7b": 6_919_161_856,
    "phi3-mini-4k": 3_821_079_552,
    "phi3-medium-4k": 13_960_238_080,
}
NAMED_SIZES = {
    "tiny": 1e6, "small": 10e6, "125m": 125e6, "350m": 350e6, "760m": 760e6, "1b": 1.1e9,
    "3b": 3e9, "7b": 7e9,
}  # fmt: skip
# The model type of each release, by the start of its presets' names; the longest that fits counts.
MODEL_TYPES = {
    "gpt2": "gpt2",
    "pythia": "gpt_neox",
    "llama": "llama",
    "mistral": "mistral",
    "mixtral": "mixtral",
    "qwen2.5": "qwen2",
    "qwen3": "qwen3",
    "qwen3-30b-a3b": "qwen3_moe",
    "qwen3-235b-a22b": "qwen3_moe",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "olmo2": "olmo2",
    "olmoe": "olmoe",
    "phi3": "phi3",
}
# Release → the keys of its config.json that describe the architecture.
CONFIGS = json.loads((GOLDEN / "published_configs.json").read_text())


def model_type(name):
    return MODEL_TYPES[max(filter(name.startswith, MODEL_TYPES), key=len)]


LAYOUTS = [*SCRATCH, *{model_type(name): name for name in PUBLISHED}.values()]  # one a family


def sized(name):
    """The preset with a vocabulary; scanned layers have the same parameters in far fewer leaves."""
    config = PRESETS[name]
    vocabulary = config.vocab_size or (8192 if name in ("tiny", "small") else 32_768)
    # Windows have no parameters, and not every depth is a multiple of its pattern.
    return dataclasses.replace(
        config, vocab_size=vocabulary, scan_layers=True, window=None, attention_pattern=None,
        local_rope=None,
    )  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_counts(name):
    assert parameter_count(sized(name)) == PUBLISHED_COUNTS[name]


@pytest.mark.parametrize("name", SCRATCH)
def test_names_tell_the_size(name):
    assert parameter_count(sized(name)) == pytest.approx(NAMED_SIZES[name], rel=0.15)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_preset_is_what_the_release_reads_as(name):
    config = text_config(CONFIGS[name])
    family = family_of(config)
    assert family.model_type == model_type(name)
    assert architecture(family.read(config)) == architecture(PUBLISHED[name])


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_has_room_in_its_own_family(name):
    assert family_for(PUBLISHED[name], preferred=model_type(name)).model_type == model_type(name)


def test_golden_shardings():
    """Shape and layout of each parameter; `python tests/models/test_presets.py` writes the file."""
    golden = json.loads(SHARDINGS.read_text())
    assert sorted(golden) == sorted(LAYOUTS)
    for name in LAYOUTS:
        assert layout(name) == golden[name]


@pytest.mark.parametrize(
    "name, lengths",
    [("gpt2", [1024]), ("pythia-70m", [2048]), ("llama2-7b", [2048, 4096])],
)
def test_pretraining_goes_as_far_as_the_positions_in_steps_of_one_size(name, lengths):
    phases = load_config(ROOT / "configs" / "pretrain.py", f"size={name}").phases
    assert [phase.length for phase in phases] == lengths
    assert {phase.length * phase.batch for phase in phases} == {2**19}


def test_pretraining_has_20_tokens_for_each_parameter_that_a_token_meets():
    phases = load_config(ROOT / "configs" / "pretrain.py", "size=mixtral-8x7b").phases
    assert sum(phase.tokens for phase in phases) == pytest.approx(20 * 12.9e9, rel=0.01)


def layout(name):
    """{path: "shape → mesh axes"}."""

    def one(path, box):
        names = "/".join(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
        axes = ["+".join(sharding.mesh_axes(entry)) or "-" for entry in sharding.spec(box.names)]
        return names, f"{' '.join(map(str, box.value.shape))} → {' '.join(axes)}"

    shapes = jax.eval_shape(LanguageModel(sized(name)).init, jax.random.key(0))
    boxes = jax.tree_util.tree_leaves_with_path(shapes, is_leaf=lambda x: hasattr(x, "names"))
    return dict(one(path, box) for path, box in boxes)


if __name__ == "__main__":
    text = json.dumps({name: layout(name) for name in LAYOUTS}, indent=1, ensure_ascii=False)
    SHARDINGS.write_text(text + "\n")
