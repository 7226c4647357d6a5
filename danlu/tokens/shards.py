"""Token shards: documents' ids on disk, memory-mapped, whatever the size of the corpus."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from danlu.core.errors import UserError
from danlu.core.files import os_errors, read_text


class ShardWriter:
    """Writes tokens.bin, offsets.bin, mask.bin (not of text) and meta.json into an existing folder.

    Of preferences groups.bin too: how many documents, replies to one prompt, the best first, belong together.

    Use inside `core.files.atomic_folder`, so that a shard is whole or absent.
    """

    def __init__(self, folder: Path, kind: str, vocab_size: int, tokenizer: str) -> None:
        """`kind`: text, chat or preferences. `tokenizer`: its fingerprint."""
        self.folder, self.kind = folder, kind
        self.dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
        self.meta: dict[str, Any] = {
            "kind": kind, "dtype": self.dtype.name, "tokenizer": tokenizer,
            "documents": 0, "tokens": 0, "supervised": 0, "text_bytes": 0,
        }  # fmt: skip
        self.hash = hashlib.sha256(json.dumps(self.meta).encode())
        with os_errors(folder):
            self.tokens = open(folder / "tokens.bin", "wb")  # noqa: SIM115
            self.offsets = open(folder / "offsets.bin", "wb")  # noqa: SIM115
            self.mask = open(folder / "mask.bin", "wb") if kind != "text" else None  # noqa: SIM115
        self.groups: list[int] = []
        self.offsets.write(np.int64(0).tobytes())

    def add(self, ids: list[int], mask: list[bool] | None = None, text_bytes: int = 0) -> None:
        """One document. A token is a target unless it is the first; `mask` says which of them count."""
        raw = np.asarray(ids, self.dtype).tobytes()
        self.tokens.write(raw)
        self.hash.update(len(ids).to_bytes(8, "little") + raw)
        self.meta["documents"] += 1
        self.meta["tokens"] += len(ids)
        self.meta["text_bytes"] += text_bytes
        self.offsets.write(np.int64(self.meta["tokens"]).tobytes())
        if self.mask is not None and mask is not None:
            bits = np.asarray(mask, np.uint8).tobytes()
            self.mask.write(bits)
            self.hash.update(bits)
            self.meta["supervised"] += sum(mask[1:])
        else:
            self.meta["supervised"] += len(ids) - 1

    def add_group(self, n_documents: int) -> None:
        """The last documents belong together."""
        self.groups.append(n_documents)
        self.hash.update(b"group" + n_documents.to_bytes(8, "little"))

    def close(self) -> None:
        if self.kind == "preferences":
            with os_errors(self.folder):
                np.array(self.groups, np.int64).tofile(self.folder / "groups.bin")
        for file in (self.tokens, self.offsets, self.mask):
            if file is not None:
                file.close()
        self.meta["sha256"] = self.hash.hexdigest()
        (self.folder / "meta.json").write_text(json.dumps(self.meta, indent=2) + "\n", "utf-8")


class Shards:
    """Read access to what ShardWriter wrote. `documents[i]` → (ids, mask)."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.meta = json.loads(read_text(self.folder / "meta.json"))
        self.kind: str = self.meta["kind"]
        self.n_tokens: int = self.meta["tokens"]
        self.n_supervised: int = self.meta["supervised"]
        self.offsets = np.fromfile(self.folder / "offsets.bin", np.int64)
        if self.n_tokens == 0:
            raise UserError(f"{self.folder}: no tokens in it", "look at the data with `danlu data check`")
        self.tokens = np.memmap(self.folder / "tokens.bin", self.meta["dtype"], mode="r")
        if len(self.tokens) != self.n_tokens or len(self.offsets) != self.meta["documents"] + 1:
            raise UserError(
                f"{self.folder}: damaged: sizes don't match meta.json", "run `danlu tokenize` again"
            )
        self.mask = np.memmap(self.folder / "mask.bin", np.uint8, mode="r") if self.kind != "text" else None
        self.groups = np.zeros(1, np.int64)
        """Where each group begins, and where the last one ends."""
        if self.kind == "preferences":
            sizes = np.fromfile(self.folder / "groups.bin", np.int64)
            self.groups = np.concatenate(([0], np.cumsum(sizes)))
            if self.groups[-1] != self.meta["documents"]:
                raise UserError(
                    f"{self.folder}: damaged: groups.bin doesn't match meta.json",
                    "run `danlu tokenize` again",
                )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and mask (1 = learnt) of one document."""
        begin, end = self.offsets[index], self.offsets[index + 1]
        ids = np.asarray(self.tokens[begin:end])
        return ids, np.ones(len(ids), np.uint8) if self.mask is None else np.asarray(self.mask[begin:end])

    def fingerprint(self) -> str:
        """SHA-256 of the documents' ids and masks, in order."""
        return self.meta["sha256"]
