"""Loss, perplexity, bits per byte with a standard error, and loss by position, over packed rows.

Legend: B batch, T time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from llm_jax.data.packing import DocumentRows
from llm_jax.errors import UserError
from llm_jax.evals.batching import padded_batches
from llm_jax.placement import to_host
from llm_jax.types import Batch

LN_2 = float(np.log(2))

# (params, batch) → float32 [B, T], the negative log likelihood of each target in nats.
TokenNats = Callable[[Any, Batch], Any]


def evaluate_perplexity(
    token_nats: TokenNats,
    params: Any,
    rows: DocumentRows,
    token_bytes: np.ndarray,
    batch_size: int,
    max_rows: int | None = None,
) -> dict[str, float]:
    """Measures a model on rows of documents; each row counts once, whatever the batch size.

    With functools.partial over all but `params` it is an evaluation that a trainer can run. With
    several processes each of them calls it, with the same rows.

    Args:
      token_nats: jitted. It gets numpy arrays [batch_size, T], the same on every process, and
        places them itself where the mesh has more than one process (`placement.to_devices`).
      params: passed on to it.
      rows: packed rows.
      token_bytes: int32 [vocabulary], the UTF-8 bytes of each token, 0 for special tokens.
      batch_size: rows at once.
      max_rows: at most this many rows are read, spread evenly over all of them.

    Returns:
      loss: nats per counted target, weighted by `loss_weights`.
      perplexity: exp(loss).
      bits_per_byte: nats / ln 2 / UTF-8 bytes, over counted targets that have bytes: ends of
        documents and other special tokens are left out, so tokenizers can be compared.
      bits_per_byte_stderr: of that ratio, over documents; needs two documents.
      loss_by_position/P: loss of targets whose input stands at a position in [P, 2 P) of its
        document's piece, for P = 1, 2, 4, ...; P = 0 is the first position alone.
      A figure that nothing was counted for is absent.

    Raises:
      UserError: no row has a counted target.
    """
    count = len(rows) if max_rows is None else min(max_rows, len(rows))
    indices = [i * len(rows) // count for i in range(count)]
    nats, weight, documents, sizes, buckets = _counted_targets(
        token_nats, params, rows, token_bytes, indices, batch_size
    )
    if not len(nats):
        raise UserError("the evaluation has no target to count: check its data source.")
    loss = float(np.sum(nats * weight) / np.sum(weight))
    with np.errstate(over="ignore"):
        result = {"loss": loss, "perplexity": float(np.exp(loss))}
    has_bytes = sizes > 0
    result |= bits_per_byte(nats[has_bytes], sizes[has_bytes], documents[has_bytes])
    totals = np.bincount(buckets, weights=nats * weight)
    for bucket, bucket_weight in enumerate(np.bincount(buckets, weights=weight)):
        if bucket_weight > 0:
            lower_edge = 2 ** (bucket - 1) if bucket else 0
            result[f"loss_by_position/{lower_edge}"] = float(totals[bucket] / bucket_weight)
    return result


def bits_per_byte(nats: np.ndarray, sizes: np.ndarray, documents: np.ndarray) -> dict[str, float]:
    """Bits per byte of some targets and its standard error, documents being the sampled units.

    The figure is a ratio of two sums over documents, R = Σ bits / Σ bytes; to first order its
    variance is D / (D - 1) · Σ (bits - R · bytes)² / (Σ bytes)² for D documents (Cochran 1977,
    "Sampling Techniques", section 2.11).

    Args:
      nats: float [targets].
      sizes: int [targets], bytes of each target, all positive.
      documents: int [targets], the document of each target.

    Returns:
      `bits_per_byte`, absent without targets; `bits_per_byte_stderr`, absent under two documents.
    """
    if not len(nats):
        return {}
    names, where = np.unique(documents, return_inverse=True)
    document_bits = np.bincount(where, weights=nats) / LN_2
    document_bytes = np.bincount(where, weights=sizes)
    ratio = document_bits.sum() / document_bytes.sum()
    result = {"bits_per_byte": float(ratio)}
    if len(names) > 1:
        squares = np.sum((document_bits - ratio * document_bytes) ** 2)
        variance = len(names) / (len(names) - 1) * squares / document_bytes.sum() ** 2
        result["bits_per_byte_stderr"] = float(np.sqrt(variance))
    return result


def _counted_targets(
    token_nats: TokenNats,
    params: Any,
    rows: DocumentRows,
    token_bytes: np.ndarray,
    indices: list[int],
    batch_size: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Nats, weight, document, bytes and position bucket of every target of positive weight."""
    parts: list[tuple[np.ndarray, ...]] = []
    for chosen, batch in padded_batches(rows, indices, batch_size):
        nats_BT = to_host(token_nats(params, batch)).astype(np.float64)
        used = slice(0, len(chosen))
        documents_BT = np.stack([rows.documents(i) for i in chosen])
        counted = batch.loss_weights[used] > 0
        parts.append(
            (
                nats_BT[used][counted],
                batch.loss_weights[used][counted].astype(np.float64),
                documents_BT[counted],
                token_bytes[batch.targets[used][counted]],
                np.frexp(batch.positions[used][counted])[1],  # 0 → 0, 1 → 1, 2..3 → 2, 4..7 → 3
            )
        )
    if not parts:
        return (np.zeros(0),) * 5
    nats, weight, documents, sizes, buckets = (np.concatenate(p) for p in zip(*parts, strict=True))
    return nats, weight, documents, sizes, buckets
