"""Tasks of the lm-evaluation-harness: its own and local ones, with its metrics, on our models.

Needs the package lm_eval (pip install 'llm_jax[eval]').
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from llm_jax.errors import UserError, did_you_mean, one_line
from llm_jax.evals.harness_model import HarnessModel
from llm_jax.evals.subject import Subject

BOOTSTRAP_DRAWS = 1000  # for standard errors that no formula gives


def run_harness(
    subject: Subject,
    params: Any,
    tasks: Sequence[str],
    *,
    include_path: str | None = None,
    num_fewshot: int | None = None,
    limit: float | None = None,
    apply_chat_template: bool = False,
    log_samples: bool = False,
    seed: int = 0,
    numpy_seed: int = 1234,
    fewshot_seed: int = 1234,
) -> dict[str, Any]:
    """What `lm_eval.simple_evaluate` gives.

    Args:
      params: the parameters that are measured, on the subject's mesh.
      tasks: names of tasks, groups and tags, or paths of task files.
      include_path: a folder of task files, which go before those of the harness.
      num_fewshot: shots; None: as each task says.
      limit: rows of each task at most; below 1 their share.
      log_samples: whether every row stands in the result, under "samples".
      seed: of sampling and of Python's `random`; numpy_seed; fewshot_seed: of drawing shots. The
        harness sets these where nothing is said.

    Raises:
      UserError: a task that is not known or cannot be loaded, data that would have to be
        downloaded and cannot be, or a task that does not fit the model.
    """
    model = HarnessModel(subject, params, seed)
    if apply_chat_template:
        model.chat_template(True)  # tells in time that there is none
    # The harness would fork to resample for standard errors, and JAX's threads do not survive that.
    os.environ["DISABLE_MULTIPROC"] = "1"
    return simple_evaluate(
        model=model,
        tasks=list(tasks),
        task_manager=find_tasks(tasks, include_path),
        num_fewshot=num_fewshot,
        limit=limit,
        apply_chat_template=apply_chat_template,
        log_samples=log_samples,
        bootstrap_iters=BOOTSTRAP_DRAWS,
        random_seed=seed,
        numpy_random_seed=numpy_seed,
        torch_random_seed=numpy_seed,
        fewshot_random_seed=fewshot_seed,
    )


class Tasks(TaskManager):
    """The harness's tasks; what is wrong with one is told in one line when it is loaded."""

    def load(self, task_list: Any) -> Any:
        """
        Raises:
          UserError: a task that cannot be loaded, or that would run what the model writes.
        """
        names = ",".join(map(str, task_list))
        try:
            loaded = super().load(task_list)
        except ConnectionError as error:
            raise UserError(
                f"--tasks={names} needs the network for {_needed(self.task_index, task_list)} "
                f"({one_line(error)}): run it once where there is network and bring its HF_HOME "
                "folder along, or give a task file that reads a local copy (dataset_path: json, "
                "dataset_kwargs: data_files)."
            ) from error
        except Exception as error:  # a task file is a program, and fails in as many ways
            raise UserError(f"--tasks={names} cannot be loaded: {one_line(error)}") from error
        for name, task in loaded["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False):
                raise UserError(
                    f"the task {name!r} would run what the model writes, here and unguarded: use "
                    "the reward unit_tests of a generation task, which runs it in a sandbox."
                )
        return loaded


def find_tasks(names: Sequence[str], include_path: str | None) -> Tasks:
    """What knows the tasks. The harness's own, which are thousands of files, are read only where
    the folder does not do.

    Raises:
      UserError: a task that is not known.
    """
    tasks = Tasks(include_path=include_path, include_defaults=False)
    named = [name for name in names if not os.path.isfile(name)]
    if any(None in _leaves(tasks.task_index, name) for name in named):
        tasks = Tasks(include_path=include_path)
    for name in named:
        if name not in tasks.task_index:
            near = did_you_mean(name, tasks.all_tasks)
            raise UserError(f"the harness has no task {name!r}.{near}")
    return tasks


def _leaves(
    index: Mapping[str, Any], item: str | Mapping[str, Any]
) -> Iterator[Mapping[str, Any] | None]:
    """The configs of the tasks that a name, or a member of a group, stands for; None for one that
    is not known."""
    described: Mapping[str, Any] = {} if isinstance(item, str) else item
    name = item if isinstance(item, str) else item.get("group", item.get("task"))
    if name in index:
        entry = index[name]
        config = entry.cfg or {"task": sorted(entry.tags)}  # tags have no file
    elif described.keys() & {"group", "dataset_path", "class"}:
        config = described
    else:
        yield None
        return
    members = config.get("task")
    if not isinstance(members, list):
        yield config
        return
    for member in members:
        yield from _leaves(index, member)


def _needed(index: Mapping[str, Any], names: Sequence[Any]) -> str:
    """The data sets of tasks that are not in local files, in words."""
    subsets: dict[str, dict[str, None]] = {}
    for config in (leaf for name in names for leaf in _leaves(index, name)):
        path = (config or {}).get("dataset_path")
        if config and path and "data_files" not in (config.get("dataset_kwargs") or {}):
            subsets.setdefault(path, {})[config.get("dataset_name") or ""] = None
    words = []
    for path, known in subsets.items():
        first, *more = known
        subset = f" ({first}{f' and {len(more)} more' if more else ''})" if first else ""
        words.append(f"the data set {path}{subset}")
    return ", ".join(words) or "its data"
