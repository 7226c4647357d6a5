"""What a verb of the command line is, and what it predicts about itself."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from danlu.core.config import Config
from danlu.core.errors import UserError


@dataclass
class Estimate:
    """What a stage will need, predicted before anything runs."""

    tokens: int = 0
    """Tokens that go through the stage."""
    flops: float = 0.0
    """Floating-point operations."""
    memory_bytes: int = 0
    """Peak resident memory, but for what every danlu process takes."""
    seconds: float = 0.0
    outputs: dict[str, Any] = field(default_factory=dict)
    """Facts that later stages need: bytes, documents, tokens, vocab_size, parameters …"""
    problems: list[str] = field(default_factory=list)
    """What won't fit or won't work, one sentence each."""


@dataclass(frozen=True)
class Verb:
    """One row of the table in `cli.py`; everything behind the names is imported when called."""

    name: str
    """As typed, e.g. "pretrain" or "tokenizer train"."""
    function: str
    """"module:function"; takes the config, returns the result."""
    config: str
    """"module:Class" of its config; the module imports no torch."""
    help: str
    positional: tuple[str, ...] = ()
    """Config fields that are given by position."""
    estimate: str | None = None
    """"module:function" taking (config, {input field: Estimate of the stage it reads})."""
    stage: bool = False
    """Whether it can be a stage of a recipe (its config is a StageConfig)."""
    distributed: bool = False
    """Whether every process of torchrun runs it; else the first does, and the others wait."""
    keeps_nothing: bool = False
    """Whether, run alone without --out, its result is printed and no run folder is kept."""
    default_out: str | None = None
    """"module:function" that gives the folder for what was typed all the same, or None."""
    resumes: bool = False
    """Whether the same command, after an interruption, goes on where it stopped. A stage always does."""
    show: str | None = None
    """"module:function" that prints a result for people; None where the function itself does that."""
    needs_table: bool = False
    """Whether `function` and `show` take the table of verbs as their second argument."""
    examples: tuple[str, ...] = ()
    """Commands for the help."""
    also: str | None = None
    """A second name, e.g. "eval run" for "eval"."""
    extra: str = ""
    """The extra of danlu's packages without which it can't work."""
    group: str = ""
    """Heading that it is listed under."""

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, self.also) if self.also else (self.name,)

    def load_function(self) -> Callable[..., Any]:
        """Raises UserError where packages of an extra are missing."""
        try:
            return resolve(self.function)
        except ModuleNotFoundError as error:
            if not self.extra or (error.name or "").startswith("danlu"):
                raise
            raise UserError(
                f"the package {error.name} is not installed", f"pip install 'danlu[{self.extra}]'"
            ) from None

    def load_config(self) -> type[Config]:
        return resolve(self.config)

    def load_show(self) -> Callable[..., None]:
        return resolve(self.show) if self.show else lambda *result: None

    def run_estimate(self, config: Config, upstream: Mapping[str, Estimate]) -> Estimate:
        return resolve(self.estimate)(config, upstream) if self.estimate else Estimate()


def resolve(target: str) -> Any:
    """Imports "module:name"."""
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)
