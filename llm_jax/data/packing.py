"""Rows of a fixed length out of documents of any length.

A document of n tokens is n - 1 (input, target) pairs. A row is a list of pieces
(document, start, length) laid end to end, so every position that is not padding has a real target
and no pair of a text is ever dropped. The packers differ only in how they choose the pieces.

Examples (documents of a store that says which tokens are trained on) are never cut: one longer
than a row is clipped or left out as the config says, and both are counted.
"""

from __future__ import annotations

import abc
import bisect
import dataclasses
from typing import Any, Literal, Protocol

import numpy as np

from llm_jax.errors import UserError
from llm_jax.types import Batch

Packing = Literal["concatenate", "best_fit", "single"]
TooLong = Literal["truncate_right", "truncate_left", "drop"]


class Rows(Protocol):
    """Random access to rows, which are structs of numpy arrays of the same shapes in all rows.

    length: tokens in each of a row's sequences.
    """

    length: int

    def __len__(self) -> int:
        """Rows in one epoch."""

    def __getitem__(self, index: int) -> Any:
        """Row `index`, without the batch axis."""


class DocumentRows(Rows, Protocol):
    """Packed rows of documents, each a `llm_jax.types.Batch` of arrays [T], T the length."""

    def documents(self, index: int) -> np.ndarray:
        """int64 [T]: the document that each position of the row comes from, -1 for padding."""


def pack(
    store: Any, length: int, packing: Packing, too_long: TooLong = "truncate_right"
) -> PackedRows:
    """The rows of a token store.

    Args:
      store: a TokenStore: `tokens`, one flat integer array, and `offsets`, int64 [documents + 1].
      length: pairs in a row.
      packing: "concatenate" lays all documents end to end and cuts every `length` pairs;
        "best_fit" cuts only documents longer than a row; "single" gives every document a row of
        its own. Examples cannot be concatenated.
      too_long: what happens to examples longer than a row: their end is cut off, their beginning,
        or they are left out.

    Raises:
      UserError: the length is not positive, the name is unknown or does not fit the store, or
        nothing is left to pack.
    """
    packers: dict[str, type[PackedRows]] = {
        "concatenate": ConcatenatedRows,
        "best_fit": BestFitRows,
        "single": SingleRows,
    }
    if packing not in packers:
        raise UserError(f"packing={packing!r} is not one of {', '.join(packers)}.")
    if packing == "concatenate" and store.trained is not None:
        raise UserError("packing='concatenate' would cut examples: use best_fit or single.")
    return packers[packing](store, length, too_long)


@dataclasses.dataclass(frozen=True)
class Clipped:
    """Which tokens of each document are used.

    begins, ends: int64 [documents]; begin = end for a document that is left out. too_long: how many
    were longer than `limit`. untrained: how many are left out since nothing of them is trained on.
    """

    begins: np.ndarray
    ends: np.ndarray
    too_long: int = 0
    untrained: int = 0


def clip(store: Any, limit: int, too_long: TooLong) -> Clipped:
    """At most `limit` tokens of every example of a store; texts are used whole."""
    offsets = np.asarray(store.offsets, np.int64)
    begins, ends = offsets[:-1], offsets[1:]
    if store.trained is None:
        return Clipped(begins, ends)
    is_long = ends - begins > limit
    if too_long == "truncate_right":
        ends = np.where(is_long, begins + limit, ends)
    elif too_long == "truncate_left":
        begins = np.where(is_long, ends - limit, begins)
    else:
        ends = np.where(is_long, begins, ends)
    is_trained = _any_trained(store.trained, begins + 1, ends)  # nothing predicts a first token
    is_empty = ~is_trained & (ends > begins)
    return Clipped(
        begins, np.where(is_trained, ends, begins), int(is_long.sum()), int(is_empty.sum())
    )


def _any_trained(trained: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """bool [documents]: whether trained[begin:end] has a 1; False where it is empty.

    Without a running sum, which would take sixteen times the memory of `trained`.
    """
    places = np.stack([np.minimum(begins, len(trained) - 1), ends], axis=1).ravel()
    if places[-1] == len(trained):
        places = places[:-1]
    return (np.maximum.reduceat(trained, places)[::2] > 0) & (begins < ends)


class PackedRows(abc.ABC):
    """The path that both packers share, from pieces to a row.

    Attributes:
      length: pairs in a row.
      cut_documents: documents whose pairs lie in more than one row.
      clipped: what became of examples that are too long.
    """

    cut_documents: int

    def __init__(self, store: Any, length: int, too_long: TooLong = "truncate_right"):
        if length < 1:
            raise UserError(f"a row of length {length} holds nothing: make the length positive.")
        self.length = length
        self._tokens, self._trained = store.tokens, store.trained
        self.clipped = clip(store, length + 1, too_long)
        self._pairs = np.maximum(self.clipped.ends - self.clipped.begins - 1, 0)
        if not self._pairs.sum():
            raise UserError(
                f"nothing is left to train on in rows of length {length}: check the data source"
                + (
                    f" ({self.clipped.too_long} examples are too long)."
                    if self.clipped.too_long
                    else "."
                )
            )

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
        source = np.repeat(self.clipped.begins[documents] + starts, lengths) + positions
        weights = np.ones(len(source)) if self._trained is None else self._trained[source + 1]
        return Batch(
            tokens=self._pad(self._tokens[source], np.int32),
            targets=self._pad(self._tokens[source + 1], np.int32),
            loss_weights=self._pad(weights, np.float32),
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

    def __init__(self, store: Any, length: int, too_long: TooLong = "truncate_right"):
        super().__init__(store, length, too_long)
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

    def __init__(self, store: Any, length: int, too_long: TooLong = "truncate_right"):
        super().__init__(store, length, too_long)
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


class SingleRows(PackedRows):
    """One document a row, what does not fit as with best-fit packing; short ones waste the rest."""

    def __init__(self, store: Any, length: int, too_long: TooLong = "truncate_right"):
        super().__init__(store, length, too_long)
        self.cut_documents = int(np.sum(self._pairs > length))
        rows = -(-self._pairs // length)
        self._documents = np.repeat(np.arange(len(rows)), rows)
        self._starts = _ramps(rows) * length

    def __len__(self) -> int:
        return len(self._documents)

    def pieces(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        row = slice(_checked(index, len(self)), index + 1)
        documents, starts = self._documents[row], self._starts[row]
        return documents, starts, np.minimum(self.length, self._pairs[documents] - starts)


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
