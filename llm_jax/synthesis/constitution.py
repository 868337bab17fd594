"""A constitution: the principles by which a judge criticises, revises and chooses answers."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path
from typing import Any

import numpy as np

from llm_jax.config import digest
from llm_jax.errors import UserError, did_you_mean

DEFAULT = Path(__file__).with_name("constitution.toml")


@dataclasses.dataclass(frozen=True)
class Principle:
    """One thing that is asked of answers.

    critique, revision: requests to criticise the last answer and then to write a better one; both
    or neither. choice: by what to choose between two answers. Some of them may be empty.
    """

    name: str
    critique: str = ""
    revision: str = ""
    choice: str = ""


@dataclasses.dataclass(frozen=True)
class Constitution:
    """principles: at least one, their names distinct. file: where they were read."""

    principles: tuple[Principle, ...]
    file: Path

    @property
    def digest(self) -> str:
        """A hash of all names and texts."""
        return digest([dataclasses.asdict(principle) for principle in self.principles])

    @property
    def revising(self) -> tuple[Principle, ...]:
        """The principles with a critique and a revision.

        Raises:
          UserError: there is none.
        """
        return self._with("critique", "critique and revision")

    @property
    def choosing(self) -> tuple[Principle, ...]:
        """The principles with a choice.

        Raises:
          UserError: there is none.
        """
        return self._with("choice", "choice")

    def _with(self, field: str, names: str) -> tuple[Principle, ...]:
        found = tuple(p for p in self.principles if getattr(p, field))
        if not found:
            raise UserError(f"{self.file} has no principle with {names}: give one of them those.")
        return found


def load_constitution(file: Path) -> Constitution:
    """Reads [[principles]] with name, critique, revision and choice from a TOML file.

    Raises:
      UserError: it cannot be read, or a principle is not as it should be; the message names it.
    """
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"the constitution {file} cannot be read: {error}.") from error
    entries = table.get("principles")
    if not isinstance(entries, list) or not entries:
        raise UserError(f"the constitution {file} has no [[principles]]: write some.")
    principles = tuple(
        _principle(entry, f"{file}, principle {number}")
        for number, entry in enumerate(entries, start=1)
    )
    names = [principle.name for principle in principles]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{file} has two principles named {twice!r}: rename one.")
    return Constitution(principles, file)


def draw(principles: tuple[Principle, ...], *seeds: int) -> Principle:
    """One of the principles, decided by the seeds, each of which is non-negative."""
    return principles[int(np.random.default_rng(seeds).integers(len(principles)))]


def _principle(entry: Any, where: str) -> Principle:
    fields = [field.name for field in dataclasses.fields(Principle)]
    if not isinstance(entry, dict):
        raise UserError(f"{where} is no table: write [[principles]] above it.")
    for name, value in entry.items():
        if name not in fields:
            raise UserError(f"{where}: there is no field {name!r}.{did_you_mean(name, fields)}")
        if not isinstance(value, str) or not value.strip():
            raise UserError(f"{where}: {name!r} is no text: write one, or leave it out.")
    if "name" not in entry:
        raise UserError(f"{where} has no name: give it one.")
    if ("critique" in entry) != ("revision" in entry):
        raise UserError(f"{where}: critique and revision belong together: give both or neither.")
    if "critique" not in entry and "choice" not in entry:
        raise UserError(f"{where} asks nothing: give it critique and revision, or choice.")
    return Principle(**entry)
