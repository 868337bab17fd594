"""Rewards that check a completion: against the row's answer, a form, or the row's unit tests.

A completion that is wrong, in whatever way, has the reward 0. What raises is a row that lacks what
it is to be checked against.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from typing import Any, NoReturn

from llm_jax.data.fields import as_json, as_list, as_text, value_of
from llm_jax.data.prompts import ANSWER
from llm_jax.errors import UserError
from llm_jax.evals.answers import final_answer, normalise
from llm_jax.rl import sandbox
from llm_jax.rl.numerals import last_number
from llm_jax.rl.scoring import Outcome, Policy, Reward, RewardFunction, Sample

_FENCE = re.compile(r"```[^\S\n]*[\w+-]*[^\S\n]*\n(.*?)(?:\n?```|\Z)", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class AnswerConfig:
    """What a completion is compared with.

    field: the row's field with the true answer; "a|b" is the first of them that is there.
    answer_after: what counts of a completion is the text after the last of these, and nothing where
      it has none; of the true answer the same, or all where it has none. None = all of both.
    """

    field: str = ANSWER
    answer_after: str | None = None

    def pair(self, completion: str, row: Mapping[str, Any]) -> tuple[str, str]:
        """The answer found and the one wanted.

        Raises:
          MalformedExample: the row has no such answer.
        """
        value = value_of(dict(row), self.field)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        wanted = str(value) if is_number else as_text(value, self.field)
        if self.answer_after is None:
            return completion, wanted
        return final_answer(completion, self.answer_after), wanted.rpartition(self.answer_after)[2]


@dataclasses.dataclass(frozen=True)
class ExactMatchConfig(AnswerConfig):
    """normalised: whether case, punctuation, articles and surplus space are left out of account
    (SQuAD), or only the space around both."""

    normalised: bool = False


@dataclasses.dataclass(frozen=True)
class NumericConfig(AnswerConfig):
    """tolerance: by how much the number may differ from the true one, as a share of it, or of 1
    where that is smaller."""

    tolerance: float = 1e-6

    def __post_init__(self) -> None:
        if not 0 <= self.tolerance < 1:
            raise UserError(f"tolerance={self.tolerance} must lie in [0, 1).")


@dataclasses.dataclass(frozen=True)
class RegexConfig:
    """pattern: of Python's `re`, searched for in the completion; flags as "(?s)" at its start.
    whole: whether all of the completion has to match, except for the space around it."""

    pattern: str
    whole: bool = False


@dataclasses.dataclass(frozen=True)
class JsonSchemaConfig:
    """schema: a JSON schema. field: the row's field that holds it, or its JSON; one of the two."""

    schema: dict[str, Any] | None = None
    field: str | None = None

    def __post_init__(self) -> None:
        if (self.schema is None) == (self.field is None):
            raise UserError("give either a schema, or the row's field that holds it.")


@dataclasses.dataclass(frozen=True)
class UnitTestsConfig:
    """field: the row's field with the tests, a text of Python or a list of them; each has passed
    where it raises nothing. memory_mb: what a completion with its tests may take, in MiB."""

    field: str = "tests"
    memory_mb: int = 512

    def __post_init__(self) -> None:
        if self.memory_mb < 64:
            raise UserError(
                f"memory_mb={self.memory_mb} is too little for Python: give 64 or more."
            )


def exact_match(config: ExactMatchConfig) -> RewardFunction:
    """1 where the completion is the answer."""
    form = normalise if config.normalised else str.strip

    def reward(prompt: str, completion: str, row: Mapping[str, Any]) -> float:
        found, wanted = config.pair(completion, row)
        return float(form(found) == form(wanted))

    return reward


def numeric(config: NumericConfig) -> RewardFunction:
    """1 where the last number of the completion is the last one of the answer, as in GSM8K
    (arXiv:2110.14168); see `numerals.last_number`."""
    tolerance = Fraction(config.tolerance)

    def reward(prompt: str, completion: str, row: Mapping[str, Any]) -> float:
        found_text, wanted_text = config.pair(completion, row)
        found, wanted = last_number(found_text), last_number(wanted_text)
        if wanted is None:
            raise ValueError(f"{config.field!r} holds no number")
        if found is None:
            return 0.0
        allowed = tolerance * max(Fraction(1), abs(wanted))
        return float(abs(found - wanted) <= allowed)

    return reward


def regex(config: RegexConfig) -> RewardFunction:
    """1 where the pattern is found.

    Raises:
      UserError: it is no regular expression.
    """
    try:
        pattern = re.compile(config.pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(f"pattern={config.pattern!r} is no regular expression: {error}.") from error

    def reward(prompt: str, completion: str, row: Mapping[str, Any]) -> float:
        if config.whole:
            return float(pattern.fullmatch(completion.strip()) is not None)
        return float(pattern.search(completion) is not None)

    return reward


def json_schema(config: JsonSchemaConfig) -> RewardFunction:
    """1 where the completion, or the last fenced block in it, is JSON that fits the schema.

    References to schemas elsewhere are not followed.

    Raises:
      UserError: the package jsonschema is missing, or the schema is none.
    """
    try:
        import jsonschema
        import referencing.exceptions
    except ImportError as error:
        raise UserError(
            "it needs the package jsonschema: pip install 'llm_jax[rewards]'"
        ) from error

    def validator(schema: Any) -> Any:
        try:
            cls = jsonschema.validators.validator_for(
                schema, default=jsonschema.Draft202012Validator
            )
            cls.check_schema(schema)
        except jsonschema.SchemaError as error:
            raise ValueError(f"the JSON schema is none: {error.message}") from error
        return cls(schema, registry=referencing.Registry())

    try:
        known = None if config.schema is None else validator(config.schema)
    except ValueError as error:
        raise UserError(f"{error}.") from error

    def reward(prompt: str, completion: str, row: Mapping[str, Any]) -> float:
        check = known
        if check is None:
            assert config.field is not None
            check = validator(as_json(value_of(dict(row), config.field), config.field))
        try:
            value = json.loads(fenced(completion), parse_constant=_refuse_constant)
            return float(check.is_valid(value))
        except referencing.exceptions.Unresolvable:
            raise
        except (ValueError, RecursionError):
            return 0.0

    return reward


def unit_tests(config: UnitTestsConfig, policy: Policy, seconds: float) -> Reward:
    """The share of the row's tests that pass after the completion's code: its last fenced block, or
    all of it. They run in a process of their own for at most `seconds`, as `sandbox.run` says."""
    limits = sandbox.Limits(seconds, config.memory_mb)
    if not sandbox.isolation():
        policy.log(
            "unit_tests: this system gives no namespaces, so that the code of completions can do "
            "what you can do: reach the network, read and write files."
        )

    def share(sample: Sample) -> Outcome:
        try:
            tests = value_of(dict(sample.row), config.field)
            tests = [tests] if isinstance(tests, str) else as_list(tests, config.field)
            if not tests:
                raise ValueError(f"{config.field!r} holds no test")
            tests = [as_text(test, config.field) for test in tests]
            passed = sandbox.run(fenced(sample.completion_text), tests, limits)
            return sum(passed) / len(passed)
        except Exception as error:
            return error

    def score(samples: Sequence[Sample]) -> list[Outcome]:
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            return list(threads.map(share, samples))

    return Reward(score)


def length(sample: Sample) -> float:
    """The number of tokens of the completion, its end included."""
    return float(len(sample.completion_ids))


def finished(sample: Sample) -> float:
    """1 where the completion ended by itself."""
    return float(sample.finished)


def fenced(completion: str) -> str:
    """The last block of a text that stands between lines of ```, which may lack its end; all of the
    text where it has none."""
    blocks = _FENCE.findall(completion)
    return blocks[-1] if blocks else completion


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")
