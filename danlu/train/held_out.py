"""Loss and bits per byte on held-out tokens, while training."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from danlu.model import parallel
from danlu.model.cross_entropy import log_probabilities
from danlu.model.transformer import Transformer
from danlu.tokens.loader import Batch
from danlu.tokens.tokenizer import Tokenizer


@dataclass(frozen=True)
class HeldOut:
    """`loss`: nats per supervised token. `bits_per_byte`: of the text that those tokens spell."""

    loss: float
    bits_per_byte: float
    tokens: int


def evaluate(
    model: Transformer,
    batches: Iterable[Batch],
    token_bytes: torch.Tensor,
    device: torch.device,
    way: parallel.Way = "ddp",
) -> HeldOut:
    """Every supervised token of `batches` once, spread over the processes that have data of their own.

    `token_bytes` (V,): bytes of text that each token stands for (`bytes_per_token`).
    """
    share = parallel.data_processes(way) > 1
    sums = [0.0, 0.0, 0.0]  # nats, tokens, bytes
    with torch.no_grad():
        for batch, counts in _share(batches) if share else ((batch, True) for batch in batches):
            here = batch.to(device)
            weights = here.weights if counts else torch.zeros_like(here.weights)
            sums[0] -= float((log_probabilities(model, here).double() * weights).sum())
            sums[1] += float(weights.sum())
            sums[2] += float((token_bytes.to(device)[here.targets] * (weights > 0)).sum())
    nats, tokens, text_bytes = parallel.sum_over_ranks(sums) if share else sums
    bits = nats / math.log(2)
    return HeldOut(nats / max(tokens, 1), bits / text_bytes if text_bytes else math.nan, int(tokens))


def bytes_per_token(tokenizer: Tokenizer) -> torch.Tensor:
    """(V,) int64: the bytes each token decodes to; special tokens stand for no text."""
    return torch.tensor([len(entry) for entry in tokenizer.token_bytes])


def _share(batches: Iterable[Batch]) -> Iterable[tuple[Batch, bool]]:
    """This process's part of the batches, as many in every process: (batch, whether it counts).

    Sharded models need every process in every forward pass, so the last ones are run without counting.
    """
    rank, size = parallel.rank(), parallel.world_size()
    group: list[Batch] = []
    for batch in batches:
        group.append(batch)
        if len(group) == size:
            yield group[rank], True
            group = []
    if group:
        yield group[min(rank, len(group) - 1)], rank < len(group)
