"""Weights on disk, whole: of a run's checkpoint with the base of its adapters, or of a published
folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from llm_jax import checkpoint
from llm_jax.binding import binding_digest
from llm_jax.config import build, digest
from llm_jax.data.template_base import ChatTemplate
from llm_jax.data.templates import load_template
from llm_jax.data.tokenizers import Tokenizer, load_tokenizer
from llm_jax.errors import UserError
from llm_jax.interop.folder import PublishedFolder, is_published, open_folder
from llm_jax.interop.tokenizer_files import has_tokenizer
from llm_jax.models import ModelConfig, lora
from llm_jax.models.heads import CRITIC, VALUE
from llm_jax.sharding import unbox
from llm_jax.types import join
from llm_jax.weights import (
    Quantization,
    abstract,
    identify,
    init_trained,
    quantized,
    shapes,
    without_heads,
)


@dataclasses.dataclass(frozen=True)
class Base:
    """What a run's adapters belong to, as its checkpoints' meta names it.

    run, step: the checkpoint; or a published folder, and 0. fingerprint: what `identify` says of
    it. quantized: how it is held.
    """

    run: str
    step: int
    fingerprint: str
    quantized: Quantization | None = None


@dataclasses.dataclass(frozen=True)
class Stored:
    """Weights on disk and what is written beside them.

    path, step: a run and one of its checkpoints; or a published folder, and 0.
    """

    path: Path
    step: int
    meta: dict[str, Any]
    published: PublishedFolder | None = None

    @property
    def name(self) -> str:
        return str(self.path) if self.published else f"{self.path}@{self.step}"

    @property
    def model(self) -> ModelConfig:
        return build(ModelConfig, self.meta["model"], "meta.model")

    @property
    def heads(self) -> tuple[str, ...]:
        return tuple(self.meta.get("heads", ()))

    @property
    def critic(self) -> ModelConfig | None:
        """The architecture of the critic that the run has beside its model; None without one."""
        record = self.meta.get("critic")
        return None if record is None else build(ModelConfig, record["model"], "meta.critic.model")

    @property
    def lineage(self) -> tuple[dict[str, Any], ...]:
        """The stages up to this one, oldest first: of each its name, place, and config's hash."""
        made_by = digest(self.published.config) if self.published else binding_digest(self.path)
        own = {
            "stage": self.meta["stage"],
            "run": str(self.path),
            "step": self.step,
            "config": made_by,
        }
        return (*self.meta["lineage"], own)

    @property
    def has_tokenizer(self) -> bool:
        """An imported folder may have come without one."""
        if self.published is not None:
            return has_tokenizer(self.path)
        return (self.path / "tokenizer").is_dir()

    @property
    def template(self) -> ChatTemplate | None:
        """The chat template that the weights were trained with."""
        description = self.meta.get("template")
        return None if description is None else load_template(description)

    def tokenizer(self) -> Tokenizer:
        """
        Raises:
          UserError: none is there, or a damaged one.
        """
        if self.published is not None:
            return self.published.tokenizer()
        return load_tokenizer(self.path / "tokenizer")

    def read(self, mesh: Mesh) -> Any:
        """All weights on the mesh; heads too, and adapters beside their kernels.

        A critic that is a model of its own is of use to none but its run, and is left on disk.

        Raises:
          UserError: the weights, or the base of the adapters, are missing, damaged or others.
        """
        if self.published is not None:
            return self.published.load(mesh)
        model, heads = self.model, self.heads
        if model.lora is None:
            return self._read_params(abstract(mesh, shapes(model, heads)))
        base = read_base(build(Base, self.meta["base"], "meta.base"), mesh, self.path, model)
        rng = jax.random.key(0)
        boxed = jax.eval_shape(lambda rng: init_trained(model, heads, rng, base=base), rng)
        return join(self._read_params(abstract(mesh, boxed)), base)

    def _read_params(self, wanted: dict[str, Any]) -> dict[str, Any]:
        """What the checkpoint stores, the critic left out."""
        if self.critic is None:
            return checkpoint.read_params(self.path, self.step, wanted)
        stored = unbox(shapes(self.critic, (VALUE,)))
        unread = {CRITIC: jax.tree.map(lambda _: checkpoint.UNREAD, stored)}
        read = checkpoint.read_params(self.path, self.step, {**wanted, **unread})
        return {name: read[name] for name in wanted}

    def read_merged(self, mesh: Mesh) -> tuple[Any, str]:
        """All weights, adapters folded into their kernels, and what `identify` says of them.

        Raises:
          UserError: see `read`.
        """
        weights = self.read(mesh)
        identity = identify(self.meta, weights)
        if self.model.lora is not None:
            weights = jax.jit(lora.merge, static_argnums=1)(weights, self.model)
        return weights, identity


def find(name: str, scan_layers: bool = False) -> Stored:
    """What `DIR` or `DIR@STEP` names: a run's newest checkpoint or that one, or a published folder.

    Args:
      scan_layers: whether the layers of a published model are to be stacked.

    Raises:
      UserError: nothing there.
    """
    if is_published(name):
        return at(name, 0, scan_layers)
    return at(*checkpoint.locate(name))


def at(path: str | Path, step: int, scan_layers: bool = False) -> Stored:
    """`find`, where the place is known.

    Raises:
      UserError: it cannot be read.
    """
    if is_published(path):
        folder = open_folder(path, scan_layers)
        return Stored(Path(path), 0, folder.meta(), folder)
    return Stored(Path(path), step, checkpoint.read_meta(path, step))


def read_base(base: Base, mesh: Mesh, beside: Path, model: ModelConfig) -> Any:
    """The weights that adapters belong to, without heads, quantised as they were trained on.

    Args:
      base: the record of the run with the adapters.
      beside: that run; a base that has moved along with it is looked for in the folder beside it.
      model: that run's.

    Raises:
      UserError: no such run, or other weights than the adapters were trained on.
    """
    places = (Path(base.run), beside.absolute().parent / Path(base.run).name)
    found = next((place for place in places if (place / "config.json").exists()), None)
    if found is None:
        raise UserError(
            f"the adapters in {beside} belong to {base.run}, which is not there: put it back, or "
            f"beside {beside}."
        )
    if not is_published(found):
        checkpoint.locate(f"{found}@{base.step}")
    stored = at(found, base.step, model.scan_layers)
    weights, identity = stored.read_merged(mesh)
    if identity != base.fingerprint:
        raise UserError(
            f"the adapters in {beside} belong to another base than {stored.name}: its weights "
            "have changed since."
        )
    return quantized(without_heads(weights), base.quantized)
