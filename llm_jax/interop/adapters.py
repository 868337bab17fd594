"""Runs with LoRA adapters out of PEFT folders, and PEFT folders out of such runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llm_jax import checkpoint
from llm_jax.config import resolved
from llm_jax.errors import UserError, disk_errors
from llm_jax.interop.families import family_for
from llm_jax.interop.family import Family
from llm_jax.interop.importer import DISK_MEND, STEP, finish
from llm_jax.interop.peft import read_adapters, write_adapters
from llm_jax.interop.tokenizer_files import read_template, write_tokenizer
from llm_jax.mesh import MeshConfig, make_mesh
from llm_jax.models import lora
from llm_jax.models.heads import REWARD
from llm_jax.runs import check_new
from llm_jax.stored import Base, Stored, find


def import_adapters(path: str | Path, base: str, workdir: str | Path) -> None:
    """Makes a run of PEFT adapters beside the run of the model that they belong to.

    The tokenizer is the base's, and the chat template too, unless the adapters bring one.

    Args:
      base: that run, `RUN` or `RUN@STEP`.
      workdir: of the new run, new or empty.

    Raises:
      UserError: adapters that are not understood or belong to another model.
    """
    workdir = Path(workdir)
    check_new(workdir, "--workdir")
    stored = find(base)
    if stored.model.lora is not None:
        raise UserError(f"{base} has adapters already: fold them in by tools.merge first.")
    settings, adapters = read_adapters(Path(path), stored.model, _family(stored))
    mesh = make_mesh(MeshConfig())
    with jax.set_mesh(mesh), disk_errors(workdir, DISK_MEND):
        _, identity = stored.read_merged(mesh)
        meta = stored.meta | {
            "stage": "import",
            "model": resolved(dataclasses.replace(stored.model, lora=settings)),
            "base": resolved(Base(str(stored.path), stored.step, identity)),
            "lineage": list(stored.lineage),
            "heads": [REWARD] if REWARD in adapters else [],
        }
        template = read_template(Path(path))
        if template is not None:
            meta["template"] = template.describe()
        if stored.has_tokenizer:
            stored.tokenizer().save(workdir / "tokenizer")
        checkpoint.write_weights(workdir, STEP, jax.tree.map(jnp.asarray, adapters), meta)
        finish(workdir, {"init_from_hf": str(path), "init_from": base})


def export_adapters(stored: Stored, mesh: Mesh, folder: str | Path, dtype: str) -> None:
    """Writes the adapters of a run as a PEFT folder, with the tokenizer and its chat template.

    Args:
      folder: new or empty.
      dtype: of the tensors: float32, bfloat16 or float16.

    Raises:
      UserError: the run has no adapters, or peft has no form for them.
    """
    folder = Path(folder)
    check_new(folder, "--hf")
    settings = stored.model.lora
    if settings is None:
        raise UserError(f"{stored.name} has no adapters: leave --adapters out.")
    with jax.set_mesh(mesh):
        weights = stored.read(mesh)
    adapters, _ = lora.split(weights)
    if REWARD in weights:
        adapters[REWARD] = weights[REWARD]
    model = dataclasses.replace(stored.model, lora=None)
    # The folder that the base came from, which peft can load, as it cannot a run.
    base = stored.meta.get("published", {}).get("folder", stored.meta["base"]["run"])
    with disk_errors(folder, "Name another --hf."):
        write_adapters(adapters, settings, model, _family(stored), folder, base, dtype)
        if stored.has_tokenizer:
            write_tokenizer(stored.tokenizer(), stored.template, folder, model.max_length)


def _family(stored: Stored) -> Family:
    model = dataclasses.replace(stored.model, lora=None)
    published = stored.meta.get("published", {}).get("config", {})
    return family_for(model, published.get("model_type"))
