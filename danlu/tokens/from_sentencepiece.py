"""A SentencePiece model file (`tokenizer.model`) as one of our tokenizers."""

from pathlib import Path
from typing import Any

import tokenizers

from danlu.core.errors import UserError
from danlu.tokens.pieces import Pieces

UNIGRAM, BPE = 1, 2
"""`model_type` of the file's training settings."""


def backend_from_sentencepiece(file: Path, raw: bytes) -> tuple[tokenizers.Tokenizer, str | None, str | None]:
    """The pipeline, and the tokens for begin and end of text. Raises UserError where it isn't such a file."""
    model = _parse(file, raw)
    kind, rules = model.trainer_spec.model_type, model.normalizer_spec
    if kind not in (UNIGRAM, BPE):
        raise UserError(f"{file}: cuts text into words or characters", "danlu reads BPE and Unigram models")
    if model.trainer_spec.treat_whitespace_as_suffix or not rules.escape_whitespaces:
        raise UserError(f"{file}: writes blanks behind words, or as they are", "danlu reads ▁ before words")
    pieces = Pieces(
        names=[piece.piece for piece in model.pieces],
        scores=[piece.score for piece in model.pieces],
        kinds=[piece.type for piece in model.pieces],
        bpe=kind == BPE,
        adds_blank=rules.add_dummy_prefix,
        squeezes=rules.remove_extra_whitespaces,
        charsmap=rules.precompiled_charsmap,
    )
    ends = (model.trainer_spec.bos_id, model.trainer_spec.eos_id)
    bos, eos = (pieces.names[n] if 0 <= n < len(pieces.names) else None for n in ends)
    return pieces.backend(), bos, eos


def _parse(file: Path, raw: bytes) -> Any:
    try:
        from google.protobuf.message import DecodeError
        from sentencepiece import sentencepiece_model_pb2
    except ImportError:
        raise UserError(
            f"{file}: a SentencePiece model needs the packages sentencepiece and protobuf",
            "pip install 'danlu[sentencepiece]'",
        ) from None
    messages: Any = sentencepiece_model_pb2
    model = messages.ModelProto()
    try:
        model.ParseFromString(raw)
    except DecodeError:
        raise UserError(
            f"{file}: not a SentencePiece model", "the file is damaged, or of another kind"
        ) from None
    if not model.pieces:
        raise UserError(f"{file}: a SentencePiece model without entries", "the file is damaged")
    return model
