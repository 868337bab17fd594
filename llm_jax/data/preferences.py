"""Comparisons as rows: pairs, ranked groups, or unpaired answers, each answer in its own sequence.

Legend: K sequences of a row, T time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np

from llm_jax.config import digest
from llm_jax.data.example_store import ExampleConfig
from llm_jax.data.packing import TooLong, clip
from llm_jax.data.store import TokenStore
from llm_jax.errors import UserError
from llm_jax.types import Batch, PreferenceBatch

# pairs: every two answers of a prompt with different scores. groups: all answers of a prompt.
# unpaired: single answers, good or bad, each with another prompt's answer beside it.
Arrangement = Literal["pairs", "groups", "unpaired"]
_NONE = -1


@dataclasses.dataclass(frozen=True)
class PreferenceDataConfig(ExampleConfig):
    """The comparisons."""

    source: str = "stdlib:preferences"
    template: str | None = None  # as for fine-tuning; None: that of the stage before, or "chatml"
    # What happens to answers that are longer than a row with their prompt. Cutting at the left
    # costs the beginning of the prompt and keeps the answer whole.
    too_long: TooLong = "truncate_left"
    validation_fraction: float = 0.05  # of the prompts, chosen by their hash
    cache_dir: str | None = None  # of token stores; None: $LLM_JAX_CACHE or ~/.cache/llm_jax


class Sequences:
    """Random access to prompts with an answer, as a Batch of arrays [T] each.

    The loss weights are 1 where the target is a token of the answer; the last token has no target.
    """

    def __init__(self, store: TokenStore, length: int, too_long: TooLong):
        """The sequences of `length` tokens at most, of the documents of a store of comparisons."""
        assert store.trained is not None
        self.length = length
        self.clipped = clip(store, length, too_long)
        self._tokens, self._trained = store.tokens, store.trained
        self.documents = np.zeros((0, 2), np.int64)  # of the prompt and of the answer

    @property
    def usable(self) -> np.ndarray:
        """bool [documents]: whether anything of an answer is left to train on."""
        return self.clipped.ends > self.clipped.begins

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        prompt, answer = self.documents[index]
        if prompt == answer:
            span = slice(self.clipped.begins[answer], self.clipped.ends[answer])
            return self._padded(self._tokens[span], self._trained[span])
        parts = [self._prompt(prompt), self._answer(answer)]
        tokens, trained = (np.concatenate(p) for p in zip(*parts, strict=True))
        return self._padded(tokens[-self.length :], trained[-self.length :])

    def empty(self) -> Batch:
        """A sequence that is padding throughout."""
        return self._padded(self._tokens[:0], self._trained[:0])

    def _prompt(self, document: int) -> tuple[np.ndarray, np.ndarray]:
        begin, split, _ = self._places(document)
        return self._tokens[begin:split], np.zeros(split - begin, np.uint8)

    def _answer(self, document: int) -> tuple[np.ndarray, np.ndarray]:
        _, split, end = self._places(document)
        return self._tokens[split:end], self._trained[split:end]

    def _places(self, document: int) -> tuple[int, int, int]:
        """Where a document begins, where its answer begins, and where it ends."""
        begin, end = int(self.clipped.begins[document]), int(self.clipped.ends[document])
        return begin, begin + int(np.argmax(self._trained[begin:end])), end

    def _padded(self, tokens: np.ndarray, trained: np.ndarray) -> Batch:
        count = len(tokens)

        def pad(values: np.ndarray, dtype: Any) -> np.ndarray:
            row = np.zeros(self.length, dtype)
            row[: len(values)] = values
            return row

        return Batch(
            tokens=pad(tokens, np.int32),
            targets=pad(tokens[1:], np.int32),
            loss_weights=pad(trained[1:], np.float32),
            segment_ids=pad(np.ones(count), np.int32),
            positions=pad(np.arange(count), np.int32),
        )


class PreferenceRows:
    """Random access to comparisons, as a PreferenceBatch of arrays without the batch axis.

    Attributes:
      length: tokens in a sequence. responses: K, sequences in a row.
      sequences: all sequences that the rows are made of, each once.
      strengths: int8 [rows], indices of `STRENGTHS`, -1 where the data does not say.
      left_out: answers of which nothing is left at this length.
      fingerprint: a hash of all that decides the sequences.
    """

    def __init__(
        self,
        store: TokenStore,
        length: int,
        arrangement: Arrangement,
        responses: int = 2,
        *,
        too_long: TooLong = "truncate_left",
        margins: Sequence[float] | None = None,
    ):
        """
        Args:
          store: from `comparison_stores`.
          length: tokens in a sequence.
          arrangement: which answers stand together.
          responses: K, see `responses_of`.
          too_long: see `PreferenceDataConfig`.
          margins: one for each of `STRENGTHS`; None = 0 everywhere.

        Raises:
          UserError: nothing is left to compare.
        """
        self.length = length
        self.sequences = Sequences(store, length, too_long)
        self.left_out = int(np.sum(~self.sequences.usable))
        arranged = list(_ARRANGEMENTS[arrangement](store, self.sequences.usable))
        if not arranged:
            raise UserError(
                f"source={store.meta.source!r} holds nothing to compare in sequences of {length} "
                f"tokens: {self.left_out} of {len(store)} answers are too long or empty, and "
                "answers are compared where their scores differ."
            )
        self.responses = responses
        documents = np.full((len(arranged), self.responses, 2), _NONE, np.int64)
        self._scores = np.zeros((len(arranged), self.responses), np.float32)
        for index, row in enumerate(arranged):
            documents[index, : len(row.documents)] = row.documents
            self._scores[index, : len(row.scores)] = row.scores
        unique, inverse = np.unique(documents.reshape(-1, 2), axis=0, return_inverse=True)
        padding = int(unique[0, 0] == _NONE)
        self.sequences.documents = unique[padding:]
        self._index = inverse.reshape(documents.shape[:2]) - padding  # -1 for no response
        self.strengths = store.columns["strength"][documents[:, 0, 1]]
        table = np.asarray([*(margins or (0.0, 0.0, 0.0, 0.0)), 0.0], np.float32)
        self._margins = table[self.strengths]  # -1, no strength, is the last one
        self._reference: np.ndarray | None = None
        self.fingerprint = digest([store.fingerprint, length, arrangement, too_long])

    def attach_reference(self, logprobs: np.ndarray) -> None:
        """Adds the reference model's log-probability of each of `sequences`, float32."""
        self._reference = np.where(self._index >= 0, logprobs[self._index], 0).astype(np.float32)

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> PreferenceBatch:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        parts = [
            self.sequences[i] if i >= 0 else self.sequences.empty() for i in self._index[index]
        ]
        names = [field.name for field in dataclasses.fields(Batch)]
        return PreferenceBatch(
            responses=Batch(**{n: np.stack([getattr(part, n) for part in parts]) for n in names}),
            scores=self._scores[index],
            margins=self._margins[index],
            reference_logprobs=None if self._reference is None else self._reference[index],
        )


def responses_of(stores: Iterable[TokenStore], arrangement: Arrangement) -> int:
    """K for all splits of some data: 2, or the answers of the largest comparison."""
    if arrangement != "groups":
        return 2
    return max(int(np.unique(s.columns["group"], return_counts=True)[1].max()) for s in stores)


@dataclasses.dataclass(frozen=True)
class _Row:
    """documents: of the prompt and of the answer, for each sequence of the row."""

    documents: list[tuple[int, int]]
    scores: list[float]


def _groups(store: TokenStore, usable: np.ndarray) -> Iterator[list[int]]:
    """The usable documents of each comparison that has any, in their order."""
    group = store.columns["group"]
    starts = np.flatnonzero(np.diff(group, prepend=_NONE))
    for start, end in zip(starts, [*starts[1:], len(group)], strict=True):
        documents = [int(d) for d in range(start, end) if usable[d]]
        if documents:
            yield documents


def _pairs(store: TokenStore, usable: np.ndarray) -> Iterator[_Row]:
    scores = store.columns["score"]
    for documents in _groups(store, usable):
        for better in documents:
            for worse in documents:
                if scores[better] > scores[worse]:
                    yield _Row([(better, better), (worse, worse)], [1.0, 0.0])


def _ranked(store: TokenStore, usable: np.ndarray) -> Iterator[_Row]:
    scores = store.columns["score"]
    for documents in _groups(store, usable):
        values = [float(scores[d]) for d in documents]
        if len(set(values)) > 1:
            best_first = np.argsort(-np.asarray(values), kind="stable")
            yield _Row(
                [(documents[i], documents[i]) for i in best_first], [values[i] for i in best_first]
            )


def _unpaired(store: TokenStore, usable: np.ndarray) -> Iterator[_Row]:
    """An answer is good that is labelled so, or that is the best of its comparison.

    Comparisons in which all answers tie say nothing and are left out.
    """
    scores, prompt = store.columns["score"], store.columns["prompt"]
    answers: list[tuple[int, float]] = []
    for documents in _groups(store, np.ones_like(usable)):
        values = scores[documents]
        if len(documents) == 1:
            labels = values > 0.5
        elif values.min() < values.max():
            labels = values == values.max()
        else:
            continue
        pairs = zip(documents, labels, strict=True)
        answers += [(document, float(label)) for document, label in pairs if usable[document]]
    for place, (document, label) in enumerate(answers):
        # The next answer to another prompt; where all answer one prompt, the answer itself.
        others = (answers[(place + step) % len(answers)][0] for step in range(1, len(answers)))
        other = next((o for o in others if prompt[o] != prompt[document]), document)
        yield _Row([(document, document), (document, other)], [label, 0.0])


_ARRANGEMENTS = {"pairs": _pairs, "groups": _ranked, "unpaired": _unpaired}
