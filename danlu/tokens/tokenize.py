"""Documents to token shards."""

from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from danlu.core.errors import UserError
from danlu.core.files import atomic_folder
from danlu.core.progress import track
from danlu.core.verbs import Estimate
from danlu.data.conversations import Messages, has_reply, require_reply
from danlu.data.documents import Document, read_documents
from danlu.data.prepare import PARTS
from danlu.tokens.bpe import corpus_bytes
from danlu.tokens.chat import render, render_reply
from danlu.tokens.config import TokenizeConfig
from danlu.tokens.load import load_tokenizer
from danlu.tokens.loader import RANKS
from danlu.tokens.shards import Shards, ShardWriter
from danlu.tokens.tokenizer import Tokenizer

_GROUP = 512
"""Documents encoded at a time."""


def tokenize(config: TokenizeConfig) -> dict[str, Any]:
    """Writes out/train, out/held_out and out/tokenizer; returns counts and bytes a token.

    Chat: documents that aren't conversations are left out, and counted. Raises UserError where nothing is
    left, and for a conversation without a reply.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    tokenizer.save_folder(config.out / "tokenizer")
    result: dict[str, Any] = {"vocab_size": tokenizer.vocab_size, "kind": config.kind}
    for part in PARTS:
        counts: Counter[str] = Counter()
        documents = read_documents(config.data / f"{part}.jsonl.zst")
        with atomic_folder(Path(config.out) / part) as folder:
            writer = ShardWriter(folder, config.kind, tokenizer.vocab_size, tokenizer.fingerprint())
            add = ADDERS[config.kind]
            for group in track(_groups(documents), f"tokenize {part}", unit="groups"):
                add(group, tokenizer, writer, counts, config)
            writer.close()
            if not writer.meta["supervised"]:
                raise UserError(f"{config.data}: no supervised token in {part}", "see `danlu data check`")
        shards = Shards(config.out / part)
        result[part] = {
            "documents": len(shards),
            "tokens": shards.n_tokens,
            "supervised": shards.n_supervised,
            "bytes_per_token": round(shards.meta["text_bytes"] / shards.n_tokens, 4),
            **counts,
        }
    return result


def _groups(documents: Iterator[Document]) -> Iterator[list[Document]]:
    while group := list(islice(documents, _GROUP)):
        yield group


def _add_texts(
    group: list[Document],
    tokenizer: Tokenizer,
    writer: ShardWriter,
    counts: Counter[str],
    config: TokenizeConfig,
) -> None:
    texts = [document.text for document in group]
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        writer.add([*tokenizer.document_start, *ids, tokenizer.eos_id], text_bytes=len(text.encode()))


def _add_conversations(
    group: list[Document],
    tokenizer: Tokenizer,
    writer: ShardWriter,
    counts: Counter[str],
    config: TokenizeConfig,
) -> None:
    for document in group:
        if document.messages is None:
            counts["not a conversation"] += 1
            continue
        require_reply(document.messages, document.where)
        pieces = [document.messages]
        if config.longest:
            pieces = cut(document.messages, tokenizer, config.longest)
        counts["cut"] += len(pieces) > 1
        for messages in pieces:
            rendered = render(messages, tokenizer, config.longest_reply)
            if any(rendered.mask):
                writer.add(rendered.ids, rendered.mask, sum(len(m["content"].encode()) for m in messages))
            else:
                counts["only long replies"] += 1


def _add_preferences(
    group: list[Document],
    tokenizer: Tokenizer,
    writer: ShardWriter,
    counts: Counter[str],
    config: TokenizeConfig,
) -> None:
    for document in group:
        if document.replies is None or document.messages is None:
            counts["not a preference"] += 1
            continue
        if len(document.replies) > RANKS:
            raise UserError(
                f"{document.where}: {len(document.replies)} replies to one prompt, more than {RANKS}",
                "keep fewer",
            )
        for reply in document.replies:
            rendered = render_reply(document.messages, reply, tokenizer)
            # Up to the stop token, and one more, so that a model reads it: its reward stands there.
            end = len(rendered.mask) - rendered.mask[::-1].index(True)
            ids = [*rendered.ids[:end], tokenizer.eos_id]
            writer.add(ids, [*rendered.mask[:end], False], len(reply.encode()))
        writer.add_group(len(document.replies))


ADDERS = {"text": _add_texts, "chat": _add_conversations, "preferences": _add_preferences}


def cut(messages: Messages, tokenizer: Tokenizer, longest: int) -> list[Messages]:
    """Consecutive parts of at most `longest` tokens, cut before a user's turn; a longer exchange stays whole.

    Each part has a reply; what the user says last without an answer is left out.
    """
    exchanges: list[Messages] = []
    for message in messages:
        if not exchanges or message["role"] == "user":
            exchanges.append([])
        exchanges[-1].append(message)
    parts: list[Messages] = []
    room = 0
    for exchange in exchanges:
        n_tokens = len(render(exchange, tokenizer).ids)
        if not parts or n_tokens > room:
            parts.append([])
            room = longest
        parts[-1] += exchange
        room -= n_tokens
    return [part for part in parts if has_reply(part)]


def estimate(config: TokenizeConfig, upstream: Mapping[str, Estimate]) -> Estimate:
    """Bytes a token: 3.2 at 2,048 entries, about 0.3 more for each doubling (measured on small talk)."""
    size = corpus_bytes(config.data, upstream)
    vocab_size = upstream["tokenizer"].outputs.get("vocab_size") if "tokenizer" in upstream else None
    if vocab_size is None:
        vocab_size = load_tokenizer(config.tokenizer).vocab_size
    tokens = int(size / (3.2 + 0.3 * (int(vocab_size).bit_length() - 12)))
    # Rendering conversations one by one is slower than encoding texts in groups.
    seconds = 1 + size / (4e6 if config.kind == "text" else 1e6)
    return Estimate(
        tokens=tokens,
        seconds=seconds,
        memory_bytes=300 << 20,
        outputs={"tokens": tokens, "vocab_size": vocab_size, "bytes": size},
    )
