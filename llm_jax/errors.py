"""The one exception for bad input."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input: the message is one line that says what is wrong and how to mend it.

    The command line prints the message without a traceback and exits with status 2.
    """


def did_you_mean(word: str, candidates: Iterable[str]) -> str:
    """Returns " Did you mean 'x'?" for the closest candidate, or the short list of all of them."""
    candidates = sorted(candidates)
    close = difflib.get_close_matches(word, candidates, n=1, cutoff=0.6)
    if close:
        return f" Did you mean {close[0]!r}?"
    if candidates and len(candidates) <= 24:
        return f" Known: {', '.join(candidates)}."
    return ""
