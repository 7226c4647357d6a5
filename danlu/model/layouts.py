"""How a family stores tensors that we keep apart, the right way round, or in another order.

A layout turns one of their tensors into ours and back, to the bit. `shapes` are ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from danlu.model.config import ModelConfig

Shapes = Sequence[torch.Size]


class Layout(Protocol):
    """`split` their tensor into ours, `join` ours into theirs."""

    def split(self, theirs: Tensor, shapes: Shapes, config: ModelConfig) -> list[Tensor]: ...

    def join(self, ours: list[Tensor], config: ModelConfig) -> Tensor: ...


@dataclass(frozen=True)
class Stacked:
    """Ours one after another along the output; alone, just itself. `transposed`: matrices are (in, out)."""

    transposed: bool = False

    def split(self, theirs: Tensor, shapes: Shapes, config: ModelConfig) -> list[Tensor]:
        matrix = theirs.T if self.transposed and theirs.ndim == 2 else theirs
        if matrix.ndim == 0 or matrix.shape[0] != sum(shape[0] for shape in shapes):
            return [theirs]  # the caller sees that the shape is wrong
        return list(matrix.split([shape[0] for shape in shapes]))

    def join(self, ours: list[Tensor], config: ModelConfig) -> Tensor:
        matrix = torch.cat(ours) if len(ours) > 1 else ours[0]
        return matrix.T if self.transposed and matrix.ndim == 2 else matrix


@dataclass(frozen=True)
class Together:
    """Matrices of equal shape along a dimension of their own: a layer's experts (llama.cpp)."""

    def split(self, theirs: Tensor, shapes: Shapes, config: ModelConfig) -> list[Tensor]:
        return list(theirs.unbind(0)) if theirs.ndim == 3 and len(theirs) == len(shapes) else [theirs]

    def join(self, ours: list[Tensor], config: ModelConfig) -> Tensor:
        return torch.stack(ours)


@dataclass(frozen=True)
class PlusOne:
    """The factor 1 + weight of Gemma's norms, added as our norm adds it, in float32 (llama.cpp)."""

    def split(self, theirs: Tensor, shapes: Shapes, config: ModelConfig) -> list[Tensor]:
        return [theirs - 1]

    def join(self, ours: list[Tensor], config: ModelConfig) -> Tensor:
        return ours[0].float() + 1


@dataclass(frozen=True)
class ByHead:
    """Head by head: the first head's query, key and value rows, then the second's (GPT-NeoX, BLOOM)."""

    def split(self, theirs: Tensor, shapes: Shapes, config: ModelConfig) -> list[Tensor]:
        parts = len(shapes)
        if theirs.shape[:1] != torch.Size([sum(shape[0] for shape in shapes)]):
            return [theirs]
        heads = theirs.unflatten(0, (config.n_heads, parts, config.head_width))
        return [heads[:, part].flatten(0, 1) for part in range(parts)]

    def join(self, ours: list[Tensor], config: ModelConfig) -> Tensor:
        heads = [tensor.unflatten(0, (config.n_heads, config.head_width)) for tensor in ours]
        return torch.stack(heads, dim=1).flatten(0, 2)


@dataclass(frozen=True)
class Interleaved:
    """Rows of a query or key matrix whose rotated pairs are neighbours (GPT-J, Meta's files, llama.cpp).

    Ours are half the rotated width apart. The same reordering of queries and keys leaves their products.
    """

    def split(self, theirs: Tensor, shapes: Shapes, config: ModelConfig) -> list[Tensor]:
        if theirs.shape != shapes[0]:
            return [theirs]
        return [self._reorder(theirs, config, (-1, 2))]

    def join(self, ours: list[Tensor], config: ModelConfig) -> Tensor:
        return self._reorder(ours[0], config, (2, -1))

    @staticmethod
    def _reorder(tensor: Tensor, config: ModelConfig, pairs: tuple[int, int]) -> Tensor:
        width = config.rope_width or config.head_width
        heads = tensor.unflatten(0, (-1, config.head_width))
        rotated, rest = heads[:, :width], heads[:, width:]
        rotated = rotated.unflatten(1, pairs).transpose(1, 2).flatten(1, 2)
        return torch.cat((rotated, rest), dim=1).flatten(0, 1)
