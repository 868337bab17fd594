"""Numbers in a few words: spreads, units, and the JSON file."""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from llm_jax.errors import UserError


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def show_spread(values: dict[str, float], form: str, scale: float = 1.0) -> str:
    """`median (min to max)`, each in the format `form` after multiplication by `scale`."""
    median, least, most = (format(values[k] * scale, form) for k in ("median", "min", "max"))
    return f"{median} ({least} to {most})"


def show_flops(value: float) -> str:
    """With three figures and a unit: 1.23 GFLOP."""
    for unit in ("", "k", "M", "G", "T", "P"):
        if value < 999.5 or unit == "P":
            break
        value /= 1000
    return f"{value:.3g} {unit}FLOP"


def tell(text: str) -> None:
    """Shows on a terminal what is going on, on a line of stderr that is drawn over itself."""
    if sys.stderr.isatty():
        print(f"\r{text:<60}\r", end="", file=sys.stderr, flush=True)


@contextlib.contextmanager
def write_json(path: str | None) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Gives the function that writes the result; where it can't, that shows before the work.

    Raises:
      UserError: the file can't be written.
    """
    if path is None:
        yield lambda result: None
        return
    folder = Path(path).absolute().parent
    if not folder.is_dir() or Path(path).is_dir():
        raise UserError(f"--output={path} can't be written: name a file in an existing folder.")

    def write(result: dict[str, Any]) -> None:
        try:
            Path(path).write_text(json.dumps(result, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"--output={path} can't be written: {error.strerror}.") from error

    yield write
