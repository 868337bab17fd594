"""How the tensors of a published checkpoint and the leaves of a parameter tree correspond.

A leaf is put together from pieces, each cut out of one tensor; a tensor may hold several pieces
(fused queries, keys and values), and a leaf may need many tensors (stacked layers, experts).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

Range = tuple[int, int]  # begin and end


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of a leaf, and where in which tensor it comes from.

    tensor: name in the checkpoint.
    factors: the tensor's dimensions, outermost first, each as the names of the factors that it is
      the product of: (("K", "G", "H"), ("D",)) is a matrix [K·G·H, D].
    axes: the name of each dimension of the leaf, such as ("1", "D", "K", "G", "H"). "1" is a
      dimension of which the piece fills one place; all other names are factors of the tensor, each
      standing in both exactly once.
    sizes: of the factors.
    start: where the piece begins in the leaf, one index a dimension.
    rows: begin and end of the piece along the first dimension of a tensor that holds several; None:
      the piece is the whole tensor.
    """

    tensor: str
    factors: tuple[tuple[str, ...], ...]
    axes: tuple[str, ...]
    sizes: Mapping[str, int]
    start: tuple[int, ...]
    rows: Range | None = None

    @property
    def source_shape(self) -> tuple[int, ...]:
        """Of the part of the tensor that the piece is: [product of the factors...]."""
        return tuple(math.prod(self.sizes[name] for name in names) for names in self.factors)

    @property
    def shape(self) -> tuple[int, ...]:
        """In the leaf."""
        return tuple(1 if name == "1" else self.sizes[name] for name in self.axes)

    @property
    def first_row(self) -> int:
        """Of the tensor."""
        return 0 if self.rows is None else self.rows[0]

    @property
    def box(self) -> tuple[Range, ...]:
        """The part of the leaf that the piece fills, one range a dimension."""
        return self.place({name: (0, size) for name, size in self.sizes.items()})

    def ranges(self, box: Sequence[Range]) -> dict[str, Range]:
        """Of every factor, for a part of the leaf that lies inside the piece."""
        return {
            name: (begin - start, end - start)
            for name, start, (begin, end) in zip(self.axes, self.start, box, strict=True)
            if name != "1"
        }

    def place(self, ranges: Mapping[str, Range]) -> tuple[Range, ...]:
        """The part of the leaf that `ranges` selects of the factors."""
        selected = (ranges.get(name, (0, 1)) for name in self.axes)
        return tuple(
            (start + begin, start + end)
            for start, (begin, end) in zip(self.start, selected, strict=True)
        )

    def turned(self, part: np.ndarray) -> np.ndarray:
        """A view of an array in the leaf's dimensions, with a dimension for every factor instead,
        in the tensor's order."""
        names = [name for name in self.axes if name != "1"]
        ones = tuple(i for i, name in enumerate(self.axes) if name == "1")
        order = [names.index(name) for dimension in self.factors for name in dimension]
        return part.squeeze(ones).transpose(order)

    def runs(self, ranges: Mapping[str, Range], max_rows: int) -> Iterator[Run]:
        """Cuts the rows that `ranges` selects into runs of at most `max_rows`, from top to bottom.

        What the ranges leave out among the rows of a run is part of it.
        """
        names = self.factors[0]
        sizes = [self.sizes[name] for name in names]
        strides = [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]
        level = next(i for i, stride in enumerate(strides) if stride <= max_rows)
        step = max_rows // strides[level]
        begin, end = ranges[names[level]]
        for outer in itertools.product(*(range(*ranges[name]) for name in names[:level])):
            above = sum(entry * stride for entry, stride in zip(outer, strides, strict=False))
            entries = {name: (entry, entry + 1) for name, entry in zip(names, outer, strict=False)}
            for first in range(begin, end, step):
                last = min(first + step, end)
                yield Run(
                    rows=(above + first * strides[level], above + last * strides[level]),
                    grid=(1,) * level + (last - first, *sizes[level + 1 :]),
                    cuts=(slice(None),) * (level + 1)
                    + tuple(slice(*ranges[name]) for name in names[level + 1 :]),
                    ranges={**ranges, **entries, names[level]: (first, last)},
                )


@dataclasses.dataclass(frozen=True)
class Run:
    """Consecutive rows of a piece.

    rows: begin and end, from the piece's first row.
    grid: the sizes of the first dimension's factors within the run; their product is the rows.
    cuts: what is selected of the grid.
    ranges: what is selected of every factor of the piece.
    """

    rows: Range
    grid: tuple[int, ...]
    cuts: tuple[slice, ...]
    ranges: Mapping[str, Range]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A parameter: where it stands in the tree, its shape, and the pieces that fill it whole."""

    path: tuple[str, ...]
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
