"""Loss, perplexity, bits per byte with standard errors, and loss by position: over packed rows as
training reads them, and as a task over whole documents.

Legend: B batch, T time.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from llm_jax.data.corpus import ComponentConfig
from llm_jax.data.packing import DocumentRows
from llm_jax.data.tokenizer_base import Tokenizer
from llm_jax.errors import UserError
from llm_jax.evals.batching import padded_batches
from llm_jax.evals.held_out import Texts, texts_by_tag
from llm_jax.evals.objective import spread
from llm_jax.evals.statistics import ratio
from llm_jax.evals.subject import LogLikelihood, Subject
from llm_jax.evals.task import TaskResult, stable_ids, text_hash
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
      See `Targets.describe`.

    Raises:
      UserError: no row has a counted target.
    """
    indices = spread(rows, len(rows) if max_rows is None else max_rows)
    parts = list(_counted_targets(token_nats, params, rows, token_bytes, indices, batch_size))
    return join_targets(parts).describe()


@dataclasses.dataclass(frozen=True)
class Targets:
    """Targets of positive weight, wherever they stand.

    nats: float64 [targets], −log p of each. weights: float64 [targets]. documents: int64 [targets],
    the document of each. sizes: int [targets], its UTF-8 bytes, 0 for special tokens. positions:
    int [targets], where its input stands in what was read of its document.
    """

    nats: np.ndarray
    weights: np.ndarray
    documents: np.ndarray
    sizes: np.ndarray
    positions: np.ndarray

    def describe(self) -> dict[str, float]:
        """
        Returns:
          loss: nats per target, weighted; and loss_stderr, documents being the sampled units.
          perplexity: exp(loss); and perplexity_stderr, to first order.
          bits_per_byte: nats / ln 2 / UTF-8 bytes, over targets that have bytes: ends of documents
            and other special tokens are left out, so tokenizers can be compared; and
            bits_per_byte_stderr.
          loss_by_position/P: loss of targets whose input stands at a position in [P, 2 P), for
            P = 1, 2, 4, ...; P = 0 is the first position alone.
          A figure that nothing was counted for is absent.

        Raises:
          UserError: there are no targets.
        """
        if not len(self.nats):
            raise UserError("the evaluation has no target to count: check its data source.")
        weighted = self.nats * self.weights
        result = ratio("loss", *self._by_document(weighted, self.weights))
        with np.errstate(over="ignore"):
            result["perplexity"] = float(np.exp(result["loss"]))
        if "loss_stderr" in result:
            result["perplexity_stderr"] = result["perplexity"] * result["loss_stderr"]
        has_bytes = self.sizes > 0
        result |= bits_per_byte(
            self.nats[has_bytes], self.sizes[has_bytes], self.documents[has_bytes]
        )
        buckets = np.frexp(self.positions)[1]  # 0 → 0, 1 → 1, 2..3 → 2, 4..7 → 3
        totals = np.bincount(buckets, weights=weighted)
        for bucket, weight in enumerate(np.bincount(buckets, weights=self.weights)):
            if weight > 0:
                lower_edge = 2 ** (bucket - 1) if bucket else 0
                result[f"loss_by_position/{lower_edge}"] = float(totals[bucket] / weight)
        return result

    def _by_document(self, *values: np.ndarray) -> tuple[np.ndarray, ...]:
        _, where = np.unique(self.documents, return_inverse=True)
        return tuple(np.bincount(where, weights=value) for value in values)


def join_targets(parts: Sequence[Targets]) -> Targets:
    """One after the other."""
    names = [field.name for field in dataclasses.fields(Targets)]
    joined = {name: [getattr(part, name) for part in parts] for name in names}
    return Targets(**{n: np.concatenate(x) if x else np.zeros(0) for n, x in joined.items()})


def bits_per_byte(nats: np.ndarray, sizes: np.ndarray, documents: np.ndarray) -> dict[str, float]:
    """Bits per byte of some targets and its standard error, documents being the sampled units.

    Args:
      nats: float [targets].
      sizes: int [targets], bytes of each target, all positive.
      documents: int [targets], the document of each target.

    Returns:
      `bits_per_byte`, absent without targets; `bits_per_byte_stderr`, absent under two documents.
    """
    _, where = np.unique(documents, return_inverse=True)
    document_bits = np.bincount(where, weights=nats) / LN_2
    return ratio("bits_per_byte", document_bits, np.bincount(where, weights=sizes))


def _counted_targets(
    token_nats: TokenNats,
    params: Any,
    rows: DocumentRows,
    token_bytes: np.ndarray,
    indices: list[int],
    batch_size: int,
) -> Iterator[Targets]:
    """Every target of positive weight, batch by batch."""
    for chosen, batch in padded_batches(rows, indices, batch_size):
        nats_BT = to_host(token_nats(params, batch)).astype(np.float64)
        used = slice(0, len(chosen))
        documents_BT = np.stack([rows.documents(i) for i in chosen])
        counted = batch.loss_weights[used] > 0
        yield Targets(
            nats_BT[used][counted],
            batch.loss_weights[used][counted].astype(np.float64),
            documents_BT[counted],
            token_bytes[batch.targets[used][counted]],
            batch.positions[used][counted],
        )


# --- the task -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class PerplexityConfig:
    """Whole documents, each read on its own.

    sources: by name, which is their tag; none: what the run held out, by component of its mixture.
    documents: of each tag at most, those with the smallest hash of their text, so that runs which
    held out some of the same documents read the same ones. length: tokens of context; None: what
    the run was trained on. A longer document is read in windows of that length. stride: tokens by
    which a window lies behind the one before; what both hold is context to the second. None: the
    length, so that they share nothing and the first tokens of each have little context.
    """

    sources: tuple[ComponentConfig, ...] = ()
    documents: int = 256
    length: int | None = None
    stride: int | None = None

    def __post_init__(self) -> None:
        for name in ("documents", "length", "stride"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name}={value} must be at least 1.")


@dataclasses.dataclass(frozen=True)
class _Document:
    """tokens: int [tokens]. counted: bool [tokens], the targets that count. words: of its text,
    between white space. text_bytes: UTF-8 bytes of its counted text."""

    id: str
    tag: str
    tokens: np.ndarray
    counted: np.ndarray
    words: int


def perplexity_task(config: PerplexityConfig, subject: Subject) -> Callable[[Any], TaskResult]:
    """Figures over all documents, and TAG/KEY over those of each tag where there are several.

    Beside those of `Targets.describe`: byte_perplexity, exp(nats / byte), and word_perplexity,
    exp(nats / word), over the same targets as bits_per_byte; the words are those of the counted
    text. Of each document its example has the tag, nats, tokens and bytes.

    Raises:
      UserError: texts that cannot be read, or a length or stride that does not fit.
    """
    length = config.length or min(subject.length, subject.model.max_length)
    stride = config.stride or length
    if length > subject.model.max_length or stride > length:
        raise UserError(
            f"windows of length={length} with stride={stride}: give a length up to the "
            f"{subject.model.max_length} that {subject.name} reads, and a stride up to the length."
        )
    texts = texts_by_tag(subject, config.sources, config.documents)
    documents = _documents(texts, config.documents, subject)
    token_bytes = np.zeros(subject.model.vocab_size, np.int32)
    token_bytes[: subject.tokenizer.vocab_size] = subject.tokenizer.token_bytes()

    def run(params: Any) -> TaskResult:
        windows = [
            (number, begin, end, places)
            for number, document in enumerate(documents)
            for begin, end, places in _windows(document.counted, length, stride)
        ]
        found = subject.read(
            params,
            [
                (documents[number].tokens[begin:end], places - begin)
                for number, begin, end, places in windows
            ],
        )
        parts: dict[int, list[Targets]] = {number: [] for number in range(len(documents))}
        for (number, begin, _, places), read in zip(windows, found, strict=True):
            tokens = documents[number].tokens[places]
            parts[number].append(_targets_of(number, read, token_bytes[tokens], places - begin))
        by_document = [join_targets(part) for part in parts.values()]
        return TaskResult(
            _describe(documents, by_document),
            [_example(d, targets) for d, targets in zip(documents, by_document, strict=True)],
        )

    return run


def _documents(texts: dict[str, Texts], most: int, subject: Subject) -> list[_Document]:
    """Those with something to count; ids are made of their tags and texts.

    Raises:
      UserError: there are none.
    """
    found: list[_Document] = []
    for tag, store in texts.items():
        for index in _chosen(store, most, subject.tokenizer):
            tokens = np.asarray(store.document(index), np.int32)
            counted = np.ones(len(tokens), bool)
            if store.trained is not None:
                counted[:] = store.trained[store.offsets[index] : store.offsets[index + 1]] > 0
            counted[:1] = False  # nothing stands before it
            if counted.any():
                words = len(subject.tokenizer.decode(tokens[counted]).split())
                found.append(_Document("", tag, tokens, counted, words))
    if not found:
        raise UserError("the sources hold no document with a token to count.")
    ids = stable_ids([f"{d.tag}\n{subject.tokenizer.decode(d.tokens)}" for d in found])
    return [dataclasses.replace(d, id=id) for d, id in zip(found, ids, strict=True)]


def _chosen(store: Texts, most: int, tokenizer: Tokenizer) -> Sequence[int]:
    """The places of those documents that are read, in the order of the store."""
    if len(store) <= most:
        return range(len(store))
    places = heapq.nsmallest(
        most, range(len(store)), key=lambda i: text_hash(tokenizer.decode(store.document(i)))
    )
    return sorted(places)


def _windows(
    counted: np.ndarray, length: int, stride: int
) -> Iterator[tuple[int, int, np.ndarray]]:
    """Where each window of a document begins and ends, and the places of the targets that it adds:
    those that count and that no window before it has."""
    begin, known = 0, 1
    while known < len(counted):
        end = min(begin + length + 1, len(counted))  # the last token is not read
        places = known + np.flatnonzero(counted[known:end])
        if len(places):
            yield begin, end, places
        begin, known = begin + stride, end


def _targets_of(number: int, read: LogLikelihood, sizes: np.ndarray, places: np.ndarray) -> Targets:
    count = len(places)
    return Targets(
        -read.logprobs.astype(np.float64), np.ones(count), np.full(count, number), sizes, places - 1
    )


def _describe(documents: Sequence[_Document], found: Sequence[Targets]) -> dict[str, float]:
    result = _describe_some(documents, found)
    tags = list(dict.fromkeys(document.tag for document in documents))
    for tag in tags if len(tags) > 1 else ():
        numbers = [number for number, document in enumerate(documents) if document.tag == tag]
        own = _describe_some([documents[n] for n in numbers], [found[n] for n in numbers])
        result |= {f"{tag}/{key}": value for key, value in own.items()}
    return result


def _describe_some(documents: Sequence[_Document], found: Sequence[Targets]) -> dict[str, float]:
    targets = join_targets(found)
    result = targets.describe()
    words = sum(document.words for document in documents)
    with np.errstate(over="ignore"):
        if "bits_per_byte" in result:
            result["byte_perplexity"] = float(np.exp2(result["bits_per_byte"]))
        if words:
            nats = np.sum(targets.nats[targets.sizes > 0])
            result["word_perplexity"] = float(np.exp(nats / words))
    return result


def _example(document: _Document, targets: Targets) -> dict[str, Any]:
    has_bytes = targets.sizes > 0
    return {
        "id": document.id,
        "tag": document.tag,
        "nats": float(np.sum(targets.nats[has_bytes])),
        "tokens": int(np.sum(has_bytes)),
        "bytes": int(np.sum(targets.sizes)),
    }
