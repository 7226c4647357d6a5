"""Decoding strategies of one step: pure functions on logits.

Shapes: logits (B, V) float32 → logits (B, V), what is ruled out at minus infinity. Numbers hold for all rows.
`histories`: of each row its tokens so far as a (T,) tensor of ids below V, rows of any lengths. Each equals
the processor of transformers with its name, except where its docstring says otherwise. What is ruled out
already stays so.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from danlu.core.errors import UserError

Scorer = Callable[[list[int], Tensor, Tensor], "Tensor | Sequence[float]"]
"""(ids so far, (K,) candidate tokens, (K,) their log-probabilities) → K scores, higher is better."""

_FEW = 4096
"""A nucleus is looked for among so many tokens before all are sorted."""


# Penalties: what the text so far makes less likely.


def logit_bias(logits: Tensor, bias: Mapping[int, float]) -> Tensor:
    """Adds a number to the logits of some tokens. Raises UserError for a token that the model hasn't."""
    ids = _ids(bias, logits, "logit_bias")
    values = torch.tensor(list(bias.values()), dtype=logits.dtype, device=logits.device)
    return logits.index_add(-1, ids, values.expand(len(logits), -1))


def repetition_penalty(logits: Tensor, histories: Sequence[Tensor], penalty: float) -> Tensor:
    """Divides the logits of tokens that were there by `penalty` (CTRL: Keskar et al. 2019).

    Negative ones are multiplied; the paper divides them too, which makes such tokens likelier.
    """
    places = _places(histories, logits)
    values = logits.flatten()[places]
    values = torch.where(values < 0, values * penalty, values / penalty)
    return logits.flatten().scatter(0, places, values).view_as(logits)


def presence_penalty(logits: Tensor, generated: Sequence[Tensor], penalty: float) -> Tensor:
    """Subtracts `penalty` from tokens that were generated (OpenAI's API); a prompt doesn't count."""
    places = _places(generated, logits).unique()
    return logits.flatten().index_add(0, places, logits.new_full(places.shape, -penalty)).view_as(logits)


def frequency_penalty(logits: Tensor, generated: Sequence[Tensor], penalty: float) -> Tensor:
    """Subtracts `penalty` from a token for each time that it was generated (OpenAI's API)."""
    places, counts = _places(generated, logits).unique(return_counts=True)
    return logits.flatten().index_add(0, places, counts.to(logits.dtype) * -penalty).view_as(logits)


# Bans: what must not come next.


def no_repeat_ngram(logits: Tensor, histories: Sequence[Tensor], n: int) -> Tensor:
    """Rules out the tokens that would repeat n tokens in a row (Paulus, Xiong, Socher 2018)."""
    found = []
    for row, ids in enumerate(histories):
        if len(ids) >= n:
            windows = ids.unfold(0, n, 1)
            repeats = (windows[:, :-1] == ids[len(ids) + 1 - n :]).all(dim=-1)
            found.append(windows[repeats, -1] + row * logits.shape[-1])
    return _rule_out(logits, torch.cat(found)) if found else logits


def ban(logits: Tensor, ids: Sequence[int]) -> Tensor:
    """Rules out tokens (transformers: SuppressTokens). Raises UserError for one that the model hasn't."""
    return logits.index_fill(-1, _ids(ids, logits, "banned"), -math.inf)


def min_length(logits: Tensor, lengths: Sequence[int], n: int, stop_ids: Sequence[Sequence[int]]) -> Tensor:
    """Rules out its stop tokens where a row has fewer than n generated ones (Roller et al. 2021, BlenderBot).

    As transformers' MinNewTokensLength: the prompt doesn't count.
    """
    size = logits.shape[-1]
    places = [
        row * size + token
        for row, (length, stops) in enumerate(zip(lengths, stop_ids, strict=True))
        for token in stops
        if length < n and token < size
    ]
    return _rule_out(logits, torch.tensor(places)) if places else logits


def allow(logits: Tensor, allowed: Tensor) -> Tensor:
    """Rules out all but the tokens that `allowed` (B, V) bool names: how a constraint is applied."""
    return _keep(logits, allowed.to(logits), logits.new_ones(1))


# Guidance.


def guide(
    logits: Tensor, histories: Sequence[Sequence[int]], scorer: Scorer, weight: float, candidates: int
) -> Tensor:
    """Adds weight × score to log-probabilities: a classifier has its say in every token (Arora et al. 2022).

    DIRECTOR's p(token) · p(class | token)^weight, where the scorer gives log p(class | token); any other will
    do. It is asked about the `candidates` most probable tokens (0 = all), and the others are ruled out:
    without a score they can't be compared. Not in transformers. Raises UserError for NaN, or too few scores.
    """
    logprobs = logits.log_softmax(dim=-1)
    count = min(candidates or logits.shape[-1], logits.shape[-1])
    result = torch.full_like(logits, -math.inf)
    for row, history in enumerate(histories):
        values, tokens = logprobs[row].topk(count)
        possible = values > -math.inf
        values, tokens = values[possible], tokens[possible]
        scores = torch.as_tensor(scorer(list(history), tokens, values), dtype=logits.dtype)
        if scores.shape != tokens.shape or bool(scores.isnan().any()):
            raise UserError(
                f"the scorer gave scores of shape {tuple(scores.shape)}"
                + (" with NaN" if bool(scores.isnan().any()) else "")
                + f" for {len(tokens)} tokens",
                "one number for each token",
            )
        result[row, tokens] = values + weight * scores.to(logits.device)
    return result


# Sampling: a temperature, and what is not drawn from. At least one token always stays.


def temperature(logits: Tensor, t: float) -> Tensor:
    """Divides logits by t > 0. Near 0, where transformers overflows, the highest logit is 0 first."""
    if t < 1e-20:
        return (logits - logits.amax(dim=-1, keepdim=True)) / max(t, 1e-30)
    return logits / t


def top_k(logits: Tensor, k: int) -> Tensor:
    """Keeps the k highest (Fan, Lewis, Dauphin 2018); what ties with the k-th stays. k = 0 keeps all."""
    if not 0 < k < logits.shape[-1]:
        return logits
    return _keep(logits, logits, _highest(logits, k)[:, -1:])


def top_p(logits: Tensor, p: float) -> Tensor:
    """Nucleus (Holtzman et al. 2020): keeps the fewest tokens whose probabilities sum to at least p.

    Of tokens that tie for the last place those with the lower ids stay; transformers leaves it to its sort.
    """
    if p >= 1:
        return logits
    top = logits.amax(dim=-1, keepdim=True)
    of_top = logits.softmax(dim=-1).amax(dim=-1, keepdim=True)
    size, last = logits.shape[-1], logits
    for width in (min(_FEW, size), size):
        values = _highest(logits, width)
        probabilities = ((values - top).exp() * of_top).double()
        sums = probabilities.cumsum(dim=-1)
        counts = (sums - probabilities < p).sum(dim=-1, keepdim=True).clamp_(min=1)
        last = values.gather(-1, counts - 1)
        if width == size or bool(((sums[:, -1:] >= p) & (values[:, -1:] < last)).all()):
            break
    kept = _keep(logits, logits, last)
    surplus = ((values >= last).sum(dim=-1, keepdim=True) - counts)[:, 0]
    for row in surplus.nonzero()[:, 0].tolist():
        ties = (logits[row] == last[row]).nonzero()[:, 0]
        kept[row, ties[len(ties) - int(surplus[row]) :]] = -math.inf
    return kept


def min_p(logits: Tensor, p: float) -> Tensor:
    """Keeps tokens at least p times as probable as the most probable (Nguyen et al. 2024)."""
    return _keep(logits, logits, logits.amax(dim=-1, keepdim=True) + math.log(p)) if p > 0 else logits


def typical(logits: Tensor, mass: float) -> Tensor:
    """Locally typical sampling (Meister, Pimentel, Wiher, Cotterell 2023).

    Keeps the fewest tokens that hold `mass`, those first whose surprise −log p is nearest to the entropy.
    """
    if mass >= 1:
        return logits
    logprobs = logits.log_softmax(dim=-1)
    distances = (logprobs + _entropy(logprobs)).abs()
    order = _ascending(distances)
    sums = logprobs.gather(-1, order).exp_().double().cumsum(dim=-1)
    count = (sums < mass).sum(dim=-1, keepdim=True).clamp_(max=logits.shape[-1] - 1)
    return _keep(logits, -distances, -distances.gather(-1, order.gather(-1, count)))


def epsilon_cutoff(logits: Tensor, epsilon: float) -> Tensor:
    """Keeps tokens of a probability of at least epsilon, else the most probable (Hewitt et al. 2022)."""
    logprobs = logits.log_softmax(dim=-1)
    return _keep(logits, logprobs, logprobs.amax(dim=-1, keepdim=True).clamp_(max=math.log(epsilon)))


def eta_cutoff(logits: Tensor, epsilon: float) -> Tensor:
    """Eta sampling (Hewitt, Manning, Liang 2022): a cutoff that falls where the entropy H is high.

    Keeps tokens of a probability of at least min(epsilon, √epsilon · exp(−H)), else the most probable.
    """
    logprobs = logits.log_softmax(dim=-1)
    cutoff = (math.log(epsilon) / 2 - _entropy(logprobs)).clamp_(max=math.log(epsilon))
    return _keep(logits, logprobs, torch.minimum(cutoff, logprobs.amax(dim=-1, keepdim=True)))


def mirostat(logits: Tensor, mu: Tensor) -> Tensor:
    """Mirostat 2.0 (Basu et al. 2021): keeps tokens of a surprise up to mu bits, else the most probable.

    mu: (B, 1). What stays comes back as its log-probability before the cut, which `mirostat_mu` needs.
    Not in transformers.
    """
    logprobs = logits.log_softmax(dim=-1)
    cutoff = torch.minimum(-mu * math.log(2), logprobs.amax(dim=-1, keepdim=True))
    return _keep(logprobs, logprobs, cutoff)


def mirostat_mu(mu: float, logprob: float, tau: float, eta: float) -> float:
    """mu for the next token, given the one drawn: a step of rate eta towards a surprise of tau bits.

    mu begins at 2 tau. The surprise is the model's, before the cut; llama.cpp's is after it.
    """
    return mu - eta * (-logprob / math.log(2) - tau)


# The parts that they share.


def _keep(logits: Tensor, keys: Tensor, least: Tensor) -> Tensor:
    """Rules out tokens whose key is below `least` (B, 1).

    By arithmetic that gives 0 or infinity: on a CPU four times as fast as masked_fill.
    """
    return logits - keys.clone().ge_(least).reciprocal_().sub_(1)


def _highest(logits: Tensor, k: int) -> Tensor:
    """(B, k) the highest, from high to low. On a CPU by numpy: torch's sort takes twenty times as long."""
    if logits.device.type != "cpu":
        return logits.topk(k, dim=-1).values
    values = logits.numpy()
    size = values.shape[-1]
    values = np.partition(values, size - k, axis=-1)[:, size - k :] if k < size else values
    return torch.from_numpy(np.sort(values, axis=-1)).flip(-1)


def _ascending(keys: Tensor) -> Tensor:
    """(B, V) the order of keys ≥ 0, equal ones by id."""
    if keys.device.type != "cpu":
        return keys.sort(dim=-1, stable=True).indices
    # Bits of floats ≥ 0 order like the floats, so that key and id make one integer; numpy sorts those fast.
    packed = (keys.view(torch.int32).long() << 32) | torch.arange(keys.shape[-1])
    return torch.from_numpy(np.sort(packed.numpy(), axis=-1)) & 0xFFFFFFFF


def _entropy(logprobs: Tensor) -> Tensor:
    """(B, 1) in nats."""
    return -(logprobs.exp() * logprobs).nansum(dim=-1, keepdim=True)


def _places(histories: Sequence[Tensor], logits: Tensor) -> Tensor:
    """Where the tokens of the histories stand in the flattened logits."""
    found = [ids + row * logits.shape[-1] for row, ids in enumerate(histories)]
    return torch.cat(found).to(logits.device)


def _rule_out(logits: Tensor, places: Tensor) -> Tensor:
    return logits.flatten().index_fill(0, places.to(logits.device), -math.inf).view_as(logits)


def _ids(ids: Sequence[int] | Mapping[int, float], logits: Tensor, name: str) -> Tensor:
    wrong = next((token for token in ids if not 0 <= token < logits.shape[-1]), None)
    if wrong is not None:
        raise UserError(
            f"{name} names the token {wrong}, the model has {logits.shape[-1]}", "give ids of its tokenizer"
        )
    return torch.tensor(list(ids), dtype=torch.long, device=logits.device)
