"""The next tokens of a batch of rows, with what the model says of them."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from danlu.core.errors import UserError
from danlu.generate import kernels
from danlu.generate.sampling import Row, RowError, choose, process


@dataclass(frozen=True)
class Draw:
    """A token. Log-probabilities are the model's own, before anything is changed."""

    token: int
    logprob: float
    top: list[tuple[int, float]] = field(default_factory=list)
    """The most probable tokens with theirs, as many as were asked for."""
    error: UserError | None = None
    """Why there is none."""


def draw(logits: Tensor, rows: Sequence[Row]) -> list[Draw]:
    """A token for each row of logits (B, V). What is wrong with one row is no matter of the others."""
    try:
        params = [row.params for row in rows]
        tokens = choose(process(logits, rows, params), rows, params)
    except RowError as error:
        found = Draw(0, 0.0, error=error)
        number = next(i for i, row in enumerate(rows) if row is error.row)
        others = [i for i in range(len(rows)) if i != number]
        drawn = draw(logits[others], [rows[i] for i in others]) if others else []
        return [*drawn[:number], found, *drawn[number:]]
    totals = log_sums(logits)
    logprobs = logits.gather(1, tokens[:, None])[:, 0] - totals
    tops = [
        top_logprobs(logits[i] - totals[i], n) if (n := row.params.logprobs) else []
        for i, row in enumerate(rows)
    ]
    return [Draw(*found) for found in zip(tokens.tolist(), logprobs.tolist(), tops, strict=True)]


def log_sums(logits: Tensor) -> Tensor:
    """(B,) log Σ exp of each row of logits (B, V) float32; on a processor the same for every B."""
    if logits.device.type != "cpu":
        return logits.logsumexp(1)
    found = np.empty(len(logits))
    kernels.log_sums(logits.numpy(), found)
    return torch.from_numpy(found).float()


def top_logprobs(logprobs: Tensor, n: int) -> list[tuple[int, float]]:
    """The n most probable tokens of logprobs (V,)."""
    if n == 0:
        return []
    values, ids = logprobs.topk(min(n, len(logprobs)))
    return list(zip(ids.tolist(), values.tolist(), strict=True))
