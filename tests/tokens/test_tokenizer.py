"""Our tokenizer beside transformers' reading of the same files; any bytes go there and back."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from some_texts import mixed_strings
from tokenizers import normalizers, pre_tokenizers
from transformers import AutoTokenizer

from danlu.core.errors import UserError
from danlu.tokens.bpe import train_bpe
from danlu.tokens.load import load_tokenizer
from danlu.tokens.tokenizer import Tokenizer


def test_transformers_gives_the_same_ids_on_a_thousand_strings(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save_folder(tmp_path / "tokenizer")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    for text in mixed_strings(1000):
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.encode(text) == ids, repr(text)
        assert tokenizer.decode(ids) == theirs.decode(ids) == text


def test_saved_and_loaded_it_is_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save_folder(tmp_path / "tokenizer")
    for folder in (tmp_path, tmp_path / "tokenizer"):
        back = load_tokenizer(folder)
        assert back.fingerprint() == tokenizer.fingerprint()
        assert (back.eos_id, back.bos_id, back.stop_ids) == (0, 0, [2, 0])
        assert back.chat_template == tokenizer.chat_template


def test_special_tokens_spelt_out_are_ordinary_text(tokenizer: Tokenizer) -> None:
    text = "<|im_start|>system\nI am <|im_end|> safe <|endoftext|>"
    ids = tokenizer.encode(text)
    assert not set(ids) & set(tokenizer.special_ids.values())
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_batch([text]) == [ids]


@given(st.binary(max_size=200) | st.text().map(str.encode))
@settings(max_examples=300)
def test_any_bytes_go_there_and_back(raw: bytes) -> None:
    tokenizer = any_bytes_tokenizer()
    assert tokenizer.decode_bytes(tokenizer.encode_bytes(raw)) == raw


def test_bytes_are_not_normalised() -> None:
    tokenizer = train_bpe(["The furnace is hot.\n"] * 20, 270)
    tokenizer.backend.normalizer = normalizers.NFC()
    assert tokenizer.encode("cafe\u0301") == tokenizer.encode("café")
    for text in ("café", "cafe\u0301"):
        assert tokenizer.decode_bytes(tokenizer.encode_bytes(text.encode())) == text.encode()


def test_bytes_that_would_not_come_back_are_refused() -> None:
    tokenizer = train_bpe(["The furnace is hot.\n"] * 20, 270)
    words = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), tokenizer.backend.pre_tokenizer])
    tokenizer.backend.pre_tokenizer = words
    with pytest.raises(UserError, match="the same bytes"):
        tokenizer.encode_bytes(b"The furnace")


def any_bytes_tokenizer(cache: list[Tokenizer] = []) -> Tokenizer:  # noqa: B006 made once
    if not cache:
        cache.append(train_bpe(["the cat sat on the mat, the cat sat"] * 3, 265))
    return cache[0]


def test_a_document_stands_between_ends_of_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode_document("hot") == [0, *tokenizer.encode("hot"), 0]


def test_a_vocabulary_larger_than_the_text_supports_names_what_it_does() -> None:
    with pytest.raises(UserError, match=r"a few words: supports a vocabulary of (\d+), asked for 5000"):
        train_bpe(["ab ab ab"], 5000, "a few words")


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("tokenizer.json", "{}", r"tokenizer\.json: not a tokenizer"),
        ("tokenizer_config.json", "{", r"tokenizer_config\.json, line 1: not valid JSON"),
        ("tokenizer_config.json", "[]", r"tokenizer_config\.json: not an object"),
        ("tokenizer_config.json", '{"eos_token": 3}', "eos_token is 3"),
        ("tokenizer_config.json", '{"eos_token": "<end>"}', "the vocabulary has no '<end>'"),
        ("tokenizer.json", None, r"tokenizer: holds no tokenizer"),
    ],
)
def test_a_broken_folder_is_one_message(
    tokenizer: Tokenizer, tmp_path: Path, file: str, text: str | None, message: str
) -> None:
    tokenizer.save_folder(tmp_path / "tokenizer")
    path = tmp_path / "tokenizer" / file
    path.unlink()
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path / "tokenizer")


def test_the_bytes_of_every_token_are_those_of_the_vocabulary(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save_folder(tmp_path / "tokenizer")
    entries = json.loads((tmp_path / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"]
    assert len(tokenizer.token_bytes) == len(entries) == tokenizer.vocab_size
    singles = [raw for raw in tokenizer.token_bytes if len(raw) == 1]
    assert sorted(singles) == [bytes([value]) for value in range(256)]
