"""Jobs for a cluster instead of running: a shell script, a Slurm array, or Kubernetes JobSets."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from tools.sweep.points import Point

LAUNCH = Path(__file__).parents[1] / "launch"
FILES = {"shell": "jobs.sh", "slurm": "jobs.slurm", "jobset": "jobs.yaml"}


def emit(kind: str, points: Sequence[Point], workdir: Path) -> Path:
    """Writes the jobs of all points into the sweep's folder; finished ones end as soon as started.

    Args:
      kind: "shell", "slurm" or "jobset".

    Returns:
      The file.
    """
    path = workdir / FILES[kind]
    write = {"shell": _shell, "slurm": _slurm, "jobset": _jobset}[kind]
    workdir.mkdir(parents=True, exist_ok=True)
    path.write_text(write(points, workdir, path), encoding="utf-8")
    if kind != "jobset":
        path.chmod(0o755)
    return path


def _shell(points: Sequence[Point], workdir: Path, path: Path) -> str:
    lines = [
        "#!/usr/bin/env bash",
        f"# {len(points)} points of a sweep, one a line: all in turn, or any of them elsewhere.",
        "#",
        f"#     {path}",
    ]
    for point in points:
        command = shlex.join(["-m", "llm_jax.main", *_flags(point, workdir)])
        lines.append(f"${{PYTHON:-python3}} {command}")
    return "\n".join(lines) + "\n"


def _slurm(points: Sequence[Point], workdir: Path, path: Path) -> str:
    directives = re.findall(r"^#SBATCH .*$", (LAUNCH / "slurm.sh").read_text(), re.MULTILINE)
    directives = [line for line in directives if "--output=" not in line]
    lines = [
        "#!/usr/bin/env bash",
        f"# {len(points)} points of a sweep, each a task of an array. From the repository:",
        "#",
        f"#     sbatch {path}",
        "#",
        "# Nodes, GPUs and time are those of one point: change them here.",
        *directives,
        f"#SBATCH --array=0-{len(points) - 1}",
        f"#SBATCH --output={workdir}/%x-%A_%a.log",
        "set -euo pipefail",
        "",
        'case "$SLURM_ARRAY_TASK_ID" in',
    ]
    for number, point in enumerate(points):
        folder = shlex.quote(str(workdir / point.name))
        lines.append(f"{number}) RUN={folder}; set -- {shlex.join(point.flags)} ;;")
    lines += [
        '*) echo "no point $SLURM_ARRAY_TASK_ID" >&2; exit 2 ;;',
        "esac",
        "export RUN",
        'exec bash tools/launch/slurm.sh "$@"',
    ]
    return "\n".join(lines) + "\n"


def _jobset(points: Sequence[Point], workdir: Path, path: Path) -> str:
    template = (LAUNCH / "jobset.yaml").read_text()
    body = template[template.index("apiVersion:") :]
    header = [
        f"# {len(points)} points of a sweep, each a JobSet, as tools/launch/jobset.yaml explains.",
        "#",
        "#     export NAME=sweep IMAGE=gcr.io/me/llm_jax:1",
        "#     export ACCELERATOR=tpu-v5-lite-podslice TOPOLOGY=4x4",
        "#     export SLICES=1 HOSTS=4 CHIPS=4 VOLUME=runs",
        f"#     envsubst < {path} | kubectl apply -f -",
    ]
    documents = [_job(body, number, point) for number, point in enumerate(points)]
    return "\n".join(header) + "\n" + "---\n".join(documents)


def _job(body: str, number: int, point: Point) -> str:
    """The template for one point. JSON texts are YAML texts, too; a dollar sign would be taken for
    one of envsubst's, so it is written by its number."""
    config, *overrides = (json.dumps(flag).replace("$", "\\u0024") for flag in point.flags)
    indent = re.search(r"^( *)- --config=", body, re.MULTILINE)
    assert indent is not None
    folder = json.dumps(f"--workdir=/runs/${{NAME}}/{point.name}")
    lines = [f"{indent[1]}- {argument}\n" for argument in (config, *overrides, folder)]
    arguments = re.compile(r"^ *- --config=.*\n *- --workdir=.*\n", re.MULTILINE)
    named = body.replace("${NAME}", f"${{NAME}}-{number}")
    return arguments.sub(lambda _: "".join(lines), named)


def _flags(point: Point, workdir: Path) -> list[str]:
    return [*point.flags, f"--workdir={workdir / point.name}"]
