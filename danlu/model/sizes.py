"""Sizes of published models by name, and what their papers say that these count. Imports no torch.

`stated` is the papers' figure, digit for digit. Where danlu lacks a part that the paper's model has, the row
says which and how many parameters it has: the count of danlu's own model is without it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Fields = Mapping[str, Any]
"""Fields of a ModelConfig."""


@dataclass(frozen=True)
class Size:
    """One published model."""

    fields: Fields
    stated: str
    """Parameters as the paper prints them, e.g. "6.7B"."""
    stated_active: str = ""
    """Those that a token goes through, where the paper prints them."""
    without: int = 0
    """Parameters of the paper's model that danlu's hasn't."""
    note: str = ""
    """What these are, or where the paper is wrong about itself."""


@dataclass(frozen=True)
class Series:
    """The models of one paper; `fields` are those that all of them share."""

    paper: str
    fields: Fields
    sizes: Mapping[str, Size] = field(default_factory=dict)


def _mha(n_layers: int, width: int, n_heads: int, **more: Any) -> dict[str, Any]:
    """As many key-value heads as heads, and a feed-forward of four times the width."""
    sizes = {"n_layers": n_layers, "width": width, "n_heads": n_heads, "n_kv_heads": n_heads}
    return {**sizes, "ffn_width": 4 * width, **more}


_BIASED = {"norm": "layernorm", "qkv_bias": True, "out_bias": True, "ffn_bias": True}
_GPT = {**_BIASED, "positions": "learned", "ffn": "gelu_tanh", "family": "gpt2"}
_LLAMA = {"tied_embeddings": False, "norm_eps": 1e-6}


def _deepmind(stated: str, n_layers: int, width: int, n_heads: int, head_width: int) -> Size:
    """Gopher and Chinchilla: positions as in Transformer-XL, with a matrix of their own in each layer."""
    inner = n_heads * head_width
    fields = _mha(n_layers, width, n_heads, head_width=head_width)
    note = "relative positions as in Transformer-XL; here RoPE"
    return Size(fields, stated, without=n_layers * (width * inner + 2 * inner), note=note)


def _glam(
    stated: str,
    n_layers: int,
    width: int,
    n_heads: int,
    ffn: int,
    experts: int = 0,
    active: str = "",
    **more: Any,
) -> Size:
    """Every other layer has experts, which are not gated; positions have a bias in each layer, here RoPE."""
    note = more.pop("note", "")
    if experts:
        more |= {"n_experts": experts, "n_active": 2, "moe_layers": (False, True)}
    sizes = {**_mha(n_layers, width, n_heads, head_width=128 if width > 768 else 64), "ffn_width": ffn}
    return Size({**sizes, **more}, stated, active, note=note)


_GLAM_20B = "the paper's 20B doesn't fit its own rows: 27B with 64 experts, 53B with 128"
_GLAM_SMALL = "the paper counts 7 million fewer, which its table doesn't explain"

SERIES = (
    Series(
        "Radford et al. 2018: Improving language understanding by generative pre-training",
        {**_GPT, "norm_place": "post", "vocab_size": 40478, "max_positions": 512, "family": "openai-gpt"},
        {"gpt": Size(_mha(12, 768, 12), "117M")},
    ),
    Series(
        "Radford et al. 2019: Language models are unsupervised multitask learners, table 2; the counts are "
        "those of the released models, since the paper's (117M, 345M, 762M, 1542M) leave parts out",
        {**_GPT, "vocab_size": 50257, "max_positions": 1024},
        {
            "gpt2": Size(_mha(12, 768, 12), "124M"),
            "gpt2-medium": Size(_mha(24, 1024, 16), "355M"),
            "gpt2-large": Size(_mha(36, 1280, 20), "774M"),
            "gpt2-xl": Size(_mha(48, 1600, 25), "1558M"),
        },
    ),
    Series(
        "Brown et al. 2020: Language models are few-shot learners, table 2.1",
        {**_GPT, "vocab_size": 50257, "max_positions": 2048},
        {
            "gpt3-small": Size(_mha(12, 768, 12), "125M"),
            "gpt3-medium": Size(_mha(24, 1024, 16), "350M"),
            "gpt3-large": Size(_mha(24, 1536, 16), "760M"),
            "gpt3-xl": Size(
                _mha(24, 2048, 16), "1.3B", note="table 2.1 says 24 heads of 128, which is not 2048"
            ),
            "gpt3-2.7b": Size(_mha(32, 2560, 32), "2.7B"),
            "gpt3-6.7b": Size(_mha(32, 4096, 32), "6.7B"),
            "gpt3-13b": Size(_mha(40, 5120, 40), "13.0B", note="table 2.1 says a width of 5140"),
            "gpt3": Size(_mha(96, 12288, 96), "175.0B"),
        },
    ),
    Series(
        "Zhang et al. 2022: OPT: open pre-trained transformer language models, table 1",
        {
            **_BIASED,
            "positions": "learned", "position_offset": 2, "ffn": "relu", "family": "opt",
            "vocab_size": 50272, "max_positions": 2048,
        },
        {
            "opt-125m": Size(_mha(12, 768, 12), "125M"),
            "opt-350m": Size(_mha(24, 1024, 16, norm_place="post", embedding_width=512), "350M"),
            "opt-1.3b": Size(_mha(24, 2048, 32), "1.3B"),
            "opt-2.7b": Size(_mha(32, 2560, 32), "2.7B"),
            "opt-6.7b": Size(_mha(32, 4096, 32), "6.7B"),
            "opt-13b": Size(_mha(40, 5120, 40), "13B"),
            "opt-30b": Size(_mha(48, 7168, 56), "30B"),
            "opt-66b": Size(_mha(64, 9216, 72), "66B"),
            "opt-175b": Size(_mha(96, 12288, 96), "175B"),
        },
    ),
    Series(
        "Touvron et al. 2023: LLaMA: open and efficient foundation language models, table 2",
        {**_LLAMA, "vocab_size": 32000, "max_positions": 2048},
        {
            "llama-7b": Size({**_mha(32, 4096, 32), "ffn_width": 11008}, "6.7B"),
            "llama-13b": Size({**_mha(40, 5120, 40), "ffn_width": 13824}, "13.0B"),
            "llama-33b": Size({**_mha(60, 6656, 52), "ffn_width": 17920}, "32.5B"),
            "llama-65b": Size({**_mha(80, 8192, 64), "ffn_width": 22016}, "65.2B"),
        },
    ),
    Series(
        "Rae et al. 2021: Scaling language models: methods, analysis and insights from training Gopher"
        ", table 1",
        {"vocab_size": 32000, "max_positions": 2048, "ffn": "gelu", "ffn_bias": True, "qkv_bias": True,
         "out_bias": True},
        {
            "gopher-44m": _deepmind("44M", 8, 512, 16, 32),
            "gopher-117m": _deepmind("117M", 12, 768, 12, 64),
            "gopher-417m": _deepmind("417M", 12, 1536, 12, 128),
            "gopher-1.4b": _deepmind("1.4B", 24, 2048, 16, 128),
            "gopher-7.1b": _deepmind("7.1B", 32, 4096, 32, 128),
            "gopher": _deepmind("280B", 80, 16384, 128, 128),
        },
    ),
    Series(
        "Hoffmann et al. 2022: Training compute-optimal large language models, table 4",
        {"vocab_size": 32000, "max_positions": 2048, "ffn": "gelu", "ffn_bias": True, "qkv_bias": True,
         "out_bias": True},
        {"chinchilla": _deepmind("70B", 80, 8192, 64, 128)},
    ),
    Series(
        "Du et al. 2022: GLaM: efficient scaling of language models with mixture-of-experts, table 4; a "
        "vocabulary of 32,000 gives the counts of all models but the largest, 256,000 (section 5) that one's",
        {"vocab_size": 32000, "max_positions": 1024, "ffn": "geglu", "expert_ffn": "gelu", "family": "danlu"},
        {
            "glam-0.1b": _glam("130M", 12, 768, 12, 3072, note=_GLAM_SMALL),
            "glam-0.1b-64e": _glam("1.9B", 12, 768, 12, 3072, 64, "145M", note=_GLAM_SMALL),
            "glam-1.7b": _glam("1.7B", 24, 2048, 16, 8192),
            "glam-1.7b-32e": _glam("20B", 24, 2048, 16, 8192, 32, "1.878B", note=_GLAM_20B),
            "glam-1.7b-64e": _glam("27B", 24, 2048, 16, 8192, 64, "1.879B"),
            "glam-1.7b-128e": _glam("53B", 24, 2048, 16, 8192, 128, "1.881B"),
            "glam-1.7b-256e": _glam("105B", 24, 2048, 16, 8192, 256, "1.886B"),
            "glam-8b": _glam("8.7B", 32, 4096, 32, 16384),
            "glam-8b-64e": _glam("143B", 32, 4096, 32, 16384, 64, "9.8B"),
            "glam-137b": _glam("137B", 64, 8192, 128, 65536),
            "glam": _glam("1.2T", 64, 8192, 128, 32768, 64, "96.6B", vocab_size=256000),
        },
    ),
    Series(
        "Wu et al. 2023: BloombergGPT: a large language model for finance, table 4",
        {
            **_BIASED,
            "positions": "alibi", "ffn": "gelu_tanh", "embedding_norm": True, "family": "bloom",
            "vocab_size": 131072, "max_positions": 2048,
        },
        {"bloomberggpt": Size(_mha(70, 7680, 40), "50.6B")},
    ),
    Series(
        "Zhang et al. 2021: CPM: a large-scale generative Chinese pre-trained language model, table 1",
        {**_GPT, "vocab_size": 30000, "max_positions": 1024},
        {
            "cpm-small": Size(_mha(12, 768, 12), "109M"),
            "cpm-medium": Size(_mha(24, 1024, 16), "334M"),
            "cpm-large": Size(_mha(32, 2560, 32), "2.6B"),
        },
    ),
)  # fmt: skip

SIZES: dict[str, Size] = {name: size for series in SERIES for name, size in series.sizes.items()}


def fields_of(name: str) -> dict[str, Any]:
    """The fields of the ModelConfig of a named size. Raises ValueError for another name."""
    for series in SERIES:
        if name in series.sizes:
            return {**series.fields, **series.sizes[name].fields}
    raise ValueError(f'no size is called "{name}"; `danlu sizes` lists them')
