"""Several samples of one prompt, and the best of them, by any score or by likelihood."""

import hashlib
import math
from collections.abc import Callable, Sequence

import torch

from danlu.core.errors import UserError
from danlu.generate.program import Answer, Branches, Process, Program, Scope, Sequences


def sample(
    sequences: Sequences,
    ids: Sequence[int],
    n: int,
    max_tokens: int = 200,
    stop_ids: tuple[int, ...] = (),
    process: Process | None = None,
    seed: int = 0,
) -> Program[list[Answer]]:
    """n answers, drawn independently; the prompt is read once.

    Temperature, top-k and top-p belong into `process`. The draws of the answer with number i depend on
    (seed, i, prompt) only: more answers don't change the first ones.
    """
    for name, value in (("n", n), ("max_tokens", max_tokens)):
        if value < 1:
            raise UserError(f"{name} is {value}", "give at least 1")
    generators = [_generator(seed, number, ids) for number in range(n)]
    answers = [Answer() for _ in range(n)]
    with Scope(sequences) as held:
        branches = Branches(held)
        output = yield from branches.start(ids)
        running, rows = list(range(n)), [0] * n
        while True:
            own = output.logits.log_softmax(dim=-1).cpu()
            logits = output.logits[rows]
            if process is not None:
                logits = process(logits, [[*ids, *answers[number].ids] for number in running])
            probabilities = logits.double().softmax(dim=-1).cpu()
            tokens = [
                int(torch.multinomial(p, 1, generator=generators[number]))
                for p, number in zip(probabilities, running, strict=True)
            ]
            parents, kept = list[int](), list[int]()
            for row, number, token in zip(rows, running, tokens, strict=True):
                answers[number].ids.append(token)
                answers[number].logprobs.append(float(own[row, token]))
                if token not in stop_ids and len(answers[number].ids) < max_tokens:
                    kept.append(number)
                    parents.append(row)
            if not kept:
                return [Answer(a.ids, a.logprobs, a.ids[-1] in stop_ids, sum(a.logprobs)) for a in answers]
            output = yield from branches.grow(parents, [answers[number].ids[-1] for number in kept])
            running, rows = kept, list(range(len(kept)))


def _generator(seed: int, number: int, ids: Sequence[int]) -> torch.Generator:
    mixed = hashlib.blake2b(repr((seed, number, [int(i) for i in ids])).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(mixed, "little") >> 1)


def best_of_n(answers: Sequence[Answer], scorer: Callable[[Answer], float]) -> list[Answer]:
    """The answers with their scores, the best first; of equal ones the earlier. Raises UserError for NaN."""
    scored = [
        Answer(answer.ids, answer.logprobs, answer.stopped, float(scorer(answer))) for answer in answers
    ]
    if any(math.isnan(answer.score) for answer in scored):
        raise UserError("the scorer's score is not a number", "correct the scorer")
    return sorted(scored, key=lambda answer: -answer.score)


def log_likelihood(answer: Answer) -> float:
    """log p(answer | prompt) by the model itself."""
    return sum(answer.logprobs)


def log_likelihood_per_token(answer: Answer) -> float:
    """The same, divided by the answer's length: does not favour short answers."""
    return sum(answer.logprobs) / len(answer.logprobs)


def sample_and_rank(
    sequences: Sequences,
    ids: Sequence[int],
    n: int = 20,
    temperature: float = 0.88,
    per_token: bool = False,
    max_tokens: int = 200,
    stop_ids: tuple[int, ...] = (),
    seed: int = 0,
) -> Program[list[Answer]]:
    """n samples at a temperature, the most probable first (Adiwardana 2020, with its n and temperature).

    Ranked by the model's own log-likelihood, at temperature 1.
    """
    if not temperature > 0:
        raise UserError(f"temperature is {temperature}", "give more than 0")
    answers = yield from sample(
        sequences, ids, n, max_tokens, stop_ids, lambda logits, _: logits / temperature, seed
    )
    return best_of_n(answers, log_likelihood_per_token if per_token else log_likelihood)
