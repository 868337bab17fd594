"""The rewards by name, and their weighted sum.

A reward of one's own is any function (prompt, completion, row) → number, plain or async, named by
its import path: "package.module:function". The settings are its further arguments. `REWARDS` is
for rewards that are made from typed settings.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import inspect
import math
import textwrap
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from llm_jax.config import build, resolved
from llm_jax.data.fields import has
from llm_jax.errors import UserError, did_you_mean, one_line
from llm_jax.rl import instructions, reward_models, verifiers
from llm_jax.rl.advantages import whiten
from llm_jax.rl.rollouts import Rollouts
from llm_jax.rl.scoring import Policy, Reward, RewardFunction, Sample, from_function, from_sample

__all__ = ["REWARDS", "Kind", "Policy", "RewardTerm", "Sample", "Scorer", "Scores"]

REPORTED = 5  # failures that are told one by one


@dataclasses.dataclass(frozen=True)
class RewardTerm:
    """One of the rewards whose weighted sum is a sample's score.

    name: one of `REWARDS`, or the import path of a function, "package.module:function".
    weight: of it in the sum; with 0 it is only logged, and its failures cost no sample.
    settings: the fields of its settings, or further arguments of the function.
    seconds: a call that takes longer has failed; of unit tests, those that are not through by then.
      A trained model takes what it takes.
    """

    name: str
    weight: float = 1.0
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    seconds: float = 10.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight):
            raise UserError(f"the weight {self.weight} of the reward {self.name!r} is no number.")
        if not (self.seconds > 0 and math.isfinite(self.seconds)):
            raise UserError(f"seconds={self.seconds} of the reward {self.name!r} must be above 0.")


@dataclasses.dataclass(frozen=True)
class Kind:
    """settings: a dataclass. make: `(settings, policy, seconds) → Reward`, seconds being those of a
    `RewardTerm`."""

    settings: type
    make: Callable[[Any, Policy, float], Reward]


@dataclasses.dataclass(frozen=True)
class NoSettings:
    """Of a reward that there is nothing to say about."""


def _each(make: Callable[[Any], RewardFunction]) -> Callable[[Any, Policy, float], Reward]:
    """What makes a reward, from what makes a function of one sample."""
    return lambda settings, policy, seconds: from_function(make(settings), seconds)


REWARDS: dict[str, Kind] = {
    "exact_match": Kind(verifiers.ExactMatchConfig, _each(verifiers.exact_match)),
    "numeric": Kind(verifiers.NumericConfig, _each(verifiers.numeric)),
    "regex": Kind(verifiers.RegexConfig, _each(verifiers.regex)),
    "json_schema": Kind(verifiers.JsonSchemaConfig, _each(verifiers.json_schema)),
    "unit_tests": Kind(verifiers.UnitTestsConfig, verifiers.unit_tests),
    "instructions": Kind(instructions.InstructionsConfig, _each(instructions.instructions)),
    "length": Kind(NoSettings, lambda *_: from_sample(verifiers.length)),
    "finished": Kind(NoSettings, lambda *_: from_sample(verifiers.finished)),
    "model": Kind(
        reward_models.ModelConfig, lambda config, policy, _: reward_models.model(config, policy)
    ),
    "llama2": Kind(
        reward_models.Llama2Config, lambda config, policy, _: reward_models.llama2(config, policy)
    ),
}


@dataclasses.dataclass(frozen=True)
class Scores:
    """total: float32 [samples], the weighted sum; NaN where a reward of it failed. plain: the same
    with nothing whitened, which compares samples that were scored apart. parts: float32 [samples]
    of each reward by name, as it is; NaN where it failed. failures: how often one did."""

    total: np.ndarray
    plain: np.ndarray
    parts: dict[str, np.ndarray]
    failures: int


class Scorer:
    """The weighted sum of rewards.

    Attributes:
      failures: how many calls have failed so far, in all; a resumed run sets it.
    """

    def __init__(self, configs: Sequence[RewardTerm], limit: int, policy: Policy):
        """
        Args:
          configs: at least one.
          limit: a failure more than so many ends the run.

        Raises:
          UserError: a reward that is not there, or settings that do not fit it.
        """
        if not configs:
            raise UserError(
                f"config.rewards is empty: name one of {', '.join(REWARDS)}, or a function as "
                "package.module:function."
            )
        self._weights = [config.weight for config in configs]
        self._limit, self._policy = limit, policy
        self._names = _distinct([config.name.rpartition(":")[2] for config in configs])
        self._rewards = [
            _make(config, policy, f"config.rewards[{place}]")
            for place, config in enumerate(configs)
        ]
        self.failures = 0
        self._told = 0

    def __call__(self, samples: Sequence[Sample]) -> Scores:
        """Scores samples.

        A reward that fails on a sample is told of (the first few), counted, and leaves the sample
        without a score.

        Raises:
          UserError: more failures than the limit; with the last of them.
        """
        parts = {
            name: self._score(name, reward, samples)
            for name, reward in zip(self._names, self._rewards, strict=True)
        }
        return self.sum(parts)

    def sum(self, parts: dict[str, np.ndarray]) -> Scores:
        """The scores of samples whose rewards are there already, perhaps by several calls.

        Args:
          parts: as in `Scores`; what is whitened is whitened over all of these samples.
        """
        total, plain = np.zeros((2, len(next(iter(parts.values())))), np.float32)
        for weight, reward, part in zip(self._weights, self._rewards, parts.values(), strict=True):
            if weight:
                total += np.float32(weight) * (_whitened(part) if reward.whitened else part)
                plain += np.float32(weight) * part
        failures = sum(int(np.isnan(part).sum()) for part in parts.values())
        return Scores(total, plain, parts, failures)

    def extend(self, scores: Scores, samples: Sequence[Sample]) -> Scores:
        """The scores that are there and, after them, those of further samples, by one scale.

        Raises:
          UserError: see `__call__`.
        """
        if not samples:
            return scores
        more = self(samples).parts
        return self.sum({name: np.append(part, more[name]) for name, part in scores.parts.items()})

    def _score(self, name: str, reward: Reward, samples: Sequence[Sample]) -> np.ndarray:
        """float32 [samples], the same in every process."""
        scores = np.full(len(samples), np.nan, np.float32)
        last = "told by process 0."
        if reward.on_mesh or jax.process_index() == 0:
            outcomes = reward.score(samples)
            scores[:] = [np.nan if isinstance(o, Exception) else o for o in outcomes]
            for sample, outcome in zip(samples, outcomes, strict=True):
                if isinstance(outcome, Exception):
                    last = _describe(name, sample, outcome)
                    self._tell(last)
        # A function of the user's may give other numbers, or cost money, in each process.
        scores = np.asarray(multihost_utils.broadcast_one_to_all(scores))
        self.failures += int(np.isnan(scores).sum())
        if self.failures > self._limit:
            raise UserError(
                f"rewards have failed {self.failures} times, and the limit is {self._limit}; mend "
                f"them, or raise it. The last: {last}"
            )
        return scores

    def _tell(self, line: str) -> None:
        self._told += 1
        if self._told <= REPORTED:
            self._policy.log(line)
        if self._told == REPORTED:
            self._policy.log("further failures of rewards are counted only.")


def describe_scores(scores: Scores, rollouts: Rollouts) -> dict[str, float]:
    """What to log of samples: rewards, lengths, how many ended by themselves."""
    known = scores.plain[np.isfinite(scores.plain)]
    parts = {f"rewards/{name}": _mean(values) for name, values in scores.parts.items()}
    return {
        "reward": _mean(scores.plain),
        "reward_std": float(known.std()) if len(known) else 0.0,
        **parts,
        "completion_length": float(rollouts.lengths.mean()),
        "finished": float(rollouts.finished.mean()),
    }


def check_answers(terms: Sequence[RewardTerm], rows: Sequence[Mapping[str, Any]]) -> None:
    """Refuses rewards that compare with a field of the row where no row has it.

    Raises:
      UserError: see above.
    """
    for term in terms:
        field = getattr(_settings(term), "field", None)
        if field is not None and rows and not any(has(dict(row), field) for row in rows):
            raise UserError(
                f"the reward {term.name!r} compares with the field {field!r}, which no row has: "
                "name another field in its settings, or give rows with answers."
            )


def _mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else 0.0


def _whitened(part: np.ndarray) -> np.ndarray:
    known = np.isfinite(part)
    return np.where(known, whiten(part, known), np.float32(np.nan))


def _describe(name: str, sample: Sample, error: Exception) -> str:
    prompt = textwrap.shorten(sample.prompt_text, 60, placeholder="...")
    return f"the reward {name!r} failed on row {sample.number} ({prompt!r}): {one_line(error)}"


def _distinct(names: Sequence[str]) -> list[str]:
    """The names, of which a second "regex" becomes "regex_2"."""
    seen: Counter[str] = Counter()
    distinct = []
    for name in names:
        seen[name] += 1
        distinct.append(name if seen[name] == 1 else f"{name}_{seen[name]}")
    return distinct


def _make(config: RewardTerm, policy: Policy, where: str) -> Reward:
    """
    Raises:
      UserError: the reward cannot be made; the message names its place in the config.
    """
    try:
        if ":" in config.name:
            function = _imported(config.name, resolved(config.settings))
            return from_function(function, config.seconds)
        if config.name not in REWARDS:
            raise UserError(
                f"no such reward.{did_you_mean(config.name, REWARDS)} A function of your own is "
                "named package.module:function."
            )
        return REWARDS[config.name].make(_settings(config), policy, config.seconds)
    except UserError as error:
        raise UserError(f"{where}, {config.name!r}: {error}") from error


def _settings(config: RewardTerm) -> Any:
    """The settings of a reward as its dataclass; None of a function."""
    kind = REWARDS.get(config.name)
    if kind is None:
        return None
    return build(kind.settings, resolved(config.settings), "settings")


def _imported(path: str, settings: Mapping[str, Any]) -> RewardFunction:
    module, _, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever the module does
        raise UserError(f"it cannot be imported: {one_line(error)}.") from error
    if not callable(function):
        raise UserError("it is no function.")
    with contextlib.suppress(ValueError):  # some functions in C tell nobody what they take
        try:
            inspect.signature(function).bind("", "", {}, **settings)
        except TypeError as error:
            raise UserError(
                f"it cannot be called with a prompt, a completion, a row and the settings: {error}."
            ) from error
    return functools.partial(function, **settings)
