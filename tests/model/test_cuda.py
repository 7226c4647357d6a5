"""On a GPU: every family in bf16 beside transformers. Skipped where there is none."""

from pathlib import Path

import pytest
import torch
from families_table import CASES, make_theirs
from torch import Tensor

from danlu.model.cache import KVCache
from danlu.model.checkpoint import load_model
from danlu.model.transformer import Transformer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")
IDS = torch.randint(0, 128, (2, 170), generator=torch.Generator().manual_seed(1))


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


@pytest.mark.parametrize(("name", "number"), [(name, n) for name in CASES for n in range(len(CASES[name]))])
@torch.no_grad()
def test_logits_in_bf16(name: str, number: int, tmp_path: Path) -> None:
    """No further from the logits in float32 on the CPU than transformers' own in bf16 are."""
    theirs = make_theirs(name, CASES[name][number])
    theirs.save_pretrained(tmp_path)
    exact = theirs(IDS).logits
    theirs = theirs.to("cuda", torch.bfloat16)
    reference = rms(theirs(IDS.cuda()).logits.float().cpu() - exact)
    ours = load_model(tmp_path).to("cuda")
    assert rms(ours(IDS.cuda()).cpu() - exact) <= 1e-5 * rms(exact)
    ours.compute_dtype = torch.bfloat16
    found = [ours(IDS.cuda())]
    scaling = ours.config.rope_scaling
    if scaling is None or scaling.kind not in ("dynamic", "longrope"):  # these turn by the length read so far
        found.append(_by_pieces(ours, IDS.cuda()))
    for logits in found:
        assert rms(logits.float().cpu() - exact) <= 1.25 * reference


def _by_pieces(model: Transformer, ids: Tensor) -> Tensor:
    """The logits with a cache, 100 tokens and then one by one."""
    cache = KVCache(model.config, len(ids), ids.shape[1], torch.bfloat16, ids.device)
    pieces = [ids[:, :100], *ids[:, 100:].split(1, dim=1)]
    return torch.cat([model(piece, cache=cache) for piece in pieces], dim=1)
