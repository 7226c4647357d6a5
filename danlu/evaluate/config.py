"""Config of the evaluation verbs. Imports nothing heavy."""

from pathlib import Path

from pydantic import Field

from danlu.core.config import Config, InputPath, StageConfig


class CompressConfig(Config):
    """`danlu compress`: a lossless coder driven by a model."""

    file: Path = Field(description="any file")
    out: Path = Field(description="where the compressed file goes")
    model: str = Field("", description="run folder or Hugging Face folder; the decoder needs the same one")
    online: bool = Field(
        False, description="no model: coder and decoder train the same one while they code (prequential)"
    )


class DecompressConfig(Config):
    """`danlu decompress`: the exact inverse of `danlu compress`."""

    file: Path = Field(description="what `danlu compress` wrote")
    out: Path = Field(description="where the original goes")
    model: str = Field("", description="the model that it was compressed with (none for --online)")


class EvalConfig(StageConfig):
    """`danlu eval`: bits per byte against other compressors, and the quality of small talk."""

    model: InputPath | None = Field(None, description="model that is scored on the held-out text")
    data: InputPath | None = Field(None, description="output folder of `danlu data prepare`")
    chat_model: InputPath | None = Field(None, description="model that is talked to; none = no chat scores")
    chat_data: InputPath | None = Field(
        None, description="output folder of `danlu tokenize` with kind=chat, for the losses on replies"
    )
    conversations: int = Field(200, ge=2, description="held-out conversations in the losses on replies")
