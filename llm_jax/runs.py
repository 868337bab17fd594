"""A finished or running run, loaded for use: what every tool starts with."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from llm_jax.data.tokenizers import Tokenizer
from llm_jax.errors import UserError
from llm_jax.mesh import MeshConfig, make_mesh
from llm_jax.models import LanguageModel
from llm_jax.stored import Stored, find


@dataclasses.dataclass(frozen=True)
class LoadedRun:
    """Model and parameters of one checkpoint; they lie on `mesh`.

    params: with the heads that `meta["heads"]` names, and with adapters beside their kernels.
    meta: the checkpoint's own record: model config, stage, trained length, lineage, template.
    Computations enter the mesh by `with jax.set_mesh(run.mesh)`.
    """

    stored: Stored
    model: LanguageModel
    params: Any
    mesh: Mesh

    @property
    def path(self) -> Path:
        return self.stored.path

    @property
    def step(self) -> int:
        return self.stored.step

    @property
    def meta(self) -> dict[str, Any]:
        return self.stored.meta

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """
        Raises:
          UserError: the run has none, or a damaged one.
        """
        return self.stored.tokenizer()


def load_run(workdir: str, mesh_config: MeshConfig | None = None) -> LoadedRun:
    """Loads `RUN` at its newest checkpoint, `RUN@STEP`, or a Hugging Face folder, onto all devices.

    Args:
      workdir: the run directory, with an optional step, or the folder.
      mesh_config: how the devices divide the parameters; None = each holds all of them.

    Raises:
      UserError: no run, no such checkpoint, a damaged one, or a mesh that does not fit.
    """
    stored = find(workdir)
    mesh = make_mesh(mesh_config or MeshConfig())
    model, params = LanguageModel(stored.model), stored.read(mesh)
    return LoadedRun(stored, model, params, mesh)


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


def check_new(folder: Path, flag: str) -> None:
    """
    Raises:
      UserError: something is in the folder that `flag` names.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{flag}={folder} is there already: name a new folder.")
