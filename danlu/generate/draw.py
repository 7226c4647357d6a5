"""The next tokens of a batch of rows, with what the model says of them."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from danlu.generate.sampling import Row, choose


@dataclass(frozen=True)
class Draw:
    """A token. Log-probabilities are the model's own, before anything is changed."""

    token: int
    logprob: float
    top: list[tuple[int, float]] = field(default_factory=list)
    """The most probable tokens with theirs, as many as were asked for."""


def draw(logits: Tensor, rows: Sequence[Row]) -> list[Draw]:
    """A token for each row of logits (B, V); rows with equal parameters are drawn together."""
    groups: dict[object, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(row.params, []).append(index)
    tokens = [0] * len(rows)
    for group in groups.values():
        mine = logits if len(group) == len(rows) else logits[group]
        chosen = choose(mine, rows[group[0]].params, [rows[index].generator for index in group])
        for index, token in zip(group, chosen.tolist(), strict=True):
            tokens[index] = token
    totals = logits.logsumexp(1)
    picked = logits[range(len(rows)), tokens] - totals
    return [Draw(token, logprob) for token, logprob in zip(tokens, picked.tolist(), strict=True)]
