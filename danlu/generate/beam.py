"""Beam search and its kin: plain, sampled, diverse, and with phrases that must occur.

All are programs (`program.py`) that differ in how they choose among the successors of their hypotheses;
what a hypothesis is worth and when the search ends is decided in one place, `Beam`.

Shapes: n hypotheses, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from danlu.core.errors import UserError
from danlu.generate.program import Answer, Branches, Process, Program, Scope, Sequences


@dataclass(frozen=True)
class BeamParams:
    """What the searches have in common. Raises UserError for a number out of range.

    An answer of T tokens is worth its log-probability / T^length_penalty. `early_stopping`: True = end with
    as many answers as beams; False = end when no hypothesis would be among them at its present length;
    "never" = nor at the length that suits it best. `n` answers come back, best first.
    """

    beams: int = 4
    n: int = 1
    max_tokens: int = 200
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    stop_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        ranges = {
            "beams": (self.beams >= 1, "at least 1"),
            "n": (1 <= self.n <= self.beams, f"1 to {self.beams}, the number of beams"),
            "max_tokens": (self.max_tokens >= 1, "at least 1"),
            "length_penalty": (math.isfinite(self.length_penalty), "a finite number"),
            "early_stopping": (self.early_stopping in (True, False, "never"), 'true, false or "never"'),
        }
        for name, (fits, wanted) in ranges.items():
            if not fits:
                raise UserError(f"{name} is {getattr(self, name)}", f"give {wanted}")


class Candidate(NamedTuple):
    """A hypothesis' row, extended by a token; `score`: its log-probability with what processing changed."""

    score: float
    row: int
    token: int


class Beam:
    """The hypotheses of a search that still grow, best first, and the best that are complete."""

    def __init__(self, params: BeamParams) -> None:
        self.params = params
        self.running = [Answer()]
        self.complete: list[Answer] = []
        self.done = False

    @property
    def n_candidates(self) -> int:
        """So many candidates leave enough that don't stop, if each stop token follows each hypothesis."""
        return max(2, 1 + len(self.params.stop_ids)) * self.params.beams

    @property
    def totals(self) -> Tensor:
        """(n, 1) the scores of the running hypotheses."""
        return torch.tensor([[hypothesis.score] for hypothesis in self.running])

    def stops(self, candidate: Candidate) -> bool:
        return candidate.token in self.params.stop_ids

    def step(
        self, ending: list[Candidate], growing: list[Candidate], logprobs: Tensor
    ) -> tuple[list[int], list[int]]:
        """`ending` may become answers, `growing` the next hypotheses; returns rows and tokens of the latter.

        `logprobs` (n, V): the model's own, to be kept beside the tokens.
        """
        own = logprobs.cpu()
        answers = [self._extend(candidate, own) for candidate in ending]
        length = len(self.running[0].ids) + 1
        answers = [replace(answer, score=self._worth(answer.score, length)) for answer in answers]
        self.complete = sorted([*self.complete, *answers], key=lambda a: -a.score)[: self.params.beams]
        if length == self.params.max_tokens:
            growing = []
        self.running = [self._extend(candidate, own) for candidate in growing]
        self.done = not growing or not self._can_improve(length)
        return [candidate.row for candidate in growing], [candidate.token for candidate in growing]

    def answers(self) -> list[Answer]:
        """The best `n`, best first. Raises UserError if there is none."""
        if not self.complete:
            raise UserError("no answer is possible: every token was ruled out", "rule out less")
        return self.complete[: self.params.n]

    def _extend(self, candidate: Candidate, own: Tensor) -> Answer:
        before = self.running[candidate.row]
        logprob = float(own[candidate.row, candidate.token])
        return Answer(
            [*before.ids, candidate.token],
            [*before.logprobs, logprob],
            self.stops(candidate),
            candidate.score,
        )

    def _worth(self, score: float, length: int) -> float:
        return score / length**self.params.length_penalty

    def _can_improve(self, length: int) -> bool:
        params = self.params
        if len(self.complete) < params.beams:
            return True
        if params.early_stopping is True:
            return False
        if params.early_stopping == "never" and params.length_penalty > 0:
            length = params.max_tokens
        best = max(hypothesis.score for hypothesis in self.running)
        return self._worth(best, length) > self.complete[-1].score


def scores_of(logits: Tensor, prompt: Sequence[int], beam: Beam, process: Process | None) -> Tensor:
    """(n, V) the log-probability of each successor of the running hypotheses, processed."""
    logprobs = logits.log_softmax(dim=-1)
    if process is not None:
        logprobs = process(logprobs, [[*prompt, *hypothesis.ids] for hypothesis in beam.running])
    return logprobs.cpu() + beam.totals


def best_of(scores: Tensor, k: int) -> list[Candidate]:
    """The k highest successors, best first; what is ruled out never."""
    flat = scores.flatten()
    values, places = flat.topk(min(k, len(flat)))
    return [
        Candidate(score, *divmod(place, scores.shape[1]))
        for score, place in zip(values.tolist(), places.tolist(), strict=True)
        if score > -math.inf
    ]


def split(beam: Beam, candidates: list[Candidate]) -> tuple[list[Candidate], list[Candidate]]:
    """Those that end, of the first `beams`; and the best `beams` of those that go on."""
    beams = beam.params.beams
    last = len(beam.running[0].ids) + 1 == beam.params.max_tokens
    ending = [candidate for candidate in candidates[:beams] if last or beam.stops(candidate)]
    growing = sorted((c for c in candidates if not beam.stops(c)), key=lambda c: -c.score)
    return ending, growing[:beams]


def beam_search(
    sequences: Sequences, ids: Sequence[int], params: BeamParams, process: Process | None = None
) -> Program[list[Answer]]:
    """The most probable answers, by keeping the `beams` most probable hypotheses at each length."""
    with Scope(sequences) as held:
        beam, branches = Beam(params), Branches(held)
        output = yield from branches.start(ids)
        while True:
            candidates = best_of(scores_of(output.logits, ids, beam, process), beam.n_candidates)
            rows, tokens = beam.step(*split(beam, candidates), output.logits.log_softmax(dim=-1))
            if beam.done:
                return beam.answers()
            output = yield from branches.grow(rows, tokens)


def beam_sample(
    sequences: Sequences,
    ids: Sequence[int],
    params: BeamParams,
    generator: torch.Generator,
    process: Process | None = None,
) -> Program[list[Answer]]:
    """Beam search whose candidates are drawn without replacement, by the probability of the hypothesis.

    Temperature, top-k and top-p belong into `process`. `generator` is one of the CPU.
    """
    with Scope(sequences) as held:
        beam, branches = Beam(params), Branches(held)
        output = yield from branches.start(ids)
        while True:
            scores = scores_of(output.logits, ids, beam, process)
            candidates = draw_without_replacement(scores, params.beams, beam.n_candidates, generator)
            rows, tokens = beam.step(*split(beam, candidates), output.logits.log_softmax(dim=-1))
            if beam.done:
                return beam.answers()
            output = yield from branches.grow(rows, tokens)


def draw_without_replacement(
    scores: Tensor, beams: int, k: int, generator: torch.Generator
) -> list[Candidate]:
    """k successors in the order in which they were drawn.

    Rows are filled up to `beams`, so that the generator's state depends on no search's history.
    """
    filled = torch.full((beams, scores.shape[1]), -math.inf)
    filled[: len(scores)] = scores
    probabilities = filled.flatten().softmax(dim=0)
    possible = int((probabilities > 0).sum())
    if not possible:
        return []
    places = torch.multinomial(probabilities, min(k, possible), generator=generator).tolist()
    return [Candidate(float(filled.flatten()[place]), *divmod(place, scores.shape[1])) for place in places]


def diverse_beam_search(
    sequences: Sequences,
    ids: Sequence[int],
    params: BeamParams,
    groups: int,
    diversity: float,
    process: Process | None = None,
) -> Program[list[Answer]]:
    """Groups of beams, each pushed away from the tokens of those before it (Vijayakumar 2018, algorithm 1).

    In each step, `diversity` is taken from a token's log-probability for every hypothesis of an earlier
    group that has just taken it (Hamming diversity). The penalties stay in the scores, as in the authors'
    program. `n` answers come back: the best of each group, then their second best, and so on.
    """
    if groups < 1 or params.beams % groups:
        raise UserError(f"{params.beams} beams do not fall into {groups} groups", "give a divisor of beams")
    if not 0 <= diversity < math.inf:
        raise UserError(f"diversity is {diversity}", "give at least 0")
    width = params.beams // groups
    with Scope(sequences) as held:
        beams = [Beam(replace(params, beams=width, n=width)) for _ in range(groups)]
        branches, places = Branches(held), [range(1)] * groups
        output = yield from branches.start(ids)
        while True:
            logprobs = output.logits.log_softmax(dim=-1)
            rows: list[int] = []
            tokens: list[int] = []
            taken = torch.zeros(logprobs.shape[1])
            for group, beam in enumerate(beams):
                if beam.done:
                    continue
                mine = list(places[group])
                scores = scores_of(output.logits[mine], ids, beam, process) - diversity * taken
                ending, growing = split(beam, best_of(scores, beam.n_candidates))
                for candidate in growing:
                    taken[candidate.token] += 1
                chosen, next_tokens = beam.step(ending, growing, logprobs[mine])
                if not beam.done:
                    places[group] = range(len(rows), len(rows) + len(chosen))
                    rows += [mine[row] for row in chosen]
                    tokens += next_tokens
            if not rows:
                found = [beam.complete for beam in beams]
                ranked = [group[rank] for rank in range(width) for group in found if rank < len(group)]
                return ranked[: params.n] or beams[0].answers()
            output = yield from branches.grow(rows, tokens)


def constrained_beam_search(
    sequences: Sequences,
    ids: Sequence[int],
    params: BeamParams,
    phrases: Sequence[Sequence[int]],
    process: Process | None = None,
) -> Program[list[Answer]]:
    """The most probable answers in which every phrase (token ids in a row) occurs.

    Lexically constrained decoding with dynamic beam allocation (Post and Vilar 2018): hypotheses that have
    met equally many of the phrases' tokens form a bank, and the beam is shared out among the banks, so that
    those on the way to a phrase don't have to compete with those that avoid it. A hypothesis stops only
    when nothing is left to meet, and one that could no longer finish in time is dropped; for that, phrases
    count as if they did not overlap. Raises UserError for phrases that don't fit.
    """
    wanted = _without_repeats([list(phrase) for phrase in phrases])
    _check_phrases(wanted, params)
    to_meet = sum(map(len, wanted))
    with Scope(sequences) as held:
        beam, branches = Beam(params), Branches(held)
        output = yield from branches.start(ids)
        while True:
            scores = scores_of(output.logits, ids, beam, process)
            left = params.max_tokens - len(beam.running[0].ids) - 1
            banks: dict[int, list[Candidate]] = {}
            for candidate in _constrained_candidates(beam, scores, wanted):
                met = tokens_met([*beam.running[candidate.row].ids, candidate.token], wanted)
                if to_meet - met <= left:
                    banks.setdefault(met, []).append(candidate)
            whole = banks.get(to_meet, [])[: params.beams]
            ending = [candidate for candidate in whole if left == 0 or beam.stops(candidate)]
            for met, bank in banks.items():
                banks[met] = [candidate for candidate in bank if not beam.stops(candidate)]
            growing = sorted(share_out(banks, params.beams), key=lambda c: -c.score)
            rows, tokens = beam.step(ending, growing, output.logits.log_softmax(dim=-1))
            if beam.done:
                return beam.answers()
            output = yield from branches.grow(rows, tokens)


def _occurs(phrase: list[int], ids: list[int]) -> bool:
    return any(ids[start : start + len(phrase)] == phrase for start in range(len(ids) - len(phrase) + 1))


def _without_repeats(phrases: list[list[int]]) -> list[list[int]]:
    """Without those that occur in another one."""
    longest: list[list[int]] = []
    for phrase in sorted(phrases, key=len, reverse=True):
        if not phrase or not any(_occurs(phrase, other) for other in longest):
            longest.append(phrase)
    return longest


def _check_phrases(phrases: list[list[int]], params: BeamParams) -> None:
    if any(not phrase for phrase in phrases):
        raise UserError("a phrase that must occur is empty", "give at least one token")
    if any(token in params.stop_ids for phrase in phrases for token in phrase):
        raise UserError("a phrase that must occur holds a stop token", "leave the stop token out")
    if (length := sum(map(len, phrases))) > params.max_tokens:
        raise UserError(
            f"the phrases that must occur have {length} tokens, the answer at most {params.max_tokens}",
            "allow more tokens, or ask for less",
        )


def _constrained_candidates(beam: Beam, scores: Tensor, phrases: list[list[int]]) -> list[Candidate]:
    """The best of all, the best of each hypothesis, and what leads each on; best first."""
    found = {(candidate.row, candidate.token) for candidate in best_of(scores, beam.n_candidates)}
    found |= set(enumerate(scores.argmax(dim=-1).tolist()))
    for row, hypothesis in enumerate(beam.running):
        found |= {(row, token) for token in leading_on(hypothesis.ids, phrases)}
    candidates = [Candidate(float(scores[row, token]), row, token) for row, token in found]
    return sorted((c for c in candidates if c.score > -math.inf), key=lambda c: (-c.score, c.row, c.token))


def _unmet(ids: list[int], phrases: list[list[int]]) -> list[tuple[list[int], int]]:
    """Each phrase that doesn't occur in `ids`, and how many of its tokens stand at their end."""
    found = []
    for phrase in phrases:
        if not _occurs(phrase, ids):
            most = min(len(phrase) - 1, len(ids))
            begun = next(n for n in range(most, -1, -1) if ids[len(ids) - n :] == phrase[:n])
            found.append((phrase, begun))
    return found


def tokens_met(ids: list[int], phrases: list[list[int]]) -> int:
    """How many tokens of the phrases are met: whole phrases, and what of one more the end of `ids` begins."""
    unmet = _unmet(ids, phrases)
    missing = sum(len(phrase) for phrase, _ in unmet) - max((begun for _, begun in unmet), default=0)
    return sum(map(len, phrases)) - missing


def leading_on(ids: list[int], phrases: list[list[int]]) -> set[int]:
    """The tokens that begin a phrase that doesn't occur yet, or continue it."""
    return {phrase[n] for phrase, begun in _unmet(ids, phrases) for n in (0, begun)}


def share_out(banks: dict[int, list[Candidate]], beams: int) -> list[Candidate]:
    """Equal shares of the beam for each bank; what a bank can't fill goes to those that met the most."""
    order = sorted((met for met in banks if banks[met]), reverse=True)
    if not order:
        return []
    share, rest = divmod(beams, len(order))
    shares = {met: min(share + (place < rest), len(banks[met])) for place, met in enumerate(order)}
    for met in order:
        more = min(beams - sum(shares.values()), len(banks[met]) - shares[met])
        shares[met] += more
    return [candidate for met in order for candidate in banks[met][: shares[met]]]
