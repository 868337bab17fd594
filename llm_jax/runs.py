"""A finished or running run, loaded for use: what every tool starts with."""

from __future__ import annotations

import dataclasses
import functools
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


def check_new(folder: Path, flag: str) -> None:
    """
    Raises:
      UserError: something is in the folder that `flag` names.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{flag}={folder} is there already: name a new folder.")
