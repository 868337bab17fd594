"""Rows to batches of one shape."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from llm_jax.errors import UserError
from llm_jax.types import Batch


class BatchRows(Protocol):
    """Random access to rows, structs of arrays [...] that have the same shapes in all rows."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


def padded_batches(
    rows: BatchRows, indices: Sequence[int], batch_size: int
) -> Iterator[tuple[Sequence[int], Any]]:
    """Yields the rows in batches that all have the same shape, so that nothing compiles twice.

    The last batch is filled up with empty rows: segment 0, weight 0. Every process builds the same
    global batches, so all of them call the jitted function equally often and none can hang.

    Yields:
      The indices of the batch's rows, at most `batch_size` of them, and a struct of numpy arrays
      [batch_size, ...] whose first rows they are.

    Raises:
      UserError: `batch_size` is not positive.
    """
    if batch_size < 1:
        raise UserError(f"an evaluation batch of {batch_size} rows must have at least 1.")
    for begin in range(0, len(indices), batch_size):
        chosen = indices[begin : begin + batch_size]
        batch = jax.tree.map(lambda *arrays: np.stack(arrays), *[rows[i] for i in chosen])
        missing = batch_size - len(chosen)
        yield chosen, jax.tree.map(lambda a, n=missing: _pad_rows(a, n), batch)


def sequence_batch(sequences: Sequence[Sequence[int]], length: int) -> Batch:
    """Token lists as a Batch of numpy arrays [sequences, length], one a row, padded at the right.

    Every token but a row's first is a target; the weight of the last position of each is 0.
    """
    tokens, targets, segments = np.zeros((3, len(sequences), length), np.int32)
    for row, ids in enumerate(sequences):
        tokens[row, : len(ids)], segments[row, : len(ids)] = ids, 1
        targets[row, : max(len(ids) - 1, 0)] = ids[1:]
    return Batch(
        tokens=tokens,
        targets=targets,
        loss_weights=np.pad(segments[:, 1:], [(0, 0), (0, 1)]).astype(np.float32),
        segment_ids=segments,
        positions=np.tile(np.arange(length, dtype=np.int32), (len(sequences), 1)),
    )


def _pad_rows(array: np.ndarray, count: int) -> np.ndarray:
    return np.pad(array, [(0, count), *[(0, 0)] * (array.ndim - 1)])
