"""Where documents come from: the embedded corpus, files, folders, Hugging Face datasets."""

from __future__ import annotations

import dataclasses
import glob
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from llm_jax.data.documents import Document
from llm_jax.data.readers import (
    EXTENSIONS,
    READERS,
    TEXT,
    Malformed,
    Record,
    Row,
    format_of,
    row_document,
)
from llm_jax.data.stdlib import stdlib_documents, stdlib_identity
from llm_jax.errors import UserError, did_you_mean

__all__ = [
    "Document",
    "ReadCounts",
    "SourceConfig",
    "count_malformed",
    "nothing_read",
    "read_documents",
    "read_records",
    "source_identity",
]

STDLIB = "stdlib"
STDLIB_EXAMPLES = "stdlib:"  # before the names of embedded examples
ARITHMETIC = "arithmetic:"  # before the names of generated problems
HUGGING_FACE = "hf:"


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """Which text.

    source: "stdlib" (the embedded corpus); "stdlib:NAME" (rows made of it, with the names of
      `stdlib_examples.EXAMPLES`); "arithmetic:TASK" or "arithmetic:TASK-DIGITS" (generated
      problems, see `arithmetic`); a file; a folder, of which all files of known formats are read;
      a glob pattern; "hf:NAME" or "hf:NAME:CONFIG", a Hugging Face dataset; a folder that the
      `datasets` library saved.
    format: "text", "jsonl", "parquet" or "array_record"; None goes by the file's extension. For
      a folder it chooses the files.
    text_field: the field or column that holds the text of a row.
    split: the split of a Hugging Face dataset.
    malformed: whether a row without text ends the run or is skipped and counted.
    """

    source: str = STDLIB
    format: str | None = None
    text_field: str = "text"
    split: str = "train"
    malformed: Literal["error", "skip"] = "error"


@dataclasses.dataclass
class ReadCounts:
    """What reading a source met, filled while it is read.

    documents: documents, or examples, yielded. skipped: malformed rows left out. empty: rows and
    files left out because their text is white space, or because they teach nothing. first_skipped:
    where and why the first one was skipped.
    """

    documents: int = 0
    skipped: int = 0
    empty: int = 0
    first_skipped: str | None = None


def read_documents(config: SourceConfig, counts: ReadCounts | None = None) -> Iterator[Document]:
    """Streams the documents of a source, in an order that depends on its files' names alone.

    Raises:
      UserError: no such source; a file that cannot be read; a malformed row, unless the config
        skips those; a source without any document. It is raised while reading.
    """
    counts = ReadCounts() if counts is None else counts
    for document in _documents(config):
        if isinstance(document, Malformed):
            count_malformed(document, config, counts)
        elif document.text.isspace() or not document.text:
            counts.empty += 1
        else:
            counts.documents += 1
            yield document
    if not counts.documents:
        raise nothing_read("document", config, counts)


def read_records(config: SourceConfig) -> Iterator[Row]:
    """Streams the rows of a source with all their fields, in the order of `read_documents`.

    Plain text comes as the one field "text".

    Raises:
      UserError: no such source, or a file that cannot be read. It is raised while reading.
    """
    yield from _records(config, None)


def count_malformed(row: Malformed, config: SourceConfig, counts: ReadCounts) -> None:
    """Counts a malformed row as skipped.

    Raises:
      UserError: the config does not skip those.
    """
    if config.malformed == "error":
        raise UserError(f"{row.where}: {row.why}; mend it, or set data.malformed=skip.")
    counts.skipped += 1
    counts.first_skipped = counts.first_skipped or f"{row.where}: {row.why}"


def nothing_read(what: str, config: SourceConfig, counts: ReadCounts) -> UserError:
    """The error of a source that was read to its end and held no `what`."""
    reason = f"{counts.empty} rows were empty and {counts.skipped} malformed"
    first = f" ({counts.first_skipped})" if counts.first_skipped else ""
    return UserError(f"source={config.source!r} holds no {what}: {reason}{first}.")


def source_identity(config: SourceConfig) -> dict[str, Any]:
    """JSON-able values that change when the source's documents do.

    Files are told apart by path, size and time of change. A Hugging Face dataset by name only.

    Raises:
      UserError: no such source.
    """
    identity: dict[str, Any] = dataclasses.asdict(config)
    if config.source == STDLIB:
        return identity | {"stdlib": stdlib_identity()}
    if config.source.startswith(STDLIB_EXAMPLES):
        from llm_jax.data.stdlib_examples import EXAMPLES_VERSION

        return identity | {"stdlib": stdlib_identity(), "examples_version": EXAMPLES_VERSION}
    if config.source.startswith(ARITHMETIC):
        from llm_jax.data.arithmetic import ARITHMETIC_VERSION

        return identity | {"arithmetic_version": ARITHMETIC_VERSION}
    if config.source.startswith(HUGGING_FACE):
        return identity
    path = Path(config.source).expanduser()
    files = _files_under(path) if _is_saved_dataset(path) else [p for p, _ in _files(config)]
    stats = [(str(path.resolve()), path.stat()) for path in files]
    return identity | {"files": [[name, s.st_size, s.st_mtime_ns] for name, s in stats]}


def _documents(config: SourceConfig) -> Iterator[Document | Malformed]:
    for row in _records(config, config.text_field):
        if isinstance(row, Record):
            yield row_document(row.fields, config.text_field, row.where)
        else:
            yield row


def _records(config: SourceConfig, field: str | None) -> Iterator[Row]:
    """The rows, of which one field is wanted, or with None all: see `readers.Reader`."""
    if config.source == STDLIB:
        return (Record({field or TEXT: d.text}, d.name) for d in stdlib_documents())
    if config.source.startswith(STDLIB_EXAMPLES):
        return _numbered(config.source, _stdlib_rows(config.source))
    if config.source.startswith(ARITHMETIC):
        from llm_jax.data.arithmetic import arithmetic_rows

        return _numbered(config.source, arithmetic_rows(config.source.removeprefix(ARITHMETIC)))
    if config.source.startswith(HUGGING_FACE) or _is_saved_dataset(Path(config.source)):
        return _hugging_face_rows(config)
    return itertools.chain.from_iterable(
        READERS[format](path, field) for path, format in _files(config)
    )


def _numbered(source: str, rows: Iterable[dict[str, str]]) -> Iterator[Row]:
    for number, fields in enumerate(rows, start=1):
        yield Record(dict(fields), f"{source}:{number}")


def _stdlib_rows(source: str) -> Iterator[dict[str, str]]:
    from llm_jax.data.stdlib_examples import EXAMPLES

    name = source.removeprefix(STDLIB_EXAMPLES)
    if name not in EXAMPLES:
        known = (STDLIB, *(f"{STDLIB_EXAMPLES}{name}" for name in EXAMPLES))
        raise UserError(f"source={source!r} is unknown.{did_you_mean(source, known)}")
    return EXAMPLES[name]()


def _files(config: SourceConfig) -> list[tuple[Path, str]]:
    """The files of a source with their formats, sorted by name."""
    if config.format is not None and config.format not in READERS:
        raise UserError(
            f"format={config.format!r} is unknown.{did_you_mean(config.format, READERS)}"
        )
    path = Path(config.source).expanduser()
    if path.is_file():
        format = config.format or format_of(path)
        if format is None:
            raise UserError(
                f"source={config.source!r}: its extension tells no format; set data.format to one "
                f"of {', '.join(READERS)}."
            )
        return [(path, format)]
    if path.is_dir():
        found = [(p, format) for p in _files_under(path) if (format := format_of(p)) is not None]
        found = [(p, format) for p, format in found if config.format in (None, format)]
    elif glob.has_magic(config.source):
        matches = sorted(glob.glob(str(path), recursive=True))
        paths = [p for p in map(Path, matches) if p.is_file()]
        found = [(p, f) for p in paths if (f := config.format or format_of(p)) is not None]
    else:
        raise UserError(f"source={config.source!r} does not exist.{_suggestion(path)}")
    if not found:
        kinds = [config.format] if config.format else list(EXTENSIONS)
        known = ", ".join(extension for kind in kinds for extension in EXTENSIONS[kind])
        raise UserError(f"source={config.source!r} holds no file of a known format ({known}).")
    return found


def _files_under(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def _suggestion(path: Path) -> str:
    parent = path.parent
    if not parent.is_dir():
        return f" There is no folder {str(parent)!r} either."
    return did_you_mean(path.name, (sibling.name for sibling in parent.iterdir()))


def _is_saved_dataset(path: Path) -> bool:
    """Whether `save_to_disk` of the `datasets` library wrote this folder."""
    path = path.expanduser()
    return (path / "dataset_dict.json").exists() or (path / "state.json").exists()


def _hugging_face_rows(config: SourceConfig) -> Iterator[Row]:
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"source={config.source!r} needs the package datasets: pip install 'llm_jax[hf]'"
        ) from error
    try:
        if config.source.startswith(HUGGING_FACE):
            name, _, subset = config.source.removeprefix(HUGGING_FACE).partition(":")
            rows = datasets.load_dataset(name, subset or None, split=config.split, streaming=True)
        else:
            rows = datasets.load_from_disk(str(Path(config.source).expanduser()))
            if isinstance(rows, dict):
                if config.split not in rows:
                    raise UserError(
                        f"source={config.source!r} has no split {config.split!r}."
                        f"{did_you_mean(config.split, rows)}"
                    )
                rows = rows[config.split]
        for number, row in enumerate(rows, start=1):
            yield Record(row, f"{config.source}:{number}")
    except UserError:
        raise
    except Exception as error:  # the library raises its own, the hub's and the network's
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"source={config.source!r}, split={config.split!r} cannot be read: {reason}."
        ) from error
