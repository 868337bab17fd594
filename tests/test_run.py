"""The main job as subprocesses: its run directory, its record, and a run that is killed."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.tree_util import tree_leaves_with_path

from llm_jax import run
from llm_jax.checkpoint import CheckpointConfig
from llm_jax.data.offline import OfflineSource
from llm_jax.data.phases import PhaseConfig
from llm_jax.data.tokenizers import load_tokenizer
from llm_jax.errors import UserError
from llm_jax.json_files import write_json
from llm_jax.metrics import read_metrics_file

ROOT = Path(__file__).parents[1]
STEPS = 26
MAIN_JOB = (
    sys.executable, "-m", "llm_jax.main", "--config=configs/pretrain.py:size=tiny",
    "--config.tokenizer.vocab_size=512", "--config.tokenizer.train_bytes=200000",
    "--config.phases[0].steps=20", "--config.phases[1].steps=6",
    "--config.optimizer.warmup_steps=4", "--config.checkpoint.every=4",
    "--config.metrics.every=5", "--config.evaluation.every=10",
    "--config.sample.max_new_tokens=16",
)  # fmt: skip


def command(workdir):
    return [*MAIN_JOB, f"--workdir={workdir}"]


@pytest.fixture(scope="module")
def main_job(tmp_path_factory):
    """The folder of the finished main job, and what it printed."""
    workdir = tmp_path_factory.mktemp("main") / "run"
    done = subprocess.run(command(workdir), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return workdir, done.stdout


def records_of(workdir):
    return read_metrics_file(workdir / "metrics.jsonl")


def test_the_main_job_learns_and_says_what_to_do_next(main_job):
    workdir, output = main_job
    lines = output.splitlines()
    assert lines[-2:] == [
        f"curves:   tensorboard --logdir {workdir}",
        f"generate: python -m tools.generate --workdir={workdir} --prompt='...'",
    ]
    assert re.match(r"sample: ", lines[-3])
    assert re.match(rf"finished: {STEPS} steps, ", lines[-4])
    progress = [
        line for line in lines if re.match(r"step \d+/26  phase \d \(length \d+\)  loss", line)
    ]
    assert len(progress) == 6
    assert "attention by" in output and "parameters" in output and "FLOPs a token" in output

    records = records_of(workdir)
    losses = [r["loss"] for r in records if "loss" in r]
    assert losses[0] > 5.5 and losses[-1] < losses[0] - 0.5
    assert losses[0] > losses[1] > losses[2]
    bits = [r["eval/validation/bits_per_byte"] for r in records if "eval/validation/loss" in r]
    assert len(bits) == 3 and bits[1] < bits[0] < math.log2(512)  # the third has other rows


def test_the_run_directory_is_complete(main_job):
    workdir, _ = main_job
    names = {re.sub(r"tfevents.*", "tfevents", p.name) for p in workdir.iterdir()}
    assert names == {
        "config.json", "tokenizer", "checkpoints", "metrics.jsonl", "samples.jsonl",
        "events.out.tfevents", "result.json",
    }  # fmt: skip
    steps = sorted(int(p.name) for p in (workdir / "checkpoints").iterdir())
    assert steps == [24, 26]
    items = {p.name for p in (workdir / "checkpoints" / "26").iterdir() if p.is_dir()}
    assert items == {"params", "train", "data", "meta"}
    config = json.loads((workdir / "config.json").read_text())
    assert config["phases"][1]["steps"] == 6 and config["optimizer"]["warmup_steps"] == 4
    tokenizer = load_tokenizer(workdir / "tokenizer")
    assert tokenizer.decode(tokenizer.encode("def f(x):")) == "def f(x):"

    result = json.loads((workdir / "result.json").read_text())
    assert result["status"] == "finished"
    assert result["step"] == STEPS and result["tokens"] == 26 * 1024
    assert result["stage"] == "pretrain" and result["parent"] is None
    assert result["seconds"] > 0 and result["tokens_per_second"] > 0
    assert result["skipped_steps"] == 0 and "mfu" not in result
    assert result["hardware"] == {
        "platform": "cpu", "device": "cpu", "devices": 1, "processes": 1, "jax": jax.__version__
    }  # fmt: skip
    assert set(result["hashes"]) == {"config", "data", "tokenizer"}
    assert result["hashes"]["tokenizer"] == tokenizer.fingerprint
    for key in ("loss", "grad_norm", "learning_rate", "epoch", "eval/validation/perplexity"):
        assert math.isfinite(result["metrics"][key])
    meta = json.loads((workdir / "checkpoints" / "26" / "meta" / "metadata").read_text())
    assert meta["stage"] == "pretrain" and meta["lineage"] == [] and meta["length"] == 128
    assert meta["model"]["rope"]["theta"] == 40_000.0 and meta["model"]["vocab_size"] == 512


def test_the_finished_job_is_left_alone(main_job):
    workdir, _ = main_job
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    done = subprocess.run(command(workdir), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0
    assert done.stdout == (
        f"{workdir} is finished already: nothing to do (see {workdir / 'result.json'}).\n"
    )
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before


def test_a_job_that_is_killed_and_started_again_ends_bit_for_bit_the_same(main_job, tmp_path):
    workdir = tmp_path / "run"
    job = subprocess.Popen(command(workdir), cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        wait_for(lambda: (workdir / "checkpoints" / "4").is_dir() or job.poll() is not None)
        time.sleep(np.random.default_rng().uniform(0, 0.5))
    finally:
        job.kill()
        job.wait()
    assert job.returncode == -signal.SIGKILL
    assert not (workdir / "result.json").exists()
    done = subprocess.run(command(workdir), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "resumed at step" in done.stdout
    assert_same_end(workdir, main_job[0], STEPS)


def wait_for(condition, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def assert_same_end(workdir, reference, step):
    result, expected = (
        json.loads((folder / "result.json").read_text()) for folder in (workdir, reference)
    )
    assert result["hashes"] == expected["hashes"]
    assert without_speeds(records_of(workdir)) == without_speeds(records_of(reference))
    for item in ("params", "train"):
        with ocp.StandardCheckpointer() as checkpointer:
            ends = [
                checkpointer.restore(folder.absolute() / "checkpoints" / str(step) / item)
                for folder in (workdir, reference)
            ]
        leaves, expected = (
            {str(p): np.asarray(x) for p, x in tree_leaves_with_path(end)} for end in ends
        )
        assert leaves.keys() == expected.keys()
        for name, leaf in leaves.items():
            assert leaf.tobytes() == expected[name].tobytes(), name


def without_speeds(records):
    return [{k: v for k, v in r.items() if k != "tokens_per_second"} for r in records]


# --- damaged checkpoints --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config(tiny_config):
    return tiny_config(
        phases=(PhaseConfig(length=32, batch=8, steps=6),),
        checkpoint=CheckpointConfig(every=2, keep_latest=3),
    )


@pytest.fixture(scope="module")
def whole(config, run_on, tmp_path_factory):
    """The folder of a run that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    assert run_on(1, config, workdir) == 0
    return workdir


@pytest.fixture(scope="module")
def stopped(config, run_on, tmp_path_factory):
    """The folder of a run that was stopped at step 5, with checkpoints 2, 4 and 5."""
    workdir = tmp_path_factory.mktemp("stopped") / "run"
    real = OfflineSource.next

    def next_batch(source, params, step):
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(source, params, step)

    with mock.patch.object(OfflineSource, "next", next_batch):
        assert run_on(1, config, workdir) == 128 + signal.SIGTERM
    return workdir


def halve(paths):
    for path in paths:
        os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("damaged, resumed", [((5,), 4), ((5, 4), 2)])
@pytest.mark.parametrize("pattern", ["*/**/d/*", "*/_METADATA", "meta/metadata"])
def test_a_run_falls_back_to_the_newest_checkpoint_that_can_be_read(
    config, whole, stopped, run_on, tmp_path, capsys, damaged, resumed, pattern
):
    workdir = tmp_path / "run"
    shutil.copytree(stopped, workdir)
    for step in damaged:
        halve((workdir / "checkpoints" / str(step)).glob(pattern))
    assert run_on(1, config, workdir) == 0
    output = capsys.readouterr().out
    if "meta" not in pattern:  # resuming itself needs no meta
        for step in damaged:
            assert f"checkpoint {step} cannot be read" in output
        assert f"resumed at step {resumed}\n" in output
    assert_same_end(workdir, whole, 6)


# --- the folder -----------------------------------------------------------------------------------


def test_a_run_that_died_before_its_first_checkpoint_starts_again(config, run_on, whole, tmp_path):
    class Killed(BaseException):
        pass

    with (
        mock.patch.object(OfflineSource, "next", side_effect=Killed),
        pytest.raises(Killed),
    ):
        run_on(1, config, tmp_path)
    assert run_on(1, config, tmp_path) == 0
    assert_same_end(tmp_path, whole, 6)


def test_a_hidden_file_makes_no_folder_someone_elses(config, run_on, tmp_path):
    (tmp_path / ".config.json12345").write_text("left by a crash")
    assert run_on(1, config, tmp_path) == 0


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert path.stat().st_mode & 0o777 == 0o644


def test_an_unknown_trainer_is_refused(config, tmp_path):
    other = config.copy_and_resolve_references()
    other.trainer = "pretrian"
    with pytest.raises(UserError, match="Did you mean 'pretrain'"):
        run.run(other, tmp_path / "run")
    assert not (tmp_path / "run").exists()
