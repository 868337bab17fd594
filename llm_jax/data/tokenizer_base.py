"""What every tokenizer can do, its special tokens, and the plainest kind: bytes."""

from __future__ import annotations

import abc
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

# Purpose → the string of its token in tokenizers that are made here. The order decides the ids.
SPECIAL_TOKENS: dict[str, str] = {
    "bos": "<|bos|>",
    "eos": "<|eos|>",
    "pad": "<|pad|>",
    "system": "<|system|>",
    "user": "<|user|>",
    "assistant": "<|assistant|>",
    "tool": "<|tool|>",
    "end_of_turn": "<|end_of_turn|>",
}
META_FILE = "special_tokens.json"
PUBLISHED_FOLDER = "published"

# Where a text stands: at the start of an input, or within one, after a special token or after
# other text. Tokenizers that put a space before the first word differ in what is a first word.
Place = Literal["start", "after_special", "after_text"]


class Tokenizer(abc.ABC):
    """Text to token ids and back.

    A tokenizer that is made here has a token of its own for each purpose of `SPECIAL_TOKENS`. One
    that others published is taken as it is, since the embedding of its model has no rows for more
    tokens: eos is there always, other purposes where a token serves them, and one token may serve
    several.

    vocab_size: one more than the largest id.
    special_ids: the id of each purpose that the tokenizer has a token for.
    special_tokens: the string of each of these, as `decode` shows it when specials are kept.
    eos_id; bos_id, pad_id: the ids of these purposes, bos and pad those of eos where they have no
      token. Padding is told by segment ids everywhere, never by pad_id.
    eos_ids: eos_id, then further ids at which a generation ends.
    document_start: what a document begins with: bos, or nothing where that is the convention.
    published: the files beside a published tokenizer, by name; kept for export.

    The strings of special tokens that stand inside a text are encoded as ordinary text, so no
    document and no user's message can forge a role or an end: specials enter only by id.
    """

    kind: ClassVar[str]

    def __init__(
        self,
        vocab_size: int,
        special_ids: Mapping[str, int],
        tokens: Mapping[str, str],
        *,
        document_start: Sequence[int],
        eos_ids: Sequence[int] = (),
        published: Mapping[str, bytes] | None = None,
    ):
        if "eos" not in special_ids:
            raise ValueError(f"a tokenizer needs an eos token, got {dict(special_ids)}")
        purposes = [name for name in SPECIAL_TOKENS if name in special_ids]
        self.vocab_size = vocab_size
        self.special_ids = {name: special_ids[name] for name in purposes}
        self.special_tokens = {name: tokens[name] for name in purposes}
        self.eos_id = special_ids["eos"]
        self.bos_id = special_ids.get("bos", self.eos_id)
        self.pad_id = special_ids.get("pad", self.eos_id)
        known = (id_ for id_ in eos_ids if 0 <= id_ < vocab_size)
        self.eos_ids = tuple(dict.fromkeys((self.eos_id, *known)))
        self.document_start = tuple(document_start)
        self.published = dict(published or {})
        self._string_of_special = {special_ids[name]: tokens[name] for name in purposes}

    @functools.cached_property
    def specials(self) -> dict[str, int]:
        """The id of each special token by its string, those without a purpose included."""
        return {string: id_ for id_, string in self._string_of_special.items()}

    def special_id(self, string: str) -> int | None:
        """The id of the special token that is written so, or None."""
        return self.specials.get(string)

    @functools.cached_property
    def stripping(self) -> tuple[frozenset[int], frozenset[int]]:
        """The specials that take white space away from the text before them, and after them."""
        return frozenset(), frozenset()

    def encode(self, text: str, place: Place = "start") -> list[int]:
        """The ids of a text; never a special one. The text must hold no lone surrogates."""
        return self.encode_batch([text], place)[0]

    @abc.abstractmethod
    def encode_batch(self, texts: Sequence[str], place: Place = "start") -> list[list[int]]:
        """`encode` of each text, on all cores where the library can."""

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of the ids.

        Bytes that form no character become U+FFFD. Ids past the vocabulary (a model's embedding
        may be padded to a rounder size) decode to nothing.
        """
        runs: list[list[int]] = [[]]
        texts: list[str] = []
        for id_ in map(int, ids):
            if id_ in self._string_of_special:
                if not skip_special:
                    texts += [self._decode_ordinary(runs[-1]), self._string_of_special[id_]]
                    runs.append([])
            elif 0 <= id_ < self.vocab_size:
                runs[-1].append(id_)
        return "".join([*texts, self._decode_ordinary(runs[-1])])

    @abc.abstractmethod
    def _decode_ordinary(self, ids: list[int]) -> str:
        """The text of ids of which none is special."""

    @abc.abstractmethod
    def token_bytes(self) -> np.ndarray:
        """int32 [vocab_size], the UTF-8 bytes that each token adds to a text; 0 for specials.

        Exact for byte-level kinds: the tokens of a text sum to its length in bytes. A kind that
        rewrites text (normalises, or puts a space before the first word) counts what it wrote.
        """

    def save(self, directory: str | Path) -> None:
        """Writes all that `load_tokenizer` needs; the folder is made where it is missing."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in self.files().items():
            (directory / name).write_bytes(content)
        for name, content in self.published.items():
            (directory / PUBLISHED_FOLDER).mkdir(exist_ok=True)
            (directory / PUBLISHED_FOLDER / name).write_bytes(content)
        (directory / META_FILE).write_text(self._meta(), encoding="utf-8")

    @abc.abstractmethod
    def files(self) -> dict[str, bytes]:
        """The files of the model of this kind, by name."""

    def _meta(self) -> str:
        specials = {
            name: {"id": id_, "token": self.special_tokens[name]}
            for name, id_ in self.special_ids.items()
        }
        meta = {
            "kind": self.kind,
            "special_tokens": specials,
            "eos_ids": self.eos_ids,
            "document_start": self.document_start,
        }
        return json.dumps(meta, indent=2) + "\n"

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of all that decides how texts are encoded."""
        digest = hashlib.sha256(self._meta().encode())
        for name, content in sorted(self.files().items()):
            digest.update(f"{name}:{len(content)}:".encode())
            digest.update(content)
        return digest.hexdigest()[:16]


class ByteTokenizer(Tokenizer):
    """One token a UTF-8 byte, then the special tokens."""

    kind = "bytes"

    def __init__(self) -> None:
        special_ids = {name: 256 + i for i, name in enumerate(SPECIAL_TOKENS)}
        super().__init__(
            256 + len(special_ids),
            special_ids,
            SPECIAL_TOKENS,
            document_start=[special_ids["bos"]],
        )

    def encode_batch(self, texts: Sequence[str], place: Place = "start") -> list[list[int]]:
        return [list(text.encode("utf-8")) for text in texts]

    def _decode_ordinary(self, ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace")

    def token_bytes(self) -> np.ndarray:
        return (np.arange(self.vocab_size) < 256).astype(np.int32)

    def files(self) -> dict[str, bytes]:
        return {}
