"""What a model is compared with: gzip, xz, zstd, also when these have seen the training text."""

import gzip
import lzma
from collections.abc import Callable

import zstandard

_XZ = 9 | lzma.PRESET_EXTREME
_XZ_DICTIONARY = 4096, 3 << 29
"""Smallest and largest dictionary of LZMA2, in bytes."""
_ZSTD_DICTIONARY = 112_640
"""zstd's own default size, in bytes."""


def gzip_size(text: bytes, training: bytes) -> int:
    """gzip -9."""
    return len(gzip.compress(text, 9))


def xz_size(text: bytes, training: bytes) -> int:
    """xz -9e."""
    return len(lzma.compress(text, preset=_XZ))


def zstd_size(text: bytes, training: bytes) -> int:
    """zstd -19."""
    return len(zstandard.ZstdCompressor(level=19).compress(text))


def zstd_dict_size(text: bytes, training: bytes) -> int:
    """zstd -19 with a dictionary trained on the training text; a short text is the dictionary itself."""
    pieces: list[bytes | bytearray | memoryview] = [
        training[begin : begin + 2048] for begin in range(0, len(training), 2048)
    ]
    try:
        dictionary = zstandard.train_dictionary(_ZSTD_DICTIONARY, pieces)
    except zstandard.ZstdError:
        content = training[-_ZSTD_DICTIONARY:]
        dictionary = zstandard.ZstdCompressionDict(content, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    return len(zstandard.ZstdCompressor(level=19, dict_data=dictionary).compress(text))


def zstd_raw_size(text: bytes, training: bytes) -> int:
    """zstd -19 with the whole training text as a raw dictionary, and a window that reaches all of it."""
    dictionary = zstandard.ZstdCompressionDict(training, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    window = max((len(training) + len(text)).bit_length(), 20)
    settings = zstandard.ZstdCompressionParameters.from_level(
        19,
        window_log=min(window, zstandard.WINDOWLOG_MAX),
        enable_ldm=True,
        source_size=len(text),
        dict_size=len(training),
    )
    return len(zstandard.ZstdCompressor(dict_data=dictionary, compression_params=settings).compress(text))


def xz_given_text_size(text: bytes, training: bytes) -> int:
    """xz of training and held-out text together, less xz of the training text.

    Its dictionary holds all of it; xz -9e alone looks 64 MiB back.
    """
    least, most = _XZ_DICTIONARY
    reach = min(max(len(training) + len(text), least), most)
    filters = [{"id": lzma.FILTER_LZMA2, "preset": _XZ, "dict_size": reach}]
    both, alone = (len(lzma.compress(raw, filters=filters)) for raw in (training + text, training))
    return both - alone


COMPRESSORS: dict[str, Callable[[bytes, bytes], int]] = {
    "gzip": gzip_size,
    "xz": xz_size,
    "zstd": zstd_size,
    "zstd_dict": zstd_dict_size,
    "zstd_raw": zstd_raw_size,
    "xz_given_text": xz_given_text_size,
}
"""Name → bytes that a text takes; the last three have seen the training text."""

LABELS = {
    "model": "danlu's model",
    "gzip": "gzip -9",
    "xz": "xz -9e",
    "zstd": "zstd -19",
    "zstd_dict": "zstd, dictionary trained on the training text",
    "zstd_raw": "zstd, training text as dictionary",
    "xz_given_text": "xz, given the training text",
}


def compressor_bits(text: bytes, training: bytes) -> dict[str, float]:
    """Bits per byte of each compressor."""
    return {name: 8 * size(text, training) / len(text) for name, size in COMPRESSORS.items()}
