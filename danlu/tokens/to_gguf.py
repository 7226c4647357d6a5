"""A tokenizer of ours as what a GGUF file carries: the way back of `from_gguf.py`."""

import json
import re
from typing import Any

from tokenizers import pre_tokenizers

from danlu.core.errors import UserError
from danlu.tokens.from_gguf import PRE_TOKENIZERS
from danlu.tokens.load import ENDS
from danlu.tokens.pieces import Kind
from danlu.tokens.tokenizer import Tokenizer, flat_steps, is_space_sign


def tokenizer_to_gguf(tokenizer: Tokenizer, rows: int) -> dict[str, Any]:
    """Keys and values. `rows`: of the model's embedding; those without an entry are padded.

    Raises UserError for a tokenizer that llama.cpp has not, and for one that is larger than the embedding.
    """
    if tokenizer.vocab_size > rows:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} entries, the model's embedding {rows} rows",
            "give the tokenizer that belongs to the model",
        )
    content = json.loads(tokenizer.backend.to_str())
    if content["model"]["type"] != "BPE":
        raise UserError(
            f"a tokenizer of kind {content['model']['type']}", "danlu writes BPE into GGUF, no other"
        )
    entries = [tokenizer.backend.id_to_token(number) for number in range(rows)]
    kinds = [Kind.UNUSED if entry is None else Kind.NORMAL for entry in entries]
    for number, token in tokenizer.backend.get_added_tokens_decoder().items():
        kinds[number] = Kind.CONTROL if token.special else Kind.USER_DEFINED
    write = _sentencepiece if content["model"]["byte_fallback"] else _byte_level
    keys: dict[str, Any] = {
        "tokenizer.ggml.tokens": [entry or f"[PAD{number}]" for number, entry in enumerate(entries)],
        **write(content, entries, kinds),
        "tokenizer.ggml.token_type": [int(kind) for kind in kinds],
        "tokenizer.ggml.add_bos_token": bool(tokenizer.document_start),
    }
    if tokenizer.bos_id is not None:
        keys["tokenizer.ggml.bos_token_id"] = tokenizer.bos_id
    if tokenizer.eos is not None:
        keys["tokenizer.ggml.eos_token_id"] = tokenizer.eos_id
    others = [stop for stop in tokenizer.stops if stop != tokenizer.eos]
    for key, stop in zip(("eot", "eom"), others, strict=False):
        keys[f"tokenizer.ggml.{key}_token_id"] = tokenizer.special_ids[stop]
    # llama.cpp finds the usual names by itself.
    if unsaid := [stop for stop in others[2:] if stop not in ENDS]:
        raise UserError(f"GGUF has no place for a fourth stop token, {unsaid[0]!r}", "name three at most")
    if tokenizer.chat_template:
        keys["tokenizer.chat_template"] = tokenizer.chat_template
    return keys


def _byte_level(content: dict[str, Any], entries: list[str | None], kinds: list[Kind]) -> dict[str, Any]:
    merges = content["model"]["merges"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _how_words_are_cut(content),
        "tokenizer.ggml.merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in merges],
    }


def _sentencepiece(content: dict[str, Any], entries: list[str | None], kinds: list[Kind]) -> dict[str, Any]:
    """llama.cpp merges by the score of what is made: here the rank of the first merge that makes it."""
    steps = flat_steps(content["normalizer"]) + flat_steps(content["pre_tokenizer"])
    kept = [s for s in steps if s["type"] in ("Prepend", "Metaspace") or is_space_sign(s)]
    if wrong := [step["type"] for step in steps if step not in kept]:
        raise UserError(
            f"the tokenizer changes text ({wrong[0]}), which GGUF can't say", "convert to a folder"
        )
    unknown = content["model"]["unk_token"]
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(content["model"]["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        ranks.setdefault(left + right, rank)
    scores = []
    for number, entry in enumerate(entries):
        if entry is not None and entry == unknown:
            kinds[number] = Kind.UNKNOWN
        elif entry is not None and re.fullmatch("<0x[0-9A-F]{2}>", entry):
            kinds[number] = Kind.BYTE
        made = kinds[number] == Kind.NORMAL and entry in ranks
        scores.append(-float(ranks[entry or ""]) if made else -float(len(ranks)))
    blank = any(step["type"] == "Prepend" or step.get("prepend_scheme", "never") != "never" for step in steps)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.add_space_prefix": blank,
    }


def _how_words_are_cut(content: dict[str, Any]) -> str:
    """The name that llama.cpp has for the tokenizer's pre-tokenizer."""
    ours = _bare(content["pre_tokenizer"])
    for name, make in PRE_TOKENIZERS.items():
        if name != "default" and ours == _bare(_state(make())):
            return name
    raise UserError(
        "llama.cpp has no name for how this tokenizer cuts words", f"danlu knows {', '.join(PRE_TOKENIZERS)}"
    )


def _state(pre_tokenizer: pre_tokenizers.PreTokenizer) -> Any:
    return json.loads(pre_tokenizer.__getstate__())


def _bare(state: Any) -> Any:
    """Without what changes offsets only, and without a sequence around a single part."""
    if isinstance(state, list):
        return [_bare(part) for part in state]
    if not isinstance(state, dict):
        return state
    if state.get("type") == "Sequence" and len(state["pretokenizers"]) == 1:
        return _bare(state["pretokenizers"][0])
    return {key: _bare(value) for key, value in state.items() if key != "trim_offsets"}
