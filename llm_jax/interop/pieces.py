"""How the tensors of a published checkpoint and the leaves of a parameter tree correspond.

A leaf is put together from pieces, each cut out of one tensor; a tensor may hold several pieces
(fused queries, keys and values), and a leaf may need many tensors (stacked layers, experts).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping


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
    rows: tuple[int, int] | None = None

    @property
    def source_shape(self) -> tuple[int, ...]:
        """Of the part of the tensor that the piece is: [product of the factors...]."""
        return tuple(math.prod(self.sizes[name] for name in names) for names in self.factors)

    @property
    def shape(self) -> tuple[int, ...]:
        """In the leaf."""
        return tuple(1 if name == "1" else self.sizes[name] for name in self.axes)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A parameter: where it stands in the tree, its shape, and the pieces that fill it whole."""

    path: tuple[str, ...]
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
