"""Config of the token verbs. Imports nothing heavy."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from danlu.core.config import Config, InputPath, StageConfig


class TokenizerConfig(StageConfig):
    """`danlu tokenizer train`: a byte-level BPE from the training documents."""

    data: InputPath = Field(description="output folder of `danlu data prepare`")
    vocab_size: int = Field(4096, ge=260, description="entries, the 256 bytes and 3 special tokens included")


class TokenizeConfig(StageConfig):
    """`danlu tokenize`: documents to token shards, for pretraining, fine-tuning or preferences."""

    data: InputPath = Field(description="output folder of `danlu data prepare`")
    tokenizer: InputPath = Field(description="folder with a tokenizer: a `tokenizer train` stage or a model")
    kind: Literal["text", "chat", "preferences"] = Field(
        "text",
        description="text: every token is learnt; chat: the assistant's replies only; preferences: the "
        "replies that are compared, with their prompt before each",
    )
    longest: int = Field(
        0, ge=0, description="chat: cut longer conversations before a user's turn, in tokens; 0 = never"
    )
    longest_reply: int = Field(
        0, ge=0, description="chat: longer replies are read but not learnt, in tokens; 0 = learn all"
    )


class InspectConfig(Config):
    """`danlu inspect`: one training example as the model sees it."""

    file: Path = Field(description="output folder of `danlu tokenize`, or a JSONL file")
    tokenizer: Path | None = Field(None, description="folder with a tokenizer or a model (for a JSONL file)")
    index: int = Field(0, ge=0, description="which example")
    part: Literal["train", "held_out"] = Field("train", description="part of a `tokenize` folder")
    sequence_length: int = Field(512, ge=2, description="tokens in a training sequence")
