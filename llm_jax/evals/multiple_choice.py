"""Multiple choice: the likeliest of several continuations of a question."""

from __future__ import annotations

import dataclasses
import itertools
import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from llm_jax.data.examples import MalformedExample
from llm_jax.data.fields import as_list, as_text, text_of, value_of
from llm_jax.data.readers import Malformed
from llm_jax.data.sources import (
    ReadCounts,
    SourceConfig,
    count_malformed,
    nothing_read,
    read_records,
)
from llm_jax.errors import UserError
from llm_jax.evals.objective import spread
from llm_jax.evals.pairs import encode_pair
from llm_jax.evals.statistics import mean
from llm_jax.evals.subject import LogLikelihood, Subject
from llm_jax.evals.task import TaskResult, stable_ids

LETTERS = string.ascii_uppercase


@dataclasses.dataclass(frozen=True)
class MultipleChoiceConfig:
    """Which questions, and how they are put.

    source, file_format, split, malformed: where the rows are, as for training.
    question, choices, answer: the fields of a row; "a|b" is the first of them that is there.
      Choices are a list of texts, or an object with the lists "text" and "label". The answer is the
      place of the true choice, from 0; or its label, which is its letter where choices have none;
      or its text.
    context: what stands before a choice, with {question} in it, and {choices}, a line "A. text" for
      each, where the choices are to be shown.
    continuation: what follows, {choice} or {letter}: the choice's text, or the letter alone.
    unconditional: the context that is compared with, in which the question does not stand.
    shots: questions with their answers before each, drawn from shots_source and its split
      shots_split, or, where the source is None, from the other rows. separator: between them.
    rows: questions at most, spread evenly over all. seed: of the drawing.
    """

    source: str
    file_format: str | None = None
    split: str = "test"
    malformed: Literal["error", "skip"] = "error"
    question: str = "question"
    choices: str = "choices"
    answer: str = "answer|answerKey|label"
    context: str = "Question: {question}\nAnswer:"
    continuation: str = " {choice}"
    unconditional: str = "Answer:"
    shots: int = 0
    shots_source: str | None = None
    shots_split: str = "train"
    separator: str = "\n\n"
    rows: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rows < 1 or self.shots < 0:
            raise UserError(f"rows={self.rows} must be positive, and shots={self.shots} not less.")
        if "{question}" not in self.context:
            raise UserError(f"context={self.context!r} does not hold {{question}}.")
        if not any(name in self.continuation for name in ("{choice}", "{letter}")):
            raise UserError(
                f"continuation={self.continuation!r} holds neither {{choice}} nor {{letter}}."
            )
        if not self.unconditional:
            raise UserError("unconditional is empty: give the words before an answer.")

    def records(self, source: str, split: str) -> SourceConfig:
        return SourceConfig(
            source=source, format=self.file_format, split=split, malformed=self.malformed
        )


@dataclasses.dataclass(frozen=True)
class Question:
    """choices: texts, at least two. answer: the place of the true one."""

    text: str
    choices: tuple[str, ...]
    answer: int

    @property
    def identity(self) -> str:
        return "\n".join((self.text, *self.choices))


def multiple_choice_task(
    config: MultipleChoiceConfig, subject: Subject
) -> Callable[[Any], TaskResult]:
    """
    Returns:
      What gives, each with its standard error: accuracy, of the choice of the largest
      log-probability; accuracy_by_bytes, of the largest one per UTF-8 byte of what `continuation`
      says, white space around it left out (acc_bytes of the lm-evaluation-harness; its acc_norm
      counts characters, as many in ASCII); accuracy_unconditional, of the largest difference to
      that after `unconditional` (Brown et al. 2020, arXiv:2005.14165, section 2.4). chance: what
      drawing choices would give. truncated: the share of questions whose context lost its
      beginning.

    Raises:
      UserError: rows that cannot be read, or fewer than there are shots.
    """
    questions = pool = _questions(config, config.records(config.source, config.split))
    if config.shots_source is not None:
        pool = _questions(config, config.records(config.shots_source, config.shots_split))
    chosen = spread(questions, config.rows)
    ids = stable_ids([question.identity for question in questions])
    contexts = {i: _context(config, questions[i], pool, ids[i]) for i in chosen}
    tokenizer = subject.tokenizer

    def run(params: Any) -> TaskResult:
        given, alone, sizes = [], [], []
        for i in chosen:
            for place in range(len(questions[i].choices)):
                text = _continuation(config.continuation, questions[i], place)
                given.append(encode_pair(tokenizer, contexts[i], text))
                alone.append(encode_pair(tokenizer, config.unconditional, text))
                said = _continuation(config.continuation.strip(), questions[i], place)
                sizes.append(len(said.encode("utf-8")))
        found = iter(
            zip(
                given,
                subject.loglikelihoods(params, given),
                _of_distinct(subject, params, alone),
                sizes,
                strict=True,
            )
        )
        rows = []
        for i in chosen:
            scored = [next(found) for _ in questions[i].choices]
            rows.append(_example(ids[i], questions[i], scored, subject.model.max_length))
        metrics: dict[str, float] = {}
        for name, key in _PICKS.items():
            metrics |= mean(name, [row[key] == row["answer"] for row in rows])
        metrics["chance"] = float(np.mean([1 / len(questions[i].choices) for i in chosen]))
        metrics["truncated"] = float(np.mean([row["truncated"] for row in rows]))
        return TaskResult(metrics, rows)

    return run


# What each accuracy is of: the choice under this key of an example.
_PICKS = {
    "accuracy": "picked",
    "accuracy_by_bytes": "picked_by_bytes",
    "accuracy_unconditional": "picked_unconditional",
}


def _example(
    id: str,
    question: Question,
    scored: Sequence[tuple[tuple[Sequence[int], Sequence[int]], LogLikelihood, LogLikelihood, int]],
    longest: int,
) -> dict[str, Any]:
    raw = np.array([given.total for _, given, _, _ in scored])
    alone = np.array([bare.total for _, _, bare, _ in scored])
    sizes = np.array([size for *_, size in scored])
    return {
        "id": id,
        "answer": question.answer,
        "picked": int(np.argmax(raw)),
        "picked_by_bytes": int(np.argmax(raw / sizes)),
        "picked_unconditional": int(np.argmax(raw - alone)),
        "logprobs": raw.tolist(),
        "unconditional_logprobs": alone.tolist(),
        "bytes": sizes.tolist(),
        "truncated": any(len(c) + len(a) - 1 > longest for (c, a), *_ in scored),
    }


def _of_distinct(
    subject: Subject, params: Any, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> list[LogLikelihood]:
    """`loglikelihoods`, with equal pairs read once: letters are the same for every question."""
    keys = [(tuple(context), tuple(continuation)) for context, continuation in pairs]
    distinct = list(dict.fromkeys(keys))
    known = dict(zip(distinct, subject.loglikelihoods(params, distinct), strict=True))
    return [known[key] for key in keys]


def _context(
    config: MultipleChoiceConfig, question: Question, pool: Sequence[Question], id: str
) -> str:
    """The question behind its shots. These are drawn by the question, so that they are the same
    whatever other rows there are, and never it."""
    digits = int(id.partition("-")[0], 16)
    order = np.random.default_rng([config.seed, digits]).permutation(len(pool))
    others = (pool[i] for i in order if pool[i].identity != question.identity)
    drawn = list(itertools.islice(others, config.shots))
    if len(drawn) < config.shots:
        raise UserError(
            f"source={config.source!r}: shots={config.shots} are more than the {len(drawn)} other "
            "rows to draw from."
        )
    shots = [
        _asked(config, other) + _continuation(config.continuation, other, other.answer)
        for other in drawn
    ]
    return config.separator.join([*shots, _asked(config, question)])


def _asked(config: MultipleChoiceConfig, question: Question) -> str:
    shown = zip(LETTERS, question.choices, strict=False)
    return _filled(
        config.context,
        question=question.text,
        choices="\n".join(f"{letter}. {choice}" for letter, choice in shown),
    )


def _continuation(text: str, question: Question, place: int) -> str:
    return _filled(text, choice=question.choices[place], letter=LETTERS[place])


def _filled(text: str, **values: str) -> str:
    """The text with {NAME} replaced once; other braces, also those of the values, stay."""
    names = "|".join(values)
    return re.sub(rf"\{{({names})\}}", lambda match: values[match[1]], text)


def _questions(config: MultipleChoiceConfig, records: SourceConfig) -> list[Question]:
    """
    Raises:
      UserError: a source that cannot be read, a malformed row unless those are skipped, no row.
    """
    counts, found = ReadCounts(), []
    for row in read_records(records):
        if not isinstance(row, Malformed):
            try:
                found.append(_question(config, row.fields))
                continue
            except MalformedExample as error:
                row = Malformed(row.where, str(error))
        count_malformed(row, records, counts)
    if not found:
        raise nothing_read("question", records, counts)
    return found


def _question(config: MultipleChoiceConfig, fields: Mapping[str, Any]) -> Question:
    """
    Raises:
      MalformedExample: the row has no question, choices or answer.
    """
    row = dict(fields)
    value = value_of(row, config.choices)
    labels: list[Any] | None = None
    if isinstance(value, dict):
        labels = [str(label) for label in as_list(value_of(value, "label|labels"), "label")]
        value = value_of(value, "text|texts")
    choices = tuple(as_text(choice, config.choices) for choice in as_list(value, config.choices))
    if not 2 <= len(choices) <= len(LETTERS) or not all(choices):
        raise MalformedExample(
            f"{config.choices!r} holds {len(choices)} choices; 2 to {len(LETTERS)} are wanted, "
            "none of them empty"
        )
    if labels is None:
        labels = list(LETTERS[: len(choices)])
    answer = _place(value_of(row, config.answer), labels, choices)
    return Question(text_of(row, config.question), choices, answer)


def _place(answer: Any, labels: Sequence[str], choices: Sequence[str]) -> int:
    if isinstance(answer, int) and not isinstance(answer, bool):
        if 0 <= answer < len(choices):
            return answer
        raise MalformedExample(f"the answer {answer} is no place among {len(choices)} choices")
    for known in (labels, choices):
        if str(answer) in known:
            return list(known).index(str(answer))
    if str(answer).isdigit() and int(str(answer)) < len(choices):
        return int(str(answer))
    raise MalformedExample(f"the answer {str(answer)[:40]!r} is none of the choices")
