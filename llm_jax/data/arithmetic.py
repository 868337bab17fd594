"""Generated arithmetic problems: a small task whose answers can be verified.

Digits are tokens of their own for the tokenizers trained here, so a small model can learn to carry
and need not have seen a sum to know it.
"""

from __future__ import annotations

import dataclasses
import operator
import random
from collections.abc import Callable, Iterator

from llm_jax.errors import UserError, did_you_mean

# Part of every cache key: raise it when a name comes to mean other problems.
ARITHMETIC_VERSION = 2

_PROBLEMS = 6000  # at most; there are but 100 of one digit
_DIGITS = tuple("123456789")
_DEFAULT_DIGITS = "2"


@dataclasses.dataclass(frozen=True)
class Task:
    """sign: as it is written. answer: of the two numbers."""

    sign: str
    answer: Callable[[int, int], int]


TASKS: dict[str, Task] = {
    "addition": Task("+", operator.add),
    "subtraction": Task("-", operator.sub),
    "multiplication": Task("*", operator.mul),
}


def arithmetic_rows(name: str) -> Iterator[dict[str, str]]:
    """{"prompt": "What is 47 + 85?", "completion": "132", "text", "split_text"} of distinct
    problems; the text is both, for pre-training.

    The numbers are drawn evenly from those below 10**DIGITS, so a few have fewer digits. The rows
    of a name are the same everywhere. A problem and the same one with its numbers exchanged have
    one `split_text`, so that the held-out problems are new ones.

    Args:
      name: "TASK" or "TASK-DIGITS", such as "addition" (of two digits) or "addition-3".

    Raises:
      UserError: no such task or number of digits.
    """
    task_name, dash, given = name.partition("-")
    if task_name not in TASKS:
        raise UserError(
            f"the arithmetic task {task_name!r} is unknown.{did_you_mean(task_name, TASKS)}"
        )
    digits = _digits(given if dash else _DEFAULT_DIGITS, name)
    return _rows(TASKS[task_name], f"{task_name}-{digits}", 10**digits)


def _rows(task: Task, seed: str, bound: int) -> Iterator[dict[str, str]]:
    problems = random.Random(seed).sample(range(bound**2), min(_PROBLEMS, bound**2))
    for first, second in (divmod(problem, bound) for problem in problems):
        low, high = sorted((first, second))
        prompt, answer = f"What is {first} {task.sign} {second}?", str(task.answer(first, second))
        yield {
            "prompt": prompt,
            "completion": answer,
            "text": f"{prompt} {answer}",
            "split_text": f"{low} {task.sign} {high}",
        }


def _digits(text: str, name: str) -> int:
    if text not in _DIGITS:
        raise UserError(
            f"the arithmetic task {name!r} asks for {text!r} digits: give {_DIGITS[0]} to "
            f"{_DIGITS[-1]}."
        )
    return int(text)
