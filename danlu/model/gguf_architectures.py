"""What llama.cpp calls a model's sizes and tensors: a row an architecture, as in `families.py`.

A rule says what llama.cpp itself does with a key, so that nothing is written that it would ignore or can't
run. What danlu can do besides is honoured where a file says it.
"""

import math
import reprlib
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from danlu.core.errors import UserError
from danlu.model.config import ModelConfig, RopeScaling
from danlu.model.families import Family
from danlu.model.family_names import names
from danlu.model.positions import longrope_factor, rope_frequencies, yarn_factor
from danlu.model.rules import HF, Always, Key

DAMAGED = "the file is incomplete or damaged"
DIVISORS, _SHORT, _LONG = "rope_freqs", "rope_factors_short", "rope_factors_long"
ROPE_LISTS = (DIVISORS, _SHORT, _LONG)
"""Divisors of the rotary frequencies: tensors of the file, here lists beside the keys of the architecture."""


def _width_by_heads(metadata: HF) -> int:
    width, heads = metadata["embedding_length"], metadata["attention.head_count"]
    if not isinstance(heads, int) or heads < 1:
        raise UserError(f"attention.head_count is {reprlib.repr(heads)}", "danlu knows one for all layers")
    return int(width // heads)


def _rounded(value: float) -> float:
    """A float32 as it was meant: 1e-5, not 9.99999975e-06."""
    if not math.isfinite(value):
        raise ValueError("not a number")
    return float(f"{value:.7g}")


@dataclass(frozen=True)
class _ReadOnly:
    """A key that danlu can do, and llama.cpp would ignore: honoured where it comes, never written."""

    key: Key

    def read(self, hf: HF) -> dict[str, Any]:
        return self.key.read(hf)

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class _Heads:
    """Widths of a head: of keys, of values, and of what is rotated.

    `partly`: whether llama.cpp rotates a part; `free`: whether heads may be wider than the stream gives.
    """

    partly: bool = False
    free: bool = True

    def read(self, hf: HF) -> dict[str, Any]:
        width = hf.get("attention.key_length", _width_by_heads(hf))
        values = hf.get("attention.value_length", _width_by_heads(hf))
        rotated = hf.get("rope.dimension_count", width)
        if not self.free and width != _width_by_heads(hf):
            raise UserError(f"attention.key_length is {width!r}", f"danlu knows {_width_by_heads(hf)} only")
        if values != width:
            raise UserError(
                f"attention.value_length is {values!r}", f"danlu knows that of the keys only: {width}"
            )
        if rotated != width and not (self.partly and rotated > 0):
            raise UserError(f"rope.dimension_count is {rotated!r}", f"danlu knows {width} only")
        return {"head_width": width, "rope_width": rotated}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        width = config.head_width
        return {
            "attention.key_length": width,
            "attention.value_length": width,
            "rope.dimension_count": (config.rope_width if self.partly else 0) or width,
        }


@dataclass(frozen=True)
class _Scaling:
    """Stretched rotary angles. `llama3`: whether llama.cpp reads LLaMA 3's, a tensor of divisors."""

    llama3: bool = False

    def read(self, hf: HF) -> dict[str, Any]:
        # llama.cpp takes a factor for a linear one where no type is given, and knows the key's old name.
        kind = hf.get("rope.scaling.type", "linear")
        factor = hf.get("rope.scaling.factor", hf.get("rope.scale_linear", 0)) or 1.0
        original = hf.get("rope.scaling.original_context_length") or hf.get("context_length")
        low, high = hf.get("rope.scaling.yarn_beta_slow", 1.0), hf.get("rope.scaling.yarn_beta_fast", 32.0)
        attention = hf.get("rope.scaling.attn_factor", 1.0)
        divisors = hf.get(DIVISORS) if self.llama3 else None
        if kind not in ("none", "linear", "yarn"):
            raise UserError(f"rope.scaling.type is {kind!r}", "danlu knows none, linear and yarn")
        if kind != "yarn" and attention != 1:
            raise UserError(f"rope.scaling.attn_factor is {attention!r}", "danlu knows it with yarn only")
        plain = kind == "none" or (factor == 1 and attention == 1)
        if divisors is not None:
            if not plain:
                raise UserError(
                    f"rope.scaling.type is {kind!r} beside {DIVISORS}.weight", "danlu knows one of them only"
                )
            return {"rope_scaling": _llama3(max(divisors, default=1.0))}
        if plain:
            return {}
        scaling = RopeScaling(kind=kind, factor=_rounded(factor), original=original if kind == "yarn" else 0)
        if kind == "yarn":
            factors = {"low": _rounded(low), "high": _rounded(high)}
            if attention != 1:
                factors["attention"] = _rounded(attention * yarn_factor(scaling))
            scaling = RopeScaling(**{**scaling.model_dump(), **factors})
        return {"rope_scaling": scaling}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        scaling = config.rope_scaling
        if scaling is None or scaling.kind not in ("linear", "yarn", "llama3"):
            return {}
        if scaling.kind == "llama3":
            return {DIVISORS: rope_divisors(config).tolist()} if self.llama3 else {}
        keys = {"rope.scaling.type": scaling.kind, "rope.scaling.factor": scaling.factor}
        if scaling.kind == "yarn":  # but for the betas, which llama.cpp ignores in these architectures
            keys["rope.scaling.original_context_length"] = scaling.original
        if scaling.attention:
            usual = yarn_factor(scaling.model_copy(update={"attention": 0.0}))
            keys["rope.scaling.attn_factor"] = scaling.attention / usual
        return keys


class _LongRope:
    """Phi-3's angles: two tensors of divisors, or none, and then as in the others."""

    def read(self, hf: HF) -> dict[str, Any]:
        short, long = hf.get(_SHORT), hf.get(_LONG)
        if short is None and long is None:
            return _Scaling().read(hf)
        if short is None or long is None:
            raise UserError(f"{_SHORT}.weight and {_LONG}.weight: one is missing", DAMAGED)
        # llama.cpp goes by the tensors: a type or a factor would stretch the angles once more.
        kind, factor = hf.get("rope.scaling.type", "longrope"), hf.get("rope.scaling.factor", 0)
        if kind == "yarn" or (kind != "none" and factor not in (0, 1)):
            raise UserError(f"rope.scaling.type is {kind!r}, by {factor}", f"danlu knows none beside {_LONG}")
        original = hf.get("rope.scaling.original_context_length") or hf["context_length"]
        scaling = RopeScaling(
            kind="longrope",
            factor=max(1.0, hf["context_length"] / original),
            original=original,
            short=tuple(map(_rounded, short)),
            long=tuple(map(_rounded, long)),
        )
        attention = hf.get("rope.scaling.attn_factor", 1.0)
        if not math.isclose(attention, longrope_factor(scaling), rel_tol=1e-6):
            scaling = scaling.model_copy(update={"attention": _rounded(attention)})
        return {"rope_scaling": scaling}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        scaling = config.rope_scaling
        if scaling is None or scaling.kind != "longrope":
            return _Scaling().write(config)
        return {
            _SHORT: list(scaling.short),
            _LONG: list(scaling.long),
            "rope.scaling.original_context_length": scaling.original,
            "rope.scaling.attn_factor": longrope_factor(scaling),
        }


@dataclass(frozen=True)
class _Gemma:
    """What Gemma 2 and 3 do, where of their layers every `period`-th sees all tokens.

    `largest`: layers of the model of 27 B parameters, whose scores are scaled by the width of the stream.
    `window`: the default; 0 = all layers see all.
    """

    period: int
    largest: int
    window: int = 0

    def read(self, hf: HF) -> dict[str, Any]:
        layers = hf["block_count"]
        window = hf.get("attention.sliding_window", self.window)
        local = hf.get("attention.sliding_window_pattern", self.period)
        if self.window and not window:
            raise UserError("attention.sliding_window is 0", "this architecture has one always")
        if isinstance(local, int):
            local = [(i + 1) % local != 0 if local > 1 else local == 0 for i in range(layers)]
        if len(local) != layers:
            raise UserError(f"attention.sliding_window_pattern has {len(local)} flags", f"expected {layers}")
        return {
            "attention_scale": _gemma_scale(layers == self.largest, hf),
            "embedding_scale": math.sqrt(hf["embedding_length"]),
            **({"window": window, "local_layers": tuple(map(bool, local))} if window and any(local) else {}),
        }

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {"attention.sliding_window": config.window}


class _Phi3Window:
    """Of a model that is Phi-3's by its family, as llama.cpp's converter does: llama.cpp warns that it
    doesn't apply it, so that no other model is written as one.
    """

    def read(self, hf: HF) -> dict[str, Any]:
        return _WINDOW.read(hf)

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {"attention.sliding_window": config.window} if config.family == "phi3" else {}


def _gemma_scale(largest: bool, hf: HF) -> float:
    width = _width_by_heads(hf)
    return float(width if largest else hf.get("attention.key_length", width)) ** -0.5


def _not_zero(value: float) -> float:
    if not value:
        raise ValueError("llama.cpp divides by it")
    return _rounded(value)


def _llama3(factor: float) -> RopeScaling:
    """The bounds stand in no file: they are the same in every LLaMA from 3.1 on."""
    return RopeScaling(kind="llama3", factor=_rounded(factor), original=8192, low=1.0, high=4.0)


def rope_divisors(config: ModelConfig) -> Tensor:
    """(rotated / 2,) float32: what LLaMA 3's scaling divides each frequency by."""
    width = config.rope_width or config.head_width
    plain, _ = rope_frequencies(config.rope_theta, width)
    scaled, _ = rope_frequencies(config.rope_theta, width, config.rope_scaling)
    return (plain / scaled).float()


@dataclass(frozen=True)
class _Experts:
    """Keys that a dense model must not have. `width`: the key of an expert's width, if it has its own."""

    width: str | None = None

    def read(self, hf: HF) -> dict[str, Any]:
        if not hf.get("expert_count"):
            return {}
        own = {} if self.width is None else {"expert_width": hf[self.width]}
        return {"n_experts": hf["expert_count"], "n_active": hf["expert_used_count"], **own}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        if not config.n_experts:
            return {}
        own = {} if self.width is None else {self.width: config.expert_width or config.ffn_width}
        return {"expert_count": config.n_experts, "expert_used_count": config.n_active, **own}


_SHARED = (
    Key("vocab_size", "vocab_size"),
    Key("width", "embedding_length"),
    Key("n_layers", "block_count"),
    Key("n_heads", "attention.head_count"),
    Key("n_kv_heads", "attention.head_count_kv", lambda metadata: metadata["attention.head_count"]),
    Key("ffn_width", "feed_forward_length"),
    Key("max_positions", "context_length"),
    Key("tied_embeddings", "tied"),
)
_WINDOW = _ReadOnly(Key("window", "attention.sliding_window", 0))
_SCALE = _ReadOnly(Key("attention_scale", "attention.scale", 0.0, _rounded))
_SIZES = (
    *_SHARED,
    Key("norm_eps", "attention.layer_norm_rms_epsilon", None, _rounded),
    Key("rope_theta", "rope.freq_base", 10000.0, _rounded),
)
_LLAMA = (*_SIZES, _Heads(), _Scaling(llama3=True), _WINDOW, _SCALE)
_QWEN = (*_SIZES, _Heads(), _Scaling(), _WINDOW, _SCALE)
_GEMMA = (
    *_SIZES,
    _Heads(),
    _Scaling(),
    Always(ffn="geglu_tanh", norm_plus_one=True, norm_place="both"),
)
_GPT = (
    *_SHARED,
    Key("norm_eps", "attention.layer_norm_epsilon", None, _rounded),
    Always(norm="layernorm", ffn="gelu_tanh", qkv_bias=True, out_bias=True, ffn_bias=True),
)
_OUTER = {"embedding": "token_embd", "norm": "output_norm", "head": "output"}
_INNER = {
    "layers.{i}.attention_norm": "blk.{i}.attn_norm",
    "layers.{i}.ffn_norm": "blk.{i}.ffn_norm",
    "layers.{i}.attention.v": "blk.{i}.attn_v",
    "layers.{i}.attention.out": "blk.{i}.attn_output",
    "layers.{i}.attention.q_norm": "blk.{i}.attn_q_norm",
    "layers.{i}.attention.k_norm": "blk.{i}.attn_k_norm",
    "layers.{i}.ffn.gate": "blk.{i}.ffn_gate",
    "layers.{i}.ffn.up": "blk.{i}.ffn_up",
    "layers.{i}.ffn.down": "blk.{i}.ffn_down",
    "layers.{i}.ffn.router": "blk.{i}.ffn_gate_inp",
}
_QK = {"layers.{i}.attention.q": "blk.{i}.attn_q", "layers.{i}.attention.k": "blk.{i}.attn_k"}
_EXPERTS = names(
    {f"layers.{{i}}.ffn.experts.{{e}}.{n}": f"blk.{{i}}.ffn_{n}_exps" for n in ("gate", "up", "down")},
    "together",
)
_NAMES = names({**_OUTER, **_INNER})
_GEMMA_NORMS = {
    "norm": "output_norm",
    "layers.{i}.attention_norm": "blk.{i}.attn_norm",
    "layers.{i}.attention_post_norm": "blk.{i}.post_attention_norm",
    "layers.{i}.ffn_norm": "blk.{i}.ffn_norm",
    "layers.{i}.ffn_post_norm": "blk.{i}.post_ffw_norm",
    "layers.{i}.attention.q_norm": "blk.{i}.attn_q_norm",
    "layers.{i}.attention.k_norm": "blk.{i}.attn_k_norm",
}
_PHI3_FUSED = ("attention.q", "attention.k", "attention.v", "ffn.gate", "ffn.up")
_ALL = {**_OUTER, **_INNER, **_QK}
_GEMMA_NAMES = names(_GEMMA_NORMS, "plus_one") + names(
    {ours: theirs for ours, theirs in _ALL.items() if ours not in _GEMMA_NORMS}
)
_PHI3_NAMES = names(
    {
        **{ours: theirs for ours, theirs in _ALL.items() if not ours.endswith(_PHI3_FUSED)},
        "layers.{i}.attention.q layers.{i}.attention.k layers.{i}.attention.v": "blk.{i}.attn_qkv",
        "layers.{i}.ffn.gate layers.{i}.ffn.up": "blk.{i}.ffn_up",
    }
)
_GPT_NAMES = names(
    {
        **_OUTER,
        **{ours: theirs for ours, theirs in _INNER.items() if not ours.endswith("attention.v")},
        "layers.{i}.attention.q layers.{i}.attention.k layers.{i}.attention.v": "blk.{i}.attn_qkv",
        "position_embedding": "position_embd",
        "embedding_norm": "token_embd_norm",
    }
)

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "embedding_scale": (0, 1),
    "expert_gating_func": (0, 1),  # softmax
    "expert_weights_norm": (True,),
    "expert_weights_scale": (0, 1),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "rope.scaling.yarn_attn_factor": (1,),
    "rope.scaling.yarn_ext_factor": (-1, 1),
}
"""Values of further keys that change nothing; of any other it is 0 alone."""
SAY_NOTHING = ("rope.scaling.finetuned", "tensor_data_layout", "pooling_type")
"""Keys that no logit hangs on."""

ARCHITECTURES = (
    Family("gpt2", "gpt2", (*_GPT, Always(positions="learned")), _GPT_NAMES, ""),
    Family("bloom", "bloom", (*_GPT, Always(positions="alibi", embedding_norm=True)), _GPT_NAMES, ""),
    # Rotated pairs are neighbours, as in Meta's files. Mixtral is of this architecture too.
    Family("llama", "llama", (*_LLAMA, _Experts()), names(_QK, "interleaved") + _NAMES + _EXPERTS, ""),
    Family("qwen2", "qwen2", (*_QWEN, Always(qkv_bias=True)), _NAMES + names(_QK), ""),
    Family("qwen3", "qwen3", (*_QWEN, Always(qk_norm=True)), _NAMES + names(_QK), ""),
    Family(
        "qwen3moe",
        "qwen3moe",
        (*_QWEN, _Experts("expert_feed_forward_length"), Always(qk_norm=True)),
        _NAMES + names(_QK) + _EXPERTS,
        "",
    ),
    Family(
        "gemma2",
        "gemma2",
        (
            *_GEMMA,
            _Gemma(period=2, largest=46, window=4096),
            Key("attention_softcap", "attn_logit_softcapping", 50.0, _not_zero),
            Key("logit_softcap", "final_logit_softcapping", 30.0, _not_zero),
            Always(tied_embeddings=True),
        ),
        _GEMMA_NAMES,
        "",
    ),
    Family(
        "gemma3",
        "gemma3",
        (
            *_GEMMA,
            _Gemma(period=6, largest=62),
            Key("local_rope_theta", "rope.freq_base_swa", 10000.0, _rounded),
            Key("logit_softcap", "final_logit_softcapping", 0.0, _rounded),
            Always(qk_norm=True),
        ),
        _GEMMA_NAMES,
        "",
    ),
    Family(
        "phi3",
        "phi3",
        (*_SIZES, _Heads(partly=True, free=False), _LongRope(), _Phi3Window()),
        _PHI3_NAMES,
        "",
    ),
)
