"""The tokenizer that a GGUF file carries, as one of ours."""

from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from danlu.core.errors import UserError
from danlu.tokens.tokenizer import Tokenizer

CONTROL, USER_DEFINED = 3, 4
"""Kinds of entries in tokenizer.ggml.token_type."""

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def _words(pattern: str) -> pre_tokenizers.PreTokenizer:
    """Cuts a text by a pattern, then into bytes."""
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


PRE_TOKENIZERS = {
    "default": _gpt2,
    "gpt-2": _gpt2,
    "smollm": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()]),
    "llama-bpe": lambda: _words(_LLAMA3),
    "qwen2": lambda: _words(_QWEN2),
}
"""tokenizer.ggml.pre: how a text is cut before the merges."""

_ENDS = ("<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<|end|>")
"""Control tokens that end an answer wherever they come."""


def tokenizer_from_gguf(metadata: Mapping[str, Any], where: str) -> Tokenizer:
    """`metadata`: the file's, by full key. Raises UserError for a kind that danlu doesn't know."""

    def get(key: str, default: Any = None) -> Any:
        return metadata.get(f"tokenizer.ggml.{key}", default)

    kind, pre = get("model"), get("pre", "default")
    if kind != "gpt2":
        raise UserError(f"{where}: a tokenizer of kind {kind!r}", "danlu knows byte-level BPE (gpt2) only")
    if pre not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        raise UserError(f"{where}: words are cut as in {pre!r}", f"danlu knows {known}")
    entries, kinds, end = get("tokens") or [], get("token_type") or [], get("eos_token_id")
    if not entries or end is None or not 0 <= end < len(entries):
        raise UserError(f"{where}: the tokenizer has no entries, or no end", "the file is incomplete")
    merges = [tuple(merge.split(" ", 1)) for merge in get("merges") or []]
    try:
        bpe = models.BPE({entry: number for number, entry in enumerate(entries)}, merges)
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{where}: the tokenizer's merges: {error}", "the file is damaged") from None
    backend = tokenizers.Tokenizer(bpe)
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = PRE_TOKENIZERS[pre]()
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [AddedToken(entries[n], special=True, normalized=False) for n, k in enumerate(kinds) if k == CONTROL]
    )
    backend.add_tokens(
        [AddedToken(entries[n], normalized=False) for n, k in enumerate(kinds) if k == USER_DEFINED]
    )
    begin = get("bos_token_id") if get("add_bos_token", False) else None
    special = {entries[number] for number, kind in enumerate(kinds) if kind == CONTROL}
    eos = entries[end]
    stops = [eos, *(name for name in _ENDS if name in special and name != eos)]
    template = metadata.get("tokenizer.chat_template") or ""
    return Tokenizer(backend, None if begin is None else entries[begin], eos, stops, template)
