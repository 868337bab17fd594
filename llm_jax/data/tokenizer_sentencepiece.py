"""SentencePiece models."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llm_jax.data.tokenizer_base import Place, Tokenizer
from llm_jax.data.tokenizer_published import TOKENIZER_CONFIG, beside
from llm_jax.errors import UserError

MODEL_FILE = "tokenizer.model"


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model, without a token more than it has.

    Its control pieces are the special tokens. `decode(encode(text))` is `text` up to the model's
    own normalisation; a character that the model does not know is lost unless it was trained with
    byte fallback.
    """

    kind = "sentencepiece"

    def __init__(
        self,
        model: bytes,
        tokens: Mapping[str, str],
        *,
        starts_with_bos: bool,
        eos_ids: Sequence[int] = (),
        published: Mapping[str, bytes] | None = None,
    ):
        """
        Args:
          model: the content of a .model file.
          tokens: the string of each purpose; all of them control pieces of the model.
          starts_with_bos: whether a document begins with bos.
          eos_ids, published: see `Tokenizer`.
        """
        self._processor = read_processor(model)
        self.model = model
        controls = control_pieces(self._processor)
        ids = {string: id_ for id_, string in controls.items()}
        special_ids = {purpose: ids[token] for purpose, token in tokens.items()}
        super().__init__(
            self._processor.vocab_size(),
            special_ids,
            tokens,
            document_start=[special_ids["bos"]] if starts_with_bos else [],
            eos_ids=eos_ids,
            published=published,
        )
        self._string_of_special |= controls

    def encode_batch(self, texts: Sequence[str], place: Place = "start") -> list[list[int]]:
        # Control pieces have no surface form, so no text is ever encoded as one.
        if place != "after_text":
            return self._processor.encode(list(texts), num_threads=os.cpu_count() or 1)
        # A model that drops the space at the start of a text puts it before the first word again.
        processor, drops_space = self._continuing
        return [
            (self._processor if drops_space and text.startswith(" ") else processor).encode(text)
            for text in texts
        ]

    @functools.cached_property
    def _continuing(self) -> tuple[Any, bool]:
        """A processor that puts no space before the first word, for texts that go on after other
        text; and whether the model drops the space that starts a text."""
        proto = read_proto(self.model)
        proto.normalizer_spec.add_dummy_prefix = False
        processor = read_processor(proto.SerializeToString())
        return processor, proto.normalizer_spec.remove_extra_whitespaces

    def _decode_ordinary(self, ids: list[int]) -> str:
        return self._processor.decode(ids)

    def token_bytes(self) -> np.ndarray:
        counts = np.zeros(self.vocab_size, np.int32)
        processor = self._processor
        for id_ in range(self.vocab_size):
            if processor.is_byte(id_):
                counts[id_] = 1
            elif not (processor.is_control(id_) or processor.is_unknown(id_)):
                counts[id_] = len(processor.id_to_piece(id_).replace("▁", " ").encode())
        return counts

    def files(self) -> dict[str, bytes]:
        return {MODEL_FILE: self.model}

    def __reduce__(self) -> tuple[Any, ...]:
        make = functools.partial(
            SentencePieceTokenizer,
            starts_with_bos=bool(self.document_start),
            eos_ids=self.eos_ids,
            published=self.published,
        )
        return make, (self.model, self.special_tokens)


def read_sentencepiece(path: Path) -> SentencePieceTokenizer:
    """Reads a published .model file, and the files beside it for its special tokens.

    A document begins with bos where the model has one, unless tokenizer_config.json says
    add_bos_token=false.

    Raises:
      UserError: the library is absent; the file is no model, or has no token that ends a text.
    """
    settings = beside(path)
    try:
        model = path.read_bytes()
        processor = read_processor(model)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path} cannot be read as a SentencePiece model: {error}.") from error
    controls = control_pieces(processor)
    own = {"eos": processor.eos_id(), "bos": processor.bos_id(), "pad": processor.pad_id()}
    named = {purpose: controls[id_] for purpose, id_ in own.items() if id_ in controls}
    ids = {string: id_ for id_, string in controls.items()}
    tokens = settings.tokens(ids.keys(), ids.get, controls.get, named)
    add_bos = bool(settings.read(TOKENIZER_CONFIG).get("add_bos_token", True))
    return SentencePieceTokenizer(
        model,
        tokens,
        starts_with_bos=add_bos and "bos" in tokens,
        eos_ids=settings.eos_ids(),
        published=settings.kept,
    )


def read_processor(model: bytes) -> Any:
    """The library's processor of a model's content.

    Raises:
      UserError: the library is absent. RuntimeError: no model.
    """
    try:
        import sentencepiece
    except ImportError as error:
        raise UserError(
            "a SentencePiece model needs the package: pip install sentencepiece"
        ) from error
    return sentencepiece.SentencePieceProcessor(model_proto=model)


def read_proto(model: bytes) -> Any:
    """The message sentencepiece.ModelProto of a model's content."""
    from sentencepiece import sentencepiece_model_pb2 as messages

    return messages.ModelProto.FromString(model)  # type: ignore[attr-defined]


def control_pieces(processor: Any) -> dict[int, str]:
    """The string of each control piece, by its id."""
    ids = filter(processor.is_control, range(processor.vocab_size()))
    return {id_: processor.id_to_piece(id_) for id_ in ids}
