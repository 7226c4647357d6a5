"""The order of the strategies against transformers' generate, and draws against the exact distribution."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaForCausalLM

from danlu.core.errors import UserError
from danlu.generate.sampling import Row, RowError, SamplingParams, choose, invert, process
from danlu.tokens.tokenizer import Tokenizer

V = 330
STOP = 7


def random_logits(rows: int, size: int = V, seed: int = 0, scale: float = 2.0) -> Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)) * scale


def next_tokens(logits: Tensor, rows: list[Row], params: list[SamplingParams]) -> list[int]:
    return choose(process(logits, rows, params), rows, params).tolist()


MIXES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"temperature": 0.7, "top_k": 20, "top_p": 0.8}, {}),
    ({"temperature": 1.5, "top_p": 0.9, "min_p": 0.1, "typical_p": 0.8}, {}),
    ({"temperature": 2.0, "typical_p": 0.7, "epsilon_cutoff": 0.01, "eta_cutoff": 0.02}, {}),
    ({"repetition_penalty": 1.7, "temperature": 0.5, "top_k": 40}, {}),
    (
        {"repetition_penalty": 0.6, "no_repeat_ngram": 2, "top_p": 0.95, "temperature": 1.0},
        {"no_repeat_ngram_size": 2},
    ),
    (
        {"banned": tuple(range(20, 200)), "min_tokens": 6, "stop_ids": (STOP, 9), "top_k": 100},
        {"suppress_tokens": list(range(20, 200)), "min_new_tokens": 6, "eos_token_id": [STOP, 9]},
    ),
    (
        {"logit_bias": {5: 4.0, 11: -3.0}, "repetition_penalty": 1.3, "min_p": 0.02, "temperature": 0.9},
        {"sequence_bias": [[[5], 4.0], [[11], -3.0]]},
    ),
]
OFF: dict[str, Any] = {"top_k": 0, "top_p": 1.0, "temperature": 1.0}


@pytest.mark.parametrize(("mine", "renamed"), MIXES)
def test_processed_logits_are_those_of_transformers_generate(
    mine: dict[str, Any], renamed: dict[str, Any], theirs: LlamaForCausalLM, tokenizer: Tokenizer
) -> None:
    """Step by step, on the raw logits and the tokens of its own sampling."""
    torch.manual_seed(1)
    prompt = [5, 6, 7, 8, 5, 6, 100]
    known = {k: v for k, v in mine.items() if k not in ("no_repeat_ngram", "banned", "logit_bias")}
    settings = OFF | {k: v for k, v in known.items() if k not in ("min_tokens", "stop_ids")} | renamed
    output = theirs.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), do_sample=True, max_new_tokens=12,
        pad_token_id=0, return_dict_in_generate=True, output_scores=True, output_logits=True,
        **({"eos_token_id": 0} | settings),
    )  # fmt: skip
    params = SamplingParams(**({"temperature": 1.0, "stop_ids": ()} | mine))
    row = Row(prompt, params, tokenizer)
    for raw, expected, token in zip(output.logits, output.scores, output.sequences[0, 7:], strict=True):
        found = process(raw.float(), [row], [params])
        assert torch.equal(found == -math.inf, expected == -math.inf)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
        row.accept(int(token))
    assert row.n_generated >= 2


def test_presence_and_frequency_are_of_the_answer_only(tokenizer: Tokenizer) -> None:
    params = SamplingParams(temperature=0, presence_penalty=0.25, frequency_penalty=0.5)
    row = Row([5, 5, 6], params, tokenizer)
    for token in (7, 7, 6):
        row.accept(token)
    expected = torch.zeros(1, V)
    expected[0, [6, 7]] = torch.tensor([-0.75, -1.25])
    assert torch.equal(process(torch.zeros(1, V), [row], [params]), expected)


def test_rows_with_params_of_their_own_are_the_rows_alone(tokenizer: Tokenizer) -> None:
    """Also their draws, whatever else is in the batch and in which order."""
    params = [SamplingParams(**({"seed": 3} | mine)) for mine, _ in MIXES]
    params += [SamplingParams(temperature=0), SamplingParams(seed=4), SamplingParams(mirostat_tau=3.0)]
    params += [SamplingParams(**({"seed": 5} | mine)) for mine, _ in MIXES]

    def play(members: list[int], steps: int = 5) -> dict[int, list[int]]:
        rows = [Row([5, 6, 5, number], params[number], tokenizer) for number in members]
        for step in range(steps):
            logits = random_logits(len(params), seed=step)[members]
            kept = logits.clone()
            for row, token in zip(rows, next_tokens(logits, rows, [params[n] for n in members]), strict=True):
                row.accept(token)
            assert torch.equal(logits, kept), "the input is left as it is"
        return {number: row.generated for number, row in zip(members, rows, strict=True)}

    everyone = list(range(len(params)))
    together = play(everyone)
    assert play(everyone[::-1]) == together
    for number in everyone:
        assert play([number])[number] == together[number], params[number]
    assert len({tuple(ids) for ids in together.values()}) > len(params) - 3


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.7, top_k=6),
        SamplingParams(temperature=1.5, top_p=0.8),
        SamplingParams(temperature=1.2, top_k=8, top_p=0.9),
        SamplingParams(temperature=1.0, mirostat_tau=3.0),
        SamplingParams(temperature=30.0),
    ],
)
@pytest.mark.parametrize("size", [12, 300])
def test_frequencies_are_the_distribution(params: SamplingParams, size: int, tokenizer: Tokenizer) -> None:
    """Pearson's chi-square: its mean is (k - 1), its variance 2 (k - 1); few expected ones are pooled."""
    n, logits = 20_000, random_logits(1, size, seed=5, scale=1.5)
    row = Row([1], params, tokenizer)
    mu = row.mu
    processed = process(logits, [row], [params])
    expected = n * processed.double().softmax(-1)[0]
    counts = torch.zeros(size)
    many = processed.expand(1000, -1)
    for _ in range(n // 1000):
        counts += choose(many, [row] * 1000, [params] * 1000).bincount(minlength=size)
    assert counts[expected == 0].sum() == 0
    assert (row.mu != mu) == (params.mirostat_tau > 0)
    often = expected >= 5
    counts = torch.cat([counts[often], counts[~often].sum()[None]]).double()
    expected = torch.cat([expected[often], expected[~often].sum()[None]])
    possible = expected > 0
    freedom = int(possible.sum()) - 1
    statistic = float(((counts - expected).square() / expected)[possible].sum())
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5


@given(st.integers(1, 700), st.floats(0, 1, exclude_max=True), st.integers(0, 1000))
@settings(max_examples=300)
def test_the_inverse_is_the_definition(size: int, draw: float, seed: int) -> None:
    """The first token at which the sum of probabilities passes the draw; never one of probability 0."""
    weights = torch.rand(1, size, generator=torch.Generator().manual_seed(seed))
    weights[:, seed % 3 :: 3] = 0
    weights[0, seed % size] = 0.5
    found = int(invert(weights, torch.tensor([draw], dtype=torch.float64)))
    total, sums = math.fsum(weights[0].tolist()), [0.0]
    for weight in weights[0].double().tolist():
        sums.append(sums[-1] + weight)
    assert weights[0, found] > 0
    assert sums[found] - 1e-9 <= draw * total <= sums[found + 1] + 1e-9


@pytest.mark.parametrize("draw", [0.0, 1 - 2**-53])
def test_the_ends_of_the_interval_are_tokens_too(draw: float) -> None:
    weights = torch.zeros(1, 1000)
    weights[0, [300, 700]] = torch.tensor([1e-30, 0.1])
    assert int(invert(weights, torch.tensor([draw], dtype=torch.float64))) == (700 if draw else 300)


def test_greedy_is_the_highest_and_no_draw_shapes_it(tokenizer: Tokenizer) -> None:
    logits = random_logits(4).round()
    params = SamplingParams(temperature=0, typical_p=0.1, top_k=3, mirostat_tau=1.0, min_p=0.5)
    rows = [Row([1], params, tokenizer) for _ in range(4)]
    assert process(logits, rows, [params] * 4) is logits
    assert next_tokens(logits, rows, [params] * 4) == logits.argmax(-1).tolist()
    assert all(row.mu == 2.0 for row in rows)


@pytest.mark.parametrize("name", ["top_k", "top_p", "typical_p", "min_p", "eta_cutoff", "mirostat_tau"])
def test_logits_that_are_no_numbers_reach_the_caller(name: str, tokenizer: Tokenizer) -> None:
    """The engine looks for them; the other rows of the batch are drawn as ever."""
    logits = random_logits(2)
    logits[0, 3:] = math.nan
    params = SamplingParams(**{name: 5 if name in ("top_k", "mirostat_tau") else 0.5})
    rows = [Row([row], params, tokenizer) for row in range(2)]
    alone = next_tokens(logits[1:], [Row([1], params, tokenizer)], [params])
    assert next_tokens(logits, rows, [params, params])[1:] == alone


def test_a_row_that_may_choose_nothing_is_named(tokenizer: Tokenizer) -> None:
    free, stuck = SamplingParams(), SamplingParams(banned=tuple(range(V)))
    rows = [Row([1], free, tokenizer), Row([1], stuck, tokenizer)]
    with pytest.raises(RowError, match="every next token is ruled out") as caught:
        process(random_logits(2), rows, [free, stuck])
    assert caught.value.row is rows[1]


def test_a_scorer_guides_greedy_too_before_the_temperature(tokenizer: Tokenizer) -> None:
    """Its text so far is prompt and answer; it sees what is not ruled out."""
    seen = []

    def scorer(ids: list[int], tokens: Tensor, logprobs: Tensor) -> Tensor:
        seen.append((ids, tokens.tolist()))
        return (tokens == 20).float()

    logits = torch.zeros(1, V)
    logits[0, [10, 20, 30]] = torch.tensor([5.0, 4.0, 6.0])
    params = SamplingParams(
        temperature=0, scorer=scorer, scorer_weight=1.5, scorer_candidates=2, banned=(30,)
    )
    row = Row([1, 2], params, tokenizer)
    assert next_tokens(logits, [row], [params]) == [20]
    row.accept(20)
    process(logits, [row], [params])
    assert seen == [([1, 2], [10, 20]), ([1, 2, 20], [10, 20])]


def test_a_row_takes_back_what_it_went_on_by(tokenizer: Tokenizer) -> None:
    params = SamplingParams(repetition_penalty=2.0, regex="[a-z ]+", temperature=1.0)
    row, logits = Row([5, 6], params, tokenizer), random_logits(1)
    before = process(logits, [row], [params])
    for token in tokenizer.encode("ab c"):
        row.accept(token)
    row.accept(row.stop_ids[0])
    assert not torch.equal(process(logits, [row], [params]), before)
    row.rewind(row.n_generated)
    assert (row.generated, torch.equal(process(logits, [row], [params]), before)) == ([], True)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": -1}, {"temperature": -1.0}, {"temperature": math.nan}, {"temperature": math.inf},
        {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}, {"min_p": 1.5}, {"typical_p": 0.0},
        {"epsilon_cutoff": 1.0}, {"eta_cutoff": -0.1}, {"mirostat_tau": -1.0}, {"repetition_penalty": 0.0},
        {"presence_penalty": math.nan}, {"no_repeat_ngram": -1}, {"min_tokens": 201}, {"logprobs": -1},
        {"prompt_logprobs": -1}, {"scorer_candidates": -1}, {"scorer_weight": math.inf},
    ],
)  # fmt: skip
def test_a_number_out_of_range_is_named(wrong: dict[str, float]) -> None:
    name, value = next(iter(wrong.items()))
    with pytest.raises(UserError, match=f"{name} is {value}"):
        SamplingParams(**wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"logit_bias": {3: math.nan}}, "logit_bias has the value nan"),
        ({"stop": ("a", "")}, "stop has an empty text"),
        ({"schema": {}, "regex": "a"}, "schema and regex are both given"),
        ({"regex": "("}, "the regex can't be used: unclosed group"),
        ({"schema": {"type": "text"}}, "the schema can't be used: Invalid type: text"),
    ],
)
def test_what_cannot_be_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        SamplingParams(**wrong)


def test_params_in_several_forms_are_equal() -> None:
    one = SamplingParams(logit_bias={1: 2}, stop="a", schema={"type": "object"}, stop_ids=[3], banned=[4])
    same = SamplingParams(
        logit_bias=((1, 2.0),), stop=["a"], schema='{"type": "object"}', stop_ids=(3,), banned=(4,)
    )
    assert one == same
    assert hash(one) == hash(same)
    assert one.steps == SamplingParams(logit_bias={1: 2.0}, banned=(4,), seed=9, max_tokens=3).steps
    assert one.steps != SamplingParams(logit_bias={1: 2.0}, banned=(5,)).steps
