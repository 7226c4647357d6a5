"""Sizes in, sizes out, and what is refused."""

import pytest
from transformers import LlamaConfig

from danlu.core.config import make_config
from danlu.core.errors import UserError
from danlu.model.config import ModelConfig
from danlu.model.families import from_hf, to_hf


def test_transformers_reads_every_field() -> None:
    ours = ModelConfig(
        vocab_size=99, width=48, n_layers=3, n_heads=6, n_kv_heads=3, ffn_width=77, max_positions=123,
        rope_theta=777.0, norm_eps=1e-3, tied_embeddings=False,
    )  # fmt: skip
    theirs = LlamaConfig(**to_hf(ours))
    assert theirs.rope_parameters["rope_theta"] == 777.0
    assert from_hf(theirs.to_dict()) == ours


def test_config_of_transformers_4_is_read() -> None:
    values = to_hf(ModelConfig(rope_theta=5e5))
    del values["rope_parameters"], values["head_dim"]
    assert from_hf({**values, "rope_scaling": None}).rope_theta == 5e5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["T5ForConditionalGeneration"]}, "architecture 'T5ForConditionalGeneration'"),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 8}}, "rope_type is 'longrope'"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8}}, "low_freq_factor is missing"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor is missing"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"hidden_size": None}, "hidden_size is missing"),
        (
            {"num_attention_heads": 7, "num_key_value_heads": 7, "head_dim": None},
            "hidden_size 256 is not a multiple",
        ),
    ],
)
def test_what_is_not_implemented_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_hf({**to_hf(ModelConfig()), **change})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"width": 100, "n_heads": 8}, "width 100 is not a multiple of n_heads 8"),
        ({"width": 40, "n_heads": 8}, "the rotated width 5 of a head is odd"),
        ({"rope_width": 34}, "rope_width 34 is beyond head_width 32"),
        ({"n_experts": 2, "n_active": 3}, "n_active 3 is more than n_experts 2"),
        ({"head_bias": True}, "head_bias needs tied_embeddings false"),
        ({"one_norm": True}, "one_norm needs parallel_residual"),
        ({"parallel_residual": True, "norm_place": "both"}, "parallel_residual needs norm_place pre"),
        ({"n_heads": 8, "n_kv_heads": 3}, "n_heads 8 is not a multiple of n_kv_heads 3"),
        ({"widht": 64}, 'unknown key; did you mean "width"'),
    ],
)
def test_sizes_that_do_not_fit_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_config(ModelConfig, values)
