"""tools.merge: the merged run computes what the adapted one does, and can be started from."""

import jax
import numpy as np
import pytest

from llm_jax import checkpoint
from llm_jax.config import resolved
from llm_jax.mesh import MeshConfig, make_mesh
from llm_jax.models import LanguageModel, ModelConfig
from llm_jax.models.lora import LoraConfig
from llm_jax.runs import load_run
from llm_jax.stored import Base, at
from llm_jax.weights import fingerprint, init_trained
from tools import merge
from tools.cli import run_tool

TOKENS = np.array([[1, 2, 3, 4, 5]], np.int32)


@pytest.fixture
def tool(capsys):
    def call(*arguments):
        status = run_tool(merge.main, merge.define_flags(), "", ["merge", *arguments])
        return status, capsys.readouterr().err

    return call


@pytest.fixture
def adapted(tmp_path, save_run, tiny_model):
    """A run of adapters, none of them zero, on another run."""
    base_run = save_run(tmp_path / "base", [3])
    base = at(base_run, 3).read(make_mesh(MeshConfig()))
    config = ModelConfig(**{**vars(tiny_model.config), "lora": LoraConfig(rank=2)})
    trained = jax.tree.map(
        lambda box: box.value + 0.1,
        init_trained(config, (), jax.random.key(0), base=base),
        is_leaf=lambda x: hasattr(x, "names"),
    )
    run = save_run(tmp_path / "adapted", [])
    meta = {
        "stage": "sft",
        "model": resolved(config),
        "lineage": [],
        "base": resolved(Base(str(base_run), 3, fingerprint(base))),
    }
    checkpoint.write_weights(run, 7, trained, meta)
    return run


def hidden(path):
    run = load_run(str(path))
    return LanguageModel(run.model.config).apply(run.params, TOKENS)[0]


def test_the_merged_run_stands_alone(adapted, tmp_path, tool):
    status, error = tool(f"--workdir={adapted}", f"--output={tmp_path / 'merged'}")
    assert status == 0, error
    before = hidden(adapted)
    for folder in ("base", "adapted"):
        (tmp_path / folder).rename(tmp_path / f"{folder}-away")
    np.testing.assert_allclose(hidden(tmp_path / "merged"), before, atol=1e-5)
    run, step = checkpoint.locate(str(tmp_path / "merged"))
    meta = checkpoint.read_meta(run, step)
    assert step == 7 and meta["model"]["lora"] is None and "base" not in meta


def test_what_cannot_be_merged_is_refused(adapted, tmp_path, tool):
    base = tmp_path / "base"
    assert "has no adapters" in tool(f"--workdir={base}", f"--output={tmp_path / 'x'}")[1]
    assert "is there already" in tool(f"--workdir={adapted}", f"--output={base}")[1]
    assert "both needed" in tool(f"--workdir={adapted}")[1]
