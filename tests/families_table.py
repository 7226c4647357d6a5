"""Small configs of each family for transformers, at least three a family, and models drawn at random."""

from typing import Any

import torch
import transformers
from torch import nn

BASE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
GPT = {"vocab_size": 128, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256}


def rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **more}}


LLAMA3 = rope(
    "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=64)
LONG = rope(
    "longrope", short_factor=[1 + i / 16 for i in range(8)], long_factor=[1.5 + i / 2 for i in range(8)]
)
LINEAR = rope("linear", factor=4.0)
DYNAMIC = {**rope("dynamic", factor=4.0), "max_position_embeddings": 64}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
GROUPED, ONE = {"num_key_value_heads": 2}, {"num_key_value_heads": 1}
FULL = {"num_key_value_heads": 4}
MOE = {"num_experts_per_tok": 2, "num_local_experts": 4}
QWEN_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "head_dim": 32}
GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 24, "sliding_window": 20}

# name of the config's class -> changes of it, one dict a case
CASES: dict[str, list[dict[str, Any]]] = {
    "OpenAIGPTConfig": [{}, {"n_head": 8, "n_layer": 2}, {"afn": "relu"}],
    "GPT2Config": [
        {},
        {"n_inner": 80, "activation_function": "gelu"},
        {"activation_function": "relu", **UNTIED, "n_head": 2},
    ],
    "OPTConfig": [
        {"ffn_dim": 96},
        {"ffn_dim": 96, "do_layer_norm_before": False, "word_embed_proj_dim": 32},
        {"ffn_dim": 80, "activation_function": "gelu", "word_embed_proj_dim": 64, **UNTIED},
    ],
    "GPTNeoXConfig": [
        {},
        {"use_parallel_residual": False, **TIED},
        {**rope("linear", factor=2.0, partial_rotary_factor=0.5), "hidden_act": "gelu_new"},
    ],
    "GPTJConfig": [{"rotary_dim": 8}, {"rotary_dim": 16, "n_inner": 80}, {"rotary_dim": 4, "n_head": 2}],
    "BloomConfig": [{"n_head": 4}, {"n_head": 8, "n_layer": 2}, {"n_head": 4, "layer_norm_epsilon": 1e-3}],
    "LlamaConfig": [
        {**FULL, **UNTIED},
        {**GROUPED, **TIED, **LLAMA3},
        {**ONE, **YARN, "attention_bias": True},
        {**GROUPED, **LINEAR, "mlp_bias": True},
        {**GROUPED, **DYNAMIC},
        {**GROUPED, "head_dim": 24},
    ],
    "MistralConfig": [
        {**FULL, "sliding_window": None},
        {**GROUPED, "sliding_window": 20},
        {**ONE, **YARN, **TIED, "sliding_window": 150},
    ],
    "MixtralConfig": [
        {**FULL, **MOE},
        {**GROUPED, **MOE, "sliding_window": 20},
        {**ONE, **MOE, **TIED, **LINEAR},
    ],
    "Qwen2Config": [
        {**FULL},
        {**GROUPED, **TIED, **YARN},
        {**GROUPED, "use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1},
    ],
    "Qwen3Config": [
        {**FULL, "head_dim": 32},
        {**GROUPED, **TIED, **YARN, "head_dim": 16},
        {**GROUPED, "head_dim": 32, "attention_bias": True, "use_sliding_window": True, "sliding_window": 20},
    ],
    "Qwen3MoeConfig": [
        {**FULL, **QWEN_MOE},
        {**GROUPED, **QWEN_MOE, **TIED, "norm_topk_prob": True, "mlp_only_layers": [1]},
        {**GROUPED, **QWEN_MOE, **LINEAR, "decoder_sparse_step": 2},
    ],
    "Gemma2Config": [
        {**GEMMA, **FULL},
        {**GEMMA, **GROUPED, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
        {**GEMMA, **ONE, "attn_logit_softcapping": None, "final_logit_softcapping": None},
    ],
    "Gemma3TextConfig": [
        {**GEMMA, **FULL},
        {**GEMMA, **GROUPED, "layer_types": ["full_attention", "sliding_attention", "full_attention"]},
        {
            **GEMMA,
            **ONE,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
            },
        },
    ],
    "Phi3Config": [
        {**FULL, "pad_token_id": 0},
        {**GROUPED, "pad_token_id": 0, "sliding_window": 20, **TIED},
        {**GROUPED, "pad_token_id": 0, **rope("default", partial_rotary_factor=0.5)},
        {**FULL, "pad_token_id": 0, **LONG, "original_max_position_embeddings": 512},
        {**GROUPED, "pad_token_id": 0, **LONG, "original_max_position_embeddings": 64},
    ],
    "SmolLM3Config": [
        {**FULL, "pad_token_id": 0, "no_rope_layer_interval": 2},
        {**GROUPED, "pad_token_id": 0, **UNTIED, "no_rope_layers": [1, 0, 0]},
        {**GROUPED, "pad_token_id": 0, **YARN, "attention_bias": True},
    ],
}


def make_theirs(name: str, case: dict[str, Any]) -> nn.Module:
    """A model of transformers, every tensor of it drawn so that a wrong one shows in the logits."""
    base = GPT if name in ("OpenAIGPTConfig", "GPT2Config", "GPTJConfig") else BASE
    if name == "BloomConfig":
        base = {"vocab_size": 128, "hidden_size": 64, "n_layer": 3}
    config = getattr(transformers, name)(**{**base, **case}, attn_implementation="eager")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    draw(model)
    return model


@torch.no_grad()
def draw(model: nn.Module) -> None:
    """Matrices that keep the size of what goes through them; vectors around what they begin with."""
    done = set()
    for parameter in model.parameters():
        if parameter in done:
            continue
        done.add(parameter)
        if parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter) * 0.3)
        else:
            parameter.copy_(torch.randn_like(parameter) * 2 * max(parameter.shape[-2:]) ** -0.5)
    embedding = model.get_input_embeddings().weight
    embedding.copy_(torch.randn_like(embedding) * 0.5)
