"""What is left out of texts that models wrote: garbage, and what was there in other words."""

from __future__ import annotations

import unicodedata

from llm_jax.errors import UserError
from llm_jax.generation.text import UNDECIDED

_SHINGLE = 5  # characters
_PERMUTATIONS = 128  # of a sketch: the estimated similarity is 0.04 off, give or take
_INDEXED = 0.9  # the highest threshold that the index is given; it is not made for those close to 1

# Characters that no text for people has: control, private use, lone surrogates, unassigned.
_NO_TEXT = ("Cc", "Co", "Cs", "Cn")


def is_garbled(text: str) -> bool:
    """Whether bytes in it formed no character, or characters in it belong to no text."""
    return UNDECIDED in text or any(
        unicodedata.category(character) in _NO_TEXT and not character.isspace()
        for character in text
    )


class NearDuplicates:
    """The texts that have come so far, to find like ones.

    Alike are texts whose sets of five characters, of lower-case letters and single spaces, have a
    Jaccard similarity of at least the threshold, as sketches by MinHash estimate it
    (Broder 1997, "On the resemblance and containment of documents").
    """

    def __init__(self, threshold: float):
        """
        Args:
          threshold: in (0, 1].

        Raises:
          UserError: the package datasketch is missing.
        """
        try:
            import datasketch
        except ImportError as error:
            raise UserError(
                "near-duplicates are found by the package datasketch: pip install "
                "'llm_jax[synthesis]'"
            ) from error
        self._threshold, self._library = threshold, datasketch
        # What the index finds is compared in full, so it may find too much, but not too little.
        findable = min(threshold, _INDEXED)
        self._index = datasketch.MinHashLSH(findable, _PERMUTATIONS, weights=(0.1, 0.9))
        self._sketches: list[datasketch.MinHash] = []

    def add(self, text: str) -> bool:
        """Whether the text is like none before it; only such a one counts from now on."""
        sketch = self._library.MinHash(_PERMUTATIONS)
        sketch.update_batch([shingle.encode() for shingle in _shingles(text)])
        near = (self._sketches[place] for place in self._index.query(sketch))
        if any(sketch.jaccard(other) >= self._threshold for other in near):
            return False
        self._index.insert(len(self._sketches), sketch)
        self._sketches.append(sketch)
        return True


def _shingles(text: str) -> set[str]:
    words = " ".join(text.lower().split())
    return {words[i : i + _SHINGLE] for i in range(max(1, len(words) - _SHINGLE + 1))}
