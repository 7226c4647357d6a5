"""GGUF files: the real SmolLM2 from its package against transformers, and files that are damaged."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import danlu
from danlu.core.errors import UserError
from danlu.generate.engine import Engine
from danlu.generate.sampling import SamplingParams
from danlu.model.checkpoint import resolve
from danlu.model.gguf import GgufFile, load_gguf
from danlu.model.transformer import Transformer
from danlu.tokens.tokenizer import Tokenizer

TEXTS = [
    "The furnace waits under the cold night, and the alchemist opens no door.",
    "丹炉 is a furnace; 12,345 and 3.14 are numbers.\n\n  Spaces   and\ttabs",
    "def area(r):\n    return 3.14159 * r ** 2  # it's a circle",
    "<|im_start|> is text here, émigré naïveté 🔥",
]


@pytest.fixture(scope="module")
def path() -> Path:
    try:
        return resolve("smollm2")
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def loaded(path: Path) -> tuple[Transformer, Tokenizer]:
    return danlu.load("smollm2")


@pytest.mark.slow
def test_logits_and_ids_are_those_of_transformers(path: Path, loaded: tuple[Transformer, Tokenizer]) -> None:
    model, tokenizer = loaded
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    their_tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        if "<|" not in text:  # theirs takes the spelling for the token
            assert ids == their_tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(ids) == text
        with torch.no_grad():
            got, want = model(torch.tensor([ids])), theirs(torch.tensor([ids])).logits
        assert (got - want).abs().max() <= 1e-3 * want.abs().max()
        first, second = want.topk(2).values.unbind(-1)
        clear = first - second > 1e-3
        assert torch.equal(got.argmax(-1)[clear], want.argmax(-1)[clear])
    chat = [{"role": "user", "content": "Hi there"}]
    prompt = their_tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    assert Engine(model, tokenizer).prompt_ids(chat) == prompt


@pytest.mark.slow
def test_it_knows_the_capital_of_france_and_stops(loaded: tuple[Transformer, Tokenizer]) -> None:
    question = [{"role": "user", "content": "What is the capital of France?"}]
    answer = Engine(*loaded).chat(question, SamplingParams(max_tokens=40, temperature=0))
    assert "Paris" in answer.text
    assert answer.finish_reason == "stop"


def small(path: Path) -> Path:
    """A file of one tensor."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("token_embd.weight", np.ones((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_damaged_files_are_one_clear_error(tmp_path: Path) -> None:
    raw = small(tmp_path / "whole.gguf").read_bytes()
    assert GgufFile(tmp_path / "whole.gguf").names == {"token_embd.weight"}
    lying = raw.replace(b"general.architecture", b"general.architecture")
    at = lying.index(b"general.architecture") - 8
    lying = lying[:at] + (2**60).to_bytes(8, "little") + lying[at + 8 :]
    for name, content in {
        "magic": b"GGML" + raw[4:],
        "cut": raw[: len(raw) // 2],
        "short": raw[:-5],
        "empty": b"",
        "lying": lying,
    }.items():
        file = tmp_path / f"{name}.gguf"
        file.write_bytes(content)
        with pytest.raises(UserError, match=f"{name}.gguf: not a whole GGUF file"):
            GgufFile(file)
    with pytest.raises(UserError, match="no such file"):
        load_gguf(tmp_path / "missing.gguf")
    with pytest.raises(UserError, match="embedding_length is missing"):
        load_gguf(tmp_path / "whole.gguf")
