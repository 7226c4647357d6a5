"""Config of the verbs that generate. Imports nothing heavy."""

from typing import Literal

from pydantic import Field

from danlu.core.config import Config


class SamplingConfig(Config):
    """How the next token is chosen: temperature, then top_k, then top_p, then a draw."""

    max_tokens: int = Field(200, ge=1, description="longest answer, in tokens")
    temperature: float = Field(0.8, ge=0, description="0 = always the most probable token (greedy)")
    top_k: int = Field(0, ge=0, description="draw from the k most probable tokens; 0 = all")
    top_p: float = Field(
        0.95, gt=0, le=1, description="draw from the fewest tokens that hold this probability"
    )
    seed: int = Field(0, ge=0, description="the same seed gives the same answer")


class GenerateConfig(SamplingConfig):
    """`danlu generate`: continues a text, or answers as a chat model."""

    model: str = Field(description="run folder, Hugging Face folder or hub id, .gguf file, or smollm2")
    prompt: str = Field(description="the text to continue, or with --chat the message to answer")
    chat: bool = Field(False, description="render the prompt as a user's message")
    n: int = Field(1, ge=1, description="how many answers")
    dtype: Literal["auto", "bf16", "float32"] = Field("auto", description="of the computation")


class ChatConfig(SamplingConfig):
    """`danlu chat`: talk to a model in the terminal."""

    model: str = Field(description="run folder, Hugging Face folder or hub id, .gguf file, or smollm2")
    system: str = Field("", description="system prompt")
