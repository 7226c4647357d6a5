"""The chunked cross-entropy against the plain one."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from danlu.model import cross_entropy
from danlu.model.config import ModelConfig
from danlu.model.cross_entropy import (
    linear_cross_entropy,
    linear_log_probs,
    log_probabilities,
    log_probs_and_entropies,
)
from danlu.model.transformer import Transformer


def plain(hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    return (F.cross_entropy(hidden @ head.T, targets, reduction="none") * weights).sum()


def inputs(n: int, d: int, v: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(n)
    hidden = torch.randn(n, d, dtype=dtype, generator=generator).requires_grad_()
    head = torch.randn(v, d, dtype=dtype, generator=generator).requires_grad_()
    weights = torch.rand(n, generator=generator)
    weights[::3] = 0
    return hidden, head, torch.randint(0, v, (n,), generator=generator), weights


@pytest.mark.parametrize("n", [1, 64, 65, 200])
def test_loss_and_gradient(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cross_entropy.CHUNK, "cpu", 64 * 37)
    args = inputs(n, 16, 37)
    want, got = plain(*args), linear_cross_entropy(*args)
    torch.testing.assert_close(got, want)
    expected = torch.autograd.grad(3 * want, args[:2])
    torch.testing.assert_close(torch.autograd.grad(3 * got, args[:2]), expected)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("has_bias", [False, True])
def test_bias_and_soft_cap(softcap: float, has_bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cross_entropy.CHUNK, "cpu", 64 * 37)
    hidden, head, targets, weights = inputs(150, 16, 37)
    bias = torch.randn(37, dtype=torch.float64).requires_grad_() if has_bias else None
    z = F.linear(hidden, head, bias)
    z = softcap * (z / softcap).tanh() if softcap else z
    want = (F.cross_entropy(z, targets, reduction="none") * weights).sum()
    got = linear_cross_entropy(hidden, head, targets, weights, bias, softcap)
    torch.testing.assert_close(got, want)
    inner = [hidden, head] + ([] if bias is None else [bias])
    torch.testing.assert_close(torch.autograd.grad(3 * got, inner), torch.autograd.grad(3 * want, inner))


def test_tokens_that_do_not_count_cost_next_to_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "ROWS", 16)
    hidden, head, targets, weights = inputs(90, 16, 37)
    for counted in (weights, torch.ones(90), torch.zeros(90)):
        with FlopCounterMode(display=False) as counter:
            linear_cross_entropy(hidden, head, targets, counted).backward()
        rows = min(90, -(-int((counted != 0).sum()) // 16) * 16)
        assert counter.get_total_flops() == rows * 3 * 2 * 16 * 37


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("has_bias", [False, True])
def test_each_token_s_log_probability(
    softcap: float, has_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against autograd's own way, in losses that are no weighted sum of them."""
    monkeypatch.setitem(cross_entropy.CHUNK, "cpu", 64 * 37)
    hidden, head, targets, _ = inputs(150, 16, 37)
    bias = torch.randn(37, dtype=torch.float64).requires_grad_() if has_bias else None
    z = F.linear(hidden, head, bias)
    z = softcap * (z / softcap).tanh() if softcap else z
    want = torch.distributions.Categorical(logits=z)
    got, entropies = linear_log_probs(hidden, head, targets, bias, softcap, entropy=True)
    torch.testing.assert_close(got, want.log_prob(targets))
    torch.testing.assert_close(entropies, want.entropy())
    inner = [hidden, head] + ([] if bias is None else [bias])
    losses = [
        (F.logsigmoid(one[:75] - one[75:]) * one[75:].exp()).sum() for one in (got, want.log_prob(targets))
    ]
    torch.testing.assert_close(*(torch.autograd.grad(loss, inner) for loss in losses))


def test_gradient_by_finite_differences() -> None:
    hidden, head, targets, weights = inputs(6, 3, 5)
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, targets, weights.double()), (hidden, head)
    )


def test_hopeless_targets_have_a_finite_loss() -> None:
    """The probability of the target is 1e-87, no float32."""
    hidden, head = torch.tensor([[200.0]]).requires_grad_(), torch.tensor([[1.0], [0.0]])
    loss = linear_cross_entropy(hidden, head, torch.tensor([1]), torch.ones(1))
    loss.backward()
    assert loss.item() == pytest.approx(200)
    assert hidden.grad.item() == pytest.approx(1)


def test_bfloat16() -> None:
    hidden, head, targets, weights = inputs(300, 64, 500, torch.float32)
    want = plain(hidden, head, targets, weights)
    expected = torch.autograd.grad(want, (hidden, head))
    low = hidden.detach().bfloat16().requires_grad_()
    got = linear_cross_entropy(low, head, targets, weights)
    assert got.item() == pytest.approx(want.item(), rel=1e-3)
    for a, b in zip(torch.autograd.grad(got, (low, head)), expected, strict=True):
        assert (a.float() - b).norm() / b.norm() < 0.02


def test_no_chunk_is_the_whole_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0
    softmax = Tensor.softmax

    def spy(z: Tensor, *args: object, **kwargs: object) -> Tensor:
        nonlocal largest
        largest = max(largest, z.numel())
        return softmax(z, *args, **kwargs)

    monkeypatch.setattr(Tensor, "softmax", spy)
    linear_cross_entropy(*inputs(3000, 4, 8192, torch.float32))
    assert 0 < largest <= cross_entropy.CHUNK["cpu"] < 3000 * 8192


def test_log_probabilities() -> None:
    sizes = ModelConfig(vocab_size=50, width=32, n_layers=1, n_heads=2, n_kv_heads=2, ffn_width=48)
    model = Transformer(sizes)
    ids, targets = torch.randint(0, 50, (2, 20)), torch.randint(0, 50, (2, 20))
    batch = SimpleNamespace(ids=ids, targets=targets, positions=None, segments=None)
    want = model(ids).log_softmax(-1).gather(2, targets[..., None])[..., 0]
    torch.testing.assert_close(log_probabilities(model, batch), want)
    entropies = torch.distributions.Categorical(logits=model(ids)).entropy()
    torch.testing.assert_close(log_probs_and_entropies(model, batch)[1], entropies)


def test_log_probabilities_where_they_count() -> None:
    sizes = ModelConfig(vocab_size=50, width=32, n_layers=1, n_heads=2, n_kv_heads=2, ffn_width=48)
    model = Transformer(sizes)
    ids, targets = torch.randint(0, 50, (2, 20)), torch.randint(0, 50, (2, 20))
    weights = (torch.rand(2, 20) < 0.4).float()
    batch = SimpleNamespace(ids=ids, targets=targets, positions=None, segments=None, weights=weights)
    found = log_probabilities(model, batch, counted=True)
    torch.testing.assert_close(found, log_probabilities(model, batch) * weights)
