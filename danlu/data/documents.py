"""Documents in and out: text, JSON and Parquet, plain or compressed, one at a time in bounded memory.

But for a list in a .json file, which is read whole.
"""

import gzip
import io
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import pyarrow
import pyarrow.parquet
import zstandard

from danlu.core.errors import UserError
from danlu.core.files import atomic_write, os_errors
from danlu.data.conversations import plain_text, to_messages
from danlu.data.rankings import Ranked, is_ranked, to_ranked

TEXT, LINES, TABLE = {".txt", ".md", ".text"}, {".jsonl", ".ndjson", ".json"}, {".parquet"}
_BETWEEN = re.compile(r"[\s,]*")
PIECE = 1 << 16
"""A text file has no documents of its own: it is read in pieces of about so many characters."""


@dataclass
class Document:
    """One text, and the conversation it was rendered from where there is one."""

    id: str
    text: str
    messages: list[dict[str, Any]] | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    where: str = ""
    """File and line that it was read from, for messages."""
    replies: list[str] | None = None
    """Of a preference: what may follow the messages, the best first."""
    fault: str | None = None
    """Of a preference: why nothing can be learnt from it."""


def read_documents(path: Path, text_key: str = "text") -> Iterator[Document]:
    """The documents of a file or folder, in order of name. Raises UserError naming file and line."""
    files = [path]
    if path.is_dir():
        files = [f for f in sorted(path.rglob("*")) if f.is_file() and not f.name.startswith(".")]
        if not files:
            raise UserError(f"{path}: the folder is empty", "name a folder with documents in it")
    found = False
    for file in files:
        name = str(file.relative_to(path)) if path.is_dir() else file.name
        for document in _read_file(file, name, text_key):
            found = True
            yield document
    if not found:
        raise UserError(f"{path}: no document in it", "the file is empty")


def _read_file(path: Path, name: str, text_key: str) -> Iterator[Document]:
    kind = _kind(path)
    if kind in TEXT:
        for number, piece in enumerate(_pieces(path)):
            yield Document(f"{name}:{number}", piece, where=f"{path}, piece {number}")
    elif kind in LINES:
        for number, row in read_rows(path):
            yield from to_documents(row, f"{name}:{number}", f"{path}, line {number}", text_key)
    else:
        for number, row in _read_table(path):
            yield from to_documents(row, f"{name}:{number}", f"{path}, row {number}", text_key)


def to_documents(row: Any, identifier: str, where: str, text_key: str = "text") -> list[Document]:
    """As `to_document`; a tree of conversations is several, or none."""
    if not (isinstance(row, dict) and is_ranked(row)):
        return [to_document(row, identifier, where, text_key)]
    found = to_ranked(row, where)
    identifier = str(row.get("id", identifier))
    names = [identifier] if len(found) == 1 else [f"{identifier}.{number}" for number in range(len(found))]
    return [_preference(ranked, name, where) for ranked, name in zip(found, names, strict=True)]


def _preference(ranked: Ranked, identifier: str, where: str) -> Document:
    replies = "".join(f"B: {reply}\n" for reply in ranked.replies)
    text = plain_text(ranked.prompt) + replies
    return Document(identifier, text, ranked.prompt, where=where, replies=ranked.replies, fault=ranked.fault)


def to_document(row: Any, identifier: str, where: str, text_key: str = "text") -> Document:
    """A row as a document: its text, or a conversation in any of the known forms."""
    if not isinstance(row, dict):
        raise UserError(
            f"{where}: expected an object, found {type(row).__name__}", "write a JSON object a line"
        )
    meta: dict[str, Any] = row["meta"] if isinstance(row.get("meta"), dict) else {}
    identifier = str(row.get("id", identifier))
    if isinstance(row.get(text_key), str):
        messages = to_messages(row, where) if "messages" in row else None
        return Document(identifier, row[text_key], messages, meta, where)
    messages = to_messages(row, where)
    if messages is None:
        raise UserError(
            f'{where}: no "{text_key}" and no conversation; keys: {", ".join(map(str, row)) or "none"}',
            "name the key with text_key, or see docs/data.md for the forms of conversations",
        )
    return Document(identifier, plain_text(messages), messages, meta, where)


def read_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(line number, value) of each line of a JSONL file that isn't blank; of each element of a JSON list."""
    with _open(path) as opened:
        file: Iterable[bytes] = opened
        if _suffix(path) == ".json":
            whole = opened.read()
            if whole.lstrip()[:1] == b"[":
                yield from _elements(whole, path)
                return
            file = whole.splitlines()
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                yield number, json.loads(line.decode("utf-8"))
            except UnicodeDecodeError:
                raise UserError(f"{where}: not UTF-8", "save the file as UTF-8") from None
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{where}: not valid JSON: {error.msg} at column {error.colno}", "mend or remove the line"
                ) from None


def _elements(raw: bytes, path: Path) -> Iterator[tuple[int, Any]]:
    """(line that it begins in, value) of each element of a JSON list."""
    try:
        text = raw.decode("utf-8")
        elements = json.loads(text)
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8", "save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}, line {error.lineno}: not valid JSON: {error.msg} at column {error.colno}",
            "mend that place",
        ) from None
    scan, line, seen, at = json.JSONDecoder().raw_decode, 1, 0, text.index("[") + 1
    for element in elements:
        at += len(_BETWEEN.match(text, at)[0])  # type: ignore[index]
        line, seen = line + text.count("\n", seen, at), at
        yield line, element
        _, at = scan(text, at)


def _read_table(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        with os_errors(path):
            table = pyarrow.parquet.ParquetFile(path)
        number = 0
        for batch in table.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except pyarrow.ArrowInvalid as error:
        raise UserError(
            f"{path}: not a readable Parquet file: {error}", "write it again, or leave it out"
        ) from None


def _pieces(path: Path) -> Iterator[str]:
    """The text in pieces of about PIECE characters, cut at a line's end."""
    held: list[str] = []
    size = 0
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            try:
                held.append(line.decode("utf-8"))
            except UnicodeDecodeError:
                raise UserError(f"{path}, line {number}: not UTF-8", "save the file as UTF-8") from None
            size += len(held[-1])
            if size >= PIECE:
                yield "".join(held)
                held, size = [], 0
    if held:
        yield "".join(held)


def _suffix(path: Path) -> str:
    """The file's ending, but for that of its compression."""
    return Path(path.stem).suffix if path.suffix in (".gz", ".zst") else path.suffix


def _kind(path: Path) -> str:
    suffix = _suffix(path)
    if suffix not in TEXT | LINES | TABLE:
        known = ", ".join(sorted(TEXT | LINES | TABLE))
        raise UserError(
            f"{path}: don't know how to read {suffix or 'a file without ending'}", f"known: {known}"
        )
    return suffix


@contextmanager
def _open(path: Path) -> Iterator[IO[bytes]]:
    with os_errors(path):
        if path.suffix == ".zst":
            file: Any = io.BufferedReader(zstandard.open(path, "rb"))
        elif path.suffix == ".gz":
            file = gzip.GzipFile(path)
        else:
            file = path.open("rb")
    with file:
        try:
            yield file
        except (EOFError, gzip.BadGzipFile, zstandard.ZstdError) as error:
            raise UserError(f"{path}: damaged: {error}", "fetch the file again") from None


@contextmanager
def document_writer(path: Path) -> Iterator[Any]:
    """A function that appends one JSON row to a `.jsonl.zst` file, whole or absent at the end."""
    with (
        atomic_write(path, "wb") as raw,
        zstandard.ZstdCompressor(level=3).stream_writer(raw, closefd=False) as out,
    ):
        yield lambda row: out.write((json.dumps(row, ensure_ascii=False) + "\n").encode())


def write_documents(documents: Iterable[Document], path: Path) -> int:
    """Writes `.jsonl.zst`; returns how many."""
    count = 0
    with document_writer(path) as write:
        for document in documents:
            write(as_row(document))
            count += 1
    return count


def as_row(document: Document) -> dict[str, Any]:
    if document.replies is not None:
        return {"id": document.id, "prompt": document.messages, "replies": document.replies}
    row: dict[str, Any] = {"id": document.id, "text": document.text}
    if document.messages is not None:
        row["messages"] = document.messages
    if document.meta:
        row["meta"] = document.meta
    return row
