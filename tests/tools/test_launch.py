"""The launch files, as far as they run where there is no cluster."""

import json
import os
import re
import shlex
import string
import subprocess
from pathlib import Path

import pytest
import yaml

LAUNCH = Path(__file__).parents[2] / "tools" / "launch"
FLAGS = ["--config=configs/pretrain.py", "--config.sample.prompt=What's a $HOME?"]


@pytest.fixture
def start(tmp_path):
    """`start(script, command, environment)`: what the script calls instead of `command`, and the
    devices that it leaves to JAX."""
    said = tmp_path / "said.json"

    def run(script, command, environment):
        fake = tmp_path / command
        fake.write_text(
            "#!/usr/bin/env python3\nimport json, os, sys\n"
            "devices = os.environ.get('JAX_LOCAL_DEVICE_IDS')\n"
            f"json.dump([sys.argv[1:], devices], open({str(said)!r}, 'w'))\n"
        )
        fake.chmod(0o755)
        path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "JAX_"))}
        return subprocess.run(
            ["bash", LAUNCH / script, *FLAGS],
            env={**clean, "PATH": path, **environment},
            capture_output=True,
            text=True,
        ), (json.loads(said.read_text()) if said.exists() else None)

    return run


@pytest.mark.parametrize("script", ["tpu_pod.sh", "slurm.sh"])
def test_scripts_are_sound_and_can_be_executed(script):
    subprocess.run(["bash", "-n", LAUNCH / script], check=True)
    assert os.access(LAUNCH / script, os.X_OK)


@pytest.mark.parametrize("script, missing", [("tpu_pod.sh", "TPU"), ("slurm.sh", "RUN")])
def test_a_variable_that_is_missing_is_named(start, script, missing):
    done, said = start(script, "gcloud", {})
    assert done.returncode != 0 and said is None
    assert re.search(rf"{missing}: the ", done.stderr)


def test_a_tpu_pod_gets_the_command_on_every_host(start):
    variables = {"TPU": "my-tpu", "ZONE": "us-west4-a", "RUN": "/mnt/my runs/1"}
    done, (arguments, _) = start("tpu_pod.sh", "gcloud", variables)
    assert done.returncode == 0, done.stderr
    *before, command = arguments
    assert before == ["compute", "tpus", "tpu-vm", "ssh", "my-tpu", "--zone=us-west4-a",
                      "--worker=all"]  # fmt: skip
    # What a shell on the host makes of it.
    assert shlex.split(command.removeprefix("--command="))[-len(FLAGS) - 1 :] == [
        "--workdir=/mnt/my runs/1", *FLAGS,
    ]  # fmt: skip
    assert "cd 'llm_jax' && exec 'python3' -m llm_jax.main" in command


@pytest.mark.parametrize("environment, devices", [
    ({"SLURM_NTASKS_PER_NODE": "8", "SLURM_GPUS_ON_NODE": "8"}, None),  # each takes its own
    ({"SLURM_NTASKS_PER_NODE": "1", "SLURM_GPUS_ON_NODE": "4"}, "0,1,2,3"),
    ({}, "0"),
])  # fmt: skip
def test_slurm_starts_a_process_a_task(start, environment, devices):
    done, (arguments, said) = start("slurm.sh", "srun", {"RUN": "/shared/run", **environment})
    assert done.returncode == 0, done.stderr
    command = ["python3", "-m", "llm_jax.main", "--workdir=/shared/run"]
    assert arguments == ["--kill-on-bad-exit=1", *command, *FLAGS]
    assert said == devices


def test_the_jobset_has_a_pod_for_every_host():
    text = (LAUNCH / "jobset.yaml").read_text()
    exports = re.findall(r"^#\s+export (.*)$", text, re.MULTILINE)
    variables = dict(word.split("=") for line in exports for word in line.split())
    used = {name for name in re.findall(r"\$\{(\w+)\}", text)}
    assert variables.keys() == used
    jobset = yaml.safe_load(string.Template(text).substitute(variables, HOSTS="4", SLICES="2"))
    assert (jobset["kind"], jobset["metadata"]["name"]) == ("JobSet", "first")
    (slices,) = jobset["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    assert (slices["replicas"], job["parallelism"], job["completions"]) == (2, 4, 4)
    assert job["completionMode"] == "Indexed"
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert container["args"] == ["--config=configs/pretrain.py", "--workdir=/runs/first"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}


def test_the_variables_for_other_pods_are_whole_when_they_are_uncommented():
    text = (LAUNCH / "jobset.yaml").read_text()
    commented = re.compile(r"^( +)# ( *(env:|- name:|value|fieldRef|fieldPath).*)$", re.MULTILINE)
    jobset = yaml.safe_load(commented.sub(r"\1\2", text))
    pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    names = [variable["name"] for variable in pod["containers"][0]["env"]]
    assert names == ["JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"]
