"""The tokenizer that a config names: trained, given as a file, or plain bytes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from llm_jax.data.tokenizer_base import META_FILE, SPECIAL_TOKENS, ByteTokenizer, Tokenizer
from llm_jax.data.tokenizer_json import TOKENIZER_FILE, read_tokenizer_json, train_bpe
from llm_jax.data.tokenizer_sentencepiece import MODEL_FILE, read_sentencepiece
from llm_jax.errors import UserError, did_you_mean

__all__ = ["SPECIAL_TOKENS", "Tokenizer", "TokenizerConfig", "load_tokenizer", "make_tokenizer"]


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """Which tokenizer.

    path: None trains byte-level BPE on the corpus; "bytes"; a tokenizer.json; a SentencePiece
      .model; a folder with one of the two; a run directory, whose tokenizer is taken.
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
        return _from_folder(path)
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
        kind, specials = meta["kind"], meta["special_tokens"]
        tokens = {purpose: specials[purpose]["token"] for purpose in SPECIAL_TOKENS}
        ids = {purpose: specials[purpose]["id"] for purpose in SPECIAL_TOKENS}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{directory} holds no saved tokenizer: {error}.") from error
    tokenizer: Tokenizer
    if kind == "tokenizers":
        tokenizer = read_tokenizer_json(directory / TOKENIZER_FILE, tokens)
    elif kind == "sentencepiece":
        tokenizer = read_sentencepiece(directory / MODEL_FILE)
    else:
        tokenizer = ByteTokenizer()
    if tokenizer.kind != kind or tokenizer.special_ids != ids:
        raise UserError(f"the files of the tokenizer in {directory} do not belong together.")
    return tokenizer


def _from_folder(folder: Path) -> Tokenizer:
    for candidate in (folder, folder / "tokenizer"):
        if (candidate / META_FILE).exists():
            return load_tokenizer(candidate)
        if (candidate / TOKENIZER_FILE).exists():
            return read_tokenizer_json(candidate / TOKENIZER_FILE)
        models = sorted(candidate.glob("*.model"))
        if models:
            return read_sentencepiece(models[0])
    raise UserError(
        f"{folder} holds no tokenizer: no {TOKENIZER_FILE}, no .model, no run's tokenizer/."
    )


def _training_texts(config: TokenizerConfig, documents: Iterable[str]) -> Iterator[str]:
    left = config.train_bytes
    for index, text in enumerate(documents):
        if left <= 0 or index == config.train_documents:
            return
        yield text[:left]
        left -= len(text.encode("utf-8"))
