"""Choosing the next token: the strategies in one order, and a draw.

    processed = process(logits, rows, params)
    for row, token in zip(rows, choose(processed, rows, params).tolist()):
        row.accept(token)

The order is that of transformers' generate: logit bias, repetition penalty, presence and frequency penalty,
n-gram blocking, banned tokens, minimum length, constraint (schema, regex), scorer; then, unless greedy,
temperature, top-k, top-p, min-p, typical, epsilon, eta, Mirostat.
"""

import hashlib
import json
import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from danlu.core.errors import UserError
from danlu.generate import constraints, strategies
from danlu.generate.strategies import Scorer
from danlu.tokens.tokenizer import Tokenizer


@dataclass(frozen=True)
class SamplingParams:
    """What one request asks of its answer. Raises UserError for a number out of range.

    `temperature`: 0 = greedy, and then what shapes a draw is left out (top_k … mirostat_tau). `stop_ids`:
    None = the tokenizer's. `seed` decides the draws of one prompt whatever else is in the batch. By default
    every other strategy is off. `max_tokens` 0: only the prompt is read, for its log-probabilities.
    """

    max_tokens: int = 200
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    stop_ids: tuple[int, ...] | None = None
    seed: int = 0
    min_p: float = 0.0
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    mirostat_tau: float = 0.0
    """Bits of surprise to keep to; 0 = no Mirostat."""
    mirostat_eta: float = 0.1
    repetition_penalty: float = 1.0
    """Of the prompt's tokens too, as `no_repeat_ngram`; the next two are of generated tokens only."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram: int = 0
    min_tokens: int = 0
    """No stop token, and no end by `stop`, before so many."""
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()
    banned: tuple[int, ...] = ()
    stop: str | Sequence[str] = ()
    """Texts that end the answer and are no part of it."""
    shows_special: bool = False
    """Whether special tokens are written into the text by their names; those that end it never are."""
    logprobs: int = 0
    """How many alternatives to report beside each token."""
    prompt_logprobs: int | None = None
    """As `logprobs`, of the prompt's tokens; None = not computed."""
    scorer: Scorer | None = None
    scorer_weight: float = 1.0
    scorer_candidates: int = 50
    """See `strategies.guide`; 0 = all tokens."""
    schema: Mapping[str, Any] | str | None = None
    """A JSON schema, or its text."""
    regex: str | None = None

    def __post_init__(self) -> None:
        self._normalise()
        at_least_0 = (0, math.inf, "at least 0")
        ranges = {
            "max_tokens": at_least_0,
            "temperature": at_least_0,
            "top_k": at_least_0,
            "top_p": (5e-324, 1, "above 0 and at most 1"),
            "min_p": (0, 1, "0 to 1"),
            "typical_p": (5e-324, 1, "above 0 and at most 1"),
            "epsilon_cutoff": (0, 1 - 2**-53, "at least 0 and below 1"),
            "eta_cutoff": (0, 1 - 2**-53, "at least 0 and below 1"),
            "mirostat_tau": at_least_0,
            "mirostat_eta": at_least_0,
            "repetition_penalty": (5e-324, math.inf, "above 0"),
            "presence_penalty": (-math.inf, math.inf, "a number"),
            "frequency_penalty": (-math.inf, math.inf, "a number"),
            "no_repeat_ngram": at_least_0,
            "min_tokens": (0, self.max_tokens, f"0 to max_tokens, {self.max_tokens}"),
            "logprobs": at_least_0,
            "prompt_logprobs": at_least_0,
            "scorer_weight": (-math.inf, math.inf, "a number"),
            "scorer_candidates": at_least_0,
        }
        for name, (low, high, wanted) in ranges.items():
            value = getattr(self, name)
            if value is not None and not (low <= value <= high and math.isfinite(value)):
                raise UserError(f"{name} is {value}", f"give {wanted}")
        if wrong := [bias for bias in dict(self.logit_bias).values() if math.isnan(bias) or bias == math.inf]:
            raise UserError(f"logit_bias has the value {wrong[0]}", "give a number, or minus infinity")
        if "" in self.stop:
            raise UserError("stop has an empty text", "remove it")
        if self.schema is not None and self.regex is not None:
            raise UserError("schema and regex are both given", "give one of them")
        _ = self.grammar  # so that an invalid one is refused at once

    def _normalise(self) -> None:
        """One form of what may be given in several, so that params can be compared."""
        bias = self.logit_bias
        pairs = bias.items() if isinstance(bias, Mapping) else bias
        forms: dict[str, Any] = {
            "logit_bias": tuple((int(token), float(value)) for token, value in pairs),
            "banned": tuple(self.banned),
            "stop": (self.stop,) if isinstance(self.stop, str) else tuple(self.stop),
            "stop_ids": None if self.stop_ids is None else tuple(self.stop_ids),
            "schema": json.dumps(self.schema) if isinstance(self.schema, Mapping) else self.schema,
        }
        for name, value in forms.items():
            object.__setattr__(self, name, value)

    @cached_property
    def grammar(self) -> str | None:
        """What the answer must follow, compiled."""
        if self.schema is not None:
            return constraints.compile_schema(str(self.schema))
        return None if self.regex is None else constraints.compile_regex(self.regex)

    @cached_property
    def steps(self) -> tuple[Any, ...]:
        """What `process` reads: rows for which it is equal are processed together."""
        return tuple(getattr(self, field.name) for field in fields(self) if field.name not in _PER_ROW)


_PER_ROW = {
    "max_tokens",
    "seed",
    "stop_ids",
    "stop",
    "shows_special",
    "logprobs",
    "prompt_logprobs",
    "schema",
    "regex",
}


class Row:
    """One request while it is answered: its tokens, its draws, what its strategies remember."""

    def __init__(self, prompt: Sequence[int], params: SamplingParams, tokenizer: Tokenizer) -> None:
        """Raises UserError where no token of the vocabulary can begin what the constraint wants."""
        self.params = params
        self.ids = array("q", prompt)
        """The prompt's tokens, then the generated ones."""
        self.n_prompt = len(prompt)
        self.stop_ids = tuple(tokenizer.stop_ids) if params.stop_ids is None else params.stop_ids
        self.generator = _generator(params.seed, prompt)
        self.mu = 2 * params.mirostat_tau
        """Mirostat's: the most surprise, in bits, that the next token may have."""
        grammar = params.grammar
        self.matcher = None if grammar is None else constraints.Matcher(tokenizer, grammar)

    @property
    def generated(self) -> list[int]:
        return self.ids[self.n_prompt :].tolist()

    @property
    def n_generated(self) -> int:
        return len(self.ids) - self.n_prompt

    @property
    def complete(self) -> bool:
        """Whether nothing may follow: what the constraint wants is whole, and there is no stop token."""
        return bool(self.matcher and not self.stop_ids and self.matcher.complete)

    def accept(self, token: int) -> None:
        """Goes on by a token."""
        self.ids.append(token)
        if self.matcher and token not in self.stop_ids:
            self.matcher.accept(token)

    def rewind(self, n: int) -> None:
        """Takes back the last n tokens, but neither their draws nor Mirostat's steps."""
        kept = len(self.ids) - n
        if self.matcher:
            self.matcher.rewind(sum(token not in self.stop_ids for token in self.ids[kept:]))
        del self.ids[kept:]

    def history(self) -> Tensor:
        """(T,) prompt and answer."""
        return torch.from_numpy(np.array(self.ids, dtype=np.int64))


class RowError(UserError):
    """What is wrong with one row of a batch; the others can go on without it."""

    def __init__(self, row: Row, message: str, remedy: str) -> None:
        super().__init__(message, remedy)
        self.row = row


def _generator(seed: int, ids: Sequence[int]) -> torch.Generator:
    """Decided by seed and prompt: the draws don't depend on the rest of the batch, and differ by prompt."""
    mixed = hashlib.blake2b(repr((seed, list(ids))).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(mixed, "little") >> 1)


def process(logits: Tensor, rows: Sequence[Row], params: Sequence[SamplingParams]) -> Tensor:
    """(B, V) float32 → (B, V): of each row the logits of the distribution that its token is taken from.

    The input is left as it is, and may be the output. Raises RowError where a row has no token left.
    """
    if all(own is params[0] for own in params):
        return _process(logits, rows, params[0])
    groups: dict[Any, list[int]] = {}
    for index, own in enumerate(params):
        groups.setdefault(own.steps, []).append(index)
    if len(groups) == 1:
        return _process(logits, rows, params[0])
    result = torch.empty_like(logits)
    for members in groups.values():
        group = [rows[index] for index in members]
        result[members] = _process(logits[members], group, params[members[0]])
    return result


def _process(logits: Tensor, rows: Sequence[Row], params: SamplingParams) -> Tensor:
    found = _rule_out(_penalise(logits, rows, params), rows, params)
    if params.scorer is not None:
        histories = [row.ids.tolist() for row in rows]
        weight, candidates = params.scorer_weight, params.scorer_candidates
        found = strategies.guide(found, histories, params.scorer, weight, candidates)
        _check(found, rows)
    return found if params.temperature == 0 else _shape(found, rows, params)


def _penalise(logits: Tensor, rows: Sequence[Row], params: SamplingParams) -> Tensor:
    if params.logit_bias:
        logits = strategies.logit_bias(logits, dict(params.logit_bias))
    if params.repetition_penalty != 1:
        histories = [row.history() for row in rows]
        logits = strategies.repetition_penalty(logits, histories, params.repetition_penalty)
    if params.presence_penalty or params.frequency_penalty:
        generated = [row.history()[row.n_prompt :] for row in rows]
        if params.presence_penalty:
            logits = strategies.presence_penalty(logits, generated, params.presence_penalty)
        if params.frequency_penalty:
            logits = strategies.frequency_penalty(logits, generated, params.frequency_penalty)
    return logits


def _rule_out(logits: Tensor, rows: Sequence[Row], params: SamplingParams) -> Tensor:
    """All that can leave nothing to choose."""
    found = logits
    if params.no_repeat_ngram:
        found = strategies.no_repeat_ngram(found, [row.history() for row in rows], params.no_repeat_ngram)
    if params.banned:
        found = strategies.ban(found, params.banned)
    if params.min_tokens:
        lengths, stops = [row.n_generated for row in rows], [row.stop_ids for row in rows]
        found = strategies.min_length(found, lengths, params.min_tokens, stops)
    if any(row.matcher for row in rows):
        found = strategies.allow(found, torch.stack([_allowed(row, logits.shape[-1]) for row in rows]))
    if found is not logits or params.logit_bias:
        _check(found, rows)
    return found


def _allowed(row: Row, size: int) -> Tensor:
    if row.matcher is None:
        return torch.ones(size, dtype=torch.bool)
    try:
        return row.matcher.allowed(size, row.stop_ids)
    except UserError as error:
        raise RowError(row, error.message, error.remedy) from None


def _check(logits: Tensor, rows: Sequence[Row]) -> None:
    empty = (logits.amax(dim=-1) == -math.inf).nonzero()[:, 0].tolist()
    if empty:
        raise RowError(rows[empty[0]], "every next token is ruled out", "ban fewer, or allow an end")


def _shape(logits: Tensor, rows: Sequence[Row], params: SamplingParams) -> Tensor:
    """What is drawn from."""
    if params.temperature != 1:
        logits = strategies.temperature(logits, params.temperature)
    if params.top_k:
        logits = strategies.top_k(logits, params.top_k)
    if params.top_p < 1:
        logits = strategies.top_p(logits, params.top_p)
    if params.min_p:
        logits = strategies.min_p(logits, params.min_p)
    if params.typical_p < 1:
        logits = strategies.typical(logits, params.typical_p)
    if params.epsilon_cutoff:
        logits = strategies.epsilon_cutoff(logits, params.epsilon_cutoff)
    if params.eta_cutoff:
        logits = strategies.eta_cutoff(logits, params.eta_cutoff)
    if params.mirostat_tau:
        mu = torch.tensor([[row.mu] for row in rows], dtype=logits.dtype, device=logits.device)
        logits = strategies.mirostat(logits, mu)
    return logits


def choose(processed: Tensor, rows: Sequence[Row], params: Sequence[SamplingParams]) -> Tensor:
    """(B,) the next token of each row: the highest if greedy, else drawn; moves on the rows' Mirostat.

    One uniform number of the row's own generator goes through the inverse of the row's distribution, so that
    a draw depends on nothing else in the batch.
    """
    drawn = [index for index, own in enumerate(params) if own.temperature > 0]
    if len(drawn) < len(rows):
        tokens = _highest_token(processed)
    else:
        tokens = torch.empty(len(rows), dtype=torch.long, device=processed.device)
    if drawn:
        draws = torch.cat(
            [torch.rand(1, generator=rows[index].generator, dtype=torch.float64) for index in drawn]
        )
        own = processed if len(drawn) == len(rows) else processed[drawn]
        tokens[drawn] = invert(own.softmax(dim=-1), draws.to(processed.device))
    for index, own_params in enumerate(params):
        if own_params.temperature > 0 and own_params.mirostat_tau:
            row, logprob = rows[index], float(processed[index, tokens[index]])
            row.mu = strategies.mirostat_mu(row.mu, logprob, own_params.mirostat_tau, own_params.mirostat_eta)
    return tokens


def _highest_token(logits: Tensor) -> Tensor:
    """argmax, on a CPU by numpy: ten times as fast."""
    if logits.device.type != "cpu":
        return logits.argmax(dim=-1)
    return torch.from_numpy(logits.numpy().argmax(axis=-1))


_BLOCK = 256


def invert(probabilities: Tensor, draws: Tensor) -> Tensor:
    """(B,) the token in which the sum of probabilities (B, V) passes draws (B,) in [0, 1) times the whole.

    First the block of tokens, then the token in it: whole sums in float64 would take longer than the softmax.
    """
    padding = -probabilities.shape[-1] % _BLOCK
    padded = torch.nn.functional.pad(probabilities, (0, padding)) if padding else probabilities
    blocks = padded.view(len(padded), -1, _BLOCK)
    sums = blocks.sum(dim=-1, dtype=torch.float64)
    block, rest = _pass(sums, draws * sums.sum(dim=-1))
    inside = blocks[torch.arange(len(blocks), device=block.device), block].double()
    token, _ = _pass(inside, rest)
    return block * _BLOCK + token


def _pass(weights: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) where the sum of weights (B, N) passes the target, and what the target leaves before it.

    Never a weight of 0; the last other one where rounding leaves the target beyond the whole sum.
    """
    sums = weights.cumsum(dim=-1)
    place = torch.searchsorted(sums, target[:, None], right=True)
    last = ((weights > 0) * torch.arange(weights.shape[-1], device=weights.device)).amax(dim=-1, keepdim=True)
    place = place.minimum(last)
    before = sums.gather(-1, place) - weights.gather(-1, place)
    return place[:, 0], target - before[:, 0]
