"""Needles in a haystack: rows of real text with stated facts and questions about them.

A needle states a value, " Note: river table."; a question repeats its beginning, " Note: river",
and is answered by the value, " table". Values are drawn uniformly and anew for every row, so a name
says nothing about its value and only retrieval finds it. The value follows right on the name: the
farther apart they are, the more a small model must learn before it can match the two.
(Kamradt 2023, "Needle in a Haystack"; Hsieh et al. 2024, "RULER", the multi-key variant.)

Rows are assembled from token ids, each part encoded on its own, so a value is the same number of
tokens in every row and for every name, whatever the tokenizer merges.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from llm_jax.data.haystack import WORDS, Filler, Sentence, assemble, names_and_values, row_rng
from llm_jax.errors import UserError
from llm_jax.types import Batch

BEFORE_NAME, AFTER_VALUE = " Note:", "."


@dataclasses.dataclass(frozen=True)
class NeedleConfig:
    """What needle rows look like, in training and in evaluation."""

    # Distinct names and answers in use: words that the tokenizer writes with few tokens. All values
    # have the same number of tokens; an answer drawn by chance is right once in `answers` times.
    names: int = 64
    answers: int = 64
    # Training rows: the share of tokens that needles and questions take, at least one of each.
    share: float = 0.5
    max_needles: int = 8  # questions in a training row, each about a needle of its own
    answer_weight: float = 1.0  # loss weight of the tokens that answer a question
    text_weight: float = 1.0  # loss weight of all the rest, values stated by needles excepted
    # Needles with other names in an evaluation row, as far as they fit. Training rows hold at least
    # as many needles, or a model would learn to copy the one value it sees without a look at names.
    distractors: int = 3


@dataclasses.dataclass(frozen=True)
class NeedleExamples:
    """Evaluation rows, each with one question at its very end.

    rows: Batch of numpy arrays [T] each; `loss_weights` is 1 on the answer's tokens, else 0.
    depths: float64 [rows], where the needle stands: 0 is the start, 1 just before the question.
    answer_tokens: tokens of every answer.
    """

    rows: tuple[Batch, ...]
    depths: np.ndarray
    answer_tokens: int


class NeedleRows:
    """Training rows with several needles and questions, in the manner of `data.packing.Rows`.

    Needles stand at random depths and each question somewhere behind its needle; the last one
    closes the row, as in an evaluation. A row is one document, and depends on (seed, index) alone.

    Attributes:
      length: pairs in a row; all of them are real.
      needles: needles in every row.
      questions: how many of them a row asks for.
      answer_tokens: tokens of every answer.
    """

    def __init__(
        self,
        tokenizer: Any,
        filler: Any,
        length: int,
        seed: int,
        size: int,
        config: NeedleConfig = NeedleConfig(),
    ):
        """
        Args:
          tokenizer: a Tokenizer.
          filler: the TokenStore that the haystack is taken from.
          length: pairs in a row.
          seed: non-negative.
          size: rows in an epoch.
          config: what the rows look like.

        Raises:
          UserError: the length cannot hold a needle and its question, the store holds no text, or a
            setting is out of range.
        """
        self.length = length
        self._size = size
        self._seed = seed
        self._config = config
        self._builder = _Builder(tokenizer, filler, length, config)
        self.answer_tokens = self._builder.value_tokens
        wanted = int(config.share * (length + 1)) // (2 * self._builder.sentence_tokens)
        self.questions = max(1, min(wanted, config.max_needles))
        self.needles = max(
            self.questions,
            min(1 + config.distractors, self._builder.needles_beside(self.questions)),
        )

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < self._size:
            raise IndexError(f"row {index} of {self._size}")
        rng = row_rng(self._seed, index)
        facts = self._builder.draw_facts(rng, self.needles)
        needle_depths = rng.uniform(size=self.needles)
        closing, *asked = facts[: self.questions]
        question_depths = rng.uniform(needle_depths[1 : self.questions], 1.0)
        return self._builder.row(
            rng,
            needles=list(zip(needle_depths, facts, strict=True)),
            questions=list(zip(question_depths, asked, strict=True)),
            closing=closing,
            answer_weight=self._config.answer_weight,
            text_weight=self._config.text_weight,
        )

    def documents(self, index: int) -> np.ndarray:
        """int64 [T]: every row is a document of its own."""
        return np.full(self.length, index, np.int64)


def needle_examples(
    tokenizer: Any,
    filler: Any,
    length: int,
    depths: Sequence[float],
    per_depth: int,
    seed: int,
    config: NeedleConfig = NeedleConfig(),
) -> NeedleExamples:
    """Evaluation rows: `per_depth` for each depth, with one needle there and distractors elsewhere.

    Args:
      tokenizer: a Tokenizer.
      filler: the TokenStore that the haystack is taken from.
      length: pairs in a row; its last target is the answer's last token.
      depths: in [0, 1], as in NeedleExamples.
      per_depth: rows for each depth.
      seed: non-negative; give another one than in training.
      config: names, answers and distractors are used.

    Raises:
      UserError: a depth outside [0, 1], and as NeedleRows says.
    """
    if not all(0 <= depth <= 1 for depth in depths):
        raise UserError(f"needle depths {tuple(depths)} must lie between 0 and 1.")
    builder = _Builder(tokenizer, filler, length, config)
    needles_each = min(1 + config.distractors, builder.needles_beside(1))
    rows, row_depths = [], np.repeat(np.asarray(depths, np.float64), per_depth)
    for index, depth in enumerate(row_depths):
        rng = row_rng(seed, index)
        asked, *others = builder.draw_facts(rng, needles_each)
        needles = [(depth, asked), *zip(rng.uniform(size=len(others)), others, strict=True)]
        rows.append(builder.row(rng, needles, [], asked, answer_weight=1.0, text_weight=0.0))
    return NeedleExamples(tuple(rows), row_depths, builder.value_tokens)


@dataclasses.dataclass(frozen=True)
class _Fact:
    """name: its token ids. value: its token ids."""

    name: list[int]
    value: list[int]


class _Builder:
    """Encoded parts, and rows assembled from them.

    sentence_tokens: of the longest needle, or question with its answer.
    minimal_tokens: of the shortest row that always holds one needle and its question.
    """

    def __init__(self, tokenizer: Any, filler: Any, length: int, config: NeedleConfig):
        if min(config.names, config.answers) < 1 or config.names + config.answers > len(WORDS):
            raise UserError(
                f"needle.names={config.names} and needle.answers={config.answers} must be at least "
                f"1 each, and {len(WORDS)} together at most."
            )
        if not 0 < config.share <= 1:
            raise UserError(f"needle.share={config.share} must lie in (0, 1].")
        if max(config.max_needles, config.distractors + 1) > config.names or config.max_needles < 1:
            raise UserError(
                f"needle.max_needles={config.max_needles} must be at least 1, and it and "
                f"needle.distractors={config.distractors} plus 1 at most needle.names="
                f"{config.names}."
            )
        self._start = np.array(tokenizer.document_start, np.int32)
        self._filler = Filler(filler, tokenizer.token_bytes())
        self._length = length
        self._before_name = tokenizer.encode(BEFORE_NAME, "after_text")
        self._after_value = tokenizer.encode(AFTER_VALUE, "after_text")
        self._names, self._values = names_and_values(tokenizer, config.names, config.answers)
        self.value_tokens = len(self._values[0])
        question = len(self._before_name) + len(self._names[-1])
        self.sentence_tokens = question + self.value_tokens + len(self._after_value)
        self.minimal_tokens = len(self._start) + self.sentence_tokens + question + self.value_tokens
        if length + 1 < self.minimal_tokens:
            raise UserError(
                f"needle rows of length {length} are too short: with this tokenizer a needle and "
                f"its question need length {self.minimal_tokens - 1}."
            )

    def needles_beside(self, questions: int) -> int:
        """How many needles fit into a row with so many questions, the last of which ends it."""
        # One token more than `length`; the last question has nothing after its value.
        space = self._length + 1 - len(self._start) + len(self._after_value)
        return space // self.sentence_tokens - questions

    def draw_facts(self, rng: np.random.Generator, count: int) -> list[_Fact]:
        """`count` different names with uniform random values."""
        names = rng.permutation(len(self._names))[:count]
        values = rng.integers(len(self._values), size=count)
        return [
            _Fact(self._names[name], self._values[value])
            for name, value in zip(names, values, strict=True)
        ]

    def row(
        self,
        rng: np.random.Generator,
        needles: list[tuple[float, _Fact]],
        questions: list[tuple[float, _Fact]],
        closing: _Fact,
        answer_weight: float,
        text_weight: float,
    ) -> Batch:
        """A row of exactly `length` pairs, ending with the answer to the question for `closing`.

        Needles and questions stand at the given depths of the filler; at the same place of it,
        needles come first.
        """
        inserts = [(depth, self._sentence(fact, 0.0, text_weight)) for depth, fact in needles]
        inserts += [
            (depth, self._sentence(fact, answer_weight, text_weight)) for depth, fact in questions
        ]
        last = self._sentence(closing, answer_weight, text_weight)
        end = len(last.tokens) - len(self._after_value)
        taken = len(self._start) + end + sum(len(sentence.tokens) for _, sentence in inserts)
        filler = self._filler.draw(rng, self._length + 1 - taken)
        sequence, weights = assemble(self._start, filler, text_weight, inserts)
        sequence = np.concatenate([sequence, last.tokens[:end]]).astype(np.int32)
        weights = np.concatenate([weights, last.weights[:end]]).astype(np.float32)
        return Batch(
            tokens=sequence[:-1],
            targets=sequence[1:],
            loss_weights=weights[1:],
            segment_ids=np.ones(self._length, np.int32),
            positions=np.arange(self._length, dtype=np.int32),
        )

    def _sentence(self, fact: _Fact, value_weight: float, text_weight: float) -> Sentence:
        """A needle, or a question with its answer."""
        before = self._before_name + fact.name
        tokens = np.array(before + fact.value + self._after_value)
        weights = np.full(len(tokens), text_weight)
        weights[len(before) : len(before) + len(fact.value)] = value_weight
        return Sentence(tokens, weights)
