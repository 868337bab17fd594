"""The text of a continuation while it grows: whole characters, and where a stop string begins."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from llm_jax.data.tokenizers import Tokenizer
from llm_jax.errors import UserError

# What bytes that form no character decode to; at the end of a text they may become one yet.
UNDECIDED = "\N{REPLACEMENT CHARACTER}"


def check_stop_strings(stop_strings: Sequence[str]) -> None:
    """Raises UserError for an empty stop string, which every text contains."""
    if isinstance(stop_strings, str):
        raise TypeError("stop_strings is one string: give a sequence of strings")
    if not all(stop_strings):
        raise UserError("a stop string is empty: leave it out, or give some text.")


def whole_text(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    """The text of the tokens without an unfinished character at its end; specials not shown."""
    return tokenizer.decode(tokens).rstrip(UNDECIDED)


def before_stop(text: str, stop_strings: Sequence[str]) -> str:
    """The text up to where the first stop string in it begins; all of it where there is none."""
    places = [text.find(stop) for stop in stop_strings]
    return text[: min((place for place in places if place >= 0), default=None)]


def stop_length(
    tokenizer: Tokenizer, tokens: Sequence[int], stop_strings: Sequence[str], known: int
) -> int | None:
    """The number of tokens with which a stop string is complete; None where none is.

    Args:
      tokenizer: what the tokens are of.
      tokens: the continuation so far.
      stop_strings: none empty.
      known: tokens at the start that are known to complete no stop string.
    """
    if not _holds(whole_text(tokenizer, tokens), stop_strings):
        return None
    lengths = range(known + 1, len(tokens))
    shorter = (n for n in lengths if _holds(whole_text(tokenizer, tokens[:n]), stop_strings))
    return next(shorter, len(tokens))


def pieces(texts: Iterator[str], stop_strings: Sequence[str]) -> Iterator[str]:
    """What each text adds to the one before it, up to the first stop string.

    An end that may be the beginning of a stop string is held back until the next text decides it,
    or until there is none.

    Args:
      texts: each begins with the one before it.
      stop_strings: none empty; the texts may end with one.

    Returns:
      The pieces, none empty; joined they are `before_stop` of the last text.
    """
    shown, text = 0, ""
    for text in texts:
        text = before_stop(text, stop_strings)
        decided = len(text) - _open_end(text, stop_strings)
        if decided > shown:
            yield text[shown:decided]
            shown = decided
    if text[shown:]:
        yield text[shown:]


def lead(tokenizer: Tokenizer, prompt: Sequence[int], tokens: Sequence[int]) -> str:
    """The text of the prompt as it stands before the continuation.

    Some tokenizers drop the space before the first word of a text: after a prompt it is there.
    """
    text = tokenizer.decode([*prompt, *tokens])
    return text[: len(text) - len(tokenizer.decode(tokens))]


def _holds(text: str, stop_strings: Sequence[str]) -> bool:
    return any(stop in text for stop in stop_strings)


def _open_end(text: str, stop_strings: Sequence[str]) -> int:
    """The length of the longest end of the text that is the beginning of a stop string."""
    longest = max(map(len, stop_strings), default=0)
    for length in range(min(len(text), longest), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stop_strings):
            return length
    return 0
