"""The document, its cutting from long texts, and the side of the split that it falls on."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterable, Iterator

# A text of up to WHOLE characters is one document; a longer one is cut into documents of about
# CUT. Without the cut a corpus of one file would have no second document to hold out.
WHOLE = 64 * 1024
CUT = 16 * 1024

_BLANK_LINE = re.compile(r"\n[ \t\r]*\n")


@dataclasses.dataclass(frozen=True)
class Document:
    """text: the whole text, never empty. name: where it comes from, for messages."""

    text: str
    name: str


def cut_text(pieces: Iterable[str]) -> Iterator[str]:
    """Cuts a streamed text into documents that concatenate to it again.

    A cut falls between CUT and 2 CUT characters: at the first blank line, else at the last line
    end, else at CUT.
    """
    buffer = ""
    is_long = False
    for piece in pieces:
        buffer += piece
        is_long = is_long or len(buffer) > WHOLE
        start = 0
        while is_long and len(buffer) - start > 2 * CUT:
            end = _cut_point(buffer, start)
            yield buffer[start:end]
            start = end
        buffer = buffer[start:]
    if buffer:
        yield buffer


def _cut_point(text: str, start: int) -> int:
    earliest, latest = start + CUT, start + 2 * CUT
    blank = _BLANK_LINE.search(text, earliest, latest)
    if blank:
        return blank.end()
    line_end = text.rfind("\n", earliest, latest)
    return earliest if line_end == -1 else line_end + 1


def split_hash(text: str) -> float:
    """A hash of the text, uniform in [0, 1).

    It depends on the text alone: not on the order, the name or the other documents. So equal
    documents get equal hashes, and documents that are added later move no other.
    """
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48  # 48 bits, so that the quotient stays below 1


def is_validation(text: str, fraction: float) -> bool:
    """Whether a document falls in the validation split, which holds `fraction` of the hashes."""
    return split_hash(text) < fraction
