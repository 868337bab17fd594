"""The one exception for bad input, and what becomes one."""

import contextlib
import difflib
import errno
from collections.abc import Iterable, Iterator
from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT)
_CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EIO)


class UserError(Exception):
    """Bad input: the message is one line that says what is wrong and how to mend it.

    The command line prints the message without a traceback and exits with status 2.
    """


def one_line(error: BaseException, longest: int = 300) -> str:
    """The error in one line that is not too long; what a UserError says, as it says it."""
    text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())[:longest]


def did_you_mean(word: str, candidates: Iterable[str]) -> str:
    """Returns " Did you mean 'x'?" for the closest candidate, or the short list of all of them."""
    candidates = sorted(candidates)
    close = difflib.get_close_matches(word, candidates, n=1, cutoff=0.6)
    if close:
        return f" Did you mean {close[0]!r}?"
    if candidates and len(candidates) <= 24:
        return f" Known: {', '.join(candidates)}."
    return ""


@contextlib.contextmanager
def disk_errors(folder: Path, mend: str) -> Iterator[None]:
    """Turns a disk that is full or closed to us into one line that ends with the sentence `mend`.

    Raises:
      UserError: a write into `folder` failed for such a reason; a full disk is also known by the
        errors that libraries make of it.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            number = cause.errno if isinstance(cause, OSError) else None
            if number in _FULL or "No space left on device" in str(cause):
                what = getattr(cause, "filename", None) or folder
                raise UserError(f"the disk is full: {what} could not be written. {mend}") from error
            cause = cause.__cause__ or cause.__context__
        # The error itself only: one that was caught on the way says nothing of this folder.
        if isinstance(error, OSError) and error.errno in _CLOSED:
            raise UserError(f"{folder} cannot be written: {error}. {mend}") from error
        raise
