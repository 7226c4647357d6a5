"""Every form of file gives the same documents; what is wrong with one is named with its place."""

import gzip
import json
import unicodedata
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from danlu.core.errors import UserError
from danlu.data.check import check
from danlu.data.config import CheckConfig
from danlu.data.documents import PIECE, Document, read_documents, read_rows, write_documents
from danlu.data.prepare import normalise

TEXTS = ["one\ntwo\n", "丹炉", "naïve café", '{"not": "json"}']
ROWS = [{"text": text} for text in TEXTS]
LINES = "\n".join(json.dumps(row) for row in ROWS).encode()


def texts(path: Path) -> list[str]:
    return [document.text for document in read_documents(path)]


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_lines_plain_and_compressed(tmp_path: Path, ending: str) -> None:
    compress = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[ending]
    path = tmp_path / f"rows.jsonl{ending}"
    path.write_bytes(compress(LINES))
    assert texts(path) == TEXTS


@pytest.mark.parametrize("raw", [json.dumps(ROWS).encode(), json.dumps(ROWS, indent=2).encode(), LINES])
def test_a_list_or_lines(tmp_path: Path, raw: bytes) -> None:
    """What ends in .json may be either."""
    (tmp_path / "rows.json").write_bytes(raw)
    (tmp_path / "packed.json.gz").write_bytes(gzip.compress(raw))
    assert texts(tmp_path / "rows.json") == texts(tmp_path / "packed.json.gz") == TEXTS


def test_elements_of_a_list_are_found_by_their_lines(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text('[{"a": "[,]"},\n\n  {"a": [1,\n2]}, 3,\n"x"\n]\n')
    assert list(read_rows(tmp_path / "rows.json")) == [
        (1, {"a": "[,]"}),
        (3, {"a": [1, 2]}),
        (4, 3),
        (5, "x"),
    ]


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    assert texts(path) == TEXTS


def test_a_folder_is_read_in_order_of_names_and_skips_hidden_files(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two.txt").write_text("second")
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / ".DS_Store").write_bytes(b"\xff")
    assert texts(tmp_path) == [*TEXTS, "second"]


def test_a_long_text_comes_in_pieces_that_join_to_the_whole(tmp_path: Path) -> None:
    whole = "".join(f"line {number} of a long text\n" for number in range(20_000))
    (tmp_path / "long.txt").write_text(whole)
    pieces = texts(tmp_path / "long.txt")
    assert "".join(pieces) == whole
    assert len(pieces) == -(-len(whole) // PIECE)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    documents = [Document("1", "a", None, {"lang": "en"}), Document("2", "A: hi\nB: hello\n", messages)]
    write_documents(documents, tmp_path / "out.jsonl.zst")
    back = list(read_documents(tmp_path / "out.jsonl.zst"))
    assert [(d.id, d.text, d.messages, d.meta) for d in back] == [
        (d.id, d.text, d.messages, d.meta) for d in documents
    ]


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n{"text": "z"}\n', r"a\.jsonl, line 2: not valid JSON"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', r"a\.jsonl, line 2: not UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n[1]\n', r"a\.jsonl, line 2: expected an object, found list"),
        ("a.jsonl", b'{"body": "x"}\n', r'a\.jsonl, line 1: no "text" and no conversation; keys: body'),
        ("a.jsonl", b"\n\n", r"a\.jsonl: no document in it"),
        ("a.jsonl", b'{"messages": []}', r"a\.jsonl, line 1: expected a list of messages that isn't empty"),
        ("a.jsonl", b'{"messages": [{"role": "user"}]}', r'message 1: a message needs "role" and "content"'),
        ("a.jsonl", b'{"messages": [{"role": "cat", "content": ""}]}', r"message 1: unknown role 'cat'"),
        ("a.jsonl", b'{"prompt": "x", "completion": 3}', r"message 2: content is not text"),
        ("a.json", b'[{"text": "x"},\n{"text": ]', r"a\.json, line 2: not valid JSON: .* at column 10"),
        ("a.json", b'[{"text": "x"},\n\n3]', r"a\.json, line 3: expected an object, found int"),
        ("a.json", b'{\n"text": "x"}', r"a\.json, line 1: not valid JSON"),
        ("a.json", b"[]", r"a\.json: no document in it"),
        ("a.json", b'["\xff"]', r"a\.json: not UTF-8"),
        ("a.txt", b"", r"a\.txt: no document in it"),
        ("a.txt", b"one\ntwo \xe4\n", r"a\.txt, line 2: not UTF-8"),
        ("a.jsonl.gz", gzip.compress(LINES)[:-9], r"a\.jsonl\.gz: damaged"),
        ("a.jsonl.zst", zstandard.ZstdCompressor().compress(LINES)[:-9], r"a\.jsonl\.zst"),
        ("a.jsonl.gz", b"not gzip", r"a\.jsonl\.gz: damaged"),
        ("a.parquet", b"not parquet", r"a\.parquet: not a readable Parquet file"),
        ("a.docx", b"x", r"don't know how to read \.docx"),
    ],
)
def test_each_fault_names_its_place(tmp_path: Path, name: str, raw: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(UserError, match=message):
        texts(tmp_path / name)


def test_a_missing_file_and_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.txt: no such file"):
        texts(tmp_path / "none.txt")
    with pytest.raises(UserError, match="the folder is empty"):
        texts(tmp_path)


@given(st.text())
@settings(max_examples=200)
def test_normalise_is_idempotent_and_keeps_what_can_be_seen(text: str) -> None:
    once = normalise(text)
    assert normalise(once) == once
    kept = [c for c in unicodedata.normalize("NFC", text) if unicodedata.category(c) != "Cc"]
    assert [c for c in once if unicodedata.category(c) != "Cc"] == kept


def test_normalise() -> None:
    assert normalise("e\u0301\r\nb\rc\0\td\x7f") == "é\nb\nc\td"


def test_check_counts_what_is_there(tmp_path: Path) -> None:
    rows = [
        {"text": "abc"},
        {"text": "abc"},
        {"prompt": "Hi", "completion": "你好"},
        {"messages": [{"role": "user", "content": "x"}]},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    found = check(CheckConfig(file=path))
    assert found["documents"] == 4
    assert found["copies"] == 1
    assert found["conversations"] == 2
    assert found["messages"] == 3
    assert found["without a reply"] == 1
    rendered = ["abc", "abc", "A: Hi\nB: 你好\n", "A: x\n"]
    assert found["bytes"] == sum(len(text.encode()) for text in rendered)
    with pytest.raises(UserError, match=r"rows\.jsonl, line 1: no assistant turn"):
        check(CheckConfig(file=path, chat=True))
