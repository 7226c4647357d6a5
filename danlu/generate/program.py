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

from torch import Tensor

R = TypeVar("R")


@dataclass(frozen=True)
class Feed:
    """Tokens that are appended to a sequence, at least one."""

    sequence: int
    tokens: Sequence[int]
    every: bool = False
    """Whether logits are wanted after each of the tokens, or after the last one only."""


@dataclass(frozen=True)
class Output:
    """What the model says of the tokens fed, feed by feed: a row for each token asked about."""

    logits: Tensor
    """(rows, V) float32."""
    hidden: Tensor
    """(rows, D) what the output matrix was multiplied with."""


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
