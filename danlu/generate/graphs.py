"""Decoding on a GPU: a step that gives each sequence one token is recorded once, and replayed.

Such a step is a thousand small kernels, and to launch them one by one takes longer than to run them. A CUDA
graph launches them together. Its shapes are fixed: numbers of sequences and of blocks are rounded up.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from danlu.core.host import has_compiler
from danlu.generate.blocks import Piece
from danlu.generate.kernels import POSITIONS
from danlu.generate.packed import Kind
from danlu.generate.paged import PagedCache, token_attention
from danlu.generate.runner import Runner
from danlu.model.attention import Scores
from danlu.model.compiling import compiled_layers
from danlu.model.config import ModelConfig
from danlu.model.transformer import Transformer

LEAST_BLOCKS = 16


def runs_in_graphs(config: ModelConfig) -> bool:
    """Whether each step is the same work: no experts, and no angles that hang on the length."""
    by_length = config.rope_scaling is not None and config.rope_scaling.kind in ("dynamic", "longrope")
    return not by_length and not any(config.has_experts(layer) for layer in range(config.n_layers))


class FixedStep:
    """As `paged.Step`, for one token of each of `n` sequences; its tensors stay where they are."""

    def __init__(self, cache: PagedCache, n: int, n_blocks: int) -> None:
        self.cache = cache
        self.numbers = torch.zeros(n, 2 + n_blocks, dtype=torch.long, device=cache.keys.device)
        self.ids, self.positions = self.numbers[None, :, 0], self.numbers[:, 1]
        self.tables = self.numbers[:, 2:]
        self.blocks = self.slots = self.positions

    def fill(self, pieces: Sequence[Piece]) -> None:
        """Rows that are left over do what the first one does."""
        numbers = np.zeros(self.numbers.shape, np.int64)
        for row, piece in zip(numbers, pieces, strict=False):
            row[:2] = piece.tokens[0], piece.begin
            row[2 : 2 + len(piece.blocks)] = piece.blocks
        numbers[len(pieces) :] = numbers[0]
        self.numbers.copy_(torch.from_numpy(numbers))

    def next_positions(self, n_tokens: int) -> Tensor:
        """(1, N); the first thing that a pass asks for."""
        self.blocks = self.tables.gather(1, self.positions[:, None] // POSITIONS)[:, 0]
        self.slots = self.positions % POSITIONS
        return self.positions[None]

    def advance(self, n_tokens: int) -> None:
        """The tables count what they hold."""

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, scores: Scores
    ) -> Tensor:
        """As `Step.attend`."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        keys[self.blocks, :, :, self.slots] = k[0].transpose(0, 1).to(keys.dtype)
        values[self.blocks, :, self.slots] = v[0].transpose(0, 1).to(values.dtype)
        queries = q[0].transpose(0, 1).contiguous()
        return token_attention(queries, keys, values, self.tables, self.positions, scores)[None]


class GraphRunner(Runner):
    """As `Runner`, on a GPU, for what `runs_in_graphs` says; all but decoding runs as it does there."""

    def __init__(self, model: Transformer, cache: PagedCache, kind: Kind | None = None) -> None:
        super().__init__(model, cache, kind=kind)
        self.compiled = has_compiler()
        self.graphs: dict[tuple[int, int], tuple[FixedStep, Any, Tensor]] = {}
        self.pool = torch.cuda.graph_pool_handle()
        self.places = self._places()

    def refresh(self) -> bool:
        changed = super().refresh()
        if changed and (places := self._places()) != self.places:
            self.graphs.clear()  # they read the weights where these were
            self.places = places
        return changed

    def _places(self) -> tuple[list[int], list[str | None]]:
        parameters, adapted = self._parts
        return [parameter.data_ptr() for parameter in parameters], [layer.active for layer in adapted]

    @torch.no_grad()
    def run(
        self,
        pieces: Sequence[Piece],
        roots: Sequence[int],
        copies: Sequence[tuple[int, int]],
        wanted: Sequence[int],
    ) -> Tensor:
        if any(len(piece.tokens) > 1 for piece in pieces):
            return super().run(pieces, roots, copies, wanted)
        self.cache.copy(copies)
        n_blocks = max(LEAST_BLOCKS, *(len(piece.blocks) for piece in pieces))
        shape = round_up(len(pieces)), round_up(n_blocks)
        if shape not in self.graphs:
            self._record(shape, pieces)
        step, graph, hidden = self.graphs[shape]
        step.fill(pieces)
        graph.replay()
        # A copy, since the next replay writes to the same place.
        return hidden[: len(pieces)].clone() if len(wanted) == len(pieces) else hidden[list(wanted)]

    def _record(self, shape: tuple[int, int], pieces: Sequence[Piece]) -> None:
        step = FixedStep(self.cache, *shape)
        step.fill(pieces)
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # twice before: libraries allocate, compilers compile
            for _ in range(2):
                self._pass(step)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            hidden = self._pass(step)
        self.graphs[shape] = step, graph, hidden

    def _pass(self, step: FixedStep) -> Tensor:
        with compiled_layers(self.twin) if self.compiled else nullcontext():
            return self.twin.hidden(step.ids, cache=step)[0]


def round_up(n: int) -> int:
    """To a power of two."""
    return 1 << (n - 1).bit_length()
