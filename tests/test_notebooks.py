"""The notebooks run from top to bottom, on tiny models, but for cells that need a network.

The values of the cell that is tagged `parameters` are replaced by smaller ones, as papermill does.
"""

import json
import os
from pathlib import Path

import jax
import pytest

from llm_jax import mesh, run, runs
from llm_jax.data.phases import PhaseConfig
from llm_jax.models.config import ModelConfig
from tools.convert.__main__ import main as convert

ROOT = Path(__file__).parents[1]
NAMES = sorted(path.name for path in (ROOT / "notebooks").glob("*.ipynb"))
# Cells that install, download, serve or display.
LEFT_OUT = {"setup", "display"}


def read(name):
    return json.loads((ROOT / "notebooks" / name).read_text(encoding="utf-8"))


def code_cells(name):
    """(source, tags) of each code cell."""
    for cell in read(name)["cells"]:
        if cell["cell_type"] == "code":
            yield "".join(cell["source"]), set(cell["metadata"].get("tags", []))


@pytest.fixture
def execute(tmp_path, monkeypatch):
    """`execute(name, devices, **parameters)`: runs a notebook's cells in a folder of their own, on
    so many of the devices; returns the names that they defined."""
    work = tmp_path / "work"
    work.mkdir()
    os.symlink(ROOT / "configs", work / "configs")
    monkeypatch.chdir(work)

    def execute(name, devices=1, **parameters):
        def make_mesh(config):
            return mesh.make_mesh(config, jax.devices()[:devices])

        for module in (run, runs):
            monkeypatch.setattr(module, "make_mesh", make_mesh)
        names = {}
        for source, tags in code_cells(name):
            if tags & LEFT_OUT:
                continue
            exec(compile(source, name, "exec"), names)
            if "parameters" in tags:
                assert parameters.keys() <= names.keys()
                names |= parameters
        return names

    return execute


def is_picture(path):
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_well_formed_and_has_no_outputs(name):
    notebook = read(name)
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in notebook["cells"]:
        kinds = {"markdown": set(), "code": {"outputs", "execution_count"}}
        assert set(cell) == {"cell_type", "id", "metadata", "source"} | kinds[cell["cell_type"]]
        assert not cell.get("outputs") and cell.get("execution_count") is None
    first = next(code_cells(name))
    assert first == next(code_cells("pretrain_context.ipynb")) and "setup" in first[1]
    assert sum("parameters" in tags for _, tags in code_cells(name)) == 1


@pytest.fixture
def published(tiny_config, run_on, tmp_path):
    """A Hugging Face folder of a tiny model."""
    model = ModelConfig(embed_dim=16, num_layers=2, num_heads=2, mlp_dim=24, max_length=512)
    config = tiny_config(model=model, phases=(PhaseConfig(length=32, batch=8, steps=2),))
    assert run_on(1, config, tmp_path / "run") == 0
    folder = tmp_path / "published"
    assert convert(["convert", "export", f"--workdir={tmp_path / 'run'}", f"--hf={folder}"]) == 0
    return folder


@pytest.fixture
def chats(tmp_path):
    rows = [{"prompt": f"ask {i}", "completion": f"say {i % 3}"} for i in range(40)]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.slow
def test_fine_tuning_a_published_model(published, chats, execute):
    names = execute(
        "finetune_published.ipynb", devices=8, MODEL=str(published), DATA=str(chats), LENGTH=64,
        BATCH=8, STEPS=2, DTYPE="float32",
    )  # fmt: skip
    assert names["status"] == 0
    assert Path("export/model/model.safetensors").exists()
    assert Path("export/adapters/adapter_model.safetensors").exists()
    assert is_picture(Path("runs/lora.png"))


@pytest.mark.slow
def test_pre_training_with_a_growing_context(corpus, execute, capsys):
    names = execute(
        "pretrain_context.ipynb", TEXT=str(corpus), TOKENIZER="bytes", LENGTHS=(64, 128),
        STEPS=(3, 3), ROPE_BASES=(1e4, 2e4), TOKENS_A_STEP=1024, MAX_EXTRA_STEPS=2,
    )  # fmt: skip
    assert names["status"] == 0
    assert is_picture(Path("runs/context.png"))
    out = capsys.readouterr().out
    assert "batch of step 5, in phase 2 of 2" in out
    assert "from position    64: " in out


@pytest.mark.slow
def test_reward_model_and_dpo(corpus, chats, tmp_path, execute, capsys):
    pairs = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": f"ask {i}", "chosen": f"say {i % 3}", "rejected": f"not {i % 3}"}
        for i in range(80)
    ]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    execute(
        "reward_and_dpo.ipynb", TEXT=str(corpus), CHATS=str(chats), PAIRS=str(pairs), SIZE="tiny",
        STEPS={"pretrain": (2, 2), "sft": 2, "reward": 2, "dpo": 2},
    )  # fmt: skip
    assert is_picture(Path("runs/reward.png")) and is_picture(Path("runs/dpo.png"))
    out = capsys.readouterr().out
    assert "the chosen one is longer in 0% of the pairs" in out
    assert "sft: " in out and "dpo: " in out


@pytest.mark.slow
def test_grpo(corpus, execute, capsys):
    names = execute(
        "grpo.ipynb", TEXT=str(corpus), SIZE="tiny", BATCH=16, SAMPLES=4,
        STEPS={"pretrain": (2, 2), "sft": 2, "grpo": 2},
    )  # fmt: skip
    assert names["status"] == 0
    assert is_picture(Path("runs/grpo.png"))
    out = capsys.readouterr().out
    assert "of the answers teach something" in out and "grpo: {'What is 47 + 85?': " in out


@pytest.mark.slow
def test_inference_and_the_needle_map(corpus, tiny_config, run_on, tmp_path, execute, capsys):
    workdir = tmp_path / "run"
    config = tiny_config(phases=(PhaseConfig(length=64, batch=8, steps=2),))
    assert run_on(1, config, workdir) == 0
    (tmp_path / "text.txt").write_text("A text that is longer than the run's rows. " * 3)
    names = execute(
        "inference_and_needle.ipynb", RUN=str(workdir), TEXT=str(corpus),
        FILE=str(tmp_path / "text.txt"),
        LENGTHS=(64, 96, 256), DEPTHS=2, PER_CELL=2,
    )  # fmt: skip
    needle = names["record"]["tasks"]["needle"]
    assert len(needle["examples"]) == 2 * 2 * 2  # 256 is past the positions of the model
    assert "  accuracy_by_length                 64: " in capsys.readouterr().out
    assert is_picture(Path("runs/needle.png")) and is_picture(Path("runs/attention.png"))
    assert "<main>" in Path("runs/loss.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_sweeps(corpus, execute, monkeypatch, capsys):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # points are processes, in the notebook's folder
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    names = execute(
        "sweeps.ipynb", GRID={"optimizer.learning_rate": (1e-3, 2e-3)}, FIXED={
            "sample.max_new_tokens": 0, "data.source": str(corpus), "phases[0].steps": 2,
            "phases[1].steps": 2, "optimizer.warmup_steps": 1,
        },
    )  # fmt: skip
    assert names["status"] == 0
    assert is_picture(Path("runs/sweep/sweep.png")) and is_picture(Path("runs/sweep/curves.png"))
    assert "2 points, 0 of them finished already" in capsys.readouterr().out
