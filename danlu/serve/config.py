"""Config of `danlu serve`. Imports nothing heavy."""

import os
from pathlib import Path
from typing import Literal

from pydantic import Field

from danlu.core.config import Config
from danlu.core.errors import UserError


class ServeConfig(Config):
    """`danlu serve`: OpenAI's API, and a page to chat on."""

    model: tuple[str, ...] = Field(
        min_length=1,
        description="run folder, Hugging Face folder or hub id, .gguf file, or smollm2; NAME=PATH names it; "
        "several are served side by side",
    )
    adapter: tuple[str, ...] = Field(
        (), description="NAME=PATH of a LoRA adapter of the first model, served under its name"
    )
    host: str = Field("127.0.0.1", description="address to listen at; 0.0.0.0 = reachable from elsewhere")
    port: int = Field(8000, ge=0, le=65535, description="0 = any free one")
    api_key: tuple[str, ...] = Field(
        (), description="what clients must send; else $DANLU_API_KEY; without any, everybody may ask"
    )
    allow_host: tuple[str, ...] = Field(
        (), description="names that clients reach this server by, beside localhost and numbers"
    )
    allow_origin: tuple[str, ...] = Field(
        (), description="web pages elsewhere whose scripts may ask, * = any"
    )
    dtype: Literal["auto", "float32", "bf16", "int8", "int4"] = Field(
        "auto", description="of the weights that it computes with: auto is bf16 where the hardware has it"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a GPU where there is one")
    deterministic: bool = Field(
        True, description="an answer is the same whatever else is asked meanwhile; a processor's, no adapters"
    )
    cache_gb: float = Field(
        0,
        ge=0,
        description="of keys and values, for each model; 0 = 1 or what 4 contexts take, on a GPU a quarter",
    )
    max_tokens: int = Field(
        0, ge=0, description="longest answer of a chat that names none; 0 = what the context leaves"
    )
    max_pending: int = Field(256, ge=1, description="answers unfinished at a time; more are refused")
    max_body_mb: float = Field(4, gt=0, description="largest request")
    timeout: float = Field(600, gt=0, description="seconds that a request may take")
    grace: float = Field(60, ge=0, description="seconds that running answers may still take at the end")
    preferences: Path = Field(
        Path("preferences.jsonl"), description="where the page's thumbs are kept, a row each"
    )
    engine: Literal["danlu", "vllm"] = Field(
        "danlu", description="vllm starts vLLM on the same model, with the same names"
    )

    @property
    def keys(self) -> tuple[str, ...]:
        """What clients may send. Raises UserError for a key that no header can carry."""
        keys = self.api_key or tuple(filter(None, [os.environ.get("DANLU_API_KEY")]))
        if any(not key.strip() or not key.isascii() for key in keys):
            raise UserError("an API key is empty, or not ASCII", "choose another")
        return keys


def split_name(ref: str) -> tuple[str, str]:
    """NAME=PATH, or a path that says the name: of a stage folder "run/stage"."""
    name, equals, path = ref.partition("=")
    if equals and name and "/" not in name:
        return name, path
    parts = [
        part
        for part in Path(ref.removesuffix(".gguf")).parts
        if part not in ("/", ".", "..", "runs", "models")
    ]
    return "/".join(parts[-2:]) or ref, ref
