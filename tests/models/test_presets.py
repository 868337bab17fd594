"""The presets' sizes and layouts, from shapes alone."""

import dataclasses
import json
import pathlib

import jax
import pytest

from llm_jax import sharding
from llm_jax.models import LanguageModel, parameter_count
from llm_jax.models.presets import PRESETS, PUBLISHED, SCRATCH

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "shardings.json"

# From the releases' checkpoints (the sum of the tensors' sizes, tied ones once).
PUBLISHED_COUNTS = {
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.1-405b": 405_853_388_800,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
}
NAMED_SIZES = {
    "tiny": 1e6, "small": 10e6, "125m": 125e6, "350m": 350e6, "760m": 760e6, "1b": 1.1e9,
    "3b": 3e9, "7b": 7e9,
}  # fmt: skip


def shapes(name):
    """Boxed shapes; scanned layers have the same parameters in far fewer leaves."""
    config = PRESETS[name]
    vocabulary = config.vocab_size or (8192 if name in ("tiny", "small") else 32_768)
    config = dataclasses.replace(config, vocab_size=vocabulary, scan_layers=True)
    return config, jax.eval_shape(LanguageModel(config).init, jax.random.key(0))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_counts(name):
    assert parameter_count(shapes(name)[0]) == PUBLISHED_COUNTS[name]


@pytest.mark.parametrize("name", SCRATCH)
def test_names_tell_the_size(name):
    assert parameter_count(shapes(name)[0]) == pytest.approx(NAMED_SIZES[name], rel=0.15)


def test_golden_shardings():
    """Every parameter's shape and layout; `python tests/models/test_presets.py` writes the file."""
    golden = json.loads(GOLDEN.read_text())
    assert sorted(golden) == sorted(PRESETS)
    for name in PRESETS:
        assert layout(name) == golden[name]


def layout(name):
    """{path: "shape → mesh axes"}."""

    def one(path, box):
        names = "/".join(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
        axes = [entry or "-" for entry in sharding.spec(box.names)]
        return names, f"{' '.join(map(str, box.value.shape))} → {' '.join(axes)}"

    boxes = jax.tree_util.tree_leaves_with_path(
        shapes(name)[1], is_leaf=lambda x: hasattr(x, "names")
    )
    return dict(one(path, box) for path, box in boxes)


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    text = json.dumps({name: layout(name) for name in PRESETS}, indent=1, ensure_ascii=False)
    GOLDEN.write_text(text + "\n")
