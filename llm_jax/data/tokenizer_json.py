"""Tokenizers of the `tokenizers` library: byte-level BPE trained here, or a tokenizer.json."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from llm_jax.data.tokenizer_base import SPECIAL_TOKENS, Tokenizer
from llm_jax.errors import UserError

TOKENIZER_FILE = "tokenizer.json"

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

# Strings by which published tokenizers name a purpose, looked for among their added tokens where
# no file beside them says. eos comes first: where one token is both eos and bos or pad, it stays
# eos, and the other purpose gets an id of its own.
_PUBLISHED: dict[str, tuple[str, ...]] = {
    "eos": ("<|eos|>", "</s>", "<|end_of_text|>", "<|endoftext|>", "<eos>"),
    "bos": ("<|bos|>", "<s>", "<|begin_of_text|>", "<|startoftext|>", "<bos>"),
    "pad": ("<|pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>"),
    "system": ("<|system|>",),
    "user": ("<|user|>",),
    "assistant": ("<|assistant|>",),
    "tool": ("<|tool|>",),
    "end_of_turn": ("<|end_of_turn|>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>"),
}


class JsonTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library with a token for each purpose."""

    kind = "tokenizers"

    def __init__(self, library_tokenizer: tokenizers.Tokenizer, tokens: dict[str, str]):
        library_tokenizer.no_truncation()
        library_tokenizer.no_padding()
        # Marks tokens that the file holds as ordinary added tokens as special ones, too.
        library_tokenizer.add_special_tokens(
            [
                tokenizers.AddedToken(token, normalized=False, special=True)
                for token in tokens.values()
            ]
        )
        library_tokenizer.encode_special_tokens = True  # encode the strings of specials as text
        ids = library_tokenizer.get_vocab(with_added_tokens=True)
        super().__init__(
            max(ids.values()) + 1, {name: ids[token] for name, token in tokens.items()}, tokens
        )
        self._tokenizer = library_tokenizer
        # Special tokens without a purpose here are not to be forged or shown either.
        self._string_of_special |= {
            id_: token.content
            for id_, token in library_tokenizer.get_added_tokens_decoder().items()
            if token.special
        }

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        batch = [encoding.ids for encoding in encodings]
        return [
            ids if self._string_of_special.keys().isdisjoint(ids) else self._encode_split(text)
            for text, ids in zip(texts, batch, strict=True)
        ]

    def _encode_split(self, text: str) -> list[int]:
        """Encodes a text of which the model itself makes a special token (Unigram, WordPiece).

        The text is split inside the string that was taken for a special token.
        """
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        for id_, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if id_ in self._string_of_special and end - start > 1:
                return self._encode_split(text[: start + 1]) + self._encode_split(text[start + 1 :])
        return [id_ for id_ in encoding.ids if id_ not in self._string_of_special]

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

    def _files(self) -> dict[str, bytes]:
        return {TOKENIZER_FILE: self._tokenizer.to_str(pretty=True).encode()}

    def __reduce__(self) -> tuple[Any, ...]:
        # The library's own pickling forgets that specials are to be encoded as text.
        return _from_string, (self._tokenizer.to_str(), self.special_tokens)


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
    return JsonTokenizer(bpe, SPECIAL_TOKENS)


def read_tokenizer_json(path: Path, tokens: dict[str, str] | None = None) -> JsonTokenizer:
    """Reads a tokenizer.json.

    `tokens` gives the string of each purpose; without it they come from tokenizer_config.json or
    special_tokens_map.json beside the file, then from the names that published tokenizers use,
    and a purpose that the tokenizer has no token for gets a new one past its vocabulary.

    Raises:
      UserError: the file is no tokenizer.
    """
    try:
        library_tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{path} cannot be read as a tokenizer.json: {error}.") from error
    if tokens is None:
        tokens = _special_tokens(library_tokenizer, path.parent)
    return JsonTokenizer(library_tokenizer, tokens)


def _from_string(content: str, tokens: dict[str, str]) -> JsonTokenizer:
    return JsonTokenizer(tokenizers.Tokenizer.from_str(content), tokens)


def _special_tokens(library_tokenizer: tokenizers.Tokenizer, folder: Path) -> dict[str, str]:
    added = {token.content for token in library_tokenizer.get_added_tokens_decoder().values()}
    configs = [_json(folder / n) for n in ("tokenizer_config.json", "special_tokens_map.json")]
    found: dict[str, str] = {}
    for purpose, published in _PUBLISHED.items():
        named = [_content(config.get(f"{purpose}_token")) for config in configs]
        candidates = [token for token in named if library_tokenizer.token_to_id(token) is not None]
        candidates += [token for token in published if token in added]
        if candidates and candidates[0] not in found.values():
            found[purpose] = candidates[0]
    for purpose, token in SPECIAL_TOKENS.items():
        while purpose not in found and token in found.values():
            token = token.replace("|>", "_|>")
        found.setdefault(purpose, token)
    return found


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}.") from error


def _content(token: Any) -> str:
    """The string of a token, which the files write plainly or as an object."""
    return (token["content"] if isinstance(token, dict) else token) or ""


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
