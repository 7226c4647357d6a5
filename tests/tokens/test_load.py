"""Tokenizers of all kinds beside the libraries that they come from: sentencepiece, tiktoken, transformers."""

import base64
import gzip
import json
import os
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tiktoken
import tokenizers
from sentencepiece_models import LIKE, train
from some_texts import TEXTS, mixed_strings
from tokenizers import AddedToken
from transformers import AutoTokenizer, GPT2Tokenizer, OpenAIGPTTokenizer

from danlu.core.errors import UserError
from danlu.tokens.bpe import train_bpe
from danlu.tokens.from_tiktoken import LLAMA3_WORDS
from danlu.tokens.load import load_tokenizer
from danlu.tokens.tokenizer import Tokenizer, begin_with

STRINGS = [
    *mixed_strings(1000), *TEXTS, "", " ", "  a", "a  b ", "\n\n", "the furnace is hot", "\tThe", "a\n\nb",
]  # fmt: skip


def has_marks(text: str) -> bool:
    """Whether characters combine."""
    return any(unicodedata.category(character).startswith("M") for character in text)


@pytest.fixture(scope="module", params=list(LIKE))
def model_file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("sentencepiece") / "tokenizer.model"
    file.write_bytes(train(TEXTS * 4, request.param))
    return file


def test_sentencepiece_gives_the_same_ids(model_file: Path) -> None:
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    ours = load_tokenizer(model_file.parent)
    assert ours.vocab_size == theirs.vocab_size()
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_id(), theirs.eos_id())
    for text in STRINGS:
        if b"nfkc" in model_file.read_bytes() and has_marks(text):
            continue  # the library normalises by grapheme, SentencePiece by the longest entry of its table
        ids = theirs.encode(text)
        assert ours.encode(text) == ids, repr(text)
        if theirs.unk_id() not in ids:
            assert ours.decode(ids) == theirs.decode(ids), repr(text)


def test_transformers_reads_what_is_saved(model_file: Path, tmp_path: Path) -> None:
    ours = load_tokenizer(model_file)
    ours.save_folder(tmp_path / "saved")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "saved")
    back = load_tokenizer(tmp_path / "saved")
    assert back.fingerprint() == ours.fingerprint()
    for text in STRINGS[-300:]:
        assert [ours.bos_id, *ours.encode(text)] == theirs(text)["input_ids"], repr(text)


def test_bytes_come_back_where_every_byte_is_known(model_file: Path) -> None:
    tokenizer = load_tokenizer(model_file)
    raw = "▁ a▁b  c\r\n<0x41> ｆ</s> \n".encode() + bytes(range(256))
    if all(f"<0x{byte:02X}>" in tokenizer.backend.get_vocab() for byte in range(256)):
        assert tokenizer.decode_bytes(tokenizer.encode_bytes(raw)) == raw
    else:
        with pytest.raises(UserError, match="knows every byte"):
            tokenizer.encode_bytes(raw)


def test_special_tokens_spelt_out_are_text(model_file: Path) -> None:
    tokenizer = load_tokenizer(model_file)
    for text in ("</s>", "a <s> b </s> c </s></s>", "<s>"):
        ids = tokenizer.encode(text)
        assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids)
        assert tokenizer.encode_batch([text]) == [ids]


REAL = {"zh-alpaca-tok/chinese_sp.model": 20000, "cpm-tok/chinese_vocab.model": 30000}


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_published_chinese_models(name: str) -> None:
    data = os.environ.get("DANLU_DATA")
    file = Path(data or "") / name
    if data is None or not file.is_file():
        pytest.skip(f"DANLU_DATA has no {name}")
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(file))
    ours = load_tokenizer(file.parent)
    assert ours.vocab_size == REAL[name]
    for text in STRINGS:
        if not has_marks(text):
            assert ours.encode(text) == theirs.encode(text), repr(text)


@pytest.mark.slow
def test_cpms_own_vocabulary_is_the_models() -> None:
    folder = Path(os.environ.get("DANLU_DATA", "")) / "cpm-tok"
    if not folder.is_dir() or "DANLU_DATA" not in os.environ:
        pytest.skip("DANLU_DATA has no cpm-tok")
    entries = gzip.decompress((folder / "chinese_vocab.vocab.gz").read_bytes()).decode().splitlines()
    ours = load_tokenizer(folder)
    assert [ours.backend.id_to_token(n) for n in range(30000)] == [line.split("\t")[0] for line in entries]


# tiktoken.


def ranks_of(tokenizer: Tokenizer) -> dict[bytes, int]:
    """The entries of a byte-level BPE, in the order in which they were learnt."""
    special = set(tokenizer.special_ids.values())
    entries = [raw for number, raw in enumerate(tokenizer.token_bytes) if number not in special]
    return {raw: rank for rank, raw in enumerate(entries)}


def tiktoken_file(ranks: dict[bytes, int]) -> str:
    return "".join(f"{base64.b64encode(raw).decode()} {rank}\n" for raw, rank in ranks.items())


def test_tiktoken_gives_the_same_ids_with_metas_special_tokens(tokenizer: Tokenizer, tmp_path: Path) -> None:
    ranks = ranks_of(tokenizer)
    (tmp_path / "tokenizer.model").write_text(tiktoken_file(ranks))
    theirs = tiktoken.Encoding("ours", pat_str=LLAMA3_WORDS, mergeable_ranks=ranks, special_tokens={})
    ours = load_tokenizer(tmp_path)
    for text in STRINGS:
        assert ours.encode(text) == theirs.encode(text, disallowed_special=()), repr(text)
        assert ours.decode(ours.encode(text)) == text
    first = len(ranks)
    assert ours.vocab_size == first + 256
    # As config.json of Llama 3.1 and its generation_config.json count them, from 128,000 on.
    assert ours.document_start == [first]
    named = {"<|end_of_text|>": 1, "<|start_header_id|>": 6, "<|eom_id|>": 8, "<|eot_id|>": 9}
    assert {name: ours.special_ids[name] - first for name in named} == named
    assert {first + 1, first + 8, first + 9} == set(ours.stop_ids)


def test_another_file_of_tiktokens_must_say_its_pattern(tokenizer: Tokenizer, tmp_path: Path) -> None:
    ranks = ranks_of(tokenizer)
    pattern = r"\p{L}+|\p{N}|[^\p{L}\p{N}]+"
    (tmp_path / "some.tiktoken").write_text(tiktoken_file(ranks))
    with pytest.raises(UserError, match="how words are cut"):
        load_tokenizer(tmp_path)
    settings = {
        "pattern": pattern,
        "added_tokens_decoder": {len(ranks) + 2: {"content": "<end>", "special": True}},
    }
    settings["eos_token"] = "<end>"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    ours = load_tokenizer(tmp_path)
    theirs = tiktoken.Encoding("ours", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    for text in STRINGS[:200]:
        assert ours.encode(text) == theirs.encode(text, disallowed_special=())
    assert ours.eos_id == len(ranks) + 2
    assert ours.vocab_size == len(ranks) + 3


# vocab.json and merges.txt.


def write_vocabulary(folder: Path, backend: tokenizers.Tokenizer) -> None:
    content = json.loads(backend.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(content["vocab"]))
    lines = ["#version: 0.2", *(" ".join(merge) for merge in content["merges"])]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")


def test_gpt2s_files(tokenizer: Tokenizer, tmp_path: Path) -> None:
    write_vocabulary(tmp_path, tokenizer.backend)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>", "add_bos_token": false}')
    ours = load_tokenizer(tmp_path)
    theirs = GPT2Tokenizer.from_pretrained(tmp_path)
    for text in STRINGS[:300]:
        assert ours.encode(text) == theirs(text)["input_ids"]
    assert (ours.stop_ids[0], ours.document_start) == (0, [])


def test_gpts_files(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    backend.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<unk>"], end_of_word_suffix="</w>", show_progress=False
    )
    backend.train_from_iterator(TEXTS * 4, trainer)
    write_vocabulary(tmp_path, backend)
    ours = load_tokenizer(tmp_path)
    theirs = OpenAIGPTTokenizer.from_pretrained(tmp_path)
    for text in STRINGS[:300]:
        ids = theirs(text)["input_ids"]
        assert ours.encode(text) == ids, repr(text)
    ids = ours.encode("The furnace is hot, and the alchemist waits")
    assert ours.decode(ids) == "the furnace is hot , and the alchemist waits "
    assert ours.eos is None
    with pytest.raises(UserError, match="no token for the end of a text"):
        ours.encode_document("hot")


# What the other files of a folder say.


def saved(folder: Path, change: Callable[[tokenizers.Tokenizer], Any] | None = None, **files: Any) -> Path:
    """A folder with a small tokenizer.json and the given JSON files instead of ours."""
    tokenizer = train_bpe(["the cat sat on the mat, the cat sat"] * 3, 270)
    tokenizer.backend.post_processor = None
    if change:
        change(tokenizer.backend)
    tokenizer.save_folder(folder)
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").unlink()
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_names_and_template_of_hugging_faces_files(tmp_path: Path) -> None:
    folder = saved(
        tmp_path / "t",
        tokenizer_config={
            "bos_token": {"content": "<|im_start|>", "special": True},
            "chat_template": [{"name": "tools", "template": "x"}, {"name": "default", "template": "hello"}],
        },
        special_tokens_map={"eos_token": "<|im_end|>"},
        generation_config={"eos_token_id": [2, 0]},
    )
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.stop_ids) == (1, 2, [2, 0])
    assert tokenizer.document_start == []
    assert tokenizer.chat_template == "hello"


def test_ids_of_config_json_name_the_ends_where_nothing_else_does(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(saved(tmp_path / "t", config={"bos_token_id": 1, "eos_token_id": 0}))
    assert (tokenizer.bos, tokenizer.eos) == ("<|im_start|>", "<|endoftext|>")
    assert tokenizer.stops == ["<|endoftext|>", "<|im_end|>"]


@pytest.mark.parametrize("begins", [True, False])
def test_transformers_begins_a_document_as_we_do(begins: bool, tmp_path: Path) -> None:
    settings = {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    folder = saved(
        tmp_path / "t",
        lambda backend: begin_with(backend, "<|im_start|>" if begins else None),
        tokenizer_config={**settings, "add_bos_token": not begins},  # transformers doesn't look at it
    )
    tokenizer = load_tokenizer(folder)
    ids = [*tokenizer.document_start, *tokenizer.encode("the cat")]
    assert AutoTokenizer.from_pretrained(folder)("the cat")["input_ids"] == ids
    tokenizer.save_folder(tmp_path / "again")
    assert AutoTokenizer.from_pretrained(tmp_path / "again")("the cat")["input_ids"] == ids
    assert (ids[0] == 1) == bool(begins)


def test_an_end_that_is_not_flagged_special_is_made_so(tmp_path: Path) -> None:
    folder = saved(
        tmp_path / "t",
        lambda backend: backend.add_tokens([AddedToken("<stop>", normalized=False)]),
        tokenizer_config={"eos_token": "<stop>"},
    )
    tokenizer = load_tokenizer(folder)
    assert tokenizer.eos_id == 270
    assert 270 not in tokenizer.encode("<stop>")


def test_runs_of_blanks_that_are_entries_come_back(tmp_path: Path) -> None:
    """GPT-NeoX has runs of blanks as added tokens."""
    runs = [AddedToken(" " * n, normalized=True) for n in (4, 3, 2)]
    folder = saved(tmp_path / "t", lambda backend: backend.add_tokens(runs))
    tokenizer = load_tokenizer(folder)
    text = "the  cat    sat     on"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode_bytes(tokenizer.encode_bytes(text.encode())) == text.encode()
    assert tokenizer.token_bytes[270] == b"    "


def test_gaps_between_ids_are_no_tokens(tmp_path: Path) -> None:
    folder = saved(tmp_path / "t")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"].append(
        {**content["added_tokens"][-1], "id": 300, "content": "<far>", "special": True}
    )
    content["model"]["vocab"]["<far>"] = 300
    (folder / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.vocab_size == len(tokenizer.token_bytes) == 301
    assert tokenizer.decode([280, 300, 400]) == ""


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"tokenizer_config": {"added_tokens_decoder": {"5": {"content": "<x>"}}}},
            "id 5 is .* in the vocabulary, '<x>' in",
        ),
        ({"tokenizer_config": {"added_tokens_decoder": {"a": {"content": "<x>"}}}}, "can't be read"),
        ({"tokenizer_config": {"added_tokens_decoder": {"5": "<x>"}}}, "can't be read"),
        ({"tokenizer_config": {"chat_template": 3}}, "chat_template is no text"),
        ({"generation_config": {"eos_token_id": "two"}}, "not an id"),
    ],
)
def test_settings_that_do_not_fit_are_named(files: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        load_tokenizer(saved(tmp_path / "t", **files))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.model", b"\x80 no model \xff", "not a SentencePiece model"),
        ("tokenizer.model", b"", "without entries"),
        ("tokenizer.model", b"QQ== 0\nQg== one\n", "line 2: not an entry"),
        ("tokenizer.model", b"QQ== 0\nQ!== 1\n", "line 2: not an entry"),
        ("vocab.json", b"[]", "not what its name says"),
        ("other.txt", b"", "holds no tokenizer"),
    ],
)
def test_a_broken_file_is_one_message(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    (tmp_path / "merges.txt").write_text("a b\n")
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="no such"):
        load_tokenizer(tmp_path / "absent" / "tokenizer.model")


def test_thousands_of_added_tokens_are_read_in_a_second(tmp_path: Path) -> None:
    """Gemma has over 6,000."""
    declared = {270 + n: {"content": f"<unused{n}>", "special": n % 2 == 0} for n in range(8000)}
    begin = time.monotonic()
    tokenizer = load_tokenizer(saved(tmp_path / "t", tokenizer_config={"added_tokens_decoder": declared}))
    assert time.monotonic() - begin < 5
    assert tokenizer.vocab_size == 8270
    assert len(tokenizer.special_ids) == 3 + 4000
