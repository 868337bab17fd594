"""What rows are made of in which something is to be found: words, real text, and their assembly.

Rows are assembled from token ids, each part encoded on its own, so a part is the same number of
tokens wherever it stands, whatever the tokenizer merges.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from llm_jax.errors import UserError

# Short common words of prose and of manuals: most are few tokens to a small tokenizer.
_WORDS = (
    "action address amount animal answer apple argument array attribute author bank base beach "
    "bird block board body book border bottom box branch bridge brother buffer button byte "
    "cache call candle card case chain change chapter character child choice circle city class "
    "client clock cloud code color column command comment copy corner country course cover "
    "crown current data date default detail device digit door dream earth edge element end "
    "engine entry error event example exception face family farm father field figure file "
    "filter fire flag floor flower folder foot form frame friend function garden gate glass "
    "gold grain group hand handle head header heart hill history home horse house image index "
    "input island item key king label lake language leaf letter level library light line link "
    "list lock machine map mark market match matter message method middle mind mode module "
    "money month moon morning mother mountain mouth music name nature night node noise north "
    "note number object office order output owner package page paper parser part path pattern "
    "people picture place plan plant player point port position power problem process product "
    "program queen question range rate reason record result river road rock room root row rule "
    "school science screen sea season seed server service set shape ship side sign size sky "
    "snow song sound source south space star start state station stone story stream street "
    "string summer sun system table target task teacher test text thing thread time title token "
    "top tower town track tree type unit user valley value variable version view voice wall "
    "water wave weight west wheel wind window winter word work world writer year"
)
WORDS = tuple(_WORDS.split())


class Sentence(NamedTuple):
    """tokens: int [n]; weights: float [n], the loss weight of each as a target."""

    tokens: np.ndarray
    weights: np.ndarray


def names_and_values(
    tokenizer: Any, names: int, values: int
) -> tuple[list[list[int]], list[list[int]]]:
    """The token ids of different words: at most `names`, the shortest first, and `values`, which
    all have one number of tokens, the smallest that enough words have.

    Args:
      tokenizer: a Tokenizer.

    Raises:
      UserError: no length is that of so many words.
    """
    words = sorted((tokenizer.encode(f" {word}", "after_text") for word in WORDS), key=len)
    lengths = sorted({len(word) for word in words})
    fitting = [n for n in lengths if sum(len(word) == n for word in words) >= values]
    if not fitting:
        raise UserError(
            f"needle.answers={values}: this tokenizer writes no {values} of the words with "
            f"the same number of tokens; lower it."
        )
    chosen = [word for word in words if len(word) == fitting[0]][-values:]
    rest = [word for word in words if word not in chosen]
    return rest[:names], chosen


def assemble(
    start: np.ndarray,
    filler: np.ndarray,
    filler_weight: float,
    inserts: Sequence[tuple[float, Sentence]],
) -> Sentence:
    """A row's beginning: the start, of weight 0, and the filler with sentences inside.

    Args:
      inserts: of each sentence its depth in the filler, in [0, 1]; at the same place of it, those
        that are given first come first.
    """
    filler_weights = np.full(len(filler), filler_weight)
    tokens, weights, begin = [start], [np.zeros(len(start))], 0
    places = [(int(depth * len(filler)), sentence) for depth, sentence in inserts]
    for place, sentence in sorted(places, key=lambda insert: insert[0]):
        tokens += [filler[begin:place], sentence.tokens]
        weights += [filler_weights[begin:place], sentence.weights]
        begin = place
    tokens.append(filler[begin:])
    weights.append(filler_weights[begin:])
    return Sentence(np.concatenate(tokens), np.concatenate(weights))


class Filler:
    """Text of a token store without its special tokens, from any place on, round and round."""

    def __init__(self, store: Any, token_bytes: np.ndarray):
        self._tokens = store.tokens
        self._is_text = token_bytes > 0
        # One look for all rows, so that drawing cannot go round for ever.
        if not any(self._is_text[store.document(i)].any() for i in range(len(store))):
            raise UserError(
                "the token store holds no text for the haystack: check the data source."
            )

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """int32 [count], text tokens from a uniformly drawn place on."""
        total = len(self._tokens)
        begin = int(rng.integers(total))
        found: list[np.ndarray] = []
        missing = count
        while missing:
            stretch = np.asarray(self._tokens[begin : begin + missing], np.int32)
            found.append(stretch[self._is_text[stretch]])
            missing -= len(found[-1])
            begin = (begin + len(stretch)) % total
        return np.concatenate([np.zeros(0, np.int32), *found])


def row_rng(seed: int, index: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=np.array([seed, index], np.uint64)))
