"""Rows that ask for more than one needle: several facts at once, chains of variables, and a context
that is nothing but pairs of keys and values (after RULER, Hsieh et al. 2024, arXiv:2404.06654, and,
for the pairs, Liu et al. 2023, "Lost in the Middle", arXiv:2307.03172).

Every answer is a fixed number of tokens behind words that stand in the row, so whether a model
would give it is told by one forward pass: see `evals.needle.evaluate_needle`. Values are drawn
anew for every row, and only reading the row finds them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from llm_jax.data.haystack import Filler, Sentence, assemble, names_and_values, row_rng
from llm_jax.errors import UserError

NOTE, LET, VALUE, IS, END = " Note:", " Let:", " Value:", " =", "."

_WORDS = 64  # names, and as many answers, of those that the tokenizer writes with few tokens
_KEYS_TO_SPARE = 4  # times as many keys can be written as a row has


@dataclasses.dataclass(frozen=True)
class RecallExample:
    """tokens: int32 [n]. answers: int [m], the places of the tokens that answer. depth: in [0, 1],
    where what is asked for stands; None where it stands in several places."""

    tokens: np.ndarray
    answers: np.ndarray
    depth: float | None


class _Parts:
    """The encoded pieces that rows are made of.

    start: what a row begins with. names, values: token ids of words, the values all of one length.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self.start = np.array(tokenizer.document_start, np.int32)
        self.names, self.values = names_and_values(tokenizer, _WORDS, _WORDS)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, "after_text")

    def draw_names(self, rng: np.random.Generator, count: int) -> list[list[int]]:
        """Different ones."""
        return [self.names[i] for i in rng.permutation(len(self.names))[:count]]

    def draw_values(self, rng: np.random.Generator, count: int) -> list[list[int]]:
        return [self.values[i] for i in rng.integers(len(self.values), size=count)]


def multi_needle(
    tokenizer: Any, texts: Any, length: int, count: int, seed: int, needles: int, distractors: int
) -> list[RecallExample]:
    """Facts " Note: river table." at random depths of a text, all but the distractors asked for at
    its end, one after the other: " Note: river table. Note: apple stone".

    Args:
      tokenizer: a Tokenizer.
      texts: a TokenStore, or what has its `tokens`, `document` and length.
      length: tokens of a row that are read; its last token is read by nobody.
      count: rows.
      seed: non-negative.
      needles: facts that are asked for.
      distractors: facts with other names.

    Raises:
      UserError: the length cannot hold them, or there are more than names.
    """
    parts = _Parts(tokenizer)
    _check_names(parts, needles + distractors, "needles and distractors")
    before, end = parts.encode(NOTE), parts.encode(END)
    filler = Filler(texts, tokenizer.token_bytes())

    def row(rng: np.random.Generator) -> RecallExample:
        names = parts.draw_names(rng, needles + distractors)
        values = parts.draw_values(rng, needles + distractors)
        facts = [[*before, *n, *v, *end] for n, v in zip(names, values, strict=True)]
        asked = [_Question([*before, *n], v) for n, v in zip(names, values, strict=True)]
        depths = rng.uniform(size=len(facts))
        inserts = list(zip(depths.tolist(), facts, strict=True))
        return _row(parts, rng, filler, length, inserts, asked[:needles], end)

    return [row(row_rng(seed, index)) for index in range(count)]


def variable_tracking(
    tokenizer: Any, texts: Any, length: int, count: int, seed: int, hops: int, chains: int
) -> list[RecallExample]:
    """Chains of assignments " Let: river = table.", " Let: apple = river.", in this order at random
    depths of a text, and " Value: apple = table" asked at its end.

    A row has `chains` chains of `hops` copies each. The ends of all but one are asked for with
    their answers before, as examples of what is wanted; the last question alone counts.

    Args:
      hops: copies between the value and the variable that is asked for. The rest is as in
        `multi_needle`.

    Raises:
      UserError: the length cannot hold them, or there are more variables than names.
    """
    parts = _Parts(tokenizer)
    _check_names(parts, chains * (hops + 1), "variables")
    let, ask = parts.encode(LET), parts.encode(VALUE)
    equals, end = parts.encode(IS), parts.encode(END)
    filler = Filler(texts, tokenizer.token_bytes())

    def row(rng: np.random.Generator) -> RecallExample:
        names = parts.draw_names(rng, chains * (hops + 1))
        values = parts.draw_values(rng, chains)
        inserts: list[tuple[float, list[int]]] = []
        questions = []
        for chain, value in enumerate(values):
            own = names[chain * (hops + 1) : (chain + 1) * (hops + 1)]
            depths = np.sort(rng.uniform(size=len(own))).tolist()
            for depth, name, source in zip(depths, own, [value, *own], strict=False):
                inserts.append((depth, [*let, *name, *equals, *source, *end]))
            questions.append(_Question([*ask, *own[-1], *equals], value))
        return _row(parts, rng, filler, length, inserts, questions, end, counted=1)

    return [row(row_rng(seed, index)) for index in range(count)]


def key_value(
    tokenizer: Any, length: int, depths: Sequence[float], per_depth: int, seed: int
) -> list[RecallExample]:
    """Rows that are full of pairs " river apple = table.", one of which is asked for at the end.

    A key is as many words as it takes for all to be different.

    Args:
      depths: in [0, 1], where the pair stands; 0 is the start. The rest is as in `multi_needle`.

    Raises:
      UserError: a depth outside [0, 1], or a length that holds no two pairs.
    """
    if not all(0 <= depth <= 1 for depth in depths):
        raise UserError(f"depths {tuple(depths)} must lie between 0 and 1.")
    parts = _Parts(tokenizer)
    equals, end = parts.encode(IS), parts.encode(END)
    longest_name = max(map(len, parts.names))

    def pairs_of(words: int) -> int:
        """That fit, whatever is drawn, with the question."""
        question = words * longest_name + len(equals) + len(parts.values[0])
        return (length + 1 - len(parts.start) - question) // (question + len(end))

    words = 1
    while pairs_of(words) * _KEYS_TO_SPARE > len(parts.names) ** words:
        words += 1
    count = pairs_of(words)
    if count < 2:
        raise UserError(f"rows of length={length} are too short for two pairs: raise it.")

    def row(rng: np.random.Generator, depth: float) -> RecallExample:
        numbers = rng.choice(len(parts.names) ** words, size=count, replace=False)
        keys = [_key(int(number), parts.names, words) for number in numbers]
        values = parts.draw_values(rng, count)
        asked = round(depth * (count - 1))
        tokens = [*parts.start.tolist()]
        for key, value in zip(keys, values, strict=True):
            tokens += [*key, *equals, *value, *end]
        tokens += [*keys[asked], *equals]
        answers = len(tokens) + np.arange(len(values[asked]))
        return RecallExample(np.array([*tokens, *values[asked]], np.int32), answers, depth)

    return [
        row(row_rng(seed, index), depth)
        for index, depth in enumerate(np.repeat(np.asarray(depths, float), per_depth).tolist())
    ]


@dataclasses.dataclass(frozen=True)
class _Question:
    """before: the tokens up to the answer. answer: its tokens."""

    before: list[int]
    answer: list[int]


def _row(
    parts: _Parts,
    rng: np.random.Generator,
    filler: Filler,
    length: int,
    inserts: Sequence[tuple[float, list[int]]],
    questions: Sequence[_Question],
    end: list[int],
    counted: int | None = None,
) -> RecallExample:
    """A text of length + 1 tokens with insertions, and questions with their answers behind it, of
    which the last `counted` count; None: all."""
    closing: list[int] = []
    answers: list[int] = []
    for number, question in enumerate(questions):
        closing += [*(end if number else ()), *question.before]
        if counted is None or number >= len(questions) - counted:
            answers += range(len(closing), len(closing) + len(question.answer))
        closing += question.answer
    taken = len(parts.start) + sum(len(tokens) for _, tokens in inserts) + len(closing)
    if taken > length:
        raise UserError(
            f"rows of length={length} are too short: with this tokenizer what is to be found, and "
            f"the questions, take {taken} tokens. Raise it, or ask for less."
        )
    text = filler.draw(rng, length + 1 - taken)
    sentences = [(d, Sentence(np.array(ids), np.zeros(len(ids)))) for d, ids in inserts]
    before = assemble(parts.start, text, 0.0, sentences).tokens
    tokens = np.concatenate([before, closing]).astype(np.int32)
    return RecallExample(tokens, len(before) + np.array(answers), None)


def _key(number: int, names: Sequence[list[int]], words: int) -> list[int]:
    """The number in base len(names), its digits written as names."""
    tokens: list[int] = []
    for _ in range(words):
        number, digit = divmod(number, len(names))
        tokens += names[digit]
    return tokens


def _check_names(parts: _Parts, count: int, what: str) -> None:
    if count > len(parts.names):
        raise UserError(f"{count} {what} are more than the {len(parts.names)} names that there are")
