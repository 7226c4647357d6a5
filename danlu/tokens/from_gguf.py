"""The tokenizer that a GGUF file carries, as one of ours."""

from collections.abc import Callable, Mapping
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from danlu.core.errors import UserError
from danlu.tokens.from_tiktoken import LLAMA3_WORDS, cut_words
from danlu.tokens.load import ENDS
from danlu.tokens.pieces import Kind, Pieces, add_tokens
from danlu.tokens.tokenizer import Tokenizer, begin_with


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "default": _gpt2,
    "gpt-2": _gpt2,
    "smollm": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()]),
    "llama-bpe": lambda: cut_words(LLAMA3_WORDS),
    "qwen2": lambda: cut_words(LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")),
}
"""tokenizer.ggml.pre: how a text is cut before the merges."""


class _Keys:
    """The values under tokenizer.ggml, each of the type that it must have."""

    def __init__(self, metadata: Mapping[str, Any], where: str) -> None:
        self.metadata, self.where = metadata, where

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        value = self.metadata.get(f"tokenizer.ggml.{key}", default)
        if value is not None and not isinstance(value, kind):
            raise UserError(f"{self.where}: tokenizer.ggml.{key} is {value!r}", "the file is damaged")
        return value

    def token(self, key: str, entries: list[str]) -> str | None:
        """The entry whose id stands under `key`."""
        number = self.get(key, int)
        if number is not None and not 0 <= number < len(entries):
            raise UserError(
                f"{self.where}: tokenizer.ggml.{key} is {number}, of {len(entries)} entries",
                "the file is damaged",
            )
        return None if number is None else entries[number]


def tokenizer_from_gguf(metadata: Mapping[str, Any], where: str) -> Tokenizer:
    """`metadata`: the file's, by full key. Raises UserError for a kind that danlu doesn't know."""
    keys = _Keys(metadata, where)
    kind = keys.get("model", str)
    if kind not in _READERS:
        raise UserError(f"{where}: a tokenizer of kind {kind!r}", f"danlu knows {', '.join(_READERS)}")
    entries = keys.get("tokens", list, [])
    kinds = keys.get("token_type", list) or [Kind.NORMAL] * len(entries)
    if not entries or len(kinds) != len(entries) or len(set(entries)) != len(entries):
        raise UserError(
            f"{where}: {len(entries)} tokens, {len(set(entries))} different, {len(kinds)} kinds",
            "the file is damaged",
        )
    try:
        backend, begins = _READERS[kind](keys, entries, kinds)
    except UserError:
        raise
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{where}: the tokenizer: {error}", "the file is damaged") from None
    bos, eos = keys.token("bos_token_id", entries), keys.token("eos_token_id", entries)
    turn_ends = [keys.token(key, entries) for key in ("eot_token_id", "eom_token_id")]
    special = {entries[number] for number, kind in enumerate(kinds) if kind == Kind.CONTROL}
    found = [eos, *turn_ends, *(name for name in ENDS if name in special)]
    stops = list(dict.fromkeys(name for name in found if name is not None))
    backend.add_special_tokens([name for name in (bos, *stops) if name is not None])
    begin_with(backend, bos if keys.get("add_bos_token", bool, begins) else None)
    template = metadata.get("tokenizer.chat_template") or ""
    return Tokenizer(backend, bos, eos, stops, template)


_Backend = tuple[tokenizers.Tokenizer, bool]
"""The pipeline, and whether a text begins with BOS where the file doesn't say so."""


def _byte_level(keys: _Keys, entries: list[str], kinds: list[int]) -> _Backend:
    pre = keys.get("pre", str, "default")
    if pre not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        raise UserError(f"{keys.where}: words are cut as in {pre!r}", f"danlu knows {known}")
    merges = [tuple(merge.split(" ", 1)) for merge in keys.get("merges", list, [])]
    numbers = {entry: number for number, entry in enumerate(entries)}
    # Llama 3 takes a whole word that is an entry before any merge.
    backend = tokenizers.Tokenizer(models.BPE(numbers, merges, ignore_merges=pre == "llama-bpe"))
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = PRE_TOKENIZERS[pre]()
    backend.decoder = decoders.ByteLevel()
    add_tokens(backend, entries, kinds)
    return backend, False


def _sentencepiece(keys: _Keys, entries: list[str], kinds: list[int]) -> _Backend:
    scores = keys.get("scores", list, [])
    if len(scores) != len(entries):
        raise UserError(f"{keys.where}: {len(entries)} entries, {len(scores)} scores", "the file is damaged")
    blank = keys.get("add_space_prefix", bool, True)
    return Pieces(entries, scores, kinds, bpe=True, adds_blank=blank).backend(), True


_READERS: dict[str, Callable[[_Keys, list[str], list[int]], _Backend]] = {
    "gpt2": _byte_level,
    "llama": _sentencepiece,
}
"""tokenizer.ggml.model."""
