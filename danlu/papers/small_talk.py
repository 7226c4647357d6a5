"""A small chat model of people's conversations, and RLHF on it: what experiments of alignment share."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

import danlu
from danlu.align.config import BestOfNConfig, PPOConfig, RewardConfig, RewardSource
from danlu.align.ppo import ppo
from danlu.align.reward import reward
from danlu.align.rewards import Reply, SummedReward
from danlu.align.selection import best_of_n
from danlu.core.files import atomic_write, read_json, read_jsonl
from danlu.data.chitchat import read_chitchat
from danlu.data.config import CHITCHAT, DataConfig
from danlu.data.conversations import Messages
from danlu.data.documents import Document, read_rows, write_documents
from danlu.data.prepare import PARTS, prepare
from danlu.generate.engine import Engine
from danlu.generate.sampling import SamplingParams
from danlu.model.config import ModelConfig
from danlu.tokens.bpe import train_tokenizer
from danlu.tokens.config import TokenizeConfig, TokenizerConfig
from danlu.tokens.tokenize import tokenize
from danlu.train.config import GuardConfig, OptimConfig, ScheduleConfig, TrainConfig
from danlu.train.loop import train

VOCABULARY, LENGTH = 4096, 512
LONGEST = 24
"""Tokens of a reply."""
HELD_OUT = 256
"""Prompts that are answered to measure a policy."""

WANTED = (
    RewardSource(regex=r"\?\s*$", weight=1.0),
    RewardSource(regex=r"(?i)\byou", weight=0.5),
    RewardSource(rule="length", weight=-0.5),
)
"""What the people of these experiments like: to be asked back, to be spoken of, and short replies."""


def sizes(width: int, n_layers: int, ffn_width: int) -> ModelConfig:
    """A LLaMA with heads of 64, or with one head where it is narrower than two."""
    heads = max(1, width // 64)
    return ModelConfig(
        vocab_size=VOCABULARY,
        width=width,
        n_layers=n_layers,
        n_heads=heads,
        n_kv_heads=heads,
        ffn_width=ffn_width,
        max_positions=LENGTH,
    )


SPEAKER = sizes(192, 4, 512)
"""2.6 million parameters."""


def tokens_of_chitchat(folder: Path) -> Path:
    """Text and conversations of chitchat-dataset as `danlu tokenize` folders below `folder`; returns that."""
    if not (folder / "chat" / "train" / "meta.json").is_file():
        data, tokenizer = folder / "data", folder / "tokenizer"
        prepare(DataConfig(source=CHITCHAT, held_out=0.05, out=data))
        train_tokenizer(TokenizerConfig(data=data, vocab_size=VOCABULARY, out=tokenizer))
        tokenize(TokenizeConfig(data=data, tokenizer=tokenizer, kind="text", out=folder / "text"))
        tokenize(
            TokenizeConfig(
                data=data,
                tokenizer=tokenizer,
                kind="chat",
                longest=LENGTH,
                longest_reply=40,
                out=folder / "chat",
            )
        )
    return folder


def gold_of(replies: Sequence[str]) -> list[float]:
    """What the people's rule says."""
    return SummedReward(WANTED)([Reply([], text) for text in replies])


def auroc(strange: Sequence[float], own: Sequence[float]) -> float:
    """The probability that a strange one is further away than one of the own."""
    gaps = np.asarray(strange)[:, None] - np.asarray(own)
    return float(((gaps > 0) + 0.5 * (gaps == 0)).mean())


def text_model(tokens: Path, out: Path, model: ModelConfig, steps: int, seed: int) -> Path:
    """A new model that has learnt the text of `tokens` for so many steps of 8 × 512; a run goes on."""
    return _trained(
        TrainConfig(
            **_shared(tokens / "text", out, steps, seed),
            model=model,
            optim=OptimConfig(name="muon", lr=6e-3, muon_lr=0.02, weight_decay=0.0),
        ),
        "text",
    )


def chat_model(tokens: Path, out: Path, model: ModelConfig, steps: tuple[int, int], seed: int) -> Path:
    """A model that has learnt text for so many steps, then to answer for so many more."""
    pretrained = text_model(tokens, out / "text", model, steps[0], seed)
    return imitate(tokens / "chat", pretrained, out / "chat", steps[1], seed)


def imitate(
    rows: Path,
    init_from: Path,
    out: Path,
    steps: int,
    seed: int,
    *,
    batch_size: int = 8,
    rate: float = 1e-3,
) -> Path:
    """Fine-tunes on conversations, for so many steps of `batch_size` × 512."""
    return _trained(
        TrainConfig(
            **_shared(rows, out, steps, seed) | {"batch_size": batch_size},
            init_from=init_from,
            optim=OptimConfig(lr=rate, weight_decay=0.0),
        ),
        "chat",
    )


def _shared(data: Path, out: Path, steps: int, seed: int) -> dict[str, Any]:
    return {
        "data": data,
        "out": out,
        "seed": seed,
        "steps": steps,
        "batch_size": 8,
        "sequence_length": LENGTH,
        "schedule": ScheduleConfig(warmup=min(10, steps // 2), final=0.05),
        "guard": GuardConfig(remedy="off"),
        "eval_every": 0,
        "eval_batches": 4,
        "checkpoint_every": steps,
        "keep_checkpoints": 1,
    }


def _trained(config: TrainConfig, kind: str) -> Path:
    train(config, kind)
    return config.out


def write_prompts(path: Path, n: int, words: tuple[int, int] = (3, 25)) -> None:
    """The first `n` different turns of users, one from each conversation, of so many words: JSONL."""
    found: dict[str, None] = {}
    for document in read_chitchat():
        turns = [one["content"] for one in document.messages or [] if one["role"] == "user"]
        for turn in turns[1:]:  # the first ones are all alike
            if words[0] <= len(turn.split()) <= words[1] and turn not in found:
                found[turn] = None
                break
        if len(found) == n:
            break
    with atomic_write(path) as file:
        for turn in found:
            file.write(json.dumps({"prompt": turn}, ensure_ascii=False) + "\n")


def real_pairs(seed: int) -> Iterator[Document]:
    """What somebody replied to a turn, and what somebody replied to another one."""
    turns = [
        (asked["content"], answer["content"])
        for document in read_chitchat()
        for asked, answer in zip(
            (document.messages or [])[2::2], (document.messages or [])[3::2], strict=False
        )
    ]
    order = np.random.default_rng(seed).permutation(len(turns))
    for number, (here, there) in enumerate(zip(order, np.roll(order, 1), strict=True)):
        asked, answer = turns[here]
        other = turns[there][1]
        if answer.strip() and other.strip() and answer != other and len(asked) + len(answer) < 400:
            prompt: Messages = [{"role": "user", "content": asked}]
            yield Document(f"real {number}", "", prompt, replies=[answer, other[:200]])


def answered(model: Path, asked: Sequence[str], file: Path, seed: int) -> list[str]:
    """A reply to each prompt, drawn at temperature 1; kept in `file`."""
    if not file.exists():
        engine = Engine(*danlu.load(model, dtype=torch.float32))
        found: list[str] = []
        for begin in range(0, len(asked), 4096):
            some = asked[begin : begin + 4096]
            params = [
                SamplingParams(max_tokens=LONGEST, temperature=1.0, seed=seed * len(asked) + begin + place)
                for place in range(len(some))
            ]
            prompts: list[Messages] = [[{"role": "user", "content": text}] for text in some]
            found += [one.text for one in engine.generate(prompts, params, progress=f"replies from {begin}")]
        with atomic_write(file) as opened:
            json.dump(found, opened)
    replies: list[str] = read_json(file)
    return replies


def label(
    policy: Path, prompts: Path, n: int, out: Path, seed: int, rewards: Sequence[RewardSource] = WANTED
) -> Path:
    """Pairs of replies to `n` prompts, the better one first; none where both are worth the same."""
    best_of_n(
        BestOfNConfig(
            data=prompts,
            out=out,
            seed=seed,
            init_from=str(policy),
            n=2,
            keep="pairs",
            rewards=tuple(rewards),
            max_tokens=LONGEST,
            sequence_length=128,
            held_out_prompts=HELD_OUT,
            limit=n,
        )
    )
    return out


def pairs_of(labels: Sequence[Path], part: str, limit: int | None = None) -> list[Document]:
    """The preferences of a part of `label`'s folders, or the first of them."""
    rows = (row for path in labels for _, row in read_rows(path / f"{part}.jsonl.zst"))
    return [
        Document(str(number), "", row["prompt"], replies=row["replies"])
        for number, row in enumerate(islice(rows, limit))
    ]


def preference_tokens(parts: Mapping[str, Iterable[Document]], tokenizer: Path, out: Path) -> Path:
    """Preferences, of train and held_out, as `danlu tokenize` writes them."""
    for part in PARTS:
        write_documents(parts[part], out / "data" / f"{part}.jsonl.zst")
    tokenize(TokenizeConfig(data=out / "data", tokenizer=tokenizer, kind="preferences", out=out / "tokens"))
    return out / "tokens"


def by_coin(documents: Iterable[Document], seed: int) -> list[Document]:
    """Pairs of which a coin says which reply is the better one."""
    chance = np.random.default_rng(seed)
    found = []
    for one in documents:
        replies = list(one.replies or [])
        found.append(
            Document(one.id, "", one.messages, replies=replies[::-1] if chance.random() < 0.5 else replies)
        )
    return found


def preference_model(
    tokens: Path, init_from: Path, out: Path, seed: int, steps: int, **options: Any
) -> tuple[Path, float | None]:
    """A model of rewards and its accuracy on held-out pairs; steps of 8 × 256 tokens."""
    found = reward(
        RewardConfig(
            **{
                "data": tokens,
                "out": out,
                "seed": seed,
                "init_from": init_from,
                "steps": steps,
                "batch_size": 8,
                "sequence_length": 256,
                "optim": OptimConfig(lr=3e-4, weight_decay=0.0),
                "schedule": ScheduleConfig(warmup=min(5, steps)),
                "eval_every": 0,
                "checkpoint_every": steps,
                "keep_checkpoints": 1,
                "compile": "off",
                **options,
            }
        )
    )
    return out, found.accuracy


def practise(
    policy: Path,
    prompts: Path,
    out: Path,
    seed: int,
    *,
    rollouts: int,
    replies: int,
    lr: float,
    **options: Any,
) -> list[dict[str, Any]]:
    """PPO from `policy`, four updates on each rollout; the figures of each rollout."""
    updates = 4
    ppo(
        PPOConfig(
            **{
                "data": prompts,
                "out": out,
                "seed": seed,
                "init_from": policy,
                "steps": rollouts * updates,
                "batch_size": replies,
                "updates": updates,
                "max_tokens": LONGEST,
                "sequence_length": 256,
                "held_out_prompts": HELD_OUT,
                "optim": OptimConfig(lr=lr, weight_decay=0.0),
                "schedule": ScheduleConfig(name="constant", warmup=5),
                "eval_every": 0,
                "checkpoint_every": rollouts * updates,
                "keep_checkpoints": 1,
                "log_every": updates,
                "compile": "off",
                **options,
            }
        )
    )
    return [row for row in read_jsonl(out / "metrics.jsonl") if "reply_kl" in row]
