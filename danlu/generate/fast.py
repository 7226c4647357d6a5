"""Decoding models of LLaMA's kind on a processor: packed weights, few operators, no copies of the cache.

A step of few tokens is one call of `kernels.decode`, which reads each weight once. A step of many tokens is
bound by arithmetic: its products run in oneDNN, on weights packed in the order that it likes best.
"""

import time
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numba import get_num_threads
from torch import Tensor, nn

from danlu.generate import kernels
from danlu.generate.blocks import Piece
from danlu.generate.packed import (
    Kind,
    Matrix,
    bias_of,
    empty,
    multiply,
    pack,
    pairs,
    product_dtype,
    reordered,
    reordered_bytes,
    weight_of,
)
from danlu.generate.paged import PagedCache, Step, as_array
from danlu.generate.products import product
from danlu.generate.runner import Runner
from danlu.model.attention import Scores
from danlu.model.config import ModelConfig
from danlu.model.layers import FeedForward, RMSNorm
from danlu.model.positions import rotary
from danlu.model.transformer import Layer, Transformer

FEW = 4
"""Most tokens of a step that `kernels.decode` computes faster than oneDNN."""
FEW_IN_PAIRS = 64
"""The same, with matrices in pairs."""


def runs_fast(config: ModelConfig) -> bool:
    """Whether `kernels.decode` knows all that the model does: LLaMA, Mistral, Qwen 2 and 3, SmolLM …"""
    plain = ModelConfig(
        **config.model_dump(
            include={
                *("vocab_size", "width", "n_layers", "n_heads", "n_kv_heads", "head_width", "ffn_width"),
                *("max_positions", "rope_theta", "norm_eps", "tied_embeddings", "rope_width", "rope_scaling"),
                *("rope_layers", "window", "local_layers", "local_rope_theta", "attention_scale", "qk_norm"),
                *("qkv_bias", "embedding_scale", "norm_plus_one", "family", "position_offset"),
                *("n_active", "expert_width", "expert_ffn", "normalised_experts", "moe_layers"),
            }
        )
    )
    return plain == config and config.positions == "rope" and config.head_width % kernels.POSITIONS == 0


class FastRunner(Runner):
    """As `Runner`, for what `runs_fast` says, on a processor."""

    def __init__(
        self, model: Transformer, cache: PagedCache, exact: bool = False, kind: Kind = "float32"
    ) -> None:
        """`kind`: of the packed weights. Raises UserError as `packed.empty`."""
        super().__init__(model, cache)
        self.exact = exact
        config = model.config
        self.kind: Kind = kind
        n, width, ffn = config.n_layers, config.width, config.ffn_width
        self.q_width, kv_width = config.n_heads * config.head_width, config.n_kv_heads * config.head_width
        self.n_rows = self.q_width + 2 * kv_width
        shapes = [(n, self.n_rows, width), (n, width, self.q_width), (n, ffn, width), (n, width, ffn)]
        paired = all(pairs(shape, kind) for shape in shapes)
        shapes[2] = n, 2 * ffn, width
        self.qkv, self.out, self.gate_up, self.down = (empty(shape, kind, paired) for shape in shapes)
        vocabulary = config.vocab_size, width
        self.output = empty(vocabulary, kind, pairs(vocabulary, kind))
        self.few = FEW_IN_PAIRS if paired else FEW
        self.qkv_bias = torch.zeros(n, self.n_rows if config.qkv_bias else 0)
        self.norms, self.last_norm = torch.empty(n, 2, width), torch.empty(width)
        self.head_norms = torch.empty((n, 2, config.head_width) if config.qk_norm else (n, 0, 0))
        self.windows = np.array([config.window_of(layer) for layer in range(n)])
        kinds: dict[object, int] = {}
        for layer in range(n):
            if (rope := config.rope_theta_of(layer)) is not None:
                kinds.setdefault(rope, layer)
        self.angle_layers = list(kinds.values())
        """One layer of each kind of angles."""
        numbers = {rope: number for number, rope in enumerate(kinds)}
        self.angles = np.array(
            [-1 if (rope := config.rope_theta_of(layer)) is None else numbers[rope] for layer in range(n)]
        )
        self._pack()

    @property
    def packed_bytes(self) -> int:
        """What copies of the weights take; those for many tokens are made when they are first needed."""
        matrices = (self.qkv, self.out, self.gate_up, self.down, self.output)
        again = sum(map(reordered_bytes, matrices)) if "products" in self.__dict__ else 0
        return sum(m.n_bytes for m in matrices) + again

    def refresh(self) -> bool:
        """Packs the weights again, in place, where they have changed."""
        changed = super().refresh()
        if changed:
            self._pack()
        return changed

    @torch.no_grad()
    def _pack(self) -> None:
        begin = time.perf_counter()
        for number, module in enumerate(self.model.layers):
            assert isinstance(module, Layer)
            layer, attention, ffn = module, module.attention, module.ffn
            assert isinstance(ffn, FeedForward)
            assert ffn.gate is not None
            joined = torch.cat([weight_of(m) for m in (attention.q, attention.k, attention.v)])
            pack(joined, self._of(self.qkv, number))
            pack(weight_of(attention.out), self._of(self.out, number))
            pack(torch.cat((weight_of(ffn.gate), weight_of(ffn.up))), self._of(self.gate_up, number))
            pack(weight_of(ffn.down), self._of(self.down, number))
            if self.model.config.qkv_bias:
                biases = [bias_of(m) for m in (attention.q, attention.k, attention.v)]
                self.qkv_bias[number] = torch.cat([bias for bias in biases if bias is not None])
            for place, norm in enumerate((layer.attention_norm, layer.ffn_norm)):
                self.norms[number, place] = norm_weight(norm)
            if attention.q_norm is not None and attention.k_norm is not None:
                self.head_norms[number, 0] = norm_weight(attention.q_norm)
                self.head_norms[number, 1] = norm_weight(attention.k_norm)
        self.last_norm.copy_(norm_weight(self.model.norm))
        pack(self.model.head_weight, self.output)
        self.__dict__.pop("products", None)
        self.packing_seconds = time.perf_counter() - begin

    def _of(self, matrix: Matrix, number: int) -> Matrix:
        return Matrix(matrix.data[number], matrix.factors[number], matrix.paired)

    @cached_property
    def products(self) -> "list[list[Tensor]]":
        """qkv, out, gate_up and down of each layer, and last the head, as oneDNN packs them."""
        stacks = (self.qkv, self.out, self.gate_up, self.down)
        layers = [[reordered(self._of(m, n)) for m in stacks] for n in range(self.model.config.n_layers)]
        return [*layers, [reordered(self.output)]]

    @torch.no_grad()
    def run(
        self,
        pieces: Sequence[Piece],
        roots: Sequence[int],
        copies: Sequence[tuple[int, int]],
        wanted: Sequence[int],
    ) -> Tensor:
        self.cache.copy(copies)
        step = Step(self.cache, pieces, self.exact)
        ids = torch.tensor([token for piece in pieces for token in piece.tokens])
        x = torch.embedding(self.model.embedding.weight, ids).float()
        if (scale := self.model.config.embedding_scale) != 1:
            x = x * scale
        few = self.exact or len(ids) <= self.few
        x = self._few(x, step) if few else self._many(x, step)
        return x if len(wanted) == len(x) else x[torch.tensor(wanted, dtype=torch.long)]

    def logits(self, hidden: Tensor) -> Tensor:
        if not self.exact and len(hidden) > (FEW_IN_PAIRS if self.output.paired else FEW):
            return multiply(hidden.to(product_dtype(self.kind)), self.products[-1][0]).float()
        found = np.empty((len(hidden), self.model.config.vocab_size), np.float32)
        product(*self._head, hidden.numpy(), found, get_num_threads() * 4)
        return torch.from_numpy(found)

    @cached_property
    def _head(self) -> tuple[np.ndarray, np.ndarray]:
        return self.output.arrays

    def _rotations(self, step: Step) -> tuple[np.ndarray, np.ndarray]:
        """cos and sin (kinds, N, rotated / 2)."""
        if self.whole:  # they hang on the length
            return self._angles(torch.from_numpy(step.positions))
        cos, sin = self._table
        return cos[:, step.positions], sin[:, step.positions]

    @cached_property
    def _table(self) -> tuple[np.ndarray, np.ndarray]:
        """Of every position."""
        return self._angles(torch.arange(self.model.config.max_positions))

    def _angles(self, positions: Tensor) -> tuple[np.ndarray, np.ndarray]:
        found = [rotary(self.model.config, layer, positions) for layer in self.angle_layers]
        pairs = [(pair[0][:, 0].numpy(), pair[1][:, 0].numpy()) for pair in found if pair is not None]
        if not pairs:
            return np.zeros((1, len(positions), 1), np.float32), np.zeros((1, len(positions), 1), np.float32)
        return np.stack([cos for cos, _ in pairs]), np.stack([sin for _, sin in pairs])

    def _few(self, x: Tensor, step: Step) -> Tensor:
        cos, sin = self._rotations(step)
        kernels.decode(
            x.numpy(),
            *self._weights,
            cos,
            sin,
            self.angles,
            self.windows,
            *self.cache.arrays,
            step.tables,
            step.rows,
            step.positions,
            np.float32(self.model.config.score_scale),
            np.zeros(1, np.int64),
            get_num_threads(),
        )
        return x

    @cached_property
    def _weights(self) -> tuple[Any, ...]:
        """As `kernels.decode` takes them; what is packed again is packed in place."""
        return (
            self.norms.numpy(),
            np.float32(self.model.config.norm_eps),
            *self.qkv.arrays,
            self.qkv_bias.numpy(),
            *self.out.arrays,
            *self.gate_up.arrays,
            *self.down.arrays,
            self.head_norms.numpy(),
            self.last_norm.numpy(),
        )

    def _many(self, x: Tensor, step: Step) -> Tensor:
        config, eps = self.model.config, np.float32(self.model.config.norm_eps)
        dtype = product_dtype(self.kind)
        cos, sin = self._rotations(step)
        norms, head_norms, biases = self.norms.numpy(), self.head_norms.numpy(), self.qkv_bias.numpy()
        keys, values = self.cache.arrays
        n = len(x)
        stream, h = x.numpy(), torch.empty(n, config.width, dtype=dtype)
        queries = torch.empty(n, config.n_heads, config.head_width)
        inner = torch.empty(n, config.ffn_width, dtype=dtype)
        added = torch.zeros(n, config.width, dtype=dtype)
        for layer, (qkv, out, gate_up, down) in enumerate(self.products[:-1]):
            kernels.add_and_norm(stream, as_array(added), norms[layer, 0], eps, as_array(h))
            kind = int(self.angles[layer])
            kernels.heads_of(
                as_array(multiply(h, qkv)),
                biases[layer],
                head_norms[layer],
                eps,
                cos[max(kind, 0)],
                sin[max(kind, 0)],
                kind >= 0,
                keys[layer],
                values[layer],
                step.tables,
                step.rows,
                step.positions,
                queries.numpy(),
            )
            scores = Scores(config.score_scale, int(self.windows[layer]))
            read = step.read(layer, queries, scores, dtype)
            added = multiply(read.flatten(1), out)
            kernels.add_and_norm(stream, as_array(added), norms[layer, 1], eps, as_array(h))
            kernels.gated(as_array(multiply(h, gate_up)), as_array(inner), get_num_threads())
            added = multiply(inner, down)
        hidden = torch.empty(n, config.width)
        kernels.add_and_norm(stream, as_array(added), self.last_norm.numpy(), eps, hidden.numpy())
        return hidden


def norm_weight(norm: nn.Module | None) -> Tensor:
    assert isinstance(norm, RMSNorm)
    return norm.weight.float() + 1 if norm.plus_one else norm.weight.float()
