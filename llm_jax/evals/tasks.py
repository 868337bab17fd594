"""The tasks by name, and how a config's terms become tasks and evaluations of the training loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_collections

from llm_jax.config import build, defaults, resolved
from llm_jax.errors import UserError, did_you_mean
from llm_jax.evals import (
    generation,
    instruction_following,
    multiple_choice,
    perplexity,
    recall,
    win_rate,
)
from llm_jax.evals.subject import Subject
from llm_jax.evals.task import Task, TaskKind, TaskTerm

TASKS: dict[str, TaskKind] = {
    "perplexity": TaskKind(perplexity.PerplexityConfig, perplexity.perplexity_task),
    "needle": TaskKind(recall.NeedleTaskConfig, recall.needle_task),
    "multi_needle": TaskKind(recall.MultiNeedleConfig, recall.multi_needle_task),
    "variable_tracking": TaskKind(recall.VariableTrackingConfig, recall.variable_tracking_task),
    "key_value": TaskKind(recall.KeyValueConfig, recall.key_value_task),
    "multiple_choice": TaskKind(
        multiple_choice.MultipleChoiceConfig, multiple_choice.multiple_choice_task
    ),
    "generation": TaskKind(generation.GenerationConfig, generation.generation_task),
    "instruction_following": TaskKind(
        instruction_following.InstructionFollowingConfig,
        instruction_following.instruction_following_task,
    ),
    "win_rate": TaskKind(win_rate.WinRateConfig, win_rate.win_rate_task),
}


def task_config(name: str, **settings: Any) -> ml_collections.ConfigDict:
    """A term of a config file, with every setting of the task, so that all can be overridden."""
    return ml_collections.ConfigDict(
        {"name": name, "settings": defaults(TASKS[name].settings, **settings)}
    )


def make_task(term: TaskTerm, subject: Subject) -> Task:
    """Reads what the task needs.

    Raises:
      UserError: no such task, or settings or data that do not fit; the message names the task.
    """
    try:
        if term.name not in TASKS:
            raise UserError(f"{term.name!r} is no task.{did_you_mean(term.name, TASKS)}")
        kind = TASKS[term.name]
        settings: Any = build(kind.settings, resolved(term.settings), "settings")
        return Task(term, settings, kind.make(settings, subject))
    except UserError as error:
        raise UserError(f"the task {term.known_as!r}: {error}") from error


def make_tasks(terms: Sequence[TaskTerm], subject: Subject) -> tuple[Task, ...]:
    """
    Raises:
      UserError: two of one label, and as `make_task` says.
    """
    labels = [term.known_as for term in terms]
    for label in labels:
        if labels.count(label) > 1:
            raise UserError(f"two tasks are called {label!r}: give one of them a label.")
    return tuple(make_task(term, subject) for term in terms)
