"""The sweep's runner on processes that only pretend to train, its tables, plots and jobs."""

import csv
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tools.sweep import __main__ as tool
from tools.sweep import running
from tools.sweep.outcome import read_outcome
from tools.sweep.points import Point

ROOT = Path(__file__).parents[2]
TINY = "configs/pretrain.py:size=tiny"

# Ten steps whose loss is (rate - 2)²; one above 50 fails; SIGTERM is answered as a run would.
PRETENDER = r"""
import json, os, pathlib, signal, sys, time
flags = dict(a.lstrip("-").split("=", 1) for a in sys.argv[1:])
folder = pathlib.Path(flags["workdir"])
folder.mkdir(parents=True, exist_ok=True)
rate = float(flags["config.optimizer.learning_rate"])
print("here I am", flush=True)
if rate > 50:
    sys.exit("error: the rate is too high")
log = folder / "metrics.jsonl"
step = len(log.read_text().splitlines()) if log.exists() else 0
loss = (rate - 2) ** 2 + 0.1 * float(flags.get("config.seed", 0))
def end(status):
    result = {"status": status, "step": step, "seconds": step / 10,
              "metrics": {"loss": loss, "eval/validation/loss": loss}}
    (folder / "result.json").write_text(json.dumps(result))
def stop(*_):
    end("interrupted")
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
with open(folder / "starts", "a") as file:
    file.write(f"{step}\n")
while step < 10:
    time.sleep(float(os.environ.get("PRETENDED_SECONDS", "0.01")))
    step += 1
    with open(log, "a") as file:
        file.write(json.dumps({"step": step, "loss": loss}) + "\n")
end("finished")
"""


@pytest.fixture(autouse=True)
def pretended(monkeypatch):
    """Points start the pretender, from the repository."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(running, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(running, "command", command)


def command(point, workdir):
    folder = f"--workdir={workdir / point.name}"
    return [sys.executable, "-c", PRETENDER, *point.flags, folder]


def sweep(workdir, *arguments, config=TINY):
    """The exit status of the tool."""
    try:
        return tool.run(["sweep", f"--config={config}", f"--workdir={workdir}", *arguments])
    except SystemExit as end:
        return end.code


def grid(rates):
    return ["--grid", f"optimizer.learning_rate={rates}"]


def starts(folder):
    return [int(line) for line in (folder / "starts").read_text().split()]


def points_of(workdir):
    return {p["name"]: p for p in json.loads((workdir / "sweep.json").read_text())["points"]}


def test_points_run_a_failed_one_harms_none_and_the_best_is_told(tmp_path, capsys):
    assert sweep(tmp_path, *grid("1.0,2.5,99.0,4.0"), "--parallel=2") == 1
    said = capsys.readouterr().out
    assert "2/4 learning_rate=2.5 finished at step 10 after 0:01, eval/validation/loss 0.25" in said
    reason = "exit status 1: error: the rate is too high"
    assert f"3/4 learning_rate=99.0 failed ({reason}) after 0:00" in said
    table = (tmp_path / "sweep.md").read_text()
    assert table in said
    assert "| 2.5 | finished | 10 | 0:01 | 0.2500 best |" in table
    assert "| 1.0 | finished | 10 | 0:01 | 1.0000 |" in table
    assert (
        f"- learning_rate=99.0 failed: {reason}" in table
        and "Best: --config.optimizer.learning_rate=2.5" in table
    )

    points = points_of(tmp_path)
    assert [p["status"] for p in points.values()] == ["finished"] * 2 + ["failed", "finished"]
    assert [name for name, p in points.items() if p["best"]] == ["learning_rate=2.5"]
    rows = list(csv.DictReader((tmp_path / "sweep.csv").open()))
    assert rows[1]["optimizer.learning_rate"] == "2.5" and rows[1]["loss"] == "0.25"
    assert rows[2]["status"] == "failed" and rows[2]["loss"] == ""
    for name in ("sweep.png", "curves.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")

    # Again: finished points are left alone, the failed one has another turn, others join.
    assert sweep(tmp_path, *grid("1.0,2.5,99.0,2.0")) == 1
    assert starts(tmp_path / "learning_rate=2.5") == [0]
    log = (tmp_path / "logs" / "learning_rate=99.0.log").read_text()
    assert log.count("here I am") == 2
    assert "2.0 | finished | 10 | 0:01 | 0.0000 best" in (tmp_path / "sweep.md").read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_all_points_and_the_same_command_resumes(
    tmp_path, capsys, monkeypatch, number
):
    seen = threading.Event()

    def interrupt():
        while not list(tmp_path.glob("*/metrics.jsonl")):
            time.sleep(0.01)
        seen.set()
        os.kill(os.getpid(), number)

    monkeypatch.setenv("PRETENDED_SECONDS", "0.2")
    threading.Thread(target=interrupt).start()
    flags = [*grid("1.0,2.0,3.0"), "--parallel=2"]
    assert sweep(tmp_path, *flags) == 128 + number and seen.is_set()
    assert "stopped: the same command goes on." in capsys.readouterr().err
    statuses = [p["status"] for p in points_of(tmp_path).values()]
    assert "stopped" in statuses and statuses[2] == "waiting"  # not begun
    assert not (tmp_path / "learning_rate=3.0").exists()
    monkeypatch.setenv("PRETENDED_SECONDS", "0")
    assert sweep(tmp_path, *flags) == 0
    stopped = tmp_path / f"learning_rate={1 + statuses.index('stopped')}.0"
    first, second = starts(stopped)
    assert (first, second > 0) == (0, True)
    assert [p["status"] for p in points_of(tmp_path).values()] == ["finished"] * 3


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's word is Linux's")
def test_points_stop_when_the_sweep_is_killed(tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_sweep as t\n"
        "t.running.command = t.command\n"
        f"t.sweep({str(tmp_path)!r}, *t.grid('1.0'))"
    )
    environment = {**os.environ, "PRETENDED_SECONDS": "0.3"}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, cwd=ROOT)
    folder = tmp_path / "learning_rate=1.0"
    deadline = time.monotonic() + 60
    while not (folder / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    while not (folder / "result.json").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert json.loads((folder / "result.json").read_text())["status"] == "interrupted"


def test_a_point_that_another_process_is_at_is_waited_for(tmp_path, capsys):
    (tmp_path / "logs").mkdir()
    log = open(tmp_path / "logs" / "learning_rate=1.0.log", "ab")  # noqa: SIM115
    fcntl.flock(log, fcntl.LOCK_EX)
    released = []

    def release():
        while not (tmp_path / "learning_rate=2.0" / "result.json").exists():
            time.sleep(0.01)
        released.append((tmp_path / "learning_rate=1.0").exists())
        log.close()

    threading.Thread(target=release).start()
    assert sweep(tmp_path, *grid("1.0,2.0")) == 0
    assert released == [False]
    said = capsys.readouterr().out
    assert said.count("1/2 learning_rate=1.0 waits: another process is at it") == 1


def test_a_second_signal_kills(tmp_path, monkeypatch):
    stubborn = "import signal, time; signal.signal(15, lambda *_: print('no', flush=True))\n"
    stubborn += "print('up', flush=True)\nwhile True: time.sleep(0.1)"
    monkeypatch.setattr(running, "command", lambda *_: [sys.executable, "-c", stubborn])

    def interrupt():
        log = tmp_path / "logs" / "learning_rate=1.0.log"
        for word in ("up", "no"):
            while not log.exists() or word not in log.read_text():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    assert sweep(tmp_path, *grid("1.0")) == 130
    assert points_of(tmp_path)["learning_rate=1.0"]["reason"].startswith("killed by signal 9")


def test_another_config_in_the_same_folder_is_refused(tmp_path, capsys):
    assert sweep(tmp_path, *grid("1.0"), "--emit=table") == 0
    assert sweep(tmp_path, *grid("1.0")) == 0
    capsys.readouterr()
    # What does not decide what comes out of a run is free to change.
    assert sweep(tmp_path, *grid("1.0"), "--config.metrics.every=5") == 0
    assert starts(tmp_path / "learning_rate=1.0") == [0]
    before = (tmp_path / "sweep.json").read_bytes()
    assert sweep(tmp_path, *grid("1.0"), "--config.model.num_layers=1") == 2
    assert "learning_rate=1.0 was made with another config (hash" in capsys.readouterr().err
    assert (tmp_path / "sweep.json").read_bytes() == before


SWEEP_FILE = """
from llm_jax.sweep import Sweep, param
def get_sweep(argument=None):
    return Sweep("configs/pretrain.py:size=tiny", param("optimizer.learning_rate", [1.0, 3.0]),
                 overrides={"seed": int(argument or 0)}, metric="loss", direction="highest")
"""


def test_a_sweep_file_has_its_argument_metric_and_overrides(tmp_path):
    (tmp_path / "mine.py").write_text(SWEEP_FILE)
    config, workdir = f"{tmp_path / 'mine.py'}:2", tmp_path / "w"
    assert sweep(workdir, "--config.model.num_layers=1", config=config) == 0
    record = json.loads((workdir / "sweep.json").read_text())
    assert (record["metric"], record["direction"]) == ("loss", "highest")
    assert record["overrides"] == {"seed": 2, "model.num_layers": "1"}
    assert [p["metrics"]["loss"] for p in record["points"]] == [1.2, 1.2]


@pytest.mark.parametrize("arguments, message", [
    (["--grid", "optimizer.learning_rat=1,2"],
     "point learning_rat=1: the config has no key 'optimizer.learning_rat'. Did you mean "
     "config.optimizer.learning_rate?"),
    (["--grid", "model.num_layers=2,x"], "point num_layers=x: flag --config.model.num_layers=x"),
    (["--grid", "model.num_layers=2,0"], "point num_layers=0: model.num_layers=0 must be positive"),
    (["--grid", "model.dtype=float16"], "config.model.dtype='float16' is not one of"),
    (["--grid", "seed=0", "seed=1"], "two parts of the sweep set 'seed'"),
    (["--grid", "seed=0", "--config.seed=1"], "sets 'seed' for all points"),
    ([], "is no sweep file (it has no get_sweep): sweep over its keys by --grid"),
    (["--grid", "seed=0", "--metric=tokens"], "give --direction=lowest or highest"),
    (["--grid", "seed=0", "--parallel=0"], "parallel"),
    (["--grid", "seed=0", "--emit=pbs"], "emit"),
])  # fmt: skip
def test_bad_input_is_one_line_and_nothing_runs(tmp_path, capsys, arguments, message):
    workdir = tmp_path / "w"
    assert sweep(workdir, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not workdir.exists()


def test_the_devices_are_left_to_the_points(tmp_path):
    code = (
        "from jax._src import xla_bridge; from tools.sweep.__main__ import run\n"
        f"run(['sweep', '--config=configs/sweeps/lr.py', '--workdir={tmp_path}', '--emit=table'])\n"
        "print(xla_bridge.backends_are_initialized())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "| 0.032 | 4 | waiting |" in done.stdout
    assert done.stdout.splitlines()[-1] == "False"


def test_folders_and_files_of_other_kinds_are_refused(tmp_path, capsys):
    assert tool.run(["sweep", "--config=configs/pretrain.py"]) == 2
    (tmp_path / "config.json").write_text("{}")
    assert sweep(tmp_path, *grid("1.0")) == 2
    assert "is a run of its own" in capsys.readouterr().err
    (tmp_path / "config.json").unlink()
    (tmp_path / "sweep.json").write_text("{}")
    assert sweep(tmp_path, *grid("1.0")) == 2
    assert "is no record of a sweep" in capsys.readouterr().err
    (tmp_path / "mine.py").write_text(SWEEP_FILE)
    assert sweep(tmp_path, *grid("1.0"), config=tmp_path / "mine.py") == 2
    assert "--grid is for a stage's config" in capsys.readouterr().err
    (tmp_path / "mine.py").write_text("import nothing_of_the_kind")
    assert sweep(tmp_path, config=tmp_path / "mine.py") == 2
    assert "ModuleNotFoundError" in capsys.readouterr().err


def test_a_recipe_is_swept_by_the_keys_of_its_stages(tmp_path, capsys):
    flags = ["--grid", "dpo.loss.beta=0.1,0.3", "--metric=dpo/eval/validation/loss"]
    recipe = "configs/recipes/chat.py:size=tiny"
    for beta, loss in (("0.1", 0.7), ("0.3", 0.5)):
        for stage in ("pretrain", "sft", "reward", "dpo"):
            folder = tmp_path / f"beta={beta}" / stage
            folder.mkdir(parents=True)
            result = {"status": "finished", "step": 5, "seconds": 1.0,
                      "metrics": {"eval/validation/loss": loss}}  # fmt: skip
            (folder / "result.json").write_text(json.dumps(result))
    assert sweep(tmp_path, *flags, "--emit=table", config=recipe) == 0
    assert "| 0.3 | finished | 5 | 0:04 | 0.5000 best |" in capsys.readouterr().out
    (tmp_path / "beta=0.3" / "dpo" / "result.json").unlink()
    assert sweep(tmp_path, *flags, "--emit=table", config=recipe) == 0
    assert "| 0.3 | stopped | 5 | 0:03 |  |" in capsys.readouterr().out
    assert sweep(tmp_path, "--grid", "dpo.loss.bta=0.1", config=recipe) == 2
    assert "Did you mean config.dpo.loss.beta?" in capsys.readouterr().err


def test_an_unknown_metric_is_told_with_a_suggestion(tmp_path, capsys):
    flags = ["--metric=eval/validation/los", "--direction=lowest"]
    assert sweep(tmp_path, *grid("1.0"), *flags) == 0
    assert "Did you mean 'eval/validation/loss'?" in capsys.readouterr().out


# --- real runs ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_real_points_are_stopped_resumed_and_tabled(tmp_path, corpus):
    small = [
        f"--config.data.source={corpus}", "--config.tokenizer.path=bytes",
        "--config.model.embed_dim=32", "--config.model.mlp_dim=64", "--config.mesh.data=1",
        "--config.phases[0].steps=400", "--config.phases[1].steps=20",
        "--config.checkpoint.every=50", "--config.sample.max_new_tokens=0",
    ]  # fmt: skip
    terms = ["--grid", "optimizer.learning_rate=1e-3,4e-3", "model.num_layers=1"]
    line = [sys.executable, "-m", "tools.sweep", f"--config={TINY}", f"--workdir={tmp_path}"]
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "1", "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen([*line, *terms, *small], env=environment, cwd=ROOT)
    first = tmp_path / "learning_rate=0.001,num_layers=1"
    log = first / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.stat().st_size):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130
    point = points_of(tmp_path)[first.name]
    assert point["status"] == "stopped" and 0 < point["step"] < 420
    assert subprocess.run([*line, *terms, *small], env=environment, cwd=ROOT).returncode == 0
    log = (tmp_path / "logs" / f"{first.name}.log").read_text()
    assert f"resumed at step {point['step']}" in log
    points = points_of(tmp_path)
    assert [p["status"] for p in points.values()] == ["finished"] * 2
    assert sum(p["best"] for p in points.values()) == 1
    for name, recorded in points.items():
        result = json.loads((tmp_path / name / "result.json").read_text())
        assert result["hashes"]["config"] == recorded["hash"]
        assert read_outcome(Point(name, {}, (), ""), tmp_path).step == 420
