"""Cross-entropy of the output layer without the (tokens × vocabulary) matrix, and log-probabilities.

The loss of N tokens is Σ wᵢ (log Σⱼ exp zᵢⱼ − zᵢ,yᵢ) with z = h Wᵀ. Its gradient by z is
wᵢ (softmax(zᵢ) − 1[yᵢ]), known as soon as z is: so each chunk of tokens yields its loss and its share of
the gradients by h and W in the forward pass, and its logits are dropped.
"""

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from danlu.model.transformer import Transformer
    from danlu.tokens.loader import Batch

CHUNK = 4 * 1024 * 1024
"""Logits in one chunk."""


def linear_cross_entropy(hidden: Tensor, head_weight: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Sum of weighted nats (a float32 scalar).

    hidden (N, D), head_weight (V, D), targets (N,) int64, weights (N,) float32, 0 = not counted.
    The products run in the dtype of `hidden`; the softmax in float32.
    """
    return _LinearCrossEntropy.apply(hidden, head_weight, targets, weights)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head_weight: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        w = head_weight.to(hidden.dtype)
        precise = torch.promote_types(hidden.dtype, torch.float32)
        backward = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        d_hidden = torch.empty_like(hidden) if backward else None
        d_weight = torch.zeros(w.shape, dtype=precise, device=w.device) if backward else None
        total = torch.zeros((), dtype=precise, device=w.device)
        for rows in _chunks(len(hidden), len(w)):
            h, y, weight = hidden[rows], targets[rows, None], weights[rows, None]
            z = h @ w.T
            p = z.softmax(-1, dtype=precise)
            nats = p.gather(1, y).log().neg()
            if nats.isinf().any():  # a probability too small for the dtype
                nats = F.cross_entropy(z.to(precise), y[:, 0], reduction="none")[:, None]
            total += (nats * weight).sum()
            if d_hidden is not None and d_weight is not None:
                dz = p.to(h.dtype).scatter_add_(1, y, h.new_full(y.shape, -1.0))
                d_hidden[rows] = (dz @ w) * weight
                d_weight += dz.T @ (h * weight).to(h.dtype)
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.weight_dtype = head_weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        (scale,) = grads
        return d_hidden * scale.to(d_hidden.dtype), (d_weight * scale).to(ctx.weight_dtype), None, None


def _chunks(n_tokens: int, vocab_size: int) -> list[slice]:
    size = max(CHUNK // vocab_size, 64)
    return [slice(start, start + size) for start in range(0, n_tokens, size)]


def log_probabilities(model: "Transformer", batch: "Batch") -> Tensor:
    """log p(target | tokens before it) of every position of a batch: (B, T) float32.

    The one place that runs a forward pass for log-probabilities.
    """
    hidden = model.hidden(batch.ids, batch.positions, batch.segments).flatten(0, 1)
    w = model.head_weight.to(hidden.dtype)
    targets = batch.targets.flatten()
    chunks = [
        -F.cross_entropy((hidden[rows] @ w.T).float(), targets[rows], reduction="none")
        for rows in _chunks(len(hidden), len(w))
    ]
    return torch.cat(chunks).view(batch.targets.shape)
