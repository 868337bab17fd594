"""What the tools that write data sets have in common: the file, and where its rows come from."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from llm_jax.errors import UserError

_TOLD = 100  # rows from one line of progress to the next


def new_file(output: str) -> Path:
    """The file that --output names.

    Raises:
      UserError: it is there already, or its folder is not.
    """
    path = Path(output)
    if path.exists():
        raise UserError(f"--output={output} is there already: name a new file.")
    if not path.parent.is_dir():
        raise UserError(f"--output={output}: there is no folder {str(path.parent)!r}; make it.")
    return path


def write_dataset(
    path: Path,
    rows: Iterable[dict[str, Any]],
    dropped: Mapping[str, int],
    lineage: Callable[[], dict[str, Any]],
) -> None:
    """Writes rows to a file, and beside it FILE.lineage, which readers of the folder pass over.

    Args:
      dropped: how many rows there could have been, by the reason why they are not there; looked at
        when all rows have come.
      lineage: JSON-able, called then, too.

    Raises:
      UserError: a file that cannot be written; no row.
    """
    from llm_jax.json_files import write_json, write_json_lines

    count = write_json_lines(path, _watched(rows, dropped))
    facts = {"rows": count, "dropped": {why: n for why, n in dropped.items() if n}}
    write_json(path.with_name(f"{path.name}.lineage"), {**lineage(), **facts})
    print(f"{path}: {count:,} rows; dropped: {_counts(dropped)}", file=sys.stderr)


def _watched(
    rows: Iterable[dict[str, Any]], dropped: Mapping[str, int]
) -> Iterator[dict[str, Any]]:
    """The rows, with a line now and then."""
    count = 0
    for count, row in enumerate(rows, start=1):
        yield row
        if count % _TOLD == 0:
            print(f"{count:,} rows; dropped so far: {_counts(dropped)}", file=sys.stderr)
    if not count:
        raise UserError(f"no row is left, so none is written; dropped: {_counts(dropped)}.")


def _counts(dropped: Mapping[str, int]) -> str:
    return ", ".join(f"{n:,} {why}" for why, n in dropped.items() if n) or "none"
