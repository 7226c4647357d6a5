"""The families of published models: how each says its config, and what it calls its tensors.

A family is a row of data: rules for config.json (`rules.py`) and names of tensors (`layouts.py` for those
that it keeps otherwise than we do). Nothing else in danlu knows a model by its name.
"""

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from danlu.core.errors import UserError
from danlu.model.config import ModelConfig
from danlu.model.family_names import (
    BLOOM_NAMES,
    GEMMA_NAMES,
    GPT2_NAMES,
    GPT_NAMES,
    GPTJ_NAMES,
    LLAMA_NAMES,
    MIXTRAL_NAMES,
    NEOX_NAMES,
    OPT_NAMES,
    OWN_NAMES,
    PHI3_NAMES,
    QWEN_MOE_NAMES,
    Names,
)
from danlu.model.rules import HF, Always, Key, Only, Rope, Rule, Width, Windows, choice, optional

OWN = "danlu"
"""The family that says anything, and that only danlu loads."""


@dataclass(frozen=True)
class Family:
    """One row. `prefix`: what some files leave out before a tensor's name."""

    model_type: str
    architecture: str
    rules: tuple[Rule, ...]
    names: tuple[Names, ...]
    prefix: str = "model."
    ignored: tuple[str, ...] = field(default=("rotary_emb.inv_freq",))
    """Ends of the names of tensors that are no weights."""

    @property
    def classifier(self) -> str:
        """The architecture with scores in place of the output matrix."""
        return self.architecture.replace("ForCausalLM", _SCORED).replace("LMHeadModel", _SCORED)


_SCORED = "ForSequenceClassification"


# Rules


def _head_width(hf: HF) -> int:
    width, heads = hf["hidden_size"], hf["num_attention_heads"]
    if width % heads:
        raise UserError(f"hidden_size {width} is not a multiple of num_attention_heads {heads}")
    return width // heads


def _sizes(
    tied: bool = False, kv: Any = None, positions: int = 2048, head: Any = _head_width
) -> tuple[Rule, ...]:
    """Keys that most families share. `kv`, `head`: defaults of the key-value heads and of a head's width."""
    return (
        Key("vocab_size", "vocab_size"),
        Key("width", "hidden_size"),
        Key("n_layers", "num_hidden_layers"),
        Key("n_heads", "num_attention_heads"),
        Key("n_kv_heads", "num_key_value_heads", kv or (lambda hf: hf["num_attention_heads"])),
        Key("head_width", "head_dim", head),
        Key("ffn_width", "intermediate_size"),
        Key("max_positions", "max_position_embeddings", positions),
        Key("tied_embeddings", "tie_word_embeddings", tied),
    )


def _gpt_sizes(inner: bool, tied: bool) -> tuple[Rule, ...]:
    """Those of OpenAI's families. `inner`: whether the feed-forward's width has a key."""
    four = lambda hf: 4 * hf["n_embd"]  # noqa: E731
    return (
        Key("vocab_size", "vocab_size"),
        Key("width", "n_embd"),
        Key("n_layers", "n_layer"),
        Key("n_heads", "n_head"),
        Always(n_kv_heads=lambda hf: hf["n_head"]),
        Key("ffn_width", "n_inner", four) if inner else Always(ffn_width=four),
        Key("max_positions", "n_positions", 1024),
        Key("norm_eps", "layer_norm_epsilon", 1e-5),
        Key("tied_embeddings", "tie_word_embeddings", tied),
    )


_SILU = Only(hidden_act="silu")
_GATED = {"silu": "swiglu", "gelu": "geglu", "gelu_pytorch_tanh": "geglu_tanh"}
_PLAIN = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
_rms = partial(Key, "norm_eps", "rms_norm_eps")
_LAYER_NORM = {"norm": "layernorm"}
_BIASES = {"qkv_bias": True, "out_bias": True, "ffn_bias": True}


def _attention_bias(hf: HF) -> bool:
    return bool(hf.get("attention_bias", False))


class _LlamaBias:
    """attention_bias: of all four matrices."""

    def read(self, hf: HF) -> dict[str, Any]:
        return {"qkv_bias": _attention_bias(hf), "out_bias": _attention_bias(hf)}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {"attention_bias": config.qkv_bias}


class _LayersWithoutRope:
    """SmolLM3: no_rope_layers holds 1 for a layer that rotates."""

    def read(self, hf: HF) -> dict[str, Any]:
        every = hf.get("no_rope_layer_interval", 4)
        flags = hf.get("no_rope_layers") or [(i + 1) % every for i in range(hf["num_hidden_layers"])]
        return {"rope_layers": tuple(bool(flag) for flag in flags)}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        flags = [config.rope_theta_of(layer) is not None for layer in range(config.n_layers)]
        return {"no_rope_layers": [int(flag) for flag in flags]}


class _SparseLayers:
    """Qwen3-MoE: every decoder_sparse_step-th layer has experts, but for mlp_only_layers."""

    def read(self, hf: HF) -> dict[str, Any]:
        step, dense = hf.get("decoder_sparse_step", 1), hf.get("mlp_only_layers") or []
        layers = range(hf["num_hidden_layers"])
        return {"moe_layers": tuple((i + 1) % step == 0 and i not in dense for i in layers)}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        dense = [i for i in range(config.n_layers) if not config.has_experts(i)]
        return {"decoder_sparse_step": 1, "mlp_only_layers": dense}


class _Whole:
    """danlu's own: the fields as they are, for what no published family can say."""

    def read(self, hf: HF) -> dict[str, Any]:
        return dict(hf["danlu"])

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {"danlu": config.model_dump(mode="json", exclude={"family"})}


def _after_max_window_layers(hf: HF) -> list[bool]:
    return [i >= hf.get("max_window_layers", 28) for i in range(hf["num_hidden_layers"])]


def _but_every(n: int, key: str) -> Any:
    def flags(hf: HF) -> list[bool]:
        return [(i + 1) % hf.get(key, n) != 0 for i in range(hf["num_hidden_layers"])]

    return flags


_GEMMA = (
    *_sizes(tied=True, positions=8192, head=256, kv=lambda hf: 4),
    _rms(1e-6),
    choice("ffn", "hidden_activation", "gelu_pytorch_tanh", _GATED),
    _LlamaBias(),
    Key(
        "attention_scale",
        "query_pre_attn_scalar",
        256,
        lambda value: value**-0.5,
        lambda scale: round(scale**-2) if scale else None,
    ),
    Always(
        norm_plus_one=True, norm_place="both", embedding_scale=lambda hf: math.sqrt(hf["hidden_size"])
    ),
)  # fmt: skip

FAMILIES = (
    Family(
        "llama",
        "LlamaForCausalLM",
        (
            *_sizes(),
            _rms(1e-6),
            Rope(),
            _SILU,
            _LlamaBias(),
            Key("ffn_bias", "mlp_bias", False),
        ),
        LLAMA_NAMES,
    ),
    Family(
        "mistral",
        "MistralForCausalLM",
        (*_sizes(positions=4096 * 32, kv=lambda hf: 8), _rms(1e-6), Rope(), _SILU, Windows(4096)),
        LLAMA_NAMES,
    ),
    Family(
        "qwen2",
        "Qwen2ForCausalLM",
        (
            *_sizes(positions=32768, kv=lambda hf: 32),
            _rms(1e-6),
            Rope(),
            _SILU,
            Windows(4096, "use_sliding_window", _after_max_window_layers),
            Always(qkv_bias=True),
        ),
        LLAMA_NAMES,
    ),
    Family(
        "qwen3",
        "Qwen3ForCausalLM",
        (
            *_sizes(positions=32768, kv=lambda hf: 32, head=128),
            _rms(1e-6),
            Rope(),
            _SILU,
            _LlamaBias(),
            Windows(4096, "use_sliding_window", _after_max_window_layers),
            Always(qk_norm=True),
        ),
        LLAMA_NAMES,
    ),
    Family(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        (
            *_sizes(positions=32768, kv=lambda hf: 4),
            _rms(1e-6),
            Rope(),
            _SILU,
            _LlamaBias(),
            Windows(4096, "use_sliding_window"),
            Key("n_experts", "num_experts", lambda hf: hf.get("num_local_experts", 128)),
            Key("n_active", "num_experts_per_tok", 8),
            Width("expert_width", "moe_intermediate_size", "ffn_width", 768),
            Key("normalised_experts", "norm_topk_prob", False),
            _SparseLayers(),
            Always(qk_norm=True),
        ),
        QWEN_MOE_NAMES,
    ),
    Family(
        "mixtral",
        "MixtralForCausalLM",
        (
            *_sizes(positions=4096 * 32, kv=lambda hf: 8),
            _rms(1e-5),
            Rope(1e6),
            _SILU,
            Windows(),
            Key("n_experts", "num_local_experts", 8),
            Key("n_active", "num_experts_per_tok", 2),
        ),
        MIXTRAL_NAMES,
    ),
    Family(
        "smollm3",
        "SmolLM3ForCausalLM",
        (
            *_sizes(tied=True, positions=32768, kv=lambda hf: 4),
            _rms(1e-6),
            Rope(2e6),
            _SILU,
            _LlamaBias(),
            Key("ffn_bias", "mlp_bias", False),
            Only(use_sliding_window=False),
            _LayersWithoutRope(),
        ),
        LLAMA_NAMES,
    ),
    Family(
        "phi3",
        "Phi3ForCausalLM",
        (
            *_sizes(positions=4096),
            _rms(1e-5),
            Rope(partial=1.0, kinds=("longrope",)),
            _SILU,
            Windows(),
        ),
        PHI3_NAMES,
    ),
    Family(
        "gemma2",
        "Gemma2ForCausalLM",
        (
            *_GEMMA,
            Rope(),
            Windows(4096, pattern=_but_every(2, "sliding_window_pattern")),
            optional("attention_softcap", "attn_logit_softcapping", 50.0),
            optional("logit_softcap", "final_logit_softcapping", 30.0),
        ),
        GEMMA_NAMES,
    ),
    Family(
        "gemma3_text",
        "Gemma3ForCausalLM",
        (
            *_GEMMA,
            Rope(1e6, nested=True),
            Windows(4096, pattern=_but_every(6, "sliding_window_pattern")),
            optional("attention_softcap", "attn_logit_softcapping"),
            optional("logit_softcap", "final_logit_softcapping"),
            Always(qk_norm=True),
        ),
        GEMMA_NAMES,
    ),
    Family(
        "openai-gpt",
        "OpenAIGPTLMHeadModel",
        (
            *_gpt_sizes(inner=False, tied=True),
            # Its "gelu" is the approximation with tanh.
            choice("ffn", "afn", "gelu", {"gelu": "gelu_tanh", "relu": "relu", "silu": "silu"}),
            Always(positions="learned", norm_place="post", **_LAYER_NORM, **_BIASES),
        ),
        GPT_NAMES,
        "transformer.",
        (".attn.bias",),
    ),
    Family(
        "gpt2",
        "GPT2LMHeadModel",
        (
            *_gpt_sizes(inner=True, tied=True),
            choice("ffn", "activation_function", "gelu_new", _PLAIN),
            Only(scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False),
            Always(positions="learned", **_LAYER_NORM, **_BIASES),
        ),
        GPT2_NAMES,
        "transformer.",
        (".attn.bias", ".attn.masked_bias"),
    ),
    Family(
        "opt",
        "OPTForCausalLM",
        (
            Key("vocab_size", "vocab_size"),
            Key("width", "hidden_size"),
            Key("n_layers", "num_hidden_layers"),
            Key("n_heads", "num_attention_heads"),
            Key("ffn_width", "ffn_dim"),
            Key("max_positions", "max_position_embeddings", 2048),
            Key("tied_embeddings", "tie_word_embeddings", True),
            Width("embedding_width", "word_embed_proj_dim", "width", lambda hf: hf["hidden_size"]),
            choice("ffn", "activation_function", "relu", _PLAIN),
            Key(
                "norm_place",
                "do_layer_norm_before",
                True,
                lambda before: "pre" if before else "post",
                lambda place: place == "pre",
            ),
            Only(enable_bias=True, layer_norm_elementwise_affine=True, _remove_final_layer_norm=False),
            Always(
                n_kv_heads=lambda hf: hf["num_attention_heads"],
                positions="learned",
                position_offset=2,
                norm_eps=1e-5,
                **_LAYER_NORM,
                **_BIASES,
            ),
        ),
        OPT_NAMES,
    ),
    Family(
        "gpt_neox",
        "GPTNeoXForCausalLM",
        (
            Key("vocab_size", "vocab_size"),
            Key("width", "hidden_size"),
            Key("n_layers", "num_hidden_layers"),
            Key("n_heads", "num_attention_heads"),
            Key("ffn_width", "intermediate_size"),
            Key("max_positions", "max_position_embeddings", 2048),
            Key("norm_eps", "layer_norm_eps", 1e-5),
            Key("tied_embeddings", "tie_word_embeddings", False),
            Key("parallel_residual", "use_parallel_residual", True),
            choice("ffn", "hidden_act", "gelu", _PLAIN),
            Rope(partial=0.25, theta_key="rotary_emb_base", partial_key="rotary_pct"),
            Only(attention_bias=True),
            Always(n_kv_heads=lambda hf: hf["num_attention_heads"], **_LAYER_NORM, **_BIASES),
        ),
        NEOX_NAMES,
        "gpt_neox.",
        (".attention.bias", ".attention.masked_bias", "rotary_emb.inv_freq"),
    ),
    Family(
        "gptj",
        "GPTJForCausalLM",
        (
            *_gpt_sizes(inner=True, tied=False),
            Width("rope_width", "rotary_dim", "head_width", 64),
            choice("ffn", "activation_function", "gelu_new", _PLAIN),
            Always(
                parallel_residual=True, one_norm=True, ffn_bias=True, head_bias=True, **_LAYER_NORM
            ),
        ),
        GPTJ_NAMES,
        "transformer.",
        (".attn.bias", ".attn.masked_bias"),
    ),
    Family(
        "bloom",
        "BloomForCausalLM",
        (
            Key("vocab_size", "vocab_size"),
            Key("width", "hidden_size", lambda hf: hf.get("n_embed")),
            Key("n_layers", "n_layer", lambda hf: hf.get("num_hidden_layers")),
            Key("n_heads", "n_head", lambda hf: hf.get("num_attention_heads")),
            Key("max_positions", "seq_length", 2048),
            Key("norm_eps", "layer_norm_epsilon", 1e-5),
            Key("tied_embeddings", "tie_word_embeddings", True),
            Only(apply_residual_connection_post_layernorm=False),
            Always(
                n_kv_heads=lambda hf: hf.get("n_head") or hf.get("num_attention_heads"),
                ffn_width=lambda hf: 4 * (hf.get("hidden_size") or hf["n_embed"]),
                ffn="gelu_tanh",
                positions="alibi",
                embedding_norm=True,
                **_LAYER_NORM,
                **_BIASES,
            ),
        ),
        BLOOM_NAMES,
        "transformer.",
    ),
    Family(OWN, "DanluForCausalLM", (_Whole(),), OWN_NAMES, ""),
)  # fmt: skip


def find(hf: HF, where: str = "config.json") -> Family:
    """The family of a config.json. Raises UserError naming those that danlu knows."""
    architecture = (hf.get("architectures") or [None])[0]
    for family in FAMILIES:
        if architecture in (family.architecture, family.classifier) or (
            architecture is None and hf.get("model_type") == family.model_type
        ):
            return family
    known = ", ".join(family.architecture for family in FAMILIES)
    raise UserError(f"{where}: architecture {architecture or hf.get('model_type')!r}", f"danlu knows {known}")


def from_hf(hf: HF, where: str = "config.json") -> ModelConfig:
    """Reads a config.json (of transformers 4 or 5).

    Raises UserError naming the first setting that danlu does not implement.
    """
    family = find(hf, where)
    try:
        return _read(family, hf)
    except UserError as error:
        raise UserError(f"{where}: {error.message}", error.remedy) from None
    except (KeyError, TypeError, ValueError) as error:
        text = f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{where}: {text}", "the config.json is incomplete or damaged") from None


def _read(family: Family, hf: HF) -> ModelConfig:
    fields: dict[str, Any] = {"family": family.model_type}
    for rule in family.rules:
        fields |= rule.read(hf)
    if (hf.get("architectures") or [None])[0] == family.classifier:
        fields |= {"scores": len(hf.get("id2label") or range(2)), "tied_embeddings": True}
    return ModelConfig(**fields)


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """The content of a config.json that transformers, vLLM and llama.cpp read.

    The config's own family, or the first that can say the same; danlu's own (`OWN`) where none can.
    """
    return _express(config)[1]


def family_of(config: ModelConfig) -> Family:
    """The family that `config` is saved as."""
    return _express(config)[0]


def _express(config: ModelConfig) -> tuple[Family, dict[str, Any]]:
    own = [family for family in FAMILIES if family.model_type == config.family]
    for family in (*own, *FAMILIES):
        hf: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.model_type}
        if config.scores:
            labels = [f"LABEL_{number}" for number in range(config.scores)]
            hf["architectures"] = [family.classifier]
            hf["id2label"] = {str(number): label for number, label in enumerate(labels)}
            hf["label2id"] = {label: number for number, label in enumerate(labels)}
        for rule in family.rules:
            hf |= rule.write(config)
        try:
            same = _read(family, hf).model_copy(update={"family": config.family}) == config
        except (UserError, KeyError, TypeError, ValueError):
            continue
        if same:
            return family, hf
    raise AssertionError("danlu's own family says everything")
