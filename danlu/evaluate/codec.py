"""Lossless compression driven by a language model (Delétang 2023): every bit that it saves, it predicted.

The file's tokens run in N streams, one step of all of them at a time (`evaluate.windows`). Each step's
probabilities become integer tables for the arithmetic coder. The decoder repeats the same steps on what it
has decoded so far; the same machine, library versions, threads and shapes give the same bits.

Layout: magic, fixed header, versions, stream lengths (4 bytes each, high bit = stored as it is), streams.
"""

import hashlib
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

import danlu
from danlu.core.errors import UserError
from danlu.core.progress import Progress
from danlu.evaluate import arithmetic, windows
from danlu.model.checkpoint import load, resolve
from danlu.model.transformer import Transformer
from danlu.tokens.tokenizer import Tokenizer

MAGIC = b"danlu\x00"
STATIC, ONLINE = 1, 2
_STORED = 1 << 31
TRIAL = 1024
"""Steps after which the coder gives up a file that a model can't make smaller, such as random bytes."""


@dataclass
class Header:
    """What the decoder has to know, and what proves that it is right."""

    method: int
    """STATIC: a given model. ONLINE: a model trained while coding."""
    threads: int
    streams: int
    window: int
    tokens: int
    size: int
    """Bytes of the original."""
    model: bytes = bytes(16)
    """Hash of weights, sizes and tokenizer."""
    probe: bytes = bytes(8)
    """Hash of probabilities computed on this machine at these shapes."""
    original: bytes = bytes(16)
    """Checksum of the original."""
    payload: int = 0
    """CRC-32 of the streams."""
    versions: str = ""
    """danlu, torch, numpy, processor features, dtype."""

    FORM: ClassVar[struct.Struct] = struct.Struct("<6sBHHIQQ16s8s16sIB")

    def to_bytes(self) -> bytes:
        versions = self.versions.encode()
        fixed = self.FORM.pack(
            MAGIC, self.method, self.threads, self.streams, self.window, self.tokens, self.size,
            self.model, self.probe, self.original, self.payload, len(versions),
        )  # fmt: skip
        check = zlib.crc32(fixed + versions).to_bytes(4, "little")
        return fixed + versions + check

    @classmethod
    def read(cls, raw: bytes, where: str) -> tuple["Header", bytes]:
        """The header and the rest. Raises UserError for another or a damaged file."""
        size = cls.FORM.size
        if raw[: len(MAGIC)] != MAGIC:
            raise UserError(f"{where}: not made by `danlu compress`", "give the file that compress wrote")
        damaged = UserError(f"{where}: damaged: the header is cut or changed", "fetch the file again")
        if len(raw) < size:
            raise damaged
        _, *fields, n_versions = cls.FORM.unpack(raw[:size])
        end = size + n_versions
        if zlib.crc32(raw[:end]).to_bytes(4, "little") != raw[end : end + 4]:
            raise damaged
        header = cls(*fields)
        header.versions = raw[size:end].decode("utf-8", "replace")
        return header, raw[end + 4 :]


def versions(dtype: torch.dtype = torch.float32) -> str:
    """What decides the bits of a computation, beside threads and shapes."""
    parts = [danlu.__version__, torch.__version__, np.__version__, torch.backends.cpu.get_cpu_capability()]
    return " ".join([*parts, str(dtype).removeprefix("torch.")])


def checksum(raw: bytes) -> bytes:
    return hashlib.sha256(raw).digest()[:16]


def model_hash(model: Transformer, tokenizer: Tokenizer) -> bytes:
    """Of the sizes, every weight and the tokenizer."""
    digest = hashlib.sha256(model.config.model_dump_json().encode() + tokenizer.fingerprint().encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.digest()[:16]


def _load(ref: str) -> tuple[Transformer, Tokenizer]:
    if not ref:
        raise UserError("no model is given", "name one with --model, or use --online")
    model, tokenizer = load(resolve(Path(ref)), dtype=torch.float32)
    return model.eval(), tokenizer


def _probe(model: Transformer, header: Header, start: int) -> bytes:
    """Hash of two steps' probabilities: another processor or library gives another one."""
    stepper = windows.Stepper(model, header.streams, start, header.window)
    digest = hashlib.sha256()
    for step in range(2):
        digest.update(stepper.probabilities().tobytes())
        stepper.push(np.full(header.streams, step, np.int64))
    return digest.digest()[:8]


def compress_bytes(raw: bytes, ref: str) -> bytes:
    """The compressed form of any bytes; `ref` names the model."""
    model, tokenizer = _load(ref)
    tokens = tokenizer.encode_bytes(raw)
    streams = windows.n_streams(len(tokens))
    window = model.config.max_positions
    header = Header(STATIC, torch.get_num_threads(), streams, window, len(tokens), len(raw))
    header.model, header.original, header.versions = model_hash(model, tokenizer), checksum(raw), versions()
    if not tokens:
        return header.to_bytes()
    header.probe = _probe(model, header, tokenizer.start_id)
    rows, lengths = windows.split_streams(tokens, streams), windows.stream_lengths(len(tokens), streams)
    token_bytes = np.array([len(entry) for entry in tokenizer.token_bytes])
    stepper = windows.Stepper(model, streams, tokenizer.start_id, window)
    coded = encode_streams(stepper, rows, lengths, token_bytes)
    plain = [tokenizer.decode_bytes(row[:n].tolist()) for row, n in zip(rows, lengths, strict=True)]
    # A stream that the model doesn't make smaller is stored as it is.
    pairs = zip(coded or plain, plain, strict=True)
    chosen = [(p, _STORED) if len(c) >= len(p) else (c, 0) for c, p in pairs]
    sizes = np.array([len(body) | flag for body, flag in chosen], "<u4").tobytes()
    return pack(header, sizes + b"".join(body for body, _ in chosen))


def encode_streams(
    stepper: windows.Stepper, rows: np.ndarray, lengths: np.ndarray, token_bytes: np.ndarray | None = None
) -> list[bytes]:
    """The code of each stream: rows (N, longest) tokens, lengths (N,) of them.

    With the bytes of each token (V,), none where TRIAL steps have made no stream smaller than its text.
    """
    n, longest = rows.shape
    state = arithmetic.new_state(n)
    # A symbol costs at most 24 bits; eight bytes more for what is settled last.
    out = np.zeros((n, 3 * longest + 16), np.uint8)
    with Progress("compress", int(lengths.sum()), "tokens") as progress:
        for step in range(longest):
            if step == TRIAL and token_bytes is not None:
                text_bytes = token_bytes[rows[:, :TRIAL]].sum(axis=1)
                if (state[:, 2] >= text_bytes).all():
                    return []
            arithmetic.encode_step(state, out, stepper.probabilities(), rows[:, step], step < lengths)
            stepper.push(rows[:, step])
            progress.update(min((step + 1) * n, progress.total or 0))
    return [out[i, : arithmetic.finish(state[i], out[i])].tobytes() for i in range(n)]


def pack(header: Header, payload: bytes) -> bytes:
    """The compressed file."""
    header.payload = zlib.crc32(payload)
    return header.to_bytes() + payload


def unpack(raw: bytes, where: str) -> tuple[Header, bytes]:
    """The inverse of `pack`. Raises UserError for another or a damaged file."""
    header, payload = Header.read(raw, where)
    if zlib.crc32(payload) != header.payload:
        raise UserError(f"{where}: damaged: the data is cut or changed", "fetch the file again")
    return header, payload


def decompress_bytes(raw: bytes, ref: str, where: str) -> bytes:
    """The original bytes, or UserError: never other bytes. `where` names the file."""
    header, payload = unpack(raw, where)
    if header.tokens == 0:
        return b""
    sizes = np.frombuffer(payload[: 4 * header.streams], "<u4").astype(np.int64)
    stored, sizes = sizes >= _STORED, sizes % _STORED
    ends = 4 * header.streams + np.cumsum(sizes)
    bodies = [payload[end - size : end] for end, size in zip(ends, sizes, strict=True)]
    result = b"".join(bodies) if stored.all() else _decode(header, bodies, stored, ref, where)
    return checked(result, header, where)


def checked(result: bytes, header: Header, where: str) -> bytes:
    """The result, if it is what was compressed."""
    if checksum(result) != header.original:
        raise UserError(
            f"{where}: the result doesn't match the checksum", "decompress where it was compressed"
        )
    return result


def _decode(header: Header, bodies: list[bytes], stored: np.ndarray, ref: str, where: str) -> bytes:
    model, tokenizer = _load(ref)
    if model_hash(model, tokenizer) != header.model:
        raise UserError(f"{where}: was compressed with another model than {ref}", "give that model")
    with threads(header.threads):
        require_probe(_probe(model, header, tokenizer.start_id), header, versions(), where)
        stepper = windows.Stepper(model, header.streams, tokenizer.start_id, header.window)
        lengths = windows.stream_lengths(header.tokens, header.streams)
        rows = decode_streams(stepper, bodies, lengths, stored)
    return b"".join(
        body if whole else tokenizer.decode_bytes(row[:n].tolist())
        for body, whole, row, n in zip(bodies, stored, rows, lengths, strict=True)
    )


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads for a while: another number gives other bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def require_probe(probe: bytes, header: Header, here: str, where: str) -> None:
    """Raises UserError where this machine computes other bits than the one that compressed."""
    if probe != header.probe:
        raise UserError(
            f"{where}: this machine computes other bits than the one that compressed it "
            f"({header.versions}, {header.threads} threads; here {here})",
            "decompress it on that machine, with these versions",
        )


def decode_streams(
    stepper: windows.Stepper, bodies: list[bytes], lengths: np.ndarray, skipped: np.ndarray
) -> np.ndarray:
    """The inverse of `encode_streams`: rows (N, longest) of tokens; zeros in the streams `skipped` (N,)."""
    n, longest = len(bodies), int(lengths.max())
    sizes = np.array([len(body) for body in bodies])
    raw = np.zeros((n, sizes.max() + 8), np.uint8)
    for row, body in zip(raw, bodies, strict=True):
        row[: len(body)] = np.frombuffer(body, np.uint8)
    state = arithmetic.new_state(n)
    arithmetic.start_decoding(state, raw, sizes)
    rows = np.zeros((n, longest), np.int64)
    with Progress("decompress", int(lengths.sum()), "tokens") as progress:
        for step in range(longest):
            symbols = np.zeros(n, np.int64)
            active = (step < lengths) & ~skipped
            arithmetic.decode_step(state, raw, sizes, stepper.probabilities(), symbols, active)
            rows[:, step] = symbols
            stepper.push(symbols)
            progress.update(min((step + 1) * n, progress.total or 0))
    return rows
