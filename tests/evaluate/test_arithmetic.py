"""The arithmetic coder against the same maths in unbounded integers, and against entropy."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from danlu.evaluate import arithmetic
from danlu.evaluate.arithmetic import TOTAL

Tables = list[list[int]]


def encode(symbols: np.ndarray, probabilities: np.ndarray, lengths: np.ndarray) -> list[bytes]:
    """symbols (N, T), probabilities (T, N, V), lengths (N,)."""
    n, longest = symbols.shape
    state, out = arithmetic.new_state(n), np.zeros((n, 3 * longest + 16), np.uint8)
    for step in range(longest):
        arithmetic.encode_step(state, out, probabilities[step], symbols[:, step], step < lengths)
    return [out[i, : arithmetic.finish(state[i], out[i])].tobytes() for i in range(n)]


def decode(coded: list[bytes], probabilities: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    n, sizes = len(coded), np.array([len(code) for code in coded])
    raw = np.zeros((n, sizes.max() + 8), np.uint8)
    for row, code in zip(raw, coded, strict=True):
        row[: len(code)] = np.frombuffer(code, np.uint8)
    state = arithmetic.new_state(n)
    arithmetic.start_decoding(state, raw, sizes)
    symbols = np.zeros((n, len(probabilities)), np.int64)
    for step in range(len(probabilities)):
        found = np.zeros(n, np.int64)
        arithmetic.decode_step(state, raw, sizes, probabilities[step], found, step < lengths)
        symbols[:, step] = found
    return symbols


def tables(probabilities: np.ndarray) -> Tables:
    """Of (T, V)."""
    table = np.empty(probabilities.shape[1], np.int64)
    found = []
    for row in probabilities:
        arithmetic.quantise(row, table)
        found.append(table.tolist())
    return found


def exact_code(symbols: list[int], frequencies: Tables) -> bytes:
    """The code by Python's integers, which need no carry: `low` is the whole number so far."""
    low, width, n_bytes = 0, 2**64 - 1, 0
    for symbol, table in zip(symbols, frequencies, strict=True):
        unit = width >> 24
        low += unit * sum(table[:symbol])
        width = unit * table[symbol]
        while width < 2**48:
            low, width, n_bytes = low << 8, width << 8, n_bytes + 1
    number = (low + 2**48 - 1) >> 48
    return number.to_bytes(n_bytes + 2, "big")


def random_probabilities(chance: np.random.Generator, shape: tuple[int, ...], spread: float) -> np.ndarray:
    """Softmax of normal logits: nearly equal at a small spread, nearly one-hot at a large one."""
    logits = chance.normal(0, spread, shape)
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return (exponentials / exponentials.sum(-1, keepdims=True)).astype(np.float32)


@settings(max_examples=150, deadline=None)
@given(
    n=st.integers(1, 4),
    longest=st.integers(1, 60),
    vocab=st.integers(1, 40),
    spread=st.sampled_from([0.1, 2.0, 30.0, 300.0]),
    seed=st.integers(0, 2**32),
)
def test_round_trip_and_exact_code(n: int, longest: int, vocab: int, spread: float, seed: int) -> None:
    """Also of symbols that the tables hold for all but impossible, in streams of different length."""
    chance = np.random.default_rng(seed)
    probabilities = random_probabilities(chance, (longest, n, vocab), spread)
    symbols = chance.integers(0, vocab, (n, longest))
    lengths = chance.integers(0, longest + 1, n)
    coded = encode(symbols, probabilities, lengths)
    back = decode(coded, probabilities, lengths)
    for row, length in enumerate(lengths):
        assert back[row, :length].tolist() == symbols[row, :length].tolist()
        assert coded[row] == exact_code(symbols[row, :length].tolist(), tables(probabilities[:length, row]))


@pytest.mark.parametrize("boundary", [1 << 63, (1 << 63) + (1 << 56), 0xABCD << 48])
@pytest.mark.parametrize("last", ["below", "above"])
def test_carries_run_through_hundreds_of_full_bytes(boundary: int, last: str) -> None:
    """Every symbol's interval holds a number that ends in zeros: low's bytes are all 255 until the end."""
    table = tables(np.array([[0.2, 0.3, 0.5]], np.float32))[0]
    low, width, target, symbols = 0, 2**64 - 1, boundary, []
    while len(symbols) < 2000:
        unit = width >> 24
        edges = [low + unit * sum(table[:symbol]) for symbol in range(4)]
        symbol = max(s for s in range(3) if edges[s] <= target)
        assert target < edges[symbol + 1]
        symbols.append(symbol)
        low, width = edges[symbol], unit * table[symbol]
        while width < 2**48:
            low, width, target = low << 8, width << 8, target << 8
    for _ in range(40):  # now to one side of the boundary
        symbols.append(0 if last == "below" else 2)
    probabilities = np.broadcast_to(np.array([0.2, 0.3, 0.5], np.float32), (len(symbols), 1, 3))
    [code] = encode(np.array([symbols]), probabilities, np.array([len(symbols)]))
    assert code == exact_code(symbols, [table] * len(symbols))
    start = boundary.to_bytes(8, "big").rstrip(b"\0")
    if last == "above":
        assert code.startswith(start + bytes(200))
    else:
        assert code.startswith((int.from_bytes(start, "big") - 1).to_bytes(len(start), "big") + b"\xff" * 200)
    assert decode([code], probabilities, np.array([len(symbols)]))[0].tolist() == symbols


@pytest.mark.parametrize(
    ("vocab", "count", "spread"),
    [(2, 20_000, 3.0), (100, 10_000, 2.0), (50_000, 1500, 3.0), (300, 9000, 40.0)],
)
def test_size_is_the_entropy(vocab: int, count: int, spread: float) -> None:
    chance = np.random.default_rng(vocab)
    rows = random_probabilities(chance, (8, vocab), spread)
    which = chance.integers(0, len(rows), count)
    frequencies = np.array(tables(rows))
    symbols = np.array([chance.choice(vocab, p=frequencies[row] / TOTAL) for row in which])
    bits = -np.log2(frequencies[which, symbols] / TOTAL).sum()
    state, out = arithmetic.new_state(1), np.zeros((1, 3 * count + 16), np.uint8)
    for row, symbol in zip(which, symbols, strict=True):
        arithmetic.encode_step(state, out, rows[[row]], np.array([symbol]), np.array([True]))
    size = arithmetic.finish(state[0], out[0])
    assert bits / 8 <= size <= 1.01 * bits / 8 + 4


@settings(max_examples=200, deadline=None)
@given(
    vocab=st.one_of(st.integers(1, 300), st.sampled_from([4096, 50_000])),
    spread=st.sampled_from([0.0, 1e-6, 1.0, 10.0, 1000.0]),
    seed=st.integers(0, 2**32),
)
def test_tables_are_the_probabilities(vocab: int, spread: float, seed: int) -> None:
    """Each entry is its share of TOTAL, rounded down, plus 1; the most probable takes what is left over."""
    row = random_probabilities(np.random.default_rng(seed), (vocab,), spread)
    [table] = tables(row[None])
    assert sum(table) == TOTAL
    assert min(table) >= 1
    expected = [math.floor(float(p) * (TOTAL - vocab)) + 1 for p in row]
    best = int(row.argmax())
    assert table[:best] + table[best + 1 :] == expected[:best] + expected[best + 1 :]
    assert abs(table[best] - expected[best]) <= vocab + 2  # rounding: less than 1 for each entry


@pytest.mark.parametrize("vocab", [1, 2, 50_000])
@pytest.mark.parametrize("fill", [0.0, np.nan])
def test_extreme_tables(vocab: int, fill: float) -> None:
    """One-hot, and a model that is broken: nothing or NaN everywhere."""
    for hot in (0, vocab - 1, None):
        row = np.full(vocab, fill, np.float32)
        if hot is not None:
            row[hot] = 1.0
        [table] = tables(row[None])
        assert sum(table) == TOTAL
        assert min(table) >= 1
        if hot is not None and fill == 0.0:
            assert table[hot] == TOTAL - vocab + 1


def test_a_certain_symbol_costs_nothing() -> None:
    row = np.zeros((1, 1, 1000), np.float32)
    row[..., 700] = 1.0
    probabilities = np.broadcast_to(row, (5000, 1, 1000))
    symbols = np.full((1, 5000), 700)
    [code] = encode(symbols, probabilities, np.array([5000]))
    assert len(code) <= 4
    assert (decode([code], probabilities, np.array([5000])) == 700).all()


@settings(max_examples=50, deadline=None)
@given(raw=st.binary(max_size=40), vocab=st.integers(1, 300), seed=st.integers(0, 1000))
def test_any_bytes_decode_to_symbols_of_the_table(raw: bytes, vocab: int, seed: int) -> None:
    """A damaged stream gives other symbols, never a crash."""
    probabilities = random_probabilities(np.random.default_rng(seed), (50, 1, vocab), 3.0)
    symbols = decode([raw], probabilities, np.array([50]))
    assert ((symbols >= 0) & (symbols < vocab)).all()
