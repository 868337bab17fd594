"""The reference model of preference optimisation: its log-probabilities, computed once."""

from __future__ import annotations

import dataclasses
import functools
import os
import uuid
from pathlib import Path
from typing import Any

import numpy as np

from llm_jax import checkpoint
from llm_jax.config import digest
from llm_jax.data.preferences import PreferenceRows
from llm_jax.data.store import DISK_MEND, default_cache_dir
from llm_jax.errors import disk_errors
from llm_jax.evals.batching import padded_batches, to_host
from llm_jax.models import LanguageModel
from llm_jax.objectives.logprobs import response_logprobs
from llm_jax.sharding import batch_shards
from llm_jax.trainers.foundation import Foundation
from llm_jax.weights import fingerprint, read_merged

REFERENCE_VERSION = 1  # part of every cache key: raise it when equal inputs give other numbers
BATCH_TOKENS = 4096  # of the sequences that are read at once, on each batch shard


class Reference:
    """The model of `config.init_from`, as far as its log-probabilities are concerned.

    They are cached on disk by the hash of its weights and of the sequences, so weights are read
    only where something is not in the cache; a resumed run needs them no more.
    """

    def __init__(self, config: Any, ground: Foundation):
        """
        Raises:
          UserError: the run of `init_from` cannot be read.
        """
        self._config, self._ground = config, ground
        self._weights: Any = None
        self._fingerprint = self._identify()
        model = LanguageModel(dataclasses.replace(ground.model, lora=None))
        self._logprobs = ground.jit(
            functools.partial(response_logprobs, model, chunk=config.loss.chunk)
        )

    @property
    def meta(self) -> dict[str, Any]:
        """What checkpoints say of the reference."""
        return {"reference": self._fingerprint}

    def attach(self, rows: PreferenceRows) -> None:
        """Adds the log-probabilities to the rows."""
        key = digest(
            {
                "version": REFERENCE_VERSION,
                "weights": self._fingerprint,
                "sequences": rows.fingerprint,
                "dtype": self._ground.model.dtype,
            }
        )
        folder = Path(self._config.data.cache_dir or default_cache_dir()).expanduser()
        path = folder / "reference" / f"{key}.npy"
        if path.exists():
            rows.attach_reference(np.load(path))
            return
        values = self._compute(rows)
        with disk_errors(path.parent, DISK_MEND):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f"{key}.{uuid.uuid4().hex}.partial.npy")
            np.save(temporary, values)
            os.replace(temporary, path)
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
        """A hash of the weights, without reading them where the run's past tells it."""
        ground = self._ground
        if ground.origin is not None and ground.origin.is_own:
            return ground.origin.meta["reference"]
        base = ground.weights.base
        if base is None:
            return fingerprint(self._read())
        return digest([base.fingerprint, base.quantized]) if base.quantized else base.fingerprint

    def _read(self) -> Any:
        """The weights that the policy begins with; its base, as the run holds it, if it is made of
        adapters."""
        if self._ground.weights.base is not None:
            return self._ground.weights.frozen
        if self._weights is None:
            run, step = checkpoint.locate(self._config.init_from)
            self._weights = read_merged(run, step, self._ground.mesh)[1]
        return self._weights
