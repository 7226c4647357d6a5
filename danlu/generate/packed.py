"""A model's matrices as the kernels read them: float32, bfloat16, 8 or 4 bits. A cache of the live weights.

8 bits: a whole number and a factor for each row. 4 bits: 0 … 15, and for each 32 numbers of a row what a step
is and what 0 stands for (as in GGUF's Q4_1, whose matrices stay as they are); byte i of 16 holds number i in
its low half and number i + 16 in its high half. Both round to the nearest.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numba import get_num_threads
from torch import Tensor, nn

from danlu.core.errors import UserError
from danlu.generate import kernels
from danlu.generate.memory import room
from danlu.generate.paged import as_array
from danlu.generate.pairs import AVAILABLE
from danlu.generate.products import product
from danlu.generate.vectors import LANES
from danlu.model.layers import FeedForward, Linear
from danlu.model.lora import LoraLinear
from danlu.model.quantised import QuantisedLinear
from danlu.model.transformer import Transformer

Kind = Literal["float32", "bf16", "int8", "int4"]
GROUP = 32
BFLOAT16_PRODUCTS = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
"""Whether oneDNN multiplies bfloat16 on this processor: it takes AVX-512, or what came after it."""


@dataclass(frozen=True)
class Matrix:
    """(…, rows, D) as stored, and the factors (…, rows, 1 or D / 16), or (…, 1, 1) where there are none."""

    data: Tensor
    factors: Tensor
    paired: bool = False
    """Whether the rows lie as `pairs` says: (…, rows / 16, D / 2, 32)."""

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        return as_array(self.data), as_array(self.factors)

    @property
    def n_bytes(self) -> int:
        return self.data.nbytes + self.factors.nbytes


def pairs(shape: tuple[int, ...], kind: Kind) -> bool:
    """Whether matrices (…, rows, D) can lie in pairs, on this processor."""
    return AVAILABLE and kind in ("bf16", "int8") and shape[-2] % LANES == 0 and shape[-1] % 2 == 0


def empty(shape: tuple[int, ...], kind: Kind, paired: bool = False) -> Matrix:
    """Room for matrices (…, rows, D). Raises UserError for 4 bits where D doesn't divide into groups."""
    *rows, n = shape
    if paired:
        plain = empty(shape, kind)
        lying = (*rows[:-1], rows[-1] // LANES, n // 2, 2 * LANES)
        return Matrix(plain.data.view(lying), plain.factors, paired)
    if kind == "int4" and n % GROUP:
        raise UserError(f"a matrix has {n} columns, no multiple of {GROUP}, as int4 needs", "use int8")
    if kind == "int4":
        return Matrix(room((*rows, n // 2), torch.uint8), torch.empty(*rows, 2 * n // GROUP))
    if kind == "int8":
        return Matrix(room(shape, torch.int8), torch.empty(*rows, 1))
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    return Matrix(room(shape, dtype), torch.zeros(*rows[:-1], 1, 1))


def pack(weight: Tensor, into: Matrix) -> None:
    """Writes a matrix (rows, D) into its place."""
    if into.data.dtype == torch.int8:
        factors = (weight.float().abs().amax(1, keepdim=True) / 127).clamp(min=1e-30)
        into.factors.copy_(factors)
        _lay(into, (weight.float() / factors).round())
    elif into.data.dtype == torch.uint8:
        groups = weight.float().unflatten(1, (-1, GROUP))
        low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
        steps = ((high - low) / 15).clamp(min=1e-30)
        codes = ((groups - low) / steps).round().to(torch.uint8)
        into.factors.copy_(torch.cat((steps, low), 2).flatten(1))
        into.data.copy_((codes[..., :16] | codes[..., 16:] << 4).flatten(1))
    else:
        _lay(into, weight)


def _lay(into: Matrix, numbers: Tensor) -> None:
    if into.paired:
        numbers = numbers.unflatten(0, (-1, LANES)).unflatten(2, (-1, 2))
        one_by_one = into.data.dtype == torch.int8
        numbers = (numbers.movedim(1, 3) if one_by_one else numbers.transpose(1, 2)).flatten(2)
    into.data.copy_(numbers)


def unpack(matrix: Matrix) -> Tensor:
    """(…, rows, D) float32."""
    if matrix.paired:
        if matrix.data.dtype == torch.int8:
            rows = matrix.data.unflatten(-1, (2, LANES)).movedim(-1, -3)
        else:
            rows = matrix.data.unflatten(-1, (LANES, 2)).transpose(-3, -2)
        matrix = Matrix(rows.flatten(-2).flatten(-3, -2), matrix.factors)
    if matrix.data.dtype == torch.int8:
        return matrix.data.float() * matrix.factors
    if matrix.data.dtype == torch.uint8:
        bytes_ = matrix.data.unflatten(-1, (-1, 16))
        codes = torch.cat((bytes_ & 15, bytes_ >> 4), -1).float()
        steps, low = matrix.factors.unflatten(-1, (-1, 2)).unbind(-1)
        return (codes * steps[..., None] + low[..., None]).flatten(-2)
    return matrix.data.float()


def weight_of(module: nn.Module) -> Tensor:
    """A matrix as it is used now: with the active adapter, unpacked."""
    if isinstance(module, LoraLinear):
        return module.merged()
    assert isinstance(module, Linear | QuantisedLinear)
    return module.weight


def bias_of(module: nn.Module) -> Tensor | None:
    found = module.base.bias if isinstance(module, LoraLinear) else module.bias
    assert found is None or isinstance(found, Tensor)
    return found


def product_dtype(kind: Kind) -> torch.dtype:
    """In which oneDNN multiplies matrices of this kind: bfloat16, where it can on this processor."""
    return torch.float32 if kind == "float32" or not BFLOAT16_PRODUCTS else torch.bfloat16


def reordered(matrix: Matrix) -> Tensor:
    """A matrix (rows, D) as oneDNN likes it for products with few rows, in its `product_dtype`."""
    dtype = product_dtype("float32" if matrix.data.dtype == torch.float32 else "bf16")
    as_it_is = matrix.data.is_floating_point() and not matrix.paired
    data = matrix.data if as_it_is else unpack(matrix)
    return torch.ops.mkldnn._reorder_linear_weight(data.to(dtype), 16)


def reordered_bytes(matrix: Matrix) -> int:
    """What `reordered` takes: a number of bfloat16 or float32 for each."""
    numbers = matrix.data.numel() * (2 if matrix.data.dtype == torch.uint8 else 1)
    return numbers * product_dtype("float32" if matrix.data.dtype == torch.float32 else "bf16").itemsize


def multiply(x: Tensor, matrix: Tensor) -> Tensor:
    """x (N, D) times a reordered matrix: (N, rows), in the dtype of x."""
    return torch.ops.mkldnn._linear_pointwise(x, matrix, None, "none", [], "")


class PackedLinear(nn.Module):
    """Stands where a matrix stood, and computes with a packed copy of it.

    `exact`: by the kernel whose sums have one order; else by oneDNN, or on a GPU unpacked for each product.
    """

    def __init__(self, weight: Callable[[], Tensor], bias: Tensor | None, kind: Kind, exact: bool) -> None:
        super().__init__()
        self.source, self.bias, self.exact = weight, bias, exact
        current = weight()
        matrix = empty(tuple(current.shape), kind)
        self.matrix = Matrix(matrix.data.to(current.device), matrix.factors.to(current.device))
        self.refresh()

    @property
    def weight(self) -> Tensor:
        """(rows, D) float32, as it is packed."""
        return unpack(self.matrix)

    @property
    def n_bytes(self) -> int:
        return self.matrix.n_bytes + (0 if self.reordered is None else reordered_bytes(self.matrix))

    @torch.no_grad()
    def refresh(self) -> None:
        """Packs the live weights again."""
        pack(self.source(), self.matrix)
        on_cpu = self.matrix.data.device.type == "cpu"
        self.reordered = reordered(self.matrix) if on_cpu and not self.exact else None

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        if self.exact:
            found = np.empty((len(rows), len(self.matrix.data)), np.float32)
            product(*self.matrix.arrays, rows.float().numpy(), found, get_num_threads() * 4)
            y = torch.from_numpy(found)
        elif self.reordered is not None:
            y = multiply(rows.to(self.reordered.dtype), self.reordered)
        else:
            y = F.linear(rows, unpack(self.matrix).to(x.dtype))
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y.to(x.dtype).view(*x.shape[:-1], len(self.matrix.data))


def substitute(model: Transformer, kind: Kind, exact: bool, adapters: bool = False) -> Transformer:
    """The model with packed matrices in its layers; all else is shared with the live one.

    `adapters`: whether these stay beside their packed base; else the active one is packed with it.
    """
    shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    twin = copy.deepcopy(model, shared)
    kinds = (Linear, LoraLinear, QuantisedLinear)
    found = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    for name, module in found.items():
        is_base = name.rpartition(".")[0] in found
        if module is not model.head and not (isinstance(module, LoraLinear) if adapters else is_base):
            packed = PackedLinear(partial(weight_of, module), bias_of(module), kind, exact)
            twin.set_submodule(name, packed)
    if exact:
        for part in twin.modules():
            if isinstance(part, FeedForward):
                part.activation = steady(part.kind)
    return twin


_STEADY = {
    **dict.fromkeys(("swiglu", "silu"), kernels.SILU),
    **dict.fromkeys(("geglu", "gelu"), kernels.GELU),
    **dict.fromkeys(("geglu_tanh", "gelu_tanh"), kernels.GELU_TANH),
    "relu": kernels.RELU,
    "tanh": kernels.TANH,
}


def steady(name: str) -> Callable[[Tensor], Tensor]:
    """An activation whose results don't hang on a number's place: PyTorch computes the last few otherwise."""

    def apply(x: Tensor) -> Tensor:
        y = x.float().clone(memory_format=torch.contiguous_format)
        kernels.activate(_STEADY[name], y.view(-1).numpy())
        return y.to(x.dtype)

    return apply
