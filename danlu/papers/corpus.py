"""The text that experiments train on, through danlu's own stages."""

import os
from collections.abc import Iterator
from pathlib import Path

from danlu.data.config import CHITCHAT, DataConfig
from danlu.data.documents import Document, read_documents, write_documents
from danlu.data.prepare import prepare
from danlu.papers.config import ReproduceConfig
from danlu.tokens.bpe import train_tokenizer
from danlu.tokens.config import TokenizeConfig, TokenizerConfig
from danlu.tokens.tokenize import tokenize

PIECE = 2000
"""Characters of a document; what is longer, such as a book in one file, is cut at the ends of lines."""
HELD_OUT = 0.05


def text_source(config: ReproduceConfig) -> str:
    """`config.data`; else tinyshakespeare below $DANLU_DATA; else the package chitchat-dataset."""
    if config.data is not None:
        return str(config.data)
    shakespeare = Path(os.environ.get("DANLU_DATA", "")) / "tinyshakespeare" / "input.txt.gz"
    return str(shakespeare) if "DANLU_DATA" in os.environ and shakespeare.is_file() else CHITCHAT


def prepare_tokens(source: str, folder: Path, vocabulary: int) -> Path:
    """The text of `source` (a path, or CHITCHAT) as a `danlu tokenize` folder below `folder`; returns that.

    The split and the tokenizer are the same for every `seed`, so that seeds differ in the training only.
    """
    if source != CHITCHAT:
        documents = folder / "documents.jsonl.zst"
        write_documents(cut(read_documents(Path(source))), documents)
        source = str(documents)
    data, tokenizer, tokens = folder / "data", folder / "tokenizer", folder / "tokens"
    prepare(DataConfig(source=source, held_out=HELD_OUT, out=data))
    train_tokenizer(TokenizerConfig(data=data, vocab_size=vocabulary, out=tokenizer))
    tokenize(TokenizeConfig(data=data, tokenizer=tokenizer, out=tokens))
    return tokens


def cut(documents: Iterator[Document], longest: int = PIECE) -> Iterator[Document]:
    """Pieces of at most `longest` characters, of whole lines where these aren't longer themselves."""
    for document in documents:
        pieces = [""]
        for line in document.text.splitlines(keepends=True):
            for start in range(0, len(line), longest):
                part = line[start : start + longest]
                if len(pieces[-1]) + len(part) > longest:
                    pieces.append("")
                pieces[-1] += part
        for number, piece in enumerate(pieces):
            yield Document(f"{document.id}/{number}", piece)
