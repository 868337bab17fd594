"""A text file as windows of a run's length, each a row of a batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llm_jax.errors import UserError

if TYPE_CHECKING:
    from llm_jax.runs import LoadedRun
    from llm_jax.types import Batch

BATCH_TOKENS = 4096  # of the windows that are read at once


@dataclasses.dataclass(frozen=True)
class Window:
    """tokens: those from place `begin` of the text on. fresh: the place in the text of the first of
    them that is to be predicted here: no window before has."""

    tokens: Sequence[int]
    begin: int
    fresh: int


@dataclasses.dataclass(frozen=True)
class WindowedText:
    """A text as a run reads it.

    tokens: of the whole text, behind the `start` tokens that a document begins with. length: the
    trained one of the run, that of a window at most. replaced: how many times bytes of the file
    that are not UTF-8 became U+FFFD.
    """

    tokens: list[int]
    start: int
    text: str
    length: int
    windows: list[Window]
    replaced: int

    def describe(self) -> str:
        """How the text is cut, a sentence."""
        count, length = f"{len(self.tokens):,} tokens", f"the trained length {self.length:,}"
        if len(self.windows) == 1:
            return f"{count} in one window, of {length} at most."
        return (
            f"{count} are more than {length}: cut into {len(self.windows):,} windows that overlap "
            f"by half, so that every token past the first window is predicted from at least "
            f"{self.length // 2:,} before it."
        )


def read_windows(run: LoadedRun, path: str) -> WindowedText:
    """Reads a text as one document of the run, cut to the length that it was trained at.

    Bytes that are not UTF-8 become U+FFFD, and are counted.

    Raises:
      UserError: no such file, or one that is too short to predict anything.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"--text={path} cannot be read: {error.strerror}.") from error
    text = content.decode("utf-8-sig", errors="replace")
    start = list(run.tokenizer.document_start)
    tokens = [*start, *run.tokenizer.encode(text)]
    if len(tokens) < 2:
        raise UserError(f"--text={path} is too short: two tokens are needed at least.")
    length = min(run.meta.get("length", run.model.max_length), run.model.max_length)
    return WindowedText(
        tokens=tokens,
        start=len(start),
        text=text,
        length=length,
        windows=list(cut(tokens, length)),
        replaced=text.count("\N{REPLACEMENT CHARACTER}") - content.count(b"\xef\xbf\xbd"),
    )


def cut(tokens: Sequence[int], length: int) -> Iterator[Window]:
    """Windows of `length` tokens; each but the first begins in the middle of the one before."""
    if length < 2:
        raise UserError(f"the run was trained at length {length}, which predicts nothing.")
    yield Window(tokens[:length], 0, 1)
    done = length
    while done < len(tokens):
        end = min(done + max(1, length // 2), len(tokens))
        yield Window(tokens[end - length : end], end - length, done)
        done = end


def batches(text: WindowedText) -> Iterator[tuple[list[Window], Batch]]:
    """The windows in batches of one shape, of about BATCH_TOKENS; empty rows fill the last one."""
    from llm_jax.evals.batching import sequence_batch

    longest = max(len(window.tokens) for window in text.windows)
    width = min(text.length, max(32, 1 << (longest - 1).bit_length()))  # few shapes compile
    rows = min(max(1, BATCH_TOKENS // width), len(text.windows))
    for first in range(0, len(text.windows), rows):
        windows = text.windows[first : first + rows]
        padding: list[Sequence[int]] = [()] * (rows - len(windows))
        yield windows, sequence_batch([*(window.tokens for window in windows), *padding], width)
