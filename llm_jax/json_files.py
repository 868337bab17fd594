"""JSON files of runs: objects that are read with clear errors, and files written whole."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llm_jax.errors import UserError


def read_json(path: Path) -> dict[str, Any] | None:
    """The object that a JSON file holds, such as a run's config.json; None where there is no file.

    Raises:
      UserError: it cannot be read, or holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} cannot be read: it holds no JSON object.")
    return found


def require_json(path: Path) -> dict[str, Any]:
    """`read_json` of a file that has to be there.

    Raises:
      UserError: it is not, or cannot be read.
    """
    found = read_json(path)
    if found is None:
        raise UserError(f"{path} is not there.")
    return found


def write_json(path: Path, value: Any) -> None:
    """Writes JSON so that a reader sees the old file or the new one, never a part."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}")
    with os.fdopen(descriptor, "w") as file:
        json.dump(value, file, indent=2)
        file.write("\n")
    os.chmod(temporary, 0o644)  # mkstemp makes it private, and runs are shared
    os.replace(temporary, path)


def write_json_lines(path: Path, rows: Iterable[Any]) -> int:
    """Writes each row as a line of JSON, the whole file or none of it; returns how many there were.

    Raises:
      UserError: the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.partial")
    count = 0
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                count += 1
        os.replace(temporary, path)
        return count
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error}.") from error
    finally:
        temporary.unlink(missing_ok=True)
