"""What a decoding method is, seen from the engine: a generator that asks for tokens to be read.

A method yields a list of `Feed`s: tokens to append to sequences. The engine reads them together with what
other requests ask for, and sends back an `Output`. Whatever the method returns is the request's result.
Sequences are opened, forked and cut at no cost: forks share what they have in common.

    def greedy(sequences, ids, n):
        sequence = sequences.open()
        output, found = yield [Feed(sequence, ids)], []
        while len(found) < n:
            found.append(int(output.logits[0].argmax()))
            output = yield [Feed(sequence, found[-1:])]
        sequences.free(sequence)
        return found
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from danlu.generate.draw import Draw
from danlu.generate.sampling import Row

R = TypeVar("R")


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
    logits: Tensor | None = None
    """(rows, V) float32."""
    draw: Draw | None = None
    logprobs: Tensor | None = None
    """(rows,) float32 of the targets."""
    greedy: Tensor | None = None
    """(rows,) whether each target is the most probable token."""

    @classmethod
    def join(cls, parts: "list[Output]") -> "Output":
        """The rows of all parts, one after the other."""
        if len(parts) == 1:
            return parts[0]
        names = ("logits", "logprobs", "greedy")
        joined = {
            name: [value for part in parts if (value := getattr(part, name)) is not None] for name in names
        }
        return cls(
            torch.cat([part.hidden for part in parts] or [torch.empty(0)]),
            **{name: torch.cat(values) for name, values in joined.items() if values},
            draw=parts[-1].draw if parts else None,
        )


Program = Generator[list[Feed], Output, R]


class Sequences(Protocol):
    """Where the tokens read so far are kept. A sequence is named by a number."""

    def open(self) -> int:
        """A new sequence without tokens."""

    def fork(self, sequence: int) -> int:
        """A new sequence with the same tokens; the two go their own ways from here."""

    def cut(self, sequence: int, length: int) -> None:
        """Forgets the tokens behind the first `length`."""

    def free(self, sequence: int) -> None:
        """Gives the sequence's memory back. A program frees all that it opened or forked."""
