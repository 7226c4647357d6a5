"""Inverse prompting (Zou et al. 2021): of what a model could say, that from which the prompt can be told.

"Controllable Generation from Pre-trained Language Models via Inverse Prompting".
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from danlu.core.errors import UserError
from danlu.generate.program import Answer, Feed, Process, Program, Scope, Sequences
from danlu.tokens.tokenizer import Tokenizer

Inverse = Callable[[list[int]], tuple[list[int], list[int]]]
"""Answer so far → (what is read, what is then to be predicted): the inverse prompt, and the prompt."""


@dataclass(frozen=True)
class InverseParams:
    """`branch` segments are drawn for each of `beams` hypotheses, of at most `segment` tokens, or up to one
    of `ends`; `per_parent` of them at most survive. An answer is worth its inverse score plus `fluency` times
    its mean log-probability per token. Raises UserError for a number out of range.
    """

    beams: int = 5
    branch: int = 5
    per_parent: int = 2
    segment: int = 16
    ends: tuple[int, ...] = ()
    fluency: float = 0.0
    n: int = 1
    max_tokens: int = 200
    stop_ids: tuple[int, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("beams", "branch", "per_parent", "segment", "n", "max_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}", "give at least 1")
        if not 0 <= self.fluency < math.inf:
            raise UserError(f"fluency is {self.fluency}", "give at least 0")


def template(tokenizer: Tokenizer, before: str, between: str, prompt: str) -> Inverse:
    """The inverse prompt `before` + answer + `between`, after which `prompt` is to be predicted."""

    def inverse(answer: list[int]) -> tuple[list[int], list[int]]:
        read = [*tokenizer.document_start, *tokenizer.encode(before + tokenizer.decode(answer) + between)]
        return read, tokenizer.encode(prompt)

    return inverse


@dataclass(eq=False)
class _Growing:
    """A hypothesis; its sequence has read all of its tokens but the last."""

    sequence: int
    logits: Tensor
    """(V,) after its last token, once that is read."""
    parent: int = 0
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    score: float = -math.inf

    def branch(self, sequences: Sequences, row: int) -> "_Growing":
        return _Growing(sequences.fork(self.sequence), self.logits, row, [*self.ids], [*self.logprobs])


def inverse_prompting(
    sequences: Sequences,
    ids: Sequence[int],
    inverse: Inverse,
    params: InverseParams,
    process: Process | None = None,
) -> Program[list[Answer]]:
    """Beam search, segment by segment, for the text that best predicts the prompt.

    Where beam search ranks a text by log p(text | prompt), this ranks it by log p(prompt' | text in the
    inverse prompt); p(text | prompt) proposes: each hypothesis is continued by segments drawn from it.
    `process` holds temperature, top-k and top-p of these draws. Ends with `beams` complete answers;
    `n` come back, best first.
    """
    generator = torch.Generator().manual_seed(params.seed)
    with Scope(sequences) as held:
        sequence = held.open()
        output = yield [Feed(sequence, ids)]
        running, complete = [_Growing(sequence, output.logits[0])], list[Answer]()
        while True:
            grown = [h.branch(held, row) for row, h in enumerate(running) for _ in range(params.branch)]
            for hypothesis in running:
                held.free(hypothesis.sequence)
            yield from _draw_segments(grown, ids, params, process, generator)
            scores = yield from continuation_logprobs(held, [inverse(child.ids) for child in grown])
            for child, score in zip(grown, scores, strict=True):
                child.score = score + params.fluency * sum(child.logprobs) / len(child.logprobs)
            running = []
            for child in _survivors(grown, params):
                if _ended(child, params):
                    stopped = child.ids[-1] in params.stop_ids
                    complete.append(Answer(child.ids, child.logprobs, stopped, child.score))
                else:
                    running.append(child)
            for child in grown:
                if child not in running:
                    held.free(child.sequence)
            if not running or len(complete) >= params.beams:
                return sorted(complete, key=lambda answer: -answer.score)[: params.n]
            output = yield [Feed(child.sequence, child.ids[-1:]) for child in running]
            for child, logits in zip(running, output.logits, strict=True):
                child.logits = logits


def _ended(child: _Growing, params: InverseParams) -> bool:
    return child.ids[-1] in params.stop_ids or len(child.ids) == params.max_tokens


def _draw_segments(
    grown: list[_Growing],
    prompt: Sequence[int],
    params: InverseParams,
    process: Process | None,
    generator: torch.Generator,
) -> Program[None]:
    """Extends each hypothesis by a segment; all are read together."""
    begun = {id(child): len(child.ids) for child in grown}
    active = grown
    while True:
        logits = torch.stack([child.logits for child in active])
        own = logits.log_softmax(dim=-1)
        if process is not None:
            logits = process(logits, [[*prompt, *child.ids] for child in active])
        tokens = torch.multinomial(logits.softmax(dim=-1).cpu(), 1, generator=generator)[:, 0].tolist()
        for row, (child, token) in enumerate(zip(active, tokens, strict=True)):
            child.ids.append(token)
            child.logprobs.append(float(own[row, token]))
        active = [
            child
            for child in active
            if not _ended(child, params)
            and child.ids[-1] not in params.ends
            and len(child.ids) - begun[id(child)] < params.segment
        ]
        if not active:
            return
        output = yield [Feed(child.sequence, child.ids[-1:]) for child in active]
        for child, logits in zip(active, output.logits, strict=True):
            child.logits = logits


def _survivors(grown: list[_Growing], params: InverseParams) -> list[_Growing]:
    """The best `beams`, no text twice, at most `per_parent` of one parent."""
    kept: list[_Growing] = []
    for child in sorted(grown, key=lambda child: -child.score):
        siblings = sum(other.parent == child.parent for other in kept)
        if siblings < params.per_parent and all(other.ids != child.ids for other in kept):
            kept.append(child)
    return kept[: params.beams]


def continuation_logprobs(
    sequences: Sequences, pairs: Sequence[tuple[list[int], list[int]]]
) -> Program[list[float]]:
    """log p(second | first) of each pair of token lists. Raises UserError for an empty list."""
    if any(not context or not continuation for context, continuation in pairs):
        raise UserError("the inverse prompt or what it predicts is empty", "give at least one token each")
    with Scope(sequences) as held:
        opened = [held.open() for _ in pairs]
        output = yield [Feed(sequence, pair[0]) for sequence, pair in zip(opened, pairs, strict=True)]
        first = output.logits.log_softmax(dim=-1)
        totals = [float(first[row, pair[1][0]]) for row, pair in enumerate(pairs)]
        longer = [row for row, pair in enumerate(pairs) if len(pair[1]) > 1]
        if longer:
            output = yield [Feed(opened[row], pairs[row][1][:-1], every=True) for row in longer]
            targets = torch.tensor([token for row in longer for token in pairs[row][1][1:]])
            logprobs = output.logits.log_softmax(dim=-1).cpu()[torch.arange(len(targets)), targets]
            parts = logprobs.split([len(pairs[row][1]) - 1 for row in longer])
            for row, part in zip(longer, parts, strict=True):
                totals[row] += float(part.sum())
        return totals
