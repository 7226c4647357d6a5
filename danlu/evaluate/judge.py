"""A model as judge of answers: one of two, or a grade.

Zheng et al. 2023, "Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena". Which answer stands first sways a
judge, so every pair is judged in both orders, and who doesn't win both has drawn (section 3.4). Longer
answers win more often, so a win rate can be had at equal lengths (Dubois et al. 2024, "Length-Controlled
AlpacaEval"). Prompts are data: our own stand below, and FastChat's file of them is read as it is.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from danlu.core.errors import UserError
from danlu.data.conversations import Messages
from danlu.data.documents import read_rows
from danlu.evaluate.intervals import Interval, bootstrap_interval

Judge = Callable[[Sequence[Messages]], list[str]]
"""Answers prompts; of the engine, of a server, or a function of a test."""
Side = Literal["a", "b", "tie"]


@dataclass(frozen=True)
class JudgePrompt:
    """What a judge is told; {question}, {answer_a}, {answer_b}, {answer} and {ref_answer_1} are filled in."""

    system: str
    template: str

    def fill(self, **texts: str) -> Messages:
        # Not str.format: an answer may hold braces, and what it holds is not filled in again.
        found = re.sub(r"\{(\w+)\}", lambda name: texts.get(name[1], name[0]), self.template)
        return [{"role": "system", "content": self.system}, {"role": "user", "content": found}]


PAIR = JudgePrompt(
    "You compare two answers to a question. Judge how helpful, correct and complete each is. Neither their "
    "order nor their length matters. First say in a few sentences what speaks for and against each. Then end "
    "with [[A]] if the first is better, [[B]] if the second is, [[C]] if neither is.",
    "Question:\n{question}\n\nFirst answer:\n{answer_a}\n\nSecond answer:\n{answer_b}",
)
SINGLE = JudgePrompt(
    "You grade an answer to a question by how helpful, correct and complete it is. First explain in a few "
    "sentences. Then end with a grade from 1 to 10 in double brackets, such as [[5]].",
    "Question:\n{question}\n\nAnswer:\n{answer}",
)


def read_prompts(path: Path) -> dict[str, JudgePrompt]:
    """FastChat's file of judge prompts, by name. Raises UserError for a row that is none."""
    found = {}
    for number, row in read_rows(path):
        if not isinstance(row, dict) or not {"name", "system_prompt", "prompt_template"} <= row.keys():
            raise UserError(
                f"{path}, line {number}: not a judge's prompt",
                "a row has name, system_prompt, prompt_template",
            )
        found[row["name"]] = JudgePrompt(row["system_prompt"], row["prompt_template"])
    return found


@dataclass(frozen=True)
class Judgement:
    """Of a pair, in both orders; None where the judge said nothing that can be read."""

    first: Side | None
    """With A's answer first."""
    second: Side | None
    """With B's answer first; a and b are still the models."""

    @property
    def verdict(self) -> Side | None:
        """Who wins both; a draw where they differ; None where neither could be read."""
        read = [side for side in (self.first, self.second) if side is not None]
        if len(read) < 2:
            return None
        return read[0] if read[0] == read[1] else "tie"


def both_orders(judge: Judge, asked: Sequence[tuple[Messages, Messages]]) -> list[Judgement]:
    """Of prompts with A's answer first, and with B's. Raises UserError where no judgement can be read."""
    said = [read_side(text) for text in judge([prompt for both in asked for prompt in both])]
    if asked and not any(said):
        raise UserError(
            "none of the judge's answers holds [[A]], [[B]] or [[C]]", "take another judge or prompt"
        )
    turned: dict[Side | None, Side | None] = {"a": "b", "b": "a", "tie": "tie", None: None}
    return [Judgement(said[n], turned[said[n + 1]]) for n in range(0, len(said), 2)]


def grades(judge: Judge, asked: Sequence[Messages]) -> list[float | None]:
    """Of prompts; None where none can be read. Raises UserError where that is so of all."""
    found = [read_grade(text) for text in judge(asked)]
    if asked and all(one is None for one in found):
        raise UserError(
            "none of the judge's answers holds a grade such as [[5]]", "take another judge or prompt"
        )
    return found


def read_side(text: str) -> Side | None:
    """The last verdict in the text."""
    sides: dict[str, Side] = {"A": "a", "B": "b", "C": "tie"}
    found = re.findall(r"\[\[([ABC])\]\]", text)
    return sides[found[-1]] if found else None


def read_grade(text: str) -> float | None:
    """The last grade from 1 to 10."""
    found = re.findall(r"\[\[(\d+(?:\.\d+)?)\]\]", text)
    return float(found[-1]) if found and 1 <= float(found[-1]) <= 10 else None


@dataclass(frozen=True)
class WinRate:
    """Of B over A; a draw is half a win."""

    rate: float
    interval: Interval
    n: int
    unread: int
    """Pairs without a verdict: they don't count."""
    consistent: float
    """Share of the pairs that were judged the same in both orders."""
    first_preferred: float
    """Share of single judgements that went to whatever stood first, of those that weren't draws."""
    length_controlled: float | None


def win_rate(answers: Sequence[tuple[str, str]], judgements: Sequence[Judgement]) -> WinRate:
    """Of A's and B's answers. Raises UserError where no pair has a verdict."""
    judged = [(pair, one) for pair, one in zip(answers, judgements, strict=True) if one.verdict is not None]
    if not judged:
        raise UserError("no pair was judged in both orders", "take another judge or prompt")
    score = {"a": 0.0, "tie": 0.5, "b": 1.0}
    wins = [score[one.verdict] for _, one in judged if one.verdict is not None]
    firsts = [one.first == "a" for _, one in judged if one.first != "tie"]
    firsts += [one.second == "b" for _, one in judged if one.second != "tie"]
    gaps = [len(b) - len(a) for (a, b), _ in judged]
    return WinRate(
        rate=float(np.mean(wins)),
        interval=bootstrap_interval(wins),
        n=len(judged),
        unread=len(judgements) - len(judged),
        consistent=float(np.mean([one.first == one.second for _, one in judged])),
        first_preferred=float(np.mean(firsts)) if firsts else 0.5,
        length_controlled=length_controlled(wins, gaps),
    )


def length_controlled(wins: Sequence[float], gaps: Sequence[int], steps: int = 50) -> float | None:
    """The win rate that is left at equal lengths: σ(θ) of p(win) = σ(θ + φ tanh(gap / its deviation)).

    Dubois et al. 2024, equation 2, without the terms of the single questions, which take many models to fit.
    Fitted by Newton's steps with a weak prior (φ and θ have a deviation of 10), so that it exists where every
    longer answer wins. None where all gaps are equal.
    """
    spread = float(np.std(gaps))
    if spread == 0:
        return None
    x = np.stack([np.ones(len(gaps)), np.tanh(np.asarray(gaps, float) / spread)], 1)
    y, weights = np.asarray(wins, float), np.zeros(2)
    for _ in range(steps):
        p = 1 / (1 + np.exp(-x @ weights))
        slope = x.T @ (y - p) - weights / 100
        curvature = (x * (p * (1 - p))[:, None]).T @ x + np.eye(2) / 100
        weights += np.linalg.solve(curvature, slope)
    return float(1 / (1 + np.exp(-weights[0])))
