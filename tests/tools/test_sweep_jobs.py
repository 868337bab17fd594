"""What a sweep writes for clusters, as far as it runs where there is none."""

import json
import os
import shlex
import string
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tools.sweep.__main__ import run

ROOT = Path(__file__).parents[2]
TINY = "configs/pretrain.py:size=tiny"
JOBS = ["--grid", "optimizer.learning_rate=1.0,2.0", "--config.sample.prompt=What's a $HOME?"]


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def emit(workdir, kind):
    """The exit status of the tool."""
    flags = [f"--config={TINY}", f"--workdir={workdir}", f"--emit={kind}"]
    return run(["sweep", *flags, *JOBS])


def flags_of(rate, workdir):
    return [
        f"--config={TINY}",
        "--config.sample.prompt=What's a $HOME?",
        f"--config.optimizer.learning_rate={rate}",
        f"--workdir={workdir}/learning_rate={rate}",
    ]


def test_a_shell_script_has_a_line_for_each_point(tmp_path, capsys):
    workdir = tmp_path / "my sweep"
    assert emit(workdir, "shell") == 0
    path = Path(capsys.readouterr().out.strip())
    assert not list(workdir.glob("learning_rate*"))  # nothing has run
    done = subprocess.run(
        [path], env={**os.environ, "PYTHON": "echo"}, capture_output=True, text=True
    )
    said = [f"-m llm_jax.main {' '.join(flags_of(rate, workdir))}" for rate in ("1.0", "2.0")]
    assert done.stdout.splitlines() == said
    last = path.read_text().splitlines()[-1]
    assert shlex.split(last)[3:] == flags_of("2.0", workdir)


def test_a_slurm_array_has_a_task_for_each_point(tmp_path, capsys):
    workdir = tmp_path / "sweep"
    assert emit(workdir, "slurm") == 0
    path = Path(capsys.readouterr().out.strip())
    text = path.read_text()
    assert "#SBATCH --array=0-1\n" in text and text.count("--output=") == 1
    assert "#SBATCH --signal=TERM@120" in text and "#SBATCH --gpus-per-node=8" in text
    (tmp_path / "srun").write_text(
        f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n"
    )
    (tmp_path / "srun").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}

    def task(number):
        variables = {**environment, "SLURM_ARRAY_TASK_ID": str(number)}
        return subprocess.run(["bash", path], env=variables, capture_output=True, text=True)

    *flags, folder = flags_of("2.0", workdir)
    said = json.loads(task(1).stdout)
    assert said == ["--kill-on-bad-exit=1", "python3", "-m", "llm_jax.main", folder, *flags]
    assert task(2).returncode == 2


def test_jobsets_have_a_document_for_each_point(tmp_path, capsys):
    assert emit(tmp_path / "w", "jobset") == 0
    text = Path(capsys.readouterr().out.strip()).read_text()
    exports = [line.split("export ")[1] for line in text.splitlines() if "export " in line]
    variables = dict(word.split("=", 1) for line in exports for word in line.split())
    filled = string.Template(text).substitute(variables)
    first, second = yaml.safe_load_all(filled)
    assert [job["metadata"]["name"] for job in (first, second)] == ["sweep-0", "sweep-1"]
    pod = second["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["args"] == flags_of("2.0", "/runs/sweep")
