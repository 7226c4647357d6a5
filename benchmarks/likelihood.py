"""Scoring multiple choice on smollm2: danlu's likelihoods beside lm-eval's `hf` backend, in turns.

    python benchmarks/likelihood.py [--questions 500] [--turns 10] [--batch-size 1] [--json FILE]

Questions of MMLU's test part, drawn over all subjects ($DANLU_DATA/mmlu; docs/data.md), each behind the five
examples of its subject, with the four choices as full text. Both are given the same ids of context and
continuation. Every contestant is a process of its own; a turn is a part of the questions, in order of
subjects, that one after the other scores while the others sleep; the ratio of times is taken within a turn.

Compared are the log-likelihoods in float32; the decisions (the likeliest choice) in float32, where the best
two choices are further apart than 2e-3; and how often each one's decision in bf16 is that in float32. The
`hf` backend gets batches of --batch-size: one text at a time is what it does fastest on two cores (of 1, 8
and 24). danlu is handed all requests of a turn.
"""

import argparse
import csv
import io
import json
import os
import random
import statistics
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from _racing import Contestant, Quietness, median_interval, say

from danlu.core.host import cores

MODEL = "smollm2"
CHOICES = 4
SHOTS = 5
GAP = 2e-3
"""Nats between the best two choices, above which float32 must decide alike."""

Request = tuple[list[int], list[int]]
"""Ids of a context and of its continuation."""

Score = Callable[[list[Request]], list[float]]
"""Log-probabilities of continuations, in nats."""

WARM_UP = 2
"""Questions."""


# The contestants.


def danlu_scorer(dtype: str) -> Score:
    import torch

    import danlu

    torch.set_num_threads(cores())
    model, tokenizer = danlu.load(MODEL, dtype=torch.float32)
    engine: Any = danlu.Engine(model, tokenizer, dtype=dtype)  # type: ignore[call-arg]
    return lambda requests: [found.logprob for found in engine.likelihoods(requests)]


def hf_scorer(dtype: str, folder: Path, batch_size: int) -> Score:
    import torch
    from lm_eval.models.huggingface import HFLM

    torch.set_num_threads(cores())
    model = HFLM(pretrained=str(folder), device="cpu", dtype=dtype, batch_size=batch_size)

    def score(requests: list[Request]) -> list[float]:
        asked = [(None, context, continuation) for context, continuation in requests]
        return [value for value, _ in model._loglikelihood_tokens(asked, disable_tqdm=True)]

    return score


class Scorer(Contestant):
    """A contestant, with what it has scored so far."""

    def __init__(self, name: str, make: Callable[..., Score], *arguments: Any) -> None:
        super().__init__(name, make, *arguments)
        self.values: list[float] = []
        self.seconds: list[float] = []

    def run(self, questions: list[list[Request]]) -> None:
        seconds, values = self.ask([request for requests in questions for request in requests])
        self.seconds.append(seconds)
        self.values += values

    def scores(self) -> list[list[float]]:
        """The choices' log-likelihoods, question by question."""
        return [self.values[at : at + CHOICES] for at in range(0, len(self.values), CHOICES)]

    def decisions(self) -> list[int]:
        return [scores.index(max(scores)) for scores in self.scores()]


def scorers(folder: Path, batch_size: int) -> Iterator[Scorer]:
    """All contestants, one after the other."""
    for dtype, theirs in (("float32", "float32"), ("bf16", "bfloat16")):
        yield Scorer(f"danlu {dtype}", danlu_scorer, dtype)
        yield Scorer(f"hf {dtype}", hf_scorer, theirs, folder, batch_size)


# The questions.


@dataclass(frozen=True)
class Question:
    """One of the test, with its subject's examples before it."""

    subject: str
    context: str
    choices: list[str]
    answer: int


def read_questions(archive: Path, count: int) -> list[Question]:
    """`count` questions drawn over all subjects, in their order, and behind them a few for the warm-up."""
    parts: dict[str, dict[str, list[list[str]]]] = {"dev": {}, "test": {}}
    with tarfile.open(archive) as files:
        for member in files:
            folder, _, name = member.name.removeprefix("data/").partition("/")
            if folder in parts and name.endswith(".csv") and (file := files.extractfile(member)):
                rows = csv.reader(io.StringIO(file.read().decode("utf-8")))
                parts[folder][name.removesuffix(f"_{folder}.csv")] = list(rows)
    everything = [(subject, row) for subject in sorted(parts["test"]) for row in parts["test"][subject]]
    places = random.Random(0).sample(range(len(everything)), count + WARM_UP)
    drawn = [everything[place] for place in (*sorted(places[:count]), *places[count:])]
    found = []
    for subject, (question, *choices, letter) in drawn:
        shots = "\n\n".join(
            f"{_ask(example[0])} {example[1 + 'ABCD'.index(example[-1])]}"
            for example in parts["dev"][subject][:SHOTS]
        )
        about = f"The following are questions about {subject.replace('_', ' ')}, with their answers."
        context = f"{about}\n\n{shots}\n\n{_ask(question)}"
        found.append(Question(subject, context, choices, "ABCD".index(letter)))
    return found


def _ask(question: str) -> str:
    return f"Question: {question.strip()}\nAnswer:"


def encode(questions: list[Question], folder: Path) -> list[list[Request]]:
    """For each question the requests of its choices: the whole text's ids, cut where the context ends."""
    from danlu.tokens.load import load_tokenizer

    tokenizer = load_tokenizer(folder)
    found = []
    for question in questions:
        context = tokenizer.encode(question.context)
        wholes = (tokenizer.encode(f"{question.context} {choice}") for choice in question.choices)
        found.append([(context, whole[len(context) :]) for whole in wholes])
    return found


# The controller.


def measure(questions: list[Question], turns: int, batch_size: int, folder: Path) -> dict[str, Any]:
    """All contestants on all questions. Returns the rows, ratios and comparisons of the result."""
    *requests, first, second = encode(questions, folder)
    racers = {}
    for racer in scorers(folder, batch_size):
        racers[racer.name] = racer
        racer.run([first, second])
        racer.values.clear(), racer.seconds.clear()
        say(f"{racer.name} is warm")
    quiet = Quietness()
    for number in range(turns):
        part = requests[len(requests) * number // turns : len(requests) * (number + 1) // turns]
        order = list(racers.values()) if number % 2 == 0 else list(racers.values())[::-1]
        for racer in order:
            racer.run(part)
        last = "  ".join(f"{name} {racer.seconds[-1]:.1f} s" for name, racer in racers.items())
        say(f"{number + 1}/{turns}: {len(part)} questions  {last}")
    others = quiet.others()
    for racer in racers.values():
        racer.stop()
    answers = [question.answer for question in questions[: len(requests)]]
    return {
        "rows": [row(racer, answers) for racer in racers.values()],
        "ratios": {
            dtype: ratio(racers[f"danlu {dtype}"], racers[f"hf {dtype}"]) for dtype in ("float32", "bf16")
        },
        "comparison": comparison(racers),
        "tokens": {
            "without_sharing": sum(len(c) + len(x) - 1 for choices in requests for c, x in choices),
            "prefixes_shared": shared_tokens([request for choices in requests for request in choices]),
        },
        "others_share_of_processor": others,
    }


def shared_tokens(requests: list[Request]) -> int:
    """Tokens to read where each prefix is read once: the nodes of the tree of all requests."""
    wholes = sorted(context + continuation[:-1] for context, continuation in requests)
    total = len(wholes[0])
    for before, ids in pairwise(wholes):
        pairs = zip(before, ids, strict=False)
        total += len(ids) - next(
            (number for number, (a, b) in enumerate(pairs) if a != b), min(len(before), len(ids))
        )
    return total


def row(racer: Scorer, answers: list[int]) -> dict[str, Any]:
    right = [found == answer for found, answer in zip(racer.decisions(), answers, strict=True)]
    return {
        "contestant": racer.name,
        "questions": len(right),
        "seconds": sum(racer.seconds),
        "questions_per_second": len(right) / sum(racer.seconds),
        "accuracy": statistics.mean(right),
        "turns": racer.seconds,
    }


def ratio(ours: Scorer, peer: Scorer) -> dict[str, Any]:
    each = [theirs / mine for mine, theirs in zip(ours.seconds, peer.seconds, strict=True)]
    return {
        "median": statistics.median(each),
        "interval": list(median_interval(each)),
        "each": each,
        "of_sums": sum(peer.seconds) / sum(ours.seconds),
    }


def comparison(racers: dict[str, Scorer]) -> dict[str, Any]:
    """What must be alike, and how alike it is."""
    ours, theirs = racers["danlu float32"], racers["hf float32"]
    gaps = []
    for scores in theirs.scores():
        best, second = sorted(scores)[:-3:-1]
        gaps.append(best - second)
    other = [
        number
        for number, (a, b) in enumerate(zip(ours.decisions(), theirs.decisions(), strict=True))
        if a != b
    ]

    def agreement(name: str) -> float:
        pairs = zip(racers[f"{name} bf16"].decisions(), racers[f"{name} float32"].decisions(), strict=True)
        return statistics.mean(a == b for a, b in pairs)

    return {
        "largest_difference": max(abs(a - b) for a, b in zip(ours.values, theirs.values, strict=True)),
        "other_decisions": len(other),
        "other_decisions_beyond_gap": sum(gaps[number] > GAP for number in other),
        "bf16_agrees_with_float32": {name: agreement(name) for name in ("danlu", "hf")},
    }


def table(result: dict[str, Any]) -> str:
    lines = [f"{'':14} {'questions/s':>12} {'seconds':>9} {'accuracy':>9}"]
    for found in result["rows"]:
        lines.append(
            f"{found['contestant']:14} {found['questions_per_second']:12.2f} {found['seconds']:9.1f} "
            f"{found['accuracy']:9.1%}"
        )
    for dtype, found in result["ratios"].items():
        low, high = found["interval"]
        lines.append(
            f"{dtype}: danlu is {found['median']:.2f} times as fast [{low:.2f}, {high:.2f}]; "
            f"{found['of_sums']:.2f} times over all questions"
        )
    compared, tokens = result["comparison"], result["tokens"]
    agrees = compared["bf16_agrees_with_float32"]
    lines += [
        f"float32: log-likelihoods differ by at most {compared['largest_difference']:.1e}; "
        f"{compared['other_decisions']} decisions differ, {compared['other_decisions_beyond_gap']} of them "
        f"where the best two are further apart than {GAP:g}",
        f"bf16 decides as float32 does: danlu {agrees['danlu']:.1%}, hf {agrees['hf']:.1%}",
        f"{tokens['without_sharing']} tokens, {tokens['prefixes_shared']} where prefixes are read once",
        f"other processes took {result['others_share_of_processor']:.1%} of the processor",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=1, help="of the hf backend")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    options = parser.parse_args()
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    archive = Path(os.environ.get("DANLU_DATA", "")) / "mmlu" / "data.tar.gz"
    if "DANLU_DATA" not in os.environ or not archive.is_file():
        parser.error("set DANLU_DATA to a folder with mmlu/data.tar.gz; docs/data.md says what it is")

    from danlu.core.device import machine
    from danlu.model.config import ConvertConfig
    from danlu.model.convert import convert

    questions = read_questions(archive, options.questions)
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "hf"
        convert(ConvertConfig(source=MODEL, out=folder, dtype="float32"))
        measured = measure(questions, options.turns, options.batch_size, folder)
    result = {"machine": asdict(machine()), **measured}
    print(table(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
