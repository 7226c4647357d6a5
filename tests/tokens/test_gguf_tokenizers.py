"""Tokenizers in GGUF files: SentencePiece's own ids, and llama.cpp's of the files that we write."""

import json
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from sentencepiece_models import train
from some_texts import TEXTS, mixed_strings

from danlu.core.errors import UserError
from danlu.model.config import ModelConfig
from danlu.model.gguf import load_gguf, save_gguf
from danlu.model.transformer import Transformer
from danlu.tokens.bpe import train_bpe
from danlu.tokens.from_gguf import tokenizer_from_gguf
from danlu.tokens.load import load_tokenizer
from danlu.tokens.to_gguf import tokenizer_to_gguf
from danlu.tokens.tokenizer import Tokenizer

STRINGS = [*mixed_strings(300), *TEXTS, " ", "  a", "a  b ", "\n\n", "the furnace", "a\n\nb", "</s> <s>"]


def written_as_gguf(file: bytes) -> dict[str, Any]:
    """What llama.cpp's converter writes for a SentencePiece model, through the library's own answers."""
    model = sentencepiece.SentencePieceProcessor(model_proto=file)
    numbers = range(model.vocab_size())
    kinds = [
        2 if model.is_unknown(n) else 3 if model.is_control(n) else 6 if model.is_byte(n) else 1
        for n in numbers
    ]
    values = {
        "model": "llama",
        "tokens": [model.id_to_piece(n) for n in numbers],
        "scores": [model.get_score(n) for n in numbers],
        "token_type": kinds,
        "bos_token_id": model.bos_id(),
        "eos_token_id": model.eos_id(),
        "unknown_token_id": model.unk_id(),
    }
    return {f"tokenizer.ggml.{key}": value for key, value in values.items()}


def test_ids_of_kind_llama_are_sentencepieces() -> None:
    file = train(TEXTS * 4, "llama")
    theirs = sentencepiece.SentencePieceProcessor(model_proto=file)
    ours = tokenizer_from_gguf(written_as_gguf(file), "a file")
    for text in STRINGS:
        assert ours.encode(text) == theirs.encode(text), repr(text)
        assert ours.decode(theirs.encode(text)) == text
    assert ours.document_start == [theirs.bos_id()]
    assert ours.stop_ids == [theirs.eos_id()]


@pytest.fixture(scope="module", params=["llama", "gemma", "ours"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    if request.param == "ours":
        return train_bpe(TEXTS * 4, 480)
    file = tmp_path_factory.mktemp("s") / "tokenizer.model"
    file.write_bytes(train(TEXTS * 4, request.param))
    return load_tokenizer(file)


@pytest.fixture(scope="module")
def written(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        width=32,
        n_layers=1,
        n_heads=2,
        n_kv_heads=2,
        ffn_width=32,
        max_positions=64,
    )
    file = tmp_path_factory.mktemp("gguf") / "m.gguf"
    save_gguf(Transformer(sizes), tokenizer, file, "float32")
    return file


def test_what_is_written_is_read(tokenizer: Tokenizer, written: Path) -> None:
    back = load_gguf(written)[1]
    for text in STRINGS:
        assert back.encode(text) == tokenizer.encode(text), repr(text)
    assert back.document_start == tokenizer.document_start
    assert set(back.stop_ids) == set(tokenizer.stop_ids)
    assert back.token_bytes == tokenizer.token_bytes


def test_llama_cpp_gives_the_same_ids(tokenizer: Tokenizer, written: Path) -> None:
    cpp = pytest.importorskip("xllamacpp")
    params = cpp.CommonParams()
    params.model.path, params.n_ctx, params.cpuparams.n_threads = str(written), 64, 1
    server = cpp.Server(params)

    def ask(text: str) -> list[int]:
        body = json.dumps({"content": text, "add_special": True, "parse_special": False}).encode()
        request = urllib.request.Request(
            f"{server.listening_address}/tokenize", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)["tokens"]

    for text in STRINGS:
        assert [*tokenizer.document_start, *tokenizer.encode(text)] == ask(text), repr(text)


def test_what_gguf_cannot_say_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(train(TEXTS * 4, "t5"))
    with pytest.raises(UserError, match="kind Unigram"):
        tokenizer_to_gguf(load_tokenizer(tmp_path), 600)
    squeezing = load_tokenizer(tmp_path)
    squeezing.backend.model = train_bpe(TEXTS * 4, 480).backend.model
    squeezing.backend.model.byte_fallback = True
    with pytest.raises(UserError, match="changes text"):
        tokenizer_to_gguf(squeezing, 600)
    many = train_bpe(TEXTS * 4, 480)
    many.backend.add_special_tokens(["<a>", "<b>", "<c>"])
    many = Tokenizer(many.backend, None, "<|endoftext|>", ["<|endoftext|>", "<a>", "<b>", "<c>"], "")
    with pytest.raises(UserError, match="fourth stop token, '<c>'"):
        tokenizer_to_gguf(many, 600)
    with pytest.raises(UserError, match="480 entries, the model's embedding 400 rows"):
        tokenizer_to_gguf(train_bpe(TEXTS * 4, 480), 400)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "bert"}, "kind 'bert'"),
        ({"scores": [0.0]}, "1 scores"),
        ({"tokens": ["a", "a"], "token_type": [1, 1]}, "2 tokens, 1 different"),
        ({"token_type": [1]}, "1 kinds"),
        ({"eos_token_id": 10**6}, "eos_token_id is 1000000"),
        ({"tokens": "abc"}, "tokens is 'abc'"),
    ],
)
def test_a_damaged_vocabulary_is_one_message(change: dict[str, Any], message: str) -> None:
    changed = {f"tokenizer.ggml.{key}": value for key, value in change.items()}
    with pytest.raises(UserError, match=message):
        tokenizer_from_gguf({**written_as_gguf(train(TEXTS * 4, "llama")), **changed}, "a file")
