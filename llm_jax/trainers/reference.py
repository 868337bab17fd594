"""The reference model of preference optimisation: its log-probabilities, computed once."""

from __future__ import annotations

import dataclasses
import functools
import os
import uuid
from pathlib import Path
from typing import Any

import numpy as np
from jax.experimental import multihost_utils

from llm_jax.config import build, digest, resolved
from llm_jax.data.preferences import PreferenceRows
from llm_jax.data.store import DISK_MEND, default_cache_dir
from llm_jax.errors import UserError, disk_errors
from llm_jax.evals.batching import padded_batches
from llm_jax.models import LanguageModel, ModelConfig, lora
from llm_jax.objectives.logprobs import response_logprobs
from llm_jax.placement import to_host
from llm_jax.sharding import batch_shards
from llm_jax.stored import at
from llm_jax.trainers.foundation import Foundation
from llm_jax.weights import without_heads

REFERENCE_VERSION = 1  # part of every cache key: raise it when equal inputs give other numbers
BATCH_TOKENS = 4096  # of the sequences that are read at once, on each batch shard


@dataclasses.dataclass(frozen=True)
class ReferencePolicy:
    """The model that a policy is not to go far from: the one that its stage starts from.

    own: its weights on the mesh, without heads; None where it is the policy without its adapters.
    """

    model: LanguageModel
    own: Any

    def weights(self, params: Any) -> Any:
        """Its weights, given the parameters of the policy."""
        return without_heads(lora.split(params)[1]) if self.own is None else self.own


def reference_policy(ground: Foundation) -> tuple[Foundation, ReferencePolicy]:
    """The reference, and the ground with what checkpoints have to say of it.

    Raises:
      UserError: the stage starts from no run, or from one that has other weights by now.
    """
    origin = ground.require_origin()
    known = origin.meta["reference"] if origin.is_own else None
    model = dataclasses.replace(ground.model, lora=None)
    if known is not None:  # the phases of this run may have changed its own RoPE since
        model = build(ModelConfig, known["model"], "meta.reference.model")
    base = ground.weights.base
    own = None
    if base is not None:
        identity = base.fingerprint
    else:
        whole, identity = _read_start(ground)
        own = without_heads(whole)
        if known is not None and identity != known["weights"]:
            raise UserError(
                f"{ground.lineage[-1]['run']} has other weights than those that this run began "
                "with: put them back, or start again in another --workdir."
            )
    meta = {"reference": {"weights": identity, "model": resolved(model)}}
    ground = dataclasses.replace(ground, more_meta={**ground.more_meta, **meta})
    return ground, ReferencePolicy(LanguageModel(model), own)


def _read_start(ground: Foundation) -> tuple[Any, str]:
    """What the stage before left, merged, and its identity."""
    before = ground.lineage[-1]
    stored = at(before["run"], before["step"], ground.model.scan_layers)
    return stored.read_merged(ground.mesh)


class Reference:
    """The model that the stage starts from, as far as its log-probabilities are concerned.

    They are cached on disk by the hash of its weights and of the sequences, so weights are read
    only where something is not in the cache; a resumed run needs them no more.
    """

    def __init__(self, config: Any, ground: Foundation):
        """
        Raises:
          UserError: the run or folder that the stage starts from cannot be read.
        """
        self._config, self._ground = config, ground
        self._weights: Any = None
        origin = ground.origin
        known = origin.meta["reference"] if origin is not None and origin.is_own else None
        self._fingerprint = self._identify() if known is None else known["weights"]
        self._model = dataclasses.replace(ground.model, lora=None)
        if known is not None:  # the phases of this run may have changed its own RoPE since
            self._model = build(ModelConfig, known["model"], "meta.reference.model")
        self._logprobs = ground.jit(
            functools.partial(
                response_logprobs, LanguageModel(self._model), chunk=config.loss.chunk
            )
        )

    @property
    def meta(self) -> dict[str, Any]:
        """What checkpoints say of the reference."""
        return {"reference": {"weights": self._fingerprint, "model": resolved(self._model)}}

    def attach(self, rows: PreferenceRows) -> None:
        """Adds the log-probabilities to the rows."""
        key = digest(
            {
                "version": REFERENCE_VERSION,
                "weights": self._fingerprint,
                "sequences": rows.fingerprint,
                "model": resolved(self._model),
            }
        )
        folder = Path(self._config.data.cache_dir or default_cache_dir()).expanduser()
        path = folder / "reference" / f"{key}.npy"
        values = _read_values(path, len(rows.sequences))
        # The computation takes all processes, so all of them take part if one of them has to.
        is_known = multihost_utils.process_allgather(np.asarray(values is not None))
        if values is None or not np.all(is_known):
            values = self._compute(rows)
            _write_values(path, values)
        rows.attach_reference(values)

    def _compute(self, rows: PreferenceRows) -> np.ndarray:
        sequences = rows.sequences
        self._ground.log(f"log-probabilities of {len(sequences):,} answers under the reference")
        batch_size = max(1, BATCH_TOKENS // rows.length) * batch_shards(self._ground.mesh)
        weights = self._read()
        parts = []
        for chosen, batch in padded_batches(sequences, range(len(sequences)), batch_size):
            parts.append(to_host(self._logprobs(weights, batch))[: len(chosen)])
        return np.concatenate(parts).astype(np.float32)

    def _identify(self) -> str:
        """A hash of the weights."""
        base = self._ground.weights.base
        if base is None:
            self._weights, identity = _read_start(self._ground)
            return identity
        return digest([base.fingerprint, base.quantized]) if base.quantized else base.fingerprint

    def _read(self) -> Any:
        """The weights that the policy begins with; its base, as the run holds it, if it is made of
        adapters.

        Raises:
          UserError: other weights than those that the run began with.
        """
        if self._ground.weights.base is not None:
            return self._ground.weights.frozen
        if self._weights is None:
            self._weights, identity = _read_start(self._ground)
            if identity != self._fingerprint:
                before = self._ground.lineage[-1]
                raise UserError(
                    f"{before['run']}@{before['step']} has other weights than those that this run "
                    "began with, and their log-probabilities are no longer in the cache: start "
                    "again in another --workdir."
                )
        return self._weights


def _read_values(path: Path, count: int) -> np.ndarray | None:
    """What is cached, None where nothing fit for use is."""
    try:
        values = np.load(path)
    except (OSError, ValueError):
        return None
    return values if values.shape == (count,) else None


def _write_values(path: Path, values: np.ndarray) -> None:
    with disk_errors(path.parent, DISK_MEND):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.stem}.{uuid.uuid4().hex}.partial.npy")
        np.save(temporary, values)
        os.replace(temporary, path)
