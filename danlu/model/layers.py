"""What a block of the transformer is made of: linear maps, norms, feed-forwards, experts.

Zhang and Sennrich 2019 (RMSNorm); Ba et al. 2016 (LayerNorm); Shazeer 2020 (SwiGLU, GEGLU); Fedus et al.
2021 and Gale et al. 2022 (dropless mixture of experts).
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from danlu.model.config import Activation, ModelConfig, is_gated

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": F.silu,
    "geglu": F.gelu,
    "geglu_tanh": partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


class Linear(nn.Linear):
    """y = x Wᵀ + b, computed in the dtype of x (weights may be kept more precisely than they are used)."""

    def __init__(self, n_in: int, n_out: int, bias: bool = False) -> None:
        super().__init__(n_in, n_out, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class RMSNorm(nn.Module):
    """x / √(mean(x²) + ε) · w, computed in float32; with `plus_one`, · (1 + w)."""

    def __init__(self, width: int, eps: float, plus_one: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width) if plus_one else torch.ones(width))
        self.eps, self.plus_one = eps, plus_one

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        w = self.weight.float()
        return (y * (1 + w if self.plus_one else w)).to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """(x − mean) / √(variance + ε) · w + b, computed in float32."""

    def forward(self, x: Tensor) -> Tensor:
        w, b = self.weight.float(), self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, w, b, self.eps).to(x.dtype)


def make_norm(config: ModelConfig, width: int) -> nn.Module:
    """The norm that `config` asks for."""
    if config.norm == "layernorm":
        return LayerNorm(width, eps=config.norm_eps)
    return RMSNorm(width, config.norm_eps, config.norm_plus_one)


class FeedForward(nn.Module):
    """down(f(up x)); gated (SwiGLU and its like): down(f(gate x) ∘ up x)."""

    def __init__(self, config: ModelConfig, width: int, kind: Activation) -> None:
        super().__init__()
        self.kind, self.activation = kind, ACTIVATIONS[kind]
        self.gate = Linear(config.width, width, config.ffn_bias) if is_gated(kind) else None
        self.up = Linear(config.width, width, config.ffn_bias)
        self.down = Linear(width, config.width, config.ffn_bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            return self.down(self.activation(self.up(x)))
        return self.down(self.activation(self.gate(x)) * self.up(x))


class Experts(nn.Module):
    """A mixture of experts without capacity: every token goes through the `n_active` that it is sent to."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_active, self.normalised = config.n_active, config.normalised_experts
        self.router = Linear(config.width, config.n_experts)
        width, kind = config.expert_width or config.ffn_width, config.expert_ffn or config.ffn
        self.experts = nn.ModuleList(FeedForward(config, width, kind) for _ in range(config.n_experts))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        weights, chosen = self.route(tokens)
        y = torch.zeros_like(tokens)
        # An expert that no token was sent to is called too, so that every process has its gradient.
        for number, expert in enumerate(self.experts):
            row, place = (chosen == number).nonzero(as_tuple=True)
            part = expert(tokens[row]) * weights[row, place, None].to(x.dtype)
            y = y.index_add(0, row, part)
        return y.view_as(x)

    def route(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (N, n_active) in float32 and numbers (N, n_active) of the experts of N tokens."""
        p = self.router(tokens).float().softmax(-1)
        weights, chosen = p.topk(self.n_active, dim=-1)
        if self.normalised:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights, chosen
