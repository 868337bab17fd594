"""Several processes as one run, as processes on this machine that meet over loopback.

Legend: a launch of 2 processes with 2 devices each is compared with 1 process that has all 4.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from itertools import filterfalse
from pathlib import Path

import jax
import numpy as np
import pytest

from llm_jax.checkpoint import latest_step
from llm_jax.metrics import read_metrics_file
from llm_jax.runs import load_run

ROOT = Path(__file__).parents[1]
STEPS = 12
TIMEOUTS = ["--peer_timeout=120", "--heartbeat_timeout=8"]
DEVICES = 4
# Sums over devices are made in another order where processes hold some of them.
TOLERANCE = 1e-5

PRETRAIN, CHAIN = ROOT / "tests" / "hosts" / "pretrain.py", ROOT / "tests" / "hosts" / "chain.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, corpus, other_corpus):
    """The folder of texts and examples that the configs name."""
    folder = tmp_path_factory.mktemp("data")
    shutil.copy(corpus, folder / "corpus.txt")
    shutil.copy(other_corpus, folder / "other.txt")
    colours = ("red", "green", "blue")
    asked = [(f"What is {i}?", colours[i % 3], colours[(i + 1) % 3]) for i in range(40)]
    chats = [{"prompt": p, "completion": a} for p, a, _ in asked]
    pairs = [{"prompt": p, "chosen": a, "rejected": f"not {b}"} for p, a, b in asked]
    for name, rows in (("chats", chats), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def pretrain(folder, tmp_path):
    """Flags of a run in `tmp_path / "run"`."""
    return [f"--config={PRETRAIN}:{folder}", f"--workdir={tmp_path / 'run'}"]


def by_flags(port, count, index):
    place = [f"--coordinator=127.0.0.1:{port}", f"--processes={count}", f"--process={index}"]
    return [*place, *TIMEOUTS], {}


def by_slurm(port, count, index):
    return TIMEOUTS, {
        "JAX_COORDINATOR_PORT": str(port),
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": str(count),
        "SLURM_PROCID": str(index),
        "SLURM_LOCALID": str(index),
    }


class Launch:
    """Processes of one run. `wait` gives their exit statuses, and what each of them printed."""

    def __init__(self, count, flags, *, devices=DEVICES, packages=None, missing=(), told=by_flags):
        """
        flags: of all, or of each. packages: the folder in which each finds llm_jax. missing: those
        that never come. told: how they learn where they sit.
        """
        port = free_port()
        self.address = f"127.0.0.1:{port}"
        each = flags if isinstance(flags[0], list) else [flags] * count
        self.processes = []
        for index in sorted({*range(count)} - {*missing}):
            place, environment = told(port, count, index) if count > 1 else ([], {})
            environment |= {
                "JAX_PLATFORMS": "cpu",
                "JAX_NUM_CPU_DEVICES": str(devices // count),
                "JAX_PARTITION_INDEX": str(index),  # as if each were on a machine of its own
                "PYTHONPATH": "",
                # Of a busy machine's processes one may wait long for another.
                "XLA_FLAGS": "--xla_cpu_collective_timeout_seconds=300",
            }
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "llm_jax.main", *place, *each[index]],
                    cwd=packages[index] if packages else ROOT,
                    env={**os.environ, **environment},
                    text=True,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    start_new_session=True,
                )
            )

    def wait(self, timeout=300):
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

    def until(self, condition, timeout=300):
        """Waits for something that happens while all of them run."""
        deadline = time.monotonic() + timeout
        while not condition():
            if any(process.poll() is not None for process in self.processes):
                pytest.fail(f"ended too early: {self.wait()}, {self.errors}")
            assert time.monotonic() < deadline, "it has not come to pass"
            time.sleep(0.02)

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


def assert_same_records(workdir, expected, tolerance):
    """All but what depends on the clock, on how decoding was divided, and on the sign of margins
    that are zero but for rounding."""
    left_out = re.compile("tokens_per_second|compilations|.*rewards/accuracies")
    for record, wanted in zip(records_of(workdir), records_of(expected), strict=True):
        assert record.keys() == wanted.keys()
        for key in filterfalse(left_out.fullmatch, record):
            assert record[key] == pytest.approx(wanted[key], rel=tolerance, abs=tolerance), key


def assert_same_parameters(workdir, expected):
    assert latest_step(workdir) == latest_step(expected)
    found, wanted = load_run(str(workdir)).params, load_run(str(expected)).params
    for (path, leaf), other in zip(
        jax.tree_util.tree_leaves_with_path(wanted), jax.tree.leaves(found), strict=True
    ):
        np.testing.assert_array_equal(leaf, other, err_msg=jax.tree_util.keystr(path))


@pytest.fixture(scope="module")
def runs(tmp_path_factory, folder):
    """`runs(count)`: the folder of the uninterrupted run of so many processes, made once."""
    made = {}

    def run(count):
        if count not in made:
            workdir = tmp_path_factory.mktemp("whole") / "run"
            whole = Launch(count, [f"--config={PRETRAIN}:{folder}", f"--workdir={workdir}"])
            assert whole.wait() == [0] * count, whole.errors
            made[count] = workdir
        return made[count]

    return run


def test_a_failure_of_one_process_is_known_to_all():
    """And no collective has a part in it, so that nobody waits in one for the one that failed."""
    program = (
        "import sys; from llm_jax import distributed as d; i = int(sys.argv[1])\n"
        "place = d.Place(f'127.0.0.1:{sys.argv[2]}', 2, i, peer_timeout=120)\n"
        "d.start(place, {}, 'run')\n"
        "print(d.failures('one', 'boom' if i else None), d.failures('two', None), "
        "d.failures('three', f'both {i}'))"
    )
    command = [sys.executable, "-c", program]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    port = str(free_port())
    processes = [
        subprocess.Popen(
            [*command, str(i), port], cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE
        )
        for i in range(2)
    ]
    said = [process.communicate(timeout=120)[0].strip() for process in processes]
    assert said == ["{1: 'boom'} {} {0: 'both 0', 1: 'both 1'}"] * 2


def test_two_processes_train_as_one_does(runs):
    assert_same_records(runs(2), runs(1), TOLERANCE)
    results = [json.loads((runs(count) / "result.json").read_text()) for count in (1, 2)]
    assert results[0]["hashes"] == results[1]["hashes"]


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["tensor", "context"])
def test_processes_that_share_rows_train_as_one_does(launch, pretrain, runs, tmp_path, axis):
    four = launch(4, [*pretrain, "--config.mesh.data=1", f"--config.mesh.{axis}=2"])
    assert four.wait() == [0] * 4, four.errors
    assert_same_records(tmp_path / "run", runs(1), TOLERANCE)


# --- what is refused at the start -----------------------------------------------------------------


@pytest.mark.parametrize("told", [by_flags, by_slurm])
def test_processes_of_other_configs_are_refused(launch, pretrain, tmp_path, told):
    two = launch(2, [pretrain, [*pretrain, "--config.optimizer.learning_rate=0.25"]], told=told)
    assert two.wait() == [2, 2]
    assert two.errors[0] == two.errors[1] and two.errors[0].count("\n") == 1
    assert "process 1 (" in two.errors[0]
    assert "config.optimizer.learning_rate is 0.25 there and 0.003 on process 0" in two.errors[0]
    assert not (tmp_path / "run").exists()


def test_processes_of_other_code_are_refused(launch, pretrain, tmp_path):
    package = tmp_path / "package"
    shutil.copytree(ROOT / "llm_jax", package / "llm_jax", ignore=shutil.ignore_patterns("*.pyc"))
    with open(package / "llm_jax" / "step.py", "a") as file:
        file.write("# changed on one host\n")
    two = launch(2, pretrain, packages=[ROOT, package])
    assert two.wait() == [2, 2]
    assert two.errors[0] == two.errors[1]
    assert "differs: the hash of llm_jax/step.py is" in two.errors[0]
    assert not (tmp_path / "run").exists()


def test_a_process_that_never_comes_ends_the_others(launch, pretrain, tmp_path):
    two = launch(2, [*pretrain, "--peer_timeout=3"], missing=[1])
    assert two.wait() == [2]
    assert two.errors[0].startswith(f"error: 1 of 2 processes came to {two.address} within 3 s;")
    assert two.errors[0].count("\n") == 1 and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_directory_that_is_not_shared_is_refused(launch, pretrain, tmp_path):
    folders = [tmp_path / "host0", tmp_path / "host1"]
    for folder in folders:
        shutil.copytree(ROOT / "llm_jax", folder / "llm_jax")
    two = launch(2, [pretrain[0], "--workdir=run"], packages=folders)
    assert two.wait() == [2, 2], two.errors
    for error in two.errors:
        assert "error: --workdir=run is another folder for process 1 than for process 0" in error
    assert not (folders[1] / "run").exists()


@pytest.mark.slow
def test_texts_that_differ_are_refused(launch, folder, tmp_path):
    folders = [tmp_path / "host0", tmp_path / "host1"]
    for each in folders:
        shutil.copytree(ROOT / "llm_jax", each / "llm_jax")
        for name in ("corpus.txt", "other.txt"):
            shutil.copy(folder / name, each)
    with open(folders[1] / "other.txt", "a") as file:
        file.write("one word more")
    flags = [f"--config={PRETRAIN}:.", f"--workdir={tmp_path / 'run'}"]
    two = launch(2, flags, packages=folders)
    assert two.wait() == [2, 2], two.errors
    for error in two.errors:
        assert "error: the hash of the data in process 1 is another than in process 0" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_an_error_of_one_alone_ends_the_others_too(launch, pretrain, tmp_path):
    def without_a_cache(port, count, index):
        flags, environment = by_flags(port, count, index)
        return flags, environment | ({"LLM_JAX_CACHE": "/dev/null/cache"} if index else {})

    began = time.monotonic()
    two = launch(2, pretrain, told=without_a_cache)
    statuses = two.wait()
    assert statuses[1] == 2 and "error: /dev/null/cache" in two.errors[1]
    assert statuses[0] not in (0, 2) and "JAX distributed service" in two.errors[0]
    assert time.monotonic() - began < 90
    assert latest_step(tmp_path / "run") is None


# --- runs that are stopped ------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_when_one_is_killed_the_others_end_and_all_go_on_from_there(
    launch, pretrain, runs, tmp_path, killed
):
    workdir = tmp_path / "run"
    two = launch(2, [*pretrain, "--config.checkpoint.every=1"])
    two.until(lambda: (latest_step(workdir) or 0) >= 3)
    two.processes[killed].kill()
    began = time.monotonic()
    statuses = two.wait()
    assert time.monotonic() - began < 45  # the heartbeat's 8 seconds, and some
    assert statuses[killed] == -signal.SIGKILL and statuses[1 - killed] != 0
    assert latest_step(workdir) < STEPS
    again = launch(2, pretrain)
    assert again.wait() == [0, 0], again.errors
    assert "resumed at step" in again.output[0]
    assert_same_records(workdir, runs(2), 1e-12)  # what is counted of epochs is a sum
    assert_same_parameters(workdir, runs(2))


@pytest.mark.slow
def test_sigterm_to_one_stops_all_at_one_step_and_fewer_go_on(launch, pretrain, runs, tmp_path):
    workdir = tmp_path / "run"
    steps = [0]
    for count in (4, 2):
        part = launch(count, [*pretrain, "--config.checkpoint.every=1"])
        part.until(lambda: (latest_step(workdir) or 0) > steps[-1])
        part.processes[-1].terminate()
        assert part.wait() == [143] * count, part.errors
        result = json.loads((workdir / "result.json").read_text())
        assert result["status"] == "interrupted" and result["step"] == latest_step(workdir)
        steps.append(result["step"])
    assert steps[2] < STEPS
    last = launch(1, pretrain, devices=2)
    assert last.wait() == [0], last.errors
    assert_same_records(workdir, runs(1), TOLERANCE)


# --- the other stages -----------------------------------------------------------------------------


@pytest.mark.slow
def test_the_stages_after_pre_training(launch, folder, tmp_path):
    flags = [[f"--config={CHAIN}:{folder}", f"--workdir={tmp_path / str(n)}"] for n in (1, 2)]
    for count in (2, 1):
        chain = launch(count, flags[count - 1])
        assert chain.wait(timeout=400) == [0] * count, chain.errors
    for stage in ("sft", "reward", "dpo", "grpo"):
        assert_same_records(tmp_path / "2" / stage, tmp_path / "1" / stage, TOLERANCE)
