"""The decoder transformer: one file for every family; what a model does hangs on its ModelConfig.

By default LLaMA's (Touvron et al. 2023): RMSNorm, rotary positions, SwiGLU, grouped-query attention
(Ainslie et al. 2023). The file knows nothing of parallelism, compilation or adapters, which wrap it from
outside.

Shapes: B rows, T tokens, D width, H query heads, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from danlu.core.errors import UserError
from danlu.model.attention import Block as QueryBlock
from danlu.model.attention import (
    Scores,
    causal_attention,
    fused_attention,
    plan_blocks,
    square_mask,
)
from danlu.model.cache import Cache
from danlu.model.config import ModelConfig
from danlu.model.layers import Experts, FeedForward, Linear, make_norm
from danlu.model.positions import Rotation, rotary, rotate


class Attention(nn.Module):
    """The matrices of grouped-query self-attention, and how its scores are made."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.head_width = config.head_width
        q_width, kv_width = config.n_heads * config.head_width, config.n_kv_heads * config.head_width
        self.q = Linear(config.width, q_width, config.qkv_bias)
        self.k = Linear(config.width, kv_width, config.qkv_bias)
        self.v = Linear(config.width, kv_width, config.qkv_bias)
        self.q_norm = make_norm(config, config.head_width) if config.qk_norm else None
        self.k_norm = make_norm(config, config.head_width) if config.qk_norm else None
        self.out = Linear(q_width, config.width, config.out_bias)
        alibi = config.positions == "alibi"
        self.scores = Scores(config.score_scale, config.window_of(layer), alibi, config.attention_softcap)

    def project(self, x: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H, T, head), keys and values (B, H_kv, T, head) of x (B, T, D)."""
        heads = (*x.shape[:-1], -1, self.head_width)
        q, k, v = self.q(x).view(heads), self.k(x).view(heads), self.v(x).view(heads)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, rotation), rotate(k, rotation)
        return q.transpose(1, 2).contiguous(), k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous()


class Layer(nn.Module):
    """Attention and feed-forward, each added to the residual stream; norms where `norm_place` says.

    What comes before and after the mixing of tokens are methods of their own, each a chain of products and
    element-wise operations that a compiler can fuse.
    """

    def __init__(self, config: ModelConfig, number: int) -> None:
        super().__init__()
        self.norm_place, self.parallel = config.norm_place, config.parallel_residual
        self.attention_norm = make_norm(config, config.width)
        self.attention = Attention(config, number)
        self.ffn_norm = None if config.one_norm else make_norm(config, config.width)
        dense = not config.has_experts(number)
        self.ffn = FeedForward(config, config.ffn_width, config.ffn) if dense else Experts(config)
        both = config.norm_place == "both"
        self.attention_post_norm = make_norm(config, config.width) if both else None
        self.ffn_post_norm = make_norm(config, config.width) if both else None

    def forward(self, x: Tensor, rotation: Rotation | None, context: "Context") -> Tensor:
        q, k, v = self.before(x, rotation)
        return self.after(x, context.attend(q, k, v, self.attention.scores))

    def before(self, x: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor, Tensor]:
        return self.attention.project(x if self.norm_place == "post" else self.attention_norm(x), rotation)

    def after(self, x: Tensor, mixed: Tensor) -> Tensor:
        """`mixed` (B, T, H, head): what attention read."""
        y = self.attention.out(mixed.flatten(2))
        ffn_norm = self.ffn_norm or self.attention_norm
        if self.parallel:
            return x + y + self.ffn(ffn_norm(x))
        if self.norm_place == "post":
            x = self.attention_norm(x + y)
            return ffn_norm(x + self.ffn(x))
        if self.attention_post_norm is None or self.ffn_post_norm is None:
            x = x + y
            return x + self.ffn(ffn_norm(x))
        x = x + self.attention_post_norm(y)
        return x + self.ffn_post_norm(self.ffn(ffn_norm(x)))


class Context:
    """What a query may see: the tokens of its own call (training), or those plus a cache (decoding)."""

    def __init__(self, ids: Tensor, positions: Tensor, segments: Tensor | None, cache: Cache | None) -> None:
        self.ids, self.positions, self.segments, self.cache = ids, positions, segments, cache
        self.layer = 0
        self.blocks: dict[int, list[QueryBlock]] = {}
        self.mask = square_mask(segments) if ids.is_cuda and cache is None else None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor:
        """The attention of one layer; called once a layer, in their order. Returns (B, T, H, head)."""
        if self.cache is not None:
            self.layer += 1
            return self.cache.attend(self.layer - 1, q, k, v, self.positions, scores)
        if q.is_cuda and scores.plain:
            return fused_attention(q, k, v, self.mask, scores.scale)
        if scores.window not in self.blocks:
            self.blocks[scores.window] = plan_blocks(self.ids, self.segments, q.dtype, scores.window)
        return causal_attention(q, k, v, self.blocks[scores.window], scores)


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
        self.embedding = nn.Embedding(config.vocab_size, config.embedding_width or config.width)
        learned, narrow = config.positions == "learned", config.embedding_width > 0
        rows = config.max_positions + config.position_offset
        self.position_embedding = nn.Embedding(rows, config.width) if learned else None
        self.embedding_in = Linear(config.embedding_width, config.width) if narrow else None
        self.embedding_norm = make_norm(config, config.width) if config.embedding_norm else None
        self.layers = nn.ModuleList(Layer(config, number) for number in range(config.n_layers))
        self.norm = None if config.norm_place == "post" else make_norm(config, config.width)
        self.embedding_out = Linear(config.width, config.embedding_width) if narrow else None
        head_width = config.embedding_width or config.width
        tied = config.tied_embeddings
        self.head = None if tied else Linear(head_width, config.vocab_size, config.head_bias)
        self.score = Linear(config.width, config.scores) if config.scores else None
        self.init_weights()

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Normal(0, 0.02), as LLaMA's reference in transformers; biases are zero, norms as they are made."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02, generator=generator)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    @property
    def head_weight(self) -> Tensor:
        """The output matrix (V, D)."""
        return self.embedding.weight if self.head is None else self.head.weight

    @property
    def head_bias(self) -> Tensor | None:
        """The output matrix' bias (V,)."""
        return None if self.head is None else self.head.bias

    def forward(
        self,
        ids: Tensor,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Logits (B, T, V) of the token after each of `ids` (B, T).

        positions (B, T): default 0 … T-1, or each row's next ones in `cache`; segments (B, T): a token
        sees its own segment only, default one a row. Raises UserError beyond `max_positions`.
        """
        return self.logits(self.hidden(ids, positions, segments, cache))

    def give_scores(self, n: int = 1) -> None:
        """Puts a head with `n` scores in the place of the output matrix.

        Its numbers are from Normal(0, 1 / √(width + 1)) (Stiennon et al. 2020, appendix B.1).
        """
        changes = {"scores": n, "tied_embeddings": True, "head_bias": False}
        self.config, self.head = self.config.model_copy(update=changes), None
        self.score = Linear(self.config.width, n).to(self.embedding.weight.device)
        nn.init.normal_(self.score.weight, std=(self.config.width + 1) ** -0.5)

    def give_values(self) -> None:
        """Puts a head with one number for each token beside the output matrix, 0 at first."""
        self.score = Linear(self.config.width, 1).to(self.embedding.weight.device)
        nn.init.zeros_(self.score.weight)

    def logits(self, hidden: Tensor) -> Tensor:
        """(…, V) of what `hidden` returns."""
        bias = None if self.head_bias is None else self.head_bias.to(hidden.dtype)
        z = F.linear(hidden, self.head_weight.to(hidden.dtype), bias)
        cap = self.config.logit_softcap
        return z if not cap else cap * (z / cap).tanh()

    def hidden(
        self,
        ids: Tensor,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """As `forward`, but the vectors (B, T, D) that the output matrix is multiplied with."""
        n_tokens = ids.shape[1]
        if positions is None:
            here = torch.arange(n_tokens, device=ids.device)[None]
            positions = cache.next_positions(n_tokens) if cache else here
        self._check_positions(positions)
        context = Context(ids, positions, segments, cache)
        x = self._embed(ids, positions)
        rotations: dict[object, Rotation | None] = {}
        for number, layer in enumerate(self.layers):
            kind = self.config.rope_theta_of(number)
            if kind not in rotations:
                rotations[kind] = rotary(self.config, number, positions)
            rotation = rotations[kind]
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(layer, x, rotation, context, use_reentrant=False)
            else:
                x = layer(x, rotation, context)
        if cache is not None:
            cache.advance(n_tokens)
        if self.norm is not None:
            x = self.norm(x)
        return x if self.embedding_out is None else self.embedding_out(x)

    def _embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        x = self.embedding(ids).to(self.compute_dtype or self.embedding.weight.dtype)
        if self.config.embedding_scale != 1:
            x = x * self.config.embedding_scale
        if self.embedding_in is not None:
            x = self.embedding_in(x)
        if self.position_embedding is not None:
            x = x + self.position_embedding(positions + self.config.position_offset).to(x.dtype)
        return x if self.embedding_norm is None else self.embedding_norm(x)

    def _check_positions(self, positions: Tensor) -> None:
        if positions.device.type != "cpu":
            return  # a look at the numbers would stall the GPU; its index kernel checks the bound itself
        if (last := int(positions.max())) >= self.config.max_positions:
            raise UserError(
                f"position {last}: the model has {self.config.max_positions} positions",
                "shorten the sequence, or train a model with a larger max_positions",
            )
