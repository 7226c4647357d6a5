"""Choosing the next token: pure functions on logits, applied in the order temperature, top-k, top-p.

Shapes: logits (B, V) float32 → logits (B, V), what is ruled out at minus infinity.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from danlu.core.errors import UserError


@dataclass(frozen=True)
class SamplingParams:
    """`stop_ids`: None = the tokenizer's. `seed` decides one prompt's draws whatever else is in the batch.

    Raises UserError for a number out of range.
    """

    max_tokens: int = 200
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    stop_ids: tuple[int, ...] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        ranges = {
            "max_tokens": (self.max_tokens >= 1, "at least 1"),
            "temperature": (self.temperature >= 0, "at least 0"),
            "top_k": (self.top_k >= 0, "at least 0"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
        }
        for name, (fits, wanted) in ranges.items():
            if not fits:
                raise UserError(f"{name} is {getattr(self, name)}", f"give {wanted}")


@dataclass
class Row:
    """One request's state."""

    prompt: list[int]
    params: SamplingParams
    generated: list[int] = field(default_factory=list)
    generator: torch.Generator = field(default_factory=torch.Generator)


def top_k(logits: Tensor, k: int) -> Tensor:
    """Keeps the k highest (Fan 2018); ties with the k-th stay. k = 0 keeps all."""
    if not 0 < k < logits.shape[-1]:
        return logits
    smallest = logits.topk(k, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < smallest, -math.inf)


def top_p(logits: Tensor, p: float) -> Tensor:
    """Nucleus (Holtzman 2020): keeps the fewest tokens whose probabilities sum to at least p."""
    if p >= 1:
        return logits
    ordered, index = logits.sort(dim=-1, descending=True)
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    outside = torch.zeros_like(before, dtype=torch.bool).scatter(-1, index, before >= p)
    return logits.masked_fill(outside, -math.inf)


def warp(logits: Tensor, params: SamplingParams) -> Tensor:
    """Temperature, then top-k, then top-p."""
    # The highest becomes 0 first, and float32 holds the divisor: a temperature near 0 gives no infinity.
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / max(params.temperature, 1e-30)
    return top_p(top_k(scaled, params.top_k), params.top_p)


def choose(logits: Tensor, params: SamplingParams, generators: list[torch.Generator]) -> Tensor:
    """(B,) the next token of each row, drawn with the row's own generator."""
    if params.temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = warp(logits, params).softmax(dim=-1).cpu()
    # One uniform number a row through the inverse of the distribution: a row's draw depends on nothing else.
    draws = torch.stack([torch.rand((), generator=g, dtype=torch.float64) for g in generators])
    cumulative = probabilities.double().cumsum(dim=-1)
    picked = torch.searchsorted(cumulative, (draws * cumulative[:, -1])[:, None], right=True)[:, 0]
    last = (probabilities > 0).long().cumsum(dim=-1).argmax(dim=-1)
    return picked.minimum(last).to(logits.device)
