"""`danlu compress` and `danlu decompress`: files in, files out, by either of the two coders.

They stand here because one of the coders trains its model while it codes.
"""

from pathlib import Path
from typing import Any

from danlu.core.errors import UserError
from danlu.core.files import atomic_write, os_errors
from danlu.evaluate import codec
from danlu.evaluate.config import CompressConfig, DecompressConfig
from danlu.train import prequential


def compress(config: CompressConfig) -> dict[str, Any]:
    """Writes the compressed file; returns the sizes."""
    if config.online and config.model:
        raise UserError("online and model are both given", "with --online no model is needed: leave one out")
    raw = _read(config.file)
    packed = prequential.compress_bytes(raw) if config.online else codec.compress_bytes(raw, config.model)
    _write(config.out, packed)
    bits = {"bits_per_byte": round(8 * len(packed) / len(raw), 4)} if raw else {}
    return {"original_bytes": len(raw), "compressed_bytes": len(packed), **bits}


def decompress(config: DecompressConfig) -> dict[str, Any]:
    """Writes the original file, checked against its checksum; returns the sizes."""
    packed, where = _read(config.file), str(config.file)
    header, _ = codec.Header.read(packed, where)
    if header.method == codec.ONLINE:
        if config.model:
            raise UserError(f"{where}: was compressed with --online, without a model", "leave out --model")
        raw = prequential.decompress_bytes(packed, where)
    else:
        raw = codec.decompress_bytes(packed, config.model, where)
    _write(config.out, raw)
    return {"compressed_bytes": len(packed), "original_bytes": len(raw)}


def _read(path: Path) -> bytes:
    with os_errors(path):
        return path.read_bytes()


def _write(path: Path, raw: bytes) -> None:
    with atomic_write(path, "wb") as file:
        file.write(raw)
