"""What each prediction sees, by a plain loop with transformers' model."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from danlu.core.errors import UserError
from danlu.evaluate import windows
from danlu.evaluate.bits_per_byte import bits_per_byte
from danlu.model.cross_entropy import log_probabilities
from danlu.model.transformer import Transformer
from danlu.tokens.loader import Batch
from danlu.tokens.tokenizer import Tokenizer

TEXT = "the furnace waits under the cold night. and the alchemist 丹炉 opens no door, slowly! 🔥\n"


@torch.no_grad()
def plain_logprobs(theirs: LlamaForCausalLM, stream: list[int], start: int, window: int) -> list[float]:
    """The rule as a loop: predict, append; when the context is more than full, keep its last quarter."""
    context, found = [start], []
    for token in stream:
        logits = theirs(torch.tensor([context])).logits[0, -1]
        found.append(float(logits.log_softmax(-1)[token]))
        context.append(token)
        if len(context) > window:
            context = context[-max(1, window // 4) :]
    return found


def stepped_logprobs(model: Transformer, rows: np.ndarray, start: int, window: int) -> np.ndarray:
    stepper = windows.Stepper(model, len(rows), start, window)
    found = np.zeros(rows.shape)
    for step in range(rows.shape[1]):
        probabilities = stepper.probabilities()
        found[:, step] = np.log(np.take_along_axis(probabilities, rows[:, [step]], 1)[:, 0])
        stepper.push(rows[:, step])
    return found


@torch.no_grad()
def scored_logprobs(
    model: Transformer, rows: np.ndarray, lengths: np.ndarray, start: int, window: int
) -> list[list[float]]:
    """Of each stream, from the windows that bits per byte reads."""
    found: list[list[float]] = [[] for _ in rows]
    for ids, targets, weights in windows.scoring_windows(rows, lengths, start, window):
        assert ids.shape[1] <= window
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        batch = Batch(ids, targets, weights, positions, torch.zeros_like(ids, dtype=torch.int32))
        for row, values in enumerate(log_probabilities(model, batch)):
            found[row] += values[weights[row] > 0].tolist()
    return found


@pytest.mark.parametrize("window", [2, 3, 8, 13, 64])
@pytest.mark.parametrize("n_tokens", [1, 3, 64, 65, 200])
def test_coder_and_score_see_what_the_rule_says(
    model: Transformer, theirs: LlamaForCausalLM, window: int, n_tokens: int
) -> None:
    """Token by token, in three streams whose lengths differ."""
    tokens = np.random.default_rng(n_tokens).integers(0, 320, n_tokens).tolist()
    rows, lengths = windows.split_streams(tokens, 3), windows.stream_lengths(n_tokens, 3)
    stepped = stepped_logprobs(model, rows, 0, window)
    scored = scored_logprobs(model, rows, lengths, 0, window)
    for row, length in enumerate(lengths):
        expected = plain_logprobs(theirs, rows[row, :length].tolist(), 0, window)
        assert stepped[row, :length].tolist() == pytest.approx(expected, abs=1e-4)
        assert scored[row] == pytest.approx(expected, abs=1e-4)
        assert scored[row] == pytest.approx(stepped[row, :length].tolist(), abs=1e-5)


@given(st.lists(st.integers(0, 1000), max_size=300), st.integers(1, 20))
def test_streams_are_the_tokens_in_order(tokens: list[int], streams: int) -> None:
    rows, lengths = windows.split_streams(tokens, streams), windows.stream_lengths(len(tokens), streams)
    assert [t for row, n in zip(rows, lengths, strict=True) for t in row[:n]] == tokens
    assert lengths.max() - lengths.min() <= 1
    assert rows.shape == (streams, lengths.max())


def test_bits_per_byte_of_one_stream(
    model: Transformer, tokenizer: Tokenizer, theirs: LlamaForCausalLM
) -> None:
    """One pass of transformers' model, all of the text in its context."""
    raw = TEXT.encode()
    ids = [tokenizer.eos_id, *tokenizer.encode(TEXT)]
    assert len(ids) <= model.config.max_positions
    with torch.no_grad():
        loss = float(theirs(torch.tensor([ids]), labels=torch.tensor([ids])).loss)  # mean over the targets
    expected = loss * (len(ids) - 1) / math.log(2) / len(raw)
    assert bits_per_byte(model, tokenizer, raw) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("window", [0, 16])
@pytest.mark.usefixtures("short_streams")
def test_bits_per_byte_of_many_streams_and_windows(
    model: Transformer, tokenizer: Tokenizer, theirs: LlamaForCausalLM, window: int
) -> None:
    """Invalid UTF-8 is paid for as well."""
    raw = TEXT.encode() * 5 + b"\xff\xfe\x00 end"
    tokens = tokenizer.encode_bytes(raw)
    streams = windows.n_streams(len(tokens))
    assert streams > 4
    rows, lengths = windows.split_streams(tokens, streams), windows.stream_lengths(len(tokens), streams)
    nats = -sum(
        sum(plain_logprobs(theirs, row[:n].tolist(), tokenizer.eos_id, window or model.config.max_positions))
        for row, n in zip(rows, lengths, strict=True)
    )
    assert bits_per_byte(model, tokenizer, raw, window) == pytest.approx(nats / math.log(2) / len(raw))


@pytest.mark.parametrize(
    ("raw", "window", "message"),
    [(b"", 0, "the text is empty"), (b"x", 1, "window is 1"), (b"x" * 99, 65, "65 positions|64 positions")],
)
def test_what_cannot_be_scored_is_refused(
    model: Transformer, tokenizer: Tokenizer, raw: bytes, window: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        bits_per_byte(model, tokenizer, raw, window)
