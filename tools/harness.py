"""Measures a run by tasks of the lm-evaluation-harness: its own, and task files of yours.

    python -m tools.harness --workdir=RUN[@STEP] --tasks=my_task --include_path=FOLDER
        [--num_fewshot=5 --limit=100 --apply_chat_template --output=F.json --samples]

Needs pip install 'llm_jax[eval]'. The harness's table is printed and its results are written as
JSON, without --output into RUN/harness_DATE.json; with --samples each row of a task stands in it.
A task is a name, a group, or a task file; those with local data (dataset_path: json,
dataset_kwargs: data_files) need no network. With HF_HUB_OFFLINE=1 nothing is downloaded or asked
for. Tasks of our own: see tools.evaluate.
"""

from __future__ import annotations

import datetime
import importlib.util
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from llm_jax.errors import UserError
from tools.cli import check_output, run_tool, to_stderr

if TYPE_CHECKING:
    from llm_jax.runs import LoadedRun


def define_flags() -> flags.FlagValues:
    values = flags.FlagValues()
    flags.DEFINE_string(
        "workdir", None, "run directory, RUN@STEP, or Hugging Face folder", flag_values=values
    )
    flags.DEFINE_list("tasks", [], "tasks, groups or task files", flag_values=values)
    flags.DEFINE_string("include_path", None, "folder with task files", flag_values=values)
    flags.DEFINE_integer("num_fewshot", None, "shots; absent = the task's", flag_values=values)
    flags.DEFINE_float(
        "limit", None, "rows of a task at most; below 1 their share", flag_values=values
    )
    flags.DEFINE_boolean(
        "apply_chat_template", False, "ask in the run's chat template", flag_values=values
    )
    flags.DEFINE_string("output", None, "JSON file; absent = in the run", flag_values=values)
    flags.DEFINE_boolean("samples", False, "write each row of a task too", flag_values=values)
    flags.DEFINE_integer("batch", 16, "rows at once", flag_values=values)
    flags.DEFINE_integer("seed", 0, "of sampling, and of Python's random", flag_values=values)
    flags.DEFINE_integer("numpy_seed", 1234, "of numpy.random", flag_values=values)
    flags.DEFINE_integer("fewshot_seed", 1234, "of drawing shots", flag_values=values)
    return values


def main(values: flags.FlagValues) -> None:
    _check(values)
    import jax
    from lm_eval.utils import make_table

    from llm_jax.compilation import use_compilation_cache
    from llm_jax.evals.harness import run_harness
    from llm_jax.evals.run_subject import run_subject
    from llm_jax.json_files import write_json
    from llm_jax.runs import load_run

    use_compilation_cache()
    run = load_run(values.workdir)
    output = _output(values.output, run)
    with jax.set_mesh(run.mesh):
        results = run_harness(
            run_subject(run, to_stderr, values.batch),
            run.params,
            values.tasks,
            include_path=values.include_path,
            num_fewshot=values.num_fewshot,
            limit=values.limit,
            apply_chat_template=values.apply_chat_template,
            log_samples=values.samples,
            seed=values.seed,
            numpy_seed=values.numpy_seed,
            fewshot_seed=values.fewshot_seed,
        )
    record = {"run": str(run.path), "step": run.step, "stage": run.meta["stage"], **results}
    write_json(output, _plain(record))
    for column in ("results", "groups"):
        if results.get(column):
            print(make_table(results, column))
    print(output)


def _check(values: flags.FlagValues) -> None:
    """
    Raises:
      UserError: a flag that is missing or does not fit; no harness.
    """
    if not values.workdir:
        raise UserError("--workdir is required, for example --workdir=runs/pretrain.")
    if not values.tasks:
        raise UserError("--tasks is required, for example --tasks=arc_easy.")
    if values.include_path is not None and not Path(values.include_path).is_dir():
        raise UserError(f"--include_path={values.include_path} is no folder.")
    if values.limit is not None and values.limit <= 0:
        raise UserError(f"--limit={values.limit:g} must be above 0.")
    if values.num_fewshot is not None and values.num_fewshot < 0:
        raise UserError(f"--num_fewshot={values.num_fewshot} must be 0 or more.")
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("tools.harness needs the package lm_eval: pip install 'llm_jax[eval]'.")


def _output(given: str | None, run: LoadedRun) -> Path:
    """
    Raises:
      UserError: nothing can be written there, or something else is.
    """
    if given is None:
        return run.path / f"harness_{datetime.datetime.now():%Y-%m-%dT%H-%M-%S}.json"
    output = Path(given)
    check_output(output)
    try:
        is_ours = not output.exists() or "results" in json.loads(output.read_text("utf-8"))
    except (OSError, ValueError, TypeError):
        is_ours = False
    if not is_ours:
        raise UserError(f"{output} is no record of this tool: name another --output.")
    return output


def _plain(record: Mapping[str, Any]) -> Any:
    """As strict JSON has it: no infinities, and functions of task files by their names."""
    from lm_eval.utils import handle_non_serializable

    text = json.dumps(record, default=handle_non_serializable)
    return json.loads(text, parse_constant=lambda constant: None)


if __name__ == "__main__":
    sys.exit(run_tool(main, define_flags(), __doc__ or "", sys.argv))
