"""Speculative decoding: a draft guesses some tokens, the model reads them in one pass and keeps what fits.

What comes out has exactly the model's distribution (Leviathan 2023, Chen 2023), whatever the draft says;
a bad draft only costs time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from danlu.core.errors import UserError
from danlu.generate.contrastive import check_vocabularies
from danlu.generate.program import Answer, Feed, Output, Process, Program, Scope, Sequences


@dataclass(frozen=True)
class Speculated(Answer):
    """An answer, and what the drafts were good for."""

    passes: int = 0
    """How often the model was asked; plain decoding takes a pass for each token."""
    drafted: int = 0
    accepted: int = 0
    """How many of the drafted tokens are in the answer."""


def acceptance(p: Tensor, q: Tensor, token: int) -> float:
    """The probability of keeping a token drawn from the draft's q (V,), where the model's is p (V,)."""
    return min(1.0, float(p[token]) / float(q[token]))


def residual(p: Tensor, q: Tensor) -> Tensor:
    """(V,) what to draw from, up to a factor, when the draft's token is not kept: max(0, p - q)."""
    return (p - q).clamp(min=0)


class Chooser:
    """Makes distributions of logits, and draws from them; without a generator, the most probable token."""

    def __init__(self, process: Process | None, generator: torch.Generator | None) -> None:
        self.process, self.generator = process, generator

    def distributions(self, logits: Tensor, prefixes: list[list[int]]) -> Tensor:
        """(n, V) float64, on the CPU."""
        if self.process is not None:
            logits = self.process(logits, prefixes)
        if self.generator is None:
            highest = logits.argmax(dim=-1, keepdim=True)
            return torch.zeros_like(logits).scatter(-1, highest, 1.0).double().cpu()
        return logits.double().softmax(dim=-1).cpu()

    def draw(self, weights: Tensor) -> int:
        if self.generator is None:
            return int(weights.argmax())
        return int(torch.multinomial(weights, 1, generator=self.generator))

    def happens(self, probability: float) -> bool:
        if self.generator is None:
            return probability >= 1
        return float(torch.rand((), generator=self.generator, dtype=torch.float64)) < probability


class Draft(Protocol):
    """Guesses how a text goes on."""

    def guess(self, ids: list[int], n: int, chooser: Chooser) -> Program[tuple[list[int], Tensor | None]]:
        """At most n tokens, and the distributions (n, V) that they were drawn from; None = sure of each."""


class PromptLookup:
    """The tokens that followed when the last few were last seen in the text so far.

    Tries the last `longest` tokens first, then fewer. Needs no second model; good where answers quote.
    """

    def __init__(self, longest: int = 3) -> None:
        if longest < 1:
            raise UserError(f"the longest n-gram to look up has {longest} tokens", "give at least 1")
        self.longest = longest

    def guess(self, ids: list[int], n: int, chooser: Chooser) -> Program[tuple[list[int], Tensor | None]]:
        """Reads nothing."""
        yield from ()
        for size in range(min(self.longest, len(ids) - 1), 0, -1):
            for start in range(len(ids) - size - 1, -1, -1):
                if ids[start : start + size] == ids[-size:]:
                    return ids[start + size : start + size + n], None
        return [], None


class DraftModel:
    """Draws from a smaller model of the same vocabulary, by the same rules as the model's tokens."""

    def __init__(self, sequences: Sequences, model: int = 1) -> None:
        self.sequences, self.sequence = sequences, sequences.open(model)
        self.read: list[int] = []

    def guess(self, ids: list[int], n: int, chooser: Chooser) -> Program[tuple[list[int], Tensor | None]]:
        """Takes back what of earlier guesses is not in `ids`, reads the rest of them, and goes on."""
        common = 0
        while common < min(len(self.read), len(ids) - 1) and self.read[common] == ids[common]:
            common += 1
        if common < len(self.read):
            self.sequences.cut(self.sequence, common)
        text, guessed, distributions = list(ids), list[int](), list[Tensor]()
        self.read = text[:common]
        while len(guessed) < n:
            output = yield [Feed(self.sequence, text[len(self.read) :])]
            self.read = list(text)
            distributions.append(chooser.distributions(output.logits, [text])[0])
            guessed.append(chooser.draw(distributions[-1]))
            text.append(guessed[-1])
        return guessed, torch.stack(distributions)


def speculative(
    sequences: Sequences,
    ids: Sequence[int],
    draft: PromptLookup | None = None,
    length: int = 5,
    max_tokens: int = 200,
    stop_ids: tuple[int, ...] = (),
    process: Process | None = None,
    generator: torch.Generator | None = None,
) -> Program[Speculated]:
    """Decoding with drafts of `length` tokens: by model 1, or by `draft`.

    Each pass reads the draft, keeps a token x of it with probability min(1, p(x) / q(x)), and at the first
    that is not kept draws from max(0, p - q) instead; if all are kept, one more token is drawn from p. p
    and q are the two models' distributions after `process`, where temperature, top-k and top-p belong.
    Without `generator` (one of the CPU) the answer is the greedy one.
    """
    for name, value in (("length", length), ("max_tokens", max_tokens)):
        if value < 1:
            raise UserError(f"{name} is {value}", "give at least 1")
    with Scope(sequences) as held:
        guesser: Draft = DraftModel(held) if draft is None else draft
        chooser, sequence = Chooser(process, generator), held.open()
        text, logprobs = [int(token) for token in ids], list[float]()
        passes = drafted = accepted = 0
        unread, guessed, q = list(text), list[int](), None
        while True:
            output: Output = yield [Feed(sequence, [*unread, *guessed], every=len(guessed) > 0)]
            prefixes = [[*text, *guessed[:place]] for place in range(len(guessed) + 1)]
            kept, token = verify(guessed, chooser.distributions(output.logits, prefixes), q, chooser)
            new = [*guessed[:kept], token]
            stop = next((place for place, token in enumerate(new) if token in stop_ids), len(new))
            new = new[: stop + 1]
            own = output.logits[: len(new)].log_softmax(dim=-1).cpu()
            logprobs += own[torch.arange(len(new)), torch.tensor(new)].tolist()
            text += new
            passes, drafted, accepted = passes + 1, drafted + len(guessed), accepted + min(kept, len(new))
            if new[-1] in stop_ids or len(logprobs) == max_tokens:
                found = text[len(text) - len(logprobs) :]
                return Speculated(
                    found, logprobs, new[-1] in stop_ids, sum(logprobs), passes, drafted, accepted
                )
            if kept < len(guessed):
                held.cut(sequence, len(text) - 1)
            unread, guessed, q = text[-1:], [], None
            if n := min(length, max_tokens - len(logprobs) - 1):
                guessed, q = yield from guesser.guess(text, n, chooser)
            if q is not None:
                check_vocabularies(output.logits, q, "draft")


def verify(guessed: list[int], p: Tensor, q: Tensor | None, chooser: Chooser) -> tuple[int, int]:
    """How many of the n guesses are kept, and the token that follows them.

    p (n + 1, V): the model's distribution in each place; q (n, V): what the guesses were drawn from, None =
    they were certain.
    """
    for place, token in enumerate(guessed):
        certain = torch.zeros_like(p[place])
        certain[token] = 1
        mine = certain if q is None else q[place]
        if not chooser.happens(acceptance(p[place], mine, token)):
            return place, chooser.draw(residual(p[place], mine))
    return len(guessed), chooser.draw(p[-1])
