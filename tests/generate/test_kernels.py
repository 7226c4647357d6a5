"""The compiled loops against PyTorch in float64, and that a sum's bits hang on nothing else."""

import ast
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numba import get_num_threads

from danlu.core.errors import UserError
from danlu.generate import jit, kernels, packed, pairs
from danlu.generate.packed import GROUP, empty, multiply, pack, reordered, steady, unpack
from danlu.generate.paged import as_array
from danlu.generate.products import product

KINDS = ["float32", "bf16", "int8", "int4"]


def matrix(rows: int, columns: int, kind: Any) -> Any:
    found = empty((rows, columns), kind)
    pack(torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)), found)
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [32, 64, 96, 160, 576])
def test_products_and_their_bits(kind: Any, width: int) -> None:
    w = matrix(37, width, kind)
    x = torch.randn(9, width)
    found = np.empty((9, 37), np.float32)
    product(*w.arrays, x.numpy(), found, get_num_threads())
    expected = x.double() @ unpack(w).double().T
    torch.testing.assert_close(torch.from_numpy(found).double(), expected, atol=1e-4, rtol=1e-5)
    for n in (1, 2, 3, 6):
        part = np.empty((n, 37), np.float32)
        product(*w.arrays, x[:n].numpy(), part, 5)
        assert (part == found[:n]).all()


@pytest.mark.skipif(not pairs.AVAILABLE, reason="the processor has no products of bfloat16")
@pytest.mark.parametrize("kind", ["bf16", "int8"])
@pytest.mark.parametrize("width", [2, 30, 64, 576])
def test_products_in_pairs_and_their_bits(kind: Any, width: int) -> None:
    """Against the numbers as they are rounded; the same for every number of tokens, and for every part."""
    w = empty((48, width), kind, paired=True)
    weight = torch.randn(48, width)
    pack(weight, w)
    plain = empty((48, width), kind)
    pack(weight, plain)
    assert torch.equal(unpack(w), unpack(plain))
    x = torch.randn(23, width)
    expected = x.bfloat16().double() @ unpack(w).double().T
    found = np.empty((23, 48), np.float32)
    product(*w.arrays, x.numpy(), found, 3)
    torch.testing.assert_close(torch.from_numpy(found).double(), expected, atol=1e-4, rtol=1e-5)
    for n in range(1, 23):
        part = np.empty((n, 48), np.float32)
        product(*w.arrays, x[-n:].numpy(), part, 1)
        assert (part == found[-n:]).all()


@pytest.mark.parametrize("kind", ["float32", "bf16", "int8"])
def test_widths_that_fill_no_vector(kind: Any) -> None:
    w = matrix(5, 77, kind)
    x = torch.randn(3, 77)
    found = np.empty((3, 5), np.float32)
    product(*w.arrays, x.numpy(), found, 2)
    expected = x.double() @ unpack(w).double().T
    torch.testing.assert_close(torch.from_numpy(found).double(), expected, atol=1e-4, rtol=1e-5)


def test_packed_numbers_are_the_nearest() -> None:
    w = torch.randn(40, 96)
    for kind in ("int8", "int4"):
        packed = empty((40, 96), kind)
        pack(w, packed)
        steps = packed.factors if kind == "int8" else packed.factors[:, ::2].repeat_interleave(GROUP, dim=1)
        assert ((unpack(packed) - w) / steps).abs().max() <= 0.5 + 1e-3


def test_four_bits_of_a_file_are_kept() -> None:
    """Numbers that lie on sixteen steps, as those of Q4_1, are the same afterwards."""
    steps, low = torch.rand(40, 3, 1).half().float() + 0.1, torch.randn(40, 3, 1).half().float()
    codes = torch.randint(0, 16, (40, 3, 32))
    codes[..., 0], codes[..., 1] = 0, 15
    w = (codes * steps + low).flatten(1)
    packed = empty((40, 96), "int4")
    pack(w, packed)
    torch.testing.assert_close(unpack(packed), w, atol=1e-5, rtol=1e-5)


def test_four_bits_need_whole_groups() -> None:
    with pytest.raises(UserError, match=f"100 columns, no multiple of {GROUP}"):
        empty((3, 100), "int4")


NO_BFLOAT16 = pytest.mark.skipif(not packed.BFLOAT16_PRODUCTS, reason="oneDNN has no bfloat16 here")
PRODUCTS = [pytest.param(True, marks=NO_BFLOAT16, id="bfloat16 products"), pytest.param(False, id="without")]


@pytest.mark.parametrize("has", PRODUCTS)
@pytest.mark.parametrize("kind", KINDS)
def test_many_tokens_are_multiplied_alike(kind: Any, has: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on a processor on which oneDNN doesn't multiply bfloat16."""
    monkeypatch.setattr(packed, "BFLOAT16_PRODUCTS", has)
    w = matrix(48, 64, kind)
    x = torch.randn(20, 64).to(packed.product_dtype(kind))
    expected = x.float() @ unpack(w).T
    tolerance = 1e-5 if kind == "float32" else 1e-2
    found = multiply(x, reordered(w)).float()
    assert (found - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("heads", "groups", "e", "window", "softcap", "alibi"),
    [
        (9, 3, 64, 0, 0.0, False),
        (8, 8, 16, 20, 0.0, False),
        (4, 2, 12, 0, 5.0, True),
        (5, 1, 32, 7, 0.0, True),
    ],
)
def test_attention(
    dtype: torch.dtype, heads: int, groups: int, e: int, window: int, softcap: float, alibi: bool
) -> None:
    torch.manual_seed(0)
    positions, p = np.array([0, 5, 15, 16, 47]), kernels.POSITIONS
    keys = torch.full((20, groups, e, p), torch.nan).to(dtype)
    values = torch.full((20, groups, p, e), torch.nan).to(dtype)
    tables = np.random.default_rng(0).permutation(20)[:15].reshape(5, 3).astype(np.int32)
    q = torch.randn(5, heads, e)
    slopes = torch.rand(heads) if alibi else torch.zeros(0)
    expected = torch.empty(5, heads, e)
    for t, last in enumerate(positions):
        k, v = torch.randn(groups, last + 1, e).to(dtype), torch.randn(groups, last + 1, e).to(dtype)
        for position in range(last + 1):
            block = tables[t, position // p]
            keys[block, :, :, position % p] = k[:, position]
            values[block, :, position % p] = v[:, position]
        spread = heads // groups
        scores = torch.einsum("he,hse->hs", q[t], k.float().repeat_interleave(spread, 0)) * 0.3
        scores = softcap * (scores / softcap).tanh() if softcap else scores
        if alibi:
            scores = scores - slopes[:, None] * (last - torch.arange(last + 1))
        if window:
            scores[:, : max(0, last + 1 - window)] = -torch.inf
        weights = scores.softmax(-1)
        expected[t] = torch.einsum("hs,hse->he", weights, v.float().repeat_interleave(spread, 0))
    found = np.empty((5, heads, e), np.float32)
    rows = np.arange(5, dtype=np.int32)
    kernels.attend(
        q.numpy(), as_array(keys), as_array(values), tables, rows, positions, window, np.float32(0.3),
        np.float32(softcap), slopes.numpy(), found,
    )  # fmt: skip
    torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-5, rtol=1e-4)


def test_log_sums() -> None:
    x = torch.randn(7, 1000) * 10
    x[1, :500] = -torch.inf
    x[2, 3] = torch.nan
    x[3] = -torch.inf
    found = np.empty(7)
    kernels.log_sums(x.numpy(), found)
    expected = x.double().logsumexp(1)
    torch.testing.assert_close(
        torch.from_numpy(found)[[0, 1, 4, 5, 6]], expected[[0, 1, 4, 5, 6]], atol=1e-6, rtol=0
    )
    assert np.isnan(found[2:4]).all()
    for row in (0, 1, 6):
        alone = np.empty(1)
        kernels.log_sums(x[row : row + 1].numpy(), alone)
        assert alone[0] == found[row]


@pytest.mark.parametrize("name", ["gelu", "geglu_tanh", "swiglu", "relu", "tanh"])
def test_steady_activations(name: str) -> None:
    from danlu.model.layers import ACTIVATIONS

    x = torch.randn(5, 37) * 4
    expected = x.tanh() if name == "tanh" else ACTIVATIONS[name](x)
    torch.testing.assert_close(steady(name)(x), expected, atol=1e-6, rtol=1e-5)
    assert torch.equal(steady(name)(x)[3:], steady(name)(x[3:]))


def test_kernels_are_kept_under_all_that_they_are_made_of() -> None:
    """Else an old part would go on in a new version."""
    folder = Path(jit.__file__).parent
    found, waiting = set(), {"kernels"}
    while waiting:
        found.add(name := waiting.pop())
        for node in ast.walk(ast.parse((folder / f"{name}.py").read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("danlu.generate."):
                waiting |= {str(node.module).rpartition(".")[2]} - found
    assert found == set(jit.PARTS)
    assert jit.FOLDER in str(kernels.decode._cache.cache_path) or "NUMBA_CACHE_DIR" in os.environ
