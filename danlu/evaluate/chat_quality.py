"""Does a small chat model talk back? Twenty fixed prompts, and what its replies owe to the prompt.

No judge and no taste: whether replies end, are made of words, are its own, and differ; and whether a
held-out reply is likelier after its own prompt than after another conversation's.
"""

import gzip
import json
import random
import re
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from danlu.core.errors import UserError
from danlu.data.conversations import Messages
from danlu.evaluate.text_measures import distinct_n
from danlu.generate.engine import Completion, Engine
from danlu.generate.sampling import SamplingParams
from danlu.model.cross_entropy import log_probabilities
from danlu.model.transformer import Transformer
from danlu.tokens.chat import render
from danlu.tokens.loader import Batch
from danlu.tokens.shards import Shards
from danlu.tokens.tokenizer import Tokenizer

PROMPTS = (
    "Hi!",
    "Hello, how are you?",
    "What's your name?",
    "Where are you from?",
    "What are you doing today?",
    "Do you like music?",
    "What is your favorite food?",
    "I just got home from work.",
    "Do you have any pets?",
    "What do you study?",
    "It is so cold outside.",
    "Have you seen any good movies lately?",
    "I'm really tired.",
    "What are your plans for the weekend?",
    "Do you play any sports?",
    "I have a test tomorrow.",
    "What kind of books do you read?",
    "Are you a student?",
    "Tell me something about your family.",
    "I have to go now, bye!",
)

LONGEST_REPLY = 60
"""Tokens within which every reply has to end."""
LEAST_WORDS = 0.95
"""Share of the replies' words that a dictionary has to know."""
LONGEST_COPY = 20
"""Tokens in a row that may stand in a training conversation."""
LEAST_DISTINCT_2 = 0.5
"""Floor of distinct-2 (Li 2016), stated before the first run: one stock answer to all prompts gives 1/20,
human replies to different prompts about 0.9."""

_WORD = re.compile(r"[a-z]+(?:'[a-z]+)*")


def talk(engine: Engine, seed: int = 0) -> list[Completion]:
    """A reply to each of PROMPTS, sampled at temperature 0.7 and top-p 0.9, each by its own draws."""
    params = SamplingParams(max_tokens=LONGEST_REPLY, temperature=0.7, top_p=0.9, seed=seed)
    conversations: list[Any] = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    return engine.generate(conversations, params)


def english_words() -> set[str]:
    """The English word list in the package pyspellchecker, read from where it is installed."""
    spec = find_spec("spellchecker")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "the package pyspellchecker, whose word list is the dictionary, is not installed",
            "pip install --no-deps -r requirements-demo.txt",
        )
    file = Path(next(iter(spec.submodule_search_locations))) / "resources" / "en.json.gz"
    return set(json.loads(gzip.decompress(file.read_bytes())))


def dictionary_share(texts: list[str], words: set[str]) -> tuple[float, list[str]]:
    """Share of the words that `words` holds, and the unknown ones; 0 of no words. Case is ignored."""
    said = [word for text in texts for word in _WORD.findall(text.lower().replace("’", "'"))]
    unknown = [word for word in said if word not in words]
    return (len(said) - len(unknown)) / max(len(said), 1), sorted(set(unknown))


def longest_copy(replies: list[list[int]], shards: Shards) -> int:
    """The longest run of tokens of any reply that stands in one training document."""
    longest = 0
    training = [shards[i][0].astype("<u4").tobytes() for i in range(len(shards))]
    for reply in replies:
        begin = 0
        while begin + longest < len(reply):
            run = np.asarray(reply[begin : begin + longest + 1], "<u4").tobytes()
            if any(_stands_in(run, document) for document in training):
                longest += 1
            else:
                begin += 1
    return longest


def _stands_in(run: bytes, document: bytes) -> bool:
    """Whether the tokens occur, at a token's border."""
    at = document.find(run)
    while at >= 0 and at % 4:
        at = document.find(run, at + 1)
    return at >= 0


def prompt_margin(
    model: Transformer, tokenizer: Tokenizer, conversations: list[Messages], seed: int = 0
) -> dict[str, float]:
    """Nats a token that a held-out reply gains from its own prompt against another conversation's.

    Each conversation gives its first exchange. Paired by reply; 95 % bootstrap interval over replies. A reply
    that its own or the other prompt leaves no room for in the context is left out and counted: cut short, it
    would cost too little. Raises UserError where fewer than two replies are left.
    """
    exchanges = [pair for messages in conversations if (pair := _first_exchange(messages))]
    order = list(range(len(exchanges)))
    random.Random(seed).shuffle(order)
    # The successor in a shuffled circle is never the reply's own prompt.
    other = dict(zip(order, order[1:] + order[:1], strict=True))
    losses = [
        [_reply_loss(model, tokenizer, exchanges[j][0], reply) for j in (i, other[i])]
        for i, (_, reply) in enumerate(exchanges)
    ]
    paired = np.array([pair for pair in losses if None not in pair], float)
    if len(paired) < 2:
        raise UserError(
            f"{len(paired)} of {len(conversations)} held-out conversations have a reply, and fit the context",
            "give more or shorter conversations",
        )
    own, shuffled = paired.T
    gains = shuffled - own
    draws = np.random.default_rng(seed).integers(0, len(gains), (2000, len(gains)))
    low, high = np.quantile(gains[draws].mean(axis=1), [0.025, 0.975])
    return {
        "replies": len(gains),
        "too_long": len(exchanges) - len(gains),
        "loss_own_prompt": float(np.mean(own)),
        "loss_shuffled_prompt": float(np.mean(shuffled)),
        "margin": float(gains.mean()),
        "low": float(low),
        "high": float(high),
    }


def _first_exchange(messages: Messages) -> tuple[str, str] | None:
    for first, second in pairwise(messages):
        if first["role"] == "user" and second["role"] == "assistant" and second["content"].strip():
            return first["content"], second["content"]
    return None


@torch.no_grad()
def _reply_loss(model: Transformer, tokenizer: Tokenizer, prompt: str, reply: str) -> float | None:
    """Mean nats of the reply's tokens and the end of its turn; None where they don't fit the context."""
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]
    rendered = render(messages, tokenizer)
    if len(rendered.ids) > model.config.max_positions + 1:
        return None
    ids = torch.tensor([rendered.ids])
    weights = torch.tensor([rendered.mask], dtype=torch.float32)[:, 1:]
    positions = torch.arange(ids.shape[1] - 1)[None]
    batch = Batch(ids[:, :-1], ids[:, 1:], weights, positions, torch.zeros_like(positions, dtype=torch.int32))
    return -float((log_probabilities(model, batch) * weights).sum() / weights.sum())


def chat_quality(
    engine: Engine, training: Shards | None, conversations: Iterator[Messages], seed: int = 0
) -> dict[str, Any]:
    """All of it; `checks` holds the rules in words, `passed` for each whether it is kept."""
    replies = talk(engine, seed)
    texts = [reply.text for reply in replies]
    share, unknown = dictionary_share(texts, english_words())
    figures: dict[str, Any] = {
        "replies_that_end": sum(reply.finish_reason == "stop" for reply in replies),
        "dictionary_words": share,
        "unknown_words": unknown,
        "distinct_2": distinct_n(texts),
        "examples": [{"prompt": p, "reply": t} for p, t in zip(PROMPTS, texts, strict=True)],
    }
    ended, distinct = figures["replies_that_end"], figures["distinct_2"]
    checks = [
        _check(
            "every reply ends",
            ended == len(PROMPTS),
            f"{ended} of {len(PROMPTS)}",
            f"all, within {LONGEST_REPLY} tokens",
        ),
        _check("dictionary words", share >= LEAST_WORDS, f"{share:.1%}", f"at least {LEAST_WORDS:.0%}"),
        _check("distinct-2", distinct >= LEAST_DISTINCT_2, f"{distinct:.2f}", f"at least {LEAST_DISTINCT_2}"),
    ]
    if training is not None:
        copied = figures["longest_copy"] = longest_copy([reply.ids for reply in replies], training)
        allowed = f"at most {LONGEST_COPY} tokens of a training conversation"
        checks.append(_check("no long copy", copied <= LONGEST_COPY, f"{copied} tokens in a row", allowed))
    held_out = list(conversations)
    if len(held_out) > 1:
        gain = figures["prompt_margin"] = prompt_margin(engine.model, engine.tokenizer, held_out, seed)
        found = f"{gain['margin']:.3f} nats a token [{gain['low']:.3f}, {gain['high']:.3f}]"
        checks.append(_check("own prompt helps", gain["low"] > 0, found, "above 0, with its 95 % interval"))
    return {**figures, "checks": checks, "passed": {check["check"]: check["passed"] for check in checks}}


def _check(name: str, passed: bool, found: str, asked: str) -> dict[str, Any]:
    """One rule, for people."""
    return {"check": name, "found": found, "asked": asked, "passed": passed}
