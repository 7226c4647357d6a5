"""Config of the verbs that generate. Imports nothing heavy."""

from typing import Literal

from pydantic import Field

from danlu.core.config import Config


class SamplingConfig(Config):
    """How the next token is chosen; docs/generate.md says in which order."""

    max_tokens: int = Field(200, ge=1, description="longest answer, in tokens")
    temperature: float = Field(0.8, ge=0, description="0 = always the most probable token (greedy)")
    top_k: int = Field(0, ge=0, description="draw from the k most probable tokens; 0 = all")
    top_p: float = Field(
        0.95, gt=0, le=1, description="draw from the fewest tokens that hold this probability"
    )
    min_p: float = Field(
        0, ge=0, le=1, description="draw from tokens with this share of the best one's probability; 0 = all"
    )
    typical_p: float = Field(
        1, gt=0, le=1, description="draw from the most typical tokens that hold this probability; 1 = all"
    )
    epsilon_cutoff: float = Field(0, ge=0, lt=1, description="draw from tokens at least so probable; 0 = all")
    eta_cutoff: float = Field(
        0, ge=0, lt=1, description="the same, but less strict where many tokens are likely; 0 = all"
    )
    mirostat_tau: float = Field(
        0, ge=0, description="Mirostat: hold the surprise at so many bits a token; 0 = off"
    )
    mirostat_eta: float = Field(0.1, ge=0, description="Mirostat's rate of correction")
    repetition_penalty: float = Field(
        1, gt=0, description="above 1: what was in prompt or answer is less likely"
    )
    presence_penalty: float = Field(0, description="taken from the logits of tokens already in the answer")
    frequency_penalty: float = Field(0, description="taken from the same for each time that they are in it")
    no_repeat_ngram: int = Field(0, ge=0, description="never the same n tokens in a row twice; 0 = off")
    min_tokens: int = Field(0, ge=0, description="shortest answer, in tokens")
    stop: tuple[str, ...] = Field((), description="texts that end the answer, and are left out of it")
    json_schema: str = Field(
        "", description="the answer follows this JSON schema: a file, or the schema itself"
    )
    regex: str = Field("", description="the whole answer matches this regular expression")
    seed: int = Field(0, ge=0, description="the same seed gives the same answer")


class GenerateConfig(SamplingConfig):
    """`danlu generate`: continues a text, or answers as a chat model."""

    model: str = Field(description="run folder, Hugging Face folder or hub id, .gguf file, or smollm2")
    prompt: str = Field(description="the text to continue, or with --chat the message to answer")
    chat: bool = Field(False, description="render the prompt as a user's message")
    n: int = Field(1, ge=1, description="how many answers")
    beams: int = Field(
        1, ge=1, description="above 1: search for the most probable text with so many beams, and draw nothing"
    )
    length_penalty: float = Field(1.0, description="of beams: above 1 favours longer answers")
    dtype: Literal["auto", "float32", "bf16", "int8", "int4"] = Field(
        "auto", description="of the weights that it computes with: auto is bf16 where the hardware has it"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a GPU where there is one")
    deterministic: bool = Field(
        True,
        description="a seed's answer is the same whatever --n is, on a processor; false reads long prompts "
        "sooner",
    )


class ChatConfig(SamplingConfig):
    """`danlu chat`: talk to a model in the terminal."""

    model: str = Field(description="run folder, Hugging Face folder or hub id, .gguf file, or smollm2")
    system: str = Field("", description="system prompt")
    dtype: Literal["auto", "float32", "bf16", "int8", "int4"] = Field(
        "auto", description="of the weights that it computes with: auto is bf16 where the hardware has it"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a GPU where there is one")
