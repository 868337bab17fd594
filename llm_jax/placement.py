"""Host arrays to the devices of all processes, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


@dataclasses.dataclass(frozen=True)
class OwnRows:
    """Which rows of a global array a process holds. places: int [own rows], ascending."""

    total: int
    places: np.ndarray


def to_devices(tree: Any, sharding: jax.sharding.Sharding) -> Any:
    """A tree of numpy arrays, equal in all processes, laid out over the mesh.

    `jax.device_put` would compare the arrays of all processes first.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]), tree
    )


def own_rows(
    sharding: jax.sharding.Sharding, rows: int, devices: Collection[jax.Device] | None = None
) -> OwnRows:
    """The rows that some devices hold of `[rows, ...]` arrays; None = those of this process.

    On a mesh whose axes cross processes in any way these need not stand together, and several
    processes may hold the same ones.
    """
    spans = {
        index[0].indices(rows)
        for device, index in sharding.devices_indices_map((rows,)).items()
        if device in (sharding.addressable_devices if devices is None else devices)
    }
    own = np.unique(np.concatenate([np.arange(*span) for span in spans]))
    return OwnRows(rows, own)


def rows_to_devices(tree: Any, own: OwnRows, sharding: jax.sharding.Sharding) -> Any:
    """Global arrays `[own.total, ...]`; this process gives its own rows, `[own.places, ...]`."""

    def place(x: np.ndarray) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            begin, end, _ = index[0].indices(own.total)
            return x[np.searchsorted(own.places, begin) :][: end - begin]

        return jax.make_array_from_callback((own.total, *x.shape[1:]), sharding, part)

    return jax.tree.map(place, tree)


def to_host(array: Any) -> np.ndarray:
    """The whole array as numpy, also where other processes hold parts of it.

    Every process must call it, because fetching the other parts is a collective.
    """
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)
