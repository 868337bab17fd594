"""What a teacher says of the targets of packed rows, computed once and kept on disk."""

from __future__ import annotations

import functools
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.experimental import multihost_utils

from llm_jax.config import digest, resolved
from llm_jax.data.chat_corpus import ChatCorpus
from llm_jax.data.packing import DocumentRows, Rows
from llm_jax.data.store import DISK_MEND, default_cache_dir
from llm_jax.errors import disk_errors
from llm_jax.evals.batching import padded_batches
from llm_jax.models import LanguageModel
from llm_jax.objectives.distill import likeliest_tokens, shared_vocabulary
from llm_jax.placement import to_host
from llm_jax.sharding import batch_shards
from llm_jax.trainers.foundation import Foundation
from llm_jax.trainers.teacher import Teacher
from llm_jax.types import DistillationBatch

CACHE_VERSION = 1  # part of every key: raise it when equal inputs give other numbers
BATCH_TOKENS = 4096  # of the rows that are read at once, on each batch shard


class TaughtRows:
    """Rows as DistillationBatch structs: each found by its index, whatever the order of steps."""

    def __init__(self, rows: Rows, ends: np.ndarray, entries: np.ndarray):
        """
        Args:
          rows: of `types.Batch`.
          ends: int64 [rows], counted targets of all rows up to and with each.
          entries: of each counted target, in order, `likeliest` and `logprobs`.
        """
        self.length = rows.length
        self._rows, self._ends, self._entries = rows, ends, entries

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> DistillationBatch:
        row = self._rows[index]
        counted = row.loss_weights > 0
        spread = np.zeros(self.length, self._entries.dtype)
        end = self._ends[index]
        spread[counted] = self._entries[end - np.count_nonzero(counted) : end]
        return DistillationBatch(row, spread["likeliest"], spread["logprobs"])


class TeacherCache:
    """The teacher's `top_k` likeliest tokens at every counted target, memory-mapped.

    A file belongs to the teacher's weights and architecture, the rows, k, and the temperature;
    only where one is missing are the weights read. It takes 8 bytes a target and token of k.
    """

    def __init__(self, config: Any, ground: Foundation, teacher: Teacher):
        self._config, self._ground, self._teacher = config, ground, teacher
        self.vocabulary = shared_vocabulary(LanguageModel(ground.model), teacher.model)
        k = min(config.top_k, self.vocabulary)
        events = k + (k < self.vocabulary)
        self._dtype = np.dtype([("likeliest", np.int32, k), ("logprobs", np.float32, events)])
        self._read = ground.jit(
            functools.partial(
                likeliest_tokens,
                teacher.model,
                k=k,
                vocabulary=self.vocabulary,
                temperature=config.loss.temperature,
                chunk=config.loss.chunk,
            )
        )

    def attach(self, rows: Rows, identity: Mapping[str, Any]) -> TaughtRows:
        """The rows with what the teacher says of them; `identity` changes when the rows do."""
        key = digest(
            {
                "version": CACHE_VERSION,
                "teacher": self._teacher.identity,
                "model": resolved(self._teacher.model.config),
                "rows": {**identity, "packing": type(rows).__name__, "length": rows.length},
                "vocabulary": self.vocabulary,
                "top_k": self._config.top_k,
                "temperature": self._config.loss.temperature,
            }
        )
        folder = Path(self._config.data.cache_dir or default_cache_dir()).expanduser()
        path = folder / "teacher" / f"{key}.npy"
        counts = [np.count_nonzero(rows[index].loss_weights) for index in range(len(rows))]
        ends = np.cumsum(counts)
        entries = self._open(path, int(ends[-1]))
        # The computation takes all processes, so all of them take part if one of them has to.
        is_known = multihost_utils.process_allgather(np.asarray(entries is not None))
        if entries is None or not np.all(is_known):
            self._compute(rows, ends, path)
            entries = self._open(path, int(ends[-1]))
            assert entries is not None
        return TaughtRows(rows, ends, entries)

    def _open(self, path: Path, count: int) -> np.ndarray | None:
        """What is cached, None where nothing fit for use is."""
        try:
            entries = np.load(path, mmap_mode="r")
        except (OSError, ValueError):
            return None
        return entries if entries.dtype == self._dtype and entries.shape == (count,) else None

    def _compute(self, rows: Rows, ends: np.ndarray, path: Path) -> None:
        self._ground.log(f"what the teacher says of {int(ends[-1]):,} targets")
        with disk_errors(path.parent, DISK_MEND):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f"{path.stem}.{uuid.uuid4().hex}.partial.npy")
            try:
                self._write(rows, ends, temporary)
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)

    def _write(self, rows: Rows, ends: np.ndarray, path: Path) -> None:
        weights = self._teacher.weights()
        batch_size = max(1, BATCH_TOKENS // rows.length) * batch_shards(self._ground.mesh)
        shape = (int(ends[-1]),)
        entries = np.lib.format.open_memmap(path, mode="w+", dtype=self._dtype, shape=shape)
        begin = 0
        for chosen, batch in padded_batches(rows, range(len(rows)), batch_size):
            likeliest, logprobs = map(to_host, self._read(weights, batch))
            counted = batch.loss_weights > 0  # nowhere in the rows that fill the batch up
            end = int(ends[chosen[-1]])
            entries["likeliest"][begin:end] = likeliest[counted]
            entries["logprobs"][begin:end] = logprobs[counted]
            begin = end
        entries.flush()


class TaughtCorpus(ChatCorpus):
    """A corpus whose rows have what the teacher says of them. All rows of a component that a phase
    reads are computed, not only those that its steps come to."""

    def __init__(self, config: Any, ground: Foundation, cache: TeacherCache):
        assert ground.template is not None
        super().__init__(config.data, ground.template, ground.tokenizer)
        self._cache, self._too_long = cache, config.data.too_long

    def rows(self, length: int, weights: Mapping[str, float]) -> dict[str, Rows]:
        found = super().rows(length, weights)
        return {
            name: self._attach(name, "train", rows) if weights.get(name) else rows
            for name, rows in found.items()
        }

    def taught_validation(self, length: int) -> TaughtRows | None:
        """The held-out rows of the main component; None without any."""
        rows: DocumentRows | None = self.validation_rows(length).get(self.main)
        return None if rows is None else self._attach(self.main, "validation", rows)

    def _attach(self, name: str, split: str, rows: Rows) -> TaughtRows:
        store = self.stores[name][split]
        return self._cache.attach(rows, {"store": store.fingerprint, "too_long": self._too_long})
