"""Documents in; clean, distinct ones out, split by document into train and held-out."""

import errno
import hashlib
import json
import os
import re
import sqlite3
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from danlu.core.errors import UserError
from danlu.core.files import atomic_write, make_folder
from danlu.core.progress import track
from danlu.core.verbs import Estimate
from danlu.data.chitchat import chitchat_file, read_chitchat
from danlu.data.config import CHITCHAT, SUMS, DataConfig
from danlu.data.conversations import require_reply
from danlu.data.documents import Document, as_row, document_writer, read_documents
from danlu.data.sums import COUNT, read_sums

PARTS = ("train", "held_out")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


def prepare(config: DataConfig) -> dict[str, Any]:
    """Writes train, held_out and dropped (`.jsonl.zst`) and stats.json; returns the statistics.

    Each document is normalised; empty ones and exact copies are dropped, each with its reason and twin, and
    so are preferences from which nothing can be learnt.
    A document is held out by a hash of its text and the seed, whatever the order of the documents; a
    preference by where its prompt begins, so that a prompt, or a tree, is not in both parts.
    Raises UserError for a conversation in which no assistant says anything.
    """
    out = make_folder(config.out)
    counts: Counter[str] = Counter()
    with ExitStack() as stack:
        write = {
            name: stack.enter_context(document_writer(out / f"{name}.jsonl.zst"))
            for name in (*PARTS, "dropped")
        }
        seen = stack.enter_context(Seen(out))
        for document in track(_read(config), "data", unit="documents"):
            counts["read"] += 1
            if document.messages is not None and document.replies is None:
                require_reply(document.messages, document.where)
            document.text = normalise(document.text)
            reason, twin = document.fault, None
            if reason is None and not document.text.strip():
                reason = "empty"
            elif reason is None and (twin := seen.add(document)) is not None:
                reason = "copy"
            if reason is not None:
                counts[f"dropped: {reason}"] += 1
                write["dropped"]({"id": document.id, "reason": reason, "twin": twin})
                continue
            part = "held_out" if _share(_source(document), config.seed) < config.held_out else "train"
            counts[part] += 1
            counts[f"{part} bytes"] += len(document.text.encode())
            counts[f"{part} preferences"] += document.replies is not None
            counts[f"{part} conversations"] += document.messages is not None and document.replies is None
            write[part](as_row(document))
        for part in PARTS:
            if not counts[part]:
                raise UserError(
                    f"{config.source}: of {counts['read']} documents none is left for {part}",
                    "give more documents, or change held_out",
                )
    require_disjoint(out)
    stats = {"source": config.source, **{key: counts[key] for key in sorted(counts)}}
    with atomic_write(out / "stats.json") as file:
        json.dump(stats, file, indent=2)
    return stats


def _read(config: DataConfig) -> Iterator[Document]:
    made = {CHITCHAT: read_chitchat, SUMS: read_sums}
    if config.source in made:
        return made[config.source]()
    return read_documents(Path(config.source), config.text_key)


def normalise(text: str) -> str:
    """Unicode NFC, line ends as \\n, no control characters but tab and newline. Nothing else is touched."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return _CONTROL.sub("", unicodedata.normalize("NFC", text))


def digest(text: str) -> bytes:
    """What makes two texts the same document: all of it, to the byte."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _source(document: Document) -> str:
    if document.replies is not None and document.messages:
        return document.messages[0]["content"]
    return document.text


def _share(text: str, seed: int) -> float:
    """A number in [0, 1) that the text and the seed decide."""
    hashed = hashlib.blake2b(digest(text), digest_size=8, key=str(seed).encode()).digest()
    return int.from_bytes(hashed, "big") / 2**64


class Seen:
    """Digest → id of the first document that had it, on disk: memory stays bounded."""

    def __init__(self, folder: Path | None = None) -> None:
        """`folder` holds the table while it is used; None = where temporary files go."""
        self.folder = folder

    def __enter__(self) -> "Seen":
        with ExitStack() as stack:
            self.file = stack.enter_context(tempfile.NamedTemporaryFile(dir=self.folder, prefix=".seen-"))
            self.table = stack.enter_context(closing(sqlite3.connect(self.file.name, isolation_level=None)))
            self._execute("PRAGMA journal_mode=OFF")
            self._execute("PRAGMA synchronous=OFF")
            self._execute("CREATE TABLE seen (digest BLOB PRIMARY KEY, id TEXT) WITHOUT ROWID")
            self.stack = stack.pop_all()
        return self

    def _execute(self, command: str, values: tuple[Any, ...] = ()) -> sqlite3.Cursor:
        """Raises OSError where the disk is full."""
        try:
            return self.table.execute(command, values)
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_FULL:
                raise
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.file.name) from error

    def find(self, document: Document) -> str | None:
        """Id of a document with the same text; None when there is none."""
        row = self._execute("SELECT id FROM seen WHERE digest=?", (digest(document.text),)).fetchone()
        return row[0] if row else None

    def add(self, document: Document) -> str | None:
        """`find`; a document that is the first with its text is remembered."""
        row = (digest(document.text), document.id)
        new = self._execute("INSERT OR IGNORE INTO seen VALUES (?, ?)", row).rowcount
        return None if new else self.find(document)

    def __exit__(self, *exc: object) -> None:
        self.stack.close()


def require_disjoint(folder: Path) -> None:
    """Reads both parts back: no held-out text may be in train."""
    with Seen(folder) as held_out:
        for document in read_documents(folder / "held_out.jsonl.zst"):
            held_out.add(document)
        for document in read_documents(folder / "train.jsonl.zst"):
            if twin := held_out.find(document):
                raise RuntimeError(f"{folder}: train's {document.id} is the held-out {twin}")


def estimate(config: DataConfig, upstream: Mapping[str, Estimate]) -> Estimate:
    """Size of the source on disk; about 20 MB of text a second go through."""
    if config.source == SUMS:
        size = 20 * COUNT
        outputs = {"bytes": int(size * (1 - config.held_out)), "row_bytes": 20}
        return Estimate(seconds=3, memory_bytes=200 << 20, outputs=outputs)
    source = chitchat_file() if config.source == CHITCHAT else Path(config.source)
    files = [f for f in source.rglob("*") if f.is_file()] if source.is_dir() else [source]
    if not all(file.exists() for file in files):
        return Estimate(problems=[f"{config.source} does not exist"])
    size = sum(file.stat().st_size for file in files)
    # The package stores each message with its time and sender: a third of it is text.
    text = size // 3 if config.source == CHITCHAT else size
    return Estimate(
        seconds=3 + text / 5e6, memory_bytes=200 << 20, outputs={"bytes": int(text * (1 - config.held_out))}
    )
