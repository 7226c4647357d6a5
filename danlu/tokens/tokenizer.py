"""The tokenizer: one path from text to ids for training, evaluation and serving."""

import hashlib
import json
import re
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import models, processors

from danlu.core.errors import UserError
from danlu.core.files import atomic_folder

_INVALID = "\udc80-\udcff"
"""Bytes that aren't UTF-8, as Python's "surrogateescape" shows them."""

SPACE = "▁"
"""What SentencePiece writes for a space."""


def _byte_alphabet() -> dict[str, int]:
    """Character → byte, in the alphabet that byte-level BPE writes its entries in (GPT-2).

    Printable Latin-1 bytes stand for themselves, the others for the characters from U+0100 on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTES = _byte_alphabet()


class Tokenizer:
    """A tokenizer of any kind with its special tokens and chat template.

    `eos`: the token after a document, `stops`: those that end an answer; there may be none. What stands
    before a document, the backend's post-processor says: see `begin_with`. Text is never parsed for special
    tokens: `<|im_end|>` in a user's message is ordinary characters.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        bos: str | None,
        eos: str | None,
        stops: list[str],
        chat_template: str,
    ) -> None:
        self.backend = backend
        backend.encode_special_tokens = True
        special = {n: token for n, token in backend.get_added_tokens_decoder().items() if token.special}
        self.special_ids: dict[str, int] = {token.content: number for number, token in special.items()}
        self.swallows: dict[str, tuple[bool, bool]] = {
            token.content: (token.lstrip, token.rstrip) for token in special.values()
        }
        """Whether a special token takes in the blanks before it, and behind it (Phi-3's do)."""
        self._special = set(self.special_ids.values()) - _unknown(backend)
        self._never_spelt = set(self._special)
        if isinstance(backend.model, models.Unigram):  # it finds the entries for bytes in text, too
            names = (f"<0x{byte:02X}>" for byte in range(256))
            self._never_spelt |= {n for n in map(backend.token_to_id, names) if n is not None}
        self.bos, self.eos, self.stops, self.chat_template = bos, eos, stops, chat_template
        self._decoder = _parts(backend.decoder)

    @cached_property
    def vocab_size(self) -> int:
        """Rows that an embedding needs: the largest id + 1."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def eos_id(self) -> int:
        """The end of a document. Raises UserError where the vocabulary has no such token."""
        if self.eos is None:
            raise UserError(
                "the tokenizer has no token for the end of a text",
                "name one as eos_token in its tokenizer_config.json",
            )
        return self.special_ids[self.eos]

    @property
    def bos_id(self) -> int | None:
        """The beginning of a text, where the vocabulary has such a token."""
        return None if self.bos is None else self.special_ids[self.bos]

    @property
    def stop_ids(self) -> list[int]:
        """Tokens that end an answer."""
        return [self.special_ids[token] for token in self.stops]

    def encode(self, text: str, mid_text: bool = False) -> list[int]:
        """The ids of a plain text.

        `mid_text`: it stands behind other text, so that no blank is put before its first word.
        """
        return self._encode(text, self._mid_text if mid_text else self.backend, self._mid_text)

    def _encode(self, text: str, backend: tokenizers.Tokenizer, rest: tokenizers.Tokenizer) -> list[int]:
        """By `backend`; where a text that spells a special token would become it, cut within, then by `rest`.

        A Unigram vocabulary holds special tokens, and those for bytes, as entries like others.
        """
        ids: list[int] = []
        while True:
            encoding = backend.encode(text, add_special_tokens=False)
            places = zip(encoding.ids, encoding.offsets, strict=True) if self._suspects(encoding.ids) else ()
            cut = next(
                (begin + 1 for number, (begin, end) in places if self._is_spelt(number, text[begin:end])), 0
            )
            if not cut:
                return ids + encoding.ids
            if cut == len(text):
                raise UserError(f"the tokenizer makes a special token of the text {text!r}", "remove it")
            ids += backend.encode(text[:cut], add_special_tokens=False).ids
            text, backend = text[cut:], rest

    def _suspects(self, ids: list[int]) -> bool:
        return not self._never_spelt.isdisjoint(ids)

    def _is_spelt(self, number: int, text: str) -> bool:
        """Whether the token comes from a text that spells it, not from a byte without another entry."""
        is_byte = number in self._never_spelt and self.backend.id_to_token(number) == text
        return number in self._special or is_byte

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return [
            self.encode(text) if self._suspects(e.ids) else e.ids
            for e, text in zip(encodings, texts, strict=True)
        ]

    def encode_document(self, text: str) -> list[int]:
        """A whole document as pretraining sees it: its start, its text, its end."""
        return [*self.document_start, *self.encode(text), self.eos_id]

    @cached_property
    def document_start(self) -> list[int]:
        """The ids before the first token of a document; a prompt for continuation begins with them too."""
        encoding = self.backend.encode("a", add_special_tokens=True)
        first = encoding.special_tokens_mask.index(0)
        return encoding.ids[:first]

    @property
    def start_id(self) -> int:
        """What a model is given to predict a text's first token from: its start, else the end of another."""
        return self.document_start[-1] if self.document_start else self.eos_id

    def decode(self, ids: list[int]) -> str:
        """The text, without special tokens; bytes that aren't UTF-8 become U+FFFD."""
        text = self.decode_bytes(ids).decode("utf-8", "replace")
        return text[1:] if self.drops_first_blank and text.startswith(" ") else text

    def encode_bytes(self, raw: bytes) -> list[int]:
        """Any bytes, not normalised; what isn't UTF-8 goes byte by byte. `decode_bytes` gives them back.

        Raises UserError where it would not give back the same.
        """
        text = raw.decode("utf-8", "surrogateescape")
        literal = re.compile(f"([{_INVALID}{SPACE if self._writes_spaces else ''}]+)")
        ids: list[int] = []
        for number, part in enumerate(literal.split(text)):
            if number % 2:
                ids += [self._byte_ids[byte] for byte in part.encode("utf-8", "surrogateescape")]
            elif part:
                ids += self._encode(part, self._verbatim, self._verbatim)
        if self.decode_bytes(ids) != raw:
            raise UserError(
                "the tokenizer can't write this text so that the same bytes come back",
                "use a model whose tokenizer knows every byte and keeps capitals",
            )
        return ids

    def decode_bytes(self, ids: list[int]) -> bytes:
        """The bytes that ids stand for, mid-text; special tokens, and ids beyond the last, stand for none."""
        known = self.token_bytes
        return b"".join(known[number] if number < len(known) else b"" for number in ids)

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """For each id the bytes it stands for."""
        added = self.backend.get_added_tokens_decoder()
        found = []
        for number in range(self.vocab_size):
            if number in added:
                found.append(b"" if added[number].special else added[number].content.encode())
            else:
                name = self.backend.id_to_token(number)
                found.append(b"" if name is None else _bytes_of(name, self._decoder))
        return found

    @cached_property
    def _byte_ids(self) -> dict[int, int]:
        """The entry of each byte."""
        ids = {}
        spelt = {byte: character for character, byte in BYTES.items()}
        for byte in range(256):
            for name in (spelt[byte], f"<0x{byte:02X}>"):
                number = self.backend.token_to_id(name)
                if number is not None and self.token_bytes[number] == bytes([byte]):
                    ids[byte] = number
                    break
            else:
                raise UserError(
                    f"the tokenizer has no entry for the byte {byte}",
                    "use a model whose tokenizer knows every byte",
                )
        return ids

    @cached_property
    def prefixes_segments(self) -> bool:
        """Whether a blank is put before every text between special tokens, not before the first one only."""
        parts = [*_parts(self.backend.normalizer), *_parts(self.backend.pre_tokenizer)]
        return any(_adds_blank(part) and part.get("prepend_scheme") != "first" for part in parts)

    @cached_property
    def drops_first_blank(self) -> bool:
        """Whether the blank before the first word is no part of a text."""
        return any(
            (step["type"] == "Strip" and step["start"])
            or (step["type"] == "Metaspace" and step["prepend_scheme"] != "never")
            or step["type"] == "WordPiece"
            for step in self._decoder
        )

    @cached_property
    def _writes_spaces(self) -> bool:
        """Whether ▁ in an entry means a blank."""
        return any(step["type"] in ("Replace", "Metaspace") for step in self._decoder)

    @cached_property
    def _mid_text(self) -> tokenizers.Tokenizer:
        """The same without the blank before a text's first word."""
        parts = [*_parts(self.backend.normalizer), *_parts(self.backend.pre_tokenizer)]
        return self._changed(_without_blank) if any(map(_adds_blank, parts)) else self.backend

    @cached_property
    def _verbatim(self) -> tokenizers.Tokenizer:
        """The same without that blank, and without all that changes text."""
        kept = (part["type"] == "Prepend" or is_space_sign(part) for part in _parts(self.backend.normalizer))
        return self._mid_text if all(kept) else self._changed(_without_changes)

    def _changed(self, change: Callable[[dict[str, Any]], None]) -> tokenizers.Tokenizer:
        content = json.loads(self.backend.to_str())
        change(content)
        backend = tokenizers.Tokenizer.from_str(json.dumps(content))
        backend.encode_special_tokens = True
        return backend

    def fingerprint(self) -> str:
        """SHA-256 of everything that decides ids."""
        parts = [self.backend.to_str(), str(self.bos), str(self.eos), *self.stops, self.chat_template]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja into an existing folder."""
        # Not backend.save: of a full disk that says nothing that could be told from a fault of ours.
        (folder / "tokenizer.json").write_text(self.backend.to_str(pretty=True), "utf-8")
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self.bos,
            "eos_token": self.eos,
            "pad_token": self.eos,
            "stop_tokens": self.stops,
            "clean_up_tokenization_spaces": False,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
        (folder / "chat_template.jinja").write_text(self.chat_template, "utf-8")

    def save_folder(self, folder: Path) -> None:
        """`save` into a folder of its own, whole or absent."""
        with atomic_folder(folder) as temporary:
            self.save(temporary)


def begin_with(backend: tokenizers.Tokenizer, bos: str | None) -> None:
    """Makes `bos` stand before every document, or nothing."""
    if bos is None:
        backend.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
        return
    backend.post_processor = processors.TemplateProcessing(
        single=[bos, "$A"], pair=[bos, "$A", "$B"], special_tokens=[(bos, backend.token_to_id(bos))]
    )


def _unknown(backend: tokenizers.Tokenizer) -> set[int]:
    """The entry that stands for what the vocabulary has not."""
    try:
        return {token.id for token in backend.model.tokenize("\U0010fffd")}
    except Exception:  # the library raises bare Exception where there is no such entry
        return set()


# The parts of the library's pipeline, as its files write them.


def _parts(component: Any) -> list[dict[str, Any]]:
    """A normaliser, pre-tokenizer or decoder as a list of steps."""
    return [] if component is None else flat_steps(json.loads(component.__getstate__()))


def flat_steps(state: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A component of a tokenizer.json as a list of steps."""
    if state is None:
        return []
    if state["type"] != "Sequence":
        return [state]
    inner = next(value for value in state.values() if isinstance(value, list))
    return [step for part in inner for step in flat_steps(part)]


def _adds_blank(part: dict[str, Any]) -> bool:
    return (
        part["type"] == "Prepend"
        or bool(part.get("add_prefix_space", False))
        or (part["type"] == "Metaspace" and part["prepend_scheme"] != "never")
    )


def is_space_sign(part: dict[str, Any]) -> bool:
    return part["type"] == "Replace" and part["pattern"] == {"String": " "} and part["content"] == SPACE


def _without_blank(content: dict[str, Any]) -> None:
    """Takes the blank before a text's first word out of a tokenizer.json."""
    steps = [step for step in flat_steps(content["normalizer"]) if step["type"] != "Prepend"]
    content["normalizer"] = {"type": "Sequence", "normalizers": steps} if steps else None
    for part in flat_steps(content["pre_tokenizer"]):
        if part["type"] == "Metaspace":
            part["prepend_scheme"] = "never"
        elif "add_prefix_space" in part:
            part["add_prefix_space"] = False


def _without_changes(content: dict[str, Any]) -> None:
    """Takes all that changes text out of a tokenizer.json, but the sign for a blank."""
    _without_blank(content)
    steps = [step for step in flat_steps(content["normalizer"]) if is_space_sign(step)]
    content["normalizer"] = {"type": "Sequence", "normalizers": steps} if steps else None


def _bytes_of(name: str, decoder: list[dict[str, Any]]) -> bytes:
    """What an entry stands for, by the decoder's steps."""
    for step in decoder:
        kind = step["type"]
        if kind == "ByteLevel":
            known = all(character in BYTES for character in name)
            return bytes(BYTES[character] for character in name) if known else name.encode()
        if kind == "ByteFallback":
            if match := re.fullmatch("<0x([0-9A-F]{2})>", name):
                return bytes([int(match[1], 16)])
        elif kind == "Replace":
            name = re.sub(_pattern(step["pattern"]), lambda _, s=step: s["content"], name)  # type: ignore[misc]
        elif kind == "Metaspace":
            name = name.replace(step["replacement"], " ")
        elif kind == "BPEDecoder":
            name = name.replace(step["suffix"], " ")
        elif kind == "WordPiece":
            name = name.removeprefix(step["prefix"]) if name.startswith(step["prefix"]) else f" {name}"
        elif kind not in ("Fuse", "Strip"):
            raise UserError(f"the tokenizer's decoder has a step {kind}, which danlu does not know")
    return name.encode()


def _pattern(pattern: dict[str, str]) -> str:
    return re.escape(pattern["String"]) if "String" in pattern else pattern["Regex"]
