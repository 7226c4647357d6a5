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

CHUNK = {"cpu": 2**22, "cuda": 2**27}
"""Logits in one chunk: as many as a cache holds, or as keep a GPU busy."""
ROWS = 256
"""Tokens that are computed together: memory of ever new sizes is never used again."""


def linear_cross_entropy(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    weights: Tensor,
    bias: Tensor | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """Sum of weighted nats (a float32 scalar).

    hidden (N, D), head_weight (V, D), targets (N,) int64, weights (N,) float32, 0 = not counted; bias (V,)
    of the logits, which `softcap` c bends to c tanh(z / c). The products run in the dtype of `hidden`; the
    softmax in float32.
    """
    return _LinearCrossEntropy.apply(hidden, head_weight, bias, targets, weights, softcap)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head_weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        weights: Tensor,
        softcap: float,
    ) -> Tensor:
        w = head_weight.to(hidden.dtype)
        precise = torch.promote_types(hidden.dtype, torch.float32)
        for_hidden, for_weight, for_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.zeros_like(hidden) if for_hidden else None
        d_weight = torch.zeros(w.shape, dtype=precise, device=w.device) if for_weight else None
        d_bias = torch.zeros(w.shape[:1], dtype=precise, device=w.device) if for_bias else None
        total = torch.zeros((), dtype=precise, device=w.device)
        # Tokens that don't count, such as a prompt's, are left out: most of the work is here.
        for rows in _counted(weights).split(_chunk_size(w)):
            h, y, weight = hidden[rows], targets[rows, None], weights[rows, None]
            z = F.linear(h, w, None if bias is None else bias.to(h.dtype))
            bent = (z / softcap).tanh() if softcap else z
            z = bent * softcap if softcap else z
            p = z.softmax(-1, dtype=precise)
            nats = p.gather(1, y).log().neg()
            if nats.isinf().any():  # a probability too small for the dtype
                nats = F.cross_entropy(z.to(precise), y[:, 0], reduction="none")[:, None]
            total += (nats * weight).sum()
            if not (for_hidden or for_weight or for_bias):
                continue
            dz = p.to(h.dtype).scatter_add_(1, y, h.new_full(y.shape, -1.0))
            if softcap:
                dz *= 1 - bent.square()
            if d_hidden is not None:
                d_hidden[rows] = ((dz @ w) * weight).to(h.dtype)
            if d_weight is not None:
                d_weight += dz.T @ (h * weight).to(h.dtype)
            if d_bias is not None:
                d_bias += (dz * weight).sum(0)
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.weight_dtype = head_weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight, d_bias = ctx.saved_tensors
        (scale,) = grads
        d_hidden = None if d_hidden is None else d_hidden * scale.to(d_hidden.dtype)
        d_weight = None if d_weight is None else (d_weight * scale).to(ctx.weight_dtype)
        d_bias = None if d_bias is None else (d_bias * scale).to(ctx.weight_dtype)
        return d_hidden, d_weight, d_bias, None, None, None


def _counted(weights: Tensor) -> Tensor:
    """The tokens that count, and some that don't, up to a multiple of ROWS where there are so many."""
    counted = weights.nonzero()[:, 0]
    others = (weights == 0).nonzero()[: -len(counted) % ROWS, 0]
    return torch.cat((counted, others))


def _chunk_size(head_weight: Tensor) -> int:
    """Tokens in one chunk."""
    return max(CHUNK[head_weight.device.type] // len(head_weight), 64)


def log_probabilities(model: "Transformer", batch: "Batch") -> Tensor:
    """log p(target | tokens before it) of every position of a batch: (B, T) float32.

    The one place that runs a forward pass for log-probabilities.
    """
    hidden = model.hidden(batch.ids, batch.positions, batch.segments).flatten(0, 1)
    targets, size = batch.targets.flatten(), _chunk_size(model.head_weight)
    chunks = [
        -F.cross_entropy(model.logits(h).float(), y, reduction="none")
        for h, y in zip(hidden.split(size), targets.split(size), strict=True)
    ]
    return torch.cat(chunks).view(batch.targets.shape)
