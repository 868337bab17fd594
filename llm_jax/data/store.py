"""The token store: a corpus tokenised once, with the documents' boundaries kept.

A store is a folder: tokens.bin (flat unsigned integers), offsets.bin (int64 [documents + 1]) and
meta.json. Document i is tokens[offsets[i]:offsets[i + 1]], never truncated; that of a text is
[bos] + text + [eos], without bos where that is the tokenizer's convention. Stores of rendered
examples hold in trained.bin (uint8) which tokens a loss counts as targets, and in NAME.bin a number
for each document, such as the score of a response.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from llm_jax.config import digest
from llm_jax.data.documents import WHOLE, split_hash
from llm_jax.data.sources import ReadCounts, SourceConfig, read_documents, source_identity
from llm_jax.data.store_writer import (
    META,
    OFFSETS,
    TOKENS,
    TRAINED,
    Entry,
    Layout,
    StoreMeta,
    StoreWriter,
    column_path,
    mapped,
)
from llm_jax.data.tokenizer_base import Tokenizer
from llm_jax.errors import UserError, disk_errors

STORE_VERSION = 2  # part of every cache key: raise it when equal sources give other stores
SPLITS = ("train", "validation")
DISK_MEND = (
    "Mend that, or name another folder for the token cache by data.cache_dir or the environment "
    "variable LLM_JAX_CACHE."
)

_BATCH_CHARACTERS = 2 * 1024 * 1024  # tokenised at a time

T = TypeVar("T")


class TokenStore:
    """A memory-mapped store. Opening it costs nothing, and so does handing it to a process.

    tokens: uint16 or uint32 [tokens], all documents one after the other, read-only.
    offsets: int64 [documents + 1], where each document starts.
    trained: uint8 [tokens], 1 where a loss counts the token as a target; None: everywhere.
    columns: name → numbers [documents].
    """

    def __init__(self, directory: str | Path):
        """Opens a store that `build_stores` wrote.

        Raises:
          UserError: the folder holds no whole store.
        """
        self.directory = Path(directory)
        try:
            meta = json.loads((self.directory / META).read_text(encoding="utf-8"))
            self.meta = StoreMeta(**meta)
            self.tokens = mapped(self.directory / TOKENS, self.meta.dtype, self.meta.tokens)
            self.offsets = mapped(self.directory / OFFSETS, "int64", self.meta.documents + 1)
            self.trained = (
                mapped(self.directory / TRAINED, "uint8", self.meta.tokens)
                if self.meta.masked
                else None
            )
            self.columns = {
                name: mapped(column_path(self.directory, name), dtype, self.meta.documents)
                for name, dtype in self.meta.columns.items()
            }
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{directory} holds no whole token store: {error}.") from error

    @property
    def fingerprint(self) -> str:
        """A hash of the tokens and the boundaries: equal exactly where these are."""
        return self.meta.fingerprint

    def __len__(self) -> int:
        return self.meta.documents

    def document(self, index: int) -> np.ndarray:
        """uint16 or uint32 [length], its tokens, eos included; a view, so copy before writing."""
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenStore, (self.directory,)


def default_cache_dir() -> Path:
    """$LLM_JAX_CACHE, or ~/.cache/llm_jax."""
    return Path(os.environ.get("LLM_JAX_CACHE") or "~/.cache/llm_jax").expanduser()


def build_text_stores(
    source: SourceConfig,
    tokenizer: Tokenizer,
    *,
    validation_fraction: float,
    cache_dir: str | Path | None = None,
) -> dict[str, TokenStore]:
    """`build_stores` of the texts of a source, each a document start + text + [eos]."""

    def entries(counts: ReadCounts) -> Iterator[Entry]:
        for batch in in_batches(read_documents(source, counts), lambda d: len(d.text)):
            encoded = tokenizer.encode_batch([document.text for document in batch])
            for document, ids in zip(batch, encoded, strict=True):
                ids = [*tokenizer.document_start, *ids, tokenizer.eos_id]
                yield Entry(ids, split_hash(document.text), len(document.text.encode("utf-8")))

    return build_stores(
        entries,
        identity={"source": source_identity(source)},
        source=source.source,
        tokenizer=tokenizer,
        validation_fraction=validation_fraction,
        cache_dir=cache_dir,
    )


def build_stores(
    entries: Callable[[ReadCounts], Iterator[Entry]],
    *,
    identity: Mapping[str, Any],
    source: str,
    tokenizer: Tokenizer,
    validation_fraction: float,
    cache_dir: str | Path | None = None,
    masked: bool = False,
    columns: Mapping[str, str] | None = None,
) -> dict[str, TokenStore]:
    """The stores "train" and "validation" of some documents, made now or found in the cache.

    A document is for validation where its hash is below the fraction. Where that holds for none,
    those with the smallest hash are held out, so that a small corpus has a validation set.
    The cache is used again while the identity, the tokenizer and the fraction are the same. It is
    complete or absent: a crash leaves only a temporary folder, and of two processes that build one
    cache, both use that of the first to finish.

    Args:
      entries: streams the documents and fills the counts; called only where nothing is cached.
      identity: JSON-able values that change when the documents do.
      source: what messages call the source.
      masked: whether the entries say which of their tokens are trained on.
      columns: name → dtype of the entries' numbers.

    Raises:
      UserError: the source is bad or holds a single document; a fraction outside (0, 1); the
        cache cannot be written.
    """
    if not 0 < validation_fraction < 1:
        raise UserError(f"validation_fraction={validation_fraction} is not between 0 and 1.")
    key = digest(
        {
            "version": STORE_VERSION,
            **identity,
            "tokenizer": tokenizer.fingerprint,
            "validation_fraction": validation_fraction,
        }
    )
    parent = Path(cache_dir or default_cache_dir()).expanduser() / "stores"
    final = parent / key
    cached = _opened(final)
    if cached is not None:
        return cached
    layout = Layout(
        "uint16" if tokenizer.vocab_size <= 2**16 else "uint32", masked, dict(columns or {})
    )
    with disk_errors(parent, DISK_MEND):
        parent.mkdir(parents=True, exist_ok=True)
        temporary = parent / f"{key}.{uuid.uuid4().hex}.partial"
        temporary.mkdir()
        try:
            counts = ReadCounts()
            writers = _write(temporary, entries(counts), layout, source, validation_fraction)
            for writer in writers.values():
                writer.write_meta(source, tokenizer.fingerprint, counts)
            _publish(temporary, final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return {split: TokenStore(final / split) for split in SPLITS}


def in_batches(items: Iterator[T], characters: Callable[[T], int]) -> Iterator[list[T]]:
    """Lists of items whose texts together are worth one call of the tokenizer."""
    batch: list[T] = []
    total = 0
    for item in items:
        batch.append(item)
        total += characters(item)
        if total >= _BATCH_CHARACTERS:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


def _write(
    folder: Path, entries: Iterator[Entry], layout: Layout, source: str, fraction: float
) -> dict[str, StoreWriter]:
    with contextlib.ExitStack() as stack:
        writers = {s: stack.enter_context(StoreWriter(folder / s, layout)) for s in SPLITS}
        for entry in entries:
            writers["validation" if entry.hash_ < fraction else "train"].add(entry)
    if not len(writers["validation"]):
        writers = _hold_out(folder, writers["train"], source)
    if not len(writers["train"]):
        raise UserError(
            f"all {len(writers['validation'])} documents of source={source!r} fall in validation: "
            f"lower validation_fraction={fraction}, or give more."
        )
    return writers


def _hold_out(folder: Path, everything: StoreWriter, source: str) -> dict[str, StoreWriter]:
    """Writes both splits anew, with the documents of the smallest hash held out."""
    hashes = np.asarray(everything.hashes)
    is_held_out = hashes == hashes.min()
    if is_held_out.all():
        more = "prompts" if everything.layout.masked else f"text, over {WHOLE // 1024} KiB"
        raise UserError(
            f"source={source!r} holds a single document, so none can be held out for validation: "
            f"give more {more}."
        )
    whole = folder / "whole"
    everything.directory.rename(whole)
    shutil.rmtree(folder / "validation")
    with contextlib.ExitStack() as stack:
        writers = {
            s: stack.enter_context(StoreWriter(folder / s, everything.layout)) for s in SPLITS
        }
        for entry, is_held in zip(everything.entries(whole), is_held_out, strict=True):
            writers["validation" if is_held else "train"].add(entry)
    shutil.rmtree(whole)
    return writers


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
