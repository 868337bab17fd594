"""The tree of a run's parameters: shapes, partitions over a mesh, and norms."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from llm_jax import sharding
from llm_jax.console import align
from llm_jax.mesh import MeshConfig, make_abstract_mesh, make_mesh
from llm_jax.models.quantize import Quantized, dequantise
from llm_jax.stored import Stored
from llm_jax.types import join
from llm_jax.weights import trained_and_frozen_shapes


@dataclasses.dataclass(frozen=True)
class Norms:
    """Of a parameter or of several. squares: the sum of squares of its finite values. largest: of
    their absolute values. infinite: values that are NaN or infinite."""

    count: int
    squares: float
    largest: float
    infinite: int

    @property
    def l2(self) -> float:
        return math.sqrt(self.squares)

    @property
    def rms(self) -> float:
        return math.sqrt(self.squares / max(1, self.count - self.infinite))

    def __add__(self, other: Norms) -> Norms:
        return Norms(
            self.count + other.count,
            self.squares + other.squares,
            max(self.largest, other.largest),
            self.infinite + other.infinite,
        )


# Name, level, box, sharding and norms of a parameter; a group has neither box nor sharding.
_Row = tuple[str, int, Any, Any, Norms]


def describe(stored: Stored, mesh: MeshConfig, depth: int | None) -> list[str]:
    """A table of the tree, down to a depth.

    Raises:
      UserError: weights that cannot be read, or a mesh that does not divide them.
    """
    abstract_mesh = make_abstract_mesh(mesh)
    boxed = boxes(stored)
    shardings = sharding.parameter_shardings(abstract_mesh, boxed)
    actual = make_mesh(MeshConfig())
    with jax.set_mesh(actual):
        norms = measure(stored.read(actual))
    chips = math.prod(abstract_mesh.shape.values())
    head = ["parameter", "dtype", "shape", "logical axes", "partition",
            *(["on a chip"] if chips > 1 else []),
            "values", "L2", "rms", "largest", "not finite"]  # fmt: skip
    rows = [head]
    tree = list(_walk(boxed, shardings, norms))
    for name, level, box, where, found in [*tree, ("all", 1, None, None, _together(tree))]:
        if depth is not None and level > depth:
            continue
        cells = _cells(box, where, chips) if box is not None else [""] * (len(head) - 6)
        rows.append([
            "  " * (level - 1) + name, *cells, f"{found.count:,}", f"{found.l2:.4g}",
            f"{found.rms:.4g}", f"{found.largest:.4g}", str(found.infinite or "-"),
        ])  # fmt: skip
    axes = ", ".join(f"{axis} {size}" for axis, size in abstract_mesh.shape.items() if size > 1)
    last = len(head)
    return [
        f"parameters on {f'{chips} chips ({axes})' if axes else 'one chip'}",
        *align(rows, right=range(last - 5, last)),
    ]


def boxes(stored: Stored) -> Any:
    """The shapes of all that `stored.read` gives, in boxes with their logical axes."""
    kind = stored.meta.get("base", {}).get("quantized")
    return join(*trained_and_frozen_shapes(stored.model, stored.heads, kind))


def measure(params: Any) -> Any:
    """The tree with `Norms` in place of its arrays; quantised kernels count as what they stand for.

    Arrays go one after the other, so that no more than one is in float32 at a time.
    """
    return jax.tree.map(_norms, params, is_leaf=lambda x: isinstance(x, Quantized))


def _norms(x: Any) -> Norms:
    squares, largest, infinite = jax.device_get(_sums(x))
    return Norms(math.prod(_shape(x)), float(squares), float(largest), int(infinite))


@jax.jit
def _sums(x: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    values = dequantise(x).astype(jnp.float32)
    finite = jnp.isfinite(values)
    values = jnp.where(finite, values, 0)
    return jnp.sum(jnp.square(values)), jnp.max(jnp.abs(values)), jnp.sum(~finite)


def _walk(boxed: Any, shardings: Any, norms: Any, level: int = 1) -> Iterator[_Row]:
    """Every group and every parameter, groups before their parts."""
    for name in sorted(norms, key=_natural):
        box, where, found = boxed[name], shardings[name], norms[name]
        while isinstance(found, Mapping) and len(found) == 1:  # a group of one is no group
            (only,) = found
            name += f"/{only}"
            box, where, found = box[only], where[only], found[only]
        if isinstance(found, Mapping):
            inner = list(_walk(box, where, found, level + 1))
            yield name, level, None, None, _together(inner)
            yield from inner
        else:
            yield name, level, box, where, found


def _together(rows: list[_Row]) -> Norms:
    parts = [found for _, _, box, _, found in rows if box is not None]
    return functools.reduce(operator.add, parts)


def _natural(name: str) -> tuple[str, int]:
    """Sorts layer_10 behind layer_9."""
    word, _, number = name.rpartition("_")
    return (word, int(number)) if number.isdigit() else (name, 0)


def _shape(x: Any) -> tuple[int, ...]:
    """Of a parameter, or of the kernel that codes stand for, stacked layers included."""
    if not isinstance(x, Quantized):
        return x.shape
    stacked = x.ndim - len(x.shape)
    return (*x.codes.shape[:stacked], *x.shape)


def _cells(box: Any, where: Any, chips: int) -> list[str]:
    """dtype, shape, logical axes, partition and, of several chips, the part on each of them."""
    dtype = "float32"
    if isinstance(box, Quantized):  # its codes, which take nearly all of the room
        dtype, box, where = box.kind, box.codes, where.codes
    assert isinstance(where, NamedSharding)
    shape = box.value.shape
    part = [_times(where.shard_shape(shape))] if chips > 1 else []
    return [dtype, _times(shape), ", ".join(box.names), _partition(where), *part]


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _partition(where: NamedSharding) -> str:
    """The mesh axes of each dimension, or a dash."""
    return ", ".join("+".join(sharding.mesh_axes(entry)) or "-" for entry in where.spec)
