"""The transformer against transformers' LLaMA, and against itself read in other ways."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from danlu.core.errors import UserError
from danlu.model.cache import KVCache
from danlu.model.checkpoint import hf_tensors
from danlu.model.config import ModelConfig
from danlu.model.families import to_hf
from danlu.model.transformer import Transformer

SIZES = ModelConfig(
    vocab_size=300, width=64, n_layers=2, n_heads=4, n_kv_heads=2, ffn_width=96, max_positions=300
)


def make(**changes: object) -> Transformer:
    """A model whose weights are large enough that a wrong one shows."""
    torch.manual_seed(0)
    model = Transformer(SIZES.model_copy(update=changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def oracle(model: Transformer) -> LlamaForCausalLM:
    theirs = LlamaForCausalLM(LlamaConfig(**to_hf(model.config), attn_implementation="eager"))
    state = hf_tensors(model.config, model.state_dict())
    missing, unknown = theirs.load_state_dict(state, strict=False)
    assert not unknown
    assert not [name for name in missing if name != "lm_head.weight"]
    return theirs


def ids(rows: int, tokens: int) -> torch.Tensor:
    return torch.randint(0, 300, (rows, tokens), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_logits_are_those_of_transformers(tied: bool, n_kv_heads: int, theta: float) -> None:
    model = make(tied_embeddings=tied, n_kv_heads=n_kv_heads, rope_theta=theta)
    batch = ids(2, 270)  # three blocks of queries, the last one short
    with torch.no_grad():
        expected = oracle(model)(batch).logits
        torch.testing.assert_close(model(batch), expected, atol=1e-4, rtol=0)


def test_gradients_are_those_of_transformers() -> None:
    model = make()
    theirs = oracle(model)
    batch = ids(2, 200)
    weights = torch.randn(2, 200, 300)
    (model(batch) * weights).sum().backward()
    (theirs(batch).logits * weights).sum().backward()
    expected = dict(theirs.named_parameters())
    ours = hf_tensors(model.config, {name: p.grad for name, p in model.named_parameters()})
    for name, grad in ours.items():
        torch.testing.assert_close(grad, expected[name].grad, atol=5e-3, rtol=1e-4)


def test_packed_logits_are_unpacked_logits() -> None:
    model = make()
    lengths = [1, 130, 2, 100, 40]
    documents = [ids(1, length) for length in lengths]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    segments = torch.cat([torch.full((n,), i, dtype=torch.int32) for i, n in enumerate(lengths)])[None]
    with torch.no_grad():
        packed = model(torch.cat(documents, dim=1), positions, segments)
        alone = torch.cat([model(document) for document in documents], dim=1)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("step", [1, 7])
def test_cache_gives_the_logits_of_a_whole_pass(step: int) -> None:
    model, batch = make(), ids(3, 40)
    cache = KVCache(model.config, 3, 40)
    with torch.no_grad():
        pieces = [model(piece, cache=cache) for piece in batch.split(step, dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), model(batch), atol=1e-5, rtol=0)


def test_rows_of_different_length_decode_together() -> None:
    model, batch, lengths = make(), ids(3, 40), [5, 30, 17]
    cache = KVCache(model.config, 3, 40)
    with torch.no_grad():
        model(batch[:, :30], cache=cache)
        cache.set_lengths(lengths)
        for step in range(3):
            new = torch.stack([batch[i, n + step] for i, n in enumerate(lengths)])[:, None]
            got = model(new, cache=cache)[:, 0]
        whole = model(batch)
        for row, length in enumerate(lengths):
            torch.testing.assert_close(got[row], whole[row, length + 2], atol=1e-5, rtol=0)
        cache.select([2, 0])
        got = model(batch[[2, 0], [20, 8]][:, None], cache=cache)[:, 0]
    assert cache.lengths == [21, 9]
    torch.testing.assert_close(got, torch.stack([whole[2, 20], whole[0, 8]]), atol=1e-5, rtol=0)


def test_checkpointed_activations_give_the_same_gradient() -> None:
    model, batch = make(), ids(2, 150)
    model(batch).square().mean().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.checkpoint_activations = True
    model(batch).square().mean().backward()
    for got, want in zip(model.parameters(), expected, strict=True):
        assert torch.equal(got.grad, want)


def test_compute_dtype_is_that_of_the_activations() -> None:
    model, batch = make(), ids(2, 50)
    exact = model(batch)
    model.compute_dtype = torch.bfloat16
    rough = model(batch)
    assert rough.dtype == torch.bfloat16
    assert model.head_weight.dtype == torch.float32
    assert 0 < (rough - exact).norm() / exact.norm() < 0.05


def test_beyond_the_last_position_is_an_error() -> None:
    model = make()
    model(ids(1, 300))
    with pytest.raises(UserError, match="position 300: the model has 300 positions"):
        model(ids(1, 301))
    with pytest.raises(UserError, match="position 300"):
        model(ids(1, 2), positions=torch.tensor([[299, 300]]))
    with pytest.raises(UserError, match="300 positions"):
        KVCache(model.config, 1, 301)
    cache = KVCache(model.config, 1, 10)
    with pytest.raises(UserError, match="11 tokens in a cache of 10"):
        model(ids(1, 11), cache=cache)
