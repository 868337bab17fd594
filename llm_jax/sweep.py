"""Sweeps as a small algebra: spaces of points, each point a set of overrides of one config.

    product(param("optimizer.learning_rate", [1e-3, 3e-3]), param("model.num_layers", [2, 4]))

has four points, {"optimizer.learning_rate": 1e-3, "model.num_layers": 2} the first of them. A space
is the tuple of its points, so spaces are made of spaces to any depth. Nothing here runs anything.
"""

from __future__ import annotations

import ast
import builtins
import dataclasses
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llm_jax.errors import UserError
from llm_jax.measures import Direction, best_end

Overrides = Mapping[str, Any]  # by dotted path without "config.", such as "phases[0].length"
Space = tuple[Overrides, ...]

SEED = "seed"  # points that differ in nothing else are repetitions of one

_NAME_LENGTH = 120  # of a folder; file systems take 255 bytes


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What a sweep file's `get_sweep(argument)` returns.

    config: a config file with its argument, as --config of llm_jax.main takes it.
    metric: a key of result.json's metrics by which points are ranked; of a recipe STAGE/KEY.
    direction: which end is the best; None = as `measures.best_end` says.
    overrides: those that all points share.
    """

    config: str
    space: Space
    metric: str = "eval/validation/loss"
    direction: Direction | None = None
    overrides: Overrides = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.space:
            raise UserError("the sweep has no points: give a parameter values.")
        for key in self.overrides:
            if any(key in point for point in self.space):
                raise UserError(f"the sweep sets {key!r} for all points, and sweeps over it.")

    @property
    def keys(self) -> tuple[str, ...]:
        """What is swept over, in the order of its first appearance."""
        return tuple(dict.fromkeys(key for point in self.space for key in point))


def param(key: str, values: Iterable[Any]) -> Space:
    """A point for each value of one field of the config."""
    return _distinct({key: value} for value in values)


def product(*spaces: Space) -> Space:
    """Every point of the first space with every one of the next, and so on, the last one fastest.

    Raises:
      UserError: two spaces set one key.
    """
    return _distinct(_joined(points) for points in itertools.product(*spaces))


def zip(*spaces: Space) -> Space:
    """The first points of all spaces together, then the second ones, and so on.

    Raises:
      UserError: spaces of different sizes, or two that set one key.
    """
    sizes = [len(space) for space in spaces]
    if len(set(sizes)) > 1:
        raise UserError(f"zip takes spaces of one size, and these have {sizes} points.")
    return _distinct(_joined(points) for points in builtins.zip(*spaces, strict=True))


def chain(*spaces: Space) -> Space:
    """The points of the first space, then those of the next, and so on; each once."""
    return _distinct(itertools.chain(*spaces))


def parse_grid(terms: Sequence[str]) -> Space:
    """The product of terms such as "optimizer.learning_rate=1e-3,3e-4".

    Values are Python literals or else texts; commas inside brackets or quotes divide none.

    Raises:
      UserError: a term that is not KEY=VALUE,VALUE,...
    """
    return product(*map(_parse_term, terms))


def name_points(space: Space) -> list[str]:
    """A folder's name for each point, such as "learning_rate=0.001,num_layers=2": the last parts of
    the keys, or as much more of them as tells them apart."""
    keys = list(dict.fromkeys(key for point in space for key in point))
    short = {key: _shortest(key, keys) for key in keys}
    names = []
    for number, point in enumerate(space, start=1):
        name = ",".join(f"{short[key]}={value}" for key, value in point.items())
        name = re.sub(r"[^\w.=,+-]+", "_", name)
        names.append(name if len(name) <= _NAME_LENGTH else f"{number}-{name[:_NAME_LENGTH]}")
    twice = {name for name in names if names.count(name) > 1}
    return [f"{i}-{name}" if name in twice else name for i, name in enumerate(names, start=1)]


def find_direction(metric: str, asked: Direction | None) -> Direction:
    """
    Raises:
      UserError: none is asked for, and the metric is not known.
    """
    found = asked or best_end(metric)
    if found is None:
        raise UserError(
            f"which end of {metric!r} is the best is not known: give --direction=lowest or highest."
        )
    return found


def _distinct(points: Iterable[Overrides]) -> Space:
    found: list[Overrides] = []
    for point in points:
        # 1 and 1.0 are equal, and so are 1 and True, but not as overrides.
        if repr(point) not in map(repr, found):
            found.append(point)
    return tuple(found)


def _joined(points: Iterable[Overrides]) -> Overrides:
    joined: dict[str, Any] = {}
    for point in points:
        for key in point:
            if key in joined:
                raise UserError(f"two parts of the sweep set {key!r}: leave it to one of them.")
        joined |= point
    return joined


def _parse_term(term: str) -> Space:
    key, equals, values = term.partition("=")
    key = key.strip().removeprefix("config.")
    found = re.findall(r"""((?:\([^)]*\)|\[[^]]*\]|"[^"]*"|'[^']*'|[^,])+)""", values)
    if not equals or not key or not found:
        raise UserError(
            f"--grid {term!r} is not understood: give KEY=VALUE,VALUE,..., for example "
            "optimizer.learning_rate=1e-3,3e-4."
        )
    return param(key, map(_parse_value, found))


def _parse_value(text: str) -> Any:
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError):
        return text.strip()


def _shortest(key: str, keys: Sequence[str]) -> str:
    """The fewest last parts of a dotted path that no other one ends with."""
    parts = key.split(".")
    for count in range(1, len(parts)):
        tail = parts[-count:]
        if sum(other.split(".")[-count:] == tail for other in keys) == 1:
            return ".".join(tail)
    return key
