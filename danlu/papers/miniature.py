"""A small model that learns a task drawn on the spot, such as sums: a token is a character."""

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

from danlu.data.documents import Document, write_documents
from danlu.model.config import ModelConfig
from danlu.tokens.bpe import bpe
from danlu.tokens.config import TokenizeConfig
from danlu.tokens.tokenize import tokenize
from danlu.train.config import GuardConfig, OptimConfig, ScheduleConfig, TrainConfig
from danlu.train.loop import train

VOCABULARY = 259
"""Bytes and the three special tokens."""

SIZES = ModelConfig(
    vocab_size=VOCABULARY, width=192, n_layers=4, n_heads=3, n_kv_heads=3, ffn_width=512, max_positions=512
)
"""1.8 million parameters."""

HELD_OUT = 200


def learn(
    draw: Callable[[], str],
    folder: Path,
    *,
    documents: int,
    steps: int,
    seed: int,
    start: Path | None = None,
    batch_size: int = 32,
    length: int = 384,
    lr: float = 2e-3,
    constant: bool = False,
) -> Path:
    """Trains on so many drawn documents, a new model or the one of `start`; returns the run's folder.

    A run that is there already, finished or not, goes on from where it is.
    """
    run, data, tokenizer, tokens = (folder / name for name in ("run", "data", "tokenizer", "tokens"))
    if not (tokens / "train" / "meta.json").is_file():
        drawn: Iterator[Document] = (Document(str(number), draw()) for number in range(HELD_OUT + documents))
        for part, size in (("held_out", HELD_OUT), ("train", documents)):
            write_documents(islice(drawn, size), data / f"{part}.jsonl.zst")
        bpe([], VOCABULARY).save_folder(tokenizer / "tokenizer")
        tokenize(TokenizeConfig(data=data, tokenizer=tokenizer, out=tokens))
    train(
        TrainConfig(
            data=tokens,
            out=run,
            seed=seed,
            model=SIZES if start is None else None,
            init_from=start,
            steps=steps,
            batch_size=batch_size,
            sequence_length=length,
            optim=OptimConfig(lr=lr),
            schedule=ScheduleConfig(name="constant" if constant else "cosine"),
            guard=GuardConfig(remedy="off"),
            eval_every=0,
            eval_batches=4,
            checkpoint_every=steps,
            keep_checkpoints=1,
        ),
        "text",
    )
    return run
