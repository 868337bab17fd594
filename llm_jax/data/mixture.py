"""A weighted mixture of rows in which the batch is a pure function of the step.

Nothing here has a state: a run resumes from the number of its next step, and the global batch does
not depend on how many processes, threads or devices read it.
"""

from __future__ import annotations

import functools
import math
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import jax
import numpy as np

from llm_jax.data.packing import Rows
from llm_jax.errors import UserError, did_you_mean


def batches(
    components: Mapping[str, Rows],
    weights: Mapping[str, float],
    batch_size: int,
    seed: int,
    *,
    places: Sequence[int] | None = None,
) -> grain.MapDataset:
    """An endless dataset whose element k is global batch k, or some rows of it.

    Each component is shuffled anew in every epoch of its own, by a seed that depends on its name
    and not on the other components. The components take turns, so that every stretch of rows holds
    them in proportion to their weights; a weight is kept to within 1 % of the smallest one.

    Args:
      components: rows by name, all of one length T.
      weights: relative share of each component, by name; one that is missing or 0 is left out.
      batch_size: rows in the global batch.
      seed: non-negative; another seed gives another order.
      places: which rows of the batch a process reads; None = all.

    Returns:
      A MapDataset of what the rows are, such as Batch: numpy arrays [places, ...].

    Raises:
      UserError: a weight that is negative, not finite or names no component; no positive weight; a
        component without rows; rows of different lengths.
    """
    shares = normalised_weights(components, weights)
    if len({components[name].length for name in shares}) > 1:
        lengths = {name: components[name].length for name in shares}
        raise UserError(f"the components of a mixture must have rows of one length, not {lengths}.")
    if batch_size < 1:
        raise UserError(f"a batch of {batch_size} rows must have at least 1.")
    mixed = grain.MapDataset.mix(
        [_shuffled(name, components[name], seed) for name in shares], list(shares.values())
    )
    chosen = range(batch_size) if places is None else places

    def batch(step: int) -> Any:
        return stack([mixed[step * batch_size + place] for place in chosen])

    return grain.MapDataset.range(sys.maxsize // batch_size).map(batch)


def prefetch(
    dataset: grain.MapDataset, start_step: int, *, threads: int = 2, buffer: int = 4
) -> Iterator[Any]:
    """Yields elements `start_step`, `start_step + 1`, ... of a dataset, read ahead in threads.

    Threads and not worker processes: rows are gathered by numpy, which releases the interpreter
    lock, and the order does not depend on how many threads there are.

    Args:
      dataset: what `batches` returns.
      start_step: the first step to yield.
      threads: threads that build batches; with 0, each batch is built when it is asked for.
      buffer: batches ready or under way at any time.
    """
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=buffer)
    return iter(dataset.slice(slice(start_step, None)).to_iter_dataset(options))


def epochs(
    components: Mapping[str, Rows], weights: Mapping[str, float], batch_size: int, step: int
) -> dict[str, float]:
    """How many times each component of positive weight has been read before `step`."""
    shares = normalised_weights(components, weights)
    return {
        name: step * batch_size * share / len(components[name]) for name, share in shares.items()
    }


def normalised_weights(
    components: Mapping[str, Rows], weights: Mapping[str, float]
) -> dict[str, float]:
    """The positive weights, sorted by name and scaled to sum to 1.

    Raises:
      UserError: as `batches` says.
    """
    for name, weight in weights.items():
        if name not in components:
            raise UserError(
                f"the mixture has no component {name!r}.{did_you_mean(name, components)}"
            )
        if not (weight >= 0 and math.isfinite(weight)):
            raise UserError(f"the weight of {name!r} is {weight}: make it 0 or a positive number.")
    positive = {name: weights[name] for name in sorted(weights) if weights[name] > 0}
    if not positive:
        raise UserError(
            f"no component has a positive weight: give one of {', '.join(components)} a weight."
        )
    for name in positive:
        if not len(components[name]):
            raise UserError(f"component {name!r} has no rows: check its data source.")
    total = sum(positive.values())
    return {name: weight / total for name, weight in positive.items()}


def stack(rows: list[Any]) -> Any:
    """Rows, structs of arrays [...], as one struct of arrays [rows, ...]."""
    return jax.tree.map(lambda *arrays: np.stack(arrays), *rows)


def _shuffled(name: str, rows: Rows, seed: int) -> grain.MapDataset:
    size, key = len(rows), zlib.crc32(name.encode())

    # A permutation and not `MapDataset.shuffle`, which walks cycles of at least 2**16 indices: on a
    # component of few rows it takes milliseconds a row. Threads may stand on both sides of the
    # border of two epochs.
    @functools.lru_cache(maxsize=2)
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng([seed, key, epoch]).permutation(size)

    def row(index: int) -> Any:
        epoch, index_in_epoch = divmod(index, size)
        return rows[int(order(epoch)[index_in_epoch])]

    return grain.MapDataset.range(sys.maxsize).map(row)
