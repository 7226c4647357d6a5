"""Each strategy against transformers' processor, over random logits and histories with many ties."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import generation as theirs

from danlu.core.errors import UserError
from danlu.generate import strategies as ours

torch.set_num_threads(1)


@st.composite
def logits(draw: st.DrawFn, rows: int | None = None) -> Tensor:
    """(rows, vocabulary): rounded or not, so that many are equal; some ruled out, or all but one."""
    shape = rows or draw(st.integers(1, 4)), draw(st.integers(2, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    values = torch.randn(shape, generator=generator) * draw(st.sampled_from([0.1, 1.0, 10.0]))
    values = values.round() if draw(st.booleans()) else values
    banned = draw(st.sampled_from(["none", "some", "all but one"]))
    if banned == "some":
        values[:, 1::3] = -math.inf
    elif banned == "all but one":
        values[:, 1:] = -math.inf
    return values


@st.composite
def texts(draw: st.DrawFn, longest: int = 30) -> tuple[Tensor, Tensor]:
    """Logits, and histories (rows, T) of few different tokens, so that n-grams repeat."""
    values = draw(logits())
    length = draw(st.integers(1, longest))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    return values, torch.randint(0, min(4, values.shape[1]), (len(values), length), generator=generator)


def same(found: Tensor, expected: Tensor) -> None:
    assert torch.equal(found == -math.inf, expected == -math.inf)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)


@given(logits(), st.floats(1e-6, 1e6))
def test_temperature(values: Tensor, t: float) -> None:
    same(ours.temperature(values, t), theirs.TemperatureLogitsWarper(t)(None, values))


@given(logits(), st.floats(1e-320, 1e-20))
def test_a_temperature_near_zero_leaves_the_most_probable(values: Tensor, t: float) -> None:
    probabilities = ours.temperature(values, t).softmax(-1)
    best = values == values.amax(-1, keepdim=True)
    torch.testing.assert_close(probabilities, best / best.sum(-1, keepdim=True))


@given(logits(), st.integers(1, 50))
def test_top_k(values: Tensor, k: int) -> None:
    same(ours.top_k(values, k), theirs.TopKLogitsWarper(k)(None, values))
    assert torch.equal(ours.top_k(values, 0), values)


def nucleus(row: Tensor, p: float) -> set[int]:
    """By definition: from the most probable on, lower ids first, until they hold p."""
    kept: set[int] = set()
    probabilities = row.double().softmax(-1)
    for token in sorted(range(len(row)), key=lambda token: (-float(row[token]), token)):
        if float(probabilities[list(kept)].sum()) >= p:
            break
        kept.add(token)
    return kept


def assume_clear(sums: Tensor, bound: float) -> None:
    """A sum that rounding moves across the bound may fall on either side of it."""
    assume(float((sums - bound).abs().min()) > 1e-5)


@given(logits(), st.floats(0.001, 0.999), st.integers(1, 40))
@settings(max_examples=300)
def test_top_p(values: Tensor, p: float, few: int) -> None:
    """Which of several equal tokens transformers keeps is its sort's affair, so there logits are compared."""
    assume_clear(values.double().softmax(-1).sort(descending=True).values.cumsum(-1), p)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ours, "_FEW", few)
        found, other = ours.top_p(values, p), theirs.TopPLogitsWarper(p)(None, values)
    assert torch.equal(found.sort().values, other.sort().values)
    for row, kept in zip(values, found, strict=True):
        assert set((kept > -math.inf).nonzero()[:, 0].tolist()) == nucleus(row, p)
    assert torch.equal(found[found > -math.inf], values[found > -math.inf])
    assert torch.equal(ours.top_p(values, 1.0), values)


@given(logits(), st.floats(0.001, 1))
def test_min_p(values: Tensor, p: float) -> None:
    ratios = values.double().softmax(-1)
    assume_clear(ratios / ratios.amax(-1, keepdim=True) * (1 - 1e-9), p)
    same(ours.min_p(values, p), theirs.MinPLogitsWarper(p)(None, values))


@given(logits(), st.floats(0.01, 0.99))
@settings(max_examples=300)
def test_typical(values: Tensor, mass: float) -> None:
    logprobs = values.double().log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).nansum(-1, keepdim=True)
    distances, order = (logprobs + entropy).abs().sort(stable=True)
    assume_clear(logprobs.exp().gather(-1, order).cumsum(-1), mass)
    gaps = distances.diff()[distances[:, 1:] < math.inf]
    assume(bool(((gaps > 1e-4) | (gaps == 0)).all()))  # else rounding decides what is a tie
    same(ours.typical(values, mass), theirs.TypicalLogitsWarper(mass)(None, values))


@given(logits(), st.floats(1e-4, 0.9))
def test_epsilon_cutoff(values: Tensor, epsilon: float) -> None:
    assume_clear(values.double().softmax(-1).log(), math.log(epsilon))
    same(ours.epsilon_cutoff(values, epsilon), theirs.EpsilonLogitsWarper(epsilon)(None, values))


@given(logits(), st.floats(1e-4, 0.9))
def test_eta_cutoff(values: Tensor, epsilon: float) -> None:
    logprobs = values.double().log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).nansum(-1, keepdim=True)
    assume_clear(logprobs, math.log(epsilon))
    assume_clear(logprobs - math.log(epsilon) / 2 + entropy, 0)
    same(ours.eta_cutoff(values, epsilon), theirs.EtaLogitsWarper(epsilon)(None, values))


@given(texts(), st.floats(0.1, 10))
def test_repetition_penalty(text: tuple[Tensor, Tensor], penalty: float) -> None:
    values, ids = text
    expected = theirs.RepetitionPenaltyLogitsProcessor(penalty)(ids, values)
    same(ours.repetition_penalty(values, list(ids), penalty), expected)


@given(texts(), st.integers(1, 6))
def test_no_repeat_ngram(text: tuple[Tensor, Tensor], n: int) -> None:
    values, ids = text
    same(ours.no_repeat_ngram(values, list(ids), n), theirs.NoRepeatNGramLogitsProcessor(n)(ids, values))


@given(texts(), st.integers(0, 12), st.integers(0, 30))
def test_min_length(text: tuple[Tensor, Tensor], n: int, prompt: int) -> None:
    values, ids = text
    assume(prompt <= ids.shape[1])
    stops, lengths = [1, values.shape[1] - 1], [ids.shape[1] - prompt] * len(ids)
    expected = theirs.MinNewTokensLengthLogitsProcessor(prompt, n, stops)(ids, values)
    same(ours.min_length(values, lengths, n, [stops] * len(ids)), expected)


@given(logits(), st.dictionaries(st.integers(0, 1), st.floats(-100, 100), min_size=1))
def test_logit_bias(values: Tensor, bias: dict[int, float]) -> None:
    processor = theirs.SequenceBiasLogitsProcessor({(token,): value for token, value in bias.items()})
    same(ours.logit_bias(values, bias), processor(torch.zeros(len(values), 1), values))


@given(logits(), st.sets(st.integers(0, 1), min_size=1))
def test_ban(values: Tensor, ids: set[int]) -> None:
    same(ours.ban(values, list(ids)), theirs.SuppressTokensLogitsProcessor(list(ids))(None, values))


@given(texts(), st.floats(-2, 2), st.floats(-2, 2))
def test_presence_and_frequency_are_openais_formula(
    text: tuple[Tensor, Tensor], frequency: float, presence: float
) -> None:
    """mu[j] - c[j] * alpha_frequency - float(c[j] > 0) * alpha_presence, of its documentation."""
    values, ids = text
    expected = values.clone()
    for row, own in enumerate(ids.tolist()):
        for j in range(values.shape[1]):
            count = own.count(j)
            expected[row, j] -= count * frequency + float(count > 0) * presence
    found = ours.presence_penalty(ours.frequency_penalty(values, list(ids), frequency), list(ids), presence)
    same(found, expected)


RAGGED = [[3, 1, 3, 1], [2], [], [1, 1, 1, 1, 1, 1, 1]]


@pytest.mark.parametrize(
    "name", ["repetition_penalty", "presence_penalty", "frequency_penalty", "no_repeat_ngram"]
)
def test_rows_of_any_lengths_are_the_rows_alone(name: str) -> None:
    values = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
    histories = [torch.tensor(ids, dtype=torch.long) for ids in RAGGED]
    strategy = getattr(ours, name)
    together = strategy(values, histories, 2)
    assert not torch.equal(together, values)
    for row, history in enumerate(histories):
        assert torch.equal(strategy(values[[row]], [history], 2)[0], together[row])


def test_mirostat_keeps_what_surprises_by_no_more_than_mu() -> None:
    probabilities = torch.tensor([[0.5, 0.25, 0.125, 0.125], [0.125, 0.5, 0.25, 0.125]])
    kept = ours.mirostat(probabilities.log() + 3, torch.tensor([[2.5], [0.5]]))
    expected = torch.tensor([[0.5, 0.25, 0, 0], [0, 0.5, 0, 0]]).log()
    torch.testing.assert_close(kept, expected)
    assert ours.mirostat_mu(6.0, math.log(1 / 16), tau=3.0, eta=0.1) == pytest.approx(5.9)


@pytest.mark.parametrize("tau", [3.5, 5.0])
def test_mirostat_holds_the_surprise_at_tau(tau: float) -> None:
    """The paper's claim, for words whose frequencies follow Zipf's law."""
    zipf = -1.1 * torch.arange(1, 5001).double().log()[None].float()
    generator, mu, surprises = torch.Generator().manual_seed(0), 2 * tau, []
    for _ in range(600):
        kept = ours.mirostat(zipf, torch.tensor([[mu]]))
        token = int(kept.softmax(-1).multinomial(1, generator=generator))
        surprises.append(-float(zipf.log_softmax(-1)[0, token]) / math.log(2))
        mu = ours.mirostat_mu(mu, float(kept[0, token]), tau, eta=0.1)
    assert sum(surprises[100:]) / 500 == pytest.approx(tau, abs=0.1)


@given(logits(), st.integers(0, 40), st.floats(-3, 3))
def test_a_guide_multiplies_by_the_classifiers_probability(values: Tensor, candidates: int, w: float) -> None:
    """p(token) · p(class | token)^w among the candidates, by enumeration."""
    chances = torch.linspace(0.1, 0.9, values.shape[1])
    histories = [[row, row + 1] for row in range(len(values))]
    asked = []

    def scorer(ids: list[int], tokens: Tensor, logprobs: Tensor) -> list[float]:
        row = ids[0]
        asked.append(ids)
        torch.testing.assert_close(logprobs, values[row].log_softmax(-1)[tokens])
        return chances[tokens].log().tolist()

    found = ours.guide(values, histories, scorer, w, candidates).softmax(-1)
    assert asked == histories
    least = values.sort(descending=True).values[:, min(candidates or 99, values.shape[1]) - 1, None]
    count = (found > 0).sum(-1)
    assert bool((count == (values > -math.inf).sum(-1).clamp(max=candidates or 99)).all())
    assert bool((values >= least)[found > 0].all())
    expected = torch.where(found > 0, values.softmax(-1) * chances**w, 0)
    torch.testing.assert_close(found, expected / expected.sum(-1, keepdim=True))


@pytest.mark.parametrize("scores", [[1.0], [math.nan] * 5, [[1.0] * 5]])
def test_scores_that_fit_no_tokens_are_refused(scores: list[float]) -> None:
    with pytest.raises(UserError, match="for 5 tokens"):
        ours.guide(torch.zeros(1, 5), [[1]], lambda *_: scores, 1.0, 0)


@pytest.mark.parametrize("token", [-1, 5])
def test_tokens_that_there_are_not_are_refused(token: int) -> None:
    with pytest.raises(UserError, match=f"logit_bias names the token {token}, the model has 5"):
        ours.logit_bias(torch.zeros(1, 5), {token: 1.0})
    with pytest.raises(UserError, match=f"banned names the token {token}"):
        ours.ban(torch.zeros(1, 5), [token])


@pytest.mark.parametrize("size", [5000, 60_000])
def test_a_large_vocabulary_has_the_same_nucleus_flat_or_peaked(size: int) -> None:
    """More tokens than are looked at first; ties among the last."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, size, generator=generator)
    values = torch.cat([noise * 4, noise * 0.1, (noise * 20).round() / 10])
    kept = (ours.top_p(values, 0.9) > -math.inf).sum(-1)
    expected = (theirs.TopPLogitsWarper(0.9)(None, values.double()) > -math.inf).sum(-1)
    assert bool(((kept - expected).abs() <= 1).all()), (kept, expected)
    assert kept[0] < 4096 < kept[1] or size == 5000
