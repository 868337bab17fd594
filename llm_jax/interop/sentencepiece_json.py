"""A SentencePiece model as a tokenizer.json of the `tokenizers` library."""

from __future__ import annotations

from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers

from llm_jax.data.tokenizer_json import start_with
from llm_jax.data.tokenizer_sentencepiece import SentencePieceTokenizer, read_proto
from llm_jax.errors import UserError

# Of the messages of sentencepiece_model.proto.
_UNIGRAM, _BPE = 1, 2
_CONTROL, _USER_DEFINED = 3, 4
_SPACE = "▁"


def sentencepiece_json(tokenizer: SentencePieceTokenizer) -> bytes:
    """The content of a tokenizer.json that gives the ids of the SentencePiece model, and puts bos
    before a text where documents begin with it.

    After a user-defined piece inside a text the library begins a new word, where the model puts a
    space before first words (Gemma, the one family with such pieces, does not).

    Raises:
      UserError: a model that the library cannot imitate.
    """
    proto = read_proto(tokenizer.model)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    if (
        trainer.model_type not in (_UNIGRAM, _BPE)
        or trainer.treat_whitespace_as_suffix
        or not normalizer.escape_whitespaces
    ):
        raise UserError(
            "this SentencePiece model cannot be written as a tokenizer.json: only BPE and Unigram "
            "with the mark of a space before words can."
        )
    made = tokenizers.Tokenizer(
        _unigram(proto) if trainer.model_type == _UNIGRAM else _bpe(proto),
    )
    made.normalizer = _normalizer(normalizer)
    made.decoder = decoders.Sequence(
        [
            decoders.Replace(_SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if normalizer.add_dummy_prefix else []),
        ]
    )
    for piece in proto.pieces:
        if piece.type in (_CONTROL, _USER_DEFINED):
            special = piece.type == _CONTROL
            # Text holds spaces where the piece holds their mark, until it is normalised.
            normalized = not special and _SPACE in piece.piece
            made.add_tokens([AddedToken(piece.piece, normalized=normalized, special=special)])
    if tokenizer.document_start:
        made.post_processor = start_with(tokenizer.special_tokens["bos"], made)
    return made.to_str(pretty=True).encode()


def _unigram(proto: Any) -> Any:
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    trainer = proto.trainer_spec
    return models.Unigram(pieces, unk_id=trainer.unk_id, byte_fallback=trainer.byte_fallback)


def _bpe(proto: Any) -> Any:
    """Of all pairs of neighbours, SentencePiece merges the one whose whole has the best score."""
    ids = {piece.piece: id_ for id_, piece in enumerate(proto.pieces)}
    whole = sorted(
        (piece for piece in proto.pieces if piece.type == piece.NORMAL),
        key=lambda piece: -piece.score,
    )
    merges = [
        pair
        for piece in whole
        for pair in sorted(
            (
                (piece.piece[:cut], piece.piece[cut:])
                for cut in range(1, len(piece.piece))
                if piece.piece[:cut] in ids and piece.piece[cut:] in ids
            ),
            key=lambda pair: (ids[pair[0]], ids[pair[1]]),
        )
    ]
    return models.BPE(
        ids,
        merges,
        unk_token=proto.pieces[proto.trainer_spec.unk_id].piece,
        fuse_unk=True,
        byte_fallback=proto.trainer_spec.byte_fallback,
    )


def _normalizer(normalizer: Any) -> Any:
    steps: list[Any] = []
    if normalizer.precompiled_charsmap:
        steps.append(normalizers.Precompiled(normalizer.precompiled_charsmap))
    if normalizer.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex("^ +| +$"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if normalizer.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
