"""Memorisation: how much of its training text a model continues word for word.

Carlini, Ippolito, Jagielski, Lee, Tramèr, Zhang 2022, "Quantifying Memorization Across Neural Language
Models": a text is extractable where the model, given its first k tokens, writes the next ones greedily just
as they stand. Text is predictable too, so held-out text of the same kind is measured beside.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from danlu.core.errors import UserError
from danlu.data.documents import read_documents
from danlu.evaluate.intervals import Interval, wilson_interval
from danlu.generate.engine import Engine
from danlu.generate.sampling import SamplingParams

GIVEN, WRITTEN = 50, 50
"""Tokens, as in the paper."""


@dataclass(frozen=True)
class Memorised:
    """Of texts of one kind."""

    share: float
    """Continued word for word."""
    interval: Interval
    tokens: float
    """Of those to be written, how many were right before the first wrong one, in the mean."""
    n: int


def memorised(
    engine: Engine, texts: Sequence[Sequence[int]], given: int = GIVEN, written: int = WRITTEN
) -> Memorised:
    """Of ids of texts, each at least `given` + `written` long."""
    params = SamplingParams(max_tokens=written, temperature=0.0, stop_ids=())
    said = engine.generate([list(ids[:given]) for ids in texts], params, progress="memorisation")
    right = []
    for ids, one in zip(texts, said, strict=True):
        truth = ids[given : given + written]
        wrong = (n for n, (a, b) in enumerate(zip(one.ids, truth, strict=False)) if a != b)
        right.append(next(wrong, min(len(one.ids), written)))
    share = float(np.mean([count == written for count in right]))
    return Memorised(share, wilson_interval(share, len(right)), float(np.mean(right)), len(right))


def memorisation(engine: Engine, data: Path, texts: int, seed: int) -> dict[str, Any]:
    """Training and held-out documents of a `danlu data prepare` folder. Raises UserError for short ones."""
    found = {}
    for part in ("train", "held_out"):
        long_enough = []
        for document in read_documents(data / f"{part}.jsonl.zst"):
            ids = engine.prompt_ids(document.text)
            if len(ids) >= GIVEN + WRITTEN:
                long_enough.append(ids)
        if not long_enough:
            raise UserError(
                f"{data}, {part}: no document of {GIVEN + WRITTEN} tokens", "give longer documents"
            )
        chosen = random.Random(seed).sample(long_enough, min(texts, len(long_enough)))
        found[part] = vars(memorised(engine, chosen))
    return found
