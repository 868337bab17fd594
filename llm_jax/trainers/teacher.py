"""The teacher of a distillation: a trained model that the student has by its side."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from llm_jax.errors import UserError
from llm_jax.models import LanguageModel
from llm_jax.models.config import check_length
from llm_jax.models.heads import REWARD
from llm_jax.models.size import parameter_count
from llm_jax.objectives.distill import TEACHER
from llm_jax.stored import Stored, at, find
from llm_jax.trainers import foundation
from llm_jax.trainers.foundation import Foundation
from llm_jax.types import join
from llm_jax.weights import without_heads


@dataclasses.dataclass(frozen=True)
class TeacherConfig:
    """Whom the student learns from.

    run: a run, RUN@STEP, or a Hugging Face folder, of any architecture, with the student's
    tokenizer. Adapters are merged. Its weights are laid out over the mesh as the student's are, and
    are no part of checkpoints; MFU counts the student's work alone.
    """

    run: str | None = None


class Teacher:
    """A teacher's model, and its weights when they are asked for.

    Attributes:
      model: without adapters.
      identity: a hash of the weights.
    """

    def __init__(self, stored: Stored, mesh: Mesh, known: str | None):
        """`known` is the identity that the run began with; None = it begins now.

        Raises:
          UserError: the weights cannot be read.
        """
        self._stored, self._mesh = stored, mesh
        self.model = LanguageModel(dataclasses.replace(stored.model, lora=None))
        self._weights: Any = None
        if known is None:
            self._weights, known = self._read()
        self.identity = known

    def weights(self) -> Any:
        """Its weights on the mesh, without heads.

        Raises:
          UserError: they are others than those that the run began with.
        """
        if self._weights is None:
            self._weights, identity = self._read()
            if identity != self.identity:
                raise UserError(
                    f"{self._stored.name} has other weights than the teacher that this run began "
                    "with: put them back, or start again in another --workdir."
                )
        return self._weights

    def release(self) -> None:
        """Holds the weights no longer; they are read anew when they are asked for again."""
        self._weights = None

    def _read(self) -> tuple[Any, str]:
        whole, identity = self._stored.read_merged(self._mesh)
        return without_heads(whole), identity


def lay(
    config: Any, mesh: Mesh, workdir: Path, log: Callable[[str], None]
) -> tuple[Foundation, Teacher]:
    """A student's ground, with the record of its teacher for the checkpoints, and the teacher.

    A student from scratch has the tokenizer of its teacher and, where `config.data.template` names
    none, its chat template.

    Raises:
      UserError: see `foundation.lay`; and a teacher that is not named, cannot be read, is a reward
        model, has another tokenizer, fewer positions than a row has tokens, or other weights than
        when the run began.
    """
    named = config.teacher.run
    if named is None:
        raise UserError(
            "config.teacher.run is not given: name the teacher's run, or its Hugging Face folder."
        )
    ground = foundation.lay(
        config,
        mesh,
        workdir,
        log,
        lambda: find(named).tokenizer(),
        template=config.data.template,
        chats=True,
    )
    known = None
    if ground.origin is not None and ground.origin.is_own:
        known = ground.origin.meta["teacher"]
    scan_layers = ground.model.scan_layers
    stored = (
        find(named, scan_layers) if known is None else at(known["run"], known["step"], scan_layers)
    )
    _check(stored, ground)
    if ground.origin is None and config.data.template is None and stored.template is not None:
        ground = dataclasses.replace(ground, template=stored.template)
    teacher = Teacher(stored, mesh, None if known is None else known["weights"])
    log(f"learns from {parameter_count(teacher.model.config):,} parameters of {stored.name}")
    record = {"run": str(stored.path), "step": stored.step, "weights": teacher.identity}
    more_meta = {**ground.more_meta, "teacher": record}
    return dataclasses.replace(ground, more_meta=more_meta), teacher


def beside(ground: Foundation, teacher: Teacher) -> Foundation:
    """The ground with the teacher's weights among the frozen ones, at `TEACHER`."""
    frozen = join({TEACHER: teacher.weights()}, ground.weights.frozen)
    teacher.release()  # a training step uses up the buffers of what is frozen
    return dataclasses.replace(ground, weights=dataclasses.replace(ground.weights, frozen=frozen))


def _check(stored: Stored, ground: Foundation) -> None:
    if REWARD in stored.heads:
        raise UserError(
            f"config.teacher.run={stored.name} is a reward model, which has no distribution over "
            "tokens to learn: name a language model."
        )
    if stored.tokenizer().fingerprint != ground.tokenizer.fingerprint:
        raise UserError(
            f"config.teacher.run={stored.name} has another tokenizer than the student: name a "
            "teacher that comes from the same one, or start the student from scratch."
        )
    try:
        for phase in ground.config.phases:
            check_length(stored.model, phase.length)
    except UserError as error:
        raise UserError(f"config.teacher.run={stored.name}: {error}") from error
