"""What a decoding method is, seen from the engine: a generator that asks for tokens to be read.

A method yields a list of `Feed`s: tokens to append to sequences. The engine reads them together with what
other requests ask for, and sends back an `Output`. Whatever the method returns is the request's result.
Sequences are opened, forked and cut at no cost: forks share what they have in common.

    def greedy(sequences, ids, n):
        with Scope(sequences) as held:
            sequence = held.open()
            output, found = yield [Feed(sequence, ids)], []
            while len(found) < n:
                found.append(int(output.logits[0].argmax()))
                output = yield [Feed(sequence, found[-1:])]
            return found

A method may use several models: a sequence belongs to the model that it was opened for, and the feeds of
one list belong to one model.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from danlu.generate.draw import Draw
from danlu.generate.sampling import Row

R = TypeVar("R")
NONE = torch.empty(0)


@dataclass(frozen=True)
class Feed:
    """Tokens that are appended to a sequence, at least one. A sequence is in a list of feeds only once.

    What is asked about them: logits after the last one; with `every`, after each; with `row`, a token drawn
    by it after the last one; with `targets`, the log-probabilities of these after the last tokens.
    """

    sequence: int
    tokens: Sequence[int]
    every: bool = False
    row: Row | None = None
    targets: Sequence[int] = ()
    top: int = 0
    """Of the most probable tokens in each target's place, how many are reported."""
    hidden_only: bool = False
    """No logits, only what they are made from."""
    silent: bool = False
    """Nothing is asked."""

    @property
    def wanted(self) -> int:
        """How many of the last tokens are asked about."""
        if self.silent:
            return 0
        return len(self.tokens) if self.every else max(1, len(self.targets))


@dataclass
class Output:
    """What the model says of the tokens that were asked about, feed by feed: a row for each."""

    hidden: Tensor
    """(rows, D) what the output matrix is multiplied with."""
    logits: Tensor = NONE
    """(rows, V) float32."""
    draw: Draw | None = None
    logprobs: Tensor = NONE
    """(rows,) float32 of the targets."""
    greedy: Tensor = NONE
    """(rows,) whether each target is the most probable token."""
    tops: list[list[tuple[int, float]]] = field(default_factory=list)
    """Of each row the most probable tokens, with their log-probabilities."""

    @property
    def is_nan(self) -> bool:
        """Whether what the model says is no number; a draw is looked at by whoever asked for it."""
        if self.draw is not None:
            return False
        return bool(self.logits.sum(-1).isnan().any() or self.logprobs.isnan().any())

    @classmethod
    def join(cls, parts: "list[Output]") -> "Output":
        """The rows of all parts, one after the other."""
        if len(parts) == 1:
            return parts[0]
        names = ("logits", "logprobs", "greedy")
        joined = {name: [value for part in parts if len(value := getattr(part, name))] for name in names}
        return cls(
            torch.cat([part.hidden for part in parts] or [NONE]),
            **{name: torch.cat(values) for name, values in joined.items() if values},
            draw=parts[-1].draw if parts else None,
            tops=[top for part in parts for top in part.tops],
        )


Program = Generator[list[Feed], Output, R]

Process = Callable[[Tensor, list[list[int]]], Tensor]
"""Step-wise changes of logits (rows, V), given the tokens so far of each row, prompt and answer."""


@dataclass(frozen=True)
class Answer:
    """What a method found. `logprobs`: of each of `ids`, from the model itself, before any processing."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stopped: bool = False
    """Whether a stop token came; it is then the last of `ids`."""
    score: float = 0.0
    """What a search ranks by."""


class Sequences(Protocol):
    """Where the tokens read so far are kept. A sequence is named by a number."""

    def open(self, model: int = 0) -> int:
        """A new sequence without tokens, for one of the models: 0 is the engine's own."""

    def fork(self, sequence: int) -> int:
        """A new sequence with the same tokens; the two go their own ways from here."""

    def cut(self, sequence: int, length: int) -> None:
        """Forgets the tokens behind the first `length`."""

    def free(self, sequence: int) -> None:
        """Gives the sequence's memory back. A program frees all that it opened or forked."""


class Scope:
    """Sequences that are freed when the block ends, also by an error or because the request was cancelled."""

    def __init__(self, sequences: Sequences) -> None:
        self.sequences = sequences
        self.held: set[int] = set()

    def __enter__(self) -> "Scope":
        return self

    def __exit__(self, *_: object) -> None:
        for sequence in sorted(self.held):
            self.free(sequence)

    def open(self, model: int = 0) -> int:
        self.held.add(sequence := self.sequences.open(model))
        return sequence

    def fork(self, sequence: int) -> int:
        self.held.add(child := self.sequences.fork(sequence))
        return child

    def cut(self, sequence: int, length: int) -> None:
        self.sequences.cut(sequence, length)

    def free(self, sequence: int) -> None:
        self.held.remove(sequence)
        self.sequences.free(sequence)


class Branches:
    """The sequences of several hypotheses of one model: row by row, each grows by a token a step."""

    def __init__(self, sequences: Sequences, model: int = 0) -> None:
        self.sequences = sequences
        self.rows = [sequences.open(model)]

    def start(self, ids: Sequence[int]) -> Program[Output]:
        """Reads the prompt: one row."""
        return (yield [Feed(self.rows[0], ids)])

    def grow(self, parents: Sequence[int], tokens: Sequence[int]) -> Program[Output]:
        """The rows become children of `parents` (rows), each by its token; rows without child are freed."""
        self.fork(parents)
        return (yield [Feed(row, [token]) for row, token in zip(self.rows, tokens, strict=True)])

    def fork(self, parents: Sequence[int]) -> None:
        """The rows become copies of `parents`; the first copy is the parent itself."""
        children = [
            self.sequences.fork(self.rows[parent]) if parent in parents[:place] else self.rows[parent]
            for place, parent in enumerate(parents)
        ]
        for row in set(self.rows) - set(children):
            self.sequences.free(row)
        self.rows = children
