"""Bits per byte: what a text costs under a model, whatever its tokenizer."""

import math

import torch

from danlu.core.errors import UserError
from danlu.core.progress import Progress
from danlu.evaluate import windows
from danlu.model.cross_entropy import log_probabilities
from danlu.model.transformer import Transformer
from danlu.tokens.loader import Batch
from danlu.tokens.tokenizer import Tokenizer


def bits_per_byte(model: Transformer, tokenizer: Tokenizer, raw: bytes, window: int = 0) -> float:
    """−log₂ p of all tokens of `raw` over its bytes, with the codec's own windows (`evaluate.windows`).

    Every token is paid for, line ends too. `window`: tokens, 0 = the model's context. Raises UserError for
    an empty text.
    """
    tokens = _tokens(tokenizer, raw)
    nats = _nats(model, tokenizer, tokens, windows.n_streams(len(tokens)), window, None)
    return nats / math.log(2) / len(raw)


def text_scores(
    model: Transformer, tokenizer: Tokenizer, raw: bytes, window: int = 0, stride: int = 0
) -> dict[str, float]:
    """Perplexity of a text as one row of sliding windows, each of which predicts its last `stride` tokens.

    `window`: tokens that are read at most, 0 = the model's context; `stride` 0 = half of it. The smaller the
    stride, the more each token sees, and the longer it takes. Raises UserError for an empty text.
    """
    tokens = _tokens(tokenizer, raw)
    window = window or model.config.max_positions
    stride = stride or max(1, window // 2)
    if not 1 <= stride <= window <= model.config.max_positions:
        raise UserError(
            f"window {window}, stride {stride}: the model reads {model.config.max_positions} tokens",
            "set 1 ≤ stride ≤ window ≤ the model's context",
        )
    nats = _nats(model, tokenizer, tokens, 1, window, window - stride + 1)
    return {
        "tokens": len(tokens),
        "bytes": len(raw),
        "window": window,
        "stride": stride,
        "nats_per_token": nats / len(tokens),
        "perplexity": math.exp(min(700.0, nats / len(tokens))),
        "bits_per_byte": nats / math.log(2) / len(raw),
    }


def _tokens(tokenizer: Tokenizer, raw: bytes) -> list[int]:
    tokens = tokenizer.encode_bytes(raw)
    if not tokens:
        raise UserError("the text is empty", "give a text to evaluate on")
    return tokens


def _nats(
    model: Transformer, tokenizer: Tokenizer, tokens: list[int], streams: int, window: int, keep: int | None
) -> float:
    """−log p of all tokens."""
    rows, lengths = windows.split_streams(tokens, streams), windows.stream_lengths(len(tokens), streams)
    window = window or model.config.max_positions
    if window < 2:
        raise UserError(f"window is {window}", "give at least 2 tokens, or 0 for the model's context")
    nats, done = 0.0, 0
    with torch.no_grad(), Progress("bits per byte", len(tokens), "tokens") as progress:
        for ids, targets, weights in windows.scoring_windows(rows, lengths, tokenizer.start_id, window, keep):
            for part in range(0, len(ids), 8):
                batch = _batch(ids[part : part + 8], targets[part : part + 8], weights[part : part + 8])
                nats -= float((log_probabilities(model, batch).double() * batch.weights).sum())
                done += batch.n_supervised
                progress.update(done)
    return nats


def _batch(ids: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> Batch:
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    return Batch(ids, targets, weights, positions, torch.zeros_like(ids, dtype=torch.int32))
