"""Frozen matrices in 4 or 8 bits, under adapters.

Dettmers et al. 2023 (QLoRA): NF4 with double quantisation (section 3, appendix E). int8: one factor a row,
weight = code · largest of the row / 127.

A matrix is unpacked for each product, forward and again backward, and never kept.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from danlu.model.layers import Linear
from danlu.model.transformer import Transformer

BLOCK = 64
"""Weights with one factor (NF4)."""
FACTORS = 256
"""Factors of blocks with one factor of their own (double quantisation)."""
_LARGEST = torch.finfo(torch.float8_e4m3fn).max


@cache
def nf4_values() -> Tensor:
    """(16,) float32, ascending: quantiles of N(0, 1), scaled to [-1, 1], with an exact zero.

    QLoRA, equation 4 and appendix E: eight values from the negative half and nine from the positive, of which
    one zero is left out. The outermost probability is the mean of those of 15 and of 16 values,
    1 − (1/32 + 1/30) / 2, so that the quantile is finite.
    """
    outermost = 1 - (1 / 32 + 1 / 30) / 2
    positive = torch.linspace(outermost, 0.5, 9, dtype=torch.float64)[:-1]
    negative = torch.linspace(outermost, 0.5, 8, dtype=torch.float64)[:-1]
    values = torch.cat([-torch.special.ndtri(negative), torch.zeros(1), torch.special.ndtri(positive)])
    return (values / values.max()).sort().values.float()


class QuantisedLinear(nn.Module):
    """y = x Wᵀ + b with W packed, in the parts that `pack_nf4` or `pack_int8` gives.

    They are parameters without a gradient, as the matrix was that they stand for.
    """

    def __init__(self, linear: nn.Linear, kind: Literal["int8", "nf4"]) -> None:
        super().__init__()
        self.kind = kind
        self.out_features, self.in_features = linear.weight.shape
        weight = linear.weight.detach().float()
        parts = pack_nf4(weight) if kind == "nf4" else pack_int8(weight)
        for name, part in parts.items():
            self.register_parameter(name, nn.Parameter(part, requires_grad=False))
        self.names = tuple(parts)
        self.bias = linear.bias

    @property
    def weight(self) -> Tensor:
        """(n_out, n_in) float32, unpacked."""
        return self.unpack(torch.float32)

    def unpack(self, dtype: torch.dtype) -> Tensor:
        parts = {name: cast(Tensor, getattr(self, name)) for name in self.names}
        if self.kind == "int8":
            return unpack_int8(**parts).to(dtype)
        return unpack_nf4(**parts, shape=(self.out_features, self.in_features)).to(dtype)

    def unpacked(self, weight: Tensor | None = None) -> Linear:
        """A plain layer with this matrix; default: the one that is packed."""
        plain = Linear(self.in_features, self.out_features, self.bias is not None)
        plain.weight = nn.Parameter(self.weight if weight is None else weight, requires_grad=False)
        plain.bias = self.bias
        return plain

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantisedLinear":
        """Moves to another device; the dtype of what is packed stays."""
        packed = {name: cast(Tensor, getattr(self, name)).data for name in self.names}
        super()._apply(fn, recurse)
        for name, part in packed.items():
            device = cast(Tensor, getattr(self, name)).device
            self.register_parameter(name, nn.Parameter(part.to(device), requires_grad=False))
        return self

    def forward(self, x: Tensor) -> Tensor:
        y = _FrozenProduct.apply(x, self)
        return y if self.bias is None else y + self.bias.to(x.dtype)


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantisedLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.unpack(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (d_y,) = grads
        return d_y @ ctx.layer.unpack(d_y.dtype), None


def pack_int8(weight: Tensor) -> dict[str, Tensor]:
    """Codes (n_out, n_in) int8 and factors (n_out, 1) float32 of a float32 matrix."""
    factors = weight.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / 127
    return {"codes": (weight / factors).round().to(torch.int8), "factors": factors}


def unpack_int8(codes: Tensor, factors: Tensor) -> Tensor:
    return codes.float() * factors


def pack_nf4(weight: Tensor) -> dict[str, Tensor]:
    """A float32 matrix as bytes; of n weights:

    codes (n/2,) uint8: two of the 16 values a byte, the first in the high half; factors (n/64,) uint8: each
    block's largest magnitude less their mean, as 8-bit floats (e4m3) in units of `coarse`; coarse (n/16384,)
    and mean (1,) float32. What the last block lacks is zeros.
    """
    blocks = _blocks(weight.flatten(), BLOCK)
    largest = blocks.abs().amax(1)
    mean = largest.mean()
    groups = _blocks(largest - mean, FACTORS)
    coarse = groups.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / _LARGEST
    factors = (groups / coarse[:, None]).to(torch.float8_e4m3fn).flatten()[: len(largest)]
    # By the factors as they will be read, so that only the 16 values round.
    exact = _factors(factors.view(torch.uint8), coarse, mean)
    values = nf4_values().to(weight.device)
    between = (values[1:] + values[:-1]) / 2
    codes = torch.bucketize(blocks / exact.clamp(min=1e-30)[:, None], between).to(torch.uint8).flatten()
    return {
        "codes": codes[::2] << 4 | codes[1::2],
        "factors": factors.view(torch.uint8),
        "coarse": coarse,
        "mean": mean[None],
    }


def unpack_nf4(
    codes: Tensor, factors: Tensor, coarse: Tensor, mean: Tensor, shape: tuple[int, int]
) -> Tensor:
    values = nf4_values().to(codes.device)
    pairs = torch.stack([codes >> 4, codes & 15], 1).view(-1, BLOCK)
    blocks = values[pairs.int()] * _factors(factors, coarse, mean)[:, None]
    return blocks.flatten()[: shape[0] * shape[1]].view(shape)


def _factors(factors: Tensor, coarse: Tensor, mean: Tensor) -> Tensor:
    """(blocks,) float32 of the two stages."""
    fine = _blocks(factors.view(torch.float8_e4m3fn).float(), FACTORS) * coarse[:, None]
    return fine.flatten()[: len(factors)] + mean


def _blocks(x: Tensor, size: int) -> Tensor:
    """(…, size) of x (n,), filled up with zeros."""
    return F.pad(x, (0, -len(x) % size)).view(-1, size)


def quantise(model: Transformer, kind: Literal["none", "int8", "nf4"]) -> None:
    """Packs every matrix of the layers, in place; embedding and head stay as they are."""
    if kind == "none":
        return
    for name, module in list(model.layers.named_modules()):
        if isinstance(module, Linear):
            model.layers.set_submodule(name, QuantisedLinear(module, kind))


def unpack(model: Transformer) -> None:
    """The inverse of `quantise`, but for what rounding has taken."""
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantisedLinear):
            model.set_submodule(name, module.unpacked())
