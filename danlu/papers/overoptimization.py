"""Overoptimisation: a policy that learns from a model of rewards gets better, and then worse, than it says.

Claim (Gao, Schulman, Hilton 2022, "Scaling Laws for Reward Model Overoptimization"): optimised against a
proxy, the gold reward follows d (α − β d) for best-of-n and d (α − β log d) for reinforcement learning, with
d = √KL; the gap between proxy and gold grows, and more so for smaller proxies and fewer labels.

The rule, written before the first run:
- First policy: 2.6 million parameters, chitchat-dataset, 300 steps of text and 80 of replies (8 × 512);
  replies of at most 24 tokens. Gold: 10.5 million parameters, 200 steps of text, then a model of rewards of
  2,000 pairs by the rule of danlu/papers/small_talk.py and 6,000 of what a person replied and, by turns, the
  reply to something else, the same words shuffled, and a few of them again and again, so that it knows more
  than the first policy's replies show; frozen; mean 0 and deviation 1 over the first policy's replies.
- Proxies: 0.1, 0.6 and 2.6 million parameters (300 steps of the same text), each a model of rewards of 200,
  1,000 and 5,000 pairs of the first policy's replies to about 3,000 prompts, of which gold is asked for the
  better one; one pass, and at least 25 steps of 8 × 256; scores standardised as gold's.
- Best-of-n: 100 prompts with 1,024 replies each, n = 1 … 1,024, by the unbiased estimator; divergence
  log n − (n − 1) / n. Reinforcement learning: PPO without any weight of the divergence, 80 rollouts of 128
  replies, four updates each, rate 2e-4; the mean divergence of a reply and the mean of gold of each rollout.
- "Best-of-n: the gap grows" holds when proxy less gold at n = 1,024 is greater than at n = 16 (interval by
  prompts, 95 %, above 0) for at least 8 of the 9 proxies. Best of 1,024 reaches 5.9 nats only, so a fall of
  gold is not asked for.
- "Reinforcement learning: gold falls while the proxy rises" holds when for at least 5 of the 9 proxies the
  means of the last ten rollouts are, for gold, lower by at least 0.2 deviations than the highest mean of ten
  rollouts in a row, and for the proxy higher than in those ten.
- "Each has its form" holds when, fitted by least squares on every other point with KL ≥ 0.5 and judged by
  the squared error on the points between, d (α − β d) is better for best-of-n than d (α − β log d) in at
  least 5 of 9, and the other way round for reinforcement learning in at least 5 of 9. d α and
  d (α − β d²) stand beside them.
- Reported without a verdict: the highest gold by size and by labels; α and β with intervals (95 %, by prompts
  for best-of-n, by blocks of ten rollouts for reinforcement learning).
- Control (null = the interval by prompts holds 0): gold of the best of 1,024 by numbers drawn at random, less
  the mean of the prompt's replies; the mean of 30 draws. The first run drew once, which voids a run in
  twenty by itself, and so it did (LOG.md); no claim's rule is changed.

Not tested: larger models, people as gold.
"""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from danlu.align.best_of_n import expected_best, kl_bound
from danlu.align.config import RewardSource
from danlu.align.reward import RewardModel
from danlu.core.device import choose_dtype
from danlu.core.errors import UserError
from danlu.core.files import atomic_write
from danlu.core.progress import track
from danlu.data.documents import Document, read_rows
from danlu.evaluate.intervals import Interval, bootstrap_interval
from danlu.papers.config import ReproduceConfig
from danlu.papers.protocol import Claim, Control, Result, judged, save_plot
from danlu.papers.small_talk import (
    SPEAKER,
    answered,
    chat_model,
    label,
    pairs_of,
    practise,
    preference_model,
    preference_tokens,
    real_pairs,
    sizes,
    text_model,
    tokens_of_chitchat,
    write_prompts,
)

GOLD = sizes(384, 5, 1024)
PROXIES = {"0.1M": sizes(24, 2, 64), "0.6M": sizes(96, 2, 256), "2.6M": SPEAKER}
FORMS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "d (α − β d)": lambda d: np.stack([d, -d * d], 1),
    "d (α − β log d)": lambda d: np.stack([d, -d * np.log(d)], 1),
    "d α": lambda d: d[:, None],
    "d (α − β d²)": lambda d: np.stack([d, -(d**3)], 1),
}
"""Each linear in its coefficients: its columns."""
DRAWS = 30
"""Of the control's random numbers."""
BEST, LEARNT = "d (α − β d)", "d (α − β log d)"


@dataclass(frozen=True)
class Setup:
    """The sizes of the experiment; the defaults are the rule's."""

    steps: tuple[int, int] = (300, 80)
    gold_steps: int = 200
    gold_labels: int = 2000
    gold_real: int = 6000
    labels: tuple[int, ...] = (200, 1000, 5000)
    prompts: int = 6000
    asked: int = 100
    replies: int = 1024
    rollouts: int = 80
    batch_size: int = 128
    rate: float = 2e-4


@dataclass(frozen=True)
class Curve:
    """Proxy and gold by divergence, in deviations of the first policy's."""

    kl: list[float]
    proxy: list[float]
    gold: list[float]


def run(config: ReproduceConfig, folder: Path, setup: Setup | None = None) -> Result:
    """Gold, proxies, best-of-n, PPO; what is there already is taken as it is."""
    begin = time.monotonic()
    setup = setup or Setup()
    seed = config.seed
    tokens = tokens_of_chitchat(folder / "chitchat")
    base = chat_model(tokens, folder / "base", SPEAKER, setup.steps, seed)
    prompts = folder / "prompts.jsonl"
    write_prompts(prompts, setup.prompts)
    gold = gold_model(folder, tokens, base, prompts, setup, seed)
    proxies, accuracies = proxy_models(folder, tokens, base, prompts, gold, setup, seed)
    scored = scores(folder, base, prompts, {"gold": gold, **proxies}, setup, seed)
    by_prompt = {name: best_curves(scored["gold"], scored[name]) for name in proxies}
    gained = {name: mean_curve(curves) for name, curves in by_prompt.items()}
    learnt = {
        name: ppo_curve(folder, base, prompts, gold, proxies[name], name, scored, setup, seed)
        for name in proxies
    }
    save_plot(_plot(gained, learnt), folder)
    errors = {
        "best-of-n": {name: form_errors(curve) for name, curve in gained.items()},
        "reinforcement learning": {name: form_errors(curve) for name, curve in learnt.items()},
    }
    return judged(
        Result(
            paper="Gao et al. 2022: Scaling Laws for Reward Model Overoptimization",
            rule=__doc__ or "",
            claims=[gap_claim(scored, list(proxies)), fall_claim(learnt), form_claim(errors)],
            controls=[random_control(scored["gold"], seed)],
            seeds=[seed],
            seconds=time.monotonic() - begin,
            not_tested="larger models, people as gold",
            figures={
                name: {
                    "accuracy, held out": accuracies[name],
                    "best of most: proxy, gold": [gained[name].proxy[-1], gained[name].gold[-1]],
                    "highest mean of ten rollouts of gold": float(smooth(learnt[name].gold).max()),
                    "last ten rollouts: proxy, gold, nats": [
                        float(np.mean(values[-10:]))
                        for values in (learnt[name].proxy, learnt[name].gold, learnt[name].kl)
                    ],
                    **{
                        f"{way}: {form}, root of the mean squared error between": error
                        for way, found in errors.items()
                        for form, error in found[name].items()
                    },
                    **{
                        f"{way}: {letter} of {form}, with its interval": [value, *interval]
                        for way, form, fits in (
                            ("best-of-n", BEST, fitted_by_prompt(by_prompt[name], BEST)),
                            ("reinforcement learning", LEARNT, fitted_by_blocks(learnt[name], LEARNT, seed)),
                        )
                        for letter, (value, interval) in zip("αβ", fits, strict=True)
                    },
                }
                for name in proxies
            },
        )
    )


# Models of rewards


def gold_model(folder: Path, tokens: Path, base: Path, prompts: Path, setup: Setup, seed: int) -> Path:
    """Learns people's rule, and what people really replied."""
    text = text_model(tokens, folder / "gold-text", GOLD, setup.gold_steps, seed)
    ruled = label(base, prompts, setup.gold_labels, folder / "gold-labels", seed)
    real = list(islice(sensible_pairs(seed), setup.gold_real + setup.gold_real // 10))
    parts = {
        "train": [*pairs_of([ruled], "train"), *real[: setup.gold_real]],
        "held_out": [*pairs_of([ruled], "held_out"), *real[setup.gold_real :]],
    }
    steps = max(1, len(parts["train"]) // 32)
    learnt = preference_tokens(parts, tokens / "tokenizer", folder / "gold-data")
    return preference_model(learnt, text, folder / "gold", seed, steps)[0]


def sensible_pairs(seed: int) -> Iterator[Document]:
    """What somebody replied, and what is worse.

    That is, by turns, somebody's reply to something else, the same words shuffled, or a few of them again and
    again.
    """
    chance = random.Random(seed)
    for number, pair in enumerate(real_pairs(seed)):
        good, bad = pair.replies or []
        words = good.split()
        if number % 3 == 1:
            chance.shuffle(words)
            bad = " ".join(words)
        elif number % 3 == 2:
            begin, n = chance.randrange(max(1, len(words) - 2)), chance.randint(1, 3)
            bad = " ".join((words[begin : begin + n] * 16)[: chance.randint(4, 16)])
        if bad.split() != good.split():
            yield Document(pair.id, "", pair.messages, replies=[good, bad])


def proxy_models(
    folder: Path, tokens: Path, base: Path, prompts: Path, gold: Path, setup: Setup, seed: int
) -> tuple[dict[str, Path], dict[str, float | None]]:
    """Each size after each number of labels, and how often each is right about held-out pairs."""
    most = max(setup.labels)
    # There are fewer prompts than labels: some get two.
    labels = [
        label(base, prompts, most, folder / name, seed + further, [RewardSource(model=gold)])
        for further, name in enumerate(("labels", "labels-again"), 1)
    ]
    learnt, held_out = pairs_of(labels, "train"), pairs_of(labels[:1], "held_out")
    if len(learnt) < most:
        raise UserError(
            f"{folder}: {len(learnt):,} pairs, {most:,} labels are asked for", "give more prompts"
        )
    found, accuracies = {}, {}
    for size, model in PROXIES.items():
        text = text_model(tokens, folder / f"text-{size}", model, setup.steps[0], seed)
        for n in setup.labels:
            name = f"{size}, {n:,} labels"
            out = folder / f"proxy-{size}-{n}"
            parts = {"train": learnt[:n], "held_out": held_out[:n]}
            rows = preference_tokens(parts, tokens / "tokenizer", out)
            found[name], accuracies[name] = preference_model(rows, text, out / "run", seed, max(25, n // 32))
    return found, accuracies


# Best of n


def scores(
    folder: Path, base: Path, prompts: Path, models: dict[str, Path], setup: Setup, seed: int
) -> dict[str, np.ndarray]:
    """(prompts, replies) of what each model says of the first policy's replies; kept in a file of each."""
    asked = [row["prompt"] for _, row in islice(read_rows(prompts), setup.asked)]
    each = [text for text in asked for _ in range(setup.replies)]
    texts = answered(base, each, folder / "replies.json", seed)
    replies = [texts[n : n + setup.replies] for n in range(0, len(texts), setup.replies)]
    found: dict[str, np.ndarray] = {}
    for name, path in models.items():
        file = folder / "best-of-n" / f"{name}.npy"
        if file.exists():
            found[name] = np.load(file)
            continue
        found[name] = np.zeros((len(asked), setup.replies))
        judge = RewardModel(path, dtype=choose_dtype())
        for number, texts in track(enumerate(replies), f"rewards, {name}", total=len(asked)):
            distinct = list(dict.fromkeys(texts))
            said = judge([[{"role": "user", "content": asked[number]}]] * len(distinct), distinct)
            values = dict(zip(distinct, said, strict=True))
            found[name][number] = [values[text] for text in texts]
        with atomic_write(file, "wb") as opened:
            np.save(opened, found[name])
    return found


def standardised(values: np.ndarray, by: np.ndarray) -> np.ndarray:
    return (values - by.mean()) / by.std()


def best_of(gold: np.ndarray, proxy: np.ndarray, n: int) -> np.ndarray:
    """(2, prompts): proxy and gold of the reply that the proxy likes best of n."""
    proxies, golds = standardised(proxy, proxy), standardised(gold, gold)
    return np.array(
        [
            [expected_best(own, own, n), expected_best(own, true, n)]
            for own, true in zip(proxies, golds, strict=True)
        ]
    ).T


def best_curves(gold: np.ndarray, proxy: np.ndarray) -> list[Curve]:
    """Of each prompt."""
    ns = [2**k for k in range(int(np.log2(gold.shape[1])) + 1)]
    kl = [kl_bound(n) for n in ns]
    found = np.array([best_of(gold, proxy, n) for n in ns])
    return [Curve(kl, *found[:, :, place].T.tolist()) for place in range(len(gold))]


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """Of curves with the same divergences."""
    proxy, gold = (
        np.mean([getattr(one, side) for one in curves], axis=0).tolist() for side in ("proxy", "gold")
    )
    return Curve(curves[0].kl, proxy, gold)


# Reinforcement learning


def ppo_curve(
    folder: Path,
    base: Path,
    prompts: Path,
    gold: Path,
    proxy: Path,
    name: str,
    scored: dict[str, np.ndarray],
    setup: Setup,
    seed: int,
) -> Curve:
    rows = practise(
        base,
        prompts,
        folder / f"ppo-{proxy.parent.name.removeprefix('proxy-')}",
        seed,
        rollouts=setup.rollouts,
        replies=setup.batch_size,
        lr=setup.rate,
        reward_model=proxy,
        rewards=(RewardSource(model=gold, weight=0.0),),
        kl=0.0,
        stop_kl=1000.0,  # so that the divergence is measured
    )
    true = np.array([row[f"reward: {gold}"] for row in rows])
    said = np.array([row["reward"] for row in rows])
    return Curve(
        [row["reply_kl"] for row in rows],
        standardised(said, scored[name]).tolist(),
        standardised(true, scored["gold"]).tolist(),
    )


# Forms


def points(curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    """d and gold of the points with KL ≥ 0.5."""
    kl, gold = np.asarray(curve.kl), np.asarray(curve.gold)
    return np.sqrt(kl[kl >= 0.5]), gold[kl >= 0.5]


def form_errors(curve: Curve) -> dict[str, float]:
    """By form the root of the mean squared error on every other point, fitted on those between."""
    d, gold = points(curve)
    found = {}
    for form, columns in FORMS.items():
        fitted = np.linalg.lstsq(columns(d[::2]), gold[::2], rcond=None)[0]
        found[form] = float(np.sqrt(((columns(d[1::2]) @ fitted - gold[1::2]) ** 2).mean()))
    return found


def coefficients(curve: Curve, form: str) -> list[float]:
    """α and β, of all points with KL ≥ 0.5."""
    d, gold = points(curve)
    return [float(value) for value in np.linalg.lstsq(FORMS[form](d), gold, rcond=None)[0]]


Fitted = tuple[float, Interval]


def fitted_by_prompt(curves: Sequence[Curve], form: str) -> list[Fitted]:
    """α and β with intervals by prompts: a fit of means is the mean of the fits, which are linear."""
    fits = np.array([coefficients(one, form) for one in curves])
    return [(float(fit.mean()), bootstrap_interval(fit.tolist())) for fit in fits.T]


def fitted_by_blocks(curve: Curve, form: str, seed: int, length: int = 10) -> list[Fitted]:
    """α and β with intervals by blocks of so many rollouts, since those in a row are alike."""
    d, gold = points(curve)
    blocks = np.array_split(np.arange(len(d)), max(2, len(d) // length))
    chance, columns = np.random.default_rng(seed), FORMS[form](d)
    fits = []
    for _ in range(1000):
        drawn = np.concatenate([blocks[i] for i in chance.integers(len(blocks), size=len(blocks))])
        fits.append(np.linalg.lstsq(columns[drawn], gold[drawn], rcond=None)[0])
    ends = np.percentile(fits, (2.5, 97.5), axis=0).T.tolist()
    return [(value, (low, high)) for value, (low, high) in zip(coefficients(curve, form), ends, strict=True)]


def smooth(values: Sequence[float], width: int = 10) -> np.ndarray:
    """Means of so many in a row."""
    width = min(width, len(values))
    return np.convolve(values, np.ones(width) / width, "valid")


# Verdicts


def gap_claim(scored: dict[str, np.ndarray], names: Sequence[str]) -> Claim:
    most = scored["gold"].shape[1]
    few = min(16, most // 2)
    grown = []
    for name in names:
        gaps = [
            found[0] - found[1] for found in (best_of(scored["gold"], scored[name], n) for n in (most, few))
        ]
        grown.append(bootstrap_interval((gaps[0] - gaps[1]).tolist())[0] > 0)
    return Claim(
        claim="Best-of-n: the gap grows",
        verdict="holds" if sum(grown) >= len(grown) - 1 else "does not hold",
        value=float(sum(grown)),
        interval=None,
        required=f"of {len(grown)} proxies, those whose gap at {most} is above that at {few}: all but one",
    )


def fall_claim(learnt: dict[str, Curve]) -> Claim:
    fallen = []
    for curve in learnt.values():
        gold, proxy = smooth(curve.gold), smooth(curve.proxy)
        peak = int(gold.argmax())
        fallen.append(gold[peak] - gold[-1] >= 0.2 and proxy[-1] > proxy[peak])
    return Claim(
        claim="Reinforcement learning: gold falls while the proxy rises",
        verdict="holds" if sum(fallen) > len(fallen) / 2 else "does not hold",
        value=float(sum(fallen)),
        interval=None,
        required=f"of {len(fallen)} proxies, those with a fall of 0.2 deviations: more than half",
    )


def form_claim(errors: dict[str, dict[str, dict[str, float]]]) -> Claim:
    best = [one[BEST] < one[LEARNT] for one in errors["best-of-n"].values()]
    learnt = [one[LEARNT] < one[BEST] for one in errors["reinforcement learning"].values()]
    holds = all(sum(one) > len(one) / 2 for one in (best, learnt))
    return Claim(
        claim="Each has its form",
        verdict="holds" if holds else "does not hold",
        value=float(min(sum(best), sum(learnt))),
        interval=None,
        required=f"of {len(best)} proxies, those where its own form has the smaller error: more than half, "
        f"for best-of-n ({sum(best)}) and for reinforcement learning ({sum(learnt)})",
    )


def random_control(gold: np.ndarray, seed: int) -> Control:
    chance = np.random.default_rng(seed)
    # Against each prompt's own mean: prompts differ in what their replies are worth.
    gains = [
        float(np.mean([expected_best(chance.random(len(own)), own, len(own)) for _ in range(DRAWS)]))
        - float(own.mean())
        for own in standardised(gold, gold)
    ]
    interval: Interval = bootstrap_interval(gains, seed=seed)
    return Control(
        control="the best by a random number is worth no more than the mean",
        null=interval[0] <= 0 <= interval[1],
        value=float(np.mean(gains)),
        interval=interval,
    )


def _plot(gained: dict[str, Curve], learnt: dict[str, Curve]) -> Any:
    """Proxy (dashed) and gold (points, and the fitted form) over √KL."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    sides = (("best-of-n", gained, BEST), ("reinforcement learning", learnt, LEARNT))
    for axes, (title, curves, form) in zip(figure.subplots(1, 2), sides, strict=True):
        for number, (name, curve) in enumerate(curves.items()):
            color = f"C{number}"
            d = np.sqrt(np.clip(curve.kl, 0, None))
            axes.plot(d, curve.gold, ".", color=color, markersize=4, label=name)
            axes.plot(d, curve.proxy, "--", color=color, linewidth=0.6)
            reach = np.linspace(0.5**0.5, max(d.max(), 0.8), 100)
            axes.plot(reach, FORMS[form](reach) @ coefficients(curve, form), color=color, linewidth=1)
        axes.set(title=f"{title}: {form}", xlabel="√KL, nats½", ylabel="reward, deviations")
        axes.legend(fontsize=7)
    return figure
