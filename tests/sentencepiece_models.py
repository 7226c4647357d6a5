"""Small SentencePiece models, trained by the library itself with the settings of well-known ones."""

import io
from collections.abc import Iterable
from typing import Any

import sentencepiece

LIKE: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "bpe", "byte_fallback": True, "split_digits": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True,
    },
    "gemma": {
        "model_type": "bpe", "byte_fallback": True, "split_digits": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True, "add_dummy_prefix": False,
        "user_defined_symbols": ["\n\n", "<start_of_turn>", "<end_of_turn>"], "bos_id": 2, "eos_id": 1,
        "pad_id": 0, "unk_id": 3,
    },
    "t5": {"model_type": "unigram", "normalization_rule_name": "nmt_nfkc"},
    "unigram with bytes": {
        "model_type": "unigram", "byte_fallback": True, "split_digits": True,
        "normalization_rule_name": "nfkc",
        "remove_extra_whitespaces": False,
    },
}  # fmt: skip


def train(texts: Iterable[str], kind: str, vocab_size: int = 600) -> bytes:
    """A model's file."""
    file = io.BytesIO()
    lines = [line for text in texts for line in text.split("\n") if line]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=file, vocab_size=vocab_size, hard_vocab_limit=False,
        character_coverage=0.995, minloglevel=2, num_threads=1, **LIKE[kind],
    )  # fmt: skip
    return file.getvalue()
