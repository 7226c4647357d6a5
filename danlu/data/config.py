"""Config of the data verbs. Imports nothing heavy."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from danlu.core.config import Config, InputMark, StageConfig

CHITCHAT = "chitchat"
"""The `source` that means the conversations in the package chitchat-dataset."""
SUMS = "sums"
"""The `source` that means made-up sums of two numbers."""


class DataConfig(StageConfig):
    """`danlu data prepare`: documents in; clean, distinct ones out, split into train and held-out."""

    source: Annotated[str, InputMark()] = Field(
        description="text, JSONL or Parquet file (also .gz, .zst), a folder of them, "
        f"`{CHITCHAT}` for the conversations in the package chitchat-dataset, or `{SUMS}` for 20,000 sums"
    )
    text_key: str = Field("text", description="key of the text in a JSONL or Parquet row")
    held_out: float = Field(0.05, gt=0, lt=1, description="share of the documents kept for evaluation")


class CheckConfig(Config):
    """`danlu data check`: what a file holds, and what is wrong with it."""

    file: Path = Field(description="text, JSONL or Parquet file (also .gz, .zst), or a folder of them")
    text_key: str = Field("text", description="key of the text in a JSONL or Parquet row")
    chat: bool = Field(False, description="the file is meant for chat fine-tuning: each row needs a reply")
