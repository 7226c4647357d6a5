"""Byte-level byte-pair encoding (Sennrich 2016; Radford 2019), trained by the tokenizers library."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from danlu.core.errors import UserError
from danlu.core.verbs import Estimate
from danlu.data.documents import read_documents
from danlu.tokens.chat import CHATML
from danlu.tokens.config import TokenizerConfig
from danlu.tokens.tokenizer import Tokenizer, begin_with

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"


def train_tokenizer(config: TokenizerConfig) -> dict[str, Any]:
    """Trains on the training documents only; writes the tokenizer's folder. Returns its figures.

    Raises UserError when the text supports fewer entries than asked for.
    """
    size = 0

    def texts() -> Any:
        nonlocal size
        for document in read_documents(config.data / "train.jsonl.zst"):
            size += len(document.text.encode())
            yield document.text

    tokenizer = train_bpe(texts(), config.vocab_size, str(config.data))
    tokenizer.save_folder(Path(config.out) / "tokenizer")
    return {"vocab_size": tokenizer.vocab_size, "trained_on_bytes": size}


def train_bpe(texts: Iterable[str], vocab_size: int, where: str = "the text") -> Tokenizer:
    """`bpe` of exactly `vocab_size` entries. Raises UserError when the text supports fewer."""
    tokenizer = bpe(texts, vocab_size)
    if tokenizer.vocab_size < vocab_size:
        raise UserError(
            f"{where}: supports a vocabulary of {tokenizer.vocab_size}, asked for {vocab_size}",
            f"set vocab_size={tokenizer.vocab_size} or less, or give more text",
        )
    return tokenizer


def bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of at most `vocab_size` entries, with ChatML's special tokens."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    begin_with(backend, END_OF_TEXT)
    return Tokenizer(backend, END_OF_TEXT, END_OF_TEXT, [TURN_END, END_OF_TEXT], CHATML)


def estimate(config: TokenizerConfig, upstream: Mapping[str, Estimate]) -> Estimate:
    """About 4 MB of text a second, and one word table in memory."""
    size = corpus_bytes(config.data, upstream)
    return Estimate(
        seconds=1 + size / 4e6,
        memory_bytes=(200 << 20) + size,
        outputs={"vocab_size": config.vocab_size, "bytes": size},
    )


def corpus_bytes(data: Path, upstream: Mapping[str, Estimate]) -> int:
    """Bytes of training text: predicted by the stage that makes it, else about 2.2 times the file's."""
    if "data" in upstream:
        return int(upstream["data"].outputs.get("bytes", 0))
    file = data / "train.jsonl.zst"
    return int(2.2 * file.stat().st_size) if file.exists() else 0
