"""The texts that tasks read: what a run did not train on, or sources of their own."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from llm_jax.config import build
from llm_jax.data.chat_corpus import ChatCorpus, ChatDataConfig
from llm_jax.data.corpus import ComponentConfig, Corpus, DataConfig
from llm_jax.data.sources import SourceConfig, read_documents
from llm_jax.data.store import TokenStore
from llm_jax.data.template_base import ChatTemplate
from llm_jax.data.tokenizer_base import Tokenizer
from llm_jax.errors import UserError
from llm_jax.evals.subject import Subject

# The stages whose data section is texts or conversations, by what that section is.
_TEXTS, _CHATS = ("pretrain",), ("sft", "distill")

_HAYSTACK_DOCUMENTS = 64  # of a source, from the first


class Texts(Protocol):
    """Tokenised documents, as a TokenStore has them.

    tokens: integers [tokens], all documents one after the other. trained: [tokens], 1 where a loss
    counts the token as a target; None: everywhere.
    """

    @property
    def tokens(self) -> np.ndarray: ...

    @property
    def offsets(self) -> np.ndarray: ...

    @property
    def trained(self) -> np.ndarray | None: ...

    def __len__(self) -> int: ...

    def document(self, index: int) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class MemoryTexts:
    """`Texts` that are on no disk. offsets: int64 [documents + 1], where each document starts."""

    tokens: np.ndarray
    offsets: np.ndarray
    trained: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def document(self, index: int) -> np.ndarray:
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]


def texts_by_tag(
    subject: Subject, sources: Sequence[ComponentConfig], documents: int
) -> dict[str, Texts]:
    """The texts of a task by tag: of each source at most its first `documents` documents, or, where
    none is named, what the run of the subject held out, by component of its mixture.

    A source's tag is its name, or that of its file.

    Raises:
      UserError: a source that cannot be read, a tag used twice; no source and nothing held out.
    """
    if not sources:
        if subject.held_out is None:
            raise UserError(
                f"{subject.name} has no held-out texts of its own: name a source in the settings."
            )
        return dict(subject.held_out())
    found: dict[str, Texts] = {}
    for source in sources:
        tag = source.name or Path(source.source).stem
        if tag in found:
            raise UserError(f"two sources are called {tag!r}: give them names.")
        found[tag] = _read(source, subject.tokenizer, documents)
    return found


def haystack(subject: Subject, source: str | None) -> Texts:
    """The text that stands around what is to be found: of a source, or held out by the run.

    Raises:
      UserError: see `texts_by_tag`.
    """
    if source is not None:
        return _read(SourceConfig(source), subject.tokenizer, _HAYSTACK_DOCUMENTS)
    return next(iter(texts_by_tag(subject, (), 0).values()))


def has_texts(config: Mapping[str, Any]) -> bool:
    """Whether a run with this resolved config has texts, or conversations, that it held out."""
    return config.get("trainer") in (*_TEXTS, *_CHATS)


def held_out_stores(
    config: Mapping[str, Any], tokenizer: Tokenizer, template: ChatTemplate | None
) -> dict[str, TokenStore]:
    """The documents that a run with this resolved config held out, by component of its mixture.

    Raises:
      UserError: the run's sources cannot be read any more.
    """
    if config["trainer"] in _TEXTS:
        data = build(DataConfig, config["data"], "config.data")
        stores = Corpus(data, tokenizer, config["seed"]).stores
    else:
        assert template is not None  # these stages have one
        chats = build(ChatDataConfig, config["data"], "config.data")
        stores = ChatCorpus(chats, template, tokenizer).stores
    return {name: splits["validation"] for name, splits in stores.items()}


def _read(source: SourceConfig, tokenizer: Tokenizer, documents: int) -> MemoryTexts:
    texts = [d.text for d in itertools.islice(read_documents(source), documents)]
    encoded = [
        [*tokenizer.document_start, *ids, tokenizer.eos_id] for ids in tokenizer.encode_batch(texts)
    ]
    offsets = np.cumsum([0, *map(len, encoded)])
    return MemoryTexts(np.fromiter(itertools.chain(*encoded), np.int32, offsets[-1]), offsets)
