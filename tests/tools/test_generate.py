import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from llm_jax import sharding
from llm_jax.checkpoint import CheckpointConfig, Checkpointer
from llm_jax.config import resolved
from llm_jax.data.tokenizer_base import ByteTokenizer
from llm_jax.errors import UserError
from llm_jax.generation.generate import sample_texts
from llm_jax.generation.sampler import SamplerConfig
from llm_jax.models import LanguageModel, ModelConfig
from llm_jax.runs import load_run
from llm_jax.types import TrainState
from tools.cli import run_tool
from tools.generate import define_flags, main

MODEL = ModelConfig(vocab_size=320, embed_dim=16, num_layers=1, num_heads=2, mlp_dim=16,
                    max_length=64)  # fmt: skip


def random_params(seed):
    rng = np.random.default_rng(seed)
    shapes = sharding.unbox(jax.eval_shape(LanguageModel(MODEL).init, jax.random.key(0)))
    return jax.tree.map(lambda x: rng.normal(0, 0.5, x.shape).astype(np.float32), shapes)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run directory with checkpoints 3 and 5; the parameters of a step are made of its number."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    ByteTokenizer().save(folder / "tokenizer")
    checkpointer = Checkpointer(folder, CheckpointConfig(keep_latest=2))
    meta = {"stage": "pretrain", "model": resolved(MODEL), "length": 32, "lineage": []}
    for step in (3, 5):
        params = jax.tree.map(jax.numpy.asarray, random_params(step))
        state = TrainState(jax.numpy.int32(step), params, {}, jax.random.key(0))
        checkpointer.save(step, state, params, {}, meta)
    checkpointer.wait()
    checkpointer.close()
    return folder


@pytest.fixture
def copy(workdir, tmp_path):
    """A run that a test may damage."""
    return shutil.copytree(workdir, tmp_path / "copy")


@pytest.fixture
def tool(capsys):
    """Runs the tool; returns exit status, stdout, stderr."""

    def call(*arguments):
        status = run_tool(main, define_flags(), "", ["generate", *arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


@pytest.mark.parametrize(("suffix", "step"), [("", 5), ("@3", 3)])
def test_a_run_is_loaded_at_its_newest_checkpoint_or_the_one_named(workdir, suffix, step):
    run = load_run(f"{workdir}{suffix}")
    assert (run.path, run.step, run.model.config) == (workdir, step, MODEL)
    assert run.meta["length"] == 32
    assert run.tokenizer.fingerprint == ByteTokenizer().fingerprint
    jax.tree.map(np.testing.assert_array_equal, run.params, random_params(step))
    assert all(
        leaf.sharding.device_set == set(jax.devices()) for leaf in jax.tree.leaves(run.params)
    )


def test_a_run_is_loaded_onto_the_mesh_that_is_asked_for(workdir):
    run = load_run(str(workdir), sharding.MeshConfig(data=1, fsdp=-1))
    table = run.params["embedding"]
    assert table.sharding.shard_shape(table.shape) == (320, 2)


def test_the_tool_prints_prompt_and_continuation_alone(workdir, tool):
    arguments = [f"--workdir={workdir}", "--prompt=def ", "--max_new_tokens=12", "--seed=4",
                 "--temperature=0.8", "--top_k=40", "--top_p=0.9"]  # fmt: skip
    status, out, err = tool(*arguments)
    sampler = SamplerConfig(temperature=0.8, top_k=40, top_p=0.9)
    texts = sample_texts(
        LanguageModel(MODEL), random_params(5), ByteTokenizer(), ["def "] * 2, max_new_tokens=12,
        sampler=sampler, seed=4,
    )  # fmt: skip
    assert status == 0
    assert out == f"{texts[0]}\n" and out.startswith("def ") and len(out) > 6
    assert "checkpoint 5" in err

    _, out, _ = tool(*arguments, "--num_samples=2")
    assert out == "".join(f"{text}\n" for text in texts)


def test_the_defaults_are_the_samplers(workdir, tool):
    _, out, _ = tool(f"--workdir={workdir}@3", "--max_new_tokens=12")
    expected = sample_texts(
        LanguageModel(MODEL), random_params(3), ByteTokenizer(), [""], max_new_tokens=12,
        sampler=SamplerConfig(),
    )  # fmt: skip
    assert out == f"{expected[0]}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--workdir is required"),
        (["--workdir=no/such/run"], "no/such/run is no run directory"),
        (["--workdir=RUN@4"], "has no checkpoint '4'; it has 3, 5"),
        (["--workdir=RUN", f"--prompt={'x' * 60}"], "prompt 0 of 61 tokens and max_new_tokens=128"),
        (["--workdir=RUN", "--max_new_tokens=0"], "max_new_tokens=0"),
        (["--workdir=RUN", "--temperature=-1"], "temperature=-1.0"),
        (["--workdir=RUN", "--top_p=2"], "top_p=2.0"),
        (["--workdir=RUN", "--num_samples=0"], "--num_samples=0"),
        (["--workdir=RUN", "--prompt=\udcff"], "--prompt is not UTF-8"),
        (["--workdir=RUN", "--temprature=1"], "Did you mean: temperature"),
        (["--workdir=RUN", "--top_k=many"], "top_k=many"),
        (["--workdir=RUN", "prompt"], "unexpected argument 'prompt'"),
    ],
)
def test_bad_input_gets_one_line(workdir, tool, arguments, message):
    status, out, err = tool(*(a.replace("RUN", str(workdir)) for a in arguments))
    last = err.splitlines()[-1]
    assert status == 2 and out == ""
    assert last.startswith("error: ") and message in last
    assert err.count("error") == 1 and "Traceback" not in err


def test_a_run_without_a_checkpoint_gets_one_line(copy, tool):
    shutil.rmtree(copy / "checkpoints")
    status, out, err = tool(f"--workdir={copy}")
    assert (status, out) == (2, "")
    assert err == f"error: {copy} holds no checkpoint yet: run its stage first.\n"


@pytest.mark.parametrize("damage", ["checkpoints/5/params", "checkpoints/5/meta", "tokenizer"])
def test_a_damaged_run_gets_one_line(copy, tool, damage):
    shutil.rmtree(copy / damage)
    status, out, err = tool(f"--workdir={copy}")
    assert (status, out) == (2, "")
    assert err.startswith("error: ") and str(copy / damage) in err and err.count("\n") == 1


def test_debug_shows_the_traceback(workdir, tool):
    with pytest.raises(UserError, match="no run directory"):
        tool("--workdir=no/such/run", "--debug")


def test_help_does_not_wait_for_jax():
    code = """
import runpy, sys
sys.argv = ["generate", "--help"]
try:
    runpy.run_module("tools.generate", run_name="__main__")
finally:
    assert "jax" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "python -m tools.generate --workdir=RUN" in done.stdout
    assert "--max_new_tokens: tokens to add at most (default: 128)" in done.stdout


def test_the_command_line_ends_with_the_status():
    command = [sys.executable, "-m", "tools.generate", "--top_k=0", "--workdir=RUN"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: sampler.top_k=0")


def test_what_training_writes_can_be_continued(run_on, tiny_config, tmp_path, tool, capsys):
    folder = tmp_path / "run"
    run_on(1, tiny_config(), folder)
    capsys.readouterr()
    status, out, err = tool(f"--workdir={folder}", "--prompt=kalo ", "--max_new_tokens=8")
    assert status == 0 and out.startswith("kalo ")
    assert f"checkpoint {json.loads((folder / 'result.json').read_text())['step']}" in err
