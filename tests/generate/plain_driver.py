"""Runs a program without a cache: each sequence's tokens are kept, and read from the start each time."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from danlu.generate.program import Feed, Output, Program
from danlu.model.transformer import Transformer

R = TypeVar("R")
Model = Callable[[list[int]], tuple[Tensor, Tensor]]
"""Tokens (T) → logits (T, V) and hidden vectors (T, D)."""


def whole_pass(model: Transformer) -> Model:
    @torch.no_grad()
    def read(tokens: list[int]) -> tuple[Tensor, Tensor]:
        hidden = model.hidden(torch.tensor([tokens]))
        return model.logits(hidden)[0], hidden[0]

    return read


class PlainSequences:
    """Token lists by number, each with its model's."""

    def __init__(self) -> None:
        self.tokens: dict[int, list[int]] = {}
        self.models: dict[int, int] = {}
        self.opened = 0

    def open(self, model: int = 0) -> int:
        self.opened += 1
        self.tokens[self.opened], self.models[self.opened] = [], model
        return self.opened

    def fork(self, sequence: int) -> int:
        child = self.open(self.models[sequence])
        self.tokens[child] = list(self.tokens[sequence])
        return child

    def cut(self, sequence: int, length: int) -> None:
        assert 0 <= length <= len(self.tokens[sequence])
        del self.tokens[sequence][length:]

    def free(self, sequence: int) -> None:
        del self.tokens[sequence]


class Driver:
    """`longest`: the most tokens a sequence has held; `passes`: how often each model was asked."""

    def __init__(self, *models: Model) -> None:
        self.read = models
        self.sequences = PlainSequences()
        self.longest = 0
        self.passes = [0] * len(models)

    def run(self, program: Program[R]) -> R:
        """The program's result; nothing may be left behind."""
        try:
            feeds = next(program)
            while True:
                feeds = program.send(self.answer(feeds))
        except StopIteration as end:
            assert not self.sequences.tokens, "a sequence was not freed"
            return end.value

    def answer(self, feeds: Sequence[Feed]) -> Output:
        assert feeds
        [model] = {self.sequences.models[feed.sequence] for feed in feeds}
        assert len({feed.sequence for feed in feeds}) == len(feeds)
        self.passes[model] += 1
        rows = []
        for feed in feeds:
            assert len(feed.tokens) > 0
            tokens = self.sequences.tokens[feed.sequence]
            tokens += [int(token) for token in feed.tokens]
            self.longest = max(self.longest, len(tokens))
            n = len(feed.tokens) if feed.every else 1
            logits, hidden = self.read[model](tokens)
            rows.append((logits[-n:], hidden[-n:]))
        return Output(logits=torch.cat([z for z, _ in rows]), hidden=torch.cat([h for _, h in rows]))
