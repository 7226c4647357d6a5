"""What the families call their tensors: tables of names, by kinds of layout (`layouts.py`)."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Names:
    """Our module (or several, where theirs holds them all) and theirs; `{i}` the layer, `{e}` the expert."""

    ours: tuple[str, ...]
    theirs: str
    layout: str = "stacked"


SCORE = Names(("score",), "score")
"""Of a model with scores: the same in all families."""


def names(table: Mapping[str, str], layout: str = "stacked") -> tuple[Names, ...]:
    """Rows of {ours: theirs}; several of ours are separated by spaces."""
    return tuple(Names(tuple(ours.split()), theirs, layout) for ours, theirs in table.items())


_QKV = "layers.{i}.attention.q layers.{i}.attention.k layers.{i}.attention.v"
_LAYER = "model.layers.{i}."
_OUTER = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
_NORMS = {
    "layers.{i}.attention_norm": _LAYER + "input_layernorm",
    "layers.{i}.ffn_norm": _LAYER + "post_attention_layernorm",
}
_ATTENTION = {
    "layers.{i}.attention.q": _LAYER + "self_attn.q_proj",
    "layers.{i}.attention.k": _LAYER + "self_attn.k_proj",
    "layers.{i}.attention.v": _LAYER + "self_attn.v_proj",
    "layers.{i}.attention.out": _LAYER + "self_attn.o_proj",
    "layers.{i}.attention.q_norm": _LAYER + "self_attn.q_norm",
    "layers.{i}.attention.k_norm": _LAYER + "self_attn.k_norm",
}
_FFN = {
    "layers.{i}.ffn.gate": _LAYER + "mlp.gate_proj",
    "layers.{i}.ffn.up": _LAYER + "mlp.up_proj",
    "layers.{i}.ffn.down": _LAYER + "mlp.down_proj",
}
LLAMA_NAMES = names({**_OUTER, **_NORMS, **_ATTENTION, **_FFN})

MIXTRAL_NAMES = names(
    {
        **_OUTER,
        **_NORMS,
        **_ATTENTION,
        "layers.{i}.ffn.router": _LAYER + "block_sparse_moe.gate",
        "layers.{i}.ffn.experts.{e}.gate": _LAYER + "block_sparse_moe.experts.{e}.w1",
        "layers.{i}.ffn.experts.{e}.up": _LAYER + "block_sparse_moe.experts.{e}.w3",
        "layers.{i}.ffn.experts.{e}.down": _LAYER + "block_sparse_moe.experts.{e}.w2",
    }
)
QWEN_MOE_NAMES = LLAMA_NAMES + names(
    {
        "layers.{i}.ffn.router": _LAYER + "mlp.gate",
        "layers.{i}.ffn.experts.{e}.gate": _LAYER + "mlp.experts.{e}.gate_proj",
        "layers.{i}.ffn.experts.{e}.up": _LAYER + "mlp.experts.{e}.up_proj",
        "layers.{i}.ffn.experts.{e}.down": _LAYER + "mlp.experts.{e}.down_proj",
    }
)
_GEMMA_INNER = {
    "layers.{i}.attention_norm": _LAYER + "input_layernorm",
    "layers.{i}.attention_post_norm": _LAYER + "post_attention_layernorm",
    "layers.{i}.ffn_norm": _LAYER + "pre_feedforward_layernorm",
    "layers.{i}.ffn_post_norm": _LAYER + "post_feedforward_layernorm",
    **_ATTENTION,
    **_FFN,
}
GEMMA_NAMES = names({**_OUTER, **_GEMMA_INNER})
PHI3_NAMES = names(
    {
        **_OUTER,
        **_NORMS,
        _QKV: _LAYER + "self_attn.qkv_proj",
        "layers.{i}.attention.out": _LAYER + "self_attn.o_proj",
        "layers.{i}.ffn.gate layers.{i}.ffn.up": _LAYER + "mlp.gate_up_proj",
        "layers.{i}.ffn.down": _LAYER + "mlp.down_proj",
    }
)

_GPT_MATRICES = names(
    {
        _QKV: "transformer.h.{i}.attn.c_attn",
        "layers.{i}.attention.out": "transformer.h.{i}.attn.c_proj",
        "layers.{i}.ffn.up": "transformer.h.{i}.mlp.c_fc",
        "layers.{i}.ffn.down": "transformer.h.{i}.mlp.c_proj",
    },
    "transposed",
)
_GPT_NORMS = {
    "layers.{i}.attention_norm": "transformer.h.{i}.ln_1",
    "layers.{i}.ffn_norm": "transformer.h.{i}.ln_2",
    "head": "lm_head",
}
GPT_NAMES = _GPT_MATRICES + names(
    {
        **_GPT_NORMS,
        "embedding": "transformer.tokens_embed",
        "position_embedding": "transformer.positions_embed",
    }
)
GPT2_NAMES = _GPT_MATRICES + names(
    {
        **_GPT_NORMS,
        "embedding": "transformer.wte",
        "position_embedding": "transformer.wpe",
        "norm": "transformer.ln_f",
    }
)
_OPT_LAYER = "model.decoder.layers.{i}."
OPT_NAMES = names(
    {
        "embedding": "model.decoder.embed_tokens",
        "position_embedding": "model.decoder.embed_positions",
        "embedding_in": "model.decoder.project_in",
        "embedding_out": "model.decoder.project_out",
        "norm": "model.decoder.final_layer_norm",
        "head": "lm_head",
        "layers.{i}.attention_norm": _OPT_LAYER + "self_attn_layer_norm",
        "layers.{i}.ffn_norm": _OPT_LAYER + "final_layer_norm",
        "layers.{i}.attention.q": _OPT_LAYER + "self_attn.q_proj",
        "layers.{i}.attention.k": _OPT_LAYER + "self_attn.k_proj",
        "layers.{i}.attention.v": _OPT_LAYER + "self_attn.v_proj",
        "layers.{i}.attention.out": _OPT_LAYER + "self_attn.out_proj",
        "layers.{i}.ffn.up": _OPT_LAYER + "fc1",
        "layers.{i}.ffn.down": _OPT_LAYER + "fc2",
    }
)
_NEOX_LAYER = "gpt_neox.layers.{i}."
NEOX_NAMES = names({_QKV: _NEOX_LAYER + "attention.query_key_value"}, "by_head") + names(
    {
        "embedding": "gpt_neox.embed_in",
        "norm": "gpt_neox.final_layer_norm",
        "head": "embed_out",
        "layers.{i}.attention_norm": _NEOX_LAYER + "input_layernorm",
        "layers.{i}.ffn_norm": _NEOX_LAYER + "post_attention_layernorm",
        "layers.{i}.attention.out": _NEOX_LAYER + "attention.dense",
        "layers.{i}.ffn.up": _NEOX_LAYER + "mlp.dense_h_to_4h",
        "layers.{i}.ffn.down": _NEOX_LAYER + "mlp.dense_4h_to_h",
    }
)
GPTJ_NAMES = names(
    {
        "layers.{i}.attention.q": "transformer.h.{i}.attn.q_proj",
        "layers.{i}.attention.k": "transformer.h.{i}.attn.k_proj",
    },
    "interleaved",
) + names(
    {
        "embedding": "transformer.wte",
        "norm": "transformer.ln_f",
        "head": "lm_head",
        "layers.{i}.attention_norm": "transformer.h.{i}.ln_1",
        "layers.{i}.attention.v": "transformer.h.{i}.attn.v_proj",
        "layers.{i}.attention.out": "transformer.h.{i}.attn.out_proj",
        "layers.{i}.ffn.up": "transformer.h.{i}.mlp.fc_in",
        "layers.{i}.ffn.down": "transformer.h.{i}.mlp.fc_out",
    }
)
_BLOOM_LAYER = "transformer.h.{i}."
BLOOM_NAMES = names({_QKV: _BLOOM_LAYER + "self_attention.query_key_value"}, "by_head") + names(
    {
        "embedding": "transformer.word_embeddings",
        "embedding_norm": "transformer.word_embeddings_layernorm",
        "norm": "transformer.ln_f",
        "head": "lm_head",
        "layers.{i}.attention_norm": _BLOOM_LAYER + "input_layernorm",
        "layers.{i}.ffn_norm": _BLOOM_LAYER + "post_attention_layernorm",
        "layers.{i}.attention.out": _BLOOM_LAYER + "self_attention.dense",
        "layers.{i}.ffn.up": _BLOOM_LAYER + "mlp.dense_h_to_4h",
        "layers.{i}.ffn.down": _BLOOM_LAYER + "mlp.dense_4h_to_h",
    }
)

OWN_NAMES = names(
    {
        name: name
        for name in (
            *("embedding", "position_embedding", "embedding_in", "embedding_norm", "embedding_out"),
            *("norm", "head", *_GEMMA_INNER, "layers.{i}.ffn.router"),
            *(f"layers.{{i}}.ffn.experts.{{e}}.{part}" for part in ("gate", "up", "down")),
        )
    }
)
