"""Rewards: from a prompt and a reply to a number. A model, a rule, a server, or a weighted sum of these.

Whatever gives them, they are checked: a number that is not finite, or a reward that raises, ends the run with
its name and the reply.
"""

import atexit
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from requests import RequestException

from danlu.align.config import RewardSource
from danlu.align.reward import RewardModel
from danlu.core.errors import UserError
from danlu.core.host import cores
from danlu.core.http import patient_session
from danlu.data.conversations import Messages
from danlu.evaluate.answers import last_number, plain_number
from danlu.evaluate.code.config import CodeConfig
from danlu.evaluate.code.problems import parse
from danlu.evaluate.code.run import Runner, check
from danlu.evaluate.code.samples import from_chat
from danlu.evaluate.code.score import backend_of


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


def by_models(models: Sequence[RewardModel], doubt: float) -> Reward:
    """What a model of rewards says; the mean of several, less `doubt` of their standard deviations.

    Where they have seen nothing alike they disagree; what exploits one of them is then worth less (Coste et
    al. 2023, "Reward model ensembles help mitigate overoptimization", section 3.3).
    """

    def judge(replies: Sequence[Reply]) -> list[float]:
        prompts, texts = [reply.prompt for reply in replies], [reply.text for reply in replies]
        found = np.array([model(prompts, texts) for model in models])
        return (found.mean(0) - doubt * found.std(0)).tolist()

    return judge


def passes_tests(seconds: float) -> Reward:
    """1 where the program in the reply passes the row's test, in the sandbox.

    A row is a problem in the form of HumanEval, MBPP or HumanEval-X, in Python.
    """
    runner = Runner(["python"], cores(), backend_of(CodeConfig()))
    atexit.register(runner.__exit__)  # it serves as long as the run

    def judge(replies: Sequence[Reply]) -> list[float]:
        found = [0.0] * len(replies)
        work = []
        for place, reply in enumerate(replies):
            problem = parse(reply.row)
            work.append((place, check(problem, from_chat(reply.text, problem), seconds)))
        for place, verdict in runner.each(work):
            found[place] = float(verdict.passed)
        return found

    return judge


def by_server(url: str, seconds: float) -> Reward:
    """What a server says of all replies of a rollout, asked at once; asked again where it doesn't answer."""
    session = patient_session()

    def judge(replies: Sequence[Reply]) -> list[float]:
        body: dict[str, Any] = {
            "prompts": [reply.prompt for reply in replies],
            "replies": [reply.text for reply in replies],
        }
        try:
            answer = session.post(url, json=body, timeout=seconds)
        except RequestException as error:
            raise UserError(
                f"the reward {url} does not answer: {type(error).__name__}",
                "see that its server runs; the same command goes on from the last checkpoint",
            ) from None
        if answer.status_code != 200:
            raise UserError(f"the reward {url} says {answer.status_code}: {answer.text[:300]}", "mend that")
        try:
            found = answer.json()["rewards"]
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"the reward {url} answers {answer.text[:100]!r}", 'it should answer {"rewards": […]}'
            ) from None
        return [float(value) for value in found]

    return judge


class SummedReward:
    """A weighted sum of rewards, each checked."""

    def __init__(
        self, sources: Sequence[RewardSource], load: Callable[[str], RewardModel] = RewardModel
    ) -> None:
        """`load`: gets the models among them. Raises UserError where there is none, or one can't be."""
        if not sources:
            raise UserError(
                "no reward is given",
                f"e.g. rewards=[{{rule: exact_number}}]; rules: tests, {', '.join(RULES)}",
            )
        self.weights = [source.weight for source in sources]
        self.names = [source.name for source in sources]
        self._rewards = [_named(source, load) for source in sources]

    def parts(self, replies: Sequence[Reply]) -> list[tuple[float, ...]]:
        """Of each reply what each part says."""
        found = [
            checked(reward, replies, name) for reward, name in zip(self._rewards, self.names, strict=True)
        ]
        return list(zip(*found, strict=True))

    def total(self, parts: Sequence[float]) -> float:
        return sum(weight * value for weight, value in zip(self.weights, parts, strict=True))

    def __call__(self, replies: Sequence[Reply]) -> list[float]:
        return [self.total(parts) for parts in self.parts(replies)]


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


def _named(source: RewardSource, load: Callable[[str], RewardModel]) -> Reward:
    if source.rule == "tests":
        return passes_tests(source.seconds)
    if source.rule is not None:
        return RULES[source.rule]
    if source.regex is not None:
        return matches(source.regex)
    if source.url is not None:
        return by_server(source.url, source.seconds)
    return by_models([load(str(ref)) for ref in source.models or [source.model]], source.doubt)
