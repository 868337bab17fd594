"""Several processes as one run, as processes on this machine that meet over loopback.

Legend: a launch of 2 processes with 2 devices each is compared with 1 process that has all 4.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from llm_jax.checkpoint import latest_step
from llm_jax.metrics import read_metrics_file
from llm_jax.runs import load_run

ROOT = Path(__file__).parents[1]
STEPS = 8
DEVICES = 4
# Sums over devices are made in another order where processes hold some of them.
TOLERANCE = 1e-5

CONFIG = '''
from llm_jax.checkpoint import CheckpointConfig
from llm_jax.config import defaults
from llm_jax.data.corpus import ComponentConfig, DataConfig
from llm_jax.data.phases import PhaseConfig
from llm_jax.data.tokenizers import TokenizerConfig
from llm_jax.mesh import MeshConfig
from llm_jax.metrics import MetricsConfig
from llm_jax.models.config import ModelConfig
from llm_jax.optim import OptimizerConfig
from llm_jax.trainers.base import SampleConfig
from llm_jax.trainers.pretrain import PretrainConfig, PretrainEvaluationConfig


def get_config(argument=None):
    return defaults(
        PretrainConfig,
        model=ModelConfig(embed_dim=32, num_layers=2, num_heads=2, mlp_dim=64, max_length=64),
        tokenizer=TokenizerConfig(path="bytes"),
        data=DataConfig(
            source={source!r},
            mixture=(ComponentConfig(name="other", source={other!r}),),
            weights=dict(text=3.0, other=1.0),
            packing="best_fit",
            validation_fraction=0.1,
        ),
        phases=(PhaseConfig(length=32, batch=8, steps={steps}),),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=2),
        # 11 rows in batches of 8: the last batch has 3 rows and 5 of padding.
        evaluation=PretrainEvaluationConfig(every=4, rows=11),
        checkpoint=CheckpointConfig(every=2),
        metrics=MetricsConfig(every=1, tensorboard=False),
        sample=SampleConfig(max_new_tokens=8),
        mesh=MeshConfig(data=-1, fsdp=2),
    )
'''


@pytest.fixture(scope="module")
def config_file(tmp_path_factory, corpus, other_corpus):
    path = tmp_path_factory.mktemp("config") / "pretrain.py"
    path.write_text(CONFIG.format(source=str(corpus), other=str(other_corpus), steps=STEPS))
    return path


class Launch:
    """Processes of one run. `wait` gives their exit statuses, and what each of them printed."""

    def __init__(self, count, flags, *, devices=DEVICES, environment=None, packages=None):
        """flags: of all, or of each. packages: where each finds llm_jax."""
        self.address = f"127.0.0.1:{free_port()}"
        each = flags if isinstance(flags[0], list) else [flags] * count
        self.processes = []
        for index in range(count):
            place = [f"--coordinator={self.address}", f"--processes={count}",
                     f"--process={index}", "--peer_timeout=60", "--heartbeat_timeout=8"]  # fmt: skip
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "llm_jax.main", *(place if count > 1 else []),
                     *each[index]],
                    cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                    start_new_session=True,
                    env={
                        **os.environ,
                        "JAX_PLATFORMS": "cpu",
                        "JAX_NUM_CPU_DEVICES": str(devices // count),
                        "PYTHONPATH": str(packages[index] if packages else ROOT),
                        **(environment or {}),
                    },
                )
            )  # fmt: skip

    def wait(self, timeout=120):
        """Kills what is left after `timeout` seconds, and fails."""
        deadline = time.monotonic() + timeout
        outputs = []
        for process in self.processes:
            try:
                outputs.append(process.communicate(timeout=max(0.1, deadline - time.monotonic())))
            except subprocess.TimeoutExpired:
                self.kill()
                pytest.fail(f"still running after {timeout} s: {process.communicate()}")
        self.output = [out for out, _ in outputs]
        self.errors = [err for _, err in outputs]
        return [process.returncode for process in self.processes]

    def kill(self):
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def launch():
    """`launch(count, flags)`: a `Launch` that does not outlive the test."""
    launched = []

    def start(*args, **kwargs):
        launched.append(Launch(*args, **kwargs))
        return launched[-1]

    yield start
    for each in launched:
        each.kill()
        for process in each.processes:
            process.communicate()


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def records_of(workdir):
    return read_metrics_file(workdir / "metrics.jsonl")


@pytest.fixture(scope="module")
def alone(tmp_path_factory, config_file):
    """The folder of the run that one process makes, with all devices."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    single = Launch(1, [f"--config={config_file}", f"--workdir={workdir}"])
    assert single.wait() == [0], single.errors
    return workdir


def assert_same_figures(workdir, expected, tolerance):
    """The records of two runs, but for what depends on the clock."""
    for record, wanted in zip(records_of(workdir), records_of(expected), strict=True):
        assert record.keys() == wanted.keys()
        for key in record.keys() - {"tokens_per_second"}:
            assert record[key] == pytest.approx(wanted[key], rel=tolerance, abs=tolerance), key


def test_two_processes_train_as_one_does(launch, config_file, alone, tmp_path):
    workdir = tmp_path / "run"
    two = launch(2, [f"--config={config_file}", f"--workdir={workdir}"])
    assert two.wait() == [0, 0], two.errors
    assert_same_figures(workdir, alone, TOLERANCE)
