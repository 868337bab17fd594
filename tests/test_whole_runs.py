"""The tiny pre-training run, whole, and the chain of stages after it: minutes long."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest

from llm_jax.metrics import read_metrics_file
from llm_jax.recipe import load_config
from llm_jax.run import run
from llm_jax.runs import load_run

pytestmark = pytest.mark.slow

COMMAND = [sys.executable, "-m", "llm_jax.main", "--config=configs/pretrain.py:size=tiny"]


@pytest.fixture(scope="module", autouse=True)
def _processes_as_users_have_them():
    """They run for long, so compilers are to do what they can."""
    with mock.patch.dict(os.environ, JAX_DISABLE_MOST_OPTIMIZATIONS="false", XLA_FLAGS=""):
        yield


def train(workdir):
    return subprocess.run([*COMMAND, f"--workdir={workdir}"], capture_output=True, text=True)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    result = train(workdir)
    assert result.returncode == 0, result.stderr
    return workdir


def test_the_loss_falls_and_bits_per_byte_are_reported(whole_run):
    records = read_metrics_file(whole_run / "metrics.jsonl")
    losses = [record["loss"] for record in records if "loss" in record]
    assert losses[-1] < losses[0] - 1.5
    bits = [r["eval/validation/bits_per_byte"] for r in records if "eval/validation/loss" in r]
    assert bits == sorted(bits, reverse=True) and bits[-1] < 3.2


def test_a_run_killed_at_a_random_step_ends_with_the_same_parameters(whole_run, tmp_path):
    workdir = tmp_path / "killed"
    process = subprocess.Popen([*COMMAND, f"--workdir={workdir}"], stdout=subprocess.DEVNULL)
    wanted = int(np.random.default_rng().integers(12, 60))
    while process.poll() is None:
        records = (workdir / "metrics.jsonl").exists() and read_metrics_file(
            workdir / "metrics.jsonl"
        )
        if records and records[-1]["step"] >= wanted:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.05)
    assert process.wait() == -signal.SIGKILL, f"it ended before step {wanted}"
    assert train(workdir).returncode == 0
    whole, resumed = load_run(str(whole_run)), load_run(str(workdir))
    assert whole.step == resumed.step
    expected = jax.tree_util.tree_leaves_with_path(whole.params)
    for (path, leaf), found in zip(expected, jax.tree.leaves(resumed.params), strict=True):
        message = f"{jax.tree_util.keystr(path)}, killed after step {wanted}"
        np.testing.assert_array_equal(leaf, found, err_msg=message)
    results = [json.loads((run / "result.json").read_text()) for run in (whole_run, workdir)]
    assert results[0]["hashes"] == results[1]["hashes"]


@pytest.mark.usefixtures("optimised")
def test_the_context_is_extended_from_a_model_that_matches_names(tmp_path):
    config = load_config(Path("configs/context_extension.py"))
    config.phases = config.phases[:1]
    config.phases[0].gate.max_extra_steps = 0
    config.sample.max_new_tokens = 0
    config.seed = 1  # not the one that the README shows
    assert run(config, tmp_path) == 0
    records = read_metrics_file(tmp_path / "metrics.jsonl")
    accuracies = [r["eval/needle/accuracy"] for r in records if "eval/needle/accuracy" in r]
    # A model that copies any of the four values in sight is right once in four times.
    assert len(accuracies) == 3 and accuracies[0] < 0.6 and accuracies[-1] > 0.85


def test_the_chain_of_stages_gains_on_what_is_held_out(tmp_path):
    command = [
        sys.executable, "-m", "llm_jax.main", "--config=configs/recipes/chat.py:size=tiny",
        f"--workdir={tmp_path / 'chat'}", "--config.sft.phases[0].steps=150",
        "--config.reward.phases[0].steps=150", "--config.dpo.phases[0].steps=80",
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr

    def first_and_last(stage, key):
        records = read_metrics_file(tmp_path / "chat" / stage / "metrics.jsonl")
        values = [record[key] for record in records if key in record]
        return values[0], values[-1]

    before, after = first_and_last("sft", "eval/validation/loss")
    assert after < before - 2
    before, after = first_and_last("sft", "eval/answers/token_f1")
    assert before < 0.1 and after > 0.25
    assert first_and_last("sft", "eval/answers/sampling_logprob_difference")[1] < 1e-4
    before, after = first_and_last("reward", "eval/validation/accuracy")
    assert before < 0.6 and after > 0.8
    before, after = first_and_last("dpo", "eval/validation/loss")
    assert before == pytest.approx(np.log(2), abs=1e-4) and after < 0.6
    assert first_and_last("dpo", "eval/validation/rewards/accuracies")[1] > 0.75
    result = json.loads((tmp_path / "chat" / "dpo" / "result.json").read_text())
    assert [ancestor["stage"] for ancestor in result["lineage"]] == ["pretrain", "sft"]
