"""`danlu inspect`: a training example as the model sees it."""

from itertools import islice
from typing import Any

from rich.console import Console
from rich.text import Text

from danlu.core.errors import UserError
from danlu.data.documents import read_rows, to_document
from danlu.tokens.chat import render
from danlu.tokens.config import InspectConfig
from danlu.tokens.load import load_tokenizer
from danlu.tokens.loader import held_out_batches
from danlu.tokens.shards import Shards
from danlu.tokens.tokenizer import Tokenizer

COLOURS = ("default", "cyan", "magenta", "yellow", "blue")


def inspect(config: InspectConfig) -> dict[str, Any]:
    """One sequence of a `tokenize` folder, or one row of a JSONL file: a row for each token.

    `learnt`: whether the token is a target that counts. Raises UserError where there is no such example.
    """
    if config.file.is_dir():
        tokenizer = load_tokenizer(config.file / "tokenizer")
        return {"file": str(config.file), "index": config.index, **_sequence(config, tokenizer)}
    if config.tokenizer is None:
        raise UserError(
            "no tokenizer is given", "name a folder with one: --tokenizer runs/quickstart/tokenizer"
        )
    tokenizer = load_tokenizer(config.tokenizer)
    return {"file": str(config.file), "index": config.index, **_row(config, tokenizer)}


def _sequence(config: InspectConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    shards = Shards(config.file / config.part)
    batch = next(islice(held_out_batches(shards, 1, config.sequence_length), config.index, None), None)
    if batch is None:
        raise UserError(f"{config.file}: has no sequence {config.index}", "give a smaller index")
    columns = (batch.targets, batch.weights, batch.segments, batch.positions)
    tokens = [
        _token(tokenizer, int(target), weight > 0, int(segment), int(position))
        for target, weight, segment, position in zip(*(c[0] for c in columns), strict=True)
        if segment >= 0
    ]
    longest = int((shards.offsets[1:] - shards.offsets[:-1]).max()) - 1
    cut = shards.kind == "chat" and longest > config.sequence_length
    return {
        "kind": shards.kind,
        "tokens": tokens,
        "truncated": cut,
        "padding": config.sequence_length - len(tokens),
    }


def _row(config: InspectConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    found = next(islice(read_rows(config.file), config.index, None), None)
    if found is None:
        raise UserError(
            f"{config.file}: has no row {config.index}", "give a smaller index, or a file with rows"
        )
    where = f"{config.file}, line {found[0]}"
    document = to_document(found[1], str(config.index), where)
    if document.messages is None:
        ids = tokenizer.encode_document(document.text)
        mask = [False] + [True] * (len(ids) - 1)
    else:
        rendered = render(document.messages, tokenizer)
        ids, mask = rendered.ids, rendered.mask
    longest = config.sequence_length + 1
    tokens = [
        _token(tokenizer, t, m, 0, n) for n, (t, m) in enumerate(zip(ids[:longest], mask, strict=False))
    ]
    kind = "text" if document.messages is None else "chat"
    return {"kind": kind, "tokens": tokens, "truncated": len(ids) > longest, "padding": 0}


def _token(tokenizer: Tokenizer, number: int, learnt: bool, segment: int, position: int) -> dict[str, Any]:
    names = {v: k for k, v in tokenizer.special_ids.items()}
    text = names.get(number) or tokenizer.token_bytes[number].decode("utf-8", "backslashreplace")
    return {"id": number, "text": text, "learnt": bool(learnt), "segment": segment, "position": position}


def show(result: dict[str, Any]) -> None:
    """The text with what is learnt on green, a colour for each segment, then the ids."""
    console = Console()
    text, ids = Text(), Text()
    for token in result["tokens"]:
        colour = COLOURS[token["segment"] % len(COLOURS)]
        style = f"{colour} on dark_green" if token["learnt"] else colour
        text.append(token["text"], style=style)
        ids.append(f"{token['id']}{'*' if token['learnt'] else ''} ", style=style)
    console.print(text)
    console.rule("ids (* = learnt)")
    console.print(ids)
    learnt = sum(token["learnt"] for token in result["tokens"])
    segments = len({token["segment"] for token in result["tokens"]})
    cut = "; conversations longer than the sequence are truncated" if result["truncated"] else ""
    counts = f"{len(result['tokens'])} tokens, {learnt} learnt, {segments} segments"
    console.rule(f"{counts}, {result['padding']} padding{cut}")
