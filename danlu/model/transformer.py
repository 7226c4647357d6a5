"""The decoder transformer: RMSNorm, rotary positions, SwiGLU, grouped-query attention.

Touvron et al. 2023 (LLaMA); Su et al. 2021 (RoPE); Zhang and Sennrich 2019 (RMSNorm); Shazeer 2020
(SwiGLU); Ainslie et al. 2023 (GQA). What a model does hangs on its ModelConfig; the file knows nothing of
parallelism, compilation or adapters, which wrap it from outside.

Shapes: B rows, T tokens, D width, H query heads, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from danlu.core.errors import UserError
from danlu.model.attention import Block as QueryBlock
from danlu.model.attention import (
    cached_attention,
    causal_attention,
    fused_attention,
    plan_blocks,
    square_mask,
)
from danlu.model.cache import KVCache
from danlu.model.config import ModelConfig

Rotation = tuple[Tensor, Tensor]


class Linear(nn.Linear):
    """y = x Wᵀ, computed in the dtype of x (weights may be kept more precisely than they are used)."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class RMSNorm(nn.Module):
    """x / √(mean(x²) + ε) · w, computed in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return (y * self.weight.float()).to(x.dtype)


def rotary(config: ModelConfig, positions: Tensor) -> Rotation:
    """cos and sin (…, 1, head / 2) in float32 of position · theta^(-2i / head), one axis for the heads.

    The angles are float64, so that they are as exact at position 100,000 as at 1.
    """
    exponents = torch.arange(0, config.head_width, 2, dtype=torch.float64, device=positions.device)
    angles = positions[..., None, None] * config.rope_theta ** (-exponents / config.head_width)
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turns the pairs (x_i, x_{i + head/2}) of x (B, T, H, head) by angles (B or 1, T, 1, head / 2)."""
    cos, sin = rotation
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class Attention(nn.Module):
    """The matrices of grouped-query self-attention with rotary positions."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_width = config.head_width
        kv_width = config.n_kv_heads * config.head_width
        self.q = Linear(config.width, config.width)
        self.k = Linear(config.width, kv_width)
        self.v = Linear(config.width, kv_width)
        self.out = Linear(config.width, config.width)

    def project(self, x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H, T, head), keys and values (B, H_kv, T, head) of x (B, T, D)."""
        heads = (*x.shape[:-1], -1, self.head_width)
        q = rotate(self.q(x).view(heads), rotation)
        k = rotate(self.k(x).view(heads), rotation)
        v = self.v(x).view(heads)
        return q.transpose(1, 2).contiguous(), k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous()


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate x) ∘ up x)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Linear(config.width, config.ffn_width)
        self.up = Linear(config.width, config.ffn_width)
        self.down = Linear(config.ffn_width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Layer(nn.Module):
    """Attention and feed-forward, each normed before and added to the residual stream after.

    What comes before and after the mixing of tokens are methods of their own, each a chain of products and
    element-wise operations that a compiler can fuse.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.width, config.norm_eps)
        self.ffn = FeedForward(config)

    def forward(self, x: Tensor, rotation: Rotation, context: "Context") -> Tensor:
        q, k, v = self.before(x, rotation)
        return self.after(x, context.attend(q, k, v))

    def before(self, x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        return self.attention.project(self.attention_norm(x), rotation)

    def after(self, x: Tensor, mixed: Tensor) -> Tensor:
        """`mixed` (B, T, H, head): what attention read."""
        x = x + self.attention.out(mixed.flatten(2))
        return x + self.ffn(self.ffn_norm(x))


class Context:
    """What a query may see: the tokens of its own call (training), or those plus a cache (decoding)."""

    def __init__(
        self, ids: Tensor, positions: Tensor, segments: Tensor | None, cache: KVCache | None
    ) -> None:
        self.ids, self.positions, self.segments, self.cache = ids, positions, segments, cache
        self.layer = 0
        self.blocks: list[QueryBlock] | None = None
        self.mask = square_mask(segments) if ids.is_cuda and cache is None else None

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The attention of one layer; called once a layer, in their order. Returns (B, T, H, head)."""
        if self.cache is None and q.is_cuda:
            return fused_attention(q, k, v, self.mask)
        if self.cache is None:
            self.blocks = self.blocks or plan_blocks(self.ids, self.segments, q.dtype)
            return causal_attention(q, k, v, self.blocks)
        self.cache.write(self.layer, self.positions, k, v)
        k, v = self.cache.read(self.layer, q.shape[2])
        self.layer += 1
        return cached_attention(q, k, v, self.positions)


class Transformer(nn.Module):
    """Embedding, blocks, final norm, and a head that may be the embedding.

    `compute_dtype` is the dtype of activations and matrix products; None = that of the weights.
    `checkpoint_activations` keeps only the input of each layer for the backward pass, and computes the rest
    again.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype: torch.dtype | None = None
        self.checkpoint_activations = False
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.head = None if config.tied_embeddings else Linear(config.width, config.vocab_size)
        self.init_weights()

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Normal(0, 0.02), as LLaMA's reference in transformers; norms are one."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02, generator=generator)

    @property
    def head_weight(self) -> Tensor:
        """The output matrix (V, D)."""
        return self.embedding.weight if self.head is None else self.head.weight

    def forward(
        self,
        ids: Tensor,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Logits (B, T, V) of the token after each of `ids` (B, T).

        positions (B, T): default 0 … T-1, or each row's next ones in `cache`; segments (B, T): a token
        sees its own segment only, default one a row. Raises UserError beyond `max_positions`.
        """
        x = self.hidden(ids, positions, segments, cache)
        return F.linear(x, self.head_weight.to(x.dtype))

    def hidden(
        self,
        ids: Tensor,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """As `forward`, but the vectors (B, T, D) after the final norm."""
        n_tokens = ids.shape[1]
        if positions is None:
            here = torch.arange(n_tokens, device=ids.device)[None]
            positions = cache.next_positions(n_tokens) if cache else here
        self._check_positions(positions)
        rotation = rotary(self.config, positions)
        context = Context(ids, positions, segments, cache)
        x = self.embedding(ids).to(self.compute_dtype or self.embedding.weight.dtype)
        for layer in self.layers:
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(layer, x, rotation, context, use_reentrant=False)
            else:
                x = layer(x, rotation, context)
        if cache is not None:
            cache.advance(n_tokens)
        return self.norm(x)

    def _check_positions(self, positions: Tensor) -> None:
        if positions.device.type != "cpu":
            return  # a look at the numbers would stall the GPU; its index kernel checks the bound itself
        if (last := int(positions.max())) >= self.config.max_positions:
            raise UserError(
                f"position {last}: the model has {self.config.max_positions} positions",
                "shorten the sequence, or train a model with a larger max_positions",
            )
