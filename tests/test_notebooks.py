"""The notebooks run from top to bottom, on a tiny model, but for cells that need a network."""

import json
import os
from pathlib import Path

import pytest

from llm_jax.data.phases import PhaseConfig
from llm_jax.models.config import ModelConfig
from tools.convert.__main__ import main as convert

ROOT = Path(__file__).parents[1]
# Cells that install, download, serve or display.
LEFT_OUT = {"setup", "display"}


def cells(name):
    """(source, tags) of each code cell."""
    notebook = json.loads((ROOT / "notebooks" / name).read_text())
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"], "a notebook is committed without outputs"
            yield "".join(cell["source"]), set(cell["metadata"].get("tags", []))


@pytest.fixture
def published(tiny_config, run_on, tmp_path):
    """A Hugging Face folder of a tiny model."""
    model = ModelConfig(embed_dim=16, num_layers=2, num_heads=2, mlp_dim=24, max_length=512)
    config = tiny_config(model=model, phases=(PhaseConfig(length=32, batch=8, steps=2),))
    assert run_on(1, config, tmp_path / "run") == 0
    folder = tmp_path / "published"
    assert convert(["convert", "export", f"--workdir={tmp_path / 'run'}", f"--hf={folder}"]) == 0
    return folder


def test_fine_tuning_a_published_model(published, tmp_path, monkeypatch):
    chats = tmp_path / "chats.jsonl"
    rows = [{"prompt": f"ask {i}", "completion": f"say {i % 3}"} for i in range(40)]
    chats.write_text("".join(json.dumps(row) + "\n" for row in rows))
    work = tmp_path / "work"
    work.mkdir()
    os.symlink(ROOT / "configs", work / "configs")
    monkeypatch.chdir(work)
    small = {
        "MODEL": str(published), "DATA": str(chats), "LENGTH": 64, "BATCH": 8, "STEPS": 2,
        "DTYPE": "float32",
    }  # fmt: skip
    names = {}
    for source, tags in cells("finetune_published.ipynb"):
        if tags & LEFT_OUT:
            continue
        exec(source, names)
        if "parameters" in tags:
            assert small.keys() <= names.keys()
            names |= small
    assert names["status"] == 0
    assert (work / "export" / "model" / "model.safetensors").exists()
    assert (work / "export" / "adapters" / "adapter_model.safetensors").exists()
    assert (work / "runs" / "lora.png").stat().st_size > 5000
