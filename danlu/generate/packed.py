"""A model's matrices as the kernels read them: float32, bfloat16, 8 or 4 bits. A cache of the live weights.

8 bits: a whole number and a factor for each row. 4 bits: -8 … 7 and a factor for each 32 numbers of a row;
byte i of 16 holds number i in its low half and number i + 16 in its high half. Both round to the nearest.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from danlu.generate.paged import as_array

Kind = Literal["float32", "bf16", "int8", "int4"]
GROUP = 32


@dataclass(frozen=True)
class Matrix:
    """(…, rows, D) as stored, and the factors (…, rows, 1 or D / 32), or (…, 1, 1) where there are none."""

    data: Tensor
    factors: Tensor

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        return as_array(self.data), as_array(self.factors)

    @property
    def n_bytes(self) -> int:
        return self.data.nbytes + self.factors.nbytes


def empty(shape: tuple[int, ...], kind: Kind) -> Matrix:
    """Room for matrices (…, rows, D)."""
    *rows, n = shape
    if kind == "int4":
        return Matrix(torch.empty(*rows, n // 2, dtype=torch.uint8), torch.empty(*rows, n // GROUP))
    if kind == "int8":
        return Matrix(torch.empty(shape, dtype=torch.int8), torch.empty(*rows, 1))
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    return Matrix(torch.empty(shape, dtype=dtype), torch.zeros(*rows[:-1], 1, 1))


def pack(weight: Tensor, into: Matrix) -> None:
    """Writes a matrix (rows, D) into its place."""
    if into.data.dtype == torch.int8:
        factors = (weight.float().abs().amax(1, keepdim=True) / 127).clamp(min=1e-30)
        into.factors.copy_(factors)
        into.data.copy_((weight.float() / factors).round())
    elif into.data.dtype == torch.uint8:
        groups = weight.float().unflatten(1, (-1, GROUP))
        # The largest number of a group becomes -8, so that all sixteen values are used (as in GGUF's Q4_0).
        largest = groups.gather(2, groups.abs().argmax(2, keepdim=True))
        factors = torch.where(largest == 0, 1.0, largest / -8)
        codes = (groups / factors).round().clamp(-8, 7).add(8).to(torch.uint8)
        into.factors.copy_(factors[..., 0])
        into.data.copy_((codes[..., :16] | codes[..., 16:] << 4).flatten(1))
    else:
        into.data.copy_(weight)


def unpack(matrix: Matrix) -> Tensor:
    """(…, rows, D) float32."""
    if matrix.data.dtype == torch.int8:
        return matrix.data.float() * matrix.factors
    if matrix.data.dtype == torch.uint8:
        bytes_ = matrix.data.unflatten(-1, (-1, 16))
        codes = torch.cat((bytes_ & 15, bytes_ >> 4), -1).float() - 8
        return (codes * matrix.factors[..., None]).flatten(-2)
    return matrix.data.float()
