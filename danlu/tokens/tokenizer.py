"""The tokenizer: one path from text to ids for training, evaluation and serving."""

import hashlib
import json
import re
from functools import cached_property
from pathlib import Path

import tokenizers

from danlu.core.errors import UserError
from danlu.core.files import atomic_folder, read_json, read_text

_INVALID = re.compile("([\udc80-\udcff]+)")
"""Bytes that aren't UTF-8, as Python's "surrogateescape" shows them."""


def _byte_alphabet() -> dict[str, int]:
    """Character → byte, in the alphabet that byte-level BPE writes its entries in (GPT-2).

    Printable Latin-1 bytes stand for themselves, the others for the characters from U+0100 on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTES = _byte_alphabet()


class Tokenizer:
    """A byte-level BPE with its special tokens and chat template.

    Text is never parsed for special tokens: `<|im_end|>` in a user's message is eleven ordinary characters.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, bos: str | None, eos: str, stops: list[str], chat_template: str
    ) -> None:
        self.backend = backend
        backend.encode_special_tokens = True
        self.special_ids: dict[str, int] = {
            token.content: number
            for number, token in backend.get_added_tokens_decoder().items()
            if token.special
        }
        self.bos, self.eos, self.stops, self.chat_template = bos, eos, stops, chat_template

    @property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size()

    @property
    def eos_id(self) -> int:
        """The end of a document."""
        return self.special_ids[self.eos]

    @property
    def bos_id(self) -> int | None:
        """What stands before a document, where anything does."""
        return None if self.bos is None else self.special_ids[self.bos]

    @property
    def stop_ids(self) -> list[int]:
        """Tokens that end an answer."""
        return [self.special_ids[token] for token in self.stops]

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [e.ids for e in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_document(self, text: str) -> list[int]:
        """A whole document as pretraining sees it: its start, its text, its end."""
        return [*self.document_start, *self.encode(text), self.eos_id]

    @property
    def document_start(self) -> list[int]:
        """The ids before the first token of a document; a prompt for continuation begins with them too."""
        return [] if self.bos_id is None else [self.bos_id]

    def decode(self, ids: list[int]) -> str:
        """The text, without special tokens; bytes that aren't UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def encode_bytes(self, raw: bytes) -> list[int]:
        """Any bytes; what isn't UTF-8 goes byte by byte. `decode_bytes` gives them back exactly.

        Raises UserError where it would not, since the tokenizer normalises text.
        """
        ids: list[int] = []
        for number, part in enumerate(_INVALID.split(raw.decode("utf-8", "surrogateescape"))):
            if number % 2:
                ids += [self._byte_ids[ord(character) - 0xDC00] for character in part]
            elif part:
                ids += self.encode(part)
        if self.decode_bytes(ids) != raw:
            raise UserError(
                "the tokenizer changes this text before it encodes it, so the same bytes would not come back",
                "use a model whose tokenizer does not normalise",
            )
        return ids

    def decode_bytes(self, ids: list[int]) -> bytes:
        """The bytes that ids stand for; special tokens stand for none."""
        return b"".join(self.token_bytes[number] for number in ids)

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """For each id the bytes it stands for."""
        special = set(self.special_ids.values())
        names = [self.backend.id_to_token(number) or "" for number in range(self.vocab_size)]
        return [b"" if n in special else bytes(_BYTES[c] for c in name) for n, name in enumerate(names)]

    @cached_property
    def _byte_ids(self) -> dict[int, int]:
        ids: dict[int, int] = {}
        for character, byte in _BYTES.items():
            number = self.backend.token_to_id(character)
            if number is None:
                raise UserError(
                    f"the tokenizer has no entry for the byte {byte}", "use a byte-level tokenizer"
                )
            ids[byte] = number
        return ids

    def fingerprint(self) -> str:
        """SHA-256 of everything that decides ids."""
        parts = [self.backend.to_str(), str(self.bos), self.eos, *self.stops, self.chat_template]
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

    @classmethod
    def load(cls, folder: Path | str) -> "Tokenizer":
        """Reads what `save` writes. Raises UserError where it is missing or broken."""
        folder = Path(folder)
        if (folder / "tokenizer" / "tokenizer.json").is_file():
            folder = folder / "tokenizer"
        settings = read_json(folder / "tokenizer_config.json")
        try:
            backend = tokenizers.Tokenizer.from_str(read_text(folder / "tokenizer.json"))
        except UserError:
            raise
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{folder / 'tokenizer.json'}: not a tokenizer: {error}") from None
        eos = settings.get("eos_token")
        if eos is None:
            raise UserError(f"{folder / 'tokenizer_config.json'}: no eos_token")
        template = folder / "chat_template.jinja"
        return cls(
            backend,
            settings.get("bos_token"),
            eos,
            settings.get("stop_tokens", [eos]),
            read_text(template) if template.is_file() else "",
        )
