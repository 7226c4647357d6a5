"""A small model that learns a task drawn on the spot, such as sums: a token is a character.

A document is a conversation of questions and their answers, and only the answers are learnt: questions are
random, and learning to predict them drowns what there is to learn.
"""

from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

from danlu.data.conversations import Messages
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
    vocab_size=VOCABULARY, width=192, n_layers=4, n_heads=3, n_kv_heads=3, ffn_width=512, max_positions=768
)
"""1.8 million parameters."""

HELD_OUT = 200


def talk(problems: Sequence[tuple[str, str]], question: str = "") -> Messages:
    """Questions with their answers, and perhaps one more question."""
    messages: Messages = []
    for asked, answer in problems:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return [*messages, {"role": "user", "content": question}] if question else messages


def learn(
    draw: Callable[[], Messages],
    folder: Path,
    *,
    documents: int,
    steps: int,
    seed: int,
    start: Path | None = None,
    batch_size: int = 16,
    length: int = 384,
    constant: bool = False,
) -> Path:
    """Trains on so many drawn conversations, a new model or the one of `start`; returns the run's folder.

    Muon at 0.02, at a constant rate or a cosine to a tenth of it. A run that is there already, finished or
    not, goes on from where it is.
    """
    run, data, tokenizer, tokens = (folder / name for name in ("run", "data", "tokenizer", "tokens"))
    if not (tokens / "train" / "meta.json").is_file():
        drawn = (Document(str(number), "", draw()) for number in range(HELD_OUT + documents))
        for part, size in (("held_out", HELD_OUT), ("train", documents)):
            write_documents(islice(drawn, size), data / f"{part}.jsonl.zst")
        bpe([], VOCABULARY).save_folder(tokenizer / "tokenizer")
        tokenize(TokenizeConfig(data=data, tokenizer=tokenizer, out=tokens, kind="chat"))
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
            optim=OptimConfig(name="muon", lr=6e-3, muon_lr=0.02, weight_decay=0.0),
            schedule=ScheduleConfig(name="constant" if constant else "cosine"),
            guard=GuardConfig(remedy="off"),
            eval_every=0,
            eval_batches=4,
            checkpoint_every=steps,
            keep_checkpoints=1,
        ),
        "chat",
    )
    return run
