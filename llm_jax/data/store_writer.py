"""The files of a token store, written document after document."""

from __future__ import annotations

import array
import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from llm_jax.data.sources import ReadCounts

TOKENS, OFFSETS, TRAINED, META = "tokens.bin", "offsets.bin", "trained.bin", "meta.json"
_BUFFER = 1024 * 1024  # bytes written at a time


@dataclasses.dataclass(frozen=True)
class StoreMeta:
    """What a store holds.

    documents, tokens: counts, bos and eos included. bytes: UTF-8 bytes of the texts.
    dtype: of the tokens on disk. source: as the config names it.
    tokenizer: the fingerprint of the tokenizer. skipped, empty: rows of the whole source (all
    splits) that were malformed or gave nothing. masked: whether the store says which tokens are
    trained on. columns: name → dtype of the numbers kept for each document. fingerprint: of all of
    these.
    """

    documents: int
    tokens: int
    bytes: int
    dtype: str
    source: str
    tokenizer: str
    skipped: int
    empty: int
    fingerprint: str
    masked: bool = False
    columns: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Entry:
    """A document for a store.

    ids: its tokens. hash_: see `documents.split_hash`; decides the split. text_bytes: UTF-8 bytes
    of its text. trained: for each token whether a loss counts it; None: all. numbers: one for each
    column of the store.
    """

    ids: Sequence[int] | np.ndarray
    hash_: float
    text_bytes: int
    trained: Sequence[bool] | np.ndarray | None = None
    numbers: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a store holds for each token and document."""

    dtype: str
    masked: bool
    columns: dict[str, str]


class StoreWriter:
    """Writes one store, document after document; a context that closes its files."""

    def __init__(self, directory: Path, layout: Layout):
        directory.mkdir()
        self.directory, self.layout = directory, layout
        # Compact arrays: a corpus may have a hundred million documents.
        self.offsets = array.array("q", [0])
        self.hashes = array.array("d")
        self.text_bytes = array.array("q")
        self._numbers = {name: array.array("d") for name in layout.columns}
        self._digest = hashlib.blake2b(digest_size=8)
        self._tokens = open(directory / TOKENS, "wb", buffering=_BUFFER)  # noqa: SIM115, see __exit__
        self._trained = (
            open(directory / TRAINED, "wb", buffering=_BUFFER) if layout.masked else None  # noqa: SIM115
        )

    def __len__(self) -> int:
        return len(self.hashes)

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for file in filter(None, (self._tokens, self._trained)):
            # After a failed write, closing would try to write the rest and fail again.
            with contextlib.suppress(OSError) if kind else contextlib.nullcontext(), file:
                _sync(file)

    def add(self, entry: Entry) -> None:
        self._put(self._tokens, np.asarray(entry.ids, self.layout.dtype).tobytes())
        if self._trained is not None:
            assert entry.trained is not None and len(entry.trained) == len(entry.ids)
            self._put(self._trained, np.asarray(entry.trained, np.uint8).tobytes())
        self.offsets.append(self.offsets[-1] + len(entry.ids))
        self.hashes.append(entry.hash_)
        self.text_bytes.append(entry.text_bytes)
        for name, numbers in self._numbers.items():
            numbers.append(entry.numbers[name])

    def entries(self, folder: Path) -> Iterator[Entry]:
        """What was added, read back from `folder`, to which the finished files were moved."""
        total = self.offsets[-1]
        tokens = mapped(folder / TOKENS, self.layout.dtype, total)
        trained = mapped(folder / TRAINED, "uint8", total) if self.layout.masked else None
        for index, hash_ in enumerate(self.hashes):
            span = slice(self.offsets[index], self.offsets[index + 1])
            yield Entry(
                tokens[span],
                hash_,
                self.text_bytes[index],
                None if trained is None else trained[span],
                {name: numbers[index] for name, numbers in self._numbers.items()},
            )

    def write_meta(self, source: str, tokenizer: str, counts: ReadCounts) -> None:
        """Finishes the store: boundaries and columns, and last the description that makes it
        whole."""
        files = {OFFSETS: self.offsets.tobytes()}
        for name, dtype in self.layout.columns.items():
            files[column_path(self.directory, name).name] = (
                np.asarray(self._numbers[name]).astype(dtype).tobytes()
            )
        for content in files.values():
            self._digest.update(content)
        meta = StoreMeta(
            documents=len(self),
            tokens=self.offsets[-1],
            bytes=sum(self.text_bytes),
            dtype=self.layout.dtype,
            source=source,
            tokenizer=tokenizer,
            skipped=counts.skipped,
            empty=counts.empty,
            fingerprint=self._digest.hexdigest(),
            masked=self.layout.masked,
            columns=self.layout.columns,
        )
        files[META] = (json.dumps(dataclasses.asdict(meta), indent=2) + "\n").encode()
        for name, content in files.items():
            with open(self.directory / name, "wb") as file:
                file.write(content)
                _sync(file)

    def _put(self, file: BinaryIO, content: bytes) -> None:
        file.write(content)
        self._digest.update(content)


def column_path(directory: Path, name: str) -> Path:
    return directory / f"{name}.bin"


def mapped(path: Path, dtype: str, count: int) -> np.ndarray:
    size = count * np.dtype(dtype).itemsize
    if path.stat().st_size != size:
        raise ValueError(f"{path.name} has {path.stat().st_size} bytes, {size} are wanted")
    return np.memmap(path, dtype, "r", shape=(count,)).view(np.ndarray)


def _sync(file: BinaryIO) -> None:
    """Sees to it that the content is on the disk before the folder gets its final name."""
    file.flush()
    os.fsync(file.fileno())
