"""The codec: the same bytes or an error, at the size that the model's probabilities say."""

import random
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from danlu.cli import VERBS
from danlu.core.errors import UserError
from danlu.core.recipe import find_recipe, read_recipe
from danlu.evaluate import codec
from danlu.evaluate.bits_per_byte import bits_per_byte
from danlu.evaluate.codec import Header, compress_bytes, decompress_bytes
from danlu.evaluate.windows import MOST_STREAMS, Stepper, kept
from danlu.model.checkpoint import load, save_model
from danlu.model.config import ModelConfig
from danlu.model.transformer import Transformer
from danlu.tokens.bpe import train_bpe
from danlu.tokens.tokenizer import Tokenizer

TEXT = "the furnace waits under the cold night. and the alchemist opens no door.\n"


def lines(seed: int, size: int) -> str:
    """Words and numbers that take about as many tokens a byte as English does at 4,096 entries."""
    chance, text, length = random.Random(seed), [], 0
    while length < size:
        name = "".join(chance.choices("aeioubdfglmnrst", k=chance.randint(2, 6)))
        text.append(f"{chance.choice(TEXT.split())} {name} {chance.randrange(10_000)}\n")
        length += len(text[-1])
    return "".join(text)[:size]


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """Each test leaves the number of threads as it was, and so must the codec."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def packed(folder: Path) -> bytes:
    """A short compressed file that needs the model."""
    return compress_bytes(TEXT.encode(), str(folder))


CASES = {
    "empty": b"",
    "one byte": b"\xff",
    "text": TEXT.encode() * 8,
    "chinese": "丹炉里的火很旺，炼丹的人在等金子出现。今天天气很好。\r\n".encode() * 12,
    "special tokens": b"<|endoftext|><|im_start|>user\n<|im_end|>" * 12,
    "invalid utf-8": "naïve café 丹炉".encode()[:-1] * 20 + b"\xc3\x28\xed\xa0\x80\xf5",
    "zeros": bytes(500),
    "long line": b"a" * 1500,
    "all bytes": bytes(range(256)) * 3,
    "random": random.Random(0).randbytes(900),
    "mixed": TEXT.encode() * 6 + random.Random(1).randbytes(300) + TEXT.encode() * 6,
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("short_streams")
def test_the_same_bytes_come_back(folder: Path, name: str) -> None:
    raw = CASES[name]
    packed = compress_bytes(raw, str(folder))
    assert decompress_bytes(packed, str(folder), "x") == raw


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(raw=st.binary(max_size=80) | st.text(max_size=40).map(str.encode))
def test_any_bytes_come_back(folder: Path, short_streams: None, raw: bytes) -> None:
    assert decompress_bytes(compress_bytes(raw, str(folder)), str(folder), "x") == raw


def test_random_bytes_hardly_grow(folder: Path) -> None:
    raw = random.Random(2).randbytes(30_000)
    packed = compress_bytes(raw, str(folder))
    assert len(packed) <= 1.01 * len(raw)
    assert decompress_bytes(packed, str(folder), "x") == raw


def test_size_is_what_bits_per_byte_says(
    folder: Path, model: Transformer, tokenizer: Tokenizer, make_text: Callable[[int, int], str]
) -> None:
    """Within 1 % with header and all; the streams alone within a thousandth and three bytes each."""
    words = sorted(set(make_text(0, 20_000).split()))
    raw = " ".join(random.Random(5).choices(words, k=30_000)).encode()
    assert len(raw) > 100_000
    packed = compress_bytes(raw, str(folder))
    bits = bits_per_byte(model, tokenizer, raw) * len(raw)
    assert 8 * len(packed) == pytest.approx(bits, rel=0.01)
    header, payload = codec.unpack(packed, "x")
    streams = len(payload) - 4 * header.streams
    assert bits / 8 <= streams <= 1.001 * bits / 8 + 3 * header.streams
    assert decompress_bytes(packed, str(folder), "x") == raw


def test_the_model_is_what_compresses(
    folder: Path, tmp_path: Path, make_text: Callable[[int, int], str]
) -> None:
    """The same sizes and tokenizer without training: the file is larger."""
    raw = make_text(9, 5000).encode()
    model, tokenizer = load(folder)
    model.init_weights()
    save_model(model, tmp_path / "untrained", tokenizer)
    assert len(compress_bytes(raw, str(folder))) < 0.8 * len(compress_bytes(raw, str(tmp_path / "untrained")))


def test_every_flipped_bit_is_an_error(packed: bytes, folder: Path) -> None:
    for place in range(len(packed)):
        for bit in range(8):
            damaged = bytearray(packed)
            damaged[place] ^= 1 << bit
            with pytest.raises(UserError, match=r"x: (damaged|not made by)"):
                decompress_bytes(bytes(damaged), str(folder), "x")


def test_a_cut_or_longer_file_is_an_error(packed: bytes, folder: Path) -> None:
    for wrong in [*(packed[:size] for size in range(len(packed))), packed + b"\0", b"hello"]:
        with pytest.raises(UserError, match=r"x: (damaged|not made by)"):
            decompress_bytes(wrong, str(folder), "x")


@settings(max_examples=10, deadline=None)
@given(place=st.integers(0, 10_000), mask=st.integers(1, 255))
def test_damage_with_a_right_crc_is_never_other_bytes(
    packed: bytes, folder: Path, place: int, mask: int
) -> None:
    """Decoding goes astray, and the original's checksum tells."""
    header, payload = codec.unpack(packed, "x")
    damaged = bytearray(payload)
    damaged[4 + place % (len(payload) - 4)] ^= mask
    forged = codec.pack(header, bytes(damaged))
    try:
        found: bytes | str = decompress_bytes(forged, str(folder), "x")
    except UserError as error:
        found = error.message
    assert found in (TEXT.encode(), "x: the result doesn't match the checksum")


def test_another_model_is_an_error(packed: bytes, folder: Path, tmp_path: Path) -> None:
    """One weight that differs in its last bit is another model; so is another tokenizer."""
    model, tokenizer = load(folder)
    with torch.no_grad():
        weight = model.layers[1].ffn.up.weight
        weight[3, 3] = torch.nextafter(weight[3, 3], torch.tensor(9.0))
    save_model(model, tmp_path / "weight", tokenizer)
    model, tokenizer = load(folder)
    save_model(model, tmp_path / "tokenizer", train_bpe([TEXT[::-1] * 3], 300))
    for other in ("weight", "tokenizer"):
        with pytest.raises(UserError, match="compressed with another model"):
            decompress_bytes(packed, str(tmp_path / other), "x")
    with pytest.raises(UserError, match="no model is given"):
        decompress_bytes(packed, "", "x")
    with pytest.raises(UserError, match="does not exist"):
        decompress_bytes(packed, str(tmp_path / "nothing"), "x")


def test_another_number_of_threads_gives_the_same_bytes(folder: Path) -> None:
    """The file says how many coded it; the decoder takes as many, and puts its own number back."""
    for coder, decoder in ((1, 2), (2, 1)):
        torch.set_num_threads(coder)
        packed = compress_bytes(TEXT.encode() * 3, str(folder))
        assert Header.read(packed, "x")[0].threads == coder
        torch.set_num_threads(decoder)
        assert decompress_bytes(packed, str(folder), "x") == TEXT.encode() * 3
        assert torch.get_num_threads() == decoder


def test_a_machine_with_many_cores_fits_the_header() -> None:
    header = Header(codec.STATIC, 384, 96, 2048, 10**10, 10**11)
    assert Header.read(header.to_bytes(), "x") == (header, b"")


@pytest.mark.parametrize(
    ("first", "message"), [(0, "computes other bits"), (5, "doesn't match the checksum")]
)
def test_another_machine_is_an_error(
    packed: bytes, folder: Path, monkeypatch: pytest.MonkeyPatch, first: int, message: str
) -> None:
    """Its probabilities differ in what rounding leaves, from the start or later than the probe looks."""
    exact, calls = Stepper.probabilities, iter(range(10**6))

    def other(self: Stepper) -> np.ndarray:
        found = exact(self)
        return found * np.float32(1 + 1e-6) if next(calls) >= first else found

    monkeypatch.setattr(Stepper, "probabilities", other)
    with pytest.raises(UserError, match=message):
        decompress_bytes(packed, str(folder), "x")


@pytest.mark.usefixtures("short_streams")
def test_coder_and_decoder_compute_at_the_same_shapes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes of the ids and of the context in every call, stored streams among them."""
    calls: list[tuple[Any, ...]] = []
    hidden = Transformer.hidden

    def recorded(self: Transformer, ids: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        calls.append((ids.shape, tuple(named["cache"].lengths), torch.get_num_threads()))
        return hidden(self, ids, *rest, **named)

    monkeypatch.setattr(Transformer, "hidden", recorded)
    packed = compress_bytes(CASES["mixed"], str(folder))
    coder, calls[:] = list(calls), []
    assert decompress_bytes(packed, str(folder), "x") == CASES["mixed"]
    assert calls == coder
    assert len(calls) > 40


def test_a_broken_model_codes_badly_but_rightly(folder: Path, tmp_path: Path) -> None:
    model, tokenizer = load(folder)
    torch.nn.init.constant_(model.norm.weight, float("nan"))
    save_model(model, tmp_path / "nan", tokenizer)
    packed = compress_bytes(TEXT.encode(), str(tmp_path / "nan"))
    assert decompress_bytes(packed, str(tmp_path / "nan"), "x") == TEXT.encode()


def test_the_checks_of_the_file_are_crc_32(packed: bytes) -> None:
    header, payload = codec.unpack(packed, "x")
    assert packed == header.to_bytes() + payload
    assert packed[len(packed) - len(payload) - 4 :][:4] == zlib.crc32(
        packed[: len(packed) - len(payload) - 4]
    ).to_bytes(4, "little")


@pytest.fixture(scope="module")
def quickstart_size(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The model of `danlu quickstart` on this machine, not trained."""
    recipe = read_recipe(find_recipe(Path("quickstart")), VERBS)
    sizes = ModelConfig(**recipe.stage("pretrain", "recipe").options["model"])
    folder = tmp_path_factory.mktemp("quickstart") / "model"
    torch.manual_seed(0)
    save_model(Transformer(sizes), folder, train_bpe([lines(1, 500_000)], 4096))
    return str(folder)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_megabyte_of_text_takes_five_minutes_each_way(
    quickstart_size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of one, which has as many streams. From one full context to the next the work is the same, so
    that the fastest such round says what the machine takes when nobody else uses it.
    """
    full: list[float] = []
    monkeypatch.setattr(Stepper, "window_is_full", lambda self: full.append(time.monotonic()))
    raw = lines(2, 500_000).encode()
    packed = compress_bytes(raw, quickstart_size)
    header = Header.read(packed, "x")[0]
    assert header.tokens > len(raw) / 4
    assert header.streams == MOST_STREAMS
    rounds = -(-header.tokens // header.streams) / (header.window - kept(header.window))
    assert len(full) >= 4
    assert rounds * np.diff(full).min() < 150
    full.clear()
    assert decompress_bytes(packed, quickstart_size, "x") == raw
    assert rounds * np.diff(full).min() < 150


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_megabyte_of_random_bytes_hardly_grows(quickstart_size: str) -> None:
    raw = random.Random(4).randbytes(1_000_000)
    begin = time.monotonic()
    packed = compress_bytes(raw, quickstart_size)
    assert time.monotonic() - begin < 600
    assert len(packed) <= 1.01 * len(raw)
    assert decompress_bytes(packed, quickstart_size, "x") == raw
