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
    tokens = tokenizer.encode_bytes(raw)
    if not tokens:
        raise UserError("the text is empty", "give a text to evaluate on")
    streams = windows.n_streams(len(tokens))
    rows, lengths = windows.split_streams(tokens, streams), windows.stream_lengths(len(tokens), streams)
    window = window or model.config.max_positions
    if window < 2:
        raise UserError(f"window is {window}", "give at least 2 tokens, or 0 for the model's context")
    nats, done = 0.0, 0
    with torch.no_grad(), Progress("bits per byte", len(tokens), "tokens") as progress:
        for ids, targets, weights in windows.scoring_windows(rows, lengths, tokenizer.start_id, window):
            for part in range(0, len(ids), 8):
                batch = _batch(ids[part : part + 8], targets[part : part + 8], weights[part : part + 8])
                nats -= float((log_probabilities(model, batch).double() * batch.weights).sum())
                done += batch.n_supervised
                progress.update(done)
    return nats / math.log(2) / len(raw)


def _batch(ids: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> Batch:
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    return Batch(ids, targets, weights, positions, torch.zeros_like(ids, dtype=torch.int32))
