"""One reader a file format: each streams the records and the malformed rows of one file."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from llm_jax.data.documents import Document, cut_text
from llm_jax.errors import UserError

SEPARATOR = "<|endoftext|>"

# Format → file extensions. Text and JSON may end in .gz or .zst on top.
EXTENSIONS: dict[str, tuple[str, ...]] = {
    "text": (".txt", ".text", ".md", ".markdown", ".rst", ".tex"),
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "parquet": (".parquet", ".pq"),
    "array_record": (".array_record", ".arrayrecord"),
}
_COMPRESSED = (".gz", ".zst")
_SHARD = re.compile(r"-\d+-of-\d+$")  # name.array_record-00000-of-00512

_BLOCK = 1024 * 1024  # bytes read at a time
_ROWS = 256  # rows read at a time


@dataclasses.dataclass(frozen=True)
class Record:
    """A row. fields: its values by name. where: file:line or file:row."""

    fields: dict[str, Any]
    where: str


@dataclasses.dataclass(frozen=True)
class Malformed:
    """A row of no use. where: file:line or file:row. why: a clause without full stop."""

    where: str
    why: str


Row = Record | Malformed

# A reader takes the file and the one field that is wanted; None wants all of them. What has no
# fields, such as plain text, comes as the wanted field, or as TEXT.
Reader = Callable[[Path, str | None], Iterator[Row]]
TEXT = "text"


def format_of(path: Path) -> str | None:
    """The format that the file's name tells, or None."""
    name = _SHARD.sub("", path.name.lower())
    for extension in _COMPRESSED:
        name = name.removesuffix(extension)
    return next((f for f, ends in EXTENSIONS.items() if name.endswith(ends)), None)


def read_text(path: Path, field: str | None) -> Iterator[Row]:
    """Plain UTF-8 text: split at SEPARATOR where the file holds one, else `cut_text`.

    Text that is not UTF-8 ends the file with one malformed row.
    """
    with _opening(path) as stream:
        is_separated = _contains(stream, SEPARATOR.encode())
    with _opening(path) as stream:
        try:
            pieces = _decoded(stream)
            texts = _split(pieces) if is_separated else cut_text(pieces)
            for index, text in enumerate(texts):
                yield Record({field or TEXT: text}, f"{path}#{index}" if index else str(path))
        except _NotUtf8 as error:
            yield Malformed(f"{path}:{error.line}", f"byte {error.byte} is not UTF-8")


def read_jsonl(path: Path, field: str | None) -> Iterator[Row]:
    """JSON objects, one a line; blank lines are ignored.

    A .json file may be one array of objects instead, which is read into memory as a whole.
    """
    del field  # a line is parsed as a whole anyway
    with _opening(path) as stream:
        for number, line in enumerate(stream, start=1):
            if number == 1 and line.lstrip().startswith(b"[") and ".json" in path.suffixes:
                yield from _json_array(line + stream.read(), path)
            elif line.strip():
                yield _json_record(line, "line", f"{path}:{number}")


def read_parquet(path: Path, field: str | None) -> Iterator[Row]:
    """The rows of a Parquet file, of which only the columns that are wanted are read."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{path} needs the package pyarrow: pip install pyarrow") from error
    with _reading(path, pyarrow.ArrowException):
        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
        if field is not None and field not in names:
            raise UserError(f"{path}: {no_field(field, names)}.")
        number = 0
        for batch in file.iter_batches(batch_size=_ROWS, columns=[field] if field else None):
            for fields in batch.to_pylist():
                number += 1
                yield Record(fields, f"{path}:{number}")


def read_array_record(path: Path, field: str | None) -> Iterator[Row]:
    """Records that are UTF-8 texts, or JSON objects where the file's first record is one."""
    try:
        from array_record.python import array_record_module
    except ImportError as error:
        raise UserError(f"{path} needs the package: pip install array_record") from error
    with _reading(path, RuntimeError, ValueError, IndexError):
        reader = array_record_module.ArrayRecordReader(str(path))
        count = reader.num_records()
        is_json = count > 0 and _is_json_object(reader.read([0])[0])
        for start in range(0, count, _ROWS):
            records = reader.read(list(range(start, min(start + _ROWS, count))))
            for number, record in enumerate(records, start=start + 1):
                where = f"{path}:{number}"
                if is_json:
                    yield _json_record(record, "record", where)
                else:
                    yield Record({field or TEXT: record}, where)
        reader.close()


READERS: dict[str, Reader] = {
    "text": read_text,
    "jsonl": read_jsonl,
    "parquet": read_parquet,
    "array_record": read_array_record,
}


def row_document(fields: dict[str, Any], text_field: str, where: str) -> Document | Malformed:
    """The document of a row of fields, or why there is none."""
    if text_field not in fields:
        return Malformed(where, no_field(text_field, fields))
    try:
        return Document(unicode_text(fields[text_field], text_field), where)
    except ValueError as error:
        return Malformed(where, str(error))


def unicode_text(value: Any, field: str) -> str:
    """The text that a field holds as a string, or as the bytes of UTF-8.

    Raises:
      ValueError: why the value is no text, a clause without full stop.
    """
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{field!r} is not UTF-8 text ({error})") from None
    if not isinstance(value, str):
        raise ValueError(f"{field!r} is {type(value).__name__}, a string is wanted")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can write half of a surrogate pair
        raise ValueError(f"{field!r} is not Unicode text ({error})") from None
    return value


def no_field(field: str, fields: Iterable[str]) -> str:
    """Why a row without the field is of no use, a clause without full stop."""
    return f"the row has no field {field!r}, it has {', '.join(map(repr, fields)) or 'none'}"


def _json_array(content: bytes, path: Path) -> Iterator[Row]:
    try:
        rows = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        yield Malformed(str(path), f"the file is not JSON ({error})")
        return
    for number, row in enumerate(rows, start=1):
        yield _record(row, f"{path}:row {number}")


def _json_record(content: bytes, what: str, where: str) -> Row:
    try:
        return _record(json.loads(content.decode("utf-8-sig")), where)
    except (ValueError, RecursionError) as error:
        return Malformed(where, f"the {what} is not JSON ({error})")


def _record(row: Any, where: str) -> Row:
    if isinstance(row, dict):
        return Record(row, where)
    return Malformed(where, f"the row is {type(row).__name__}, an object with fields is wanted")


def _is_json_object(record: bytes) -> bool:
    try:
        return isinstance(json.loads(record), dict)
    except (ValueError, RecursionError):
        return False


@contextlib.contextmanager
def _reading(path: Path, *errors: type[Exception]) -> Iterator[None]:
    expected: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error, *errors)
    try:
        yield
    except expected as error:
        reason = str(error).rstrip(". ") or type(error).__name__
        raise UserError(f"{path} cannot be read: {reason}.") from error


@contextlib.contextmanager
def _opening(path: Path) -> Iterator[BinaryIO]:
    """The decompressed bytes of a file."""
    if path.suffix == ".zst":
        try:
            import zstandard
        except ImportError as error:
            raise UserError(f"{path} needs the package: pip install zstandard") from error
        with _reading(path, zstandard.ZstdError), open(path, "rb") as file:
            decompressor = zstandard.ZstdDecompressor()
            yield io.BufferedReader(_Frames(file, decompressor.decompressobj), _BLOCK)
    elif path.suffix == ".gz":
        with _reading(path), gzip.open(path, "rb") as stream:
            yield cast(BinaryIO, stream)
    else:
        with _reading(path), open(path, "rb") as file:
            yield file


class _Frames(io.RawIOBase):
    """The decompressed bytes of a file of one or more Zstandard frames.

    The library's own stream reader takes a truncated file for a shorter one.
    """

    def __init__(self, file: BinaryIO, new_frame: Callable[[], Any]):
        self._file, self._new_frame = file, new_frame
        self._frame: Any = None  # None between frames
        self._input = b""
        self._output = memoryview(b"")  # a view: slicing off what was read copies nothing

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            self._input = self._input or self._file.read(_BLOCK // 16)
            if not self._input:
                if self._frame is not None:
                    raise EOFError("the file ends within a Zstandard frame")
                return 0
            self._frame = self._frame or self._new_frame()
            self._output, self._input = memoryview(self._frame.decompress(self._input)), b""
            if self._frame.eof:
                self._input, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._output))
        buffer[:count] = self._output[:count]
        self._output = self._output[count:]
        return count


def _contains(stream: BinaryIO, wanted: bytes) -> bool:
    tail = b""
    while block := stream.read(_BLOCK):
        window = tail + block
        if wanted in window:
            return True
        tail = window[1 - len(wanted) :]
    return False


class _NotUtf8(Exception):
    """byte: offset in the file from 0. line: from 1."""

    def __init__(self, byte: int, line: int):
        super().__init__(byte, line)
        self.byte, self.line = byte, line


def _decoded(stream: BinaryIO) -> Iterator[str]:
    """The characters of a stream, without the byte order mark."""
    byte, line, rest = 0, 1, b""
    while True:
        block = stream.read(_BLOCK)
        data = rest + block
        try:
            text, rest = data.decode("utf-8"), b""
        except UnicodeDecodeError as error:
            if not block or error.reason != "unexpected end of data":
                raise _NotUtf8(
                    byte + error.start, line + data[: error.start].count(b"\n")
                ) from None
            text, rest = data[: error.start].decode("utf-8"), data[error.start :]
        yield text.removeprefix("\ufeff") if byte == 0 else text
        byte += len(data) - len(rest)
        line += text.count("\n")
        if not block:
            return


def _split(pieces: Iterable[str]) -> Iterator[str]:
    """The documents between separators, without the line ends next to those."""
    buffer = ""
    for piece in pieces:
        *whole, buffer = (buffer + piece).split(SEPARATOR)
        for text in whole:
            yield text.strip("\r\n")
    yield buffer.strip("\r\n")
