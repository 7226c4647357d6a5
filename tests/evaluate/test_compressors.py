"""What the compressors' sizes count comes back by the libraries' own decompressors."""

import gzip
import lzma
import random
from collections.abc import Callable
from typing import Any

import pytest
import zstandard

from danlu.evaluate import compressors
from danlu.evaluate.compressors import COMPRESSORS, LABELS, compressor_bits

ZSTD = zstandard.ZstdCompressor


class Recorded:
    """A compressor that keeps what it gave, and what it was made with."""

    made: list[tuple[bytes, dict[str, Any]]]

    def __init__(self, **settings: Any) -> None:
        self.inner, self.settings = ZSTD(**settings), settings

    def compress(self, raw: bytes) -> bytes:
        self.made.append((self.inner.compress(raw), self.settings))
        return self.made[-1][0]


@pytest.fixture
def training(make_text: Callable[[int, int], str]) -> bytes:
    return make_text(1, 200_000).encode()


@pytest.fixture
def text(make_text: Callable[[int, int], str]) -> bytes:
    return make_text(2, 20_000).encode()


def recorded(monkeypatch: pytest.MonkeyPatch, module: Any) -> list[bytes]:
    """What a module's `compress` gives from now on."""
    made: list[bytes] = []
    compress = module.compress

    def keep(*arguments: Any, **named: Any) -> bytes:
        made.append(compress(*arguments, **named))
        return made[-1]

    monkeypatch.setattr(module, "compress", keep)
    return made


def test_gzip(text: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    made = recorded(monkeypatch, gzip)
    size = compressors.gzip_size(text, b"")
    assert gzip.decompress(made[0]) == text
    assert size == len(made[0])


def test_xz(text: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    made = recorded(monkeypatch, lzma)
    size = compressors.xz_size(text, b"")
    assert lzma.decompress(made[0]) == text
    assert size == len(made[0])


def test_xz_given_the_training_text(text: bytes, training: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    made = recorded(monkeypatch, lzma)
    size = compressors.xz_given_text_size(text, training)
    assert [lzma.decompress(raw) for raw in made] == [training + text, training]
    assert size == len(made[0]) - len(made[1])


@pytest.mark.parametrize("name", ["zstd", "zstd_dict", "zstd_raw"])
@pytest.mark.parametrize("known", [0, 100, 200_000])
def test_zstd(name: str, known: int, text: bytes, training: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where there is hardly any training text, too little to train a dictionary on."""
    monkeypatch.setattr(compressors.zstandard, "ZstdCompressor", Recorded)
    monkeypatch.setattr(Recorded, "made", [], raising=False)
    size = COMPRESSORS[name](text, training[:known])
    [(made, settings)] = Recorded.made
    dictionary = settings.get("dict_data")
    assert (dictionary is None) == (name == "zstd")
    decompressor = zstandard.ZstdDecompressor(dict_data=dictionary, max_window_size=1 << 30)
    assert decompressor.decompress(made) == text
    assert size == len(made)
    if name == "zstd_dict":
        assert len(dictionary.as_bytes()) <= 112_640


@pytest.mark.parametrize(("name", "size"), [("zstd_raw", 2_000_000), ("xz_given_text", 500_000)])
def test_all_of_the_training_text_is_within_reach(name: str, size: int) -> None:
    """Incompressible text costs nothing but references where it was seen, also behind a long new text."""
    training, new = random.Random(0).randbytes(size), random.Random(1).randbytes(size)
    for begin in (0, size - 50_000):
        again = training[begin : begin + 50_000]
        assert COMPRESSORS[name](again, training) < 600
        assert COMPRESSORS[name](new + again, training) < len(new) + 1000


def test_having_seen_related_text_helps(text: bytes, training: bytes) -> None:
    bits = compressor_bits(text, training)
    assert bits == {name: 8 * size(text, training) / len(text) for name, size in COMPRESSORS.items()}
    assert max(bits["zstd_dict"], bits["zstd_raw"]) < bits["zstd"]
    assert bits["xz_given_text"] < bits["xz"]
    assert LABELS.keys() == {"model", *COMPRESSORS}
