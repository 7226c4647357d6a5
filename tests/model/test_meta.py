"""Meta's files: a forward pass written from the paper, with complex rotations, and what may be wrong."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
import torch.nn.functional as F
from sentencepiece_models import train
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from danlu.core.errors import UserError
from danlu.model.checkpoint import load, load_model, resolve, sizes_of
from danlu.model.config import ConvertConfig
from danlu.model.convert import convert
from danlu.model.meta import ffn_width

PARAMS = {
    "dim": 48, "n_layers": 2, "n_heads": 6, "n_kv_heads": 2, "vocab_size": 40, "multiple_of": 16,
    "norm_eps": 1e-5, "rope_theta": 500000.0,
}  # fmt: skip
FFN = 128
IDS = torch.randint(0, 40, (2, 30), generator=torch.Generator().manual_seed(1))


def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    kv = 48 // 6 * 2
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings": (40, 48), "norm": (48,), "output": (40, 48)}
    for i in range(2):
        layer = f"layers.{i}."
        shapes |= {f"{layer}attention.w{n}": (rows, 48) for n, rows in (("q", 48), ("k", kv), ("v", kv))}
        shapes |= {
            f"{layer}attention.wo": (48, 48),
            f"{layer}attention_norm": (48,),
            f"{layer}ffn_norm": (48,),
        }
        shapes |= {f"{layer}feed_forward.w{n}": (FFN, 48) for n in (1, 3)}
        shapes |= {f"{layer}feed_forward.w2": (48, FFN)}
    return {f"{name}.weight": torch.randn(shape) * 0.3 + (len(shape) == 1) for name, shape in shapes.items()}


def reference(w: dict[str, Tensor], ids: Tensor) -> Tensor:
    """LLaMA as its paper and RoFormer (equation 13, complex numbers) say, with neighbouring pairs rotated."""

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"]

    b, t, head = *ids.shape, 8
    angle = torch.outer(torch.arange(t).double(), 500000.0 ** (-torch.arange(0, head, 2).double() / head))
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]

    def rotated(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * turn).flatten(-2).float()

    x = w["tok_embeddings.weight"][ids]
    for i in range(2):
        p = f"layers.{i}."
        h = norm(x, f"{p}attention_norm")
        q, k, v = (F.linear(h, w[f"{p}attention.w{n}.weight"]).view(b, t, -1, head) for n in "qkv")
        q, k = rotated(q), rotated(k)
        k, v = (z.repeat_interleave(3, dim=2) for z in (k, v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / head**0.5
        scores = scores.masked_fill(torch.ones(t, t).triu(1).bool(), float("-inf")).softmax(-1)
        y = torch.einsum("bhqk,bkhd->bqhd", scores, v).flatten(2)
        x = x + F.linear(y, w[f"{p}attention.wo.weight"])
        h = norm(x, f"{p}ffn_norm")
        gate, up = (F.linear(h, w[f"{p}feed_forward.w{n}.weight"]) for n in (1, 3))
        x = x + F.linear(F.silu(gate) * up, w[f"{p}feed_forward.w2.weight"])
    return F.linear(norm(x, "norm"), w["output.weight"])


def write(folder: Path, parts: int = 1, embedding_by: int = 0, **changes: Any) -> dict[str, Tensor]:
    """Cuts the tensors as Megatron's layers do: rows of what reads the stream, columns of what writes it."""
    whole = tensors()
    files: list[dict[str, Tensor]] = [{} for _ in range(parts)]
    for name, tensor in whole.items():
        along = 1 if name.endswith(("wo.weight", "w2.weight")) else 0
        along = embedding_by if name == "tok_embeddings.weight" else along
        pieces = tensor.chunk(parts, along) if tensor.ndim == 2 else [tensor] * parts
        for file, piece in zip(files, pieces, strict=True):
            file[name] = piece.clone()
    folder.mkdir(exist_ok=True)
    for number, file in enumerate(files):
        torch.save({**file, "rope.freqs": torch.ones(4)}, folder / f"consolidated.{number:02}.pth")
    (folder / "params.json").write_text(json.dumps({**PARAMS, **changes}))
    return whole


@pytest.mark.parametrize(("parts", "embedding_by"), [(1, 0), (2, 0), (2, 1)])
@torch.no_grad()
def test_logits_are_those_of_the_formulas(tmp_path: Path, parts: int, embedding_by: int) -> None:
    whole = write(tmp_path, parts, embedding_by)
    assert resolve(tmp_path) == tmp_path
    model = load_model(tmp_path)
    expected = reference(whole, IDS)
    assert expected.std() >= 1
    assert (model(IDS) - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert (model.config.vocab_size, model.config.max_positions) == (40, 8192)


@pytest.mark.parametrize(
    ("width", "multiple_of", "factor", "expected"),
    [
        (4096, 256, None, 11008),  # LLaMA 7B, as its Hugging Face config says
        (8192, 256, None, 22016),  # 65B
        (8192, 4096, 1.3, 28672),  # LLaMA 2 70B, LLaMA 3 70B
        (4096, 1024, 1.3, 14336),  # LLaMA 3 8B
        (2048, 256, 1.5, 8192),  # LLaMA 3.2 1B
    ],
)
def test_the_width_of_the_feed_forward(
    width: int, multiple_of: int, factor: float | None, expected: int
) -> None:
    assert ffn_width(width, multiple_of, factor) == expected


def test_what_params_say(tmp_path: Path) -> None:
    write(tmp_path, use_scaled_rope=True, rope_scaling_factor=32.0, vocab_size=-1)
    sizes = sizes_of(tmp_path)
    assert sizes.rope_scaling is not None
    assert (sizes.rope_scaling.kind, sizes.rope_scaling.factor, sizes.max_positions) == (
        "llama3",
        32.0,
        131072,
    )
    assert sizes.vocab_size == 40
    write(tmp_path / "one", norm_eps=1e-6, rope_theta=10000.0)
    assert sizes_of(tmp_path / "one").max_positions == 2048


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("ran"),))


def test_damaged_folders_are_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def refused(message: str) -> None:
        with pytest.raises(UserError, match=message):
            load_model(tmp_path / "m")

    write(tmp_path / "m", 2)
    (tmp_path / "m/consolidated.00.pth").rename(tmp_path / "m/away")
    refused("consolidated.00.pth is not there")
    write(tmp_path / "m", 2)
    (tmp_path / "m/consolidated.01.pth").write_bytes((tmp_path / "m/consolidated.01.pth").read_bytes()[:900])
    refused("consolidated.01.pth")
    (tmp_path / "m/consolidated.01.pth").write_bytes(pickle.dumps({"output.weight": Evil()}))
    refused("could run code")
    assert not Path("ran").exists()
    torch.save({"norm.weight": torch.ones(48)}, tmp_path / "m/consolidated.01.pth")
    refused("other tensors than consolidated.00.pth")
    write(tmp_path / "m", n_layers=3)
    (tmp_path / "m/consolidated.01.pth").unlink()
    refused("tensors of 2 layers, and n_layers is 3")
    write(tmp_path / "m", dim="wide")
    refused("params.json")
    write(tmp_path / "m", multiple_of=32, ffn_dim_multiplier=2.0)
    refused("feed_forward.w1.weight has shape")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"multiple_of": 0}, "multiple_of: input should be greater than or equal to 1"),
        ({"multiple_of": "256"}, "multiple_of: input should be a valid integer"),
        ({"n_layers": 10**9}, "tensors of 2 layers, and n_layers is 1000000000"),
        ({"n_layers": 0}, "n_layers: input should be greater"),
        ({"n_layers": True}, "n_layers: input should be a valid integer"),
        ({"n_heads": 0}, "n_heads: input should be greater"),
        ({"n_heads": 5}, "not a multiple of n_heads 5"),
        ({"n_kv_heads": 4}, "not a multiple of n_kv_heads 4"),
        ({"dim": None}, "dim: input should be a valid integer"),
        ({"dim": 10**30}, "dim: input should be less"),
        ({"dim": 2**31 - 8}, "has shape|no memory holds"),
        ({"ffn_dim_multiplier": float("inf")}, "ffn_dim_multiplier: input should be a finite number"),
        ({"ffn_dim_multiplier": 1e308}, "ffn_dim_multiplier is 1e\\+308|no memory holds|has shape"),
        ({"ffn_dim_multiplier": -1.0}, "ffn_dim_multiplier: input should be greater"),
        ({"norm_eps": float("nan")}, "norm_eps: input should be"),
        ({"rope_theta": 0}, "rope_theta: input should be greater"),
        ({"use_scaled_rope": "yes"}, "use_scaled_rope: input should be a valid boolean"),
        ({"use_scaled_rope": True, "rope_scaling_factor": 0.5}, "factor: input should be greater"),
        ({"vocab_size": 41}, "vocab_size is 41, and output.weight has 40 rows"),
        ({"sliding_window": 4096}, "sliding_window: unknown key"),  # Mistral's
    ],
)
def test_bad_params_are_one_clear_error(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write(tmp_path, **changes)
    with pytest.raises(UserError, match=message) as caught:
        load_model(tmp_path)
    assert str(tmp_path) in caught.value.message
    assert caught.value.remedy


def test_params_that_are_no_table_are_refused(tmp_path: Path) -> None:
    write(tmp_path)
    for text in ("[1, 2]", "null", "{", "{}"):
        (tmp_path / "params.json").write_text(text)
        with pytest.raises(UserError, match=r"params\.json"):
            load_model(tmp_path)


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    def refused(message: str, number: int, changes: dict[str, Tensor], without: str = "") -> None:
        write(tmp_path / "m", 2)
        file = tmp_path / f"m/consolidated.{number:02}.pth"
        torch.save({k: v for k, v in {**torch.load(file), **changes}.items() if k != without}, file)
        with pytest.raises(UserError, match=message) as caught:
            load_model(tmp_path / "m")
        assert caught.value.remedy

    refused("parts of layers.0.attention.wq.weight", 1, {"layers.0.attention.wq.weight": torch.ones(24, 47)})
    refused("norm.weight differs from part to part", 1, {"norm.weight": torch.zeros(48)})
    refused("parts of output.weight", 1, {"output.weight": torch.tensor(1.0)})
    refused("other tensors", 1, {}, "output.weight")
    write(tmp_path / "m")
    file = tmp_path / "m/consolidated.00.pth"
    (tmp_path / "m/consolidated.01.pth").unlink()
    layers = {f"layers.{i}.a": torch.ones(1) for i in range(2)}
    torch.save({"output.weight": torch.tensor(1.0), **layers}, file)
    with pytest.raises(UserError, match=r"output.weight has shape \(\)"):
        load_model(tmp_path / "m")
    torch.save(layers, file)
    with pytest.raises(UserError, match=r"no tensor tok_embeddings\.weight"):
        load_model(tmp_path / "m")


@pytest.mark.parametrize("above", [True, False])
def test_the_tokenizer_may_lie_one_folder_above(above: bool, tmp_path: Path) -> None:
    file = (tmp_path if above else tmp_path / "7B") / "tokenizer.model"
    write(tmp_path / "7B")
    file.write_bytes(train(["the furnace is hot"] * 9, "t5", vocab_size=20))
    model, tokenizer = load(tmp_path / "7B")
    assert tokenizer.encode("hot") == sentencepiece.SentencePieceProcessor(model_file=str(file)).encode("hot")
    assert tokenizer.document_start == [1]
    convert(ConvertConfig(source=str(tmp_path / "7B"), out=tmp_path / "hf"))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS).logits, model(IDS), atol=1e-4, rtol=0)
    assert AutoTokenizer.from_pretrained(tmp_path / "hf")("hot")["input_ids"] == [1, *tokenizer.encode("hot")]
