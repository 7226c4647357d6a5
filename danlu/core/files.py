"""Files that are whole or absent: everything is written under a temporary name, then renamed."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Container, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from danlu.core.errors import UserError

_REMEDIES = {
    errno.ENOSPC: "free some space, or choose another folder",
    errno.EDQUOT: "free some of your quota, or choose another folder",
    errno.EROFS: "choose a folder that can be written",
    errno.EACCES: "choose a folder that you may write",
    errno.EPERM: "choose a folder that you may write",
    errno.ENOTDIR: "a part of the path is a file; move it or choose another folder",
    errno.EEXIST: "a file stands where a folder is needed; move it or choose another folder",
    errno.EISDIR: "a folder stands where a file is needed",
    errno.ENOENT: "check the path",
}
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
"""What a disk may do to any program, however right its paths are."""


@contextmanager
def os_errors(path: Path, kinds: Container[int | None] = frozenset(_REMEDIES)) -> Iterator[None]:
    """Turns a full disk, a read-only mount or a wrong path into a UserError. `kinds`: of errno."""
    try:
        yield
    except OSError as error:
        if error.errno not in _REMEDIES or error.errno not in kinds:
            raise
        remedy = _REMEDIES[error.errno]
        raise UserError(f"{error.filename or path}: {os.strerror(error.errno).lower()}", remedy) from error


def read_text(path: Path) -> str:
    """The UTF-8 text of a file. Raises UserError for a missing file or wrong encoding."""
    with os_errors(path):
        raw = path.read_bytes()
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: not UTF-8", "save the file as UTF-8") from None


def read_json(path: Path) -> Any:
    """The value in a JSON file. Raises UserError naming file and line."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}, line {error.lineno}: not valid JSON: {error.msg}", "mend the file, or fetch it again"
        ) from None


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a log that danlu appends to; none where there is no file.

    A last line that a kill has cut short is left out.
    """
    if not path.exists():
        return []
    return [json.loads(line) for line in read_text(path).split("\n")[:-1] if line]


def make_folder(path: Path) -> Path:
    """Makes a folder and its parents."""
    with os_errors(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside `path`; the file that is written there takes that name on success."""
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with os_errors(path):
        try:
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_write(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Opens a temporary file beside `path`; on success it takes that name, else it is removed."""
    encoding = None if "b" in mode else "utf-8"
    with atomic_path(path) as temporary, open(temporary, mode, encoding=encoding) as file:
        yield file


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Gives a temporary folder beside `path`; on success it takes that name (replacing an old one)."""
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with os_errors(path):
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    with open(file, "rb") as handle:
                        os.fsync(handle.fileno())
            if path.exists():
                shutil.rmtree(path)
            os.replace(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with os_errors(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_path(path: Path) -> str:
    """SHA-256 of a file, or of a folder's names and contents (hidden files left out)."""
    if not path.is_dir():
        return hash_file(path)
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path)
        if file.is_file() and not any(part.startswith(".") for part in name.parts):
            digest.update(f"{name}\0{hash_file(file)}\n".encode())
    return digest.hexdigest()
