"""A tokenizer of ours as what a GGUF file carries: the way back of `from_gguf.py`."""

import json
from typing import Any

from tokenizers import pre_tokenizers

from danlu.core.errors import UserError
from danlu.tokens.from_gguf import CONTROL, PRE_TOKENIZERS, USER_DEFINED
from danlu.tokens.tokenizer import Tokenizer

NORMAL, UNUSED = 1, 5


def tokenizer_to_gguf(tokenizer: Tokenizer, rows: int) -> dict[str, Any]:
    """Keys and values. `rows`: of the model's embedding; those without an entry are padded.

    Raises UserError for a tokenizer that isn't byte-level BPE, or cuts words as llama.cpp doesn't.
    """
    content = json.loads(tokenizer.backend.to_str())
    if content["model"]["type"] != "BPE" or content["model"].get("byte_fallback"):
        raise UserError("the tokenizer is not byte-level BPE", "danlu writes no other into GGUF yet")
    entries = [tokenizer.backend.id_to_token(number) for number in range(rows)]
    added = tokenizer.backend.get_added_tokens_decoder()
    kinds = [UNUSED if entry is None else NORMAL for entry in entries]
    for number, token in added.items():
        kinds[number] = CONTROL if token.special else USER_DEFINED
    merges = content["model"]["merges"]
    stops = [stop for stop in tokenizer.stops if stop != tokenizer.eos]
    keys: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _how_words_are_cut(content),
        "tokenizer.ggml.tokens": [entry or f"[PAD{number}]" for number, entry in enumerate(entries)],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in merges],
        "tokenizer.ggml.eos_token_id": tokenizer.eos_id,
        "tokenizer.ggml.add_bos_token": tokenizer.bos_id is not None,
    }
    if tokenizer.bos_id is not None:
        keys["tokenizer.ggml.bos_token_id"] = tokenizer.bos_id
    if stops:
        keys["tokenizer.ggml.eot_token_id"] = tokenizer.special_ids[stops[0]]
    if tokenizer.chat_template:
        keys["tokenizer.chat_template"] = tokenizer.chat_template
    return keys


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
