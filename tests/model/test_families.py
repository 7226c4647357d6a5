"""Every family against transformers, which didn't learn of its tensors from us."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from families_table import CASES, make_theirs
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from danlu.model.cache import KVCache
from danlu.model.checkpoint import load_model, save_model
from danlu.model.count import parameters
from danlu.model.transformer import Transformer
from danlu.tokens.loader import Batch
from danlu.train.config import OptimConfig
from danlu.train.optim import make_optimizer
from danlu.train.step import TrainStep

ALL = [
    pytest.param(name, number, marks=pytest.mark.slow if number else ())
    for name, cases in CASES.items()
    for number in range(len(cases))
]
IDS = torch.randint(0, 128, (2, 170), generator=torch.Generator().manual_seed(1))


def test_there_are_enough() -> None:
    assert len(CASES) >= 14
    assert all(len(cases) >= 3 for cases in CASES.values())


@pytest.mark.parametrize(("name", "number"), ALL)
@torch.no_grad()
def test_logits_and_the_round_trip(name: str, number: int, tmp_path: Path) -> None:
    theirs = make_theirs(name, CASES[name][number])
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    expected = theirs(IDS).logits
    assert expected.std() >= 1
    scale = expected.abs().max()
    torch.testing.assert_close(ours(IDS) / scale, expected / scale, atol=1e-4, rtol=0)
    assert parameters(ours.config) == sum(p.numel() for p in ours.parameters())
    save_model(ours, tmp_path / "ours")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    assert type(back) is type(theirs)
    assert torch.equal(back(IDS).logits, expected)
    back.save_pretrained(tmp_path / "back")
    again = load_model(tmp_path / "back")
    assert again.config == ours.config
    for (tensor, p), q in zip(ours.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(p, q), tensor


FIRST = [(name, 0) for name in CASES] + [("OPTConfig", 1), ("Gemma2Config", 1), ("Qwen2Config", 2)]


def loaded(name: str, number: int, folder: Path) -> tuple[nn.Module, Transformer]:
    theirs = make_theirs(name, CASES[name][number])
    theirs.save_pretrained(folder)
    return theirs, load_model(folder)


@pytest.mark.parametrize(("name", "number"), FIRST)
@torch.no_grad()
def test_any_tensor_that_is_disturbed_or_swapped_shows(name: str, number: int, tmp_path: Path) -> None:
    """The comparison with transformers can fail, and for each tensor."""
    theirs, ours = loaded(name, number, tmp_path)
    ids = IDS[:, :40]
    expected = theirs(ids).logits
    scale = expected.abs().max()

    def differs() -> bool:
        return bool((ours(ids) - expected).abs().max() > 1e-4 * scale)

    assert not differs()
    state = dict(ours.named_parameters())
    for tensor, p in state.items():
        before = p.clone()
        p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
        # A key bias adds the same to all scores of a query, and softmax takes that out again.
        invisible = tensor.endswith("attention.k.bias") and ours.config.positions != "rope"
        assert differs() is not (invisible and not ours.config.attention_softcap), tensor
        p.copy_(before)
    names = list(state)
    for first, second in pairwise(names + names[:1]):
        a, b = state[first], state[second]
        if a.shape != b.shape:
            continue
        kept = a.clone(), b.clone()
        a.copy_(kept[1])
        b.copy_(kept[0])
        assert differs(), (first, second)
        a.copy_(kept[0])
        b.copy_(kept[1])


@pytest.mark.parametrize(("name", "number"), FIRST)
@torch.no_grad()
def test_packed_padded_and_cached_logits_are_those_of_the_text_alone(
    name: str, number: int, tmp_path: Path
) -> None:
    theirs, ours = loaded(name, number, tmp_path)
    texts = [IDS[:1, :n] for n in (60, 7, 33)]
    alone = [ours(text) for text in texts]
    scale = alone[0].abs().max()

    def same(got: Tensor, want: Tensor) -> None:
        torch.testing.assert_close(got / scale, want / scale, atol=1e-5, rtol=0)

    positions = torch.cat([torch.arange(text.shape[1]) for text in texts])[None]
    segments = torch.cat([torch.full((text.shape[1],), i) for i, text in enumerate(texts)])[None]
    same(ours(torch.cat(texts, 1), positions, segments), torch.cat(alone, 1))

    mask = torch.zeros(3, 60, dtype=torch.long)
    rows = torch.zeros(3, 60, dtype=torch.long)
    for row, text in enumerate(texts):
        rows[row, 60 - text.shape[1] :] = text
        mask[row, 60 - text.shape[1] :] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    left = ours(rows, positions, mask - 1)
    takes_positions = {} if name == "BloomConfig" else {"position_ids": positions}
    reference = theirs(rows, attention_mask=mask, **takes_positions).logits
    for row, want in enumerate(alone):
        same(left[row, -want.shape[1] :], want[0])
        torch.testing.assert_close(
            left[row, -want.shape[1] :] / scale, reference[row, -want.shape[1] :] / scale, atol=1e-4, rtol=0
        )

    cache = KVCache(ours.config, 3, 62)
    right = torch.cat([rows.new_zeros(1, 60).index_copy(1, torch.arange(t.shape[1]), t) for t in texts])
    ours(right, cache=cache)
    cache.set_lengths([text.shape[1] for text in texts])
    for step in range(2):
        got = ours(IDS[1, [step]].expand(3, 1), cache=cache)
        for row, text in enumerate(texts):
            same(got[row, 0], ours(torch.cat((text, IDS[1:, : step + 1]), 1))[0, -1])


@pytest.mark.parametrize(("name", "number"), ALL)
def test_every_family_trains(name: str, number: int, tmp_path: Path) -> None:
    """Ten steps from a random start on one text; the gradient of the first is transformers'."""
    theirs, ours = loaded(name, number, tmp_path)
    ids = IDS[:, :60]
    batch = Batch(
        ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), torch.ones(2, 59),
        torch.arange(59).expand(2, 59).contiguous(), torch.zeros(2, 59, dtype=torch.int32),
    )  # fmt: skip
    step = TrainStep(ours, make_optimizer(ours, OptimConfig(lr=3e-3, weight_decay=0)), clip=0)
    loss, _ = step.accumulate([batch])
    want = torch.nn.functional.cross_entropy(theirs(batch.ids).logits.flatten(0, 1), batch.targets.flatten())
    want.backward()
    assert loss == pytest.approx(want.item(), rel=1e-4)
    norm = torch.stack([p.grad.norm() for p in ours.parameters()]).norm()
    expected = torch.stack([p.grad.norm() for p in theirs.parameters() if p.grad is not None]).norm()
    torch.testing.assert_close(norm, expected, rtol=1e-3, atol=0)
    step.optimizer.zero_grad()
    losses = [step.step([batch]).loss for _ in range(10)]
    assert losses[-1] < 0.9 * losses[0]
