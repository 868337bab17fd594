"""Tasks in which something that stands in the context is to be found: needles over depth × length,
several needles, chains of variables, keys and values."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from llm_jax.data import ruler
from llm_jax.data.needle import NeedleConfig, needle_examples
from llm_jax.data.ruler import RecallExample
from llm_jax.errors import UserError
from llm_jax.evals.held_out import haystack
from llm_jax.evals.statistics import mean
from llm_jax.evals.subject import Subject
from llm_jax.evals.task import TaskResult


@dataclasses.dataclass(frozen=True)
class LengthsConfig:
    """lengths: tokens of context of the rows; none: what the run was trained on, and half and a
    quarter of it where they hold a row. seed: non-negative, and another one than in training."""

    lengths: tuple[int, ...] = ()
    seed: int = 1


@dataclasses.dataclass(frozen=True)
class KeyValueConfig(LengthsConfig):
    """depths: evenly spaced from the start to the end of the context. per_cell: rows of each depth
    and length."""

    depths: int = 5
    per_cell: int = 8

    def __post_init__(self) -> None:
        _check_positive(self, "depths", "per_cell")

    @property
    def spaced(self) -> list[float]:
        return np.linspace(0, 1, self.depths).tolist()


@dataclasses.dataclass(frozen=True)
class NeedleTaskConfig(KeyValueConfig):
    """source: of the text around the needle; None: what the run held out. names, answers: words in
    use, as `data.needle.NeedleConfig` says: a run that was trained on needle rows knows those of
    its own config. distractors: needles with other names in a row, as far as they fit."""

    source: str | None = None
    names: int = NeedleConfig.names
    answers: int = NeedleConfig.answers
    distractors: int = NeedleConfig.distractors

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_positive(self, "names", "answers")


@dataclasses.dataclass(frozen=True)
class MultiNeedleConfig(LengthsConfig):
    """source: as for one needle. per_length: rows of each length. needles: asked for in a row.
    distractors: not asked for."""

    source: str | None = None
    per_length: int = 32
    needles: int = 4
    distractors: int = 4

    def __post_init__(self) -> None:
        _check_positive(self, "per_length", "needles")


@dataclasses.dataclass(frozen=True)
class VariableTrackingConfig(LengthsConfig):
    """source: as for one needle. per_length: rows of each length. hops: copies from a value to the
    variable that is asked for. chains: in a row; all but the last are asked for with their answers,
    as examples."""

    source: str | None = None
    per_length: int = 32
    hops: int = 2
    chains: int = 2

    def __post_init__(self) -> None:
        _check_positive(self, "per_length", "hops", "chains")


def needle_task(config: NeedleTaskConfig, subject: Subject) -> Callable[[Any], TaskResult]:
    """Retrieval over depth × length, as in `data.needle`; see `_task`."""
    text = haystack(subject, config.source)
    settings = NeedleConfig(
        config.names, config.answers, max_needles=1, distractors=config.distractors
    )

    def rows(length: int) -> list[RecallExample]:
        made = needle_examples(
            subject.tokenizer, text, length, config.spaced, config.per_cell, config.seed, settings
        )
        return [
            RecallExample(
                np.append(row.tokens, row.targets[-1]),
                1 + np.flatnonzero(row.loss_weights > 0),
                float(depth),
            )
            for row, depth in zip(made.rows, made.depths, strict=True)
        ]

    return _task(config, subject, rows)


def multi_needle_task(config: MultiNeedleConfig, subject: Subject) -> Callable[[Any], TaskResult]:
    """All of several facts, see `data.ruler.multi_needle` and `_task`."""
    text = haystack(subject, config.source)
    settings = (config.per_length, config.seed, config.needles, config.distractors)
    return _task(
        config,
        subject,
        lambda length: ruler.multi_needle(subject.tokenizer, text, length, *settings),
    )


def variable_tracking_task(
    config: VariableTrackingConfig, subject: Subject
) -> Callable[[Any], TaskResult]:
    """The value at the end of a chain, see `data.ruler.variable_tracking` and `_task`."""
    text = haystack(subject, config.source)
    settings = (config.per_length, config.seed, config.hops, config.chains)
    return _task(
        config,
        subject,
        lambda length: ruler.variable_tracking(subject.tokenizer, text, length, *settings),
    )


def key_value_task(config: KeyValueConfig, subject: Subject) -> Callable[[Any], TaskResult]:
    """One pair among pairs only, see `data.ruler.key_value` and `_task`."""
    settings = (config.spaced, config.per_cell, config.seed)
    return _task(
        config, subject, lambda length: ruler.key_value(subject.tokenizer, length, *settings)
    )


def _task(
    config: LengthsConfig, subject: Subject, make: Callable[[int], list[RecallExample]]
) -> Callable[[Any], TaskResult]:
    """
    Args:
      make: from a length to its rows.

    Returns:
      What gives accuracy, the share of rows whose answers are right in all their tokens;
      accuracy_by_length/L and, where rows have a depth, accuracy_by_depth/D and
      accuracy_by_length_and_depth/L/D.

    Raises:
      UserError: a length that the model does not read, or that holds no row.
    """
    examples = [(n, row) for n, rows in _rows(config, subject, make).items() for row in rows]

    def run(params: Any) -> TaskResult:
        found = subject.read(params, [(row.tokens, row.answers) for _, row in examples])
        seen: Counter[int] = Counter()
        rows = []
        for (length, example), read in zip(examples, found, strict=True):
            row = {"id": f"{length}/{seen[length]}", "length": length, "correct": read.is_greedy}
            if example.depth is not None:
                row["depth"] = round(example.depth, 4)
            seen[length] += 1
            rows.append(row)
        return TaskResult(_describe(rows), rows)

    return run


def _rows(
    config: LengthsConfig, subject: Subject, make: Callable[[int], list[RecallExample]]
) -> dict[int, list[RecallExample]]:
    """By length; of lengths that nobody asked for, those that hold a row."""
    limit = subject.model.max_length
    if config.lengths:
        if not 0 < min(config.lengths) <= max(config.lengths) <= limit:
            raise UserError(
                f"lengths={config.lengths} must be positive, and at most the {limit} that "
                f"{subject.name} reads."
            )
        return {length: make(length) for length in sorted(set(config.lengths))}
    longest = min(subject.length, limit)
    rows = {longest: make(longest)}
    for shorter in (longest // 2, longest // 4):
        with contextlib.suppress(UserError):
            rows[shorter] = make(shorter)
    return dict(sorted(rows.items()))


def _describe(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    result = mean("accuracy", [row["correct"] for row in rows])
    groups: dict[str, list[float]] = {}
    for row in rows:
        names = [f"accuracy_by_length/{row['length']}"]
        if "depth" in row:
            depth = f"{row['depth']:.2f}"
            names.append(f"accuracy_by_depth/{depth}")
            names.append(f"accuracy_by_length_and_depth/{row['length']}/{depth}")
        for name in names:
            groups.setdefault(name, []).append(row["correct"])
    # A curve is told from its first point to its last, the sparser ones first.
    names = sorted(groups, key=lambda name: [float(part) for part in name.split("/")[1:]])
    names.sort(key=lambda name: (name.count("/"), name.partition("/")[0]))
    return result | {name: float(np.mean(groups[name])) for name in names}


def _check_positive(config: Any, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 1:
            raise UserError(f"{name}={getattr(config, name)} must be at least 1.")
