"""The token store: a corpus tokenised once, with the documents' boundaries kept.

A store is a folder: tokens.bin (flat unsigned integers), offsets.bin (int64 [documents + 1]) and
meta.json. Document i is tokens[offsets[i]:offsets[i + 1]] = [bos] + text + [eos], never truncated.
"""

from __future__ import annotations

import array
import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from llm_jax.config import digest
from llm_jax.data.documents import WHOLE, Document, split_hash
from llm_jax.data.sources import ReadCounts, SourceConfig, read_documents, source_identity
from llm_jax.data.tokenizer_base import Tokenizer
from llm_jax.errors import UserError, disk_errors

STORE_VERSION = 1  # part of every cache key: raise it when equal sources give other stores
SPLITS = ("train", "validation")
DISK_MEND = (
    "Mend that, or name another folder for the token cache by data.cache_dir or the environment "
    "variable LLM_JAX_CACHE."
)

_TOKENS, _OFFSETS, _META = "tokens.bin", "offsets.bin", "meta.json"
_BATCH_CHARACTERS = 2 * 1024 * 1024  # tokenised at a time
_BUFFER = 1024 * 1024  # bytes written at a time


@dataclasses.dataclass(frozen=True)
class StoreMeta:
    """What a store holds.

    documents, tokens: counts, bos and eos included. bytes: UTF-8 bytes of the texts.
    dtype: of the tokens on disk. source: as the config names it.
    tokenizer: the fingerprint of the tokenizer. skipped, empty: rows of the whole source (all
    splits) that were malformed or white space. fingerprint: of the tokens and boundaries.
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


class TokenStore:
    """A memory-mapped store. Opening it costs nothing, and so does handing it to a process.

    tokens: uint16 or uint32 [tokens], all documents one after the other, read-only.
    offsets: int64 [documents + 1], where each document starts.
    """

    def __init__(self, directory: str | Path):
        """Opens a store that `build_stores` wrote.

        Raises:
          UserError: the folder holds no whole store.
        """
        self.directory = Path(directory)
        try:
            meta = json.loads((self.directory / _META).read_text(encoding="utf-8"))
            self.meta = StoreMeta(**meta)
            self.tokens = _mapped(self.directory / _TOKENS, self.meta.dtype, self.meta.tokens)
            self.offsets = _mapped(self.directory / _OFFSETS, "int64", self.meta.documents + 1)
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{directory} holds no whole token store: {error}.") from error

    @property
    def fingerprint(self) -> str:
        """A hash of the tokens and the boundaries: equal exactly where these are."""
        return self.meta.fingerprint

    def __len__(self) -> int:
        return self.meta.documents

    def document(self, index: int) -> np.ndarray:
        """uint16 or uint32 [length], [bos] + tokens + [eos]; a view, so copy before writing."""
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenStore, (self.directory,)


def default_cache_dir() -> Path:
    """$LLM_JAX_CACHE, or ~/.cache/llm_jax."""
    return Path(os.environ.get("LLM_JAX_CACHE") or "~/.cache/llm_jax").expanduser()


def build_stores(
    source: SourceConfig,
    tokenizer: Tokenizer,
    *,
    validation_fraction: float,
    cache_dir: str | Path | None = None,
) -> dict[str, TokenStore]:
    """The stores "train" and "validation" of a source, tokenised now or found in the cache.

    A document is for validation where `is_validation` says so. Where it says so of none, the
    document with the smallest hash is held out, so that a small corpus has a validation set.
    The cache is used again while the source's files, its options, the tokenizer and the fraction
    are the same. It is complete or absent: a crash leaves only a temporary folder, and of two
    processes that build one cache, both use that of the first to finish.

    Raises:
      UserError: the source is bad or holds a single document; a fraction outside (0, 1); the
        cache cannot be written.
    """
    if not 0 < validation_fraction < 1:
        raise UserError(f"validation_fraction={validation_fraction} is not between 0 and 1.")
    key = digest(
        {
            "version": STORE_VERSION,
            "source": source_identity(source),
            "tokenizer": tokenizer.fingerprint,
            "validation_fraction": validation_fraction,
        }
    )
    parent = Path(cache_dir or default_cache_dir()).expanduser() / "stores"
    final = parent / key
    cached = _opened(final)
    if cached is not None:
        return cached
    with disk_errors(parent, DISK_MEND):
        parent.mkdir(parents=True, exist_ok=True)
        temporary = parent / f"{key}.{uuid.uuid4().hex}.partial"
        temporary.mkdir()
        try:
            _build(temporary, source, tokenizer, validation_fraction)
            _publish(temporary, final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return {split: TokenStore(final / split) for split in SPLITS}


def _build(folder: Path, source: SourceConfig, tokenizer: Tokenizer, fraction: float) -> None:
    counts = ReadCounts()
    dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
    with contextlib.ExitStack() as stack:
        writers = {s: stack.enter_context(_Writer(folder / s, dtype)) for s in SPLITS}
        for batch in _batches(read_documents(source, counts)):
            encoded = tokenizer.encode_batch([document.text for document in batch])
            for document, ids in zip(batch, encoded, strict=True):
                hash_ = split_hash(document.text)
                writer = writers["validation" if hash_ < fraction else "train"]
                ids = [tokenizer.bos_id, *ids, tokenizer.eos_id]
                writer.add(ids, hash_, len(document.text.encode("utf-8")))
    if not len(writers["validation"]):
        writers = _hold_out(folder, writers["train"], source)
    if not len(writers["train"]):
        raise UserError(
            f"all {counts.documents} documents of source={source.source!r} fall in validation: "
            f"lower validation_fraction={fraction}, or give more text."
        )
    for writer in writers.values():
        writer.write_meta(
            source=source.source,
            tokenizer=tokenizer.fingerprint,
            skipped=counts.skipped,
            empty=counts.empty,
        )


def _hold_out(folder: Path, everything: _Writer, source: SourceConfig) -> dict[str, _Writer]:
    """Writes both splits anew, with the documents of the smallest hash held out."""
    hashes = np.asarray(everything.hashes)
    is_held_out = hashes == hashes.min()
    if is_held_out.all():
        raise UserError(
            f"source={source.source!r} holds a single document, so none can be held out for "
            f"validation: give more documents, or one longer than {WHOLE // 1024} KiB."
        )
    whole = folder / "whole"
    everything.directory.rename(whole)
    tokens = _mapped(whole / _TOKENS, everything.dtype, everything.offsets[-1])
    shutil.rmtree(folder / "validation")
    with contextlib.ExitStack() as stack:
        writers = {s: stack.enter_context(_Writer(folder / s, everything.dtype)) for s in SPLITS}
        for index, is_held in enumerate(is_held_out):
            ids = tokens[everything.offsets[index] : everything.offsets[index + 1]]
            writer = writers["validation" if is_held else "train"]
            writer.add(ids, everything.hashes[index], everything.text_bytes[index])
    shutil.rmtree(whole)
    return writers


class _Writer:
    """Writes one store, document after document; a context that closes its files."""

    def __init__(self, directory: Path, dtype: str):
        directory.mkdir()
        self.directory, self.dtype = directory, dtype
        # Compact arrays: a corpus may have a hundred million documents.
        self.offsets = array.array("q", [0])
        self.hashes = array.array("d")
        self.text_bytes = array.array("q")
        self._digest = hashlib.blake2b(digest_size=8)
        self._file = open(directory / _TOKENS, "wb", buffering=_BUFFER)  # noqa: SIM115, see __exit__

    def __len__(self) -> int:
        return len(self.hashes)

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # After a failed write, closing would try to write the rest and fail again.
        with contextlib.suppress(OSError) if kind else contextlib.nullcontext(), self._file:
            _sync(self._file)

    def add(self, ids: Sequence[int] | np.ndarray, hash_: float, text_bytes: int) -> None:
        content = np.asarray(ids, self.dtype).tobytes()
        self._file.write(content)
        self._digest.update(content)
        self.offsets.append(self.offsets[-1] + len(ids))
        self.hashes.append(hash_)
        self.text_bytes.append(text_bytes)

    def write_meta(self, *, source: str, tokenizer: str, skipped: int, empty: int) -> None:
        """Finishes the store: the boundaries, and last the description that makes it whole."""
        offsets = self.offsets.tobytes()
        self._digest.update(offsets)
        meta = StoreMeta(
            documents=len(self),
            tokens=self.offsets[-1],
            bytes=sum(self.text_bytes),
            dtype=self.dtype,
            source=source,
            tokenizer=tokenizer,
            skipped=skipped,
            empty=empty,
            fingerprint=self._digest.hexdigest(),
        )
        text = json.dumps(dataclasses.asdict(meta), indent=2) + "\n"
        for name, content in ((_OFFSETS, offsets), (_META, text.encode())):
            with open(self.directory / name, "wb") as file:
                file.write(content)
                _sync(file)


def _sync(file: BinaryIO) -> None:
    """Sees to it that the content is on the disk before the folder gets its final name."""
    file.flush()
    os.fsync(file.fileno())


def _publish(temporary: Path, final: Path) -> None:
    """Moves a finished cache to its place, unless another process has put one there."""
    try:
        temporary.rename(final)
    except OSError:
        if _opened(final) is not None:
            return
        # Damaged since it was written: out of the way with it.
        final.rename(temporary / "damaged")
        temporary.rename(final)
        shutil.rmtree(final / "damaged")


def _opened(final: Path) -> dict[str, TokenStore] | None:
    try:
        return {split: TokenStore(final / split) for split in SPLITS}
    except UserError:
        return None


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _mapped(path: Path, dtype: str, count: int) -> np.ndarray:
    size = count * np.dtype(dtype).itemsize
    if path.stat().st_size != size:
        raise ValueError(f"{path.name} has {path.stat().st_size} bytes, {size} are wanted")
    return np.memmap(path, dtype, "r", shape=(count,)).view(np.ndarray)
