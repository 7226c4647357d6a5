"""The compression experiment: sizes that can be decompressed again, verdicts that go both ways."""

import gzip
import lzma
import random
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard

from danlu.evaluate import codec
from danlu.model.checkpoint import save_model
from danlu.model.config import ModelConfig
from danlu.model.transformer import Transformer
from danlu.papers import compression
from danlu.tokens.bpe import train_bpe

TEXTS = ["It rains.\n" * 20, "The furnace is hot, and the alchemist waits for the gold to appear.\n" * 3, "x"]


@pytest.mark.parametrize("text", [text.encode() for text in TEXTS])
def test_bodies_without_their_headers_still_decompress(text: bytes) -> None:
    deflated = gzip.compress(text, 9)[10:-8]
    assert compression.gzip_body_size(text) == len(deflated)
    assert zlib.decompress(deflated, -15) == text

    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]
    raw = lzma.compress(text, lzma.FORMAT_RAW, filters=filters)
    assert compression.xz_body_size(text) == len(raw)
    assert lzma.decompress(raw, lzma.FORMAT_RAW, filters=filters) == text

    # zstd: a frame with its magic number (4 bytes) and the content's size (1 byte or more), else the same.
    whole = len(zstandard.ZstdCompressor(level=19).compress(text))
    assert whole - 10 <= compression.zstd_body_size(text) <= whole - 4


def test_documents_side_by_side_cost_what_each_costs_alone(tmp_path: Path) -> None:
    tokenizer = train_bpe(TEXTS * 4, 300)
    torch.manual_seed(0)
    sizes = ModelConfig(
        vocab_size=300, width=32, n_layers=2, n_heads=2, n_kv_heads=2, ffn_width=64, max_positions=512
    )
    save_model(Transformer(sizes), tmp_path / "model", tokenizer)
    documents = [text.encode() for text in TEXTS[:2]]
    together = compression.code_apart(documents, tmp_path / "model") * sum(map(len, documents)) / 8
    alone = 0
    for document in documents:
        packed = codec.compress_bytes(document, str(tmp_path / "model"))
        header, payload = codec.unpack(packed, "the document")
        assert header.streams == 1
        alone += len(payload) - 4
    assert together == alone


def test_a_claim_can_come_out_either_way() -> None:
    others = {"gzip": 3.0, "xz": 2.5}
    below = compression.judge("below", [2.0, 2.1, 2.05], others, ("gzip", "xz"), 0)
    assert below.verdict == "holds"
    assert below.value == pytest.approx(2.05 - 2.5)
    assert compression.judge("below", [2.4, 2.6, 2.5], others, ("gzip", "xz"), 0).verdict == "does not hold"
    assert compression.judge("above", [9.0, 9.1, 9.2], others, ("gzip", "xz"), 1).verdict == "holds"
    assert compression.judge("above", [2.0, 2.1, 2.2], others, ("gzip", "xz"), 1).verdict == "does not hold"


def test_wrong_bytes_are_counted_wherever_they_are() -> None:
    chance = random.Random(0)
    raw = bytearray(np.random.default_rng(0).bytes(300))
    assert compression.wrong_bytes(bytes(raw), bytes(raw)) == 0
    broken = bytearray(raw)
    for at in chance.sample(range(300), 7):
        broken[at] ^= 1
    assert compression.wrong_bytes(bytes(broken), bytes(raw)) == 7
    assert compression.wrong_bytes(bytes(raw[:-5]), bytes(raw)) == 5
