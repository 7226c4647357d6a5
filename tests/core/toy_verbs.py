"""Verbs that take no time: `write` makes a text, `join` makes one of two, `train` has checkpoints."""

import os
import time
from pathlib import Path
from typing import Annotated

from pydantic import Field

from danlu.core.config import Config, InputMark, InputPath, StageConfig
from danlu.core.errors import UserError
from danlu.core.files import atomic_write
from danlu.core.verbs import Estimate, Verb


class WriteConfig(StageConfig):
    source: Annotated[str, InputMark()] = Field("poem", description="a file, or the name of a known text")
    text: str = Field("", description="what is added to it")
    fail: bool = Field(False, description="find fault with the input")


class InnerConfig(Config):
    rate: float = Field(0.5, gt=0, le=1, description="a rate")
    mode: str = Field("on", description="a word")


class JoinConfig(StageConfig):
    left: InputPath = Field(description="first text")
    right: InputPath | None = Field(None, description="second text")
    inner: InnerConfig = Field(InnerConfig(), description="more")


class PartConfig(Config):
    text: InputPath | None = Field(None, description="a text")
    texts: tuple[InputPath, ...] = Field((), description="several")


class GatherConfig(StageConfig):
    parts: tuple[PartConfig, ...] = Field((), description="what is gathered")
    others: tuple[InputPath, ...] = Field((), description="more texts")


class TrainConfig(StageConfig):
    data: InputPath = Field(description="text")
    steps: int = Field(4, ge=1, description="steps")
    stop_at: int = Field(0, ge=0, description="interrupt at this step")


def write(config: WriteConfig) -> dict[str, int]:
    if config.fail:
        raise UserError(f"{config.source}: bad", "mend it")
    source = Path(config.source)
    text = (source.read_text() if source.exists() else config.source) + config.text
    with atomic_write(config.out / "text.txt") as file:
        file.write(text)
    return {"characters": len(text)}


def join(config: JoinConfig) -> dict[str, int]:
    parts = [(path / "text.txt").read_text() for path in (config.left, config.right) if path]
    with atomic_write(config.out / "text.txt") as file:
        file.write(" ".join(parts))
    return {"parts": len(parts)}


def gather(config: GatherConfig) -> dict[str, int]:
    files = [*(part.text for part in config.parts if part.text), *config.others]
    files += [text for part in config.parts for text in part.texts]
    with atomic_write(config.out / "text.txt") as file:
        file.write(" ".join(path.read_text() for path in files))
    return {"parts": len(files)}


def train(config: TrainConfig) -> dict[str, int]:
    """Goes on from its last checkpoint; interrupted once at `stop_at`, where it has not been before."""
    folder = config.out / "checkpoints"
    folder.mkdir(exist_ok=True)
    done = sorted(int(path.name.removeprefix("step-")) for path in folder.iterdir())
    first = done[-1] if done else 0
    for step in range(first + 1, config.steps + 1):
        (folder / f"step-{step}").mkdir()
        if step == config.stop_at and not done:
            raise KeyboardInterrupt
    with atomic_write(config.out / "text.txt") as file:
        file.write(f"{(config.data / 'text.txt').read_text()} {config.steps}")
    return {"first": first, "steps": config.steps}


def together(config: WriteConfig) -> dict[str, int]:
    """As a distributed verb: each process leaves a mark, the first one ends last."""
    rank = int(os.environ.get("RANK", "0"))
    (config.out / f"rank-{rank}").write_text("")
    while rank == 0 and not (config.out / "rank-1").exists():
        time.sleep(0.05)
    return {"rank": rank}


def estimate_write(config: WriteConfig, upstream: dict[str, Estimate]) -> Estimate:
    return Estimate(tokens=10, seconds=1, memory_bytes=1000, outputs={"bytes": len(config.source)})


def estimate_train(config: TrainConfig, upstream: dict[str, Estimate]) -> Estimate:
    size = upstream["data"].outputs.get("bytes", 5)
    huge = 10**15 if config.steps > 1000 else 1000
    return Estimate(tokens=config.steps * size, flops=6e9, seconds=config.steps, memory_bytes=huge)


VERBS = [
    Verb(
        "write",
        "toy_verbs:write",
        "toy_verbs:WriteConfig",
        "Writes.",
        stage=True,
        estimate="toy_verbs:estimate_write",
    ),
    Verb("join", "toy_verbs:join", "toy_verbs:JoinConfig", "Joins.", stage=True),
    Verb("gather", "toy_verbs:gather", "toy_verbs:GatherConfig", "Gathers.", stage=True),
    Verb(
        "train",
        "toy_verbs:train",
        "toy_verbs:TrainConfig",
        "Trains.",
        stage=True,
        estimate="toy_verbs:estimate_train",
    ),
    Verb(
        "together",
        "toy_verbs:together",
        "toy_verbs:WriteConfig",
        "Runs on all.",
        stage=True,
        distributed=True,
    ),
    Verb("look", "toy_verbs:write", "toy_verbs:WriteConfig", "Is no stage."),
]
