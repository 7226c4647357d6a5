"""Rewards: from a prompt and a reply to a number. A model, a rule, or a weighted sum of these.

Whatever gives them, they are checked: a number that is not finite, or a reward that raises, ends the run with
its name and the reply.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from danlu.align.config import RewardSource
from danlu.align.reward import RewardModel
from danlu.core.errors import UserError
from danlu.data.conversations import Messages
from danlu.evaluate.answers import last_number, plain_number


@dataclass(frozen=True)
class Reply:
    """What is judged. `row`: the prompt's whole row, where an answer may stand."""

    prompt: Messages
    text: str
    row: Mapping[str, Any] = field(default_factory=dict)
    ended: bool = True
    """Whether the model ended it; else it was cut."""


Reward = Callable[[Sequence[Reply]], list[float]]


def exact_number(replies: Sequence[Reply]) -> list[float]:
    """1 where the last number of the reply is that of the row's answer."""
    return [
        float(
            (found := last_number(reply.text)) is not None and found == plain_number(str(reply.row["answer"]))
        )
        for reply in replies
    ]


def exact_text(replies: Sequence[Reply]) -> list[float]:
    """1 where the reply is the row's answer, but for blanks around it."""
    return [float(reply.text.strip() == str(reply.row["answer"]).strip()) for reply in replies]


def ended(replies: Sequence[Reply]) -> list[float]:
    """1 where the model ended its reply, 0 where it was cut."""
    return [float(reply.ended) for reply in replies]


def length(replies: Sequence[Reply]) -> list[float]:
    """Characters, in hundreds."""
    return [len(reply.text) / 100 for reply in replies]


RULES: dict[str, Reward] = {
    "exact_number": exact_number,
    "exact_text": exact_text,
    "ended": ended,
    "length": length,
}


def matches(pattern: str) -> Reward:
    """1 where the regular expression is found in the reply."""
    compiled = re.compile(pattern, re.DOTALL)
    return lambda replies: [float(compiled.search(reply.text) is not None) for reply in replies]


def by_model(ref: str) -> Reward:
    """What a model of rewards says."""
    model = RewardModel(ref)
    return lambda replies: model([reply.prompt for reply in replies], [reply.text for reply in replies])


def make_reward(sources: Sequence[RewardSource]) -> Reward:
    """The weighted sum of the sources, each checked. Raises UserError for one that can't be."""
    if not sources:
        raise UserError(
            "no reward is given", f"e.g. rewards=[{{rule: exact_number}}]; rules: {', '.join(RULES)}"
        )
    parts = [(source.weight, _named(source), source.name) for source in sources]

    def total(replies: Sequence[Reply]) -> list[float]:
        sums = [0.0] * len(replies)
        for weight, reward, name in parts:
            for place, value in enumerate(checked(reward, replies, name)):
                sums[place] += weight * value
        return sums

    return total


def checked(reward: Reward, replies: Sequence[Reply], name: str) -> list[float]:
    """The rewards of replies. Raises UserError naming reward and reply where there is none."""
    try:
        found = [float(value) for value in reward(replies)]
    except UserError:
        raise
    except KeyError as error:
        raise UserError(
            f"the reward {name} needs {error} in each prompt's row", "add it to the data"
        ) from None
    except Exception as error:  # a reward may be anybody's program
        raise UserError(f"the reward {name} fails: {type(error).__name__}: {error}", "mend it") from error
    if len(found) != len(replies):
        raise UserError(f"the reward {name} gives {len(found)} numbers for {len(replies)} replies", "mend it")
    for reply, value in zip(replies, found, strict=True):
        if not math.isfinite(value):
            raise UserError(f"the reward {name} is {value} for the reply {reply.text[:200]!r}", "mend it")
    return found


def _named(source: RewardSource) -> Reward:
    if source.rule is not None:
        return RULES[source.rule]
    if source.regex is not None:
        return matches(source.regex)
    return by_model(str(source.model))
