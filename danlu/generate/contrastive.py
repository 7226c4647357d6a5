"""Contrastive search (Su 2022) and contrastive decoding (Li 2023): two methods that share only the word."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from danlu.core.errors import UserError
from danlu.generate.beam import Beam, BeamParams, best_of, split
from danlu.generate.program import Answer, Branches, Feed, Process, Program, Scope, Sequences


def degeneration_penalty(hidden: Tensor, before: Tensor) -> Tensor:
    """(k,) the largest cosine of each vector of `hidden` (k, D) with one of `before` (T, D)."""
    return (F.normalize(hidden.float(), dim=-1) @ F.normalize(before.float(), dim=-1).T).amax(dim=-1)


def contrastive_search(
    sequences: Sequences,
    ids: Sequence[int],
    k: int = 4,
    alpha: float = 0.6,
    max_tokens: int = 200,
    stop_ids: tuple[int, ...] = (),
    process: Process | None = None,
) -> Program[Answer]:
    """Of the k most probable tokens, that which is probable and unlike what came before (Su 2022).

    Takes the token v with the highest (1 - alpha) p(v) - alpha max_j cos(h_v, h_j), where h are the vectors
    that the output matrix is multiplied with, j runs over prompt and answer. Each step reads k tokens, so
    that the last token needs a place in the context too. The answer's `score` is the mean of its tokens'.
    """
    if k < 1:
        raise UserError(f"k is {k}", "give at least 1")
    if not 0 <= alpha <= 1:
        raise UserError(f"alpha is {alpha}", "give 0 to 1")
    if max_tokens < 1:
        raise UserError(f"max_tokens is {max_tokens}", "give at least 1")
    with Scope(sequences) as held:
        branches = Branches(held)
        output = yield [Feed(branches.rows[0], ids, every=True)]
        before, logits = output.hidden, output.logits[-1:]
        found, logprobs, scores = list[int](), list[float](), list[float]()
        while True:
            own = logits.log_softmax(dim=-1)
            processed = logits if process is None else process(logits, [[*ids, *found]])
            probabilities = processed.softmax(dim=-1)[0]
            most = min(k, int((probabilities > 0).sum()))
            p, tokens = probabilities.topk(most)
            output = yield from branches.grow([0] * most, tokens.tolist())
            values = (1 - alpha) * p - alpha * degeneration_penalty(output.hidden, before)
            best = int(values.argmax())
            found.append(int(tokens[best]))
            logprobs.append(float(own[0, found[-1]]))
            scores.append(float(values[best]))
            stopped = found[-1] in stop_ids
            if stopped or len(found) == max_tokens:
                return Answer(found, logprobs, stopped, sum(scores) / len(scores))
            branches.fork([best])
            before = torch.cat([before, output.hidden[[best]]])
            logits = output.logits[[best]]


def contrast(expert: Tensor, amateur: Tensor, alpha: float, temperature: float) -> Tensor:
    """(n, V) log p_expert - log p_amateur of logits; minus infinity where p_expert < alpha · its highest.

    `temperature` divides the amateur's logits. Li 2023's objective with its plausibility constraint.
    """
    ours = expert.log_softmax(dim=-1)
    theirs = (amateur / temperature).log_softmax(dim=-1)
    implausible = ours < ours.amax(dim=-1, keepdim=True) + math.log(alpha)
    return (ours - theirs).masked_fill(implausible, -math.inf)


def contrastive_decoding(
    sequences: Sequences,
    ids: Sequence[int],
    params: BeamParams,
    alpha: float = 0.1,
    temperature: float = 1.0,
    amateur_ids: Sequence[int] | None = None,
    process: Process | None = None,
) -> Program[list[Answer]]:
    """Beam search for what an expert finds much more probable than an amateur (Li 2023).

    The expert is model 0, the amateur model 1, with the same vocabulary. `amateur_ids` is its prompt, if
    it isn't to see the whole of `ids`. An answer is worth the sum of `contrast` over its tokens, divided by
    its length as in beam search; its `logprobs` are the expert's.
    """
    if not 0 < alpha <= 1:
        raise UserError(f"alpha is {alpha}", "give more than 0 and at most 1")
    if not temperature > 0:
        raise UserError(f"the amateur's temperature is {temperature}", "give more than 0")
    with Scope(sequences) as held:
        beam, expert, amateur = Beam(params), Branches(held), Branches(held, model=1)
        first = yield from expert.start(ids)
        second = yield from amateur.start(ids if amateur_ids is None else amateur_ids)
        check_vocabularies(first.logits, second.logits, "amateur")
        while True:
            logits = first.logits
            if process is not None:
                logits = process(logits, [[*ids, *hypothesis.ids] for hypothesis in beam.running])
            scores = contrast(logits, second.logits, alpha, temperature).cpu() + beam.totals
            ending, growing = split(beam, best_of(scores, beam.n_candidates))
            rows, tokens = beam.step(ending, growing, first.logits.log_softmax(dim=-1))
            if beam.done:
                return beam.answers()
            first = yield from expert.grow(rows, tokens)
            second = yield from amateur.grow(rows, tokens)


def check_vocabularies(ours: Tensor, theirs: Tensor, name: str) -> None:
    """Raises UserError if the logits of two models are of different vocabularies."""
    if ours.shape[-1] != theirs.shape[-1]:
        raise UserError(
            f"the {name} model's vocabulary has {theirs.shape[-1]} entries, the model's {ours.shape[-1]}",
            "take two models with the same tokenizer",
        )
