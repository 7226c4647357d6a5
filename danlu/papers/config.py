"""Config of `danlu reproduce`. Imports no torch."""

from pathlib import Path

from pydantic import Field

from danlu.core.config import Config, InputPath


class ReproduceConfig(Config):
    """A paper's claim, run in miniature."""

    name: str = Field(description="the experiment, e.g. opt-logbook")
    out: Path | None = Field(None, description="folder of the result; default runs/reproduce/NAME")
    data: InputPath | None = Field(
        None,
        description="text, or conversations for lora; default: what $DANLU_DATA holds, else what a package "
        "carries",
    )
    seed: int = Field(0, ge=0, description="first seed; the others follow it")
