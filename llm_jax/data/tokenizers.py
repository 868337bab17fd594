"""The tokenizer that a config names: trained, given as a file, or plain bytes."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from llm_jax.data.tokenizer_base import (
    META_FILE,
    PUBLISHED_FOLDER,
    SPECIAL_TOKENS,
    ByteTokenizer,
    Tokenizer,
)
from llm_jax.data.tokenizer_json import (
    TOKENIZER_FILE,
    VOCABULARY_FILES,
    JsonTokenizer,
    library_file,
    read_tokenizer_json,
    read_vocabulary,
    train_bpe,
)
from llm_jax.data.tokenizer_sentencepiece import (
    MODEL_FILE,
    SentencePieceTokenizer,
    read_sentencepiece,
)
from llm_jax.errors import UserError, did_you_mean

__all__ = [
    "SPECIAL_TOKENS",
    "Tokenizer",
    "TokenizerConfig",
    "has_tokenizer",
    "load_tokenizer",
    "make_tokenizer",
    "read_tokenizer",
]


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """Which tokenizer.

    path: None trains byte-level BPE on the corpus; "bytes"; a tokenizer.json; a SentencePiece
      .model; a folder with one of the two, or with vocab.json and merges.txt; a run directory,
      whose tokenizer is taken. A tokenizer that is given gets no new tokens.
    vocab_size: ids of a trained tokenizer, bytes and special tokens included.
    train_documents: documents that training reads at most, from the start of the corpus.
    train_bytes: UTF-8 bytes that training reads at most.
    """

    path: str | None = None
    vocab_size: int = 4096
    train_documents: int | None = None
    train_bytes: int = 16 * 1024 * 1024


def make_tokenizer(config: TokenizerConfig, documents: Callable[[], Iterable[str]]) -> Tokenizer:
    """The tokenizer that `config` names; `documents` is called only where one is trained.

    Raises:
      UserError: the path holds no tokenizer, the vocabulary is too small, the corpus is empty.
    """
    if config.path is None:
        return train_bpe(_training_texts(config, documents()), config.vocab_size)
    if config.path == "bytes":
        return ByteTokenizer()
    path = Path(config.path).expanduser()
    if path.is_dir():
        return read_tokenizer(path)
    if not path.exists():
        siblings = (p.name for p in path.parent.iterdir()) if path.parent.is_dir() else ()
        raise UserError(
            f"tokenizer.path={config.path!r} does not exist.{did_you_mean(path.name, siblings)}"
        )
    if path.suffix == ".json":
        return read_tokenizer_json(path)
    if path.suffix == ".model":
        return read_sentencepiece(path)
    raise UserError(
        f"tokenizer.path={config.path!r} is no tokenizer: give a tokenizer.json, a SentencePiece "
        f".model, a run directory, or 'bytes'."
    )


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """Reads what `Tokenizer.save` wrote.

    Raises:
      UserError: the folder holds no saved tokenizer, or a damaged one.
    """
    directory = Path(directory)
    try:
        meta = json.loads((directory / META_FILE).read_text(encoding="utf-8"))
        specials = {purpose: dict(token) for purpose, token in meta["special_tokens"].items()}
        kind, start, eos_ids = meta["kind"], meta["document_start"], meta["eos_ids"]
        tokens = {purpose: special["token"] for purpose, special in specials.items()}
        ids = {purpose: special["id"] for purpose, special in specials.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{directory} holds no saved tokenizer: {error}.") from error
    files = sorted((directory / PUBLISHED_FOLDER).glob("*"))
    published = {file.name: file.read_bytes() for file in files}
    mixed = f"the files of the tokenizer in {directory} do not belong together."
    try:
        tokenizer = _loaded(directory, kind, tokens, bool(start), eos_ids, published)
    except (KeyError, RuntimeError, OSError) as error:
        raise UserError(mixed) from error
    if tokenizer.special_ids != ids or list(tokenizer.document_start) != start:
        raise UserError(mixed)
    return tokenizer


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a run or of a published model: that of the run; else a tokenizer.json; else
    a SentencePiece .model; else a vocab.json with merges.txt.

    A published one is taken as it is: its special tokens come from the files beside it, then from
    the strings that published tokenizers use, and nothing is added.

    Raises:
      UserError: the folder holds no tokenizer, or one that cannot be read or that has no token
        which ends a text.
    """
    read = _reader(folder)
    if read is None:
        raise UserError(
            f"{folder} holds no tokenizer: no {TOKENIZER_FILE}, no .model, no "
            f"{' with '.join(VOCABULARY_FILES)}, no run's tokenizer/."
        )
    return read()


def has_tokenizer(folder: Path) -> bool:
    """Whether `read_tokenizer` finds something to read."""
    return _reader(folder) is not None


def _reader(folder: Path) -> Callable[[], Tokenizer] | None:
    for candidate in (folder, folder / "tokenizer"):
        if (candidate / META_FILE).exists():
            return functools.partial(load_tokenizer, candidate)
        if (candidate / TOKENIZER_FILE).exists():
            return functools.partial(read_tokenizer_json, candidate / TOKENIZER_FILE)
        models = sorted(candidate.glob("*.model"))
        if models:
            return functools.partial(read_sentencepiece, models[0])
        if all((candidate / name).exists() for name in VOCABULARY_FILES):
            return functools.partial(read_vocabulary, candidate)
    return None


def _loaded(
    directory: Path,
    kind: str,
    tokens: Mapping[str, str],
    starts_with_bos: bool,
    eos_ids: Any,
    published: Mapping[str, bytes],
) -> Tokenizer:
    if kind == JsonTokenizer.kind:
        library_tokenizer = library_file(directory / TOKENIZER_FILE)
        return JsonTokenizer(library_tokenizer, tokens, eos_ids, published)
    if kind == SentencePieceTokenizer.kind:
        return SentencePieceTokenizer(
            (directory / MODEL_FILE).read_bytes(),
            tokens,
            starts_with_bos=starts_with_bos,
            eos_ids=eos_ids,
            published=published,
        )
    return ByteTokenizer()


def _training_texts(config: TokenizerConfig, documents: Iterable[str]) -> Iterator[str]:
    left = config.train_bytes
    for index, text in enumerate(documents):
        if left <= 0 or index == config.train_documents:
            return
        yield text[:left]
        left -= len(text.encode("utf-8"))
