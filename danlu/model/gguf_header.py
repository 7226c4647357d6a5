"""What a GGUF file says of its own lengths, held against the bytes that are there.

The package `gguf` trusts every count in a file: one of 2^60 keeps it busy for years. So each is checked here
first. The layout is that of llama.cpp's docs/gguf.md: magic, version, two counts, keys and values, one
record a tensor, padding, data.
"""

import struct
from math import prod
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a value by its type: integers, floats and booleans."""
_UINT32, _STRING, _ARRAY = 4, 8, 9
_SMALLEST_KEY, _SMALLEST_TENSOR = 8 + 4 + 1, 8 + 4 + 4 + 8
"""Bytes of a key with the shortest value, and of a tensor's record without dimensions."""
_MOST_DIMENSIONS = 4


def check_header(path: Path, kinds: dict[Any, tuple[int, int]]) -> None:
    """Raises ValueError naming the first count, length or tensor that goes beyond the end of the file.

    `kinds`: numbers and bytes of a block, by the type of a tensor.
    """
    with open(path, "rb") as file:
        if path.stat().st_size < 24:
            raise ValueError("it is too short")
        with mmap(file.fileno(), 0, access=ACCESS_READ) as raw:
            _Header(raw).check({int(kind): sizes for kind, sizes in kinds.items()})


class _Header:
    """Reads on from `at`, and never beyond the end."""

    def __init__(self, raw: mmap) -> None:
        self.raw, self.at = raw, 0

    def check(self, kinds: dict[int, tuple[int, int]]) -> None:
        if self.raw[:4] != b"GGUF":
            raise ValueError("it doesn't begin with GGUF")
        self.at = 4
        version = self.number("<I", "version")
        if version not in (2, 3):
            other_end = int.from_bytes(version.to_bytes(4, "little"), "big")
            raise ValueError(
                "it is for big-endian machines" if other_end in (2, 3) else f"version {version} is unknown"
            )
        tensors, keys = self.number("<Q", "tensor count"), self.number("<Q", "key count")
        self.need(keys * _SMALLEST_KEY, f"{keys} keys")
        self.need(tensors * _SMALLEST_TENSOR, f"{tensors} tensors")
        alignment = 32
        for number in range(keys):
            key = self.name(f"key {number + 1}")
            kind = self.number("<I", key)
            if (key, kind) == ("general.alignment", _UINT32):
                alignment = struct.unpack_from("<I", self.raw, self.at)[0] if self.left >= 4 else 0
            self.value(key, kind)
        records = [self.tensor(number, kinds) for number in range(tensors)]
        if alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"general.alignment is {alignment}, no power of two")
        begin = -(-self.at // alignment) * alignment
        for name, offset, size in records:
            if begin + offset + size > len(self.raw):
                raise ValueError(f"{name} needs {size:,} bytes, and the file ends before them")

    @property
    def left(self) -> int:
        return len(self.raw) - self.at

    def need(self, size: int, what: str) -> None:
        if size > self.left:
            raise ValueError(f"{what}: the file ends before that")

    def number(self, kind: str, what: str) -> int:
        size = struct.calcsize(kind)
        self.need(size, what)
        self.at += size
        return int(struct.unpack_from(kind, self.raw, self.at - size)[0])

    def text(self, what: str) -> bytes:
        length = self.number("<Q", what)
        self.need(length, f"{what} of {length} bytes")
        self.at += length
        return self.raw[self.at - length : self.at]

    def name(self, what: str) -> str:
        return self.text(what).decode("utf-8")

    def value(self, key: str, kind: int) -> None:
        if kind == _STRING:
            self.text(key)
        elif kind in _SIZES:
            self.need(_SIZES[kind], key)
            self.at += _SIZES[kind]
        elif kind == _ARRAY:
            self.array(key)
        else:
            raise ValueError(f"{key} is of the unknown type {kind}")

    def array(self, key: str) -> None:
        kind, length = self.number("<I", key), self.number("<Q", key)
        if kind not in (*_SIZES, _STRING):
            raise ValueError(f"{key} is a list of the unknown type {kind}")
        self.need(length * _SIZES.get(kind, 8), f"{key} with {length} entries")
        if kind in _SIZES:
            self.at += length * _SIZES[kind]
        else:
            for _ in range(length):
                self.text(key)

    def tensor(self, number: int, kinds: dict[int, tuple[int, int]]) -> tuple[str, int, int]:
        """Name, offset in the data, and bytes."""
        name = self.name(f"tensor {number + 1}")
        dimensions = self.number("<I", name)
        if dimensions > _MOST_DIMENSIONS:
            raise ValueError(f"{name} has {dimensions} dimensions")
        shape = [self.number("<Q", name) for _ in range(dimensions)]
        kind, offset = self.number("<I", name), self.number("<Q", name)
        if kind not in kinds:
            raise ValueError(f"{name} is of the unknown kind {kind}")
        block, size = kinds[kind]
        if shape and shape[0] % block:
            raise ValueError(f"{name}: rows of {shape[0]} are no whole blocks of {block}")
        return name, offset, prod(shape) // block * size
