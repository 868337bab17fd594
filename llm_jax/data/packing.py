"""Rows of a fixed length out of documents of any length.

A document of n tokens is n - 1 (input, target) pairs. A row is a list of pieces
(document, start, length) laid end to end, so every position that is not padding has a real target
and no pair of a document is ever dropped. The packers differ only in how they choose the pieces.
"""

from __future__ import annotations

import abc
import bisect
from typing import Any, Literal, Protocol

import numpy as np

from llm_jax.errors import UserError
from llm_jax.types import Batch

Packing = Literal["concatenate", "best_fit"]


class Rows(Protocol):
    """Random access to packed rows of one length; T is that length."""

    length: int

    def __len__(self) -> int:
        """Rows in one epoch."""

    def __getitem__(self, index: int) -> Batch:
        """Row `index` as numpy arrays [T]; see `llm_jax.types.Batch` for the dtypes."""

    def documents(self, index: int) -> np.ndarray:
        """int64 [T]: the document that each position of the row comes from, -1 for padding."""


def pack(store: Any, length: int, packing: Packing) -> PackedRows:
    """The rows of a token store.

    Args:
      store: a TokenStore: `tokens`, one flat integer array, and `offsets`, int64 [documents + 1].
      length: pairs in a row.
      packing: "concatenate" lays all documents end to end and cuts every `length` pairs;
        "best_fit" cuts only documents longer than a row.

    Raises:
      UserError: the length is not positive, the name is unknown, or the store has no pairs.
    """
    packers = {"concatenate": ConcatenatedRows, "best_fit": BestFitRows}
    if packing not in packers:
        raise UserError(f"packing={packing!r} is not one of {', '.join(packers)}.")
    return packers[packing](store, length)


class PackedRows(abc.ABC):
    """The path that both packers share, from pieces to a row.

    Attributes:
      length: pairs in a row.
      cut_documents: documents whose pairs lie in more than one row.
    """

    cut_documents: int

    def __init__(self, store: Any, length: int):
        if length < 1:
            raise UserError(f"a row of length {length} holds nothing: make the length positive.")
        self.length = length
        self._tokens = store.tokens
        self._offsets = np.asarray(store.offsets, np.int64)
        self._pairs = np.maximum(np.diff(self._offsets) - 1, 0)
        if not self._pairs.sum():
            raise UserError("the token store holds no text to pack: check the data source.")

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def pieces(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Documents, first pairs and lengths of row `index`: int64 [pieces] each."""

    @property
    def padding_share(self) -> float:
        """The share of all positions that is padding, in [0, 1)."""
        return 1 - int(self._pairs.sum()) / (len(self) * self.length)

    def __getitem__(self, index: int) -> Batch:
        documents, starts, lengths = self.pieces(index)
        positions = _ramps(lengths)
        source = np.repeat(self._offsets[documents] + starts, lengths) + positions
        return Batch(
            tokens=self._pad(self._tokens[source], np.int32),
            targets=self._pad(self._tokens[source + 1], np.int32),
            loss_weights=self._pad(np.ones(len(source)), np.float32),
            segment_ids=self._pad(np.repeat(np.arange(len(lengths)) + 1, lengths), np.int32),
            positions=self._pad(positions, np.int32),
        )

    def documents(self, index: int) -> np.ndarray:
        documents, _, lengths = self.pieces(index)
        return self._pad(np.repeat(documents, lengths), np.int64, fill=-1)

    def _pad(self, values: np.ndarray, dtype: Any, fill: int = 0) -> np.ndarray:
        row = np.full(self.length, fill, dtype)
        row[: len(values)] = values
        return row


class ConcatenatedRows(PackedRows):
    """The pairs of all documents laid end to end and cut every `length` pairs.

    Nothing but the last row has padding; a document is cut wherever a row ends.
    """

    def __init__(self, store: Any, length: int):
        super().__init__(store, length)
        self._ends = np.cumsum(self._pairs)
        first_row = (self._ends - self._pairs) // length
        last_row = (self._ends - 1) // length
        self.cut_documents = int(np.sum(first_row < last_row))

    def __len__(self) -> int:
        return -(-int(self._ends[-1]) // self.length)

    def pieces(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        begin = _checked(index, len(self)) * self.length
        end = min(begin + self.length, int(self._ends[-1]))
        first, last = np.searchsorted(self._ends, [begin, end - 1], side="right")
        documents = np.arange(first, last + 1)
        documents = documents[self._pairs[documents] > 0]
        document_begins = self._ends[documents] - self._pairs[documents]
        starts = np.maximum(begin - document_begins, 0)
        stops = np.minimum(end - document_begins, self._pairs[documents])
        return documents, starts, stops - starts


class BestFitRows(PackedRows):
    """Best-fit packing: only a document longer than a row is cut.

    A long document gives full rows and one remainder; remainders and short documents are packed
    best-fit-decreasing (Ding et al. 2024, "Fewer Truncations Improve Language Modeling").
    Full rows come first, then packed rows, those with the longest pieces first.
    """

    def __init__(self, store: Any, length: int):
        super().__init__(store, length)
        self.cut_documents = int(np.sum(self._pairs > length))
        full, remainder = np.divmod(self._pairs, length)
        full_documents = np.repeat(np.arange(len(full)), full)
        rest = np.flatnonzero(remainder)
        rows = best_fit_decreasing(remainder[rest], length)
        order = np.argsort(rows, kind="stable")
        rest = rest[order]
        counts = np.bincount(rows) if len(rows) else np.zeros(0, np.int64)
        counts = np.concatenate([np.ones(len(full_documents), np.int64), counts])
        self._row_offsets = np.concatenate([[0], np.cumsum(counts)])
        self._documents = np.concatenate([full_documents, rest])
        self._starts = np.concatenate([_ramps(full), full[rest]]) * length
        self._lengths = np.concatenate([np.full(len(full_documents), length), remainder[rest]])

    def __len__(self) -> int:
        return len(self._row_offsets) - 1

    def pieces(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        index = _checked(index, len(self))
        row = slice(self._row_offsets[index], self._row_offsets[index + 1])
        return self._documents[row], self._starts[row], self._lengths[row]


def best_fit_decreasing(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """The bin of each item: largest items first, each into the fullest bin that still holds it.

    Items of one size are placed together. The fullest bin that holds one of them keeps being the
    fullest until it holds no more, so it takes `space // size` of them at once; and bins with equal
    space are interchangeable. The work is a sort and a few array operations for each pair of item
    size and bin space that meet, far fewer than there are items.

    Args:
      sizes: int [items], each in [1, capacity].
      capacity: the size of a bin.

    Returns:
      int64 [items]: bin numbers from 0.
    """
    bins = np.empty(len(sizes), np.int64)
    order = np.argsort(-sizes, kind="stable")
    distinct, counts = np.unique(sizes, return_counts=True)
    by_space: dict[int, np.ndarray] = {}  # space left → open bins that have it
    spaces: list[int] = []  # the keys of by_space, ascending
    opened = placed = 0

    def add(space: int, members: np.ndarray) -> None:
        if space and len(members):
            if space in by_space:
                by_space[space] = np.concatenate([by_space[space], members])
            else:
                bisect.insort(spaces, space)
                by_space[space] = members

    for size, count in zip(distinct[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while count:
            at = bisect.bisect_left(spaces, size)
            if at < len(spaces):
                space = spaces.pop(at)
                members = by_space.pop(space)
            else:
                space, wanted = capacity, -(-count // (capacity // size))
                members = np.arange(opened, opened + wanted)
                opened += wanted
            each = space // size
            used = min(len(members), -(-count // each))
            taken = min(count, used * each)
            bins[order[placed : placed + taken]] = np.repeat(members[:used], each)[:taken]
            placed += taken
            count -= taken
            last = taken - (used - 1) * each  # the last bin used may get fewer than it can hold
            add(space - each * size, members[: used - 1])
            add(space - last * size, members[used - 1 : used])
            add(space, members[used:])
    return bins


def _ramps(lengths: np.ndarray) -> np.ndarray:
    """0, 1, ..., n - 1 for each n in `lengths`, one after another: int64 [sum of lengths]."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) - np.repeat(ends - lengths, lengths)


def _checked(index: int, rows: int) -> int:
    if not 0 <= index < rows:
        raise IndexError(f"row {index} of {rows}")
    return index
