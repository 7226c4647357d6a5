"""GGUF files that lie about their lengths, say what danlu doesn't know, or lack a tensor."""

import struct
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_table import IDS, LLAMA3, WRITTEN, changed, drawn, make_tokenizer

import danlu
from danlu.core.errors import UserError
from danlu.core.files import read_json
from danlu.model.checkpoint import save_model, sizes_of
from danlu.model.config import ConvertConfig, ModelConfig
from danlu.model.convert import convert
from danlu.model.gguf import GgufFile, load_gguf, save_gguf
from danlu.tokens.tokenizer import Tokenizer


def small(path: Path) -> Path:
    """A file of two keys and one tensor."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_array("tokenizer.ggml.token_type", [1, 2, 3])
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    writer.add_tensor("token_embd.weight", np.ones((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def put(raw: bytes, after: bytes, skip: int, number: int) -> bytes:
    """Writes a uint64 so many bytes behind the end of `after`."""
    at = raw.index(after) + len(after) + skip
    return raw[:at] + struct.pack("<Q", number) + raw[at + 8 :]


def test_damaged_files_are_one_clear_error(tmp_path: Path) -> None:
    raw = small(tmp_path / "whole.gguf").read_bytes()
    assert GgufFile(tmp_path / "whole.gguf").names == {"token_embd.weight"}
    types, tokens, tensor = b"tokenizer.ggml.token_type", b"tokenizer.ggml.tokens", b"token_embd.weight"
    huge, too_many = 2**60, len(raw)
    swapped = struct.pack("<4sI", b"GGUF", int.from_bytes(struct.pack("<I", 3), "big")) + raw[8:]
    cases = {
        "magic": (b"GGML" + raw[4:], "begin with GGUF"),
        "version": (put(raw, b"GGUF", 0, 9), "version 9 is unknown"),
        "big": (swapped, "big-endian"),
        "cut": (raw[: len(raw) // 2], "the file ends before"),
        "short": (raw[:-5], "token_embd.weight needs 512 bytes"),
        "empty": (b"", "too short"),
        "tensors": (put(raw, b"GGUF", 4, huge), f"{huge} tensors"),
        "keys": (put(raw, b"GGUF", 12, huge), f"{huge} keys"),
        "name": (put(raw, b"GGUF", 20, huge), f"key 1 of {huge} bytes"),
        "numbers": (put(raw, types, 8, huge), f"token_type with {huge} entries"),
        "texts": (put(raw, tokens, 8, huge), f"tokens with {huge} entries"),
        "more": (put(raw, types, 8, too_many), f"token_type with {too_many} entries"),
        "text": (put(raw, tokens, 16, huge), f"tokens of {huge} bytes"),
        "nested": (put(raw, types, 4, 9), "list of the unknown type 9"),
        "offset": (put(raw, tensor, 24, 4096), "token_embd.weight needs 512 bytes"),
        "shape": (put(raw, tensor, 4, huge), "token_embd.weight needs"),
        "kind": (put(raw, tensor, 20, 99), "unknown kind 99"),
        "dimensions": (put(raw, tensor, 0, 77), "77 dimensions"),
    }
    for name, (content, message) in cases.items():
        file = tmp_path / f"{name}.gguf"
        file.write_bytes(content)
        begin = time.monotonic()
        with pytest.raises(UserError, match=f"{name}.gguf: not a whole GGUF file: .*{message}"):
            GgufFile(file)
        assert time.monotonic() - begin < 5
    with pytest.raises(UserError, match="no such file"):
        load_gguf(tmp_path / "missing.gguf")
    with pytest.raises(UserError, match="embedding_length is missing"):
        load_gguf(tmp_path / "whole.gguf")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make_tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """One file of each of some architectures."""
    folder = tmp_path_factory.mktemp("gguf")
    for name, fields in {
        "llama": {},
        "qwen2": {"qkv_bias": True},
        "phi3": {"rope_width": 14},
        "gemma2": WRITTEN["gemma2"],
        "gemma3": WRITTEN["gemma3"],
        "long": WRITTEN["phi3, short"],
        "llama3": {"rope_theta": 500000.0, "rope_scaling": LLAMA3},
        "mixtral": {"n_experts": 4},
        "gpt2": {
            "norm": "layernorm", "ffn": "gelu_tanh", "qkv_bias": True, "out_bias": True, "ffn_bias": True,
            "n_kv_heads": 4, "positions": "learned",
        },
    }.items():  # fmt: skip
        save_gguf(drawn(**fields), tokenizer, folder / f"{name}.gguf", "float32")
    return folder


YARN = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 64,
}


@pytest.mark.parametrize(
    ("arch", "keys", "field", "expected"),
    [
        ("llama", {"attention.sliding_window": 8}, "window", 8),
        ("llama", {"attention.sliding_window": 0}, "window", 0),
        ("llama", {"attention.scale": 0.5}, "attention_scale", 0.5),
        ("phi3", {"rope.dimension_count": 8}, "rope_width", 8),
        ("phi3", {"attention.sliding_window": 8}, "window", 8),
        ("gemma2", {"attention.sliding_window": 8}, "window", 8),
        ("gemma2", {"attention.sliding_window_pattern": 3}, "local_layers", (True, True, False)),
        (
            "gemma2",
            {"attention.sliding_window_pattern": [False, True, True]},
            "local_layers",
            (False, True, True),
        ),
        ("gemma2", {"attention.sliding_window_pattern": 1}, "window", 0),
        ("gemma2", {"attn_logit_softcapping": 5.0}, "attention_softcap", 5.0),
        ("gemma2", {"final_logit_softcapping": 5.0}, "logit_softcap", 5.0),
        ("gemma3", {"attention.sliding_window": 0}, "window", 0),
        ("gemma3", {"rope.freq_base_swa": 500.0}, "local_rope_theta", 500.0),
        ("llama", {"rope.scaling.factor": 4.0}, "rope_scaling.kind", "linear"),
        ("llama", {"rope.scale_linear": 4.0}, "rope_scaling.factor", 4.0),
        ("llama", {"rope.scaling.factor": 4.0, "rope.scaling.type": "none"}, "rope_scaling", None),
        ("llama", {**YARN, "rope.scaling.yarn_beta_fast": 16.0}, "rope_scaling.high", 16.0),
        ("llama", {**YARN, "rope.scaling.yarn_beta_slow": 2.0}, "rope_scaling.low", 2.0),
        ("llama", {**YARN, "rope.scaling.attn_factor": 2.0}, "rope_scaling.attention", 2.277259),
        ("llama", {**YARN, "rope.scaling.original_context_length": 0}, "rope_scaling.original", 256),
        ("llama", {"rope.scaling.finetuned": True, "attention.causal": True}, "rope_scaling", None),
    ],
)
@torch.no_grad()
def test_a_setting_is_honoured(
    arch: str, keys: dict[str, Any], field: str, expected: Any, folder: Path, tmp_path: Path
) -> None:
    """As a model with that field and the same tensors computes, and only so."""
    source = folder / f"{arch}.gguf"
    own = {f"{arch}.{key}": value for key, value in keys.items()}
    model, _ = load_gguf(changed(source, tmp_path / "m.gguf", own))
    plain, _ = load_gguf(source)
    got: Any = model.config
    for part in field.split("."):
        got = getattr(got, part)
    assert got == pytest.approx(expected, rel=1e-6) if isinstance(expected, float) else got == expected
    same = torch.equal(model(IDS[:1]), plain(IDS[:1]))
    assert same == (model.config == plain.config)


@pytest.mark.parametrize(
    ("arch", "keys", "message"),
    [
        ("llama", {"rope.dimension_count": 8}, "llama.rope.dimension_count is 8"),
        ("llama", {"attention.value_length": 32}, "llama.attention.value_length is 32"),
        ("llama", {"attention.key_length": 32}, "llama.attention.value_length is 16"),
        ("qwen2", {"rope.dimension_count": 8}, "qwen2.rope.dimension_count is 8"),
        ("phi3", {"rope.dimension_count": 0}, "phi3.rope.dimension_count is 0"),
        ("llama", {"rope.scaling.attn_factor": 2.0}, "llama.rope.scaling.attn_factor is 2.0"),
        ("llama", {**YARN, "rope.scaling.yarn_ext_factor": 0.5}, "yarn_ext_factor is 0.5"),
        ("llama", {**YARN, "rope.scaling.yarn_attn_factor": 0.5}, "yarn_attn_factor is 0.5"),
        ("llama", {**YARN, "rope.scaling.yarn_log_multiplier": 0.1}, "yarn_log_multiplier is 0.1"),
        ("llama", {**YARN, "rope.scaling.factor": 0.5}, "greater than or equal to 1"),
        ("llama", {"rope.scaling.type": "longrope"}, "llama.rope.scaling.type is 'longrope'"),
        ("llama", {"attention.causal": False}, "llama.attention.causal is False"),
        ("llama", {"logit_scale": 0.5}, "llama.logit_scale is 0.5"),
        ("llama", {"attention.clamp_kqv": 8.0}, "llama.attention.clamp_kqv is 8.0"),
        ("llama", {"final_logit_softcapping": 30.0}, "llama.final_logit_softcapping is 30.0"),
        ("mixtral", {"expert_shared_count": 1}, "expert_shared_count is 1"),
        ("mixtral", {"expert_gating_func": 2}, "expert_gating_func is 2"),
        ("gpt2", {"rope.freq_base": 10000.0}, "gpt2.rope.freq_base is 10000.0"),
        ("gpt2", {"attention.sliding_window": 8}, "gpt2.attention.sliding_window is 8"),
        ("phi3", {"attention.key_length": 32, "attention.value_length": 32}, "attention.key_length is 32"),
        ("gemma2", {"attention.sliding_window": 0}, "gemma2.attention.sliding_window is 0"),
        ("gemma2", {"attention.sliding_window_pattern": [True]}, "sliding_window_pattern has 1 flags"),
        ("gemma2", {"attn_logit_softcapping": 0.0}, "gemma2.attn_logit_softcapping is 0.0"),
        ("gemma2", {"rope.freq_base_swa": 500.0}, "gemma2.rope.freq_base_swa is 500.0"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "gemma3.attn_logit_softcapping is 50.0"),
        ("long", {"rope.scaling.factor": 2.0}, "rope.scaling.type is 'longrope', by 2.0"),
        ("llama", {"attention.head_count": 0}, "llama.attention.head_count is 0"),
        ("llama", {"attention.head_count_kv": [2, 2]}, "n_kv_heads: .*valid integer"),
        ("llama", {"attention.head_count_kv": 3}, "not a multiple of n_kv_heads 3"),
        ("llama", {"block_count": 4294967295}, "tensors of 2 layers, and block_count is 4294967295"),
        ("llama", {"block_count": 1e12}, r"block_count is 9999999\d+\.0"),
        ("llama", {"block_count": "1000000000"}, "block_count is 1000000000"),
        ("mixtral", {"expert_count": 4294967295}, "blk.0.ffn_gate_exps.weight has shape .* 4294967295"),
        ("llama", {"embedding_length": 65}, "has shape"),
        ("llama", {"feed_forward_length": 97}, "blk.0.ffn_(gate|up|down).weight has shape"),
        ("llama", {"feed_forward_length": 2**64 - 1}, "no memory holds|ffn_width"),
        ("llama", {"vocab_size": 200}, "tokenizer has 300 entries, the model 200"),
        ("llama", {"vocab_size": 400}, "token_embd.weight has shape"),
    ],
)
def test_a_setting_is_refused(
    arch: str, keys: dict[str, Any], message: str, folder: Path, tmp_path: Path
) -> None:
    known = {"mixtral": "llama", "long": "phi3"}.get(arch, arch)
    own = {f"{known}.{key}": value for key, value in keys.items()}
    file = changed(folder / f"{arch}.gguf", tmp_path / "m.gguf", own)
    begin = time.monotonic()
    with pytest.raises(UserError, match=message) as caught:
        load_gguf(file)
    assert "m.gguf" in caught.value.message
    assert caught.value.remedy
    assert time.monotonic() - begin < 5


def test_settings_that_are_missing_are_named(folder: Path, tmp_path: Path) -> None:
    for key in ("block_count", "context_length", "attention.layer_norm_rms_epsilon", "feed_forward_length"):
        with pytest.raises(UserError, match=f"llama.{key} is missing"):
            load_gguf(changed(folder / "llama.gguf", tmp_path / "m.gguf", without=[f"llama.{key}"]))


def test_architectures_and_parts_are_refused(folder: Path, tmp_path: Path) -> None:
    other = changed(folder / "llama.gguf", tmp_path / "a.gguf", {"general.architecture": "mamba"})
    with pytest.raises(UserError, match="architecture 'mamba'"):
        load_gguf(other)
    with pytest.raises(UserError, match="architecture 'mamba'"):
        sizes_of(other)
    part = changed(folder / "llama.gguf", tmp_path / "b.gguf", {"split.count": 3})
    with pytest.raises(UserError, match="one of 3 parts"):
        load_gguf(part)


def test_tensors_that_lack_or_do_not_fit_are_named(folder: Path, tmp_path: Path) -> None:
    def refused(message: str, arch: str = "llama", **changes: Any) -> None:
        with pytest.raises(UserError, match=message):
            load_gguf(changed(folder / f"{arch}.gguf", tmp_path / "m.gguf", **changes))

    up = "blk.1.ffn_up.weight"
    refused(f"no tensor {up}", without=[up])
    refused(f"unknown tensor {up}.2", tensors={f"{up}.2": np.ones((2, 2), np.float32)})
    refused(
        f"{up} has shape \\(96, 63\\), expected \\(96, 64\\)", tensors={up: np.ones((96, 63), np.float32)}
    )
    refused("no tensor token_embd.weight", without=["token_embd.weight"])
    refused("no tensor blk.0.ffn_gate_exps.weight", "mixtral", without=["blk.0.ffn_gate_exps.weight"])
    freqs = "rope_freqs.weight"
    refused(f"{freqs} holds 7 numbers, expected 8", "llama3", tensors={freqs: np.ones(7, np.float32)})
    refused(f"{freqs} holds 0 numbers", "llama3", tensors={freqs: np.ones(0, np.float32)})
    refused(f"{freqs} is not that of LLaMA 3", "llama3", tensors={freqs: np.full(8, 2, np.float32)})
    refused("beside rope_freqs.weight", "llama3", keys={"llama.rope.scaling.factor": 2.0})
    refused("one is missing", "long", without=["rope_factors_short.weight"])
    short = np.ones(7, np.float32)
    refused("rope_scaling.short needs 8 numbers", "long", tensors={"rope_factors_short.weight": short})
    refused(f"unknown tensor {freqs}", "qwen2", tensors={freqs: np.ones(8, np.float32)})


def half(raw: np.ndarray) -> np.ndarray:
    """(…, 2) bytes as numbers (…)."""
    return np.ascontiguousarray(raw).view("<f2")[..., 0].astype(np.float32)


def nibbles(raw: np.ndarray) -> np.ndarray:
    """The low halves of the bytes, then the high ones."""
    return np.concatenate([raw & 15, raw >> 4], -1)


def fifth_bits(raw: np.ndarray) -> np.ndarray:
    """Bit n of a little-endian uint32, for the n-th number, as 16."""
    return np.unpackbits(raw, axis=-1, bitorder="little") * 16


def f32(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32)


def q4_0(block: np.ndarray) -> np.ndarray:
    """scale; 16 bytes of two numbers: d (q - 8)."""
    return half(block[:, :2])[:, None] * (f32(nibbles(block[:, 2:])) - 8)


def q4_1(block: np.ndarray) -> np.ndarray:
    """scale, minimum; 16 bytes: d q + m."""
    d, m = half(block[:, :2])[:, None], half(block[:, 2:4])[:, None]
    return d * f32(nibbles(block[:, 4:])) + m


def q5_0(block: np.ndarray) -> np.ndarray:
    """scale; 4 bytes of fifth bits; 16 bytes of low bits: d (q - 16)."""
    q = nibbles(block[:, 6:]) + fifth_bits(block[:, 2:6])
    return half(block[:, :2])[:, None] * (f32(q) - 16)


def q5_1(block: np.ndarray) -> np.ndarray:
    d, m = half(block[:, :2])[:, None], half(block[:, 2:4])[:, None]
    return d * f32(nibbles(block[:, 8:]) + fifth_bits(block[:, 4:8])) + m


def q8_0(block: np.ndarray) -> np.ndarray:
    """scale; 32 signed bytes: d q."""
    return half(block[:, :2])[:, None] * f32(block[:, 2:].view(np.int8))


def q4_k(block: np.ndarray) -> np.ndarray:
    """d, dmin; 12 bytes of eight scales and eight minima of 6 bits; 128 bytes, each 32 of two sub-blocks."""
    out = np.empty((len(block), 8, 32), np.float32)
    d, dmin, packed = half(block[:, :2]), half(block[:, 2:4]), block[:, 4:16]
    for j in range(8):
        if j < 4:
            scale, least = packed[:, j] & 63, packed[:, j + 4] & 63
        else:
            scale = (packed[:, j + 4] & 15) | ((packed[:, j - 4] >> 6) << 4)
            least = (packed[:, j + 4] >> 4) | ((packed[:, j] >> 6) << 4)
        bytes_of = block[:, 16 + 32 * (j // 2) : 48 + 32 * (j // 2)]
        q = bytes_of >> 4 if j % 2 else bytes_of & 15
        out[:, j] = (d * f32(scale))[:, None] * f32(q) - (dmin * f32(least))[:, None]
    return out.reshape(len(block), 256)


def q6_k(block: np.ndarray) -> np.ndarray:
    """128 bytes of low 4 bits, 64 of high 2, 16 signed scales, d; two halves of four rows of 32 numbers."""
    out = np.empty((len(block), 2, 4, 32), np.float32)
    low, high, scales = block[:, :128], block[:, 128:192], block[:, 192:208].view(np.int8)
    d = half(block[:, 208:])
    for h in range(2):
        for row in range(4):
            four = low[:, 64 * h + 32 * (row % 2) : 64 * h + 32 * (row % 2) + 32]
            four = four >> 4 if row >= 2 else four & 15
            two = (high[:, 32 * h : 32 * h + 32] >> (2 * row)) & 3
            q = f32(four | (two << 4)) - 32
            scale = f32(scales[:, 8 * h + 2 * row : 8 * h + 2 * row + 2]).repeat(16, axis=1)
            out[:, h, row] = d[:, None] * scale * q
    return out.reshape(len(block), 256)


def bf16(block: np.ndarray) -> np.ndarray:
    """The upper half of a float32."""
    bits = block.reshape(-1, 2).astype(np.uint32)
    return ((bits[:, 0] | (bits[:, 1] << 8)) << 16).view(np.float32)


UNPACK = {
    "Q4_0": (32, 18, q4_0),
    "Q4_1": (32, 20, q4_1),
    "Q5_0": (32, 22, q5_0),
    "Q5_1": (32, 24, q5_1),
    "Q8_0": (32, 34, q8_0),
    "Q4_K": (256, 144, q4_k),
    "Q6_K": (256, 210, q6_k),
    "F16": (1, 2, half),
    "BF16": (1, 2, bf16),
    "F32": (1, 4, lambda block: np.ascontiguousarray(block).view("<f4")),
}
"""Numbers and bytes of a block, and what they mean, written from the structs in ggml-common.h."""


@pytest.mark.parametrize("kind", UNPACK)
def test_every_kind_is_unpacked(kind: str, tmp_path: Path) -> None:
    """Blocks of random bytes; scales among them may be anything, so nan is where the formula's is."""
    which = gguf.GGMLQuantizationType[kind]
    numbers, size, unpack = UNPACK[kind]
    raw = np.random.default_rng(0).integers(0, 256, (4, 512 // numbers * size), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("token_embd.weight", raw, raw_dtype=which)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with np.errstate(all="ignore"):
        got = GgufFile(tmp_path / "m.gguf").read("token_embd.weight").numpy()
        expected = unpack(raw.reshape(-1, size)).reshape(4, 512)
    assert np.isfinite(expected).mean() > 0.5
    assert np.array_equal(got, expected, equal_nan=True)


def test_what_a_dtype_cannot_hold_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = drawn()
    model.layers[1].ffn.up.weight.data[3, 5] = 70000.0
    for dtype in ("float16", "q8_0"):
        if dtype == "q8_0":
            model.layers[1].ffn.up.weight.data[3, 5] = 1e7
        with pytest.raises(
            UserError, match=r"blk\.1\.ffn_up\.weight holds (70000.* 65,504|1e\+07)"
        ) as caught:
            save_gguf(model, tokenizer, tmp_path / "m.gguf", dtype)  # type: ignore[arg-type]
        assert "bfloat16" in caught.value.remedy
    assert not list(tmp_path.iterdir())
    save_model(model, tmp_path / "hf", tokenizer)
    for out in ("half", "half.gguf"):
        with pytest.raises(UserError, match=r"up\.weight holds"):
            convert(ConvertConfig(source=str(tmp_path / "hf"), out=tmp_path / out, dtype="float16"))
        assert not (tmp_path / out).exists()
    with pytest.raises(UserError, match=r"up\.weight holds"):
        danlu.load(tmp_path / "hf", dtype=torch.float16)
    convert(ConvertConfig(source=str(tmp_path / "hf"), out=tmp_path / "b.gguf", dtype="bfloat16"))
    with pytest.raises(UserError, match=r"up\.weight holds"):
        load_gguf(tmp_path / "b.gguf", torch.float16)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_convert_narrows_matrices_alone(dtype: Any, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Norms of a GGUF file are float32, and stay so; a folder is of one dtype, rounded once."""
    model = drawn(n_experts=2)
    save_gguf(model, tokenizer, tmp_path / "m.gguf", "float32")
    convert(ConvertConfig(source=str(tmp_path / "m.gguf"), out=tmp_path / "n.gguf", dtype=dtype))
    back, _ = load_gguf(tmp_path / "n.gguf")
    kind = getattr(torch, dtype)
    for (name, p), q in zip(model.state_dict().items(), back.state_dict().values(), strict=True):
        whole = p.ndim == 1 or "router" in name
        assert torch.equal(q, p if whole else p.to(kind).float()), name
    convert(ConvertConfig(source=str(tmp_path / "m.gguf"), out=tmp_path / "hf", dtype=dtype))
    folder, _ = danlu.load(tmp_path / "hf")
    for (name, p), q in zip(model.state_dict().items(), folder.state_dict().values(), strict=True):
        assert torch.equal(q, p.to(kind)), name


def test_a_folder_of_several_dtypes_is_not_rounded(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = drawn()
    for p in model.parameters():
        p.data = p.data.bfloat16() if p.ndim > 1 else p.data
    save_model(model, tmp_path / "hf", tokenizer)
    convert(ConvertConfig(source=str(tmp_path / "hf"), out=tmp_path / "m.gguf", dtype="bfloat16"))
    back, _ = load_gguf(tmp_path / "m.gguf")
    for (name, p), q in zip(model.state_dict().items(), back.state_dict().values(), strict=True):
        assert torch.equal(q, p.float()), name


def test_kinds_that_gguf_lacks_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_model(drawn().double(), tmp_path / "hf", tokenizer)
    with pytest.raises(UserError, match="no weights as float64"):
        convert(ConvertConfig(source=str(tmp_path / "hf"), out=tmp_path / "m.gguf"))


LOUDER: dict[str, Any] = WRITTEN["llama, yarn, louder"]["rope_scaling"]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"window": 16}, "window"),
        ({"attention_scale": 0.5}, "attention_scale"),
        ({"rope_width": 8, "head_width": 32}, "rope_width"),
        ({"rope_width": 8, "qkv_bias": True}, "rope_width"),
        ({"rope_scaling": {"kind": "yarn", "factor": 4.0, "original": 64, "high": 16.0}}, "rope_scaling"),
        (
            {"rope_scaling": {"kind": "yarn", "factor": 4.0, "original": 64, "truncate": False}},
            "rope_scaling",
        ),
        ({"qkv_bias": True, "rope_scaling": LLAMA3, "rope_theta": 500000.0}, "qkv_bias"),
        ({**WRITTEN["gemma2"], "local_layers": (False, True)}, "local_layers"),
        ({**WRITTEN["gemma2"], "embedding_scale": 2.0}, "embedding_scale"),
        ({**WRITTEN["gemma3"], "ffn": "geglu"}, "ffn"),
    ],
)
def test_what_llama_cpp_would_ignore_is_not_written(
    fields: dict[str, Any], named: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=f"no architecture with these settings .* differs in {named}\n"):
        save_gguf(drawn(**fields), tokenizer, tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "phi3, short", "phi3, long, a part rotated"])
@torch.no_grad()
def test_a_folder_comes_back_from_gguf_as_the_same_family(
    name: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model = drawn(**WRITTEN[name])
    save_model(model, tmp_path / "hf", tokenizer)
    convert(ConvertConfig(source=str(tmp_path / "hf"), out=tmp_path / "m.gguf"))
    convert(ConvertConfig(source=str(tmp_path / "m.gguf"), out=tmp_path / "back"))
    before, after = (read_json(tmp_path / folder / "config.json") for folder in ("hf", "back"))
    assert before["model_type"] == after["model_type"] != "danlu"
    assert torch.equal(danlu.load(tmp_path / "back")[0](IDS), model(IDS))


def test_the_scores_of_the_largest_gemmas(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Of 27 B parameters, which llama.cpp knows by their layers: by the stream's width, not the heads'."""
    for layers, scale in ((46, 16**-0.5), (45, 32**-0.5)):
        fields = {"n_layers": layers, "head_width": 32, "attention_scale": scale}
        save_gguf(drawn(**{**WRITTEN["gemma2"], **fields}), tokenizer, tmp_path / "m.gguf")
        assert sizes_of(tmp_path / "m.gguf").attention_scale == pytest.approx(scale)
        with pytest.raises(UserError, match="attention_scale"):
            save_gguf(
                drawn(**{**WRITTEN["gemma2"], **fields, "attention_scale": 0.1}), tokenizer, tmp_path / "n"
            )


def test_numbers_of_many_digits_are_written(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """To those that a float32 keeps."""
    model = drawn(rope_theta=1234567.89, norm_eps=1.23456789e-5, attention_scale=16**-0.5)
    save_gguf(model, tokenizer, tmp_path / "m.gguf")
    back: ModelConfig = load_gguf(tmp_path / "m.gguf")[0].config
    assert (back.rope_theta, back.norm_eps) == pytest.approx((1234567.89, 1.23456789e-5), rel=1e-6)
