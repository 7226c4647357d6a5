"""Sizes in, sizes out, and what is refused."""

import pytest
from transformers import LlamaConfig

from danlu.core.config import make_config
from danlu.core.errors import UserError
from danlu.model.config import ModelConfig


def test_transformers_reads_every_field() -> None:
    ours = ModelConfig(
        vocab_size=99, width=48, n_layers=3, n_heads=6, n_kv_heads=3, ffn_width=77, max_positions=123,
        rope_theta=777.0, norm_eps=1e-3, tied_embeddings=False,
    )  # fmt: skip
    theirs = LlamaConfig(**ours.to_hf())
    assert theirs.rope_parameters["rope_theta"] == 777.0
    assert ModelConfig.from_hf(theirs.to_dict()) == ours


def test_config_of_transformers_4_is_read() -> None:
    values = ModelConfig(rope_theta=5e5).to_hf()
    del values["rope_parameters"], values["head_dim"]
    assert ModelConfig.from_hf({**values, "rope_scaling": None}).rope_theta == 5e5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architecture 'GPT2LMHeadModel'"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8}}, "rope_type is 'llama3'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"head_dim": 99}, "head_dim is 99"),
    ],
)
def test_what_is_not_implemented_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ModelConfig.from_hf({**ModelConfig().to_hf(), **change})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"width": 100, "n_heads": 8}, "width 100 is not an even multiple of n_heads 8"),
        ({"n_heads": 8, "n_kv_heads": 3}, "n_heads 8 is not a multiple of n_kv_heads 3"),
        ({"widht": 64}, 'unknown key; did you mean "width"'),
    ],
)
def test_sizes_that_do_not_fit_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_config(ModelConfig, values)
