"""Sizes of a model, and their translation from and to Hugging Face's config.json. Imports no torch."""

from collections.abc import Mapping
from typing import Any, Self

from pydantic import Field, model_validator

from danlu.core.config import Config
from danlu.core.errors import UserError

ARCHITECTURE = "LlamaForCausalLM"


class ModelConfig(Config):
    """A decoder transformer in the LLaMA shape (Touvron et al. 2023, section 2.2)."""

    vocab_size: int = Field(4096, ge=1, description="rows of the embedding")
    width: int = Field(256, ge=2, description="width of the residual stream")
    n_layers: int = Field(6, ge=1, description="blocks of attention and feed-forward")
    n_heads: int = Field(8, ge=1, description="query heads; each is width / n_heads wide")
    n_kv_heads: int = Field(8, ge=1, description="key and value heads; fewer than n_heads = grouped-query")
    ffn_width: int = Field(688, ge=1, description="inner width of the SwiGLU feed-forward")
    max_positions: int = Field(2048, ge=2, description="longest sequence, in tokens")
    rope_theta: float = Field(10000.0, gt=0, description="base of the rotary angles")
    norm_eps: float = Field(1e-5, gt=0, description="epsilon of RMSNorm")
    tied_embeddings: bool = Field(True, description="the output matrix is the embedding")

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.width % (2 * self.n_heads):
            raise ValueError(f"width {self.width} is not an even multiple of n_heads {self.n_heads}")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")
        return self

    @property
    def head_width(self) -> int:
        return self.width // self.n_heads

    def to_hf(self) -> dict[str, Any]:
        """The content of a config.json that transformers, vLLM and llama.cpp read."""
        return {
            "architectures": [ARCHITECTURE],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.width,
            "num_hidden_layers": self.n_layers,
            "num_attention_heads": self.n_heads,
            "num_key_value_heads": self.n_kv_heads,
            "head_dim": self.head_width,
            "intermediate_size": self.ffn_width,
            "max_position_embeddings": self.max_positions,
            "rope_theta": self.rope_theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "rms_norm_eps": self.norm_eps,
            "tie_word_embeddings": self.tied_embeddings,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
        }

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], where: str = "config.json") -> Self:
        """Reads a LlamaForCausalLM config.json (of transformers 4 or 5).

        Raises UserError naming the first setting that danlu does not implement.
        """
        architecture = (hf.get("architectures") or [None])[0]
        if architecture != ARCHITECTURE:
            raise UserError(f"{where}: architecture {architecture!r}", f"danlu knows {ARCHITECTURE}")
        rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
        heads = hf["num_attention_heads"]
        required = {
            "hidden_act": (hf.get("hidden_act", "silu"), "silu"),
            "attention_bias": (hf.get("attention_bias", False), False),
            "mlp_bias": (hf.get("mlp_bias", False), False),
            "rope_type": (rope.get("rope_type", rope.get("type", "default")), "default"),
            "head_dim": (hf.get("head_dim") or hf["hidden_size"] // heads, hf["hidden_size"] // heads),
        }
        for key, (found, known) in required.items():
            if found != known:
                raise UserError(f"{where}: {key} is {found!r}", f"danlu knows {known!r} only")
        return cls(
            vocab_size=hf["vocab_size"],
            width=hf["hidden_size"],
            n_layers=hf["num_hidden_layers"],
            n_heads=heads,
            n_kv_heads=hf.get("num_key_value_heads") or heads,
            ffn_width=hf["intermediate_size"],
            max_positions=hf.get("max_position_embeddings", 2048),
            rope_theta=rope.get("rope_theta") or hf.get("rope_theta", 10000.0),
            norm_eps=hf.get("rms_norm_eps", 1e-6),
            tied_embeddings=hf.get("tie_word_embeddings", False),
        )
