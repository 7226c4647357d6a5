"""tiktoken's files: a line an entry, bytes in base64 and rank. Meta's `tokenizer.model` since Llama 3.

The file says neither how words are cut nor which special tokens there are.
"""

import base64
import binascii
import re
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from danlu.core.errors import UserError
from danlu.tokens.pieces import merges
from danlu.tokens.tokenizer import BYTES, begin_with

LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""cl100k's pattern, as Llama 3 uses it."""

_NAMED = {
    0: "<|begin_of_text|>", 1: "<|end_of_text|>", 4: "<|finetune_right_pad_id|>", 6: "<|start_header_id|>",
    7: "<|end_header_id|>", 8: "<|eom_id|>", 9: "<|eot_id|>", 10: "<|python_tag|>",
}  # fmt: skip
"""Llama 3's special tokens behind the entries of the file; the others of its 256 are reserved."""


def is_tiktoken(raw: bytes) -> bool:
    return re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", raw) is not None


def cut_words(pattern: str) -> pre_tokenizers.PreTokenizer:
    """Cuts a text by a pattern, then into bytes."""
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def backend_from_tiktoken(file: Path, raw: bytes, pattern: str) -> tokenizers.Tokenizer:
    """The pipeline, without special tokens. Raises UserError naming a broken line."""
    spelling = {byte: character for character, byte in BYTES.items()}
    entries: dict[str, int] = {}
    for number, line in enumerate(raw.splitlines(), start=1):
        try:
            text, rank = line.split()
            spelt = "".join(spelling[byte] for byte in base64.b64decode(text, validate=True))
            entries[spelt] = int(rank)
        except (ValueError, binascii.Error):
            raise UserError(
                f"{file}, line {number}: not an entry of tiktoken's", "the file is damaged"
            ) from None
    ordered = sorted(entries, key=lambda entry: entries[entry])
    # A whole word that is an entry is taken before any merge, as tiktoken does.
    model = models.BPE(entries, merges(ordered), ignore_merges=True)
    backend = tokenizers.Tokenizer(model)
    try:
        backend.pre_tokenizer = cut_words(pattern)
    except Exception as error:  # the library raises bare Exception
        raise UserError(
            f"{file}: the pattern that cuts words: {error}", "see tokenizer_config.json"
        ) from None
    backend.decoder = decoders.ByteLevel()
    return backend


def add_llama3_tokens(backend: tokenizers.Tokenizer) -> tuple[str, str]:
    """Llama 3's special tokens, behind the entries; returns begin and end of text."""
    reserved = (f"<|reserved_special_token_{n}|>" for n in range(256))
    names = [_NAMED.get(n) or next(reserved) for n in range(256)]
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    begin_with(backend, names[0])
    return names[0], names[1]
