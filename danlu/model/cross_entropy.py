"""Cross-entropy of the output layer without the (tokens × vocabulary) matrix, and log-probabilities.

The loss of N tokens is Σ wᵢ (log Σⱼ exp zᵢⱼ − zᵢ,yᵢ) with z = h Wᵀ. Its gradient by z is
wᵢ (softmax(zᵢ) − 1[yᵢ]), known as soon as z is: so each chunk of tokens yields its loss and its share of
the gradients by h and W in the forward pass, and its logits are dropped. Losses that are no such sum, as
those of preferences and rewards, need each token's log-probability, whose gradient arrives later: there
the logits are computed a second time.
"""

from collections.abc import Iterator
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


def linear_log_probs(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    softcap: float = 0.0,
    entropy: bool = False,
) -> tuple[Tensor, Tensor]:
    """log p(target), and with `entropy` each distribution's entropy, in nats: both (N,) float32.

    The entropy has no gradient. Other arguments as of `linear_cross_entropy`.
    """
    return _LinearLogProbs.apply(hidden, head_weight, bias, targets, softcap, entropy)


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head_weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        softcap: float,
        entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(hidden, head_weight, bias, targets)
        ctx.softcap = softcap
        chunks = _chunks(hidden, head_weight.to(hidden.dtype), bias, targets, softcap)
        found = [_log_probs(z, y, entropy) for z, _, y in chunks]
        log_probs, entropies = (torch.cat(part) for part in zip(*found, strict=True))
        ctx.mark_non_differentiable(entropies)
        return log_probs, entropies

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, head_weight, bias, targets = ctx.saved_tensors
        gradient, w = grads[0], head_weight.to(hidden.dtype)
        for_hidden, for_weight, for_bias = ctx.needs_input_grad[:3]
        d_hidden: list[Tensor] = []
        d_weight = torch.zeros(w.shape, dtype=gradient.dtype, device=w.device) if for_weight else None
        d_bias = torch.zeros(w.shape[:1], dtype=gradient.dtype, device=w.device) if for_bias else None
        size = _chunk_size(w)
        chunks = _chunks(hidden, w, bias, targets, ctx.softcap)
        for h, g, (z, bent, y) in zip(hidden.split(size), gradient.split(size), chunks, strict=True):
            p = z.softmax(-1, dtype=gradient.dtype)
            dz = (p.scatter_add_(1, y, p.new_full(y.shape, -1.0)) * -g[:, None]).to(h.dtype)
            if ctx.softcap:
                dz *= 1 - bent.square()
            if for_hidden:
                d_hidden.append(dz @ w)
            if d_weight is not None:
                d_weight += dz.T @ h
            if d_bias is not None:
                d_bias += dz.sum(0, dtype=gradient.dtype)
        return (
            torch.cat(d_hidden) if for_hidden else None,
            None if d_weight is None else d_weight.to(head_weight.dtype),
            None if d_bias is None else d_bias.to(bias.dtype),
            *(None, None, None),
        )


def _chunks(
    hidden: Tensor, w: Tensor, bias: Tensor | None, targets: Tensor, softcap: float
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """For some tokens at a time the logits, the tanh in them where capped, and the targets (n, 1)."""
    size = _chunk_size(w)
    for h, y in zip(hidden.split(size), targets.split(size), strict=True):
        z = F.linear(h, w, None if bias is None else bias.to(h.dtype))
        bent = (z / softcap).tanh() if softcap else z
        yield bent * softcap if softcap else z, bent, y[:, None]


def _log_probs(z: Tensor, y: Tensor, entropy: bool) -> tuple[Tensor, Tensor]:
    """log p(y) of each row of logits, and the entropy or zeros."""
    logs = z.log_softmax(-1, dtype=torch.promote_types(z.dtype, torch.float32))
    found = logs.gather(1, y)[:, 0]
    return found, -(logs.exp() * logs).nan_to_num().sum(1) if entropy else torch.zeros_like(found)


def _counted(weights: Tensor) -> Tensor:
    """The tokens that count, and some that don't, up to a multiple of ROWS where there are so many."""
    counted = weights.nonzero()[:, 0]
    others = (weights == 0).nonzero()[: -len(counted) % ROWS, 0]
    return torch.cat((counted, others))


def _chunk_size(head_weight: Tensor) -> int:
    """Tokens in one chunk."""
    return max(CHUNK[head_weight.device.type] // len(head_weight), 64)


def log_probabilities(model: "Transformer", batch: "Batch", counted: bool = False) -> Tensor:
    """log p(target | tokens before it) of every position of a batch: (B, T) float32.

    `counted`: only where a target counts, which saves the logits of the others; 0 there.
    """
    return log_probs_and_entropies(model, batch, counted, entropy=False)[0]


def log_probs_and_entropies(
    model: "Transformer", batch: "Batch", counted: bool = False, entropy: bool = True
) -> tuple[Tensor, Tensor]:
    """As `linear_log_probs`: both (B, T)."""
    hidden = model.hidden(batch.ids, batch.positions, batch.segments)
    return log_probs_of(model, batch, hidden, counted, entropy)


def log_probs_of(
    model: "Transformer", batch: "Batch", hidden: Tensor, counted: bool = False, entropy: bool = True
) -> tuple[Tensor, Tensor]:
    """`log_probs_and_entropies` of hidden states (B, T, D) that are there already."""
    hidden = hidden.flatten(0, 1)
    targets, head, cap = batch.targets.flatten(), model.head_weight, model.config.logit_softcap
    rows = (
        batch.weights.flatten().nonzero()[:, 0]
        if counted
        else torch.arange(len(targets), device=targets.device)
    )
    found = linear_log_probs(hidden[rows], head, targets[rows], model.head_bias, cap, entropy)
    log_probs, entropies = (
        part.new_zeros(len(targets)).index_copy(0, rows, part).view(batch.targets.shape) for part in found
    )
    return log_probs, entropies
