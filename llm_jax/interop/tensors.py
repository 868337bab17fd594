"""Parameters out of the tensors of a checkpoint, and back, a block of rows at a time.

What the host holds beside the result is one block as it is stored and one in float32.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llm_jax.checkpoint import Deferred
from llm_jax.errors import UserError
from llm_jax.interop.floats import narrow, widen
from llm_jax.interop.pieces import Leaf, Piece, Range
from llm_jax.interop.safetensors_files import TensorFolder, write_folder

BLOCK_BYTES = 4 * 2**20  # of a tensor's rows in float32
PART_BYTES = 8 * 2**20  # of a leaf that is written part by part, at least,
MAX_PARTS = 2048  # since the index of a checkpoint is written anew with every part

Box = tuple[Range, ...]


def check(folder: TensorFolder, leaves: Sequence[Leaf], ignored: Sequence[str] = ()) -> None:
    """Refuses a folder whose tensors are not those that the leaves are made of.

    Args:
      folder: the checkpoint.
      leaves: all that is wanted of it.
      ignored: regular expressions; a tensor that one matches whole may be left over.

    Raises:
      UserError: a tensor is missing, left over, of the wrong shape or of a dtype that is not read;
        names the first and counts the others.
    """
    wanted = tensor_shapes(leaves)
    found = {name: tensor.shape for name, tensor in folder.tensors.items()}
    missing = [name for name in wanted if name not in found]
    if missing:
        raise UserError(
            f"{folder.path} lacks the tensor {missing[0]} {list(wanted[missing[0]])}"
            f"{_more(missing)}: download the folder again, or correct its config.json."
        )
    wrong = [name for name in wanted if wanted[name] != found[name]]
    if wrong:
        raise UserError(
            f"tensor {wrong[0]} in {folder.path} is {list(found[wrong[0]])}, and its config.json "
            f"makes it {list(wanted[wrong[0]])}{_more(wrong)}: correct config.json."
        )
    left = [
        name
        for name in found
        if name not in wanted and not any(re.fullmatch(pattern, name) for pattern in ignored)
    ]
    if left:
        raise UserError(
            f"{folder.path} holds the tensor {left[0]} {list(found[left[0]])}, for which the model "
            f"of its config.json has no place{_more(left)}: correct config.json."
        )
    for name in wanted:
        folder.dtype(name)


def tensor_shapes(leaves: Iterable[Leaf]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that the leaves are made of, sorted by name."""
    shapes: dict[str, tuple[int, ...]] = {}
    for piece in (piece for leaf in leaves for piece in leaf.pieces):
        rows, *rest = piece.source_shape
        end = max(piece.first_row + rows, shapes.get(piece.tensor, (0,))[0])
        shapes[piece.tensor] = (end, *rest)
    return dict(sorted(shapes.items()))


# --- reading --------------------------------------------------------------------------------------


def load(folder: TensorFolder, leaves: Sequence[Leaf], abstract: Any) -> dict[str, Any]:
    """The leaves as a tree of float32 arrays, made straight in the shardings of `abstract`.

    Args:
      folder: a checkpoint that `check` has found complete.
      leaves: the leaves of `abstract`.
      abstract: tree of jax.ShapeDtypeStruct with shardings. Each process makes its own shards.

    Raises:
      UserError: a file cannot be read.
    """
    return _tree({leaf.path: _load(folder, leaf, _at(abstract, leaf.path)) for leaf in leaves})


def deferred(folder: TensorFolder, leaves: Sequence[Leaf]) -> dict[str, Any]:
    """The leaves as a tree of `checkpoint.Deferred`, for `checkpoint.write_streamed`."""

    total = sum(4 * math.prod(leaf.shape) for leaf in leaves)
    part_bytes = max(PART_BYTES, total // MAX_PARTS)

    def defer(leaf: Leaf) -> Deferred:
        part = _part_shape(leaf, part_bytes)
        return Deferred(leaf.shape, part, lambda box: read(folder, leaf, box))

    return _tree({leaf.path: defer(leaf) for leaf in leaves})


def read(folder: TensorFolder, leaf: Leaf, box: Box) -> np.ndarray:
    """A part of a leaf: float32, one range of `box` a dimension.

    Raises:
      UserError: a file cannot be read.
    """
    part = _aligned([end - begin for begin, end in box])
    for piece in leaf.pieces:
        common = _common(piece.box, box)
        if common is not None:
            _fill(folder, piece, common, part[_within(common, box)])
    return part


def _load(folder: TensorFolder, leaf: Leaf, abstract: jax.ShapeDtypeStruct) -> jax.Array:
    devices: dict[Box, list[jax.Device]] = {}
    for device, index in abstract.sharding.addressable_devices_indices_map(leaf.shape).items():
        ranges = (cut.indices(size)[:2] for cut, size in zip(index, leaf.shape, strict=True))
        devices.setdefault(tuple(ranges), []).append(device)
    shards = []
    for box, holders in devices.items():
        shard = read(folder, leaf, box)
        # The next shard is read when this one has left the host.
        shards += jax.block_until_ready([jax.device_put(shard, device) for device in holders])
    return jax.make_array_from_single_device_arrays(leaf.shape, abstract.sharding, shards)


def _fill(folder: TensorFolder, piece: Piece, box: Box, part: np.ndarray) -> None:
    """Writes the piece's values into `part`, a view of the leaf's place `box`."""
    target, ranges = piece.turned(part), piece.ranges(box)
    names = [name for dimension in piece.factors for name in dimension]
    width = math.prod(piece.source_shape[1:])
    columns = tuple(piece.sizes[name] for name in names[len(piece.factors[0]) :])
    for run in piece.runs(ranges, max(1, BLOCK_BYTES // (4 * width))):
        begin, end = (piece.first_row + row for row in run.rows)
        block = folder.rows(piece.tensor, begin, end).reshape(run.grid + columns)
        cuts = run.cuts + tuple(slice(*ranges[name]) for name in names[len(run.grid) :])
        place = _within([run.ranges[name] for name in names], [ranges[name] for name in names])
        target[place] = widen(block[cuts])


def _part_shape(leaf: Leaf, part_bytes: int) -> tuple[int, ...]:
    """Of the parts of a leaf; they are cut where its tensors are, and then across their rows."""
    part = list(leaf.shape)
    piece = leaf.pieces[0]
    stacked = [axis for axis, name in enumerate(piece.axes) if name == "1"]
    for axis in [*stacked, *(piece.axes.index(name) for name in piece.factors[0])]:
        excess = math.ceil(4 * math.prod(part) / part_bytes)
        part[axis] = max(1, part[axis] // excess)
    return tuple(part)


def _aligned(shape: Sequence[int]) -> np.ndarray:
    """An empty float32 array that a CPU device takes as it is, where another would be copied."""
    size = 4 * math.prod(shape)
    buffer = np.empty(size + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + size].view(np.float32).reshape(shape)


# --- writing --------------------------------------------------------------------------------------


def write(
    folder: str | Path,
    leaves: Sequence[Leaf],
    params: Any,
    dtype: np.dtype,
    max_shard_bytes: int = 5 * 1024**3,
    stem: str = "model",
) -> None:
    """Writes a tree of float32 arrays as the tensors that its leaves are made of.

    Args:
      folder: gets a file, or several and an index; made where it is not there.
      leaves: the leaves of `params`.
      params: tree of jax.Arrays with any sharding.
      dtype: that of all tensors: float32, bfloat16 or float16.
      max_shard_bytes: of the tensors in a file.
      stem: what the files' names begin with.

    Raises:
      UserError: the folder holds weights already, a value is too large for the dtype, or other
        processes hold shards of the arrays.
    """
    sources: dict[str, list[tuple[Piece, jax.Array]]] = {}
    for leaf in leaves:
        array = _at(params, leaf.path)
        if not array.is_fully_addressable:
            raise UserError("other processes hold parts of the parameters: export with one.")
        for piece in leaf.pieces:
            sources.setdefault(piece.tensor, []).append((piece, array))
    write_folder(
        Path(folder),
        tensor_shapes(leaves),
        np.dtype(dtype),
        lambda name: _blocks(name, sources[name], np.dtype(dtype)),
        max_shard_bytes,
        stem,
    )


def _blocks(
    name: str, sources: list[tuple[Piece, jax.Array]], dtype: np.dtype
) -> Iterator[np.ndarray]:
    """The rows of a tensor from top to bottom."""
    for piece, array in sorted(sources, key=lambda source: source[0].first_row):
        width = math.prod(piece.source_shape[1:])
        for run in piece.runs(piece.ranges(piece.box), max(1, BLOCK_BYTES // (4 * width))):
            values = np.ascontiguousarray(piece.turned(_fetch(array, piece.place(run.ranges))))
            block = narrow(values, dtype)
            with np.errstate(invalid="ignore"):  # of NaNs
                too_large = np.isinf(block) & np.isfinite(values)
            if too_large.any():
                largest = np.max(np.abs(values[np.isfinite(values)]))
                raise UserError(
                    f"tensor {name} has values up to {largest:.3g}, too large for {dtype}: export "
                    f"in bfloat16 or float32."
                )
            yield block


def _fetch(array: jax.Array, box: Box) -> np.ndarray:
    """A part of an array, put together from the shards that hold it."""
    part = np.empty([end - begin for begin, end in box], array.dtype)
    for shard in array.addressable_shards:
        ranges = (cut.indices(size)[:2] for cut, size in zip(shard.index, array.shape, strict=True))
        held = tuple(ranges)
        common = _common(held, box)
        if shard.replica_id == 0 and common is not None:
            starts = [begin - own for (begin, _), (own, _) in zip(common, held, strict=True)]
            sizes = [end - begin for begin, end in common]
            part[_within(common, box)] = jax.lax.dynamic_slice(shard.data, starts, sizes)
    return part


# --- boxes and trees ------------------------------------------------------------------------------


def _common(a: Box, b: Box) -> Box | None:
    """What two boxes share; None where they are apart."""
    common = tuple(
        (max(x[0], y[0]), min(x[1], y[1])) for x, y in zip(a, b, strict=True)
    )  # fmt: skip
    return common if all(begin < end for begin, end in common) else None


def _within(inner: Sequence[Range], outer: Sequence[Range]) -> tuple[slice, ...]:
    return tuple(
        slice(begin - origin, end - origin)
        for (begin, end), (origin, _) in zip(inner, outer, strict=True)
    )


def _at(tree: Any, path: Sequence[str]) -> Any:
    for name in path:
        tree = tree[name]
    return tree


def _tree(leaves: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    root: dict[str, Any] = {}
    for path, value in leaves.items():
        node = root
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = value
    return root


def _more(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
