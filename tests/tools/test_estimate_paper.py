"""`python -m tools.estimate paper` and `plan`: what they print and write."""

import json
import re

import pytest

from llm_jax.mesh import MeshConfig
from llm_jax.optim import OptimizerConfig
from llm_jax.scaling.memory import training_memory
from tools.cli import run_command
from tools.estimate import paper
from tools.estimate.jobs import read_cluster, read_job

COMMANDS = {"paper": "tools.estimate.paper", "plan": "tools.estimate.planning"}
CONFIG = "--config=configs/pretrain.py:size=llama2-7b"


@pytest.fixture
def estimate(capsys):
    """Runs `python -m tools.estimate ...`; returns exit status, stdout, stderr."""

    def call(*arguments):
        status = run_command(COMMANDS, "", ["tools.estimate", *arguments], takes_overrides=True)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def test_paper_tells_memory_time_money_and_checkpoints(estimate, tmp_path):
    path = tmp_path / "paper.json"
    status, out, err = estimate(
        "paper", CONFIG, "--chip=v5e", "--chips=16", "--price=1.2", "--utilisation=0.5",
        "--config.step.micro_batch_tokens=8192", f"--json={path}",
    )  # fmt: skip
    assert status == 0, err
    found = json.loads(path.read_text())
    training = found["training"]
    assert training["parameters"] == 6_738_415_616
    assert training["tokens"] == pytest.approx(20 * 6_738_415_616, rel=1e-3)
    hours = training["FLOPs with attention"] / (197e12 * 0.5) / 3600
    assert training["chip hours"] == pytest.approx(hours)
    assert training["cost"] == pytest.approx(1.2 * hours)
    assert training["days"] == pytest.approx(hours / 16 / 24)
    values = paper.define_flags()
    values(["paper", CONFIG])
    job, _ = read_job(values, [])
    memory = training_memory(
        job.model, OptimizerConfig(), MeshConfig(data=1, fsdp=16), length=4096, batch=128,
        micro_batches=4, chunk=512, platform="tpu",
    )  # fmt: skip
    assert found["memory"][f"most, at the {memory.fullest}"] == memory.peak
    assert found["checkpoints"]["a checkpoint"] == 12 * 6_738_415_616
    assert found["generation"]["weights in bfloat16"] == 2 * 6_738_415_616
    assert re.search(r"most, at the \w+ +13\.\d+ GiB of 15\.75 that XLA has: it fits", out)
    for title in ("training", "memory", "checkpoints", "generation"):
        assert re.search(f"^{title}$", out, re.MULTILINE)
    assert all(len(line) <= 120 for line in out.splitlines())


def test_tokens_and_rows_may_be_given(estimate, tmp_path):
    path = tmp_path / "paper.json"
    status, _, err = estimate(
        "paper", "--config=configs/pretrain.py:size=125m", "--chips=h100x8", "--tokens=1e9",
        "--length=1024", "--batch=64", f"--json={path}",
    )  # fmt: skip
    assert status == 0, err
    found = json.loads(path.read_text())
    assert found["training"]["tokens"] == 1e9 and found["memory"]["batch"] == 64


def test_plan_prints_settings_that_paper_takes(estimate, tmp_path):
    path = tmp_path / "plan.json"
    status, out, err = estimate("plan", CONFIG, "--chips=v5e-16", f"--json={path}")
    assert status == 0, err
    assert "--config.mesh.fsdp=16" in out and "--config.step.micro_batch_tokens=8192" in out
    assert json.loads(path.read_text())["mesh"]["fsdp"] == 16
    settings = [word for word in out.split() if word.startswith("--config.")]
    status, out, err = estimate("paper", CONFIG, "--chips=v5e-16", *settings)
    assert status == 0, err
    assert "it fits" in out


@pytest.mark.parametrize("arguments, message", [
    (["plan", CONFIG], "name the cluster by --chips"),
    (["plan", CONFIG, "--chips=v5e-15"], "Known: v5e-1"),
    (["plan", CONFIG, "--chips=v5e-16", "--length=8192"], "past the positions"),
    (["plan", "--chips=v5e-16"], "--config is required"),
    (["paper", CONFIG], "name the chips"),
    (["paper", CONFIG, "--chips=16"], "name the chips"),
    (["paper", CONFIG, "--chip=v5f", "--chips=16"], "the chip 'v5f' is unknown. Did you mean"),
    (["paper", CONFIG, "--chips=v5e-16", "--utilisation=1.5"], "--utilisation=1.5"),
    (["paper", CONFIG, "--chips=v5e-16", "--write_gigabytes=0"], "--write_gigabytes=0"),
    (["paper", CONFIG, "--chips=v5e-16", "--config.mesh.fsdp=3"], "does not fit 16 devices"),
    (["paper", CONFIG, "--chips=v5e-16", "--config.mesh.tensor=16", "--config.mesh.fsdp=1",
      "--batch=3"], None),
    (["paper", CONFIG, "--chips=v5e-16", "--batch=24"], "does not divide the batch=24"),
    (["paper", "--config=configs/sft.py", "--chips=v5e-16"], "no pre-training config"),
])  # fmt: skip
def test_bad_input_is_told_in_one_line(estimate, arguments, message):
    status, _, err = estimate(*arguments)
    if message is None:
        assert status == 0, err
    else:
        assert status == 2 and message in err and err.count("\n") == 1


def test_chips_are_named_in_two_ways():
    assert read_cluster("v5p", "64") == read_cluster(None, "v5p-128")
