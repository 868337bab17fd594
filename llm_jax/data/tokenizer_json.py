"""Tokenizers of the `tokenizers` library: byte-level BPE trained here, or a tokenizer.json."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from llm_jax.data.tokenizer_base import SPECIAL_TOKENS, Place, Tokenizer
from llm_jax.data.tokenizer_published import (
    ADDED_TOKENS,
    TOKENIZER_CONFIG,
    PublishedSettings,
    beside,
    content_of,
)
from llm_jax.errors import UserError

TOKENIZER_FILE = "tokenizer.json"
VOCABULARY_FILES = ("vocab.json", "merges.txt")
END_OF_TEXT = "<|endoftext|>"  # of a vocabulary in the manner of GPT-2, where no file names others

# Pre-tokenisation in the manner of GPT-4: contractions; words with the one space or mark before
# them; digits one by one, so that a number's tokens do not depend on its length; runs of marks;
# line ends; white space, of which the last space goes to the word after it.
SPLIT_PATTERN = "|".join(
    (
        r"'(?i:s|t|d|m|ll|ve|re)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)


class JsonTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library, without a token more than it has."""

    kind = "tokenizers"

    def __init__(
        self,
        library_tokenizer: tokenizers.Tokenizer,
        tokens: Mapping[str, str],
        eos_ids: Sequence[int] = (),
        published: Mapping[str, bytes] | None = None,
    ):
        """
        Args:
          library_tokenizer: taken over, and changed in what is not the encoding.
          tokens: the string of each purpose; all of them in its vocabulary.
          eos_ids, published: see `Tokenizer`.
        """
        library_tokenizer.no_truncation()
        library_tokenizer.no_padding()
        ids = library_tokenizer.get_vocab(with_added_tokens=True)
        super().__init__(
            max(ids.values()) + 1,
            {name: ids[token] for name, token in tokens.items()},
            tokens,
            document_start=_document_start(library_tokenizer),
            eos_ids=eos_ids,
            published=published,
        )
        # Marks tokens that the file holds as ordinary ones as special; those that it holds as
        # special keep what else it says of them.
        special = set(_special_tokens(library_tokenizer))
        library_tokenizer.add_special_tokens(
            [
                tokenizers.AddedToken(token, normalized=False, special=True)
                for token in tokens.values()
                if ids[token] not in special
            ]
        )
        library_tokenizer.encode_special_tokens = True  # encode the strings of specials as text
        self._tokenizer = library_tokenizer
        # Special tokens without a purpose here are not to be forged or shown either.
        self._string_of_special |= _special_tokens(library_tokenizer)

    @functools.cached_property
    def stripping(self) -> tuple[frozenset[int], frozenset[int]]:
        added = self._tokenizer.get_added_tokens_decoder().items()
        special = [(id_, token) for id_, token in added if token.special]
        return (
            frozenset(id_ for id_, token in special if token.lstrip),
            frozenset(id_ for id_, token in special if token.rstrip),
        )

    def encode_batch(self, texts: Sequence[str], place: Place = "start") -> list[list[int]]:
        library_tokenizer = self._at(place)
        encodings = library_tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        batch = [encoding.ids for encoding in encodings]
        return [
            ids if self._string_of_special.keys().isdisjoint(ids) else self._split(text, place)
            for text, ids in zip(texts, batch, strict=True)
        ]

    def _split(self, text: str, place: Place) -> list[int]:
        """Encodes a text of which the model itself makes a special token (Unigram, WordPiece).

        The text is split inside the string that was taken for a special token.
        """
        encoding = self._at(place).encode(text, add_special_tokens=False)
        for id_, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if id_ in self._string_of_special and end - start > 1:
                before, after = text[: start + 1], text[start + 1 :]
                return self._split(before, place) + self._split(after, "after_text")
        return [id_ for id_ in encoding.ids if id_ not in self._string_of_special]

    def _at(self, place: Place) -> tokenizers.Tokenizer:
        return self._tokenizer if place == "start" else self._within[place]

    @functools.cached_property
    def _within(self) -> dict[str, tokenizers.Tokenizer]:
        """The library's tokenizers for texts that do not start an input.

        There, "first" marks no word; and after other text no word is a first one.
        """
        content = json.loads(self._tokenizer.to_str())
        after_special = _without_prefix(content, ("first",))
        after_text = _without_prefix(content, ("first", "always"))
        return {
            "after_special": self._tokenizer if after_special == content else _made(after_special),
            "after_text": self._tokenizer if after_text == content else _made(after_text),
        }

    def _decode_ordinary(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    @functools.cached_property
    def _token_bytes(self) -> np.ndarray:
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        added = self._tokenizer.get_added_tokens_decoder()
        ordinary = {id_: token for token, id_ in vocabulary.items() if id_ not in added}
        counts = np.zeros(self.vocab_size, np.int32)
        if "ByteLevel" in _types(json.loads(self._tokenizer.to_str())["decoder"]):
            for id_, token in ordinary.items():
                counts[id_] = len(token)  # the byte alphabet has one character a byte
        else:
            # What a token adds after another one: the first word may be treated otherwise.
            before = min(ordinary, key=lambda id_: (ordinary[id_].strip("▁ ") != "a", id_))
            length = len(self._tokenizer.decode([before]).encode())
            texts = self._tokenizer.decode_batch([[before, id_] for id_ in ordinary])
            for (id_, token), text in zip(ordinary.items(), texts, strict=True):
                is_byte = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
                counts[id_] = 1 if is_byte else max(0, len(text.encode()) - length)
        for id_, added_token in added.items():
            counts[id_] = 0 if added_token.special else len(added_token.content.encode())
        return counts

    def token_bytes(self) -> np.ndarray:
        return self._token_bytes.copy()

    def files(self) -> dict[str, bytes]:
        return {TOKENIZER_FILE: self._tokenizer.to_str(pretty=True).encode()}

    def __reduce__(self) -> tuple[Any, ...]:
        # The library's own pickling forgets that specials are to be encoded as text.
        content = self._tokenizer.to_str()
        return _unpickled, (content, self.special_tokens, self.eos_ids, self.published)


def train_bpe(texts: Iterable[str], vocab_size: int) -> JsonTokenizer:
    """Trains byte-level BPE (Sennrich et al. 2016 over bytes, as in GPT-2) of `vocab_size` ids.

    The special tokens come first, then the 256 bytes, then the merges. Equal texts in equal order
    give an equal tokenizer. A small corpus may run out of merges before `vocab_size` is reached.

    Raises:
      UserError: `vocab_size` leaves no room for the bytes and special tokens; no text.
    """
    smallest = 256 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise UserError(
            f"tokenizer.vocab_size={vocab_size} is too small: the bytes and special tokens alone "
            f"need {smallest}."
        )
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(_not_empty(texts), trainer)
    bpe.post_processor = start_with(SPECIAL_TOKENS["bos"], bpe)
    return JsonTokenizer(bpe, SPECIAL_TOKENS)


def start_with(token: str, library_tokenizer: tokenizers.Tokenizer) -> Any:
    """The post-processor that puts a token before every text."""
    id_ = library_tokenizer.token_to_id(token)
    return processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token} $B:1", special_tokens=[(token, id_)]
    )


def read_tokenizer_json(path: Path) -> JsonTokenizer:
    """Reads a published tokenizer.json, and the files beside it for its special tokens.

    Raises:
      UserError: the file is no tokenizer, or has no token that ends a text.
    """
    return published_tokenizer(library_file(path), beside(path))


def read_vocabulary(folder: Path) -> JsonTokenizer:
    """Reads the vocab.json and merges.txt of a byte-level BPE in the manner of GPT-2.

    Raises:
      UserError: the files are no such tokenizer.
    """
    settings = beside(folder / VOCABULARY_FILES[0])
    config = settings.read(TOKENIZER_CONFIG)
    name = str(config.get("tokenizer_class") or "GPT2Tokenizer")
    if name.removesuffix("Fast") != "GPT2Tokenizer":
        raise UserError(
            f"{folder} holds the vocabulary of a {name}, whose other parts no file says: add the "
            f"{TOKENIZER_FILE} that transformers saves of it."
        )
    try:
        model = models.BPE.from_file(*(str(folder / file) for file in VOCABULARY_FILES))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{folder} holds no vocabulary of byte-level BPE: {error}.") from error
    bpe = tokenizers.Tokenizer(model)
    space = bool(config.get("add_prefix_space"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)
    bpe.decoder = decoders.ByteLevel()
    added = {int(id_): token for id_, token in config.get("added_tokens_decoder", {}).items()}
    added = added or {id_: token for token, id_ in settings.read(ADDED_TOKENS).items()}
    names = [content_of(added[id_]) for id_ in sorted(added)] or [END_OF_TEXT]
    bpe.add_special_tokens([token for token in names if token != END_OF_TEXT or _has(bpe, token)])
    if any(bpe.token_to_id(content_of(token)) != id_ for id_, token in added.items()):
        raise UserError(f"the added tokens in {folder} do not follow on its vocab.json.")
    bos = content_of(config.get("bos_token")) or END_OF_TEXT
    if config.get("add_bos_token") and _has(bpe, bos):
        bpe.post_processor = start_with(bos, bpe)
    return published_tokenizer(bpe, settings)


def published_tokenizer(
    library_tokenizer: tokenizers.Tokenizer, settings: PublishedSettings
) -> JsonTokenizer:
    """A tokenizer with the special tokens that the files beside it name."""
    added = library_tokenizer.get_added_tokens_decoder()
    tokens = settings.tokens(
        {token.content for token in added.values()},
        library_tokenizer.token_to_id,
        library_tokenizer.id_to_token,
    )
    return JsonTokenizer(library_tokenizer, tokens, settings.eos_ids(), settings.kept)


def library_file(path: Path) -> tokenizers.Tokenizer:
    """The library's tokenizer of a file.

    Raises:
      UserError: the file is no tokenizer.
    """
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{path} cannot be read as a tokenizer.json: {error}.") from error


def _unpickled(content: str, *settings: Any) -> JsonTokenizer:
    return JsonTokenizer(tokenizers.Tokenizer.from_str(content), *settings)


def _has(library_tokenizer: tokenizers.Tokenizer, token: str) -> bool:
    return library_tokenizer.token_to_id(token) is not None


def _special_tokens(library_tokenizer: tokenizers.Tokenizer) -> dict[int, str]:
    added = library_tokenizer.get_added_tokens_decoder().items()
    return {id_: token.content for id_, token in added if token.special}


def _document_start(library_tokenizer: tokenizers.Tokenizer) -> list[int]:
    """The special tokens that the library puts before a text."""
    encoding = library_tokenizer.encode("a", add_special_tokens=True)
    marked = zip(encoding.ids, encoding.special_tokens_mask, strict=True)
    return [id_ for id_, _ in itertools.takewhile(lambda pair: pair[1], marked)]


def _without_prefix(part: Any, schemes: tuple[str, ...]) -> Any:
    """A tokenizer's JSON whose parts put no space before a text where their scheme is of these."""
    if isinstance(part, list):
        return [_without_prefix(inner, schemes) for inner in part if not _prepends(inner, schemes)]
    if not isinstance(part, dict):
        return part
    if part.get("type") == "Metaspace" and part["prepend_scheme"] in schemes:
        return part | {"prepend_scheme": "never"}
    if part.get("type") == "ByteLevel" and "always" in schemes:
        return part | {"add_prefix_space": False}
    nested = ("normalizer", "normalizers", "pre_tokenizer", "pretokenizers")
    changed = {name: _without_prefix(part[name], schemes) for name in nested if name in part}
    if _prepends(part.get("normalizer"), schemes):
        changed["normalizer"] = None
    return part | changed


def _prepends(part: Any, schemes: tuple[str, ...]) -> bool:
    """Whether this is a normalizer that puts something before every text."""
    return isinstance(part, dict) and part.get("type") == "Prepend" and "always" in schemes


def _made(content: dict[str, Any]) -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer.from_str(json.dumps(content))
    made.encode_special_tokens = True
    return made


def _types(decoder: Any) -> set[str]:
    """The types of a decoder and of those inside it, from their JSON form."""
    if not decoder:
        return set()
    return {decoder["type"]}.union(*(_types(inner) for inner in decoder.get("decoders", [])))


def _not_empty(texts: Iterable[str]) -> Iterator[str]:
    is_empty = True
    for text in texts:
        is_empty = False
        yield text
    if is_empty:
        raise UserError("the corpus holds no text to train a tokenizer on.")
