"""What every task has in common: its name in a config, how it is made, and what it returns.

A task measures a model on rows of its own: it is made once for a subject, which may take reading
data, and run as often as there are parameters to measure, in the training loop and after it.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from llm_jax.errors import UserError
from llm_jax.evals.subject import Subject


@dataclasses.dataclass(frozen=True)
class TaskTerm:
    """A task of a config.

    name: one of `tasks.TASKS`. label: what its figures are called, eval/LABEL/KEY; None: its name.
    settings: the fields of its settings.
    """

    name: str
    label: str | None = None
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.known_as or "/" in self.known_as:
            raise UserError(
                f"a task's label {self.known_as!r} must not be empty, nor hold a slash."
            )

    @property
    def known_as(self) -> str:
        return self.name if self.label is None else self.label


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """What a task measured.

    metrics: scalars, `KEY_stderr` beside `KEY` where it is known. examples: JSON-able, one a row
    that was measured, with its "id", which is the same for every model, and its scores.
    """

    metrics: dict[str, float]
    examples: list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Task:
    """A task, ready to run. term: what it was made from. settings: all of them, as a dataclass.

    `run(params)` is called by every process of several, on the mesh of the subject that the task
    was made for.
    """

    term: TaskTerm
    settings: Any
    run: Callable[[Any], TaskResult]


@dataclasses.dataclass(frozen=True)
class TaskKind:
    """settings: a frozen dataclass. make: `(settings, subject) → (params) → TaskResult`; it raises
    UserError where data or settings do not fit."""

    settings: type
    make: Callable[[Any, Subject], Callable[[Any], TaskResult]]


def text_hash(text: str) -> str:
    """Of the text alone, so that it is the same for every model and tokenizer."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=6).hexdigest()


def stable_ids(texts: Sequence[str]) -> list[str]:
    """A name for each text that depends on it alone, not on its place; a second equal one gets a
    number. So examples of several runs can be told to be the same."""
    seen: Counter[str] = Counter()
    names = []
    for text in texts:
        name = text_hash(text)
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name}-{seen[name]}")
    return names
