"""SentencePiece models."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llm_jax.data.tokenizer_base import SPECIAL_TOKENS, Tokenizer
from llm_jax.errors import UserError

MODEL_FILE = "tokenizer.model"


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model with a token for each purpose.

    The model's own control pieces serve where it has them; the other purposes get ids past its
    vocabulary. `decode(encode(text))` is `text` up to the model's own normalisation; a character
    that the model does not know is lost unless it was trained with byte fallback.
    """

    kind = "sentencepiece"

    def __init__(self, model: bytes):
        self._processor = _processor(model)
        self._model = model
        self._pieces = self._processor.vocab_size()
        ids, tokens = _special_ids(self._processor)
        super().__init__(max(self._pieces, max(ids.values()) + 1), ids, tokens)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        # Control pieces have no surface form, so no text is ever encoded as one.
        return self._processor.encode(list(texts), num_threads=os.cpu_count() or 1)

    def _decode_ordinary(self, ids: list[int]) -> str:
        return self._processor.decode(ids)

    def token_bytes(self) -> np.ndarray:
        counts = np.zeros(self.vocab_size, np.int32)
        processor = self._processor
        for id_ in range(self._pieces):
            if processor.is_byte(id_):
                counts[id_] = 1
            elif not (processor.is_control(id_) or processor.is_unknown(id_)):
                counts[id_] = len(processor.id_to_piece(id_).replace("▁", " ").encode())
        counts[list(self.special_ids.values())] = 0
        return counts

    def _files(self) -> dict[str, bytes]:
        return {MODEL_FILE: self._model}


def read_sentencepiece(path: Path) -> SentencePieceTokenizer:
    """Reads a .model file.

    Raises:
      UserError: the library is absent, or the file is no model.
    """
    try:
        return SentencePieceTokenizer(path.read_bytes())
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path} cannot be read as a SentencePiece model: {error}.") from error


def _processor(model: bytes) -> Any:
    try:
        import sentencepiece
    except ImportError as error:
        raise UserError(
            "a SentencePiece model needs the package: pip install sentencepiece"
        ) from error
    return sentencepiece.SentencePieceProcessor(model_proto=model)


def _special_ids(processor: Any) -> tuple[dict[str, int], dict[str, str]]:
    """The id and the string of each purpose."""
    named = {"eos": processor.eos_id(), "bos": processor.bos_id(), "pad": processor.pad_id()}
    ids: dict[str, int] = {}
    for purpose, token in SPECIAL_TOKENS.items():
        id_ = named.get(purpose, processor.piece_to_id(token))
        if id_ >= 0 and processor.is_control(id_) and id_ not in ids.values():
            ids[purpose] = id_
    tokens = {purpose: processor.id_to_piece(id_) for purpose, id_ in ids.items()}
    new = [purpose for purpose in SPECIAL_TOKENS if purpose not in ids]
    ids |= {purpose: processor.vocab_size() + i for i, purpose in enumerate(new)}
    return ids, {purpose: tokens.get(purpose, SPECIAL_TOKENS[purpose]) for purpose in ids}
