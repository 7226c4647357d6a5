"""Prequential coding: the same bytes or an error, and what repeats costs less the longer it goes on."""

import random
from collections.abc import Iterator

import pytest
import torch

from danlu.core.errors import UserError
from danlu.evaluate import codec
from danlu.train import prequential
from danlu.train.prequential import OnlineStepper, compress_bytes, decompress_bytes

TEXT = "the furnace waits under the cold night. and the alchemist opens no door.\n"


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


CASES = {
    "empty": b"",
    "one byte": b"\xfe",
    "short": TEXT.encode(),
    "text": TEXT.encode() * 24,
    "chinese": "丹炉里的火很旺，炼丹的人在等金子出现。\r\n".encode() * 24,
    "special tokens": b"<|endoftext|><|im_start|>user\n<|im_end|>" * 24,
    "invalid utf-8": "naïve café 丹炉".encode()[:-1] * 60 + b"\xc3\x28\xed\xa0\x80\xf5",
    "zeros": bytes(3000),
    "random": random.Random(0).randbytes(1500),
}


_LONG = [pytest.param(name, marks=pytest.mark.slow) for name in ("text", "chinese")]


@pytest.mark.parametrize("name", [*_LONG, *(name for name in CASES if name not in ("text", "chinese"))])
def test_the_same_bytes_come_back(name: str) -> None:
    raw = CASES[name]
    packed = compress_bytes(raw)
    assert decompress_bytes(packed, "x") == raw
    assert len(packed) <= len(raw) + 200, "what can't be learnt is stored"


def test_a_long_file_is_learnt_without_replay(monkeypatch: pytest.MonkeyPatch, packed: bytes) -> None:
    assert prequential.replays(2_000_000) == 1
    assert prequential.replays(2_000_001) == 0
    monkeypatch.setattr(prequential, "replays", lambda n_tokens: 0)
    once = compress_bytes(CASES["text"])
    assert decompress_bytes(once, "x") == CASES["text"]
    assert once != packed


def test_it_is_the_same_file_each_time_and_leaves_no_trace(packed: bytes) -> None:
    torch.manual_seed(99)
    state = torch.random.get_rng_state()
    assert compress_bytes(CASES["text"]) == packed
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.slow
def test_what_repeats_costs_less_the_longer_it_goes_on(packed: bytes) -> None:
    """Three times the text, less than twice the size."""
    assert len(compress_bytes(TEXT.encode() * 72)) < 2 * len(packed)


def test_learning_is_what_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces are cut before the vocabulary can hold the sentence, so that only the model can know it."""
    monkeypatch.setattr(prequential, "n_merges", lambda size: 0)
    raw = TEXT.encode() * 40
    learnt = len(compress_bytes(raw))
    monkeypatch.setattr(OnlineStepper, "window_is_full", lambda self: None)
    assert learnt < 0.75 * len(compress_bytes(raw))


@pytest.fixture(scope="module")
def packed() -> bytes:
    """Of CASES["text"]."""
    packed = compress_bytes(CASES["text"])
    assert codec.unpack(packed, "x")[0].streams > 0, "not stored"
    return packed


def test_every_flipped_byte_is_an_error(packed: bytes) -> None:
    for place in range(len(packed)):
        for mask in (1, 0x80, 0xFF):
            damaged = bytearray(packed)
            damaged[place] ^= mask
            with pytest.raises(UserError, match=r"x: (damaged|not made by)"):
                decompress_bytes(bytes(damaged), "x")


def test_a_cut_or_longer_file_is_an_error(packed: bytes) -> None:
    for wrong in [*(packed[:size] for size in range(len(packed))), packed + b"\0", b"hello"]:
        with pytest.raises(UserError, match=r"x: (damaged|not made by)"):
            decompress_bytes(wrong, "x")


def test_damage_with_a_right_crc_is_never_other_bytes(packed: bytes) -> None:
    """The original's checksum tells."""
    header, payload = codec.unpack(packed, "x")
    damaged = bytearray(payload)
    damaged[-20] ^= 0x55
    with pytest.raises(UserError, match="doesn't match the checksum"):
        decompress_bytes(codec.pack(header, bytes(damaged)), "x")


@pytest.mark.slow
def test_another_number_of_threads_gives_the_same_bytes() -> None:
    torch.set_num_threads(1)
    packed = compress_bytes(CASES["text"])
    torch.set_num_threads(2)
    assert decompress_bytes(packed, "x") == CASES["text"]
    assert torch.get_num_threads() == 2


def test_a_machine_that_learns_otherwise_is_an_error(packed: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that differ in what rounding leaves after an update: the probe looks behind one."""
    learn = OnlineStepper._learn

    def other(self: OnlineStepper, starts: torch.Tensor) -> None:
        learn(self, starts)
        with torch.no_grad():
            self.model.norm.weight.mul_(1 + 1e-6)

    monkeypatch.setattr(OnlineStepper, "_learn", other)
    with pytest.raises(UserError, match="computes other bits"):
        decompress_bytes(packed, "x")
