"""A finished or running run, loaded for use: what every tool starts with."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from llm_jax import checkpoint, sharding
from llm_jax.data.tokenizers import Tokenizer, load_tokenizer
from llm_jax.models import LanguageModel
from llm_jax.stored import find


@dataclasses.dataclass(frozen=True)
class LoadedRun:
    """model, params and tokenizer of one checkpoint; params lie on `mesh`.

    params: with the heads that `meta["heads"]` names, and with adapters beside their kernels.
    meta: the checkpoint's own record: model config, stage, trained length, lineage, template.
    Computations enter the mesh by `with jax.set_mesh(run.mesh)`.
    """

    path: Path
    step: int
    model: LanguageModel
    params: Any
    tokenizer: Tokenizer
    meta: dict[str, Any]
    mesh: Mesh


def load_run(workdir: str, mesh_config: sharding.MeshConfig | None = None) -> LoadedRun:
    """Loads `RUN` at its newest checkpoint, `RUN@STEP`, or a Hugging Face folder, onto all devices.

    Args:
      workdir: the run directory, with an optional step, or the folder.
      mesh_config: how the devices divide the parameters; None = each holds all of them.

    Raises:
      UserError: no run, no such checkpoint, a damaged one, or a mesh that does not fit.
    """
    stored = find(workdir)
    mesh = sharding.make_mesh(mesh_config or sharding.MeshConfig())
    return LoadedRun(
        path=stored.path,
        step=stored.step,
        model=LanguageModel(stored.model),
        params=stored.read(mesh),
        tokenizer=stored.tokenizer(),
        meta=stored.meta,
        mesh=mesh,
    )
