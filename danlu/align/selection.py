"""`danlu best-of-n`: of several replies to each prompt those with the best rewards become data.

What is written is learnt as any other conversations (rejection sampling: Touvron et al. 2023, Llama 2,
section 3.2.3; expert iteration, where it is done again with what came of it: Anthony et al. 2017) or
preferences (online DPO: Guo et al. 2024): the output is that of `danlu data prepare`. Or people are asked
which of two replies is better: at random, or where models of rewards disagree most (Christiano et al. 2017,
section 2.2.4).
"""

import json
import random
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch

from danlu.align.best_of_n import expected_best, kl_bound
from danlu.align.config import BestOfNConfig, RewardSource
from danlu.align.reward import RewardModel
from danlu.align.rewards import SummedReward
from danlu.align.rollouts import Drawer, Drawn, Prompts
from danlu.core.device import choose_device, choose_dtype
from danlu.core.errors import UserError
from danlu.core.files import atomic_write, read_json
from danlu.core.progress import Progress
from danlu.data.conversations import plain_text
from danlu.data.documents import Document, read_rows, write_documents
from danlu.data.prepare import PARTS
from danlu.evaluate.intervals import bootstrap_interval
from danlu.model.checkpoint import load

CHUNK = 16
"""Prompts that are answered before their replies are written down."""

Row = dict[str, Any]
"""What `replies.jsonl` says of a prompt: part, prompt, replies, rewards, ended."""


def best_of_n(config: BestOfNConfig) -> dict[str, Any]:
    """Answers each prompt `n` times and keeps what `keep` says. Goes on where an earlier call was cut."""
    device = choose_device()
    model, tokenizer = load(config.init_from, dtype=torch.float32, device=device)
    model.compute_dtype = dtype = choose_dtype(device=device)
    prompts = Prompts(config.data, tokenizer, config)
    parts = config.summed
    if config.keep == "questions" and not parts:
        parts = (RewardSource(rule="ended"),)  # nothing needs to be worth anything
    rewards = SummedReward(parts, partial(RewardModel, dtype=dtype, device=device))
    drawer = Drawer(model, tokenizer, config, rewards)
    config.out.mkdir(parents=True, exist_ok=True)
    _require_same(config, prompts.sha256)
    rows = list(_answered(config, prompts, drawer))
    if config.keep == "questions":
        return _ask(config, rows)
    written = {
        part: write_documents(
            _kept(config, [row for row in rows if row["part"] == part]),
            config.out / f"{part}.jsonl.zst",
        )
        for part in PARTS
    }
    if not written["train"]:
        raise UserError(
            f"{config.data}: no reply is worth keeping", "raise n, lower least, or look at the rewards"
        )
    return {
        "prompts": len(rows),
        "prompts too long": prompts.left_out,
        "rows in which nobody asks": prompts.unasked,
        **{f"{part} rows": count for part, count in written.items()},
        "ended": float(np.mean([ended for row in rows for ended in row["ended"]])),
        "of held-out prompts": _gains([row for row in rows if row["part"] == "held_out"], config),
        "of all": _gains(rows, config),
    }


def _require_same(config: BestOfNConfig, prompts: str) -> None:
    """Raises UserError where the folder's replies were drawn to other prompts, or otherwise."""
    choices = {"out", "keep", "least", "questions", "judges"}
    about = {**config.model_dump(mode="json", exclude=choices), "prompts": prompts}
    path = config.out / "asked.json"
    if path.exists() and read_json(path) != about:
        raise UserError(
            f"{config.out} holds replies that were drawn with other settings", "choose another output folder"
        )
    with atomic_write(path) as file:
        json.dump(about, file)


def _answered(config: BestOfNConfig, prompts: Prompts, drawer: Drawer) -> Iterator[Row]:
    """The row of each prompt, as it is written down in chunks."""
    path = config.out / "replies.jsonl"
    numbers = list(prompts.train[: config.limit or None])
    if config.keep != "questions":  # people are not asked about what is held out
        numbers += prompts.held_out
    before = _whole_chunks(path, len(numbers))
    yield from before
    held = set(prompts.held_out)
    with path.open("a", encoding="utf-8") as file, Progress("replies", len(numbers), "prompts") as progress:
        progress.begin_at(len(before))
        for begin in range(len(before), len(numbers), CHUNK):
            some = numbers[begin : begin + CHUNK]
            drawn = drawer.draw([prompts.rows[number] for number in some], config.n, begin // CHUNK + 1)
            for place, number in enumerate(some):
                row = _row(drawn[place * config.n : (place + 1) * config.n], number in held)
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                yield row
            file.flush()
            progress.update(begin + len(some), reward=sum(one.reward for one in drawn) / len(drawn))


def _whole_chunks(path: Path, total: int) -> list[Row]:
    """What an earlier call has left, without a chunk that it didn't finish."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]
    kept = whole[:total] if len(whole) >= total else whole[: len(whole) // CHUNK * CHUNK]
    path.write_text("".join(kept), encoding="utf-8")
    return [row for _, row in read_rows(path)] if kept else []


def _row(drawn: Sequence[Drawn], is_held_out: bool) -> Row:
    return {
        "part": "held_out" if is_held_out else "train",
        "prompt": drawn[0].reply.prompt,
        "replies": [one.reply.text for one in drawn],
        "rewards": [one.reward for one in drawn],
        "ended": [one.reply.ended for one in drawn],
    }


def _kept(config: BestOfNConfig, rows: Sequence[Row]) -> Iterator[Document]:
    """Of each prompt the best reply, or the best and the worst; nothing where all are worth the same."""
    for number, row in enumerate(rows):
        order = sorted(range(config.n), key=lambda place: row["rewards"][place])
        worst, best = order[0], order[-1]
        value = row["rewards"][best]
        if config.keep == "pairs":
            if value > row["rewards"][worst]:
                replies = [row["replies"][best], row["replies"][worst]]
                yield Document(str(number), "", row["prompt"], replies=replies)
        elif value > row["rewards"][worst] if config.least is None else value >= config.least:
            messages = [*row["prompt"], {"role": "assistant", "content": row["replies"][best]}]
            yield Document(str(number), plain_text(messages), messages)


def _ask(config: BestOfNConfig, rows: Sequence[Row]) -> dict[str, Any]:
    """Writes `questions.jsonl`."""
    judges = [RewardModel(str(ref), choose_dtype(), choose_device()) for ref in config.judges]
    chance = random.Random(config.seed)
    found: list[tuple[float, Row]] = []
    for row in rows:
        texts = list(dict.fromkeys(row["replies"]))
        pairs = list(combinations(range(len(texts)), 2))
        if not pairs:
            continue
        if judges:
            said = np.array([judge([row["prompt"]] * len(texts), texts) for judge in judges])
            doubts = [float((said[:, a] - said[:, b]).std()) for a, b in pairs]
        else:
            doubts = [chance.random() for _ in pairs]
        doubt, (a, b) = max(zip(doubts, pairs, strict=True))
        asked = {"prompt": plain_text(row["prompt"]), "messages": row["prompt"], "a": texts[a], "b": texts[b]}
        found.append((doubt, asked))
    found.sort(key=lambda one: -one[0])
    path = config.out / "questions.jsonl"
    with atomic_write(path) as file:
        for doubt, asked in found[: config.questions]:
            about = {"disagreement": doubt} if judges else {}
            file.write(json.dumps({**asked, **about}, ensure_ascii=False) + "\n")
    return {
        "prompts": len(rows),
        "questions": min(len(found), config.questions),
        "ask": f"danlu eval annotate {path} --kind pair --export answers.jsonl",
    }


def _gains(rows: Sequence[Row], config: BestOfNConfig) -> dict[str, Any]:
    """By n: what the best of n is worth, over the prompts, and how far from the model it is at most."""
    found: dict[str, Any] = {}
    n = 1
    while rows and n <= config.n:
        values = [expected_best(row["rewards"], row["rewards"], n) for row in rows]
        found[f"best of {n}"] = {
            "reward": float(np.mean(values)),
            "interval": bootstrap_interval(values, seed=config.seed),
            "nats": kl_bound(n),
        }
        n *= 2
    return found
