"""Instruction rows, and text that has nothing to do with them, for experiments that adapt a model."""

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from danlu.core.errors import UserError
from danlu.data.chitchat import read_chitchat
from danlu.data.config import CHITCHAT
from danlu.data.conversations import has_reply, plain_text, to_messages
from danlu.data.documents import Document, read_documents, read_rows, write_documents
from danlu.papers.config import ReproduceConfig
from danlu.papers.corpus import cut
from danlu.tokens.chat import render
from danlu.tokens.tokenizer import Tokenizer


def row_source(config: ReproduceConfig) -> Path:
    """`config.data`; else GSM8K below $DANLU_DATA. Raises UserError where there is neither."""
    if config.data is not None:
        return Path(config.data)
    file = Path(os.environ.get("DANLU_DATA", "")) / "gsm8k" / "train.jsonl.gz"
    if "DANLU_DATA" not in os.environ or not file.is_file():
        raise UserError(
            "there are no instruction rows to learn",
            "name a file of conversations with --data (docs/data.md: Alpaca's rows, say), or set DANLU_DATA",
        )
    return file


def unrelated_source() -> str:
    """WikiText-2 below $DANLU_DATA; else the package chitchat-dataset."""
    file = Path(os.environ.get("DANLU_DATA", "")) / "wikitext2" / "valid.txt.gz"
    return str(file) if "DANLU_DATA" in os.environ and file.is_file() else CHITCHAT


def instructions(source: Path) -> Iterator[Document]:
    """The conversations of a JSONL file or a JSON list, in their order; also rows of question and answer."""
    for number, row in read_rows(source):
        if {"question", "answer"} <= row.keys():
            row = {"prompt": row["question"], "completion": row["answer"]}
        messages = to_messages(row, f"{source}, line {number}")
        if messages is not None and has_reply(messages):
            yield Document(str(number), plain_text(messages), messages)


def unrelated_pieces(source: str, longest: int) -> Iterator[Document]:
    """The text of `unrelated_source` in pieces of at most so many characters."""
    texts = read_chitchat() if source == CHITCHAT else read_documents(Path(source))
    return (piece for piece in cut(texts, longest) if piece.text.strip())


def fitting(documents: Iterator[Document], tokenizer: Tokenizer, length: int) -> Iterator[Document]:
    """Different ones of at most `length` tokens."""
    seen: set[str] = set()
    for document in documents:
        short = len(render(document.messages or [], tokenizer).ids) <= length
        if short and document.text not in seen:
            seen.add(document.text)
            yield document


def split(documents: Iterator[Document], train: int, held_out: int, folder: Path, source: str) -> None:
    """So many documents held out, and as many as `train` after them, as a `danlu data prepare` folder."""
    for part, size in (("held_out", held_out), ("train", train)):
        found = write_documents(islice(documents, size), folder / f"{part}.jsonl.zst")
        if found < size:
            raise UserError(
                f"{source}: {found} documents that fit, of {size} for {part}", "give more of them"
            )
