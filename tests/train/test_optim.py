"""The optimisers, against their definitions."""

import copy

import pytest
import torch

from danlu.model.config import ModelConfig
from danlu.model.transformer import Transformer
from danlu.train.config import OptimConfig
from danlu.train.optim import Muon, make_optimizer


def make() -> Transformer:
    torch.manual_seed(0)
    sizes = ModelConfig(vocab_size=50, width=32, n_layers=1, n_heads=2, n_kv_heads=1, ffn_width=48)
    return Transformer(sizes)


def backward(model: Transformer, step: int) -> None:
    ids = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(step))
    model(ids).square().sum().backward()


def test_adamw_is_algorithm_2_of_its_paper() -> None:
    config = OptimConfig(lr=0.01, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.3)
    model = make()
    optimizer = make_optimizer(model, config)
    want = {name: p.detach().double() for name, p in model.named_parameters()}
    m = {name: torch.zeros_like(p) for name, p in want.items()}
    v = copy.deepcopy(m)
    for t in range(1, 4):
        backward(model, t)
        for name, p in model.named_parameters():
            g = p.grad.double()
            m[name] = 0.8 * m[name] + 0.2 * g
            v[name] = 0.9 * v[name] + 0.1 * g * g
            update = m[name] / (1 - 0.8**t) / ((v[name] / (1 - 0.9**t)).sqrt() + 1e-6)
            decay = 0.3 if p.ndim == 2 else 0.0
            want[name] = want[name] - 0.01 * (update + decay * want[name])
        optimizer.step()
        optimizer.zero_grad()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.double(), want[name], atol=1e-6, rtol=1e-5)


def test_muon_turns_the_matrices_and_adamw_the_rest() -> None:
    config = OptimConfig(name="muon", lr=0.01, muon_lr=0.02, weight_decay=0.0)
    model = make()
    before = copy.deepcopy(model)
    optimizer = make_optimizer(model, config)
    assert [group["lr"] for group in optimizer.param_groups] == [0.02, 0.01, 0.01]
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    for (name, p), old in zip(model.named_parameters(), before.parameters(), strict=True):
        change = (old - p).detach()
        if name.startswith("layers.") and p.ndim == 2:
            # Newton-Schulz brings singular values near one; tall matrices are scaled by √(rows/columns).
            s = torch.linalg.svdvals(change) / 0.02 / max(1, p.shape[0] / p.shape[1]) ** 0.5
            assert 0.6 < s.median() < 1.3
            assert s.max() < 1.4
            # The direction is the gradient's polar factor.
            u, _, vt = torch.linalg.svd(p.grad, full_matrices=False)
            assert torch.cosine_similarity(change.flatten(), (u @ vt).flatten(), dim=0) > 0.9
        else:
            moved = p.grad.abs() > 1e-5
            torch.testing.assert_close(
                change[moved].abs(), torch.full_like(change[moved], 0.01), rtol=0.01, atol=0
            )


@pytest.mark.parametrize("shape", [(48, 32), (32, 48), (40, 40)])
def test_muon_is_that_of_torch(shape: tuple[int, int]) -> None:
    """But for bfloat16, in which torch's computes everywhere."""
    start = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizers = [
        Muon([ours], lr=0.02, momentum=0.9, weight_decay=0.1),
        torch.optim.Muon([theirs], lr=0.02, momentum=0.9, weight_decay=0.1),
    ]
    for step in range(4):
        gradient = torch.randn(shape, generator=torch.Generator().manual_seed(1 + step))
        for p, optimizer in zip((ours, theirs), optimizers, strict=True):
            p.grad = gradient.clone()
            optimizer.step()
    moved = theirs.detach() - start
    assert (ours.detach() - theirs.detach()).norm() < 0.02 * moved.norm()


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_saved_state_goes_on_to_the_bit(name: str) -> None:
    config = OptimConfig(name=name)
    model = make()
    optimizer = make_optimizer(model, config)
    backward(model, 1)
    optimizer.step()
    other = copy.deepcopy(model)
    state = copy.deepcopy(optimizer.state_dict())
    resumed = make_optimizer(other, config)
    resumed.load_state_dict(state)
    for m, o in [(model, optimizer), (other, resumed)]:
        m.zero_grad()
        backward(m, 2)
        o.step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
