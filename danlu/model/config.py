"""Sizes of a model and what its blocks are made of; adapters; the merge. Imports no torch.

What a model does hangs on these fields alone; `families.py` says which published families set them how.
"""

import fnmatch
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from danlu.core.config import Config
from danlu.model.sizes import fields_of


class RopeScaling(Config):
    """How rotary angles are stretched to contexts beyond those that a model was trained on."""

    kind: Literal["linear", "dynamic", "yarn", "llama3", "longrope"] = Field(
        description="linear: positions / factor; dynamic: NTK-aware base that grows with the length; "
        "yarn: by parts, from interpolation to extrapolation; llama3: low frequencies only; longrope: each "
        "frequency by a number of its own"
    )
    factor: float = Field(ge=1, description="how many times longer the context becomes")
    original: int = Field(0, ge=0, description="positions that the model was trained on")
    low: float = Field(1.0, gt=0, description="yarn: beta_slow; llama3: low_freq_factor")
    high: float = Field(32.0, gt=0, description="yarn: beta_fast; llama3: high_freq_factor")
    attention: float = Field(
        0.0,
        ge=0,
        description="factor of the rotated vectors; 0 = yarn: 0.1 ln(factor) + 1, longrope: "
        "√(1 + ln(factor) / ln(original))",
    )
    truncate: bool = Field(True, description="yarn: whole frequencies only")
    short: tuple[float, ...] = Field((), description="longrope: divisors within the original context")
    long: tuple[float, ...] = Field((), description="longrope: divisors beyond it")


Activation = Literal["swiglu", "geglu", "geglu_tanh", "gelu", "gelu_tanh", "relu", "silu"]


class ModelConfig(Config):
    """A decoder transformer; by default in the LLaMA shape (Touvron et al. 2023, section 2.2)."""

    vocab_size: int = Field(4096, ge=1, description="rows of the embedding")
    width: int = Field(256, ge=2, description="width of the residual stream")
    n_layers: int = Field(6, ge=1, description="blocks of attention and feed-forward")
    n_heads: int = Field(8, ge=1, description="query heads")
    n_kv_heads: int = Field(8, ge=1, description="key and value heads; fewer than n_heads = grouped-query")
    head_width: int = Field(0, ge=0, description="width of a head; 0 = width / n_heads")
    ffn_width: int = Field(688, ge=1, description="inner width of the feed-forward")
    max_positions: int = Field(2048, ge=2, description="longest sequence, in tokens")
    rope_theta: float = Field(10000.0, gt=0, description="base of the rotary angles")
    norm_eps: float = Field(1e-5, gt=0, description="epsilon of the norms")
    tied_embeddings: bool = Field(True, description="the output matrix is the embedding")

    positions: Literal["rope", "learned", "alibi", "none"] = Field(
        "rope", description="how a token knows where it is"
    )
    position_offset: int = Field(0, ge=0, description="learned: rows before the first position's")
    rope_width: int = Field(0, ge=0, description="rotated entries of a head; 0 = all")
    rope_scaling: RopeScaling | None = Field(None, description="stretching of the rotary angles")
    rope_layers: tuple[bool, ...] = Field((True,), description="which layers rotate, in a cycle")
    window: int = Field(
        0, ge=0, description="tokens that a local layer's query sees, itself included; 0 = all"
    )
    local_layers: tuple[bool, ...] = Field((True,), description="which layers have the window, in a cycle")
    local_rope_theta: float = Field(
        0.0, ge=0, description="base of the angles in local layers, unscaled; 0 = as in the others"
    )
    attention_scale: float = Field(0.0, ge=0, description="factor of q · k; 0 = 1 / √head_width")
    attention_softcap: float = Field(0.0, ge=0, description="c: scores become c tanh(score / c); 0 = none")
    qk_norm: bool = Field(False, description="norm of each query and key head before they are rotated")
    qkv_bias: bool = Field(False, description="biases of the query, key and value matrices")
    out_bias: bool = Field(False, description="bias of the attention's output matrix")

    ffn: Activation = Field(
        "swiglu", description="activation of the feed-forward; …glu: gated by a second matrix"
    )
    ffn_bias: bool = Field(False, description="biases of the feed-forward's matrices")
    n_experts: int = Field(0, ge=0, description="experts of a mixture-of-experts layer; 0 = dense")
    n_active: int = Field(2, ge=1, description="experts that a token goes through")
    expert_width: int = Field(0, ge=0, description="inner width of an expert; 0 = ffn_width")
    expert_ffn: Activation | None = Field(None, description="activation of the experts; default: as in ffn")
    normalised_experts: bool = Field(True, description="the weights of a token's experts sum to one")
    moe_layers: tuple[bool, ...] = Field((True,), description="which layers have experts, in a cycle")

    norm: Literal["rmsnorm", "layernorm"] = Field("rmsnorm", description="norm; layernorm has a bias")
    norm_plus_one: bool = Field(False, description="the norm's factor is 1 + its weight")
    norm_place: Literal["pre", "post", "both"] = Field(
        "pre", description="pre: of what enters a sublayer; post: of the sum after it; both: before it, and "
        "of what it gives"
    )  # fmt: skip
    parallel_residual: bool = Field(False, description="attention and feed-forward read the same stream")
    one_norm: bool = Field(False, description="with parallel_residual: they share one norm too")
    embedding_norm: bool = Field(False, description="norm of the embeddings")
    embedding_scale: float = Field(1.0, gt=0, description="factor of the embeddings")
    embedding_width: int = Field(
        0, ge=0, description="width of the embeddings, projected to width; 0 = width"
    )
    head_bias: bool = Field(False, description="bias of the output matrix")
    logit_softcap: float = Field(0.0, ge=0, description="c: logits become c tanh(logit / c); 0 = none")

    scores: int = Field(
        0,
        ge=0,
        description="numbers that a head gives for each token, such as a reward, instead of logits",
    )

    family: str = Field(
        "llama", description="Hugging Face family that it is saved as, where that can express it"
    )
    size: str | None = Field(
        None,
        exclude=True,
        description="a published model's sizes, over which the others are laid: danlu sizes",
    )

    @model_validator(mode="after")
    def _spell_out_size(self) -> Self:
        if self.size is not None:
            self.__dict__ |= {k: v for k, v in fields_of(self.size).items() if k not in self.model_fields_set}
            self.__dict__["size"] = None
        return self

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.scores and not self.tied_embeddings:
            raise ValueError("a model with scores has no output matrix: set tied_embeddings true")
        if not self.head_width:
            if self.width % self.n_heads:
                raise ValueError(f"width {self.width} is not a multiple of n_heads {self.n_heads}")
            self.__dict__["head_width"] = self.width // self.n_heads
        if self.positions == "rope" and (self.rope_width or self.head_width) % 2:
            raise ValueError(f"the rotated width {self.rope_width or self.head_width} of a head is odd")
        if self.rope_scaling is not None and self.rope_scaling.kind == "longrope":
            half = (self.rope_width or self.head_width) // 2
            for name in ("short", "long"):
                if len(getattr(self.rope_scaling, name)) != half:
                    raise ValueError(f"rope_scaling.{name} needs {half} numbers, one for each frequency")
        if self.rope_width > self.head_width:
            raise ValueError(f"rope_width {self.rope_width} is beyond head_width {self.head_width}")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")
        if self.n_experts and self.n_active > self.n_experts:
            raise ValueError(f"n_active {self.n_active} is more than n_experts {self.n_experts}")
        if self.head_bias and self.tied_embeddings:
            raise ValueError("head_bias needs tied_embeddings false")
        if self.one_norm and not self.parallel_residual:
            raise ValueError("one_norm needs parallel_residual")
        if self.parallel_residual and self.norm_place != "pre":
            raise ValueError("parallel_residual needs norm_place pre")
        # One way to say each thing, so that equal models have equal configs.
        for name in ("rope_layers", "local_layers", "moe_layers"):
            self.__dict__[name] = _shortest_cycle(getattr(self, name), self.n_layers)
        if self.rope_width == self.head_width:
            self.__dict__["rope_width"] = 0
        for name, whole in (("embedding_width", self.width), ("expert_width", self.ffn_width)):
            if getattr(self, name) == whole:
                self.__dict__[name] = 0
        if self.expert_ffn == self.ffn:
            self.__dict__["expert_ffn"] = None
        return self

    def window_of(self, layer: int) -> int:
        """Tokens that a query of this layer sees, itself included; 0 = all."""
        return self.window if self.local_layers[layer % len(self.local_layers)] else 0

    def rope_theta_of(self, layer: int) -> tuple[float, RopeScaling | None] | None:
        """Base and stretching of this layer's rotary angles; None where it doesn't rotate."""
        if self.positions != "rope" or not self.rope_layers[layer % len(self.rope_layers)]:
            return None
        if self.local_rope_theta and self.window_of(layer):
            return self.local_rope_theta, None
        return self.rope_theta, self.rope_scaling

    def has_experts(self, layer: int) -> bool:
        return self.n_experts > 0 and self.moe_layers[layer % len(self.moe_layers)]

    @property
    def score_scale(self) -> float:
        """Factor of q · k."""
        return self.attention_scale or self.head_width**-0.5


def is_gated(ffn: Activation) -> bool:
    """Whether a second matrix multiplies what the activation gives."""
    return "glu" in ffn


def _shortest_cycle(flags: Sequence[bool], n_layers: int) -> tuple[bool, ...]:
    """The shortest cycle that gives the same flag to each layer."""
    whole = [flags[i % len(flags)] for i in range(n_layers)] if flags else [True]
    for length in range(1, len(whole) + 1):
        if all(whole[i] == whole[i % length] for i in range(len(whole))):
            return tuple(whole[:length])
    return tuple(whole)


class LoraConfig(Config):
    """An adapter's size and place, and how the frozen base below it is kept."""

    rank: int = Field(16, ge=1, description="r: rows of A and columns of B")
    alpha: float = Field(32.0, gt=0, description="α: the adapter's output is multiplied by α / r")
    dropout: float = Field(0.0, ge=0, lt=1, description="of the adapter's input, in training")
    targets: tuple[str, ...] = Field(
        ("attention.*", "ffn.*"), description="patterns of the matrices in a layer that are adapted"
    )
    rslora: bool = Field(False, description="multiply by α / √r instead (rsLoRA)")
    dora: bool = Field(False, description="learn the length of each row apart (DoRA)")
    quantise: Literal["none", "int8", "nf4"] = Field(
        "none", description="how the frozen matrices of the layers are kept: nf4 takes 4.13 bits a weight "
        "(QLoRA), int8 a little over 8"
    )  # fmt: skip

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def adapts(self, name: str) -> bool:
        """Whether the matrix of this name within a layer, such as attention.q, has an adapter."""
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.targets)


class ConvertConfig(Config):
    """`danlu convert`."""

    source: str = Field(
        description="model: a folder of Hugging Face's or Meta's, a .gguf file, a run, an alias"
    )
    out: Path = Field(description="folder to write, or a file that ends in .gguf")
    dtype: Literal["float32", "float16", "bfloat16", "q8_0"] | None = Field(
        None, description="of the weights; q8_0: 8 bits, in GGUF only; default: as they are"
    )


class SizesConfig(Config):
    """`danlu sizes`."""

    model: str | None = Field(None, description="a named size, or a model; none = all named sizes")
    length: int | None = Field(None, ge=1, description="tokens of a sequence; default: the most it can read")


class MergeConfig(Config):
    """`danlu merge`: an adapter written into the matrices of its base."""

    adapter: Path = Field(description="adapter folder, or the run that trained it")
    out: Path = Field(description="folder that the merged model is written to")
    text: Path | None = Field(
        None, description="text on which the logits are compared; none = a few lines that danlu has"
    )
    tolerance: float = Field(
        1e-4, gt=0, description="largest difference of a logit that is let pass, of the largest logit"
    )
