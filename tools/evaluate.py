"""Measures a run by tasks: perplexity, retrieval, multiple choice, generated answers.

    python -m tools.evaluate --workdir=RUN[@STEP] --tasks=perplexity,needle [--output=F.json]
        [--config=configs/evaluation.py --config.tasks.needle.settings.per_cell=32 ...]

A task is an entry of the config file. What was measured is printed and written as JSON, each row
of a task with its scores, so that two runs can be compared row by row; without --output into
RUN/evaluation.json, where tasks of earlier calls stay as long as they are of the same checkpoint.
A task that fails is recorded there, and the exit status is 1.
"""

from __future__ import annotations

import functools
import math
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from llm_jax.errors import UserError, did_you_mean, one_line
from tools.cli import check_output, run_tool, split_overrides, to_stderr

if TYPE_CHECKING:
    from llm_jax.evals.task import Task, TaskTerm
    from llm_jax.runs import LoadedRun

CONFIG = "configs/evaluation.py"
FILE = "evaluation.json"  # in the run directory


def define_flags() -> flags.FlagValues:
    values = flags.FlagValues()
    flags.DEFINE_string(
        "workdir", None, "run directory, RUN@STEP, or Hugging Face folder", flag_values=values
    )
    flags.DEFINE_list("tasks", [], "names of the config's tasks", flag_values=values)
    flags.DEFINE_string("config", CONFIG, "file with the tasks", flag_values=values)
    flags.DEFINE_string("output", None, f"JSON file; absent = RUN/{FILE}", flag_values=values)
    flags.DEFINE_integer("batch", 16, "rows at once", flag_values=values)
    return values


def main(values: flags.FlagValues, overrides: Sequence[str] = ()) -> int:
    if not values.workdir:
        raise UserError("--workdir is required, for example --workdir=runs/pretrain.")
    known = read_tasks(values.config, overrides)
    if not values.tasks:
        raise UserError(f"--tasks is required: one or more of {', '.join(known)}.")
    for name in values.tasks:
        if name not in known:
            raise UserError(f"{values.config} has no task {name!r}.{did_you_mean(name, known)}")
    import jax

    from llm_jax.compilation import use_compilation_cache
    from llm_jax.evals.run_subject import run_subject
    from llm_jax.evals.tasks import make_tasks
    from llm_jax.runs import load_run

    use_compilation_cache()
    run = load_run(values.workdir)
    output = _output(values.output, run)
    with jax.set_mesh(run.mesh):
        subject = run_subject(run, to_stderr, values.batch)
        tasks = make_tasks([known[name] for name in values.tasks], subject)
        record = evaluate(run, tasks)
    write(output, record)
    print(describe(record))
    print(output)
    return int(any("error" in entry for entry in record["tasks"].values()))


def read_tasks(config: str, overrides: Sequence[str]) -> dict[str, TaskTerm]:
    """The terms that a config file has under `tasks`, by name, which is their label.

    Raises:
      UserError: no such file, a key that it does not have, or no tasks.
    """
    from llm_jax.config import build
    from llm_jax.evals.task import TaskTerm
    from llm_jax.main import parse

    found, _ = parse(["tools.evaluate", f"--config={config}", *overrides])
    entries = found.get("tasks", None)
    if not hasattr(entries, "items"):
        raise UserError(f"--config={config} has no tasks by name: see {CONFIG}.")
    return {
        name: build(TaskTerm, {**entry, "label": name}, f"config.tasks.{name}")
        for name, entry in entries.items()
    }


def evaluate(run: LoadedRun, tasks: Sequence[Task]) -> dict[str, Any]:
    """What is written of a checkpoint and its tasks; one that fails does not keep the others from
    being run."""
    from llm_jax.mesh import describe_hardware
    from llm_jax.models.size import parameter_count

    begin = time.monotonic()
    entries = {task.term.known_as: _entry(task, run.params) for task in tasks}
    return {
        "run": str(run.path),
        "step": run.step,
        "config": run.stored.lineage[-1]["config"],
        "stage": run.meta["stage"],
        "tokenizer": run.tokenizer.fingerprint,
        "parameters": parameter_count(run.model.config),
        "hardware": describe_hardware(run.mesh),
        "seconds": round(time.monotonic() - begin, 3),
        "tasks": entries,
    }


def read_record(path: Path) -> dict[str, Any] | None:
    """What `write` has written; None where there is no file.

    Raises:
      UserError: it cannot be read, or is something else.
    """
    from llm_jax.json_files import read_json

    record = read_json(path)
    if record is None:
        return None
    known = {"run", "step", "config", "tokenizer", "seconds", "tasks"}
    if not known <= record.keys() or not isinstance(record["tasks"], dict):
        raise UserError(f"{path} is no record of tools.evaluate: name another file, or delete it.")
    return record


def write(output: Path, record: Mapping[str, Any]) -> None:
    """Writes a record, with the tasks that the file has of the same checkpoint and that are not
    measured anew.

    Raises:
      UserError: the file cannot be written, or holds something else.
    """
    from llm_jax.json_files import write_json

    earlier = read_record(output)
    if earlier is not None and _of_one_checkpoint(earlier, record):
        record = {
            **record,
            "seconds": round(earlier["seconds"] + record["seconds"], 3),
            "tasks": {**earlier["tasks"], **record["tasks"]},
        }
    try:
        write_json(output, record)
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error.strerror}.") from error


def describe(record: Mapping[str, Any]) -> str:
    """A table: a line for each metric, with its standard error."""
    lines = [f"{record['run']}, checkpoint {record['step']} ({record['stage']})"]
    for label, entry in record["tasks"].items():
        if "error" in entry:
            lines.append(f"{label}: failed: {entry['error']}")
            continue
        lines.append(f"{label}: {entry['count']:,} rows in {entry['seconds']:.1f} s")
        lines += [f"  {key:<34} {shown}" for key, shown in _shown(entry["metrics"]).items()]
    return "\n".join(lines)


def _shown(metrics: Mapping[str, float | None]) -> dict[str, str]:
    """Each figure with its standard error; the points of a curve, whose keys end in a number, as
    one."""
    shown: dict[str, str] = {}
    for key, value in metrics.items():
        if key.endswith("_stderr"):
            continue
        text = "not finite" if value is None else f"{value:.4g}"
        error = metrics.get(f"{key}_stderr")
        curve = re.fullmatch(r"(.+)/([\d.]+)", key)
        if curve is None:
            shown[key] = text if error is None else f"{text} ± {error:.2g}"
        else:
            name, point = curve.groups()
            before = f"{shown[name]}, " if name in shown else ""
            shown[name] = f"{before}{point}: {text}"
    return shown


def _entry(task: Task, params: Any) -> dict[str, Any]:
    from llm_jax.config import resolved

    common = {"task": task.term.name, "settings": resolved(task.settings)}
    begin = time.monotonic()
    try:
        result = task.run(params)
    except Exception as error:
        return {**common, "error": one_line(error)}
    return {
        **common,
        "metrics": {key: _number(value) for key, value in result.metrics.items()},
        "count": len(result.examples),
        "seconds": round(time.monotonic() - begin, 3),
        "examples": result.examples,
    }


def _number(value: float) -> float | None:
    """Strict JSON has no infinities."""
    return float(value) if math.isfinite(value) else None


def _output(given: str | None, run: LoadedRun) -> Path:
    """
    Raises:
      UserError: nothing can be written there, or something else is.
    """
    output = Path(given) if given else run.path / FILE
    check_output(output)
    read_record(output)  # something else is not ours to overwrite
    return output


def _of_one_checkpoint(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """A run that was made anew with another config is another one."""
    names = ("step", "config", "tokenizer")
    runs = [Path(record["run"]).resolve() for record in (first, second)]
    return runs[0] == runs[1] and all(first[name] == second[name] for name in names)


if __name__ == "__main__":
    arguments, given_overrides = split_overrides(sys.argv)
    tool = functools.partial(main, overrides=given_overrides)
    sys.exit(run_tool(tool, define_flags(), __doc__ or "", arguments))
